"""Studies -> embeddings: one .npz for each volume, named after its content. Run again, it skips what is done."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from voxelstem.cluster import Cluster
from voxelstem.distributed import ranks
from voxelstem.embedder import (
    EmbedConfig,
    Embedder,
    Outcome,
    Task,
    computing_once,
    feeding_of,
    load_once,
    stamp_of,
    weights_at,
    whole,
)
from voxelstem.embedding import Computing, Embedding, Feeding, pack, read
from voxelstem.errors import StoreError
from voxelstem.manifest import Row, add_rows, claim, read_rows, write_whole
from voxelstem.model import Model
from voxelstem.progress import Advance, progress
from voxelstem.sources import iterate
from voxelstem.store import Store
from voxelstem.store.catalogue import is_store
from voxelstem.store.subjects import site_key, source_name
from voxelstem.streaming import of_store
from voxelstem.workers import Lost

SECONDS_BETWEEN_SAVES = 30.0
BLOCKS_A_SCAN = 50
"""About how many; it decides whether a way that takes seconds to begin is worth trying."""
ENDINGS = (".gz", ".nii", ".nrrd", ".mha", ".b2nd", ".zip")
"""Of files with scans, taken off in this order."""
Show = Callable[[str, int], AbstractContextManager[Advance]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A scan that was not embedded, for the person at the terminal; the manifest keeps no names."""

    relative: str
    code: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedReport:
    """What came of an embed; under torchrun, of this process's share of it."""

    kept: int
    """Scans that have an embedding now."""
    skipped: int
    """Those among them that had one before."""
    refused: int
    refusals: tuple[Refused, ...]
    warnings: tuple[str, ...] = ()
    """Doubts about scans that were kept, one of each kind and how many more there are; the manifest says which."""


AS_IT_IS = EmbedConfig()


def run(
    sources: Sequence[Path],
    *,
    weights: str | Path,
    out: Path,
    how: EmbedConfig = AS_IT_IS,
    show: Show = progress,
) -> EmbedReport:
    """Embed every scan below `sources` into `out`/<key>.npz and list them in `out`/manifest.csv.

    A file holds `scan`, `blocks`, `grid`, `coverage`, `facts` (and `tokens`, `tokens_affine_ras` when asked for), see
    `embedding.Embedding`. One bad scan never stops the others. Under torchrun each process takes its share, and all
    write one manifest. A store among the sources gives its volumes.

    Raises:
        IngestError: a source does not exist or holds no scan at all.
        ConfigError: `out` was made with other weights or in another way, or its embed.json is damaged.
        CheckpointError: the weights cannot be read.
        StoreError: `out` cannot be written.
    """
    here, key = ranks(), site_key()
    named = weights_at(weights, commercial=how.commercial)
    model = load_once(named)
    feeding = feeding_of(model, how)
    found = here.share([task for path in sources for task in _find(path, key)])

    def choose(claimed: str) -> str:
        return computing_once(named, how, claimed, blocks_ahead=BLOCKS_A_SCAN * len(found)).name

    def settle() -> Computing:
        return computing_once(named, how, claim(out, _settings(model, feeding, how), choose, here))

    parts = parts_of(model, feeding)
    also = (lambda task, key: write_vector(out, task, key, parts)) if how.layout == "fomo" else None
    try:
        done = read_rows(out)
        tasks = (replace(task, known=_known(task, done.get(task.name), out, how, key)) for task in found)
        embedder = Embedder(weights=named, sha256=model.card.sha256, how=how, out=out.resolve(), key=key)
        with show("embed", len(found)) as advance:
            if how.cluster is None:
                return _collect(embedder.map(tasks, settle), out, advance, also=also)
            with Cluster(replace(embedder, way=settle().name), how.cluster) as cluster:
                return _collect(cluster.map(tasks), out, advance, also=also)
    except OSError as error:
        raise StoreError(
            f"'{out.name}' cannot be written: {error.strerror}", hint="free some space and run again"
        ) from error


def _collect(
    outcomes: Iterable[tuple[Task, Outcome | Lost]],
    out: Path,
    advance: Advance,
    *,
    also: Callable[[Task, str], None] | None,
) -> EmbedReport:
    """Write what comes, and the manifest every now and then."""
    rows: list[Row] = []
    refusals: list[Refused] = []
    doubts: dict[str, list[str]] = {}
    kept = skipped = 0
    saved = time.monotonic()
    try:
        for task, outcome in outcomes:
            if outcome.code:
                rows.append({"source": task.name, "code": outcome.code})
                refusals.append(Refused(relative=task.relative, code=outcome.code, reason=outcome.reason))
                advance(1, "refused")
                continue
            assert isinstance(outcome, Outcome)  # what is lost has a code
            if outcome.packed:
                write_whole(out / f"{outcome.row['key']}.npz", outcome.packed)
            if also is not None:
                also(task, outcome.row["key"])
            rows.append({**outcome.row, "source": task.name, "code": ""})
            kept, skipped = kept + 1, skipped + outcome.skipped
            for doubt in filter(None, outcome.row.get("warnings", "").split("; ")):
                doubts.setdefault(doubt.partition(":")[0], []).append(doubt)
            advance(1, "skipped" if outcome.skipped else "")
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                add_rows(out, rows)
                rows, saved = [], time.monotonic()
    finally:
        add_rows(out, rows)
    warnings = tuple(
        f"{first} (and {len(more)} more such scans)" if more else first for first, *more in doubts.values()
    )
    return EmbedReport(kept=kept, skipped=skipped, refused=len(refusals), refusals=tuple(refusals), warnings=warnings)


def parts_of(model: Model, feeding: Feeding) -> dict[str, slice]:
    """Parts of a scan's vector that mean something by themselves: whose scan it is, and in which contrast."""
    latent = model.backbone.config.latent if hasattr(model.backbone, "latents_of") else 0
    if not latent or feeding.pool == "mean":
        return {}
    return {"subject": slice(0, latent), "contrast": slice(latent, 2 * latent)}


def write_vector(out: Path, task: Task, key: str, parts: Mapping[str, slice]) -> None:
    """Write what FOMO's probes read: `<id>.npy` with one float32 vector a case, and each part in a folder of its name.

    The id is the scan's path below its source, without the ending and with `_` for `/`; of a store the volume's key.

    Raises:
        OSError: the disk does not take it.
    """
    embedding = read(out / f"{key}.npz")
    assert embedding is not None  # it was written, or found whole, just now
    plain = task.relative if task.source else key
    for ending in ENDINGS:
        plain = plain.removesuffix(ending)
    name = plain.strip("/").replace("/", "_") + ".npy"
    for folder, part in {"": slice(None), **parts}.items():
        packed = io.BytesIO()
        np.save(packed, embedding.scan[part].astype(np.float32))
        (out / folder).mkdir(exist_ok=True)
        write_whole(out / folder / name, packed.getvalue())


def embed_volume_cached(model: Model, store: Store, key: str, cache: Path, *, tokens: bool) -> Embedding:
    """Embed one volume of the store in fp32, or read what was embedded before by the same weights.

    The file's name is a hash of the weights, their architecture and spec, and the volume's content.

    Raises:
        StoreError: the volume cannot be read, or the cache cannot be written.
        ConfigError: the volume has another modality than the weights.
        IngestError: the volume is refused.
    """
    card = model.card
    what = [card.sha256, sorted(card.architecture.items()), card.spec.mark, model.use_scan_level, key, tokens]
    what += [model.layers] if model.layers else []
    path = cache / (hashlib.sha256(json.dumps(what).encode()).hexdigest() + ".npz")
    known = read(path)
    if known is None:
        known = model.embed(of_store(store, key), tokens=tokens)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_whole(path, pack(known))
        except OSError as error:
            raise StoreError(
                f"'{cache.name}' cannot be written: {error.strerror}", hint="free some space and run again"
            ) from error
    return known


def _settings(model: Model, feeding: Feeding, how: EmbedConfig) -> dict[str, object]:
    """What decides the numbers; the same tensors say other things under another config.json."""
    spec = feeding.spec
    return {
        "weights": model.card.sha256,
        "architecture": dict(sorted(model.card.architecture.items())),
        "scan_level": model.use_scan_level,
        "modality": spec.modality,
        "window_hu": spec.normalisation if spec.per_volume else (spec.low_hu, spec.high_hu),
        "block_ijk": spec.block_ijk,
        "frame_ijk": spec.frame_ijk,
        "precision": how.precision,
        "spacing_mm": spec.spacing_mm if spec.resampling == "spacing" else spec.resampling,
        "like_spectre": feeding.like_spectre,
        "pool": feeding.pool,
    }


def _find(path: Path, key: bytes) -> Iterator[Task]:
    path = Path(path)
    if is_store(path):
        for record in Store.open(path):
            yield Task(name=source_name(record.key, key), store=path.resolve(), key=record.key)
        return
    for source in iterate(path):
        # The whole path: two hospitals' folders may both hold `case1/ct.nii.gz`.
        place = "\0".join(filter(None, (source.path.resolve().as_posix(), source.series)))
        yield Task(name=source_name(place, key), source=source)


def _known(task: Task, row: Row | None, out: Path, how: EmbedConfig, key: bytes) -> Row | None:
    """The row of a scan that need not be read again: its files are as they were, and its embedding is whole."""
    if row is None or row["code"] or not row.get("key"):
        return None
    if task.source is not None and row["stamp"] != stamp_of(task.source, key):
        return None
    return row if whole(out / f"{row['key']}.npz", how) is not None else None
