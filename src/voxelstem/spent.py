"""What it cost to make something, beside how good it is: seconds, and the most memory that the process held."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SECONDS, PEAK = "seconds", "peak_gib"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """Time on the wall, and the largest resident memory of the whole process until then, in GiB.

    The kernel keeps no peak of a part of a process: whoever comes later stands on what came before.
    """

    seconds: float
    peak_gib: float

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: one of them is negative.
        """
        if min(self.seconds, self.peak_gib) < 0:
            raise ValueError(f"seconds and peak_gib are not negative, got {self.seconds} and {self.peak_gib}")

    @classmethod
    def since(cls, began: float) -> Spent:
        """From a moment of `time.monotonic` until now."""
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        return cls(seconds=time.monotonic() - began, peak_gib=peak)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Spent | None:
        """Read what `facts` gave; None where nobody measured it."""
        if SECONDS not in facts or PEAK not in facts:
            return None
        return cls(seconds=float(facts[SECONDS]), peak_gib=float(facts[PEAK]))

    def facts(self) -> dict[str, float]:
        """As plain numbers, for a head's facts and for JSON."""
        return {SECONDS: round(self.seconds, 3), PEAK: round(self.peak_gib, 3)}

    def __str__(self) -> str:
        """`12.3 s, process peak 1.2 GiB`."""
        return f"{self.seconds:.1f} s, process peak {self.peak_gib:.1f} GiB"
