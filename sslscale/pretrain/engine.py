"""DeepSpeed around one objective: ZeRO 0 to 3, precision, accumulation, clipping, and steps that never apply a NaN."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sslscale.config import PretrainConfig
from sslscale.errors import StageError, UserError
from sslscale.models.collectives import all_reduce
from sslscale.models.norm import batch_norms, follow_streams, statistics
from sslscale.objectives.base import Objective
from sslscale.pretrain.optimizer import build_optimizer, set_schedules
from sslscale.runtime.device import multiplies_bf16
from sslscale.views.base import Batch

SHARDED, UNIVERSAL = "deepspeed", "universal"
_SCALE = "loss_scale"
_LARGEST_BUCKET = 500_000_000  # gradients that are reduced together


@dataclass(frozen=True)
class StepResult:
    """What one step gave: means over all ranks and micro-batches."""

    metrics: dict[str, float]
    applied: bool
    """False where the loss or a gradient was not finite on some rank: no rank stepped."""
    stop: bool
    """Some rank was asked to stop; every rank learns it at the same step."""


def whole_batch(objective: Objective, config: PretrainConfig) -> str | None:
    """Why a batch of this objective must not be split; None where it may be."""
    if objective.needs_whole_batch:
        return "compares all samples of a batch"
    if config.batch_norm == "global" and any(module.training for module in batch_norms(objective)):
        return "trains BatchNorm, which normalises by all samples of a batch (not with batch_norm=stream)"
    return None


def accumulation(config: PretrainConfig, world_size: int, whole: str | None) -> tuple[int, int]:
    """(micro-batch of one rank, passes a step). The global batch stays what it is at every world size.

    `whole` is what `whole_batch` says. UserError where the batch would have to be split and must not be.
    """
    share = config.global_batch // world_size
    unit = config.global_batch // config.num_streams if config.batch_norm == "stream" else 1  # that no pass splits
    limit = config.micro_batch or share
    if limit < unit:
        raise UserError(
            "with batch_norm=stream a pass holds a stream's whole share of the batch",
            got=f"micro_batch={limit}, global_batch={config.global_batch} of {config.num_streams} streams",
            allowed=f"micro_batch >= {unit}",
            fix="raise pretrain.micro_batch or num_streams",
        )
    passes = next(n for n in range(1, share + 1) if share % (n * unit) == 0 and share // n <= limit)
    if passes > 1 and whole is not None:
        raise UserError(
            f"the objective {config.objective.get('name')!r} {whole}, so it cannot accumulate",
            got=f"global_batch={config.global_batch} on {world_size} ranks with micro_batch={limit}",
            allowed=f"micro_batch >= {share}",
            fix="raise pretrain.micro_batch or num_workers, or lower pretrain.global_batch",
        )
    return share // passes, passes


def agreed_precision(asked: str, device: torch.device) -> str:
    """`asked`, or for "auto" what is fast on every rank: bf16 or fp32. All ranks call it."""
    if asked not in ("auto", "bf16"):
        return asked
    able = torch.tensor(float(multiplies_bf16(device)), device=device)
    all_reduce(able)
    everywhere = bool(able == dist.get_world_size())
    if asked == "auto":
        return "bf16" if everywhere else "fp32"
    if not everywhere and dist.get_rank() == 0:
        warnings.warn(
            "pretrain.precision=bf16 is emulated where a device has no instructions for it, as a rank's has not: many "
            "times slower than fp32; precision=auto takes bf16 only where it is fast",
            stacklevel=2,
        )
    return asked


class Engine:
    """One DeepSpeed engine and one optimizer. torch.distributed is up already; `device` is this rank's.

    `universal` says that what `load` will be given is in DeepSpeed's universal form, for another number of ranks.
    """

    def __init__(
        self,
        objective: Objective,
        config: PretrainConfig,
        total_steps: int,
        device: torch.device,
        *,
        universal: bool = False,
    ) -> None:
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
        os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed insists on, launcher or not
        import deepspeed

        deepspeed.logger.setLevel("ERROR")
        # DeepSpeed calls torch's collectives by their old names, a few lines of a user's screen a rank.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        if device.type == "cpu":
            # Else DeepSpeed compiles a shared-memory all-reduce: a minute, and a compiler that users may not have.
            deepspeed.ops.__compatible_ops__ = {}
        # Else its copy of the world outlives the process group, and a second run in this process fails.
        deepspeed.utils.groups._WORLD_GROUP = None
        self.versions = {"deepspeed": deepspeed.__version__, "torch": torch.__version__}
        self.config, self.total_steps, self.device = config, total_steps, device
        self.objective, self._universal = objective, universal
        self.precision = agreed_precision(config.precision, device)
        self.world_size = dist.get_world_size()
        self.micro_batch, self.passes = accumulation(config, self.world_size, whole_batch(objective, config))
        self._by_stream = config.batch_norm == "stream"
        follow_streams(objective.batch_norms(), config.global_batch // config.num_streams, self._by_stream)
        self._optimizer = build_optimizer(objective, config.optimizer)
        self._sums: list[Tensor] = []  # of this step's losses and gradients, one each
        # Hooks see a gradient before DeepSpeed reduces, partitions or frees it, at every stage.
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._watch)
        self._engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=self._optimizer,
            config=self._deepspeed_config() | ({"checkpoint": {"load_universal": True}} if universal else {}),
            dist_init_required=False,
        )
        self._engine.checkpoint_engine.save = self._write
        self._engine._copy_recovery_script = lambda folder: None  # scripts that `backbone/` spares a reader
        self._statistics = statistics(objective.batch_norms())  # now, since DeepSpeed may have moved them
        self.zero_stage: int = self._engine.zero_optimization_stage()
        self._bad_in_a_row = 0
        self.bad_steps = 0

    def _deepspeed_config(self) -> dict[str, Any]:
        """fp32 master weights always; bf16 and fp16 compute by autocast, so that a teacher follows the masters."""
        config = self.config
        settings: dict[str, Any] = {
            "train_batch_size": config.global_batch,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.passes,
            "gradient_clipping": config.optimizer.clip_norm,
            "zero_optimization": {
                "stage": config.zero_stage,
                "reduce_bucket_size": _bucket_size(self.objective),
                **_offload(config),
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }
        if self.precision != "fp32":
            dtype = {"bf16": "bfloat16", "fp16": "float16"}[self.precision]
            settings["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
        return settings

    def _watch(self, gradient: Tensor) -> None:
        # a sum is finite exactly when its terms are (up to overflow, which is as bad)
        self._sums.append(gradient.detach().sum(dtype=torch.float32))

    def step(self, batches: Sequence[Batch], step: int, stop: bool = False) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step, or none on any rank."""
        lr = set_schedules(self._engine.optimizer.param_groups, self.config.optimizer, step, self.total_steps)
        sums: dict[str, Tensor] = {}
        self._sums.clear()
        before = [tensor.clone() for tensor in self._statistics]
        moved: list[Tensor] = []  # a pass: the moments that it leaves
        for batch in batches:
            if moved:
                self._set_statistics(before)
            metrics = self._engine(batch)
            loss = metrics["loss"]
            self._sums.append(loss.detach().float())
            self._engine.backward(loss)
            if self._by_stream:
                moved.append(self._moments())
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float() / len(batches)
            if len(batches) > 1 and batch is not batches[-1]:
                self._engine.step()  # not yet at the boundary: DeepSpeed only counts
        names = sorted(sums)
        bad = (torch.stack(self._sums) * 0.0).sum()  # 0 or NaN
        packed = torch.stack([sums[name] for name in names] + [bad.new_tensor(float(stop)), bad])
        count = len(packed)
        if moved:  # each pass began with the same: the mean over passes and ranks is one move by the mean over streams
            packed = torch.cat([packed, torch.stack(moved).mean(dim=0)])
        all_reduce(packed)
        packed = packed / self.world_size
        values = packed[:count].tolist()
        if moved:
            self._set_moments(packed[count:])
        finite = values[-1] == 0.0
        self._optimizer.skip = not finite
        scale = self._loss_scale()
        self._engine.step()
        seeks_scale = math.isfinite(values[names.index("loss")]) and 1.0 <= self._loss_scale() < scale
        if not finite:
            self._set_statistics(before)
        self._count(finite, values[names.index("loss")], step, seeks_scale)
        return StepResult({**dict(zip(names, values, strict=False)), "lr": lr}, applied=finite, stop=values[-2] > 0)

    def _set_statistics(self, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self._statistics, values, strict=True):
            tensor.copy_(value)

    def _moments(self) -> Tensor:
        """The running means and variances, one after the other, without the counts of batches."""
        moments = [tensor.flatten().float() for tensor in self._statistics if tensor.is_floating_point()]
        return torch.cat(moments) if moments else torch.empty(0, device=self.device)

    def _set_moments(self, values: Tensor) -> None:
        """The inverse of `_moments`."""
        moments = [tensor for tensor in self._statistics if tensor.is_floating_point()]
        for tensor, value in zip(moments, values.split([tensor.numel() for tensor in moments]), strict=True):
            tensor.copy_(value.view_as(tensor))

    @property
    def _scaler(self) -> Any:
        """The loss scale of precision fp16, which DeepSpeed leaves out of its checkpoints; None of the others."""
        return getattr(self._engine, "torch_autocast_z0_gradscaler", None)

    def _loss_scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def _count(self, finite: bool, loss: float, step: int, seeks_scale: bool) -> None:
        """A step that overflowed under a loss scale that is lowered now is not applied, and no sign of divergence."""
        if not seeks_scale:
            self._bad_in_a_row = 0 if finite else self._bad_in_a_row + 1
        self.bad_steps += not finite
        if self._bad_in_a_row >= self.config.max_bad_steps:
            raise StageError(
                f"pretrain: the loss or a gradient was not finite for {self._bad_in_a_row} steps in a row",
                got=f"loss {loss} at step {step}",
                fix="lower pretrain.optimizer.lr or set clip_norm; the last good checkpoint is intact",
            )

    def save(self, folder: Path) -> Exception | None:
        """Writes DeepSpeed's sharded state into `folder`; every rank calls it. Returns why this rank could not."""
        self._not_written: Exception | None = None
        scale = {} if self._scaler is None else {_SCALE: self._scaler.state_dict()}
        self._engine.save_checkpoint(str(folder), tag=SHARDED, client_state=scale, save_latest=False)
        return self._not_written

    def _write(self, state_dict: Any, path: str) -> None:
        """DeepSpeed's writer. It must return where it fails, too: the other ranks wait in DeepSpeed's own barriers."""
        try:
            write_tensors(state_dict, Path(path))
        except Exception as error:
            self._not_written = error

    def load(self, folder: Path) -> None:
        """The inverse of `save`; an engine made with `universal` reads what `make_universal` wrote."""
        own = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        loaded, more = self._engine.load_checkpoint(str(folder), tag=UNIVERSAL if self._universal else SHARDED)
        # Under ZeRO 3 the universal form gives every group the settings of the first, and all states one step counter.
        for group, settings in zip(self._optimizer.param_groups, own, strict=True):
            group.update(settings)
        for state in self._optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
        if loaded is None:
            raise StageError("pretrain: DeepSpeed cannot load its checkpoint", got=str(folder))
        if self._scaler is not None and _SCALE in more:
            self._scaler.load_state_dict(more[_SCALE])

    def whole_state(self) -> dict[str, Tensor]:
        """The objective's whole state dict (on rank 0; gathered from all ranks under ZeRO 3)."""
        if self.zero_stage < 3:
            return self.objective.state_dict()
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.objective.parameters())):
            return {name: value.detach().cpu().clone() for name, value in self.objective.state_dict().items()}


def _bucket_size(objective: Objective) -> int:
    """DeepSpeed's default, or all that is trained where that is less: from stage 1 on it allocates a bucket whole.

    By default that is 2 GB in fp32, of a GPU's memory too, for a model of any size. What is reduced stays the same.
    """
    trained = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    return min(trained, _LARGEST_BUCKET)


def _offload(config: PretrainConfig) -> dict[str, Any]:
    """torch's own AdamW on the host: DeepSpeed's would need a compiler on every machine."""
    return {} if config.offload_optimizer == "none" else {"offload_optimizer": {"device": config.offload_optimizer}}


def write_tensors(state: Any, path: Path) -> None:
    """torch.save, on disk when it returns. OSError where there is no room."""
    try:
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch's writer hides the reason behind a complaint about its own position
        raise error.__context__ or error from None


def make_universal(folder: Path) -> None:
    """Rewrites a saved state as one tensor a parameter and moment, which any number of ranks can load."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(folder / SHARDED),
        output_folder=str(folder / UNIVERSAL),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # ZeRO 1 and 2 leave out what only pipelines need
    )
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(arguments)
