"""The Hub folder: config.json, model.safetensors, README.md. What a model is, what it saw, what may be done with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from voxelstem.config import flatten, overlay
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.study import InputSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """Description of weights, `InputSpec` included. Written once; every later door reads it."""

    architecture: dict[str, Any]
    """`name` in the backbone table and the flat settings that differ or not from its defaults."""
    spec: InputSpec
    licence: str = "not stated"
    data: tuple[str, ...] = ()
    """What was trained on, in words; never a name or a path."""
    recipe: str = ""
    trained: tuple[str, ...] = ()
    """Levels of the backbone that learned: `block`, `scan`. Empty: untrained."""
    parent: str = ""
    """SHA-256 of the weights that these grew from."""
    sha256: str = ""
    """Of the tensors' file; filled in by `write_weights`."""
    notes: tuple[str, ...] = field(default_factory=tuple)


def write_weights(folder: Path, tensors: dict[str, Tensor], card: Card) -> Card:
    """Write the Hub folder whole or not at all; gives back the card with the digest.

    Raises:
        CheckpointError: the folder exists already or the disk does not take it.
    """
    if folder.exists():
        raise CheckpointError(f"{folder.name} exists already", hint="choose another folder or remove this one")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        file = unfinished / "model.safetensors"
        save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, file)
        card = dataclasses.replace(card, sha256=_digest(file))
        (unfinished / "config.json").write_text(json.dumps(_to_json(card), indent=2) + "\n", encoding="utf-8")
        (unfinished / "README.md").write_text(_readme(card), encoding="utf-8")
        for path in unfinished.iterdir():
            path.chmod(0o644)
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as an error of its own kind.
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        raise CheckpointError(
            f"weights '{folder.name}' ({size:.1f} MB) could not be written: {reason}",
            hint="free some space and run again",
        ) from error
    return card


def read_card(folder: Path) -> Card:
    """Read config.json of a Hub folder.

    Raises:
        CheckpointError: no such folder, or its config is not ours.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder.name or folder} is not a weights folder: it has no config.json",
            hint="give the `weights` folder inside a finished run",
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        spec = overlay(InputSpec(), raw.pop("spec"))
        architecture = {name: _tuples(value) for name, value in raw.pop("architecture").items()}
        # JSON knows no tuples. What a newer version wrote beside the rest is left out.
        known = {entry.name for entry in dataclasses.fields(Card)} - {"architecture", "spec"}
        rest = {name: _tuples(value) for name, value in raw.items() if name in known}
        card = Card(architecture=architecture, spec=spec, **rest)
        whole = all(isinstance(getattr(card, name), type(getattr(_PLAIN, name))) for name in known)
        if not whole or not isinstance(architecture["name"], str):
            raise TypeError("a field of the card has another type")
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{folder.name}/config.json is not a voxelstem card", hint="was it written by another tool?"
        ) from error
    return card


def read_tensors(folder: Path, card: Card) -> dict[str, Tensor]:
    """Read model.safetensors and check it against the card's digest.

    Raises:
        CheckpointError: absent, damaged or not what the card describes.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{folder.name} has no model.safetensors", hint="copy the whole folder")
    if _digest(path) != card.sha256:
        raise CheckpointError(
            f"{folder.name}/model.safetensors differs from the card's sha256", hint="copy the folder again"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{folder.name}/model.safetensors cannot be read: {error}") from error


_PLAIN = Card(architecture={}, spec=InputSpec())


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_json(card: Card) -> dict[str, Any]:
    fields = {entry.name: getattr(card, entry.name) for entry in dataclasses.fields(card)}
    return fields | {"spec": flatten(card.spec)}


def _readme(card: Card) -> str:
    seen = "\n".join(f"- {line}" for line in card.data) or "- not stated"
    spec = card.spec
    notes = "".join(f"\n- {line}" for line in card.notes)
    return f"""---
library_name: voxelstem
license: {card.licence}
---
# {card.architecture.get("name", "weights")}

Recipe `{card.recipe}`; trained levels: {", ".join(card.trained) or "none (untrained)"}.

**Not a medical device.** Not validated for any diagnosis or treatment.

## Input
{spec.modality}, spacing {spec.spacing_mm} mm, window [{spec.low_hu:g}, {spec.high_hu:g}] to [0, 1],
blocks of {spec.block_ijk} voxels, RAS+.

## Data
{seen}

## Notes
- Tensors: sha256 `{card.sha256}`{notes}
"""
