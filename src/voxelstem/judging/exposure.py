"""Did the weights see the tested subjects before? Stores of a pretraining beside the store that is evaluated on.

Labels may be kept apart perfectly and a figure still be too good: a network that was pretrained on the very scans that
it is tested on knows them, without any label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from voxelstem.card import Card
from voxelstem.errors import AuditError
from voxelstem.seen import digests_of, seen_digest
from voxelstem.store import Record, Store
from voxelstem.store.leakage import Leakage, leakage

State = Literal["compared", "in part", "same splits", "untrained", "unknown"]
KINDS = ("subjects", "acquisitions", "exact copies", "near copies")


@dataclass(frozen=True, kw_only=True, slots=True)
class Touched:
    """How much of one side of an evaluation was in the training part of a pretraining, by kind."""

    subjects: int
    acquisitions: int
    exact_copies: int
    near_copies: int

    @property
    def found(self) -> bool:
        """Whether anything was."""
        return any((self.subjects, self.acquisitions, self.exact_copies, self.near_copies))

    def __str__(self) -> str:
        """`2 subjects, 2 acquisitions, 1 exact copies, 0 near copies`."""
        counts = (self.subjects, self.acquisitions, self.exact_copies, self.near_copies)
        return ", ".join(f"{count} {kind}" for count, kind in zip(counts, KINDS, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Exposure:
    """What is known of a pretraining and the subjects of an evaluation."""

    state: State
    tested: Touched | None = None
    """Of the test scans; None where nothing was compared."""
    labelled: Touched | None = None
    """Of the labelled scans: allowed, and good to know."""
    lines: tuple[str, ...]
    """In words."""

    @property
    def known(self) -> str:
        """A line for the list of what was measured; empty where too little is known to say so."""
        return self.lines[0] if self.state in ("compared", "same splits", "untrained") else ""


def expose(
    store: Store, pretrained_on: Sequence[Path], labelled: Sequence[Record], tested: Sequence[Record]
) -> Exposure:
    """Compare the stores of a pretraining with the subjects of an evaluation: subjects, acquisitions and copies.

    Raises:
        AuditError: a test subject, an acquisition of one, or a copy of a test scan was in a pretraining's train split.
        StoreError: a store cannot be read.
    """
    mine, theirs = {record.key for record in tested}, {record.key for record in labelled}
    sides: list[tuple[Touched, Touched]] = []
    lines: list[str] = []
    unsaid: list[str] = []
    for place, path in enumerate(pretrained_on, 1):
        other = Store.open(path)
        seen = {record.key for record in other if record.split == "train"}
        found = leakage(store.path, path, b"")
        sides.append((touched(found, mine, seen), touched(found, theirs, seen)))
        about = f"pretraining store {place} of {len(pretrained_on)} ({len(seen)} training scans)"
        lines.append(f"{about}: {sides[-1][0]} of the {len(mine)} test scans; compared: {', '.join(found.checked)}")
        unsaid += [f"{about}: not compared: {why}" for why in found.unchecked]
    mine_all, theirs_all = (_sum(side) for side in zip(*sides, strict=True))
    if mine_all.found:
        raise AuditError(
            f"the pretraining saw what is tested on: {mine_all}: the scores would not be honest",
            hint="test on subjects that no pretraining has seen, or use weights pretrained without them",
        )
    verdict = "compared with the pretraining: nothing of the test scans was in its train split"
    if unsaid:
        verdict = "compared with the pretraining by copies only: no test scan is a copy of a scan in its train split"
    known = f"of the labelled scans it had seen, without labels: {theirs_all}"
    return Exposure(
        state="in part" if unsaid else "compared",
        tested=mine_all,
        labelled=theirs_all,
        lines=(verdict, known, *lines, *unsaid),
    )


def touched(found: Leakage, ours: Collection[str], seen: Collection[str]) -> Touched:
    """Count what is shared by scans of ours (by key) and scans that a pretraining trained on.

    A store beside itself has the earlier split first, so both ways round are looked at.
    """

    def meets(one: Iterable[str], two: Iterable[str]) -> bool:
        first, second = set(one), set(two)
        return bool((first & set(ours) and second & set(seen)) or (second & set(ours) and first & set(seen)))

    copies = Counter(copy.kind for copy in found.copies if meets((copy.key_a,), (copy.key_b,)))
    return Touched(
        subjects=sum(meets(one.in_a, one.in_b) for one in found.subjects),
        acquisitions=sum(meets(one.in_a, one.in_b) for one in found.acquisitions),
        exact_copies=copies["exact"],
        near_copies=copies["near"],
    )


def told_by_card(card: Card, store: Store) -> Exposure:
    """What the weights say by themselves: untrained, pretrained on this very store's train split, or unknown."""
    if not card.trained:
        return Exposure(state="untrained", lines=("the weights are untrained: they saw no scan",))
    seen = digests_of(card.data)
    if seen and set(seen) == {seen_digest(record.key for record in store if record.split == "train")}:
        line = "pretrained on the train split of this very store, by its digest in the card: the splits protect"
        return Exposure(state="same splits", lines=(line,))
    why = "on other scans, or on these before the store grew" if seen else "on what the card names by no digest"
    return Exposure(state="unknown", lines=(f"NOT MEASURED: pretrained {why}; name it with --pretrained-on",))


def _sum(sides: Sequence[Touched]) -> Touched:
    return Touched(
        subjects=sum(side.subjects for side in sides),
        acquisitions=sum(side.acquisitions for side in sides),
        exact_copies=sum(side.exact_copies for side in sides),
        near_copies=sum(side.near_copies for side in sides),
    )
