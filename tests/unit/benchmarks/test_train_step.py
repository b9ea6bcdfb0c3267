"""The table of training steps: every objective has a recipe, and the bare loop does the same work."""

import argparse

import pytest
import torch
import train_step

from sslscale.models.export import build_backbone
from sslscale.objectives import OBJECTIVES, build_objective


@pytest.fixture
def arguments():
    return argparse.Namespace(threads=1, batch=16, precision="fp32")


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_has_a_recipe(name, arguments, tmp_path):
    config = train_step.configure(name, arguments, tmp_path)
    assert config.pretrain.objective["name"] == name and config.pretrain.held_out is None
    assert config.pretrain.global_batch == 16 and config.datasets["train"].startswith(str(tmp_path))


def test_a_row_counts_as_long_as_config_settings_and_machine_are_the_same(arguments, tmp_path):
    machine = {"name": "cpu2", "cpu": "one"}

    def digest(name="simclr", folder=tmp_path, machine=machine, turns=None, **more):
        changed = argparse.Namespace(**{**vars(arguments), **more})
        recipe = train_step.recipe_of(name)._replace(**(turns or {}))
        return train_step.row_hash(train_step.configure(name, changed, folder), machine, recipe)

    assert digest() == digest(folder=tmp_path / "elsewhere")
    others = {digest("byol"), digest(turns={"steps": 2}), digest(batch=32), digest(machine={**machine, "cpu": "two"})}
    assert len({digest(), *others}) == 5


def test_the_bare_loop_begins_with_what_ours_prepared_and_reads_partners(arguments, packed_digits, tmp_path):
    config = train_step.configure("scan", arguments, tmp_path)
    config.datasets["train"] = str(packed_digits(64))
    torch.manual_seed(1)
    prepared = build_objective(
        config.pretrain.objective, build_backbone(config.pretrain.backbone), config.pretrain.views
    )
    prepared.neighbours = torch.arange(64).roll(1)[:, None].repeat(1, prepared.num_neighbours)
    bare = train_step.Bare(config, tmp_path, prepared)
    try:
        assert torch.equal(bare.objective.neighbours, prepared.neighbours)
        for own, theirs in zip(bare.objective.parameters(), prepared.parameters(), strict=True):
            assert torch.equal(own, theirs)
        inputs, ids, beside = bare.ahead.result()
        assert torch.equal(beside, bare._read(((ids - 1) % 64).tolist())) and not torch.equal(beside, inputs)
        bare.run(1)
        assert not torch.equal(next(bare.objective.parameters()), next(prepared.parameters()))
    finally:
        bare.close()


def test_a_loop_that_fails_is_a_failed_row(arguments, tmp_path, monkeypatch):
    config = train_step.configure("simclr", arguments, tmp_path)
    monkeypatch.setattr(train_step, "_compare", lambda config, recipe: 1 / 0)
    with pytest.raises(train_step.RunFailed, match="ZeroDivisionError"):
        train_step.compare(config, train_step.recipe_of("simclr"))
