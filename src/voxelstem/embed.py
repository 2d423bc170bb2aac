"""Studies -> embeddings: one .npz for each volume, named after its content. Run again, it skips what is done."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from voxelstem.errors import ConfigError, IngestError, StoreError
from voxelstem.intake import scrub
from voxelstem.model import Embedding, Model, load
from voxelstem.progress import progress
from voxelstem.sources import Source, ct_rate, iterate
from voxelstem.store import Store
from voxelstem.store.encoding import encode
from voxelstem.store.subjects import pseudonym, site_key, source_name
from voxelstem.study import Study

COLUMNS = ("source", "key", "subject", "modality", "coverage", "weights", "code")


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A scan that was not embedded, for the person at the terminal; the manifest keeps no names."""

    relative: str
    code: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedReport:
    """What came of an embed."""

    kept: int
    """Scans that have an embedding now."""
    skipped: int
    """Those among them that had one before."""
    refused: int
    refusals: tuple[Refused, ...]


def run(
    sources: Sequence[Path], *, weights: str | Path, out: Path, precision: str = "fp32", tokens: bool = False
) -> EmbedReport:
    """Embed every scan below `sources` into `out`/<key>.npz and list them in `out`/manifest.csv.

    A file holds `scan`, `blocks`, `grid`, `coverage` (and `tokens`, `tokens_affine_ras` when asked for), see
    `model.Embedding`. One bad scan never stops the others.

    Raises:
        IngestError: a source does not exist or holds no scan at all.
        ConfigError: `out` was made with other weights or another precision, or its embed.json is damaged.
        CheckpointError: the weights cannot be read.
        StoreError: `out` cannot be written.
    """
    model = load(weights)
    found = [source for path in sources for source in iterate(path)]
    key, rows, refusals, skipped = site_key(), [], [], 0
    try:
        _claim(out, model, precision)
        with progress("embed", len(found)) as advance:
            for source in found:
                name = source_name(source.relative, key)
                try:
                    study = _read_source(source, model.spec.modality)
                    row, known = _embed_study(study, model, out, precision=precision, tokens=tokens)
                    rows.append({"source": name, "subject": pseudonym(study.subject, key), "code": "", **row})
                    skipped += known
                except (IngestError, ConfigError, MemoryError, ValueError) as error:
                    code, problem = _why(error)
                    reason = scrub(problem, source.path, source)
                    rows.append({"source": name, "code": code})
                    refusals.append(Refused(relative=source.relative, code=code, reason=reason))
                advance()
        _write_manifest(out / "manifest.csv", rows)
    except OSError as error:
        raise StoreError(
            f"'{out.name}' cannot be written: {error.strerror}", hint="free some space and run again"
        ) from error
    kept = len(rows) - len(refusals)
    return EmbedReport(kept=kept, skipped=skipped, refused=len(refusals), refusals=tuple(refusals))


def embed_volume_cached(model: Model, store: Store, key: str, cache: Path, *, tokens: bool) -> Embedding:
    """Embed one volume of the store, or read what was embedded before by the same weights.

    The file's name is a hash of the weights, their architecture and spec, and the volume's content.

    Raises:
        StoreError: the volume cannot be read, or the cache cannot be written.
        ConfigError: the volume has another modality than the weights.
    """
    card = model.card
    what = [card.sha256, sorted(card.architecture.items()), repr(card.spec), model.use_scan_level, key, tokens]
    path = cache / (hashlib.sha256(json.dumps(what).encode()).hexdigest() + ".npz")
    known = _read(path)
    if known is None:
        known = model.embed(store.volume(key), tokens=tokens)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_whole(path, pack(known))
        except OSError as error:
            raise StoreError(
                f"'{cache.name}' cannot be written: {error.strerror}", hint="free some space and run again"
            ) from error
    return known


def pack(embedding: Embedding) -> bytes:
    """The .npz form of an embedding."""
    arrays: dict[str, Any] = {
        "scan": embedding.scan,
        "blocks": embedding.blocks,
        "grid": np.array(embedding.grid),
        "coverage": np.array(embedding.coverage),
    }
    if embedding.tokens is not None and embedding.tokens_affine_ras is not None:
        arrays |= {"tokens": embedding.tokens, "tokens_affine_ras": embedding.tokens_affine_ras}
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    return packed.getvalue()


def _read(path: Path) -> Embedding | None:
    """An embedding written before; None where there is none or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            grid = arrays["grid"]
            return Embedding(
                scan=arrays["scan"],
                blocks=arrays["blocks"],
                grid=(int(grid[0]), int(grid[1]), int(grid[2])),
                coverage=float(arrays["coverage"]),
                tokens=arrays.get("tokens"),
                tokens_affine_ras=arrays.get("tokens_affine_ras"),
            )
    # One flipped bit in a zip's headers can end in any of these.
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, EOFError, RuntimeError):
        return None


def _read_source(source: Source, modality: str) -> Study:
    """Read a scan and keep its one volume of the wanted modality."""
    try:
        study = ct_rate.annotate(source.read(), source.relative, None)
    except OSError as error:  # told apart here from an `out` that cannot be written
        raise IngestError(f"it cannot be read: {error.strerror}", code="unreadable") from error
    wanted = tuple(volume for volume in study.volumes if volume.modality == modality)
    if len(wanted) != 1:
        seen = ", ".join(volume.modality for volume in study.volumes)
        raise IngestError(f"one {modality} volume is wanted, it holds {seen}", code="wrong-modality")
    return replace(study, volumes=wanted)


def _embed_study(study: Study, model: Model, out: Path, *, precision: str, tokens: bool) -> tuple[dict[str, str], bool]:
    """Embed a study's only volume, or find what was embedded before; returns its row, and whether it was found."""
    (volume,) = study.volumes
    key = encode(volume).key
    path = out / f"{key}.npz"
    known = _read(path)
    embedding = known
    if embedding is None or (tokens and embedding.tokens is None):
        embedding, known = model.embed(volume, precision=precision, tokens=tokens), None
        write_whole(path, pack(embedding))
    row = {
        "key": key,
        "modality": volume.modality,
        "coverage": f"{embedding.coverage:.4f}",
        "weights": model.card.sha256,
    }
    return row, known is not None


def _why(error: Exception) -> tuple[str, str]:
    """The short code and the sentence of what kept a scan out."""
    match error:
        case IngestError():
            return error.code, error.problem
        case ConfigError():
            return "wrong-modality", error.problem
        case MemoryError():
            return "too-large", "there is not enough memory to embed it"
        case _:
            return "unreadable", str(error)


def _write_manifest(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Add the rows; a source that was listed before gets its new row, the others keep theirs."""
    listed: dict[str, dict[str, str]] = {}
    if path.exists():
        listed = {row["source"]: row for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))}
    listed |= {row["source"]: row for row in rows}
    table = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    writer.writerows(listed[name] for name in sorted(listed))
    write_whole(path, table.getvalue().encode())


def _claim(out: Path, model: Model, precision: str) -> None:
    """One folder holds the embeddings of one model only: rows that cannot be compared must not lie side by side."""
    out.mkdir(parents=True, exist_ok=True)
    mark, now = out / "embed.json", {"weights": model.card.sha256, "precision": precision}
    if not mark.exists():
        write_whole(mark, json.dumps(now).encode())
        return
    try:
        claimed = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError as error:  # also what is no UTF-8
        raise ConfigError(
            f"embed.json in '{out.name}' is damaged, so nobody knows which weights made the embeddings",
            hint="choose another --out, or delete this folder and embed again",
        ) from error
    if claimed != now:
        raise ConfigError(
            f"'{out.name}' holds embeddings of other weights or another precision", hint="choose another --out"
        )


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or not there."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
