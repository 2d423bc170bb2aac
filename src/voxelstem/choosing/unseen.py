"""What may be said of a figure whose interval has no width: a bootstrap only resamples the errors that were seen.

Where all subjects have one figure, so has every resample of them, be they 13 or 13,000. What could still be gained is
then not known to be little.
"""

from __future__ import annotations

import math

from voxelstem.certainty.crossfit import scale_of
from voxelstem.metrics import Interval

TINY = 1e-9
"""Below this, two ends of an interval differ by rounding alone."""
NO_WIDTH = "an interval without width does not say how rare errors are"


def has_width(value: Interval) -> bool:
    """Whether an interval says anything of errors that were not seen; where there is none, nothing does."""
    return value.low is not None and value.high is not None and value.high - value.low > TINY


def not_seen(value: Interval, metric: str, *, alike: str = "") -> str:
    """Say what a figure whose interval has no width shows, what it does not, and what would show more.

    Args:
        value: The figure.
        metric: What it is.
        alike: What is the same in every resample, where that is not the figure itself.
    """
    best = math.isclose(value.estimate, scale_of(metric).best, abs_tol=TINY)
    if best:
        seen = f"by {metric} no error was seen among {value.subjects} subjects"
    else:
        seen = f"all resamples of {value.subjects} subjects say {alike or f'{metric} {value.estimate:.3g}'}"
    why = NO_WIDTH if value.low is not None else "without an interval nobody knows how rare errors are"
    return f"{seen}, and {why}: more labels or more test subjects would tell"
