"""Explain whatever lies at a path: a scan, a store, a run, weights, a checkpoint, a report."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from voxelstem.config import flatten, read_toml
from voxelstem.errors import ConfigError, IngestError, StoreError
from voxelstem.progress import progress
from voxelstem.report.run import summary
from voxelstem.sources import read
from voxelstem.store.catalogue import is_store
from voxelstem.store.reader import Store, check_size, file_path
from voxelstem.store.splits import SPLITS

Facts = dict[str, Any]
NOT_SCANS = ("unknown-format", "empty")
VERIFY_UP_TO = 2 * 1024**3
"""Bytes; the digests of a larger store, which take minutes, are only compared when asked for."""
MOST_THREADS = 4
NAME_LETTERS = 16
"""Of a digest, to name weights by."""


def show(path: Path | str, *, verify: bool = False) -> Facts:
    """Say what a path holds, as plain values that JSON can take; `kind` says which thing it is.

    A store gives `kept`, `refused` (each with `source`, `code`, `reason`), `subjects`, `bytes` and `splits`. Its files
    are checked: `checked` is their number, `checked_by` is `digest` (every voxel was read) or, for a store of more
    than `VERIFY_UP_TO` bytes, only `size`, and `damaged` lists what is not as it was written.

    Args:
        path: A scan, a store, a run, a weights folder, a checkpoint or a report.
        verify: Compare the digests of a store of any size.

    Raises:
        ConfigError: nothing is there, or nothing that voxelstem knows.
        IngestError: it is a scan that would be refused; the message says why.
        StoreError: it is a store that cannot be read.
        CheckpointError: it is a weights folder whose card is none.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"there is no file or folder '{path.name}'", hint="check the path")
    if is_store(path):
        return _store(path, verify=verify)
    for marks, explain in _FOLDERS:
        if any((path / mark).is_file() for mark in marks):
            return explain(path)
    try:
        return _scan(path)
    except IngestError as error:
        if error.code not in NOT_SCANS:
            raise
        raise ConfigError(
            f"'{path.name}' is nothing that voxelstem knows",
            hint="give a scan, a DICOM folder, a store, a run, a weights folder, a checkpoint or a report",
        ) from error


def inside(
    path: Path | str,
    *,
    weights: str,
    out: Path,
    at_ijk: tuple[int, int, int] | None = None,
    at_mm: tuple[float, float, float] | None = None,
    commercial: bool = False,
) -> Facts:
    """Draw what some weights make of a scan into the PNG `out`, and say in numbers how the scan was fed to them.

    Args:
        path: A scan.
        weights: A folder, a known name, or hub:owner/name.
        out: The picture's file; one that is there is replaced.
        at_ijk: The voxel that all others are compared with, or
        at_mm: its place in the patient, RAS+. Without either it is the centre of the body.
        commercial: Claim commercial use: weights whose licence forbids it are refused.

    Raises:
        ConfigError: several volumes, another modality than the weights saw, a place outside the scan, or the licence.
        IngestError: the scan is refused; the message says why.
        CheckpointError: the weights cannot be read.
        StoreError: the picture cannot be written.
    """
    from voxelstem.report.inside import look_inside
    from voxelstem.weights.hub import load

    study = read(path)
    if len(study.volumes) != 1:
        raise ConfigError(f"it holds {len(study.volumes)} volumes", hint="give one of them")
    found = look_inside(study.volumes[0], load(weights, commercial=commercial), at_ijk=at_ijk, at_mm=at_mm)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(found.picture.png)
    except OSError as error:
        raise StoreError(f"'{out.name}' cannot be written: {error.strerror}", hint="choose another --out") from error
    return found.facts | {"picture": str(out), "alt": found.picture.alt, "caption": found.picture.caption}


def run_page(run: Path, out: Path | None = None) -> Path:
    """Draw the page of a pretraining run, finished or not: one HTML file that holds all it shows.

    Args:
        run: The run's folder.
        out: The page's file, `run`/report/index.html when left out; one that is there is replaced.

    Raises:
        ConfigError: the folder holds no run.
        StoreError: the page cannot be written.
    """
    from voxelstem.report.training import training_page  # draws, for which `show STORE` need not wait

    if not (run / "journal.jsonl").is_file():
        raise ConfigError(f"'{run.name}' holds no run", hint="give the folder that `voxelstem pretrain` wrote")
    out = out or run / "report" / "index.html"
    html = training_page(_run(run), _lines(run / "journal.jsonl"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"'{out.name}' cannot be written: {error.strerror}", hint="choose another --out") from error
    return out


def _store(path: Path, *, verify: bool) -> Facts:
    store = Store.open(path)
    refused = [{"source": line.source, "code": line.code, "reason": line.reason} for line in store.refusals()]
    chosen = store.select()
    size = int(chosen.bytes.sum())
    return {
        "kind": "store",
        "kept": len(chosen),
        "acquisitions": chosen.acquisitions(),
        "subjects": chosen.subjects(),
        "refused": refused,
        "refused_by_code": _counts(line["code"] for line in refused),
        "bytes": size,
        "splits": {split: len(store.subjects(split)) for split in SPLITS},
        "scans_by_split": {split: int((chosen.split == split).sum()) for split in SPLITS},
        "modalities": _counts(chosen.modality),
        "contrasts": _counts(chosen.contrast),
        "sessions": _counts(chosen.session),
        "formats": store.tally("source_format"),
        "with_voxel_labels": int(chosen.labelled.sum()),
        "with_report": int(chosen.reported.sum()),
        "reports_by_language": store.tally("language"),
        "classes": store.tally("classes"),
        "shape_ijk": _span(chosen.shape_ijk),
        "spacing_mm": _span(chosen.spacing_mm),
        **_check(store, by_digest=verify or size <= VERIFY_UP_TO),
    }


def _check(store: Store, *, by_digest: bool) -> Facts:
    """Compare every file's size, and if wanted the digest of its voxels, with what the catalogue has."""
    files = store.files()

    def look(file: tuple[str, str, str, int]) -> str:
        key, kind, name, size = file
        try:
            if by_digest:
                store.check_file(key, kind, name)
            else:
                check_size(file_path(store.path, kind, name), size)
        except StoreError as error:
            return error.problem
        return ""

    damaged: list[Facts] = []
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, progress("check", len(files)) as advance:
        for (_, kind, name, _), reason in zip(files, pool.map(look, files), strict=True):
            advance(1)
            if reason:
                damaged.append({"kind": kind, "name": name, "reason": reason})
    return {"checked": len(files), "checked_by": "digest" if by_digest else "size", "damaged": damaged}


def _counts(words: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(filter(None, words)).items()))


def _span(triples: np.ndarray[Any, np.dtype[Any]]) -> dict[str, list[float]]:
    if not len(triples):
        return {}
    low, middle, high = np.percentile(triples, [0, 50, 100], axis=0).round(3).tolist()
    return {"least": low, "median": middle, "most": high}


def _scan(path: Path) -> Facts:
    study = read(path)
    return {
        "kind": "scan",
        "volumes": [
            {
                "shape_ijk": list(volume.shape_ijk),
                "channels": volume.array.shape[0],
                "spacing_mm": [round(edge, 4) for edge in volume.spacing_mm],
                "orientation": volume.provenance.orientation,
                "modality": volume.modality,
                "unit": "HU" if volume.modality == "CT" else "intensity",
                "low": float(volume.array.min()),
                "high": float(volume.array.max()),
                "percentiles": {
                    str(share): float(value)
                    for share, value in zip((1, 50, 99), np.percentile(volume.array, (1, 50, 99)), strict=True)
                },
                "format": volume.provenance.source_format,
                "sha256": volume.provenance.sha256,
                "notes": list(volume.provenance.notes),
            }
            for volume in study.volumes
        ],
    }


def _run(path: Path) -> Facts:
    settings = read_toml(path / "config.toml") if (path / "config.toml").is_file() else {}
    lines = _lines(path / "journal.jsonl")
    steps = [int(line["step"]) for line in lines if "step" in line]
    wanted = settings.get("steps")
    folder = path / "checkpoints"
    checkpoints = sorted(
        entry.name for entry in (folder.iterdir() if folder.is_dir() else ()) if (entry / "manifest.json").is_file()
    )
    return {
        "kind": "run",
        "recipe": settings.get("recipe", ""),
        "step": max(steps, default=0),
        "steps": wanted,
        "finished": (path / "weights" / "config.json").is_file(),
        "last": lines[-1] if lines else {},
        "checkpoints": checkpoints,
        "bytes": _bytes(path),
        "settings": settings,
        "begun_from": str(settings.get("begun_from", ""))[:NAME_LETTERS],
        "data": _json(card).get("data", []) if (card := path / "weights" / "config.json").is_file() else [],
        **summary(lines, batch=int(settings.get("loader.batch", 0))),
    }


def _adapted(path: Path) -> Facts:
    settings = read_toml(path / "config.toml") if (path / "config.toml").is_file() else {}
    content = _json(path / "adapt.json")
    counts = {f"{name}_count": len(value) for name, value in content.items() if isinstance(value, list | dict)}
    plain = {name: value for name, value in content.items() if not isinstance(value, list | dict)}
    return {"kind": "adapted", **plain, **counts, "classes": content.get("classes"), "settings": settings}


def _weights(path: Path) -> Facts:
    from voxelstem.card import CONFIG, TENSORS, read_card  # brings torch, for which `show STORE` need not wait

    checked = read_card(path)  # refuses what is none, names that lead out of the folder among it
    card = _json(path / CONFIG) | {"spec": flatten(checked.spec)}  # with what is left out there
    facts: Facts = {"kind": "weights", "bytes": _bytes(path), "parameters": _parameters(path / TENSORS)}
    beside = {name: _file_bytes(path / name) for name in checked.extras}
    return facts | {"beside": beside, "card": card}


def _file_bytes(path: Path) -> int | None:
    """None where the file is missing."""
    return path.stat().st_size if path.is_file() else None


def _parameters(path: Path) -> int | None:
    """How many numbers a file of tensors holds, by its header; None where that cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _checkpoint(path: Path) -> Facts:
    return {"kind": "checkpoint", "bytes": _bytes(path), "manifest": _json(path / "manifest.json")}


def _report(path: Path) -> Facts:
    data = next((path / name for name in ("evaluation.json", "report.json") if (path / name).is_file()), None)
    page = next(iter(sorted(path.glob("*.html"))), None)
    return {"kind": "report", "page": page.name if page else None, "scores": _json(data) if data else {}}


_FOLDERS: list[tuple[tuple[str, ...], Callable[[Path], Facts]]] = [
    (("adapt.json",), _adapted),
    (("journal.jsonl",), _run),
    (("model.safetensors",), _weights),
    (("manifest.json",), _checkpoint),
    (("evaluation.json", "report.json"), _report),
    (("config.toml",), _run),
]
"""What a folder is, by a file that it holds; the first match wins."""


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"'{path.name}' cannot be read as JSON", hint="was the folder copied as a whole?") from error


def _lines(path: Path) -> list[Facts]:
    """Records of a journal; a last line that a kill cut off is left out."""
    if not path.is_file():
        return []
    try:
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{path.name}' is not a journal", hint="a journal has one JSON object a line") from error


def _bytes(path: Path) -> int:
    return sum(
        entry.stat().st_size
        for folder, _, names in os.walk(path)
        for entry in (Path(folder) / name for name in names)
        if entry.is_file()
    )
