"""Explain whatever lies at a path: a scan, a store, a run, weights, a checkpoint, a report."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from voxelstem.config import read_toml
from voxelstem.errors import ConfigError, IngestError, StoreError
from voxelstem.progress import progress
from voxelstem.sources import read
from voxelstem.store.catalogue import is_store
from voxelstem.store.reader import Store, check_size, file_path
from voxelstem.store.splits import SPLITS

Facts = dict[str, Any]
MOST_LINES = 20
NOT_SCANS = ("unknown-format", "empty")
KIB = 1024
VERIFY_UP_TO = 2 * KIB**3
"""Bytes; the digests of a larger store, which take minutes, are only compared when asked for."""
MOST_THREADS = 4


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
    }


def _adapted(path: Path) -> Facts:
    settings = read_toml(path / "config.toml") if (path / "config.toml").is_file() else {}
    content = _json(path / "adapt.json")
    counts = {f"{name}_count": len(value) for name, value in content.items() if isinstance(value, list | dict)}
    plain = {name: value for name, value in content.items() if not isinstance(value, list | dict)}
    return {"kind": "adapted", **plain, **counts, "classes": content.get("classes"), "settings": settings}


def _weights(path: Path) -> Facts:
    return {"kind": "weights", "bytes": _bytes(path), "card": _json(path / "config.json")}


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
    except (OSError, ValueError) as error:
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


def describe(facts: Facts) -> str:
    """Say in words for a person what `show` found."""
    told = {"store": _describe_store, "scan": _describe_scan, "run": _describe_run}
    return "\n".join(told.get(facts["kind"], _describe_tree)(facts))


def _describe_store(facts: Facts) -> list[str]:
    lines = [
        f"store: {facts['kept']} scans of {facts['subjects']} subjects, {_size(facts['bytes'])}",
        "subjects by split: " + _pairs(facts["splits"]),
    ]
    if facts["acquisitions"] < facts["kept"]:
        lines.append(f"independent scans: {facts['acquisitions']}; the others are reconstructions or copies of these")
    if facts["kept"]:
        lines += [
            f"modality: {_pairs(facts['modalities'])}; "
            f"{facts['with_voxel_labels']} with voxel labels, {facts['with_report']} with a report",
            f"shape: {_range(facts['shape_ijk'])} voxels; spacing: {_range(facts['spacing_mm'])} mm",
        ]
    said = {"contrast": "contrasts", "session": "sessions", "format": "formats", "reports": "reports_by_language"}
    lines += [f"{word}: {_pairs(facts[name])}" for word, name in said.items() if facts[name]]
    if facts["classes"]:
        lines.append(f"labels: {_pairs(facts['classes'])}")
    refused = facts["refused"]
    if refused:
        lines.append(f"refused: {len(refused)} ({_pairs(facts['refused_by_code'])})")
        lines += [f"  {line['source']}  {line['code']}: {line['reason']}" for line in refused[:MOST_LINES]]
        lines += [f"  … and {len(refused) - MOST_LINES} more (see --json)"] if len(refused) > MOST_LINES else []
    return lines + _describe_check(facts)


def _describe_check(facts: Facts) -> list[str]:
    damaged = facts["damaged"]
    how = "every voxel" if facts["checked_by"] == "digest" else "sizes only; --verify compares every voxel"
    lines = [f"checked: {facts['checked']} files ({how}), {len(damaged)} damaged"]
    lines += [f"  {file['name'][:16]}: {file['reason']}" for file in damaged[:MOST_LINES]]
    return lines + ([f"  … and {len(damaged) - MOST_LINES} more (see --json)"] if len(damaged) > MOST_LINES else [])


def _describe_scan(facts: Facts) -> list[str]:
    lines: list[str] = []
    for volume in facts["volumes"]:
        shape = " x ".join(map(str, volume["shape_ijk"]))
        spacing = " x ".join(f"{edge:g}" for edge in volume["spacing_mm"])
        middle = ", ".join(f"{share} %: {value:g}" for share, value in volume["percentiles"].items())
        lines += [
            f"{volume['modality']} scan ({volume['format']}): {shape} voxels of {spacing} mm along R, A, S",
            f"stored as {volume['orientation']}; {volume['low']:g} to {volume['high']:g} {volume['unit']} ({middle})",
            *(f"note: {note}" for note in volume["notes"]),
        ]
    return lines


def _describe_run(facts: Facts) -> list[str]:
    state = "finished" if facts["finished"] else "not finished"
    of = f" of {facts['steps']}" if facts["steps"] else ""
    last = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in facts["last"].items()}
    return [
        f"run {facts['recipe']}: step {facts['step']}{of}, {state}, {_size(facts['bytes'])}".replace("run :", "run:"),
        f"last line of the journal: {_pairs(last) or 'none'}",
        f"checkpoints: {', '.join(facts['checkpoints']) or 'none'}",
    ]


def _describe_tree(facts: Facts) -> list[str]:
    """Anything else: its names and values, one a line, deeper ones further in."""
    lines = [str(facts["kind"])]

    def tell(content: Mapping[str, Any], depth: int) -> None:
        for name, value in content.items():
            if isinstance(value, Mapping) and value:
                lines.append(f"{'  ' * depth}{name}:")
                tell(value, depth + 1)
            else:
                told = _size(int(str(value))) if name == "bytes" else value
                lines.append(f"{'  ' * depth}{name}: {told}")

    tell({name: value for name, value in facts.items() if name != "kind"}, 1)
    return lines


def _pairs(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _range(span: Mapping[str, list[float]]) -> str:
    least, most = (" x ".join(f"{edge:g}" for edge in span[end]) for end in ("least", "most"))
    return least if least == most else f"{least} to {most}"


def _size(count: int) -> str:
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= KIB and len(units) > 1:
        size, units = size / KIB, units[1:]
    return f"{size:.3g} {units[0]}" if size < KIB else f"{size:.0f} {units[0]}"
