"""Resumable state: each checkpoint is a new folder, its manifest is written last. Tensors only, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from voxelstem.errors import CheckpointError


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
        save_file(tensors, unfinished / "objective.safetensors")
        save_file(
            {n: v.detach().cpu().clone() for n, v in _flatten(optimizer).items()}, unfinished / "optimizer.safetensors"
        )
        files = {path.name: _digest(path) for path in sorted(unfinished.iterdir())}
        for name in files:
            _sync(unfinished / name)
        manifest = unfinished / "manifest.json"
        manifest.write_text(json.dumps({"step": step, "sha256": files}, indent=1), encoding="utf-8")
        _sync(manifest)
        _sync(unfinished)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint of step {step} could not be written: {error.strerror}",
            hint="free some space and start the same command again; it resumes from the checkpoint before",
        ) from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/manifest.json"))


def read_checkpoint(path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint into `objective` and `optimizer` and return its step.

    Raises:
        CheckpointError: a file is damaged, or belongs to another architecture.
    """
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    for name, digest in manifest["sha256"].items():
        if not (path / name).is_file() or _digest(path / name) != digest:
            raise CheckpointError(
                f"{path.name}/{name} is damaged", hint="delete this folder to resume from the one before"
            )
    try:
        objective.load_state_dict(load_file(path / "objective.safetensors"))
    except RuntimeError as error:
        raise CheckpointError(
            f"{path.name} holds another architecture than the recipe asks for",
            hint="resume with the settings in the run's config.toml, or choose a new --out",
        ) from error
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(path / "optimizer.safetensors").items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(manifest["step"])


def resume(folder: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint that is whole; 0 if there is none."""
    for unfinished in folder.glob(".step-*.unfinished"):
        shutil.rmtree(unfinished)
    damaged: CheckpointError | None = None
    for path in reversed(checkpoints(folder)):
        try:
            return read_checkpoint(path, objective, optimizer)
        except CheckpointError as error:
            damaged = damaged or error
    if damaged is not None:
        raise damaged
    return 0
