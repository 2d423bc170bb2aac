"""Scans that are in a store twice, or in two stores: by their voxels' digest, and by look where the voxels changed.

A copy under another patient's id can sit on both sides of a split, and makes a test easier than it looks. Exact copies
are found by digest. For the others thumbnails give candidates, and the voxels decide, see `likeness`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from voxelstem.progress import progress
from voxelstem.store.encoding import quantise
from voxelstem.store.likeness import Likeness, Sketch, compare, sketch
from voxelstem.store.nearest import Best, Nearest
from voxelstem.store.reader import Store, digest
from voxelstem.store.records import Record
from voxelstem.store.thumbnails import CROPS, WHOLE, Album, album, embed, is_thumbnail, thumbnail
from voxelstem.study import Volume

SKETCHES = 96
"""Kept in memory while pairs are compared: 2 MB each."""

Kind = Literal["exact", "near"]
Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What counts as a copy. Measured by `benchmarks/copies.py`."""

    likeness: float = 0.9
    """Product of two thumbnails' vectors from which on voxels are compared."""
    most: int = 8
    """Candidates for each scan, the most alike ones; a pair is one when either scan is a candidate of the other."""
    correlation: float = 0.93
    """Of details, at least. Made copies have 0.95 and more, different people 0.9 and less unless registered."""
    difference: float = 0.4
    """Of tissue values, at most. Made copies have 0.25 and less, another phase or sequence 0.65 and more."""
    overlap: float = 0.5
    """Share of the smaller scan that the larger one shows, at least."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a share outside 0 to 1, or no candidates.
        """
        shares = (self.likeness, self.correlation, self.overlap)
        if not (all(0 < share <= 1 for share in shares) and self.difference > 0 and self.most > 0):
            raise ValueError(f"likeness, correlation and overlap must be in (0, 1], the others positive, got {self}")


LIMITS = Limits()


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """Two volumes that show the same acquisition."""

    key_a: str
    """Empty where the volume is in no store yet."""
    key_b: str
    kind: Kind
    correlation: float
    overlap: float
    """Share of the smaller one that the larger one shows."""
    same_subject: bool
    """Whether both are under one pseudonym. Two stores made with different site keys never share one."""
    linked: bool
    """Whether the catalogue knows them as reconstructions of one acquisition already."""
    across_splits: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Roll:
    """What finding copies and leakage need of each volume, as columns."""

    key: tuple[str, ...]
    subject: tuple[str, ...]
    voxels: tuple[str, ...]
    native: tuple[str, ...]
    """Digest of the voxels before they were resampled; empty where they were not, or were not kept."""
    group: tuple[str, ...]
    """The acquisition that near copies share; empty where it is not known."""
    split: tuple[str, ...]

    @classmethod
    def of(cls, records: Iterable[Record]) -> Roll:
        """Read the columns off records, which need not be in memory together."""
        rows = [
            (
                one.key,
                one.subject,
                one.voxels,
                one.native.voxels if one.native else "",
                one.acquisition.group,
                one.split,
            )
            for one in records
        ]
        key, subject, voxels, native, group, split = zip(*rows, strict=True) if rows else ((),) * 6
        return cls(key=key, subject=subject, voxels=voxels, native=native, group=group, split=split)

    def __len__(self) -> int:
        """How many volumes there are."""
        return len(self.key)


def find_copies(
    store: Store, other: Store | None = None, *, among: Sequence[Record] | None = None, limits: Limits = LIMITS
) -> tuple[Copy, ...]:
    """Find copies within a store, or between two.

    Flipped, turned or stretched copies are not looked for, nor crops that keep less than half. A volume whose
    thumbnail the catalogue does not hold (another version wrote it) is read once to draw it.

    Args:
        store: Where to look.
        other: Where their copies may be; the same store if there is none.
        among: Only these of the store's volumes; all if None.
        limits: What counts as a copy.

    Returns:
        One entry a pair, the exact ones first, ordered by keys. Within a store `key_a` < `key_b`; between two `key_a`
        is of `store`.

    Raises:
        StoreError: a volume's file is missing or damaged.
    """
    between = other is not None
    beside = other if between else store  # an empty store is false, so no `or` here
    here = Roll.of(store if among is None else sorted(among, key=lambda record: record.key))
    there = Roll.of(beside) if between else here
    exact = exact_copies(here, there if between else None)
    known = {(copy.key_a, copy.key_b) for copy in exact}
    album_a = _album(store, here)
    found = candidates(album_a, _album(beside, there) if between else None, limits=limits)
    pairs = [(a, b) for a, b in sorted(found) if (here.key[a], there.key[b]) not in known]
    left, right = _Sketches(store), _Sketches(beside)
    near: list[Copy] = []
    with progress("copies", len(pairs)) as advance:
        for a, b in pairs:
            like = compare(left.of(here.key[a]), right.of(there.key[b]), overlap=limits.overlap)
            if is_copy(like, limits):
                near.append(_copy(here, there, (a, b), "near", like))
            advance(1)
    return (*exact, *near)


def copies_of(volume: Volume, store: Store, *, subject: str = "", limits: Limits = LIMITS) -> tuple[Copy, ...]:
    """Find the copies that a store holds of one volume, which need not be in it.

    It reads the catalogue once and then only the volumes that look alike: for many volumes put them into a store and
    use `find_copies`.

    Args:
        volume: In RAS+, as `read` gives it.
        store: Where to look.
        subject: The volume's pseudonym, if it has one.
        limits: What counts as a copy.

    Returns:
        Copies with an empty `key_a`.

    Raises:
        IngestError: the volume holds values that are not finite.
        StoreError: a volume's file is missing or damaged.
    """
    stored, slope, intercept, _ = quantise(volume.array)
    voxels = digest(stored, slope, intercept)
    one = Roll(
        key=("",), subject=(subject,), voxels=(voxels,), native=("",), group=(volume.acquisition.group,), split=("",)
    )
    roll = Roll.of(store)
    exact = exact_copies(one, roll)
    same = {copy.key_b for copy in exact}
    drawn = album([thumbnail(volume.array, volume.affine_ras, volume.modality)])
    mine, sketches = sketch(volume.array, volume.affine_ras, volume.modality), _Sketches(store)
    near: list[Copy] = []
    for pair in sorted(candidates(drawn, _album(store, roll), limits=limits)):
        if roll.key[pair[1]] not in same:
            like = compare(mine, sketches.of(roll.key[pair[1]]), overlap=limits.overlap)
            near += [_copy(one, roll, pair, "near", like)] if is_copy(like, limits) else []
    return (*exact, *near)


def is_copy(like: Likeness, limits: Limits = LIMITS) -> bool:
    """Judge what `likeness.compare` measured."""
    return (
        like.correlation >= limits.correlation
        and like.difference <= limits.difference
        and like.overlap >= limits.overlap - ROUNDING
    )


def exact_copies(here: Roll, there: Roll | None = None) -> tuple[Copy, ...]:
    """Find pairs with equal voxel values, before or after resampling, whatever their headers and owners say."""
    by_digest: dict[str, list[int]] = {}
    other = here if there is None else there
    for digests in (other.voxels, other.native):
        for at, digested in enumerate(digests):
            if digested:
                by_digest.setdefault(digested, []).append(at)
    pairs = {
        (a, b)
        for digests in (here.voxels, here.native)
        for a, digested in enumerate(digests)
        for b in by_digest.get(digested, ())
        if there is not None or a < b
    }
    equal = Likeness(correlation=1.0, difference=0.0, overlap=1.0)
    return tuple(_copy(here, other, pair, "exact", equal) for pair in sorted(pairs))


def candidates(first: Album, second: Album | None = None, *, limits: Limits = LIMITS) -> set[Pair]:
    """Find pairs of scans that look alike, as they are or after one of them was cropped.

    Takes minutes for 250,000 scans on two cores, and about 1 GiB.

    Returns:
        Places in `first` and `second`; within one album the lesser place first.
    """
    if second is None:
        return {(min(pair), max(pair)) for pair in _alike(first, first, limits)}
    back = {(a, b) for b, a in _alike(second, first, limits)}
    return back | set(_alike(first, second, limits))


def _alike(asking: Album, asked: Album, limits: Limits) -> Iterator[Pair]:
    """Yield scans of `asking`, cropped in every way, with those of `asked` that look like them."""
    for modality in np.unique(asking.modality):
        own, base = (np.flatnonzero(one.modality == modality) for one in (asking, asked))
        mine, vectors = asking.take(own), embed(asked.take(base))
        index = Nearest(vectors)
        best, back = (Best.empty(len(which), most=limits.most, floor=limits.likeness) for which in (own, base))
        for cut in (WHOLE, *CROPS):
            index.search(embed(mine, cut), best, back, among_themselves=asking is asked)
        yield from ((int(own[a]), int(base[b])) for a, b in best.pairs())
        yield from ((int(own[a]), int(base[b])) for b, a in back.pairs())


ROUNDING = 0.02
"""Overlaps are counted in whole cells."""


class _Sketches:
    """Sketches of a store's volumes; the longest unused one is forgotten first."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._drawn: OrderedDict[str, Sketch] = OrderedDict()

    def of(self, key: str) -> Sketch:
        if key in self._drawn:
            self._drawn.move_to_end(key)
            return self._drawn[key]
        record = self._store.record(key)
        array = self._store.crop(key, (0, 0, 0), record.shape_ijk)
        drawn = self._drawn[key] = sketch(array, record.affine_ras, record.modality)
        if len(self._drawn) > SKETCHES:
            self._drawn.popitem(last=False)
        return drawn


def _album(store: Store, roll: Roll) -> Album:
    """Thumbnails in the order of the roll; those that are missing are drawn from the voxels."""
    place = {key: at for at, key in enumerate(roll.key)}
    drawn = [b""] * len(roll)
    for key, data in store.thumbnails():
        if key in place and is_thumbnail(data):
            drawn[place[key]] = data
    for at, data in enumerate(drawn):
        if not data:
            record = store.record(roll.key[at])
            array = store.crop(record.key, (0, 0, 0), record.shape_ijk)
            drawn[at] = thumbnail(array, record.affine_ras, record.modality)
    return album(drawn)


def _copy(here: Roll, there: Roll, pair: Pair, kind: Kind, like: Likeness) -> Copy:
    a, b = pair
    return Copy(
        key_a=here.key[a],
        key_b=there.key[b],
        kind=kind,
        correlation=round(like.correlation, 4),
        overlap=round(like.overlap, 3),
        same_subject=here.subject[a] == there.subject[b],
        linked=bool(here.group[a]) and here.group[a] == there.group[b],
        across_splits=here.split[a] != there.split[b],
    )
