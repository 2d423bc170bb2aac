"""Resamples, as subjects that were picked and as how often each of them was."""

from __future__ import annotations

import numpy as np


def counts_of(picks: np.ndarray, subjects: int) -> np.ndarray:
    """How often each subject stands in each row of picked ones, as `metrics.Counted` takes them."""
    return np.stack([np.bincount(row, minlength=subjects) for row in picks]).astype(float)
