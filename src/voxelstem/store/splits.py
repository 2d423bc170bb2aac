"""Who is learnt from and who is kept back: decided by the subject alone, so that nobody is in two splits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fractions:
    """The share of subjects that each split gets, on average."""

    train: float = 0.6
    validation: float = 0.15
    test: float = 0.25

    def __post_init__(self) -> None:
        """Guard the shares.

        Raises:
            ValueError: a share is negative, or they do not add up to one.
        """
        shares = (self.train, self.validation, self.test)
        if min(shares) < 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ValueError(f"the shares of train, validation and test must be >= 0 and add up to 1, got {shares}")


DEFAULT_FRACTIONS = Fractions()


def split_of(subject: str, fractions: Fractions = DEFAULT_FRACTIONS) -> Split:
    """Place a subject in a split.

    A pure function of the pseudonym: adding, removing or reordering subjects moves nobody, and every scan of
    a person lands on the same side.
    """
    digest = hashlib.sha256(b"voxelstem split\0" + subject.encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    if draw < fractions.train:
        return "train"
    return "validation" if draw < fractions.train + fractions.validation else "test"


def folds(subjects: Collection[str], count: int, *, seed: int = 0) -> tuple[tuple[str, ...], ...]:
    """Share subjects out to folds as equal as can be; each subject is held out by exactly one.

    The order in which they are given changes nothing.

    Raises:
        ValueError: fewer than two folds, or fewer subjects than folds.
    """
    known = sorted(set(subjects))
    if not 2 <= count <= len(known):  # noqa: PLR2004 - one fold holds nobody out
        raise ValueError(f"need at least 2 folds and a subject for each, got {count} folds of {len(known)} subjects")
    dealt = sorted(known, key=lambda subject: hashlib.sha256(f"voxelstem fold {seed} {subject}".encode()).digest())
    return tuple(tuple(sorted(dealt[fold::count])) for fold in range(count))
