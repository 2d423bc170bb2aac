"""How often the right scan is among the first that a report finds: recall@k over a pool of known size.

Not the task `retrieve`, which looks for labelled scans that are alike: here nothing is fitted, a scan's right answer is
its own report, and what counts is the pool that it stands in. So the pool's size is part of every result, and the
published protocols are data, named with a version that changes when they do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int64

from voxelstem.errors import ConfigError
from voxelstem.metrics import Interval, bootstrap_interval
from voxelstem.study import Report
from voxelstem.table import closest

Section = Literal["findings", "impression", "full"]
FEWEST = 2
"""Scans in a pool: of one the right one is always found."""
_ROUNDING = 1e-12
"""By what products of equal vectors may differ, depending on where a library's blocks put them."""
_HALVES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A figure of somebody else's, for comparison. It was computed on their pool, by their code."""

    model: str
    pool: int
    k: int
    percent: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """A way to measure retrieval that others can repeat."""

    name: str
    """Ends with its version."""
    section: Section
    """Which part of the report is the query."""
    recalls: tuple[int, ...]
    pools: tuple[int, ...] = ()
    """Sizes of the pools into which all scans are parted at random; none: one pool of all."""
    partitions: int = 1
    """How often they are parted anew."""
    published: tuple[Published, ...] = ()
    source: str = ""
    """Where it and the figures beside ours come from."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a pool of fewer than two scans, or a k or number of partitions below 1.
        """
        if any(pool < FEWEST for pool in self.pools) or min(*self.recalls, self.partitions) < 1:
            raise ValueError(f"pools hold >= 2 scans, k and partitions are >= 1, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """One line of results. Never without its pool's size."""

    protocol: str
    section: str
    k: int
    pool: int
    """Scans that a report has to choose from."""
    queries: int
    """Reports that asked."""
    value: Interval
    """Share found among the first k, with the interval of resampling patients; the pools are held as they are."""
    partitions: int = 1
    over_partitions: tuple[float, float] | None = None
    """95 % interval of the mean over partitions (mean -+ 1.96 standard errors); None for a single pool."""

    @property
    def chance(self) -> float:
        """What guessing finds."""
        return min(1.0, self.k / self.pool)

    def __str__(self) -> str:
        """`R@5 of a pool of 1564: 0.175 [0.156, 0.194] (chance 0.003, 1564 reports)`."""
        often = f", {self.partitions} partitions" if self.partitions > 1 else ""
        beside = f"chance {self.chance:.3f}, {self.queries} reports{often}"
        return f"R@{self.k} of a pool of {self.pool}: {self.value} ({beside})"


def ranks(queries: Float[np.ndarray, "scan out"], targets: Float[np.ndarray, "scan out"]) -> Int64[np.ndarray, " scan"]:
    """How many others come before each query's own target: 0 where it is found first.

    Row i of both belongs to scan i. Others of the same score count as before it, so that a model that gives everything
    one vector finds nothing; so do those that cannot be compared, because a number is not finite.
    """
    found: list[np.ndarray] = []
    wide = targets.T.astype(np.float64)
    step = max(1, (1 << 24) // max(1, len(targets)))
    for low in range(0, len(queries), step):
        scores = queries[low : low + step].astype(np.float64) @ wide
        own = scores[np.arange(len(scores)), np.arange(low, low + len(scores))]
        found.append((~(scores < own[:, None] - _ROUNDING)).sum(axis=1) - 1)
    return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)


def recalls(
    protocol: Protocol,
    queries: Float[np.ndarray, "scan out"],
    targets: Float[np.ndarray, "scan out"],
    subjects: Sequence[str],
    *,
    seed: int = 0,
) -> list[Recall]:
    """Measure a protocol: row i of `queries` (reports) looks for row i of `targets` (scans).

    Args:
        protocol: What to measure.
        queries: Unit vectors of the reports.
        targets: Unit vectors of the scans, in the same order.
        subjects: Whose scan each is; intervals resample these.
        seed: Of the partitions.

    Raises:
        ConfigError: fewer scans than the smallest pool holds.
    """
    count = len(targets)
    pools = [pool for pool in protocol.pools or (count,) if FEWEST <= pool <= count]
    if not pools:
        smallest = min(protocol.pools, default=FEWEST)
        raise ConfigError(
            f"{protocol.name} needs pools of {smallest} scans with reports, there are {count}",
            hint="index more scans, or choose another protocol",
        )
    found: list[Recall] = []
    for pool in pools:
        where = [_partition(count, pool, seed, number) for number in range(protocol.partitions)]
        within = [_pooled_ranks(queries, targets, groups) for groups in where]
        found += [_recall(protocol, pool, k, within, subjects) for k in protocol.recalls]
    return found


def text_of(report: Report, section: Section) -> str:
    """A protocol's query: a section as it stands, or both under SPECTRE's headings.

    Empty where there is nothing, and where bytes were read in a wrong way, so that halves of characters stand there.
    """
    match section:
        case "findings":
            text = report.findings_text.strip()
        case "impression":
            text = report.impression_text.strip()
        case "full":
            headed = (("Findings: ", report.findings_text), ("Impressions: ", report.impression_text))
            text = "".join(f"{heading}{said.strip()}\n" for heading, said in headed if said.strip())
    return "" if _HALVES.search(text) else text


def named(name: str) -> Protocol:
    """A protocol by its name; without its version the latest.

    Raises:
        ConfigError: there is none of that name.
    """
    versions = [known for known in PROTOCOLS if known.rpartition("-")[0] == name]
    if name not in PROTOCOLS and not versions:
        raise ConfigError(f"unknown protocol '{name}'", hint=closest(name, list(PROTOCOLS)))
    return (
        PROTOCOLS[name] if name in PROTOCOLS else PROTOCOLS[max(versions, key=lambda one: int(one.rpartition("-")[2]))]
    )


def _partition(count: int, pool: int, seed: int, number: int) -> Int64[np.ndarray, "group pool"]:
    """Part all scans into pools at random; those that fill no pool are left out this time."""
    if pool == count:
        return np.arange(count)[None]
    order = np.random.default_rng((seed, pool, number)).permutation(count)
    return order[: count // pool * pool].reshape(-1, pool)


def _pooled_ranks(
    queries: Float[np.ndarray, "scan out"],
    targets: Float[np.ndarray, "scan out"],
    groups: Int64[np.ndarray, "group pool"],
) -> Float[np.ndarray, " scan"]:
    """The rank of each scan within its pool; NaN where it is in none this time, which `_recall` leaves out."""
    within = np.full(len(targets), math.nan)
    for group in groups:
        within[group] = ranks(queries[group], targets[group])
    return within


def _recall(
    protocol: Protocol, pool: int, k: int, within: Sequence[Float[np.ndarray, " scan"]], subjects: Sequence[str]
) -> Recall:
    rows = np.stack(within)
    took_part = ~np.isnan(rows)
    hits = (np.where(took_part, rows, math.inf) < k).sum(axis=0)
    asked = took_part.sum(axis=0)
    by_subject = _summed(subjects, hits, asked)
    each = np.array([float((one[~np.isnan(one)] < k).mean()) for one in within])
    spread = None
    if len(each) > 1:
        half = 1.96 * float(each.std(ddof=1)) / math.sqrt(len(each))
        spread = (float(each.mean()) - half, float(each.mean()) + half)
    return Recall(
        protocol=protocol.name,
        section=protocol.section,
        k=k,
        pool=pool,
        queries=int((asked > 0).sum()),
        value=bootstrap_interval(by_subject, _share),
        partitions=len(within),
        over_partitions=spread,
    )


def _summed(
    subjects: Sequence[str], hits: Int64[np.ndarray, " scan"], asked: Int64[np.ndarray, " scan"]
) -> dict[str, tuple[int, int]]:
    """Hits and questions of each subject, of those who were asked about."""
    sums: dict[str, tuple[int, int]] = {}
    for subject, hit, ask in zip(subjects, hits.tolist(), asked.tolist(), strict=True):
        if ask:
            had = sums.get(subject, (0, 0))
            sums[subject] = (had[0] + hit, had[1] + ask)
    return sums


def _share(sample: Iterable[tuple[int, int]]) -> float:
    """Hits among all questions, so that a subject with many scans counts as often as it did in the figure."""
    hits, asked = map(sum, zip(*sample, strict=True))
    return hits / asked


def _figures(model: str, pools: Sequence[int], by_k: Mapping[int, Sequence[float]]) -> tuple[Published, ...]:
    return tuple(
        Published(model=model, pool=pool, k=k, percent=percent)
        for k, percents in by_k.items()
        for pool, percent in zip(pools, percents, strict=True)
    )


_MERLIN_POOLS = (32, 64, 128)
_MERLIN = "SPECTRE (arXiv 2511.17209), table 3: Merlin's test split, text to image, 100 random partitions"


def _merlin(section: Section, name: str, published: tuple[Published, ...]) -> Protocol:
    return Protocol(
        name=name,
        section=section,
        recalls=(1, 8),
        pools=_MERLIN_POOLS,
        partitions=100,
        published=published,
        source=_MERLIN,
    )


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="ct-rate-full-report-1",
            section="full",
            recalls=(5, 10, 50, 100),
            published=tuple(
                Published(model=model, pool=1564, k=k, percent=percent)
                for model, percents in (("CT-CLIP", (2.9, 5.0, 18.0, 28.8)), ("SPECTRE", (17.5, 25.5, 48.9, 59.9)))
                for k, percent in zip((5, 10, 50, 100), percents, strict=True)
            ),
            source="SPECTRE (arXiv 2511.17209), table 2: CT-RATE, text to image, full report, 1,564 studies",
        ),
        _merlin(
            "findings",
            "merlin-findings-1",
            _figures("Merlin", _MERLIN_POOLS, {1: (77.6, 68.7, 59.4), 8: (98.8, 96.5, 92.0)})
            + _figures("SPECTRE", _MERLIN_POOLS, {1: (55.5, 43.8, 33.0), 8: (93.5, 86.3, 76.1)}),
        ),
        _merlin(
            "impression",
            "merlin-impressions-1",
            _figures("Merlin", _MERLIN_POOLS, {1: (38.4, 27.7, 19.4), 8: (85.4, 70.6, 56.4)})
            + _figures("SPECTRE", _MERLIN_POOLS, {1: (43.2, 32.9, 24.0), 8: (83.7, 72.8, 61.5)}),
        ),
        _merlin(
            "full",
            "merlin-full-report-1",
            _figures("SPECTRE", _MERLIN_POOLS, {1: (66.4, 55.7, 44.8), 8: (96.4, 91.6, 84.3)}),
        ),
    )
}
"""Published ways to measure, each with the figures that were published with it; SPECTRE saw Merlin's training split."""
