# Two commands: `make quickstart` and `make test`. Both build .venv/ once and reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRA ?= cpu
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

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed-$(EXTRA): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[$(EXTRA)]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[$(EXTRA),test]'
	@touch $@ $(VENV)/.installed-$(EXTRA)

clean:
	rm -rf $(VENV) runs data
