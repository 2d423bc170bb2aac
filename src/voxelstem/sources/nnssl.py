"""nnssl's raw data sets: a `pretrain_data.json` that lists images by data set, subject and session.

Format: `documentation/dataset_format.md` of MIC-DKFZ/nnssl, as OpenMind (arXiv 2412.17041) is given out. An image's
anonymisation mask becomes its voxel label `removed`, which `views.left_out` keeps out of what is painted; anatomy masks
are left where they lie.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voxelstem.errors import ConfigError
from voxelstem.sources import KINDS, Source, ending, keep
from voxelstem.sources.told import Told, acquisition, age, health
from voxelstem.study import Acquisition

FILE = "pretrain_data.json"
MOST_BYTES = 2**30
"""OpenMind's 114,570 images take a tenth of it."""
REMOVED = "removed"
"""What the voxels of an anonymisation mask (value 1) are called."""
NO_SESSION = "ses-DEFAULT"
"""What nnssl calls the session where nobody named one."""
_VARIABLE = re.compile(r"\$(\w+)(?:/|$)", re.ASCII)
_BELOW = (
    f"put {FILE} into the folder that holds all of its images, or set the variable that paths begin with, and ingest "
    "that folder"
)
_SHAPE = (
    '{"collection_name": …, "datasets": {"1": {"subjects": {"s1": {"subject_info": …, "sessions": {"1": '
    '{"images": [{"image_path": …, "modality": "T1w"}]}}}}}}}'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Nnssl:
    """A collection's images, by their place below its folder."""

    root: Path
    images: Mapping[str, Told] = field(default_factory=dict)
    removed: Mapping[str, str] = field(default_factory=dict)
    """Place of an image to that of the mask of what was taken off it, or drawn anew, so that nobody is known by it."""

    def sources(self) -> tuple[Source, ...]:
        """What `ingest` is to read, in the order of the places; a file that is not there is refused when it is read."""
        return tuple(
            Source(path=self.root / place, relative=place, kind=KINDS[ending(place)], subject=told.subject)
            for place, told in sorted(self.images.items())
        )


def read_collection(root: Path) -> Nnssl | None:
    """Read the list that a folder holds at its top.

    A path in it may begin with a variable such as `$nnssl_raw`: the environment's folder of that name, or else the one
    that the collection's folder lies in. All images must lie below the folder, which a list from elsewhere may not
    lead out of.

    Returns:
        None for a folder without a list.

    Raises:
        ConfigError: the list cannot be read, has another shape, names an image twice or of an unknown kind, or leads
            out of its folder. The message names an entry's number, never a person's.
    """
    if not (root / FILE).is_file():
        return None
    images: dict[str, Told] = {}
    removed: dict[str, str] = {}
    for number, (told, path, mask) in enumerate(_entries(_read(root / FILE), root.resolve().name), start=1):
        place = _place(path, root)
        if place is None:
            raise _malformed(number, "does not lie below its folder", hint=_BELOW)
        if ending(place) not in KINDS or KINDS[ending(place)] == "dicom":
            raise _malformed(number, "is of no known kind", hint=f"known: {', '.join(sorted(KINDS))}")
        if place in images:
            raise _malformed(number, "is listed for the second time", hint="list each image once")
        images[place] = told
        if mask:
            where = _place(mask, root)
            if where is None:
                raise _malformed(number, "has a mask that does not lie below its folder", hint=_BELOW)
            removed[place] = where
    if not images.keys().isdisjoint(removed.values()):
        raise ConfigError(f"{FILE}: an image is listed as a mask too", hint="list what is a scan as image alone")
    return Nnssl(root=root, images=images, removed=removed)


def said(relative: str, dataset: object) -> Told | None:
    """What the list says of a scan; None for one of another layout, or one that is not listed."""
    return dataset.images.get(relative) if isinstance(dataset, Nnssl) else None


def _entries(content: Mapping[str, Any], fallback: str) -> Iterator[tuple[Told, str, str]]:
    """What is said of each image, its path, and that of its anonymisation mask."""
    collection = str(content.get("collection_name") or fallback)
    for index, dataset in _part(content, "datasets").items():
        for subject, person in _part(dataset, "subjects").items():
            # Data sets count their subjects each from one.
            whose = (collection, str(index), str(subject))
            info = _part(person, "subject_info")
            for session, visit in _part(person, "sessions").items():
                said = _part(visit, "session_info")
                told = {**info, **{name: value for name, value in said.items() if value is not None}}
                images: Any = visit.get("images", [])
                if not isinstance(images, list):
                    raise _bad_shape("images")
                for image in images:
                    yield _told(whose, str(session), told, image)


def _told(person: tuple[str, ...], session: str, info: Mapping[str, Any], image: Any) -> tuple[Told, str, str]:
    if not isinstance(image, dict) or not isinstance(image.get("image_path"), str):
        raise _bad_shape("image_path")
    path, contrast = str(image["image_path"]), str(image.get("modality") or "")
    mask = str(_part(image, "associated_masks").get("anonymization_mask") or "")
    day = keep.parse_day(str(info.get("acq_time") or info.get("date") or ""))
    facts = Acquisition(
        date=day.isoformat() if day else "",
        age_years=age(info.get("age")),
        sex=keep.sex(str(info.get("sex") or "")),
        contrast="" if contrast.upper() in ("MR", "MRI", "CT") else contrast,
    )
    named = "" if session in (NO_SESSION, "DEFAULT") else session
    told = acquisition(person, named, name=str(image.get("name") or path.rpartition("/")[2]), facts=facts)
    return Told(subject="/".join(person), acquisition=told, labels=health(info.get("health_status"))), path, mask


def _part(content: Any, name: str) -> dict[str, Any]:
    """An object within another; an empty one where there is none."""
    part: Any = content.get(name) if isinstance(content, dict) else ""
    if not (part is None or isinstance(part, dict)):
        raise _bad_shape(name)
    return part or {}


def _place(path: str, root: Path) -> str | None:
    """Where an image lies below the folder; None outside of it. Links are not followed, as nowhere in a list."""
    if not path.isprintable():
        return None
    top = Path(os.path.abspath(root))
    variable = _VARIABLE.match(path)
    if variable is None:
        candidates = [top / path]
    else:
        below = path[variable.end() :]
        folders = [Path(os.environ[variable[1]])] if os.environ.get(variable[1]) else []
        candidates = [folder / below for folder in (*folders, top.parent)]
    for candidate in candidates:
        whole = Path(os.path.normpath(candidate))
        if whole.is_relative_to(top) and whole != top:
            return whole.relative_to(top).as_posix()
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("too long")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{FILE} cannot be read as JSON", hint=f"write {_SHAPE}") from error
    if not isinstance(content, dict):
        raise _bad_shape("datasets")
    return content


def _bad_shape(name: str) -> ConfigError:
    return ConfigError(f"{FILE}: '{name}' has another shape than nnssl's", hint=f"write {_SHAPE}")


def _malformed(number: int, what: str, *, hint: str) -> ConfigError:
    return ConfigError(f"{FILE}: image {number} {what}", hint=hint)
