"""Search: a text or a scan -> the most alike of many scans, or of their reports. And how often that is right.

What is asked and what reports say is turned into vectors and forgotten: neither is logged, nor kept in the index.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from voxelstem.aligned import Aligned, read_aligned
from voxelstem.errors import ConfigError
from voxelstem.index import Among, Hit, Index
from voxelstem.indexer import TOKENIZER, inner, weights_of
from voxelstem.recall import Protocol, Recall, named, recalls, text_of
from voxelstem.sources import KINDS, ct_rate, ending, read
from voxelstem.store import Store, Wanted
from voxelstem.store.encoding import content_key
from voxelstem.store.selection import Selection
from voxelstem.store.splits import Split
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.study import Study

_A_KEY = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The best for a question, best first."""

    asked: Literal["text", "scan"]
    among: Among
    pool: int
    """How many were compared."""
    hits: tuple[Hit, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A protocol's results. `protocol.published` stands beside them: others' figures, on others' pools."""

    protocol: Protocol
    recalls: tuple[Recall, ...]
    studies: int
    """Studies that took part, one series of each."""
    not_indexed: int
    """Studies with a report that are in the store and not in the index."""
    without_text: int
    """Studies whose report says nothing in the section that is asked with."""


class Search:
    """An index with its weights, which are read when the first question needs them."""

    def __init__(self, index: Path, *, weights: str | Path | None = None, tokenizer: Path | None = None) -> None:
        """Open the index.

        Args:
            index: Folder of the index.
            weights: Those that made it, if they are not inside.
            tokenizer: See `aligned.read_aligned`.

        Raises:
            StoreError: there is no index, or it is damaged.
        """
        self.index = Index.open(index)
        self._given = weights, tokenizer

    @cached_property
    def aligned(self) -> Aligned:
        """The weights.

        Raises:
            ConfigError: they did not make this index, or there are none.
        """
        weights, tokenizer = self._given
        path = self.index.path
        found = read_aligned(weights_of(path, weights), tokenizer=tokenizer or inner(path, TOKENIZER))
        self.index.check_space(found.sha256)
        return found

    def find(
        self,
        question: str | Path | Study,
        *,
        top: int = 10,
        among: Among = "scans",
        exclude_same_patient: bool = False,
    ) -> Found:
        """The `top` most alike by cosine, exactly; equal ones in the order of their keys.

        Args:
            question: A study; the path of a scan, or of a .txt file with a text; the beginning of an indexed scan's
                key, 8 letters at least; or a text. A scan never finds itself.
            top: How many.
            among: Scans, or the reports of scans.
            exclude_same_patient: Leave out all scans of the patient whose scan is asked with.

        Raises:
            ConfigError: no such scan, an empty text, a text where a patient is to be excluded, or no reports to search.
            IngestError: the scan cannot be read.
        """
        if top < 1:
            raise ConfigError(f"--top must be at least 1, got {top}")
        if among == "reports" and self.index.facts.texts == 0:
            raise ConfigError("the index holds no reports", hint="add a store whose scans have reports")
        asked, vector, own, subject = self._understand(question)
        hidden: Bool[np.ndarray, " scan"] = np.zeros(len(self.index), bool)
        if exclude_same_patient:
            if subject is None:
                raise ConfigError("a text has no patient to leave out", hint="ask with a scan, or leave the flag out")
            hidden |= subject
        if own is not None and among == "scans":
            hidden[own] = True
        pool = self.index.compared(among, hidden)
        return Found(
            asked=asked, among=among, pool=pool, hits=tuple(self.index.best(vector, top, among=among, hidden=hidden))
        )

    def _understand(
        self, question: str | Path | Study
    ) -> tuple[Literal["text", "scan"], Float[np.ndarray, " out"], int | None, Bool[np.ndarray, " scan"] | None]:
        """What is asked: its kind, its vector, its own place in the index, and which scans are of its patient."""
        if isinstance(question, str) and _A_KEY.fullmatch(question) and not is_place(question):
            row = self.index.row(question)
            if row is not None:
                return "scan", self.index.vector(row), row, self.index.of_same_subject(row)
            if any(letter.isdigit() for letter in question):
                raise ConfigError("no indexed scan has a key that begins so", hint="`voxelstem show STORE` lists keys")
        if isinstance(question, Study):
            study = question
        elif is_place(question) and Path(question).suffix.lower() != ".txt":
            study = ct_rate.annotate(read(question), Path(question).name, None)
        else:
            return "text", self.aligned.embed_texts([_text(question)])[0], None, None
        vector = self.aligned.embed_scan(study)
        own = self.index.row(content_key(study.volumes[0]))
        same = self.index.of_subject(pseudonym(study.subject, site_key()))
        # Stores begun by version 0.6.0 or before know people of a BIDS data set by the bare id.
        same = same | self.index.of_subject(pseudonym(study.subject.rpartition("/")[2], site_key()))
        # A file by itself may not say whose it is, or by another name than the store knows.
        return "scan", vector, own, same if own is None else same | self.index.of_same_subject(own)

    def measure(self, protocol: str, store: Store, *, split: Split | Literal["any"] = "any", seed: int = 0) -> Measured:
        """Run a published protocol: each study's report looks for its scan, among the indexed ones of the store.

        One series a study takes part, the finest. Reports come from the store, as their vectors do not say which
        section they are of.

        Args:
            protocol: A name in `recall.PROTOCOLS`.
            store: The scans with their reports.
            split: Only this part of the store.
            seed: Of random pools.

        Raises:
            ConfigError: no such protocol, or too few studies for its pools.
        """
        known = named(protocol)
        chosen = store.select(Wanted(split=split, reported=True, modality=self.aligned.model.spec.modality))
        place = {key: row for row, key in enumerate(self.index.keys())}
        rows: list[int] = []
        texts: list[str] = []
        subjects: list[str] = []
        not_indexed = without_text = 0
        for key, subject in _one_a_study(store, chosen):
            report = store.record(key).report
            text = text_of(report, known.section) if report else ""
            if key not in place:
                not_indexed += 1
            elif not text:
                without_text += 1
            else:
                rows.append(place[key])
                texts.append(text)
                subjects.append(subject)
        targets = self.index.vectors(np.array(rows, np.int64))
        found = recalls(known, self.aligned.embed_texts(texts), targets, subjects, seed=seed)
        return Measured(
            protocol=known,
            recalls=tuple(found),
            studies=len(rows),
            not_indexed=not_indexed,
            without_text=without_text,
        )


def _one_a_study(store: Store, chosen: Selection) -> Iterator[tuple[str, str]]:
    """Key and subject of one series of each study: the finest, then the largest, then the least key."""
    coarsest, voxels = chosen.spacing_mm.max(axis=1, initial=0), chosen.shape_ijk.prod(axis=1)
    best: dict[str, int] = {}
    for at in np.lexsort((np.arange(len(chosen)), -voxels, np.round(coarsest, 3))).tolist():
        record = store.record(str(chosen.key[at]))
        best.setdefault(record.acquisition.study or record.study, at)
    for at in sorted(best.values()):
        yield str(chosen.key[at]), str(chosen.subject[at])


def _text(question: str | Path) -> str:
    """The words of a question; never repeated in an error."""
    if not is_place(question):
        if isinstance(question, Path) or ending(question) in KINDS:
            raise ConfigError("there is no scan at that path", hint="check the path; a text needs no file")
        text = question
    else:
        try:
            text = Path(question).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("the text file cannot be read as UTF-8", hint="save it as UTF-8") from error
    if not text.strip():
        raise ConfigError("the question is empty", hint="say what to look for")
    return text


def is_place(question: str | Path) -> bool:
    """Whether a question is the path of something that is there."""
    try:
        return question != "" and Path(question).exists()  # an empty path is the folder one is in
    except (OSError, ValueError):  # a text may be too long for a name, or hold what no name does
        return False
