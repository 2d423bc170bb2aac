"""Fill an index: scans of stores or embeddings made before, and reports, become vectors that can be searched.

A report is turned into its vector and forgotten: its words are neither logged nor kept in the index.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from voxelstem import embedding
from voxelstem.aligned import Aligned, read_aligned
from voxelstem.card import check_commercial, link_files, members, read_card
from voxelstem.errors import ConfigError, IngestError, StoreError
from voxelstem.index import FACTS, Entry, Index
from voxelstem.manifest import MARK, read_rows
from voxelstem.progress import Advance, progress
from voxelstem.recall import text_of
from voxelstem.store import Store
from voxelstem.store.catalogue import is_store
from voxelstem.streaming import of_store
from voxelstem.weights.hub import fetch

WEIGHTS, TOKENIZER = "weights", "tokenizer"
"""Inside the index: the weights that made it, linked where the disk can, so that it answers by itself."""
SECONDS_BETWEEN_COMMITS = 30.0
AT_ONCE = 256
"""Scans or reports that wait in memory for the next commit at most."""
Show = Callable[[str, int], AbstractContextManager[Advance]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A scan that did not get in, for the person at the terminal."""

    relative: str
    code: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """What came of adding to an index."""

    added: int
    there: int
    """Scans that the index held already."""
    reports: int
    """Reports that were added."""
    cut: int
    """Reports that are longer than the text tower reads, so that their end counts for nothing."""
    silent: int
    """Reports that have no vector: nothing in findings and impression, or halves of characters."""
    refusals: tuple[Refused, ...]
    scans: int
    """How many the index holds now."""


def build(
    index: Path,
    sources: Sequence[Path],
    *,
    weights: str | Path | None = None,
    tokenizer: Path | None = None,
    commercial: bool = False,
    show: Show = progress,
) -> Built:
    """Add the scans of stores, and their reports, to an index; makes it where there is none. Run again, it goes on.

    Args:
        index: Folder of the index.
        sources: Stores, or folders that `embed` filled with the same weights (which hold no reports: name the store
            too, and those are added to what is there).
        weights: Aligned weights: a folder or a known name; those inside the index when left out.
        tokenizer: See `aligned.read_aligned`.
        commercial: Claim commercial use: weights whose licence forbids it are refused.
        show: How progress is said.

    Raises:
        ConfigError: a source that is neither (said before anything is made), embeddings by other weights, or an index
            of other weights.
        CheckpointError: weights that were not aligned with reports, or damaged ones.
        StoreError: a store or the index cannot be read or written.
    """
    kinds = [(source, _is_store(source)) for source in map(Path, sources)]
    folder = weights_of(index, weights)
    if commercial:
        check_commercial(read_card(folder))
    tokenizer = tokenizer or inner(index, TOKENIZER)
    aligned = read_aligned(folder, tokenizer=tokenizer)
    grown = Index.create(index, space=aligned.sha256, out=aligned.out)
    _keep(index, folder, tokenizer)
    basket = _Basket(grown, aligned)
    for source, stored in kinds:
        if stored:
            basket.take_store(Store.open(source), show)
        else:
            basket.take_embeddings(source, show)
    return Built(
        added=basket.added,
        there=basket.there,
        reports=basket.reported,
        cut=aligned.tower.truncated,
        silent=basket.silent,
        refusals=tuple(basket.refusals),
        scans=len(basket.index),
    )


class _Basket:
    """Vectors on their way into an index, committed every now and then."""

    def __init__(self, index: Index, aligned: Aligned) -> None:
        self.index, self.aligned = index, aligned
        self.known, self.spoken = set(index.keys()), index.reported()
        self.added = self.there = self.reported = self.silent = 0
        self.refusals: list[Refused] = []
        self._entries: list[Entry] = []
        self._texts: dict[str, str] = {}
        self._saved = time.monotonic()

    def take_store(self, store: Store, show: Show) -> None:
        """Embed what is not there yet, scans and reports."""
        modality = self.aligned.model.spec.modality
        chosen = store.select()
        with show("index", len(chosen)) as advance:
            for key, subject, kind in zip(chosen.key, chosen.subject, chosen.modality, strict=True):
                if kind != modality:
                    self._refuse(key, "wrong-modality", f"the weights are for {modality}, it is {kind}")
                elif self._take(key, subject, lambda key=key: self.aligned.embed_scan(of_store(store, key))):
                    self._take_report(store, key)
                advance(1)
        self.commit()

    def take_embeddings(self, folder: Path, show: Show) -> None:
        """Project what `embed` wrote."""
        self._check_embeddings(folder)
        rows = [row for row in read_rows(folder).values() if row["key"] and not row["code"]]
        with show("index", len(rows)) as advance:
            for row in rows:
                self._take(row["key"], row["subject"], lambda row=row: self._projected(folder, row["key"]))
                advance(1)
        self.commit()

    def commit(self) -> None:
        """Write what waits: scans first, for a report must find its scan."""
        self.index = self.index.add(self._entries)
        vectors = self.aligned.embed_texts(list(self._texts.values()))
        self.index = self.index.add_reports(dict(zip(self._texts, vectors, strict=True)))
        self.added, self.reported = self.added + len(self._entries), self.reported + len(self._texts)
        self._entries, self._texts, self._saved = [], {}, time.monotonic()

    def _take(self, key: str, subject: str, embed: Callable[[], Float[np.ndarray, " out"]]) -> bool:
        """Whether the scan is in the index, or will be with the next commit."""
        if key in self.known:
            self.there += 1
            return True
        try:
            vector = embed()
        except (IngestError, StoreError) as error:
            self._refuse(key, error.code if isinstance(error, IngestError) else "damaged", error.problem)
            return False
        if not bool(np.isfinite(vector).all()):
            self._refuse(key, "not-finite", "the network gives no finite numbers for it")
            return False
        self.known.add(key)
        self._entries.append(Entry(key=key, subject=subject, vector=vector))
        if len(self._entries) >= AT_ONCE or time.monotonic() - self._saved > SECONDS_BETWEEN_COMMITS:
            self.commit()
        return True

    def _take_report(self, store: Store, key: str) -> None:
        report = None if key in self.spoken else store.record(key).report
        if report is None:
            return
        text = text_of(report, "full")
        if not text:
            self.silent += 1
            return
        self.spoken.add(key)
        self._texts[key] = text
        if len(self._texts) >= AT_ONCE:
            self.commit()

    def _projected(self, folder: Path, key: str) -> Float[np.ndarray, " out"]:
        found = embedding.read(folder / f"{key}.npz")
        if found is None:
            raise StoreError("its embedding is missing or damaged")
        return self.aligned.embed_scan(found)

    def _check_embeddings(self, folder: Path) -> None:
        """Refuse what was not embedded as `Aligned.embed_scan` does."""
        model, spec = self.aligned.model, self.aligned.model.spec
        # The same tensors say other things under another config.json.
        wanted = {
            "weights": model.card.sha256,
            "architecture": model.card.architecture,
            "scan_level": model.use_scan_level,
            "window_hu": spec.normalisation if spec.per_volume else (spec.low_hu, spec.high_hu),
            "block_ijk": spec.block_ijk,
            "frame_ijk": spec.frame_ijk,
            "pool": "cls-mean",
            "like_spectre": False,
            "spacing_mm": spec.spacing_mm if spec.resampling == "spacing" else spec.resampling,
        }
        wanted = json.loads(json.dumps(wanted))  # as the file gives them back: a tuple becomes a list
        try:
            # Folders of before frames say nothing of them: there was none.
            said = {"frame_ijk": None} | json.loads((folder / MARK).read_text(encoding="utf-8"))
            others = [name for name, value in wanted.items() if said[name] != value]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{MARK} in '{folder.name}' is damaged", hint="embed again into another folder"
            ) from error
        if others:
            raise ConfigError(
                f"the embeddings in '{folder.name}' were made with other settings: {', '.join(others)}",
                hint="embed with the weights of this index and their own settings, or add the store itself",
            )

    def _refuse(self, key: str, code: str, reason: str) -> None:
        self.refusals.append(Refused(relative=f"volume {key[:16]}", code=code, reason=reason))


def _is_store(source: Path) -> bool:
    """Whether it is a store, and not a folder of embeddings."""
    stored = is_store(source)
    if not stored and not (source / MARK).is_file():
        raise ConfigError(
            f"'{source.name}' is neither a store nor a folder of embeddings", hint="`voxelstem ingest` makes a store"
        )
    return stored


def weights_of(index: Path, weights: str | Path | None) -> Path:
    """The folder of the weights that are named, else of those inside the index.

    Raises:
        ConfigError: there are none inside.
        StoreError: there is no index either.
    """
    if weights is not None:
        return fetch(weights, text=True)
    there = inner(index, WEIGHTS)
    if there is None:
        if not (index / FACTS).is_file():
            raise StoreError(
                f"there is no index in '{index.name}'",
                hint="make one: `voxelstem search --index I --add STORE --weights W`",
            )
        raise ConfigError("the index came without its weights", hint="add --weights and those that made it")
    return there


def inner(index: Path, name: str) -> Path | None:
    """A folder inside the index, if it is there."""
    return index / name if (index / name).is_dir() else None


def _keep(index: Path, weights: Path, tokenizer: Path | None) -> None:
    """Put the weights into the index, so that it answers by itself: linked where the disk can, else copied."""
    card = read_card(weights)
    _link(weights, members(weights, card), index / WEIGHTS)
    if tokenizer is not None:
        _link(tokenizer, [path.name for path in sorted(tokenizer.iterdir()) if path.is_file()], index / TOKENIZER)


def _link(source: Path, names: Iterable[str], folder: Path) -> None:
    if folder.is_dir():
        return
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        link_files(source, names, unfinished)
        unfinished.rename(folder)
    except OSError as error:
        raise StoreError(
            f"the weights could not be put into '{folder.parent.name}': {error.strerror}", hint="free some space"
        ) from error
