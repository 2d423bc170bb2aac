"""What became of the second scans of the samples that steps were given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from voxelstem.distributed import Ranks
from voxelstem.engine.reading import Reading, Slot

NAME_LETTERS = 16
"""By so many letters of its key a scan is named where people read it."""
MOST_TOLD = 1000
"""Refused pairs that are told one by one; of all others there is the count."""
REFUSALS = {
    "axes": "their axes are not parallel, so no box is straight in both (nothing is registered here)",
    "field of view": "the second scan does not cover the place that the view shows",
}


@dataclass(slots=True)
class PairCounts:
    """Of one process: a function of the steps that were handed out, and of nothing that was read ahead of them."""

    drawn: int = 0
    copies: int = 0
    refused: int = 0
    told: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])

    def add(self, slot: Slot, reading: Reading, sample: int) -> list[dict[str, Any]]:
        """Count sample number `sample` of a slot; a note for the first refusal of each two scans."""
        if not reading.partners:
            return []
        self.drawn += 1
        self.copies += reading.partners[sample] == slot.key
        self.refused += len(reading.refused[sample])
        notes: list[dict[str, Any]] = []
        for key, reason in reading.refused[sample]:
            two = (slot.key[:NAME_LETTERS], key[:NAME_LETTERS])
            if two not in self.told and len(self.told) < MOST_TOLD:
                self.told.add(two)
                notes.append({"unpaired": two[1], "with": two[0], "reason": REFUSALS[reason]})
        return notes

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of them, as JSON."""
        return {"counts": [self.drawn, self.copies, self.refused], "told": sorted(self.told)}

    def restore(self, each: Sequence[dict[str, Any]], here: Ranks) -> None:
        """Go on from what `facts` gave in each process at a checkpoint; from nothing where `each` is empty.

        Where other numbers of processes trained then, process 0 takes over all of it.
        """
        own = [each[here.rank]] if len(each) == here.count else list(each) if here.rank == 0 else []
        self.drawn, self.copies, self.refused = (sum(kept["counts"][at] for kept in own) for at in range(3))
        self.told = {(one, other) for kept in own for one, other in kept["told"]}

    def shares(self) -> dict[str, float]:
        """For the journal; nothing where there are no pairs."""
        return shares([self.facts()])


def shares(each: Iterable[dict[str, Any]]) -> dict[str, float]:
    """What several processes counted, in one: the share of copies, and how many pairs were refused.

    Args:
        each: `PairCounts.facts` of every process.
    """
    drawn, copies, refused = (sum(column) for column in zip(*(kept["counts"] for kept in each), strict=True))
    return {"copy_share": copies / drawn, "pairs_refused": refused} if drawn else {}
