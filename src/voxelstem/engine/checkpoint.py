"""Resumable state: each checkpoint is a new folder, its manifest is written last. Tensors only, never pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from voxelstem.errors import CheckpointError

_log = logging.getLogger(__name__)
_FILES = ("objective.safetensors", "optimizer.safetensors")


class _DamagedError(CheckpointError):
    """The files are not what was written; the checkpoint before may be whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """How often, and how many are kept."""

    every: int = 200
    keep: int = 2

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: fewer than one step between checkpoints, or fewer than two kept.
        """
        if self.every < 1 or self.keep < 2:  # noqa: PLR2004 - the last one may be the damaged one
            raise ValueError(f"need every >= 1 and keep >= 2, got {self.every} and {self.keep}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def write_checkpoint(
    folder: Path, step: int, objective: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int
) -> Path:
    """Write `folder`/step-00000123 so that it is either whole or not there at all; then drop the oldest.

    Raises:
        CheckpointError: the disk is full or not writable; what was there before is untouched.
    """
    final = folder / f"step-{step:08d}"
    unfinished = folder / f".step-{step:08d}.unfinished"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        # Contiguous copies: safetensors refuses tensors that share memory.
        tensors = {name: value.detach().cpu().clone() for name, value in objective.state_dict().items()}
        save_file(tensors, unfinished / _FILES[0])
        save_file({n: v.detach().cpu().clone() for n, v in _flatten(optimizer).items()}, unfinished / _FILES[1])
        files = {path.name: _digest(path) for path in sorted(unfinished.iterdir())}
        for name in files:
            _sync(unfinished / name)
        manifest = unfinished / "manifest.json"
        manifest.write_text(json.dumps({"step": step, "sha256": files}, indent=1), encoding="utf-8")
        _sync(manifest)
        _sync(unfinished)
        # A damaged one of the same step may lie there, out of which no run was resumed.
        _drop(final)
        unfinished.rename(final)
        _sync(folder)
        for old in checkpoints(folder)[:-keep]:
            _drop(old)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as an error of its own kind.
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            f"checkpoint {folder.name}/{final.name} ({_size(objective, optimizer) / 1e6:.1f} MB) "
            f"could not be written: {reason}",
            hint="free some space and start the same command again; it resumes from the newest whole checkpoint",
        ) from error
    return final


def _drop(path: Path) -> None:
    """Take a checkpoint away: by one rename it stops counting as one, however far the deletion gets."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.dropped")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _size(objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    return sum(tensor.nbytes for tensor in [*objective.state_dict().values(), *_flatten(optimizer).values()])


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/manifest.json"))


def read_checkpoint(path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint into `objective` and `optimizer` and return its step.

    Raises:
        CheckpointError: a file is damaged, or belongs to another architecture.
    """
    step = _check(path)
    try:
        weights, state = (load_file(path / name) for name in _FILES)
    except SafetensorError as error:
        raise _damaged(path.name) from error
    try:
        objective.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path.name} holds another architecture than the recipe asks for",
            hint="resume with the settings in the run's config.toml, or choose a new --out",
        ) from error
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def _check(path: Path) -> int:
    """Compare the files with the manifest and return the step."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        step, digests = int(manifest["step"]), dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(f"{path.name}/manifest.json") from error
    for name in _FILES:
        if not (path / name).is_file() or _digest(path / name) != digests.get(name):
            raise _damaged(f"{path.name}/{name}")
    return step


def _damaged(what: str) -> _DamagedError:
    return _DamagedError(f"{what} is damaged", hint="delete this folder to resume from the one before")


def resume(folder: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint that is whole, and return its step; 0 if there is none.

    A damaged one that is passed over is told by a warning.

    Raises:
        CheckpointError: there are some and all are damaged, or the newest whole one is of another architecture.
    """
    for leftover in [*folder.glob(".step-*.unfinished"), *folder.glob(".step-*.dropped")]:
        shutil.rmtree(leftover, ignore_errors=True)
    damaged: _DamagedError | None = None
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            step = read_checkpoint(path, objective, optimizer)
        except _DamagedError as error:
            damaged = damaged or error
            continue
        if damaged is not None:
            _log.warning("checkpoint %s is damaged: resuming from step %d", found[-1].name, step)
        return step
    if damaged is not None:
        raise damaged
    return 0
