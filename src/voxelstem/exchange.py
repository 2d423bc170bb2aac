"""Out of a store and into it: plain NIfTI, nnU-Net's raw datasets, and the `.b2nd` folders of nnU-Net and nnssl.

Files are named after pseudonyms and digests, never after what a scan was called when it came in.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int16, Integer, Shaped

from voxelstem.annotations import LABELS_FILE, Masks
from voxelstem.errors import ConfigError, StoreError
from voxelstem.geometry import LPS_TO_RAS
from voxelstem.progress import Advance, progress
from voxelstem.sources import Source, b2nd, nifti
from voxelstem.store.catalogue import is_store
from voxelstem.store.reader import Store
from voxelstem.store.records import Record
from voxelstem.store.splits import Split
from voxelstem.study import Volume

DATASET_FILE, PRETRAIN_FILE = "dataset.json", "pretrain_data.json"
SPLITS_FILE, MARK_FILE = "splits_final.json", "export.json"
MOST_LOCATIONS = 10_000
"""Voxels of each class that nnU-Net keeps to draw crops around."""
MOST_JSON_BYTES = 2**28
NAME_LENGTH = 24
Show = Callable[[str, int], AbstractContextManager[Advance]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What an export wrote."""

    kept: int
    """Volumes."""
    left_out: int
    """Volumes of the store that the format has no place for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The scans of a folder in somebody else's layout, and the masks that belong to them, for `ingest`."""

    sources: tuple[Source, ...]
    masks: Masks


def export_nifti(store: Store, out: Path, *, show: Show = progress) -> Exported:
    """Write every volume as `scans/sub-…/….nii.gz`, and its voxel labels at the same place below `labels`.

    `voxelstem ingest OUT/scans --labels OUT/labels` reads it back; nnssl reads it through `pretrain_data.json`, once
    the folder lies in its raw folder. Volumes of several channels are left out.

    Raises:
        ConfigError: `out` holds something else.
        StoreError: a volume is damaged, or `out` cannot be written.
    """
    records = [record for record in store if record.channels == 1]
    values = _values(records)
    _begin(out, "nifti", records, values)
    annotated: dict[str, list[str]] = {}
    with show("export", len(records)) as advance:
        for record in records:
            place = f"sub-{record.subject}/{record.key[:NAME_LENGTH]}.nii.gz"
            volume = store.volume(record.key)
            _nifti(out / "scans" / place, _compact(volume.array[0]), volume.affine_ras)
            if volume.labels is not None:
                _nifti(out / "labels" / place, _relabel(volume, values), volume.affine_ras)
                annotated[place] = sorted(record.classes.values())
            advance(1)
    if annotated:
        classes = {str(value): name for name, value in values.items()}
        # `labels.json` must name something in every list; a mask of a scan in which nothing was found has no list.
        said = {"classes": classes, "annotated": {place: names for place, names in annotated.items() if names}}
        _json(out / "labels" / LABELS_FILE, said)
    pictures = {record.key: f"scans/sub-{record.subject}/{record.key[:NAME_LENGTH]}.nii.gz" for record in records}
    _json(out / PRETRAIN_FILE, _collection(records, pictures, out.name, "$nnssl_raw"))
    return Exported(kept=len(records), left_out=len(store) - len(records))


def export_nnunet(store: Store, out: Path, *, show: Show = progress) -> Exported:
    """Write a raw dataset that `nnUNetv2_plan_and_preprocess` takes: `imagesTr`, `labelsTr` and `dataset.json`.

    Subjects of the split `test` go to `imagesTs` and `labelsTs`, which nnU-Net never trains on; `splits_final.json`
    keeps the others' split, which nnU-Net would otherwise draw by scan and not by person. Left out are volumes
    without voxel labels, with several channels, or in which not every class was looked for: nnU-Net would take
    silence for absence. Call the folder `DatasetNNN_Name`.

    Raises:
        ConfigError: `out` holds something else, nothing is labelled, or CT and MR are mixed.
        StoreError: a volume is damaged, or `out` cannot be written.
    """
    records, values = _labelled(store)
    modality = _one_modality(records)
    _begin(out, "nnunet", records, values)
    with show("export", len(records)) as advance:
        for record in records:
            half = "Ts" if record.split == "test" else "Tr"
            volume = store.volume(record.key)
            _nifti(out / f"images{half}" / f"{case(record)}_0000.nii.gz", _compact(volume.array[0]), volume.affine_ras)
            _nifti(out / f"labels{half}" / f"{case(record)}.nii.gz", _relabel(volume, values), volume.affine_ras)
            advance(1)
    training = sum(record.split != "test" for record in records)
    _json(out / DATASET_FILE, _dataset(modality, values, training, ".nii.gz"))
    _splits(out / SPLITS_FILE, records)
    return Exported(kept=len(records), left_out=len(store) - len(records))


def export_b2nd(
    store: Store, out: Path, *, layout: Literal["nnunet", "nnssl"] = "nnunet", show: Show = progress
) -> Exported:
    """Write float32 `.b2nd` files in the folders of nnU-Net's or nnssl's preprocessing, with the store's intensities.

    Both programs also want a pickle for each scan. This one writes none; what belongs into it stands in
    `properties/….json`, and the how-to has the five lines that turn one into the other.

    Raises:
        ConfigError: `out` holds something else, or (nnunet) nothing is labelled or CT and MR are mixed.
        StoreError: a volume is damaged, or `out` cannot be written.
    """
    if layout == "nnunet":
        records, values = _labelled(store)
        described = _dataset(_one_modality(records), values, len(records), ".b2nd")
        stems = {record.key: f"scans/{case(record)}" for record in records}
    else:
        records, values = [record for record in store if record.channels == 1], {}
        stems = {
            record.key: "/".join((out.name, "0", *_session(record), record.key[:NAME_LENGTH])) for record in records
        }
        pictures = {key: f"{stem}.b2nd" for key, stem in stems.items()}
        described = _collection(records, pictures, out.name, "$nnssl_preprocessed")
    _begin(out, f"b2nd-{layout}", records, values)
    with show("export", len(records)) as advance:
        for record in records:
            volume, stem = store.volume(record.key), stems[record.key]
            labels = _relabel(volume, values) if values else None
            _bytes(out / f"{stem}.b2nd", b2nd.pack(volume.array, volume.affine_ras, volume.modality))
            if labels is not None:
                small = labels.astype(np.int8 if max(values.values()) <= np.iinfo(np.int8).max else np.int16)
                _bytes(out / f"{stem}_seg.b2nd", b2nd.pack(small[None], volume.affine_ras, volume.modality))
            _json(out / "properties" / f"{stem.partition('/')[2]}.json", properties(volume, labels))
            advance(1)
    _json(out / (DATASET_FILE if layout == "nnunet" else PRETRAIN_FILE), described)
    if layout == "nnunet":
        _splits(out / SPLITS_FILE, records)
    return Exported(kept=len(records), left_out=len(store) - len(records))


def case(record: Record) -> str:
    """Name a scan for nnU-Net: by its subject's pseudonym, so that scans of a person are seen as such, and its key."""
    return f"sub-{record.subject}_{record.key[:NAME_LENGTH]}"


def properties(volume: Volume, labels: Integer[np.ndarray, "i j k"] | None) -> dict[str, Any]:
    """Say what nnU-Net keeps of a case in its pickle: lists along (z, y, x), `sitk_stuff` along (x, y, z) in LPS."""
    shape = list(reversed(volume.shape_ijk))
    lps = LPS_TO_RAS @ volume.affine_ras
    said: dict[str, Any] = {
        "spacing": list(reversed(volume.spacing_mm)),
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [[0, edge] for edge in shape],
        "shape_after_cropping_and_before_resampling": shape,
        "sitk_stuff": {
            "spacing": list(volume.spacing_mm),
            "origin": lps[:3, 3].tolist(),
            "direction": (lps[:3, :3] / np.array(volume.spacing_mm)).ravel().tolist(),
        },
    }
    if labels is not None:
        rng = np.random.default_rng(0)
        said["class_locations"] = {
            str(value): _locations(labels, value, rng) for value in map(int, np.unique(labels)) if value
        }
    return said


def _locations(labels: Integer[np.ndarray, "i j k"], value: int, rng: np.random.Generator) -> list[list[int]]:
    flat = np.flatnonzero(labels == value)
    if len(flat) > MOST_LOCATIONS:
        flat = np.sort(rng.choice(flat, MOST_LOCATIONS, replace=False))
    i, j, k = np.unravel_index(flat, labels.shape)
    return np.stack([np.zeros_like(i), k, j, i], axis=1).tolist()


def _labelled(store: Store) -> tuple[list[Record], dict[str, int]]:
    """The records in which every class of the store was looked for, and the classes' values."""
    marked = [record for record in store if record.has_labels and record.channels == 1]
    values = _values(marked)
    complete = [record for record in marked if set(record.classes.values()) == values.keys()]
    if not complete or not values:
        raise ConfigError(
            f"of {len(store)} volumes {len(marked)} have voxel labels, and none for all {len(values)} classes",
            hint="ingest masks with --labels, or export with `nifti`, which takes every volume",
        )
    return complete, values


def _one_modality(records: Iterable[Record]) -> str:
    seen = sorted({record.modality for record in records})
    if len(seen) != 1:
        raise ConfigError(
            f"the labelled volumes are {' and '.join(seen)}; nnU-Net normalises all in one way",
            hint="ingest each modality into a store of its own: ingest --modality CT",
        )
    return seen[0]


def _values(records: Iterable[Record]) -> dict[str, int]:
    """Number the classes from 1, as nnU-Net asks for, in the order of their names."""
    names = {name for record in records for name in record.classes.values()}
    return {name: value for value, name in enumerate(sorted(names), start=1)}


def _relabel(volume: Volume, values: Mapping[str, int]) -> Int16[np.ndarray, "i j k"]:
    assert volume.labels is not None
    labels = volume.labels
    table = np.zeros(max([int(labels.array.max()), *labels.classes]) + 1, np.int16)
    for value, name in labels.classes.items():
        table[value] = values[name]
    return table[labels.array]


def _compact(array: Float[np.ndarray, "i j k"]) -> Shaped[np.ndarray, "i j k"]:
    whole = np.clip(array, -(2**15), 2**15 - 1).astype(np.int16)
    return whole if np.array_equal(whole, array) else array


def _dataset(modality: str, values: Mapping[str, int], count: int, ending: str) -> dict[str, Any]:
    labels = {"background": 0, **values}
    return {"channel_names": {"0": modality}, "labels": labels, "numTraining": count, "file_ending": ending}


def _splits(path: Path, records: Iterable[Record]) -> None:
    sides: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
    for record in records:
        sides[record.split].append(case(record))
    if sides["train"] and sides["validation"]:
        _json(path, [{"train": sides["train"], "val": sides["validation"]}])


def _session(record: Record) -> tuple[str, str]:
    return f"sub-{record.subject}", f"ses-{record.study[:NAME_LENGTH]}"


def _collection(records: Iterable[Record], pictures: Mapping[str, str], name: str, root: str) -> dict[str, Any]:
    """What nnssl reads first: all images below their subject and session."""
    subjects: dict[str, Any] = {}
    for record in records:
        subject, session = _session(record)
        known = subjects.setdefault(subject, {"subject_id": subject, "subject_info": None, "sessions": {}})
        held = known["sessions"].setdefault(session, {"session_id": session, "session_info": None, "images": []})
        held["images"].append(
            {
                "name": Path(pictures[record.key]).name,
                "image_path": f"{root}/{name}/{pictures[record.key]}",
                "modality": record.acquisition.contrast or record.modality,
                "image_info": {"spacing_mm": list(record.spacing_mm), "split": record.split},
                "associated_masks": None,
            }
        )
    dataset = {"dataset_index": "0", "name": name, "dataset_info": None, "subjects": subjects}
    return {"collection_index": 0, "collection_name": name, "datasets": {"0": dataset}}


def _begin(out: Path, kind: str, records: Iterable[Record], values: Mapping[str, int]) -> None:
    """Mark the folder as this export's: one of other volumes or class numbers must not be mixed with it."""
    volumes = hashlib.sha256("\n".join(sorted(record.key for record in records)).encode()).hexdigest()
    said = {"written_by": "voxelstem", "format": kind, "classes": dict(values), "volumes": volumes}
    mark = out / MARK_FILE
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not mark.is_file())):
        raise ConfigError(f"'{out}' holds other files already", hint="choose a folder that is empty or not there")
    if mark.is_file() and _read_json(mark) != said:
        raise ConfigError(
            f"'{out}' holds an export of other volumes, classes or format",
            hint="choose another --out, or take the old export away",
        )
    _json(mark, said)


def _json(path: Path, content: Any) -> None:
    _bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def _nifti(path: Path, array: Shaped[np.ndarray, "i j k"], affine_ras: Float[np.ndarray, "4 4"]) -> None:
    try:
        nifti.write(path, array, affine_ras)
    except OSError as error:
        raise _unwritten(error) from error


def _bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        if path.parent.is_dir():
            part.unlink(missing_ok=True)
        raise _unwritten(error) from error


def _unwritten(error: OSError) -> StoreError:
    return StoreError(f"the export cannot be written: {error.strerror}", hint="check the folder's rights and space")


def find(folder: Path) -> Found | None:
    """Look whether a folder is an nnU-Net raw dataset or one of `.b2nd` scans, and list what `ingest` is to read.

    The latter is known by what these programs or an export leave in it or one folder above: `dataset.json`,
    `pretrain_data….json` or `export.json`; anywhere else a `.b2nd` file is a scan among others. The subject is the
    `sub-…` in a case's name, else the case. A case's channels are scans of one subject, and share its mask. Masks are
    named by the `labels` of `dataset.json`.

    Returns:
        The scans and masks; None for a folder of another kind.

    Raises:
        ConfigError: `dataset.json` cannot be read or has labels that are no single values, or the folder is a store.
    """
    if is_store(folder):
        raise ConfigError(f"'{folder.name}' is a store already", hint="open it, or export it and ingest that")
    if (folder / DATASET_FILE).is_file() and (folder / "imagesTr").is_dir():
        described = _read_json(folder / DATASET_FILE)
        ending = str(described.get("file_ending", ""))
        cases = [found for half in ("Tr", "Ts") for found in _raw_cases(folder, half, ending)]
        return _found(folder, cases, _classes(described), _KINDS.get(ending, "nifti"))
    places = (folder, Path(os.path.abspath(folder)).parent) if folder.is_dir() else ()
    marks = [path for place in places for name in _MARKS for path in place.glob(name) if path.is_file()]
    scans = sorted(path for path in folder.rglob("*.b2nd") if path.is_file()) if marks else []
    if not scans:
        return None
    near = [path for path in marks if path.name == DATASET_FILE]
    classes = _classes(_read_json(near[0])) if near else {}
    names = {path: path.name.removesuffix(".b2nd") for path in scans}
    cases = [
        (path, names[path], path.with_name(f"{names[path]}_seg.b2nd"))
        for path in scans
        if not names[path].endswith(("_seg", "__anon", "__anat"))
    ]
    return _found(folder, cases, classes, "b2nd")


_MARKS = (DATASET_FILE, "pretrain_data*.json", MARK_FILE)
_KINDS = {".nii.gz": "nifti", ".nii": "nifti", ".nrrd": "nrrd", ".mha": "mha", ".b2nd": "b2nd"}


def _raw_cases(folder: Path, half: str, ending: str) -> Iterator[tuple[Path, str, Path]]:
    if ending not in _KINDS:
        raise ConfigError(f"{DATASET_FILE}: 'file_ending' must be one of {', '.join(_KINDS)}", hint="convert them")
    for path in sorted((folder / f"images{half}").glob(f"*{ending}")):
        name = re.sub(r"_\d{4}$", "", path.name.removesuffix(ending))
        yield path, name, folder / f"labels{half}" / f"{name}{ending}"


def _found(folder: Path, cases: Iterable[tuple[Path, str, Path]], classes: dict[int, str], kind: str) -> Found:
    masks = Masks(root=folder.resolve(), classes=classes)
    sources: list[Source] = []
    for path, name, mask in cases:
        relative = path.relative_to(folder).as_posix()
        person = re.search(r"(?:^|[/_])(sub-[A-Za-z0-9]+)", relative)
        sources.append(Source(path=path, relative=relative, kind=kind, subject=person.group(1) if person else name))
        if mask.is_file():
            masks.files.add(mask.resolve())
            masks.by_scan[relative] = mask.resolve()
    return Found(sources=tuple(sources), masks=masks)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise ValueError("too long")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} is no JSON object", hint="mend it, or take it away") from error
    return content


def _classes(described: Mapping[str, Any]) -> dict[int, str]:
    labels = described.get("labels", {})
    if not isinstance(labels, dict) or not all(type(value) is int and value >= 0 for value in labels.values()):
        raise ConfigError(
            f"{DATASET_FILE}: 'labels' must give each class one whole number",
            hint="regions of several values cannot be read: name the values themselves",
        )
    return {value: str(name) for name, value in labels.items() if value}
