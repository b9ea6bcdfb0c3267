"""`sslscale plan` on real shards, with a real short training in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sslscale.config import RunConfig, load_config
from sslscale.errors import StageError, UserError
from sslscale.plan.model import Machine
from sslscale.plan.stage import plan_lines, run_plan
from sslscale.shards.write import run_pack

QUICKSTART = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
TINY = "architecture: resnet10t, channels: 1, kwargs: {layers: [1, 1, 1, 1], channels: [8, 8, 8, 8], stem_width: 4}"
MACHINE = Machine(ranks_per_node=2, link=1e9, network=1e9, store=1e9)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("plan")
    overrides = [f"pack.output={folder / 'data'}", f"datasets.train={folder / 'data' / 'train'}", "pack.workers=1"]
    overrides += [f"run={folder / 'run'}", f"pretrain.backbone={{{TINY}}}", "pretrain.epochs=4"]
    overrides.append("pretrain.global_batch=512")
    config = load_config(QUICKSTART, overrides)
    assert config.pack is not None
    run_pack(config.pack)
    return config


def test_a_plan_counts_and_measures(config: RunConfig) -> None:
    assert config.pretrain is not None
    plan = run_plan(config, MACHINE, probe_steps=4, probe_ranks=2)
    assert plan.steps == 15  # 4 epochs of 1797 samples in batches of 512
    assert (plan.ranks, plan.measured.ranks, plan.measured.samples) == (2, 2, 256)
    assert plan.samples_per_rank == 15 * 256
    assert 4 <= plan.shards_per_rank <= 8  # eight shards, half of the samples
    shards = Path(config.datasets["train"])
    bytes_of_all = sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert plan.bytes_read == pytest.approx(15 * 512 / 1797 * bytes_of_all)
    assert plan.device_hours == pytest.approx(2 * plan.seconds / 3600)
    assert plan.measured.trained == plan.measured.parameters > 0
    totals = [plan.memory_by_zero_stage[stage].total for stage in range(4)]
    assert totals[1] > totals[2] > totals[3]
    assert plan.misfits == []
    assert not Path(config.run).exists(), "nothing was started"
    told = "\n".join(plan_lines(plan))
    assert "ZeRO 1 <" in told
    assert "1,000" in told


def test_what_cannot_be_is_refused(config: RunConfig) -> None:
    with pytest.raises(UserError, match="must divide"):
        run_plan(config, MACHINE, ranks=3)
    with pytest.raises(UserError, match="no pretrain section"):
        run_plan(config.model_copy(update={"pretrain": None}), MACHINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it fails for want of a GPU")
def test_a_training_that_fails_says_why(config: RunConfig) -> None:
    assert config.pretrain is not None
    broken = config.pretrain.model_copy(update={"device": "cuda"})
    with pytest.raises(StageError, match="no CUDA device"):
        run_plan(config.model_copy(update={"pretrain": broken}), MACHINE)
