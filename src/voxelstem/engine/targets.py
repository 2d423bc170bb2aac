"""What a store says of the scans that a run learns from, scan by scan: read once, before the first step.

Who is paired with whom hangs on it, and so does all that `Batch.targets` hold. `views/pair.py` says what they mean.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from voxelstem.errors import StoreError
from voxelstem.store.reader import Store
from voxelstem.store.records import Record
from voxelstem.study import VOLUME_LABEL
from voxelstem.table import closest
from voxelstem.views.pair import Kind, PairConfig

PATHOLOGY = "pathology"
"""The scan-level label that says whether there is any."""
LEAST_ICV_MM3 = 1000.0
"""No head is smaller: below it a program that measured volumes found none."""
OVER_OLDEST = 90.0
"""This age stands for everybody older (`deidentify.OVER_OLDEST`), so no interval can be told from it."""
YEAR_DAYS = 365.25
_ANSWERS = {"yes": 1.0, "true": 1.0, "1": 1.0, "no": 0.0, "false": 0.0, "0": 0.0}
_LEAST_KNOWN = 2
"""Values of which a column needs as many to have a spread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What the catalogue says of one scan."""

    key: str
    subject: str
    session: str
    """Equal for the scans of one session of one subject."""
    contrast: str
    """In small letters; empty where nobody knows."""
    day: float
    """Its date as a number of days; NaN where nobody knows, and so all that follows."""
    age: float
    pathology: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Facts:
    """All that is known of the training scans, and how their volumes were standardised."""

    config: PairConfig
    scans: tuple[Said, ...]
    """In the order of their keys."""
    rows: Mapping[str, int]
    """A scan's place in `scans`, by its key."""
    by_subject: Mapping[str, tuple[int, ...]]
    columns: tuple[str, ...]
    """Names of the volumes, in alphabetical order."""
    volumes: Float32[np.ndarray, "scan column"]
    """Standardised."""
    mean: Float64[np.ndarray, " column"]
    std: Float64[np.ndarray, " column"]
    counts: Mapping[str, Any]
    """How many scans lack what, for the journal."""

    def partners(self, key: str, kind: Kind) -> list[str]:
        """Scans of the same subject that can be paired with this one so, ordered by key."""
        mine = self.scans[self.rows[key]]
        others = [self.scans[row] for row in self.by_subject[mine.subject] if row != self.rows[key]]
        match kind:
            case "same_session":
                found = [each for each in others if each.session == mine.session and each.contrast != mine.contrast]
            case "other_session":
                same = [each for each in others if each.contrast == mine.contrast != ""]
                found = [each for each in same if each.session != mine.session]
            case "any_scan":
                found = others
        return [each.key for each in found]

    def relatives(self, key: str) -> frozenset[str]:
        """All other scans of the same subject."""
        rows = self.by_subject[self.scans[self.rows[key]].subject]
        return frozenset(self.scans[row].key for row in rows) - {key}

    def draw(self, key: str, rng: np.random.Generator) -> Iterator[str]:
        """Possible partners of a scan in the order in which they are to be tried; each once."""
        tried: set[str] = set()
        for kind in self.config.order(rng):
            known = self.partners(key, kind)
            for at in rng.permutation(len(known)):
                if known[at] not in tried:
                    tried.add(known[at])
                    yield known[at]

    def targets(self, key: str, other: str | None = None) -> dict[str, Float32[np.ndarray, " value"]]:
        """What is known of a scan and, where there is one, of its partner, as `Batch.targets` names it."""
        a, row = self.scans[self.rows[key]], self.rows[key]
        found: dict[str, list[float]] = {"subject": [number_of(a.subject)], "pathology": [a.pathology]}
        told = [a]
        if other is not None:
            b = self.scans[self.rows[other]]
            told.append(b)
            same = key == other or a.session == b.session
            found |= {
                "copy": [float(key == other)],
                "same_session": [float(same)],
                "years": [0.0 if same else _years(a, b)],
            }
        found |= {"contrast": [self.config.index(each.contrast) for each in told], "age": [each.age for each in told]}
        targets = {name: np.array(values, np.float32) for name, values in found.items()}
        if self.columns:
            targets["volumes"] = self.volumes[row]
            if other is not None:
                targets["volumes_other"] = self.volumes[self.rows[other]]
        return targets

    def note(self) -> dict[str, Any]:
        """A line for the run's journal: what is known and what is missing, and how to turn columns into shares."""
        scale = {
            name: [float(mean), float(std)] for name, mean, std in zip(self.columns, self.mean, self.std, strict=True)
        }
        return {"targets": dict(self.counts), "volumes_mean_std": scale}


def read_facts(store: Store, keys: Collection[str], config: PairConfig) -> Facts:
    """Read what the catalogue says of these scans, and standardise their volumes over them.

    Raises:
        StoreError: a second scan is wanted and no scan has a partner; no scan has a structure that the config names;
            or none names the volume within the skull by which others are divided.
    """
    wanted = set(keys)
    records = [record for record in store if record.key in wanted]
    scans = tuple(_said(record) for record in records)
    by_subject: dict[str, list[int]] = {}
    for row, scan in enumerate(scans):
        by_subject.setdefault(scan.subject, []).append(row)
    columns, shares, unreadable = _shares(records, config)
    own = shares[_references(scans, by_subject, shares, config)]
    volumes, mean, std = _standardise(own) if config.standardise else _as_they_are(own)
    facts = Facts(
        config=config,
        scans=scans,
        rows={scan.key: row for row, scan in enumerate(scans)},
        by_subject={subject: tuple(rows) for subject, rows in by_subject.items()},
        columns=columns,
        volumes=volumes,
        mean=mean,
        std=std,
        counts=_counts(scans, volumes, config) | {"unreadable_volumes": unreadable},
    )
    if not config.paired:
        return facts
    alone = sum(not any(facts.partners(key, kind) for kind in config.wanted) for key in facts.rows)
    if alone == len(scans):
        raise StoreError(
            f"none of the {len(scans)} training scans has a partner ({', '.join(config.wanted)}): "
            f"{len(by_subject)} subjects, contrasts {', '.join(sorted({scan.contrast or '?' for scan in scans}))}",
            hint="ingest further contrasts or sessions of these subjects under the same subject id, give views.pair "
            "other shares, or choose a recipe that needs no pairs",
        )
    return replace(facts, counts={**facts.counts, "without_partner": alone})


def _said(record: Record) -> Said:
    told = record.acquisition
    # What the source calls a session says more than a date, and a date more than the examination, which is a scan's own
    # where the source says nothing.
    marks = (("session", told.session), ("day", told.date), ("study", record.study))
    kind, mark = next(((kind, mark) for kind, mark in marks if mark), ("", ""))
    return Said(
        key=record.key,
        subject=record.subject,
        session=f"{kind} {mark}",
        contrast=told.contrast.casefold(),
        day=float(date.fromisoformat(told.date).toordinal()) if told.date else math.nan,
        age=math.nan if told.age_years is None else told.age_years,
        pathology=_ANSWERS.get(record.labels.get(PATHOLOGY, "").strip().casefold(), math.nan),
    )


def _years(a: Said, b: Said) -> float:
    """From a to b; NaN where neither dates nor ages tell."""
    days = b.day - a.day
    if math.isfinite(days):
        return days / YEAR_DAYS
    return b.age - a.age if max(a.age, b.age) < OVER_OLDEST else math.nan


def _shares(
    records: Sequence[Record], config: PairConfig
) -> tuple[tuple[str, ...], Float64[np.ndarray, "scan column"], int]:
    """The columns' names, each scan's volumes as shares of the one within the skull, and how many make no sense."""
    told = [
        {name.removeprefix(VOLUME_LABEL): text for name, text in record.labels.items() if name.startswith(VOLUME_LABEL)}
        for record in records
    ]
    known = {name for each in told for name in each} - {config.icv}
    columns = tuple(sorted(config.structures or known))
    strange = [name for name in columns if name not in known]
    if strange:
        raise StoreError(
            f"no training scan has a volume of '{strange[0]}', which views.pair.structures names",
            hint=closest(strange[0], sorted(known)) if known else "ingest volumes of the scans, or name no structures",
        )
    read = [{name: volume_mm3(each.get(name)) for name in (*columns, config.icv)} for each in told]
    unreadable = sum(
        name in each and math.isnan(row[name]) for each, row in zip(told, read, strict=True) for name in row
    )
    shares = np.array([[row[name] for name in columns] for row in read], np.float64).reshape(len(records), len(columns))
    if config.icv and columns:
        icv = np.array([row[config.icv] for row in read])
        icv[~(icv >= LEAST_ICV_MM3)] = math.nan
        if np.isnan(icv).all():
            raise StoreError(
                f"training scans have volumes, but none a usable '{config.icv}' to divide them by",
                hint="set views.pair.icv to the name that your table uses, or to '' to take volumes in mm3",
            )
        shares = shares / icv[:, None]
    return columns, shares, unreadable


def number_of(subject: str) -> float:
    """A number by which two scans of one subject are known, in any process; float32 holds it exactly.

    Two subjects have the same one time in 16 million.
    """
    return float(zlib.crc32(subject.encode()) & 0xFFFFFF)


def volume_mm3(text: str | None) -> float:
    """A volume in mm3; NaN for anything that is none."""
    try:
        volume = float(text or "nan")
    except ValueError:
        return math.nan
    return volume if 0 <= volume < math.inf else math.nan


def _references(
    scans: Sequence[Said],
    by_subject: Mapping[str, Sequence[int]],
    shares: Float64[np.ndarray, "scan column"],
    config: PairConfig,
) -> list[int]:
    """Of each scan, the scan whose volumes are its target: itself where none is better."""
    measured = np.logical_not(np.isnan(shares).all(axis=1))  # none is where there is no column
    found = list(range(len(scans)))
    if config.volumes_of == "scan":
        return found

    def rank(row: int) -> tuple[float, float, str, float, str]:
        scan, place = scans[row], config.index(scans[row].contrast)
        first = [math.inf if math.isnan(number) else number for number in (scan.day, scan.age, place)]
        return first[0], first[1], scan.session, first[2], scan.key

    for rows in by_subject.values():
        best = sorted((row for row in rows if measured[row]), key=rank)
        for row in rows:
            same = [
                each for each in best if config.volumes_of == "subject" or scans[each].session == scans[row].session
            ]
            found[row] = same[0] if same else row
    return found


def _standardise(
    shares: Float64[np.ndarray, "scan column"],
) -> tuple[Float32[np.ndarray, "scan column"], Float64[np.ndarray, " column"], Float64[np.ndarray, " column"]]:
    """Mean 0 and standard deviation 1 of each column over what is known; NaN where a column does not vary."""
    known = ~np.isnan(shares)
    count = known.sum(axis=0)
    filled = np.where(known, shares, 0.0)
    mean = filled.sum(axis=0) / np.maximum(count, 1)
    spread = np.sqrt((np.where(known, shares - mean, 0.0) ** 2).sum(axis=0) / np.maximum(count, 1))
    # Rounding alone makes a spread of equal numbers.
    varies = (count >= _LEAST_KNOWN) & (spread > 1e-9 * np.abs(mean))
    std = np.where(varies, spread, math.nan)
    return ((shares - mean) / std).astype(np.float32), mean, std


def _as_they_are(
    shares: Float64[np.ndarray, "scan column"],
) -> tuple[Float32[np.ndarray, "scan column"], Float64[np.ndarray, " column"], Float64[np.ndarray, " column"]]:
    return shares.astype(np.float32), np.zeros(shares.shape[1]), np.ones(shares.shape[1])


def _counts(scans: Sequence[Said], volumes: Float32[np.ndarray, "scan column"], config: PairConfig) -> dict[str, Any]:
    strange = Counter(scan.contrast for scan in scans if scan.contrast and math.isnan(config.index(scan.contrast)))
    return {
        "scans": len(scans),
        "subjects": len({scan.subject for scan in scans}),
        "without_contrast": sum(not scan.contrast for scan in scans),
        "contrasts_without_index": dict(sorted(strange.items())),
        "without_age": sum(math.isnan(scan.age) for scan in scans),
        "without_date": sum(math.isnan(scan.day) for scan in scans),
        "without_pathology": sum(math.isnan(scan.pathology) for scan in scans),
        "without_volumes": int(np.isnan(volumes).all(axis=1).sum()) if volumes.size else len(scans),
    }


def blank_targets(config: PairConfig, samples: int, columns: int = 0) -> dict[str, Float32[np.ndarray, "sample value"]]:
    """Targets of the right names and widths with nothing to learn in them, for estimates.

    Args:
        config: Which targets.
        samples: How many rows.
        columns: Of volumes, where the config names no structures; without either there are none.
    """
    both = 2 if config.paired else 1
    sizes = {"subject": 1, "pathology": 1, "contrast": both, "age": both}
    if config.paired:
        sizes |= {"copy": 1, "same_session": 1, "years": 1}
    columns = len(config.structures) or columns
    if columns:
        sizes["volumes"] = columns
        sizes |= {"volumes_other": columns} if config.paired else {}
    return {name: np.zeros((samples, size), np.float32) for name, size in sizes.items()}
