from __future__ import annotations

import pickle

import pytest

from sslscale.errors import EXIT_FAILED, EXIT_USAGE, Interrupted, StageError, UserError, did_you_mean, missing_package


def test_each_part_is_a_line() -> None:
    error = UserError("unknown setting 'lr'", got="lr=1", allowed="weight_decay", fix="remove it")
    assert str(error).splitlines() == [
        "unknown setting 'lr'",
        "  got:     lr=1",
        "  allowed: weight_decay",
        "  fix:     remove it",
    ]
    assert str(UserError("no shards", got=0)) == "no shards\n  got:     0"
    assert str(UserError("no shards")) == "no shards"


@pytest.mark.parametrize("kind", [UserError, StageError])
def test_errors_cross_processes_with_their_parts(kind: type[UserError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what", got=3, allowed=[1, 2], fix="how")))
    assert type(error) is kind
    assert (error.what, error.got, error.allowed, error.fix) == ("what", 3, [1, 2], "how")
    assert str(error) == str(kind("what", got=3, allowed=[1, 2], fix="how"))


def test_exit_codes() -> None:
    assert (UserError("x").exit_code, StageError("x").exit_code) == (EXIT_USAGE, EXIT_FAILED) == (2, 1)
    assert Interrupted(143).exit_code == 143


def test_did_you_mean() -> None:
    assert did_you_mean("epocs", ["steps", "epochs"]) == "; did you mean 'epochs'?"
    assert did_you_mean("zzz", ["steps", "epochs"]) == ""


def test_a_missing_package_says_how_to_install_it() -> None:
    assert missing_package("faiss", "cpu").fix == "pip install 'sslscale[cpu]'"
    assert missing_package("umap-learn").fix == "pip install umap-learn"
