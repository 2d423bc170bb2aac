"""Is anybody on both sides? Between two stores or label files, or between the splits of one store.

Shared are: subjects, volumes of one acquisition, exact copies and near copies (see `copies`). Subjects and acquisitions
are keyed hashes, so they can only be compared under one site key; copies are found whatever the keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from voxelstem.errors import AuditError
from voxelstem.store.catalogue import Catalogue, is_store
from voxelstem.store.copies import LIMITS, Copy, Limits, Roll, find_copies
from voxelstem.store.labels import read_table
from voxelstem.store.reader import Store
from voxelstem.store.records import Record
from voxelstem.store.subjects import key_mark, pseudonym

MOST_LINES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """One subject or acquisition that is on both sides, by what stands for it there: keys of volumes, or `row 7`."""

    in_a: tuple[str, ...]
    in_b: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Leakage:
    """What two sides share. Names nobody: volumes by their keys, rows of a label file by their numbers."""

    subjects: tuple[Shared, ...]
    acquisitions: tuple[Shared, ...]
    copies: tuple[Copy, ...]
    checked: tuple[str, ...]
    """What was compared, in words."""
    unchecked: tuple[str, ...]
    """What could not be compared, and why."""
    within_a_split: tuple[Copy, ...] = ()
    """Of one store: copies that lie in the same split. No leak, but not independent scans either."""

    @property
    def found(self) -> bool:
        """Whether anything is shared."""
        return bool(self.subjects or self.acquisitions or self.copies)

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        exact = sum(copy.kind == "exact" for copy in self.copies)
        return {
            "subjects": len(self.subjects),
            "acquisitions": len(self.acquisitions),
            "exact_copies": exact,
            "near_copies": len(self.copies) - exact,
            "copies_under_another_subject": sum(not copy.same_subject for copy in self.copies),
            "copies_within_a_split": len(self.within_a_split),
        }

    def facts(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        return {"kind": "leakage", "found": self.found, "counts": self.counts} | asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Side:
    """A store, a part of one, or a label file."""

    subjects: Mapping[str, tuple[str, ...]]
    mark: str
    """Of the key that made the pseudonyms; empty where it is not known."""
    acquisitions: Mapping[str, tuple[str, ...]]
    store: Store | None


def leakage(a: Path, b: Path, key: bytes, *, limits: Limits = LIMITS) -> Leakage:
    """Compare any two of: stores, CSV files with a column `subject`. A store with itself: its splits.

    Args:
        a: One.
        b: The other.
        key: The site key, under which the ids of label files are hashed.
        limits: What counts as a copy.

    Raises:
        AuditError: a label file beside a store that was made with another key: nothing could be compared.
        ConfigError: a label file cannot be read.
        StoreError: a store cannot be read.
    """
    if is_store(a) and is_store(b) and a.resolve() == b.resolve():
        return across_splits(Store.open(a), limits=limits)
    one, two = _side(a, key), _side(b, key)
    if (one.store is None or two.store is None) and one.mark != two.mark:
        raise AuditError(
            "the store was made with another site key: the label file's subjects cannot be found in it",
            hint="point VOXELSTEM_KEY at the key the store was made with",
        )
    checked, unchecked = ["subjects"], []
    if one.store is not None and two.store is not None:
        checked.append("acquisitions")
    if one.mark != two.mark or not one.mark:
        names, checked = " and ".join(checked), []
        why = "different site keys" if one.mark and two.mark else "a site key that is not known"
        unchecked.append(f"{names}: made with {why}, so one person has two pseudonyms")
    copies: tuple[Copy, ...] = ()
    if one.store is not None and two.store is not None:
        copies = find_copies(one.store, two.store, limits=limits)
        checked += ["exact copies", "near copies"]
    else:
        unchecked.append("copies: a label file holds no scans")
    return Leakage(
        subjects=_shared(one.subjects, two.subjects),
        acquisitions=_shared(one.acquisitions, two.acquisitions),
        copies=copies,
        checked=tuple(checked),
        unchecked=tuple(unchecked),
    )


def across_splits(store: Store, *, limits: Limits = LIMITS) -> Leakage:
    """See what the train, validation and test parts of a store share. Of each pair of splits, `in_a` is the earlier.

    Subjects never are in two splits of a store that voxelstem wrote; their copies under another id may be.

    Raises:
        StoreError: a volume's file is missing or damaged.
    """
    roll = Roll.of(store)
    parts = [[at for at, split in enumerate(roll.split) if split == name] for name in ("train", "validation", "test")]
    pairs = [(parts[a], parts[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    subjects, acquisitions = (
        tuple(
            shared for one, two in pairs for shared in _shared(_by(column, roll.key, one), _by(column, roll.key, two))
        )
        for column in (roll.subject, roll.group)
    )
    copies = find_copies(store, limits=limits)
    return Leakage(
        subjects=subjects,
        acquisitions=acquisitions,
        copies=tuple(copy for copy in copies if copy.across_splits),
        within_a_split=tuple(copy for copy in copies if not copy.across_splits),
        checked=("subjects", "acquisitions", "exact copies", "near copies"),
        unchecked=(),
    )


def common(seen: Iterable[Record], tested: Iterable[Record]) -> dict[str, int]:
    """Count what the tested records share with those that were learnt from, without reading a voxel.

    Returns:
        How many test subjects, scans, voxel values and acquisitions are among the seen ones too, by their name in a
        sentence.
    """
    one, two = Roll.of(seen), Roll.of(tested)
    columns = {
        "subjects": (one.subject, two.subject),
        "scans": (one.key, two.key),
        "scans, voxel for voxel,": ((*one.voxels, *one.native), (*two.voxels, *two.native)),
        "acquisitions": (one.group, two.group),
    }
    return {name: len((set(left) & set(right)) - {""}) for name, (left, right) in columns.items()}


def describe(found: Leakage) -> str:
    """Say in sentences what is shared."""
    words = {
        "subjects": "subjects on both sides",
        "acquisitions": "acquisitions on both sides",
        "exact_copies": "exact copies",
        "near_copies": "near copies",
        "copies_under_another_subject": "of these copies under another subject",
        "copies_within_a_split": "copies within one split: no leak, but not independent scans",
    }
    lines = ["shared" if found.found else "nothing shared" if found.checked else "nothing could be compared"]
    lines += [f"{found.counts[name]} {word}" for name, word in words.items()]
    told = [f"subject: {_keys(shared.in_a)} | {_keys(shared.in_b)}" for shared in found.subjects]
    told += [f"acquisition: {_keys(shared.in_a)} | {_keys(shared.in_b)}" for shared in found.acquisitions]
    told += [
        f"{copy.kind} copy{'' if copy in found.copies else ' within a split'}: "
        f"{_keys((copy.key_a,))} | {_keys((copy.key_b,))}"
        for copy in (*found.copies, *found.within_a_split)
    ]
    lines += told[:MOST_LINES] + (
        [f"… and {len(told) - MOST_LINES} more (see --json)"] if len(told) > MOST_LINES else []
    )
    lines += [f"compared: {', '.join(found.checked)}"] if found.checked else []
    lines += [f"not compared: {what}" for what in found.unchecked]
    return "\n".join(lines)


def _keys(names: Sequence[str]) -> str:
    shown = ", ".join(name[:16] for name in names[:3])
    return f"{shown}, … ({len(names)})" if len(names) > 3 else shown  # noqa: PLR2004 - fits on a line


def _side(path: Path, key: bytes) -> _Side:
    if not is_store(path):
        rows: dict[str, list[str]] = {}
        for row, cells in read_table(path, ("subject",)):
            rows.setdefault(pseudonym(cells["subject"], key), []).append(f"row {row}")
        subjects = {subject: tuple(found) for subject, found in rows.items()}
        return _Side(subjects=subjects, mark=key_mark(key), acquisitions={}, store=None)
    store = Store.open(path)
    with Catalogue.read(path) as catalogue:
        mark = catalogue.meta("key") or ""
    roll = Roll.of(store)
    everything = range(len(roll))
    return _Side(
        subjects=_by(roll.subject, roll.key, everything),
        mark=mark,
        acquisitions=_by(roll.group, roll.key, everything),
        store=store,
    )


def _by(column: Sequence[str], keys: Sequence[str], which: Iterable[int]) -> dict[str, tuple[str, ...]]:
    """The keys of volumes by what a column says of them; those it says nothing of are left out."""
    found: dict[str, list[str]] = {}
    for at in which:
        if column[at]:
            found.setdefault(column[at], []).append(keys[at])
    return {name: tuple(own) for name, own in found.items()}


def _shared(one: Mapping[str, tuple[str, ...]], two: Mapping[str, tuple[str, ...]]) -> tuple[Shared, ...]:
    return tuple(Shared(in_a=one[name], in_b=two[name]) for name in sorted(set(one) & set(two)))
