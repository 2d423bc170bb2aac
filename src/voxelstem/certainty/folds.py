"""Who is held out together: labelled subjects parted by what they show, never a person on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from voxelstem.protocols import Example

Rule = Literal["classes", "events", "numbers", "things"]
Count = int | Literal["auto"]
"""Exactly so many folds, or `USUAL` of them, and fewer where labels are too few for that."""
USUAL = 5
DEALS = 20
"""So often subjects who show many things are dealt out anew, until nothing lies in one fold alone."""
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
    both_ways: bool = False
    """Of things: whether each must be learned, whoever is held out. A class that is there or not must be shown both
    ways."""

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
        if self.rule == "classes" or self.both_ways:
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
    findings = any(example.findings is not None for example in examples)
    if any(example.label is not None for example in examples):
        rule = "classes"
    elif any(example.survival is not None for example in examples):
        rule = "events"
    elif findings or any(example.labels is not None for example in examples):
        rule = "things"
    return Strata(
        rule=rule,
        kinds=kinds,
        groups=_joined([*by_key.values(), *together], frozenset(kinds)),
        both_ways=rule == "things" and findings,
    )


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
    many as units show the rarest class: one of them in each. With times, every fold has an event. Where each of many
    classes is there or not, whoever learns without one fold sees every class both ways.

    Raises:
        ValueError: fewer than two folds are asked for or possible, or something is shown by one unit only.
    """
    units, needed = strata.units, strata.needed
    parts = min(count, len(units), *(() if strata.both_ways else needed.values()))
    alone = [kind for kind, there in needed.items() if there < 2] if strata.both_ways else []  # noqa: PLR2004
    if parts < 2 or alone:  # noqa: PLR2004 - somebody is held out, and somebody learned from
        short = {kind: needed[kind] for kind in alone} or ({} if strata.both_ways else needed)
        raise ValueError(
            f"two folds are the least: {count} planned, {len(units)} subjects"
            + "".join(f", {there} of '{kind}'" for kind, there in short.items())
        )
    rng = np.random.default_rng([seed, repeat, 41])
    lost: list[str] = []
    for _ in range(DEALS if strata.both_ways else 1):
        held = _deal(strata, parts, rng)
        lost = _in_one_fold(strata, held)
        if not lost:
            return Folds(held=held)
    raise ValueError(f"all subjects of '{lost[0]}' are in one fold: they are joined with others of another kind")


def _deal(strata: Strata, parts: int, rng: np.random.Generator) -> tuple[frozenset[str], ...]:
    """Deal everybody out to so many folds, the rarest kind first."""
    units = strata.units
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
    return tuple(frozenset(fold) for fold in held)


def _in_one_fold(strata: Strata, held: Sequence[frozenset[str]]) -> list[str]:
    """What would not be learned while a fold is held out: nobody else shows it."""
    shown = [{kind for subject in fold for kind in strata.kinds[subject]} for fold in held]
    return [kind for kind in strata.needed if sum(kind in kinds for kinds in shown) < 2]  # noqa: PLR2004


def plan_folds(strata: Strata, *, count: int, repeats: int, seed: int) -> tuple[Folds, ...]:
    """Part subjects anew for each repeat. Whatever is to be compared must share this plan.

    Raises:
        ValueError: no repeat, or as `draw_folds`.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    return tuple(draw_folds(strata, count=count, seed=seed, repeat=repeat) for repeat in range(repeats))


def asked_folds(strata: Strata, *, count: Count, told: Mapping[str, int], repeats: int, seed: int) -> tuple[Folds, ...]:
    """The folds that a user wants: those that the label file tells, exactly `count`, or as many as can be up to five.

    Args:
        strata: Who is labelled, and as what.
        count: How many; not looked at where they are told.
        told: Subject to fold; those who are not among the labelled subjects do not matter.
        repeats: So often; folds that are told stay the same.
        seed: Of the draws.

    Raises:
        ValueError: fewer than `count` can be had; folds that are told leave somebody out, part subjects who share a
            scan, or hold all subjects out who show a class; or as `plan_folds`.
    """
    if told:
        return (_told_folds(strata, told),) * repeats
    plan = plan_folds(strata, count=USUAL if count == "auto" else count, repeats=repeats, seed=seed)
    least = min(len(folds.held) for folds in plan)
    if count != "auto" and least < count:
        rarest = min(strata.needed.items(), key=lambda one: one[1], default=("", 0))
        few = f"{rarest[1]} of '{rarest[0]}'" if strata.needed else f"{len(strata.units)}"
        raise ValueError(f"{count} folds are asked for, and the labelled subjects, {few}, allow {least}")
    return plan


def _told_folds(strata: Strata, told: Mapping[str, int]) -> Folds:
    lacking = sum(subject not in told for subject in strata.kinds)
    if lacking:
        raise ValueError(f"the label file gives {lacking} of {len(strata.kinds)} labelled subjects no fold")
    for group in strata.groups:
        folds = sorted({told[subject] for subject in group})
        if len(folds) > 1:
            raise ValueError(
                f"the label file has subjects who share a scan in the folds {folds[0]} and {folds[1]}: it would be "
                "learned from and held out at once"
            )
    numbers = sorted({told[subject] for subject in strata.kinds})
    held = [frozenset(subject for subject in strata.kinds if told[subject] == number) for number in numbers]
    if len(held) < 2:  # noqa: PLR2004
        raise ValueError(f"the label file has all {len(strata.kinds)} labelled subjects in fold {numbers[0]}")
    lost = _in_one_fold(strata, held)
    if lost:
        raise ValueError(f"by the label file all subjects of '{lost[0]}' are in one fold")
    return Folds(held=tuple(held))


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
