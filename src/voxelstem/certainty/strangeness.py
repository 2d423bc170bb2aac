"""Is a scan like those that were learned from? How far its embedding lies from theirs, and when that is too far.

A head answers whatever it is shown, a knee after brains too. Each known scan is measured as if its subject had been
unknown, and a new scan is flagged if hardly any of them lay as far out. That a scan is not strange does not say that
its answer is right. The records hold embeddings of people, or sums of them: keep them where embeddings may be kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Shaped

from voxelstem.certainty.thresholds import conformal_quantile, fewest_for, read_arrays

CHUNK = 1024
"""Scans that are compared with all known ones at a time."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Strangeness:
    """How strange each scan is."""

    score: Float[np.ndarray, "scan"]
    """A distance: 0 to 2 between unit vectors, or in standard deviations."""
    flagged: Bool[np.ndarray, "scan"]
    """Farther out than the threshold: leave the answer to a person."""
    as_strange: Float[np.ndarray, "scan"]
    """(1 + known scans at least as far out) / (1 + known scans): a p-value (Vovk et al. 2005, section 2.2)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Yardstick:
    """Scores of the known scans, each measured without its own subject."""

    level: float
    """About this share of scans like the known ones is not flagged."""
    scores: Float[np.ndarray, "known"]

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a level outside (0, 1), too few scores for it, or scores that are not finite.
        """
        finite = int(np.isfinite(self.scores).sum())
        if finite < max(len(self.scores), fewest_for(self.level)):
            raise ValueError(
                f"a level of {self.level} needs {fewest_for(self.level)} known scans, each with a finite score, there "
                f"are {finite} of {len(self.scores)}: lower the level or give more labelled scans"
            )

    @property
    def threshold(self) -> float:
        """The largest score that is not flagged: a quantile of the known scans' scores."""
        return conformal_quantile(self.scores, level=self.level)

    def judge(self, score: Float[np.ndarray, "scan"]) -> Strangeness:
        """Hold scores of new scans against those of the known ones."""
        nearer = np.searchsorted(np.sort(self.scores), score, side="left")
        known = len(self.scores)
        as_strange = (1 + known - nearer) / (1 + known)
        return Strangeness(score=score, flagged=score > self.threshold, as_strange=as_strange)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NearestKnown:
    """Distance to the k-th nearest known scan, between embeddings of length one (Sun et al. 2022, section 3)."""

    vectors: Float32[np.ndarray, "known dim"]
    """Unit vectors of the known scans."""
    neighbours: int
    yardstick: Yardstick

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: fewer known scans than neighbours, or not one score for each.
        """
        if not 1 <= self.neighbours <= len(self.vectors) or len(self.yardstick.scores) != len(self.vectors):
            raise ValueError(
                f"{len(self.vectors)} known scans need as many scores, got {len(self.yardstick.scores)}, and allow at "
                f"most as many neighbours, got {self.neighbours}"
            )

    def apply(self, embeddings: Float[np.ndarray, "scan dim"]) -> Strangeness:
        """Measure new scans.

        Raises:
            ValueError: another length of vectors, NaN, or a vector of zeros.
        """
        units = _unit(_checked(embeddings, self.vectors.shape[1]))
        nobody = np.zeros((len(units), 1), dtype=np.bool_)
        return self.yardstick.judge(_kth_distance(units, self.vectors, nobody, self.neighbours))

    def arrays(self) -> dict[str, np.ndarray]:
        """As it rests on disk."""
        return {"vectors": self.vectors, "neighbours": np.array(self.neighbours), **_resting(self.yardstick)}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> NearestKnown:
        """Read what `arrays` gave.

        Raises:
            ValueError: an array is missing, or they do not fit together.
        """
        vectors, neighbours = read_arrays(arrays, "vectors", "neighbours")
        return cls(vectors=vectors, neighbours=int(neighbours), yardstick=_yardstick(arrays))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KnownClasses:
    """Mahalanobis distance to the nearest class, all classes varying alike (Lee et al. 2018, section 2.1).

    The covariance is shrunk towards a sphere (Ledoit and Wolf 2004), without which it has no inverse where there are
    more dimensions than scans.
    """

    means: Float[np.ndarray, "classes dim"]
    directions: Float[np.ndarray, "axis dim"]
    """Principal axes of the scans around the mean of their class, of length one."""
    variances: Float[np.ndarray, "axis"]
    """Along each of them, after shrinkage."""
    rest: float
    """Variance in every direction beside them, which comes from shrinkage alone."""
    yardstick: Yardstick

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: sizes that do not fit, or a variance that is not positive.
        """
        dim = self.means.shape[1]
        if self.directions.shape != (len(self.variances), dim) or not (self.rest > 0 and (self.variances > 0).all()):
            raise ValueError(
                f"means of {dim} dimensions need axes of as many, each with a positive variance, got "
                f"{self.directions.shape} with {len(self.variances)} variances and {self.rest} beside them"
            )

    def apply(self, embeddings: Float[np.ndarray, "scan dim"]) -> Strangeness:
        """Measure new scans.

        Raises:
            ValueError: another length of vectors, or NaN.
        """
        rows = _checked(embeddings, self.means.shape[1])
        squares = np.full(len(rows), math.inf)
        for mean in self.means:
            along, beside = _split(rows - mean, self.directions)
            squares = np.minimum(squares, (along**2 / self.variances).sum(axis=1) + beside / self.rest)
        return self.yardstick.judge(np.sqrt(squares))

    def arrays(self) -> dict[str, np.ndarray]:
        """As it rests on disk."""
        plain = {"means": self.means, "directions": self.directions, "variances": self.variances}
        return plain | {"rest": np.array(self.rest), **_resting(self.yardstick)}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> KnownClasses:
        """Read what `arrays` gave.

        Raises:
            ValueError: an array is missing, or they do not fit together.
        """
        means, directions, variances, rest = read_arrays(arrays, "means", "directions", "variances", "rest")
        stick = _yardstick(arrays)
        return cls(means=means, directions=directions, variances=variances, rest=float(rest), yardstick=stick)


def fit_nearest(
    embeddings: Float[np.ndarray, "scan dim"], subjects: Sequence[str], *, neighbours: int = 5, level: float = 0.95
) -> NearestKnown:
    """Keep the known scans as unit vectors, and measure each by those of other subjects.

    Args:
        embeddings: Of the labelled scans.
        subjects: Of each: two scans of one person are near each other, which says nothing of new people.
        neighbours: Which neighbour's distance counts; with more, a single stray scan lets fewer strange ones pass.
        level: Share of scans like these that shall not be flagged.

    Raises:
        ValueError: not one subject for each scan, NaN, a vector of zeros, a subject beside whom there are fewer scans
            than neighbours, or too few scans for the level.
    """
    names = _named(embeddings, subjects)
    vectors = _unit(_checked(embeddings, embeddings.shape[1])).astype(np.float32)
    most = int(np.unique(names, return_counts=True)[1].max(initial=0))
    if not 1 <= neighbours <= len(names) - most:
        raise ValueError(
            f"neighbours lies between 1 and the {len(names) - most} scans beside those of one subject, got {neighbours}"
        )
    scores = _kth_distance(vectors.astype(np.float64), vectors, names[:, None] == names[None, :], neighbours)
    return NearestKnown(vectors=vectors, neighbours=neighbours, yardstick=Yardstick(level=level, scores=scores))


def fit_classes(
    embeddings: Float[np.ndarray, "scan dim"], labels: Sequence[str], subjects: Sequence[str], *, level: float = 0.95
) -> KnownClasses:
    """Find mean and spread of each class, and measure each known scan as if its subject had not been there.

    Means and covariance are taken again without each subject, by a low-rank update of the inverse (Woodbury 1950), so
    exactly; only how much is shrunk, and to which sphere, stays that of all scans.

    Args:
        embeddings: Of the labelled scans.
        labels: Of each; give one name to all where there are no classes.
        subjects: Of each.
        level: Share of scans like these that shall not be flagged.

    Raises:
        ValueError: not one label and one subject for each scan, NaN, one subject only, too few scans for the level, or
            scans that do not vary enough for a covariance.
    """
    names, kinds = _named(embeddings, subjects), _named(embeddings, labels)
    rows = _checked(embeddings, embeddings.shape[1])
    if len(np.unique(names)) < 2:  # noqa: PLR2004 - one to leave out, one to stay
        raise ValueError(f"a covariance needs scans of two subjects at least, there are {len(np.unique(names))}")
    _, of = np.unique(kinds, return_inverse=True)
    means = np.stack([rows[of == kind].mean(axis=0) for kind in range(of.max() + 1)])
    around = rows - means[of]
    _, spreads, directions = np.linalg.svd(around / math.sqrt(len(rows)), full_matrices=False)
    # What rounding leaves of equal numbers is no direction.
    kept = spreads > np.abs(rows).max() * max(rows.shape) * np.finfo(np.float64).eps
    plain, directions = spreads[kept] ** 2, directions[kept]
    share = _shrinkage(plain, (around**2).sum(axis=1), rows.shape[1])
    rest = share * float(plain.sum()) / rows.shape[1]
    if not rest > 0:
        raise ValueError(
            f"{len(rows)} scans of {rows.shape[1]} dimensions do not vary enough for a covariance: are there copies "
            "among them, or one scan for each label?"
        )
    spread = _Spread(means=means, directions=directions, plain=plain, share=share, rest=rest)
    scores = np.empty(len(rows))
    for name in np.unique(names):
        scores[names == name] = _without(names == name, around, of, spread)
    variances = (1 - share) * plain + rest
    stick = Yardstick(level=level, scores=scores)
    return KnownClasses(means=means, directions=directions, variances=variances, rest=rest, yardstick=stick)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Spread:
    """What `fit_classes` knows of all scans."""

    means: Float[np.ndarray, "classes dim"]
    directions: Float[np.ndarray, "axis dim"]
    plain: Float[np.ndarray, "axis"]
    """Variances along the directions before shrinkage."""
    share: float
    rest: float


def _without(
    gone: Bool[np.ndarray, "scan"],
    around: Float[np.ndarray, "scan dim"],
    of: Int[np.ndarray, "scan"],
    spread: _Spread,
) -> Float[np.ndarray, "gone"]:
    """Distances of one subject's scans to classes that were fitted without them.

    The scatter that leaves with them is that of their own deviations r from the class mean, and for each class of
    their sum d: with n scans staying, the mean moves by -d / n, which takes d d' / n more.
    """
    count, sizes = len(of), np.bincount(of)
    leaving = np.bincount(of[gone], minlength=len(sizes))
    staying = sizes - leaving
    sums = np.zeros_like(spread.means)
    np.add.at(sums, of[gone], around[gone])
    moved = np.flatnonzero((leaving > 0) & (staying > 0))
    lost = np.concatenate([around[gone], sums[moved] / np.sqrt(staying[moved])[:, None]]) @ spread.directions.T
    weight = (1 - spread.share) / (count - int(gone.sum()))
    variances = weight * count * spread.plain + spread.rest
    inner = np.eye(len(lost)) - weight * (lost / variances) @ lost.T
    rows = around[gone] + spread.means[of[gone]]
    squares = np.full(len(rows), math.inf)
    for kind in np.flatnonzero(staying):
        along, beside = _split(rows - spread.means[kind] + sums[kind] / staying[kind], spread.directions)
        cross = (along / variances) @ lost.T
        more = weight * (cross * np.linalg.solve(inner, cross.T).T).sum(axis=1)
        squares = np.minimum(squares, (along**2 / variances).sum(axis=1) + more + beside / spread.rest)
    return np.sqrt(squares)


def _shrinkage(plain: Float[np.ndarray, "axis"], squares: Float[np.ndarray, "scan"], dim: int) -> float:
    """How much of the covariance the sphere makes up (Ledoit and Wolf 2004, section 3), by its eigenvalues."""
    size = float((plain**2).sum())
    off_sphere = size / dim - (float(plain.sum()) / dim) ** 2
    error = (float((squares**2).mean()) - size) / (len(squares) * dim)
    return min(max(error, 0.0) / off_sphere, 1.0) if off_sphere > 0 else 1.0


def _split(
    rows: Float[np.ndarray, "row dim"], directions: Float[np.ndarray, "axis dim"]
) -> tuple[Float[np.ndarray, "row axis"], Float[np.ndarray, "row"]]:
    """Coordinates along the directions, and the square of what lies beside them."""
    along = rows @ directions.T
    return along, ((rows - along @ directions) ** 2).sum(axis=1)


def _kth_distance(
    units: Float[np.ndarray, "scan dim"],
    vectors: Float32[np.ndarray, "known dim"],
    hidden: Bool[np.ndarray, "scan any"],
    neighbours: int,
) -> Float[np.ndarray, "scan"]:
    """Distance to the k-th nearest known scan that is not hidden from the row."""
    wide, found = vectors.astype(np.float64), np.empty(len(units))
    # Not 2 - 2 * cosine: vectors in 32 bits have a length of one no more exactly than that.
    lengths = (wide**2).sum(axis=1)
    for first in range(0, len(units), CHUNK):
        part = slice(first, first + CHUNK)
        squares = (units[part] ** 2).sum(axis=1)[:, None] + lengths - 2 * units[part] @ wide.T
        kth = np.partition(np.where(hidden[part], math.inf, squares), neighbours - 1, axis=1)[:, neighbours - 1]
        found[part] = np.sqrt(np.maximum(kth, 0.0))
    return found


def _checked(embeddings: Float[np.ndarray, "scan dim"], dim: int) -> Float[np.ndarray, "scan dim"]:
    if embeddings.shape[1] != dim:
        raise ValueError(f"the known embeddings have {dim} numbers each, these {embeddings.shape[1]}")
    odd = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if odd.size:
        raise ValueError(f"{odd.size} of {len(embeddings)} embeddings are not finite; the first is row {odd[0]}")
    return embeddings.astype(np.float64)


def _unit(rows: Float[np.ndarray, "scan dim"]) -> Float[np.ndarray, "scan dim"]:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (length > 0).all():
        raise ValueError(f"{int((length == 0).sum())} of {len(rows)} embeddings are all zeros: they have no direction")
    return rows / length


def _named(embeddings: Float[np.ndarray, "scan dim"], names: Sequence[str]) -> Shaped[np.ndarray, "scan"]:
    if len(embeddings) != len(names) or len(names) == 0:
        raise ValueError(f"every scan needs a subject and a label, got {len(names)} for {len(embeddings)} scans")
    return np.asarray(names)


def _resting(stick: Yardstick) -> dict[str, np.ndarray]:
    return {"level": np.array(stick.level), "scores": stick.scores}


def _yardstick(arrays: Mapping[str, np.ndarray]) -> Yardstick:
    level, scores = read_arrays(arrays, "level", "scores")
    return Yardstick(level=float(level), scores=scores)
