"""One objective and its optimiser on one process or many: DDP or FSDP2, micro-batches, recomputing, compiling.

The loop sees no difference: a step is `backward`, `clip`, and `update` or `drop`. Losses, scalars and gradients are
means over micro-batches and processes, the same on every process.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from voxelstem import distributed
from voxelstem.backbones.encoder import Encoder
from voxelstem.backbones.layers import Block
from voxelstem.engine import device as devices
from voxelstem.engine.optim import OptimConfig, make_optimizer
from voxelstem.errors import ConfigError
from voxelstem.protocols import Batch, StepOutput

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How a step is shared out among processes, and what it saves in memory and time."""

    kind: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every process holds everything. `fsdp`: each holds a share of weights, teacher and optimiser state."""
    accumulate: int = 1
    """Micro-batches in a step. What an objective compares across samples it compares within one of them."""
    recompute: bool = False
    """Compute each transformer block once more for its gradient instead of keeping what it computed."""
    compile: bool = False
    """Compile the transformer blocks (torch.compile): a slower start, then faster steps."""
    timeout_s: float = 600.0
    """How long a process waits for the others."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: an unknown kind, no micro-batch, or no time to wait.
        """
        if self.kind not in {"ddp", "fsdp"}:
            raise ValueError(f"kind is ddp or fsdp, got '{self.kind}'")
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be >= 1, got {self.accumulate}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be > 0, got {self.timeout_s}")


class Trainee:
    """What is trained: `objective` (in place, under the names it had) and its `optimizer`."""

    def __init__(
        self, objective: Any, optim: OptimConfig, config: ParallelConfig, *, device: torch.device, precision: str
    ) -> None:
        """`objective` is a module that satisfies `protocols.Objective`, lies on `device` and is equal everywhere.

        The processes are those that were joined (`distributed.joined`); alone, nothing is shared out, whatever `kind`.

        Raises:
            ConfigError: this network cannot recompute or be compiled, or there is no compiler.
        """
        self.objective = objective
        self.config = config
        self.device, self._precision = device, precision
        if config.recompute:
            for encoder in _every(objective, Encoder, "recompute"):
                encoder.recompute = True
        if config.compile:
            _check_compiler(device)
            for block in _every(objective, Block, "compile"):
                block.compile()
        self._inside = _Inside(objective)
        self._wrapped: Any = self._inside
        self._sharded = config.kind == "fsdp" and distributed.here().count > 1
        if self._sharded:
            self._wrapped = self._shard()
        elif distributed.here().count > 1:
            self._wrapped = self._replicate()
        # After sharding, which puts other parameters in the places of the old.
        self.optimizer = make_optimizer(objective, objective.learner.param_groups(), optim)
        self._parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def backward(self, batch: Batch, *, progress: float) -> StepOutput:
        """Forward and backward of this process's share of a batch, micro-batch by micro-batch.

        The loss and the scalars that come back are means over micro-batches and processes; they carry no graph.

        Raises:
            ConfigError: the share does not divide into micro-batches of one size.
        """
        count = self.config.accumulate
        if len(batch) % count:
            raise ConfigError(
                f"{len(batch)} samples on each process do not divide into {count} micro-batches",
                hint="set loader.batch to a multiple of parallel.accumulate times the number of processes",
            )
        size = len(batch) // count
        # Views that threads or workers made lie on the CPU, and so does everything about places.
        batch = devices.move(batch, self.device)
        parts = [batch] if count == 1 else [batch.part(at, at + size) for at in range(0, len(batch), size)]
        known = self._known(parts)
        outputs: list[StepOutput] = []
        for number, share in enumerate(parts):
            part = replace(share, known=known)
            with self._reduced(last=number == count - 1):
                with devices.autocast(self.device, self._precision):
                    loss, scalars = self._wrapped(lambda: self._step(part, progress))  # noqa: B023 - called at once
                (loss / count if count > 1 else loss).backward()
            outputs.append(StepOutput(loss=loss.detach(), scalars=scalars))
        return _averaged(outputs)

    def _known(self, parts: list[Batch]) -> dict[str, Tensor]:
        """What terms of the loss rest on, as `Batch.known` says it; nothing where one part is the whole batch."""
        ask = getattr(self.objective, "known", None)
        if ask is None or (len(parts) == 1 and distributed.here().count == 1):
            return {}
        each: list[dict[str, Tensor]] = [ask(part) for part in parts]
        if not each[0]:
            return {}
        # Doubles: float32 cannot count the voxels of a large batch one by one.
        sums = torch.stack([torch.stack([found[name] for found in each]).double().sum() for name in each[0]])
        counts = (distributed.mean(sums) / len(parts)).float()
        return dict(zip(each[0], counts.unbind(), strict=True))

    def _step(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, float]]:
        output: StepOutput = self.objective.step(batch, progress=progress)
        # A tuple: what wraps a module looks for tensors in tuples and dicts.
        return output.loss, output.scalars

    def clip(self, max_norm: float) -> float:
        """Shorten the gradient of all parameters on all processes to `max_norm`; return how long it was."""
        norm: Any = nn.utils.clip_grad_norm_(self._parameters, max_norm)
        return float(norm.full_tensor() if self._sharded else norm)

    def update(self) -> None:
        """Let the optimiser take its step; the gradients are used up."""
        self.optimizer.step()
        self.drop()

    def drop(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def look(self, work: Callable[[], Result]) -> Result:
        """Call `work`, which uses the networks between two steps, without gradients; on all processes at once.

        Where weights are sharded, the networks can be used nowhere else, and answer in the precision of a step.
        """
        if not self._sharded:
            with torch.no_grad():
                return work()
        # Weights are put together in the precision of a step: in bf16 they multiply nothing that is not.
        with torch.no_grad(), devices.autocast(self.device, self._precision):
            result: Result = self._wrapped(work)
        self._wrapped.reshard()
        return result

    def _replicate(self) -> nn.Module:
        # Unused parameters are looked for: an objective may train one level of two, or a term of it begin later.
        # Buckets then stay as they are laid out first; without, torch lays them out anew after the first step, and of
        # three processes or more a run that resumes would add in another order than one that goes on. One parameter
        # that is never used spares every process torch's warning that there may be none.
        self._inside.idle = nn.Parameter(torch.zeros((), device=self.device))
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return DistributedDataParallel(
            self._inside,
            broadcast_buffers=False,  # the same everywhere, because statistics are of the whole batch
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )

    def _shard(self) -> nn.Module:
        # Seconds to import, and not for those who do not shard.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (distributed.here().count,))
        with devices.autocast(self.device, self._precision):
            low = torch.is_autocast_enabled(self.device.type)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = policy if low else MixedPrecisionPolicy()
        # Teacher and student alike: a teacher follows share by share.
        for module in self.objective.modules():
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh, mp_policy=policy)
        sharded: Any = fully_shard(self._inside, mesh=mesh, mp_policy=policy)
        return sharded

    def _reduced(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged after the last micro-batch only."""
        if self._sharded:
            self._wrapped.set_requires_gradient_sync(last)
        elif isinstance(self._wrapped, DistributedDataParallel) and not last:
            return self._wrapped.no_sync()
        return nullcontext()


class _Inside(nn.Module):
    """Calls what it is given: everything that uses the networks passes here, where a wrapper can hook in."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, work: Callable[[], Result]) -> Result:
        return work()


def _every(objective: nn.Module, kind: type[Any], setting: str) -> list[Any]:
    found = [module for module in objective.modules() if isinstance(module, kind)]
    if not found:
        raise ConfigError(
            f"parallel.{setting} is for networks made of transformer blocks, and this one has none",
            hint=f"set parallel.{setting}=false",
        )
    return found


def _check_compiler(device: torch.device) -> None:
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise ConfigError(
            "parallel.compile needs a C++ compiler on a CPU, and there is none here",
            hint="install g++, or set parallel.compile=false",
        )


def _averaged(outputs: list[StepOutput]) -> StepOutput:
    """The mean over micro-batches and processes, of doubles: one process and one micro-batch lose no bit.

    A scalar that some micro-batches do not say, because nothing was known there, is the mean over those that do. All
    processes say the same ones.
    """
    names = list(dict.fromkeys(name for output in outputs for name in output.scalars))
    said = [[output.scalars[name] for output in outputs if name in output.scalars] for name in names]
    numbers = [torch.tensor(each, dtype=torch.float64).mean() for each in ([float(o.loss) for o in outputs], *said)]
    loss, *scalars = distributed.mean(torch.stack(numbers)).tolist()
    return StepOutput(loss=torch.tensor(loss, dtype=torch.float64), scalars=dict(zip(names, scalars, strict=True)))
