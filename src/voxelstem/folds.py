"""Who is held out together: labelled subjects parted by what they show, never a person on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from voxelstem.protocols import Example

Rule = Literal["classes", "events", "numbers", "things"]
EVENT, NO_EVENT = "event", "no event"


@dataclass(frozen=True, kw_only=True, slots=True)
class Strata:
    """What folds and draws of labelled subjects must respect."""

    rule: Rule
    """What was labelled: one of several classes, times of which some end in an event, numbers, or things of which a
    subject may have several (findings, structures)."""
    kinds: Mapping[str, frozenset[str]]
    """Subject to its class, to whether its event came, or to all that it shows; to nothing where numbers are told."""
    groups: tuple[frozenset[str], ...] = ()
    """Subjects who may not be parted, because they share a scan; all others stand alone."""

    def __post_init__(self) -> None:
        """Guard the groups.

        Raises:
            ValueError: nobody is there, groups overlap or name somebody else, or a subject is of no or several classes.
        """
        grouped = [subject for group in self.groups for subject in group]
        if not self.kinds or len(set(grouped)) < len(grouped) or not set(grouped) <= set(self.kinds):
            raise ValueError("strata need labelled subjects, and groups of these that do not overlap")
        odd = sum(len(own) != 1 for own in self.kinds.values())
        if self.rule in ("classes", "events") and odd:
            raise ValueError(f"{odd} of {len(self.kinds)} labelled subjects have no label, or scans of different ones")

    @property
    def units(self) -> list[frozenset[str]]:
        """Everybody, in groups that may not be parted; in an order that depends on names only."""
        grouped = {subject for group in self.groups for subject in group}
        alone = [frozenset([subject]) for subject in self.kinds if subject not in grouped]
        return sorted([*self.groups, *alone], key=sorted)

    @property
    def needed(self) -> dict[str, int]:
        """Kinds without which nothing can be learned, and how many units show them."""
        wanted: set[str] = {EVENT} if self.rule == "events" else set()
        if self.rule == "classes":
            wanted = {kind for own in self.kinds.values() for kind in own}
        return {kind: sum(any(kind in self.kinds[s] for s in unit) for unit in self.units) for kind in sorted(wanted)}


def strata_of(
    examples: Sequence[Example], classes: Sequence[str], *, together: Iterable[Collection[str]] = ()
) -> Strata:
    """What is known of the examples' subjects. Subjects of one scan are joined, and so are those of `together`.

    Args:
        examples: Labelled scans, of one kind of label.
        classes: Structures that count where voxels are labelled; all if empty.
        together: Subjects who are known to be one: copies of a scan under two names, for example.

    Raises:
        ValueError: as `Strata`.
    """
    kinds: dict[str, frozenset[str]] = {}
    by_key: dict[str, set[str]] = {}
    for example in examples:
        kinds[example.subject] = kinds.get(example.subject, frozenset()) | _kinds(example, classes)
        by_key.setdefault(example.key, set()).add(example.subject)
    rule: Rule = "numbers"
    if any(example.label is not None for example in examples):
        rule = "classes"
    elif any(example.survival is not None for example in examples):
        rule = "events"
    elif any(example.findings is not None or example.labels is not None for example in examples):
        rule = "things"
    return Strata(rule=rule, kinds=kinds, groups=_joined([*by_key.values(), *together], frozenset(kinds)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Folds:
    """Who is held out together, while all others are learned from. Everybody is held out once."""

    held: tuple[frozenset[str], ...]

    def __post_init__(self) -> None:
        """Guard the folds.

        Raises:
            ValueError: fewer than two, an empty one, or a subject in two of them.
        """
        if len(self.held) < 2 or not all(self.held) or sum(map(len, self.held)) > len(self.subjects):  # noqa: PLR2004
            raise ValueError("folds are two or more, none is empty, and nobody is in two of them")

    @property
    def subjects(self) -> frozenset[str]:
        """Everybody."""
        return frozenset[str]().union(*self.held)


def draw_folds(strata: Strata, *, count: int, seed: int, repeat: int = 0) -> Folds:
    """Part subjects so that every fold shows as much of each kind as can be: the rarest is dealt out first.

    Sechidis, Tsoumakas & Vlahavas 2011, algorithm 1, for units that may not be parted. There are `count` folds, or as
    many as units show the rarest class: one of them in each. With times, every fold has an event.

    Raises:
        ValueError: fewer than two folds are asked for or possible.
    """
    units, needed = strata.units, strata.needed
    parts = min(count, len(units), *needed.values())
    if parts < 2:  # noqa: PLR2004 - somebody is held out, and somebody learned from
        raise ValueError(
            f"two folds are the least: {count} asked for, {len(units)} subjects"
            + "".join(f", {there} of '{kind}'" for kind, there in needed.items())
        )
    rng = np.random.default_rng([seed, repeat, 41])
    waiting = [units[index] for index in rng.permutation(len(units))]
    shows = {unit: Counter(kind for subject in unit for kind in strata.kinds[subject]) for unit in units}
    dealt = [Counter[str]() for _ in range(parts)]
    held: list[set[str]] = [set() for _ in range(parts)]
    while waiting:
        left = Counter(kind for unit in waiting for kind in shows[unit])
        rarest = min(left, key=lambda kind: (left[kind], kind), default="")
        turn = [unit for unit in waiting if not rarest or rarest in shows[unit]]
        for unit in sorted(turn, key=lambda unit: (-shows[unit][rarest], -len(unit))):
            order = rng.permutation(parts).tolist()
            fold = min(order, key=lambda fold: (dealt[fold][rarest], len(held[fold])))
            dealt[fold].update(shows[unit])
            held[fold] |= unit
        waiting = [unit for unit in waiting if rarest and rarest not in shows[unit]]
    lost = [kind for kind in needed if sum(kind in fold for fold in dealt) < 2]  # noqa: PLR2004
    if lost:
        raise ValueError(f"all subjects of '{lost[0]}' are in one fold: they are joined with others of another kind")
    return Folds(held=tuple(frozenset(fold) for fold in held))


def plan_folds(strata: Strata, *, count: int, repeats: int, seed: int) -> tuple[Folds, ...]:
    """Part subjects anew for each repeat. Whatever is to be compared must share this plan.

    Raises:
        ValueError: no repeat, or as `draw_folds`.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    return tuple(draw_folds(strata, count=count, seed=seed, repeat=repeat) for repeat in range(repeats))


def _kinds(example: Example, classes: Sequence[str]) -> frozenset[str]:
    if example.label is not None:
        return frozenset([example.label])
    if example.survival is not None:
        # An event at time 0 comes before anybody could be compared: nobody learns from it.
        return frozenset([EVENT if example.survival.event and example.survival.time > 0 else NO_EVENT])
    if example.findings is not None:
        return frozenset(f"{name}: {'yes' if there else 'no'}" for name, there in example.findings.items())
    if example.labels is None:
        return frozenset()
    names = {example.labels.classes.get(value, "") for value in np.unique(example.labels.array).tolist()}
    return frozenset(name for name in names if name and (not classes or name in classes))


def _joined(sets: Iterable[Collection[str]], known: frozenset[str]) -> tuple[frozenset[str], ...]:
    """The known subjects of sets that overlap, put together; who is in no set with another is left out."""
    home: dict[str, frozenset[str]] = {}
    for one in sets:
        members = known & frozenset(one)
        whole = members.union(*(home.get(subject, frozenset()) for subject in members))
        home |= dict.fromkeys(whole, whole)
    return tuple(sorted({group for group in home.values() if len(group) > 1}, key=sorted))
