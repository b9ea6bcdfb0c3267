# Two commands: `make quickstart` and `make test`. Both build .venv/ once and reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The faiss that is there already, else that of a machine without a GPU; the two exclude each other.
EXTRA ?= $(if $(wildcard $(VENV)/.installed-gpu),gpu,cpu)
OTHER := $(if $(filter gpu,$(EXTRA)),cpu,gpu)
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: quickstart test lint types pytest install clean

quickstart: $(VENV)/.installed-$(EXTRA)
	$(BIN)/sslscale run -c configs/quickstart.yaml

test: lint types pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

pytest: $(VENV)/.installed-test
	$(BIN)/python -m pytest

install: $(VENV)/.installed-$(EXTRA)

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.installed-$(EXTRA): pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip uninstall --yes -qq faiss-$(OTHER)
	$(BIN)/python -m pip install --quiet -e '.[$(EXTRA)]'
	@rm -f $(VENV)/.installed-$(OTHER)
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.installed-$(EXTRA)
	$(BIN)/python -m pip install --quiet -e '.[$(EXTRA),test]'
	@touch $@

clean:
	rm -rf $(VENV) runs data
