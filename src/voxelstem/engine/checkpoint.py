"""Resumable state: a new folder for each checkpoint, written behind the training's back, its manifest last.

Parameters, buffers (a teacher, centres) and the optimiser's moments go through torch's distributed checkpoints, so that
each process writes its own share and any other number of processes can read it. Schedules and every draw of chance
are pure functions of the step and the recipe's seed: there is nothing of theirs to keep.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from voxelstem import distributed
from voxelstem.engine.shards import INDEX, Reader, Writer
from voxelstem.engine.state import (
    OBJECTIVE,
    OPTIMIZER,
    objective_state,
    optimizer_state,
    put_optimizer_state,
    room_for,
)
from voxelstem.errors import CheckpointError

_log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 1 << 26
_SHOWN = 6
_ALONE = "torch.distributed is disabled, unavailable or uninitialized"


class _DamagedError(CheckpointError):
    """The files are not what was written; the checkpoint before may be whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """How often, and how many are kept."""

    every: int = 200
    keep: int = 2
    background: bool = True
    """Train on while one is written: a kill then costs at most an interval and what was trained during the writing.
    Without it training waits, and a kill never costs more than an interval."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: fewer than one step between checkpoints, or fewer than two kept.
        """
        if self.every < 1 or self.keep < 2:  # noqa: PLR2004 - the last one may be the damaged one
            raise ValueError(f"need every >= 1 and keep >= 2, got {self.every} and {self.keep}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """Where a run goes on."""

    step: int = 0
    """Steps that are done; 0 for a run that begins."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the loop gave with the state."""


class Checkpoints:
    """Writes a run's checkpoints, one at a time. All processes make it, call it and leave it together.

    `save` returns as soon as the state is copied to the CPU's memory (which holds one copy more meanwhile); a thread
    writes. A checkpoint is whole or not there: it counts from the moment its folder, complete and on the disk, gets its
    name, and only then is an older one dropped. A kill costs the steps since the newest that counts: one interval and
    the time of writing, and never more than two intervals, as a `save` waits for the one before. Processes must share
    the folder, as a network drive lets them.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Write into `folder`, and keep the newest `keep`."""
        self._folder, self._keep = folder, keep
        # A group of its own: the thread's small talk must not get between the training's collectives.
        self._group: Any = dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: tuple[int, int, Future[None]] | None = None

    def save(
        self, step: int, objective: nn.Module, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Copy the state after `step` steps and let it be written. `facts` are small and made of what JSON knows.

        Raises:
            CheckpointError: the one before could not be written; what was there before it is untouched.
        """
        self.wait()
        said = json.dumps(dict(facts or {}))
        live = {OBJECTIVE + name: value for name, value in objective_state(objective).items()}
        live |= {OPTIMIZER + name: value for name, value in optimizer_state(objective, optimizer).items()}
        copied: dict[str, Tensor] = BlockingAsyncStager().stage(live)
        size = sum(value.nbytes for value in copied.values())
        _hush()
        self._under_way = (step, size, self._thread.submit(self._write, step, copied, said))

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: the disk is full or not writable, or another process of this training is gone.
        """
        if self._under_way is None:
            return
        step, size, future = self._under_way
        self._under_way = None
        try:
            future.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            # CheckpointException is a BaseException, and what torch's writer meets is a RuntimeError.
            raise CheckpointError(
                f"checkpoint {self._folder.name}/{_name(step)} ({size / 1e6:.1f} MB) "
                f"could not be written: {_reason(error)}",
                hint="free some space and start the same command again; it resumes from the newest whole checkpoint",
            ) from error

    def _write(self, step: int, state: dict[str, Tensor], facts: str) -> None:
        """Stand in the thread: prepare, write this process's share, commit."""
        unfinished = self._folder / f".{_name(step)}.unfinished"
        try:
            self._first(lambda: _make_empty(unfinished))
            dcp.save(state, storage_writer=Writer(unfinished), process_group=self._group, no_dist=self._group is None)
            self._first(lambda: _commit(unfinished, self._folder / _name(step), facts=facts, keep=self._keep))
        except (OSError, RuntimeError, CheckpointException):
            if distributed.here().rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _first(self, work: Callable[[], None]) -> None:
        """Let process 0 do it while the others wait; what it meets, all meet."""
        met: list[OSError | None] = [None]
        if distributed.here().rank == 0:
            try:
                work()
            except OSError as error:
                met = [error]
        if self._group is not None:
            dist.broadcast_object_list(met, src=0, group=self._group)
        if met[0] is not None:
            raise met[0]

    def __enter__(self) -> Checkpoints:
        """For `with`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last one. A failure to write it does not hide the error for which the run ends."""
        try:
            self.wait()
        except CheckpointError as problem:
            if error is None:
                raise
            _log.warning("%s", problem.problem)
        finally:
            self._thread.shutdown()
            if self._group is not None:
                dist.destroy_process_group(self._group)


def write_checkpoint(
    folder: Path, step: int, objective: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int
) -> Path:
    """Write one checkpoint and return when it lies there.

    Raises:
        CheckpointError: the disk is full or not writable; what was there before is untouched.
    """
    with Checkpoints(folder, keep=keep) as written:
        written.save(step, objective, optimizer)
    return folder / _name(step)


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{_MANIFEST}"))


def resume(
    folder: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, *, before: int | None = None
) -> Resumed:
    """Load the newest checkpoint that is whole into `objective` and `optimizer`; all processes call this together.

    Process 0 compares every file with its digest and says which one it is, so that all load the same. A damaged one
    that is passed over is told by a warning.

    With `before`, the weights must not have seen this step: checkpoints that did are dropped, but for the oldest one
    where no other is left.

    The index of a checkpoint is a pickle, as torch writes it. It is opened after its digest was compared, and only
    the names that torch's own index is made of are let in, so a planted one is refused rather than run. Digests lie
    beside the files and prove no author: weights that come from elsewhere come as safetensors, never this way.

    Raises:
        CheckpointError: there are some and all are damaged, or the newest whole one is of another architecture.
    """
    found: dict[str, Any] = distributed.said(_look(folder, before) if distributed.here().rank == 0 else None)
    if not found["name"]:
        if found["damaged"]:
            raise _damaged(found["damaged"])
        return Resumed()
    step = _read(folder / found["name"], objective, optimizer)
    if found["damaged"]:
        _log.warning("checkpoint %s is damaged: resuming from step %d", found["damaged"].partition("/")[0], step)
    return Resumed(step=step, facts=found["facts"])


def read_checkpoint(path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> Resumed:
    """Check one checkpoint and load it into `objective` and `optimizer`.

    Raises:
        CheckpointError: a file is damaged, or belongs to another architecture.
    """
    facts = check_checkpoint(path)["facts"]
    return Resumed(step=_read(path, objective, optimizer), facts=facts)


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Compare the files with the manifest and the manifest with itself, and return it.

    Raises:
        CheckpointError: a file is absent, cut or changed.
    """
    try:
        if (path / _MANIFEST).stat().st_size > _LARGEST_MANIFEST:
            raise ValueError("no manifest is that large")
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        said = manifest.pop("self")
        digests = {str(name): str(value) for name, value in manifest["sha256"].items()}
        whole = said == _digest_of(manifest) and path.name == _name(manifest["step"]) and INDEX in digests
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(f"{path.name}/{_MANIFEST}") from error
    if not whole:
        raise _damaged(f"{path.name}/{_MANIFEST}")
    for name, digest in digests.items():
        if Path(name).name != name or not (path / name).is_file() or _digest(path / name) != digest:
            raise _damaged(f"{path.name}/{name}")
    return manifest


def _look(folder: Path, before: int | None) -> dict[str, Any]:
    """Sweep away what is unfinished; the newest whole checkpoint and the newest damaged file, empty where none is."""
    for leftover in [*folder.glob(".step-*.unfinished"), *folder.glob(".step-*.dropped")]:
        shutil.rmtree(leftover, ignore_errors=True)
    damaged, found = "", checkpoints(folder)
    asked = [path for path in found if before is None or path.name <= _name(before)] or found[:1]
    for path in reversed(asked):
        try:
            facts = check_checkpoint(path)["facts"]
        except _DamagedError as error:
            damaged = damaged or error.problem.removesuffix(_IS_DAMAGED)
            continue
        for spoilt in found[len(asked) :]:
            _drop(spoilt)
        return {"name": path.name, "facts": facts, "damaged": damaged}
    return {"name": "", "facts": {}, "damaged": damaged}


def _read(path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load what has been checked, and return its step."""
    reader = Reader(path)
    index = reader.contents
    state: dict[str, Any] = {OBJECTIVE + name: value for name, value in objective_state(objective).items()}
    kinds = {name.removeprefix(OPTIMIZER): dtype for name, (_, dtype) in index.tensors.items() if name not in state}
    try:
        room = room_for(objective, optimizer, kinds)
    except KeyError:
        room = {}
    state |= {OPTIMIZER + name: value for name, value in room.items()}
    here = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
    if here != index.tensors:
        names = sorted(name for name in here.keys() | index.tensors.keys() if here.get(name) != index.tensors.get(name))
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise CheckpointError(
            f"{path.name} holds another architecture than the recipe asks for: "
            f"{', '.join(names[:_SHOWN])}{more} differ",
            hint="resume with the settings in the run's config.toml, or choose a new --out",
        )
    _hush()
    try:
        dcp.load(state, storage_reader=reader, no_dist=not (dist.is_available() and dist.is_initialized()))
    except (OSError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(
            f"{path.name} cannot be read: {_reason(error)}", hint="start the same command again, or delete this folder"
        ) from error
    put_optimizer_state(objective, optimizer, room)
    return int(path.name.removeprefix("step-"))


def _commit(unfinished: Path, final: Path, *, facts: str, keep: int) -> None:
    """Describe the files, put all of it on the disk, give the folder its name; then drop the oldest."""
    files = sorted(path for path in unfinished.iterdir())
    manifest: dict[str, Any] = {
        "step": int(final.name.removeprefix("step-")),
        "processes": distributed.here().count,
        "torch": torch.__version__,
        "bytes": sum(path.stat().st_size for path in files),
        "facts": json.loads(facts),
        "sha256": {path.name: _digest(path) for path in files},
    }
    text = json.dumps(manifest | {"self": _digest_of(manifest)}, indent=1)
    (unfinished / _MANIFEST).write_text(text, encoding="utf-8")
    _sync(unfinished / _MANIFEST)
    _sync(unfinished)
    # A damaged one of the same step may lie there, out of which no run was resumed.
    _drop(final)
    unfinished.rename(final)
    _sync(final.parent)
    for old in checkpoints(final.parent)[:-keep]:
        _drop(old)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _drop(path: Path) -> None:
    """Take a checkpoint away: by one rename it stops counting as one, however far the deletion gets."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.dropped")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hush() -> None:
    """One process alone is what was meant; torch would warn of it at every checkpoint."""
    warnings.filterwarnings("ignore", message=_ALONE)


_IS_DAMAGED = " is damaged"


def _damaged(what: str) -> _DamagedError:
    return _DamagedError(what + _IS_DAMAGED, hint="delete this folder to resume from the one before")


def _reason(error: BaseException) -> str:
    """What the disk said, under all that torch wrapped around it; of other errors only their kind, for the paths."""
    seen: list[BaseException] = [error]
    for inner in seen:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        failures = inner.failures.values() if isinstance(inner, CheckpointException) else ()
        wrapped = [failure[0] for failure in failures]
        seen += [one for one in (*wrapped, inner.__cause__, inner.__context__) if one is not None and one not in seen]
    return type(seen[-1]).__name__
