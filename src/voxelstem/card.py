"""The Hub folder: config.json, model.safetensors, README.md. What a model is, what it saw, what may be done with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from voxelstem.config import flatten, overlay
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.study import InputSpec

Tensors = Mapping[str, Tensor]

CONFIG, TENSORS, README = "config.json", "model.safetensors", "README.md"
RUN = "adapt.json"
"""What a finished run of `adapt` has, and weights have not."""
NOT_STATED = "not stated"
INTENDED = (
    "Research on medical images: embedding scans, adapting to labelled tasks, comparing networks. Whoever builds on it "
    "checks it on scans of their own site first."
)
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLAIN_YAML = re.compile(r"[a-z][a-z0-9.-]*")
_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself reads no longer one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """Description of weights, `InputSpec` included. Written once; every later door reads it."""

    architecture: dict[str, Any]
    """`name` in the backbone table and the flat settings that differ or not from its defaults."""
    spec: InputSpec
    licence: str = NOT_STATED
    data: tuple[str, ...] = ()
    """What was trained on, in words; never a name or a path."""
    recipe: str = ""
    trained: tuple[str, ...] = ()
    """Levels of the backbone that learned: `block`, `scan`. Empty: untrained."""
    parent: str = ""
    """SHA-256 of the weights that these grew from."""
    origin: str = ""
    """Where foreign weights come from, as whoever published them says. Empty: trained here."""
    sha256: str = ""
    """Of the tensors' file; filled in by `write_weights`."""
    extras: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every other file that belongs to the weights, by its name inside the folder; filled in likewise."""
    notes: tuple[str, ...] = field(default_factory=tuple)


def write_weights(
    folder: Path,
    tensors: Tensors,
    card: Card,
    extras: Mapping[str, Tensors] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Card:
    """Write the Hub folder whole or not at all; gives back the card with the digests.

    `extras` are further files of tensors (`heads.safetensors`), `texts` small files (`text/config.json`), both by
    their names inside the folder. Tensors are written from where they are: only those that are not contiguous or
    share their memory with others are copied first.

    Raises:
        CheckpointError: the folder exists already or the disk does not take it.
        ValueError: a name that leaves the folder or that another file has.
    """
    extras, texts = extras or {}, texts or {}
    names = [CONFIG, TENSORS, README, *extras, *texts]
    if odd := sorted({name for name in names if not _is_safe(name) or names.count(name) > 1}):
        raise ValueError(f"files of a weights folder cannot be named {odd}")
    if folder.exists():
        raise CheckpointError(f"{folder.name} exists already", hint="choose another folder or remove this one")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, content in {TENSORS: tensors, **extras}.items():
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            save_file(_apart(content), unfinished / name)
        for name, text in texts.items():
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).write_text(text, encoding="utf-8")
        digests = {name: digest(unfinished / name) for name in sorted([*extras, *texts])}
        card = dataclasses.replace(card, sha256=digest(unfinished / TENSORS), extras=digests)
        (unfinished / CONFIG).write_text(json.dumps(_to_json(card), indent=2) + "\n", encoding="utf-8")
        (unfinished / README).write_text(_readme(card), encoding="utf-8")
        _settle(unfinished)
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as an error of its own kind.
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        size = sum(tensor.nbytes for content in (tensors, *extras.values()) for tensor in content.values()) / 1e6
        raise CheckpointError(
            f"weights '{folder.name}' ({size:.1f} MB) could not be written: {reason}",
            hint="free some space and run again",
        ) from error
    return card


def link_files(source: Path, names: Iterable[str], folder: Path) -> None:
    """Put files of a weights folder into another one, without a second copy where the disk can link them.

    Raises:
        OSError: a file is gone, or the disk does not take it.
    """
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link((source / name).resolve(), target)  # a link to a link may lead nowhere from here
        except OSError:
            shutil.copy2(source / name, target)


def read_card(folder: Path) -> Card:
    """Read config.json of a Hub folder.

    Raises:
        CheckpointError: no such folder, or its config is not ours.
    """
    path = folder / CONFIG
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
        words = all(isinstance(word, str) for word in (*card.data, *card.trained, *card.notes)) if whole else False
        if not words or not isinstance(architecture["name"], str):
            raise TypeError("a field of the card has another type")
        if not all(_is_safe(name) and _SHA256.fullmatch(value) for name, value in card.extras.items()):
            raise ValueError("a file beside the tensors has no safe name or no sha256")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, ConfigError) as error:
        raise CheckpointError(
            f"{folder.name}/config.json is not a voxelstem card", hint="was it written by another tool?"
        ) from error
    return card


def read_tensors(folder: Path, card: Card, file: str = TENSORS) -> dict[str, Tensor]:
    """Read model.safetensors, or a further `file` of tensors that the card lists, and check its digest.

    The file is read in pieces for the digest and then mapped: it never stands in memory twice.

    Raises:
        CheckpointError: absent, cut short, damaged or not what the card describes.
    """
    path = _checked(folder, card, file)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{folder.name}/{file} cannot be read: {error}") from error


def read_text(folder: Path, card: Card, file: str) -> str:
    """Read a small file that the card lists, such as `text/config.json`, and check its digest.

    Raises:
        CheckpointError: absent, damaged or no text.
    """
    try:
        return _checked(folder, card, file).read_text(encoding="utf-8")
    except ValueError as error:
        raise CheckpointError(f"{folder.name}/{file} is no text", hint="copy the folder again") from error


def check_folder(folder: Path) -> Card:
    """Read the card and compare every file that it names with its digest; no tensor is loaded.

    Raises:
        CheckpointError: a file is absent, cut short or not what the card describes.
    """
    card = read_card(folder)
    for name in (TENSORS, *card.extras):
        _checked(folder, card, name)
    return card


def members(folder: Path, card: Card) -> list[str]:
    """The files that make up a weights folder, by name; whatever else lies there is not part of the weights."""
    return [CONFIG, TENSORS, *([README] if (folder / README).is_file() else []), *card.extras]


def is_run(folder: Path) -> bool:
    """Whether a folder is a finished run of `adapt`: a head with the weights below it."""
    return (folder / RUN).is_file()


def digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trained_where(*, trained: bool) -> str:
    """In words where weights come from that nobody else published."""
    return "trained with voxelstem" if trained else "untrained: drawn at random, no scan was learned from"


def yaml_word(text: str) -> str:
    """A text as one value in the head of a README: as it is where YAML reads it so, else quoted.

    >>> yaml_word("cc-by-4.0"), yaml_word("CC BY: 4.0")
    ('cc-by-4.0', '"CC BY: 4.0"')
    """
    if _PLAIN_YAML.fullmatch(text):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    # YAML takes no character that does not show.
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in quoted)


def against_commerce(licence: str) -> str:
    """Why weights under `licence` may not be used commercially as far as we can tell; an empty word if nothing says so.

    Reads the licence's name only (SPDX, Creative Commons or plain words). It is a guard, no legal advice.
    """
    words = re.findall(r"[a-z]+", licence.lower())
    squeezed = "".join(words)
    if squeezed in ("", "notstated", "unknown", "other", "none", "unlicensed"):
        return "their licence is not stated"
    if "nc" in words or any(part in squeezed for part in ("noncommercial", "researchonly", "academic", "evaluation")):
        return f"their licence is {licence}: no commercial use"
    return ""


def check_licence(licence: str, origin: str = "") -> None:
    """Let only a licence pass that allows commercial use.

    Raises:
        ConfigError: it forbids it, or there is none.
    """
    if why := against_commerce(licence):
        raise ConfigError(
            f"these weights cannot be used commercially: {why}",
            hint="choose other weights (`voxelstem models` shows licences), ask their owners"
            f"{f' ({origin})' if origin else ''}, or leave the commercial flag out for research",
        )


def check_commercial(card: Card) -> None:
    """Let only weights pass whose licence allows commercial use.

    Raises:
        ConfigError: it forbids it, or there is none.
    """
    check_licence(card.licence, card.origin)


_PLAIN = Card(architecture={}, spec=InputSpec())


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _is_safe(name: str) -> bool:
    return _SAFE_NAME.fullmatch(name) is not None


def _apart(tensors: Tensors) -> dict[str, Tensor]:
    """Each tensor contiguous and with memory of its own, as the file format wants it; copied only where it must be."""
    apart = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    end = 0
    for name in sorted(apart, key=lambda name: apart[name].data_ptr()):
        start = apart[name].data_ptr()
        if start < end:  # lies over its neighbour
            apart[name] = apart[name].clone()
        end = max(end, start + tensors[name].nbytes)
    return apart


def _settle(folder: Path) -> None:
    """Readable by others, and on the disk before the folder gets its name."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(0o644)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _checked(folder: Path, card: Card, file: str) -> Path:
    path, wanted = folder / file, card.sha256 if file == TENSORS else card.extras.get(file)
    if wanted is None:
        has = f"it has {', '.join(sorted(card.extras))}" if card.extras else "it has nothing beside the tensors"
        raise CheckpointError(f"these weights came without {file}", hint=has)
    if not path.is_file():
        raise CheckpointError(f"{folder.name} has no {file}", hint="copy the whole folder")
    if file.endswith(".safetensors") and (whole := _whole_bytes(path)) > path.stat().st_size:
        raise CheckpointError(
            f"{folder.name}/{file} is cut short: {path.stat().st_size} of {whole} bytes", hint="copy the folder again"
        )
    if digest(path) != wanted:
        raise CheckpointError(f"{folder.name}/{file} differs from the card's sha256", hint="copy the folder again")
    return path


def _whole_bytes(path: Path) -> int:
    """How long its header says that a safetensors file is; 0 where that cannot be read, which the digest will tell."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            return 0
        text = file.read(length)
    if text.startswith(b"{") and len(text) < length:
        return 8 + length
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(text).items() if name != "__metadata__"]
        return 8 + length + max((int(end) for end in ends), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0


def _to_json(card: Card) -> dict[str, Any]:
    fields = {entry.name: getattr(card, entry.name) for entry in dataclasses.fields(card)}
    return fields | {"spec": flatten(card.spec)}


def _readme(card: Card) -> str:
    seen = "\n".join(f"- {line}" for line in card.data) or "- not stated"
    spec = card.spec
    notes = "".join(f"\n- {line}" for line in card.notes)
    files = "".join(f"\n- `{name}`: sha256 `{value}`" for name, value in card.extras.items())
    licence = yaml_word(card.licence)
    forbidden = " Not for commercial use." if against_commerce(card.licence) else ""
    preset = f" (preset `{spec.preset}`)" if spec.preset else ""
    return f"""---
library_name: voxelstem
license: {licence}
---
# {card.architecture.get("name", "weights")}

Recipe `{card.recipe}`; trained levels: {", ".join(card.trained) or "none (untrained)"}.

**Not a medical device.** Not validated for any diagnosis or treatment.

## Intended use
{INTENDED}

## Licence and origin
- Licence: {card.licence}.{forbidden}
- Origin: {card.origin or trained_where(trained=bool(card.trained))}

## Input
{spec.modality}, fed at {spec.grid_in_words}, {spec.values_in_words},
blocks of {spec.block_ijk} voxels, RAS+{preset}.

## Data
{seen}

## Notes
- Tensors: sha256 `{card.sha256}`{files}{notes}
"""
