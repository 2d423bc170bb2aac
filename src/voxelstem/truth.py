"""Truth: what experts said about the scans of a store, matched with a label file, and who of them is learned from."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from voxelstem.allowed import LONGEST_NAME, check_name
from voxelstem.certainty.turns import check_kinds, show_both, show_classes, spread_events
from voxelstem.errors import AuditError, ConfigError
from voxelstem.prompts import Prompts
from voxelstem.protocols import Task
from voxelstem.store import Record, Store
from voxelstem.store.labels import (
    LabelFile,
    Matched,
    Told,
    Unknown,
    is_formula,
    match,
    read_findings,
    read_labels,
    says_many,
)
from voxelstem.store.subjects import keyed_id, site_key
from voxelstem.study import InputSpec, Survival
from voxelstem.table import closest

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """What experts said about the scans of a store, for one task and one modality."""

    records: tuple[Record, ...]
    """The labelled scans, in the store's order."""
    labels: Mapping[str, str]
    """Subject to label, for scan-level tasks."""
    classes: tuple[str, ...]
    """Scan level: every label that occurs. Voxel level: the organs asked for, empty for all that are named."""
    findings: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    """Subject to what is there and what not, for tasks that ask for many things; what nobody knows is not named."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Subject to a number, for tasks that predict one."""
    survival: Mapping[str, Survival] = field(default_factory=dict)
    """Subject to how long nothing happened, for tasks that predict when something does."""
    folds: Mapping[str, int] = field(default_factory=dict)
    """Subject to the fold in which the label file has it held out; empty where that is left to chance."""
    both_ways: bool = False
    """Of findings: whether somebody must show that a class is there and somebody that it is not, for every class."""
    left_out: int = 0
    """What was labelled and is not learned from: subjects without a scan of the kind that is looked for, or scans in
    which not every class was looked for."""

    def of(self, split: str) -> tuple[Record, ...]:
        """The labelled scans of one split."""
        return tuple(record for record in self.records if record.split == split)


def read_truth(store: Store, labels: Path, task: Task, spec: InputSpec, *, unknown: Unknown = "refused") -> Truth:
    """Match the label file with the store's scans of the model's modality.

    A label of a subject without such a scan is `unknown`: refused with its row, or left out and counted in a warning.

    Raises:
        ConfigError: the file is not what the task needs, nobody matches, somebody is not known, or the modality is
            missing.
    """
    records = [record for record in store if record.modality == spec.modality]
    if not records:
        have = ", ".join(sorted({record.modality for record in store})) or "nothing"
        raise ConfigError(
            f"these weights were trained on {spec.modality}, the store holds {have}",
            hint=f"choose weights for {have}, or a store with {spec.modality} scans",
        )
    who = _Who(store=store, records=tuple(records), spec=spec, unknown=unknown)
    if task.voxels:
        truth = _drawn(who, labels)
    elif is_aligned(task):
        return _asked(who, labels, task)
    elif is_number(task):
        found = who.matched(read_labels(labels, "regress", site_key()))
        values = {subject: cast(float, value) for subject, value in found.labels.items()}
        truth = replace(who.truth(found), values=values)
    elif is_survival(task):
        found = who.matched(read_labels(labels, "survive", site_key()))
        truth = replace(who.truth(found), survival={s: cast(Survival, label) for s, label in found.labels.items()})
    elif says_many(labels):
        truth = _each(who, labels, tuple(getattr(task, "classes", ())))
    else:
        if getattr(task, "classes", ()):
            raise ConfigError(
                f"{labels.name} gives every subject one label, so there is no class to choose",
                hint="leave head.classes out, or write a column for each class instead of `label`",
            )
        truth = _one_label(who, labels)
    if not truth.of("train"):
        raise ConfigError(
            f"no training subject of the store has {'voxel ' if task.voxels else ''}labels for this",
            hint="ingest more labelled scans: a subject's hash decides which split it is in",
        )
    return truth


def is_aligned(task: Task) -> bool:
    """Whether a task compares scans with texts, for which weights must have learned from reports: `aligned` says so."""
    return bool(getattr(task, "aligned", False))


def is_number(task: Task) -> bool:
    """Whether a task predicts a number of each scan: `numbers` says so."""
    return bool(getattr(task, "numbers", False))


def is_survival(task: Task) -> bool:
    """Whether a task predicts when an event comes, and learns from times of which some are censored: `survival`."""
    return bool(getattr(task, "survival", False))


def of_contrast(truth: Truth, contrasts: Sequence[str]) -> Truth:
    """Only the scans of the first contrast, which carry the labels of a session; all of them if none is named."""
    kept = [record for record in truth.records if not contrasts or record.acquisition.contrast == contrasts[0]]
    if not kept:
        known = ", ".join(sorted({record.acquisition.contrast for record in truth.records} - {""})) or "not named"
        raise ConfigError(
            f"no labelled scan is {contrasts[0]}; the contrasts are {known}",
            hint="name the contrast that carries the labels first in full.contrasts",
        )
    return replace(truth, records=tuple(kept))


def draw(
    truth: Truth, budget: int | None, seed: int, *, voxels: bool, split: Literal["train", "validation"] = "train"
) -> tuple[Record, ...]:
    """Draw labelled subjects of a split and return their scans. With one label for each scan, classes take turns.

    Of subjects with times, a draw holds about the share with an event that there is among all: curves depend on it.

    Raises:
        ConfigError: no or fewer subjects than the budget, or a budget below the number of classes.
        AuditError: the subjects are all of one class, have all one value, or none of them has an event.
    """
    train = truth.of(split)
    word = "training" if split == "train" else split
    if not train:
        raise ConfigError(
            f"no {word} subject of the store has labels for this",
            hint="ingest more labelled scans: a subject's hash decides which split it is in",
        )
    subjects = sorted({record.subject for record in train})
    order = [subjects[index] for index in np.random.default_rng([seed, 11]).permutation(len(subjects))]
    if truth.both_ways:
        order = show_both(order, truth.findings, truth.classes, budget, word)
    elif truth.findings:
        check_kinds([truth.findings[subject] for subject in order], truth.classes, word)
    elif truth.survival:
        order = spread_events(order, truth.survival, budget, word)
    elif truth.labels and not voxels:
        order = show_classes(order, truth.labels, truth.classes, budget, word)
    elif truth.values and len({truth.values[subject] for subject in order}) < 2:  # noqa: PLR2004
        raise AuditError(f"all {len(order)} labelled {word} subjects have the same value", hint="label others too")
    if budget is not None and budget > len(order):
        raise ConfigError(
            f"budget {budget} is more than the {len(order)} labelled {word} subjects",
            hint=f"use --budget {len(order)}, or leave it out to use all",
        )
    drawn = set(order[:budget])
    return tuple(record for record in train if record.subject in drawn)


def class_names(truth: Truth, records: Sequence[Record], *, voxels: bool) -> tuple[str, ...]:
    """Names of the head's classes; without a wish, the organs that every drawn scan has names for.

    Raises:
        AuditError: the drawn scans have no organ in common.
        ConfigError: a name that findings could not carry.
    """
    names = _names(truth, records, voxels=voxels)
    for name in names:
        try:
            check_name(f"the name of the class {name[:LONGEST_NAME]!r}", name)
        except ValueError as error:
            raise ConfigError(str(error), hint="give it a shorter name in the labels") from error
    return names


def _names(truth: Truth, records: Sequence[Record], *, voxels: bool) -> tuple[str, ...]:
    if not voxels or truth.classes:
        return truth.classes
    shared = set.intersection(*(set(record.classes.values()) for record in records))
    if not shared:
        raise AuditError("the labelled scans have no structure in common", hint="name the classes in labels.json")
    return tuple(sorted(shared))


def told_each(truth: Truth, records: Sequence[Record], classes: Sequence[str]) -> tuple[str, ...]:
    """A digest of what is said of each subject of labelled scans, in the order of the subjects' pseudonyms.

    It shows later whether labels say the same. Pseudonym and site key go into it: without the key nobody can try what
    was said, or see of whom the same was. Of voxels it is of the structures asked for, and without the key: those are
    no secret. Of findings only `classes` count.

    Raises:
        ConfigError: the site key cannot be read.
    """
    told: Mapping[str, Any] = truth.labels or truth.values or truth.survival or truth.findings
    asked: dict[str, Any] = {}
    for record in records:
        if isinstance(one := told.get(record.subject), Mapping):
            asked[record.subject] = {name: there for name, there in one.items() if name in classes}
        elif told:
            asked[record.subject] = [one.time, one.event] if isinstance(one, Survival) else one
        else:
            names = {name for name in record.classes.values() if name in truth.classes or not truth.classes}
            asked[record.subject] = sorted(names.union(asked.get(record.subject, ())))
    key = site_key() if told and asked else b""
    said = ((subject, json.dumps(asked[subject], sort_keys=True)) for subject in sorted(asked))
    return tuple(keyed_id("label", f"{subject} {words}", key) for subject, words in said)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Who:
    """Whose labels can be used: those who have a scan of the model's modality."""

    store: Store
    records: tuple[Record, ...]
    spec: InputSpec
    unknown: Unknown

    def matched(self, file: LabelFile[Told]) -> Matched[Told]:
        """The labels of those whose scans are here; a warning counts those that are left out."""
        known = {record.subject for record in self.records}
        others = {record.subject for record in self.store} - known
        found = match(file, known, others=others, scan=self.spec.modality, unknown=self.unknown)
        if found.left_out:
            _log.warning(
                "%d of %d labelled subjects are not in the store (no %s scan)",
                found.left_out,
                len(file.labels),
                self.spec.modality,
            )
        return found

    def truth(self, found: Matched[Any]) -> Truth:
        """Whose scans count, and nothing yet of what is said of them."""
        kept = tuple(record for record in self.records if record.subject in found.labels)
        return Truth(records=kept, labels={}, classes=(), folds=found.folds, left_out=found.left_out)


def _one_label(who: _Who, labels: Path) -> Truth:
    """One of several classes for each subject."""
    found = who.matched(read_labels(labels, "classify", site_key()))
    by_subject = {subject: str(label) for subject, label in found.labels.items()}
    return replace(who.truth(found), labels=by_subject, classes=tuple(sorted(set(by_subject.values()))))


def _each(who: _Who, labels: Path, wished: Sequence[str]) -> Truth:
    """Of each class whether it is there, whatever the others are; the wished ones, or all that have a column."""
    classes: list[str] = []

    def named(columns: Sequence[str]) -> dict[str, str]:
        for name in wished:
            if name not in columns:
                raise ConfigError(f"{labels.name} has no column '{name}'", hint=closest(name, list(columns)))
        classes.extend(wished or filter(None, columns))
        return {name: name for name in classes}

    file = read_findings(
        labels,
        site_key(),
        named,
        hint="leave unknown ones empty; head.classes='[\"NAME\"]' names the columns that are classes, and a column "
        "`label` gives each subject one of several",
    )
    found = who.matched(file)
    return replace(who.truth(found), findings=found.labels, classes=tuple(classes), both_ways=True)


def _asked(who: _Who, labels: Path, task: Any) -> Truth:
    """What the labels say of the classes of a prompt set: one of them for a subject, or yes and no to each."""
    prompts, wished = task.ask()
    if task.answers == "one":
        truth = _one_label(who, labels)
        by_subject = {subject: prompts.spelt(label) for subject, label in truth.labels.items()}
        occurring = tuple(name for name in prompts.classes if name in by_subject.values())
        classes = tuple(wished) if task.classes else occurring
        for label in occurring:
            if label not in classes:
                raise ConfigError(f"{labels.name}: '{label}' is not among the wished classes", hint="add it to them")
        return replace(truth, labels=by_subject, classes=classes)
    file = read_findings(
        labels,
        site_key(),
        lambda columns: _columns(labels, columns, prompts, task),
        present=task.present,
        hint="leave unknown ones empty, or set head.present='[\"WORD\"]'",
    )
    found = who.matched(file)
    occurring = {name for told in found.labels.values() for name in told}
    classes = tuple(name for name in wished if name in occurring)
    return replace(who.truth(found), findings=found.labels, classes=classes)


def _columns(path: Path, others: Sequence[str], prompts: Prompts, task: Any) -> dict[str, str]:
    """Column to class, for the wished classes."""
    if list(others) == ["label"]:
        if len(task.classes) != 1:
            raise ConfigError(
                f"{path.name} does not say which class its labels are about",
                hint="name it: head.classes='[\"pleural_effusion\"]', or name the column after it instead of 'label'",
            )
        return {"label": prompts.spelt(task.classes[0])}
    try:
        named = {column: prompts.spelt(column) for column in others}
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error.problem}", hint=f"{error.hint} Or leave the column out") from error
    if len(set(named.values())) < len(named):
        raise ConfigError(f"{path.name}: two columns are about the same class", hint="keep one of them")
    wished = {prompts.spelt(name) for name in task.classes} or set(named.values())
    kept = {column: name for column, name in named.items() if name in wished}
    if not kept:
        raise ConfigError(f"{path.name} has no column for a wished class", hint=f"it has: {', '.join(named) or 'none'}")
    return kept


def _drawn(who: _Who, labels: Path) -> Truth:
    """Scans with label maps in which every wanted class was looked for; a warning counts the others."""
    wanted = _organs(labels)
    kept = _annotated(who.records, wanted, labels.name)
    partly = sum(record.has_labels for record in who.records) - len(kept)
    if partly:
        _log.warning(
            "%d of %d labelled scans are left out: not every class of %s was looked for in them",
            partly,
            partly + len(kept),
            labels.name,
        )
    return Truth(records=kept, labels={}, classes=wanted, left_out=partly)


def _organs(path: Path) -> tuple[str, ...]:
    """The names in the `classes` of a labels.json, in its order."""
    try:
        classes = json.loads(path.read_text(encoding="utf-8")).get("classes", {})
        names = tuple(dict.fromkeys(str(name) for name in classes.values()))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no label file '{path.name}'", hint="check the path after --labels") from error
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path.name} is not a label file for voxel labels",
            hint='it is JSON such as {"classes": {"1": "liver"}}',
        ) from error
    if any(map(is_formula, names)):
        raise ConfigError(
            f"{path.name}: the name of a class begins like a formula, which spreadsheets would run",
            hint="write it in words",
        )
    return names


def _annotated(records: Sequence[Record], wanted: tuple[str, ...], source: str) -> tuple[Record, ...]:
    """The scans in which every wanted organ was looked for: where one was not, silence does not mean absence."""
    labelled = [record for record in records if record.has_labels]
    known = {name for record in labelled for name in record.classes.values()}
    for name in wanted:
        if name not in known:
            raise ConfigError(
                f"{source} asks for '{name}', which no scan in the store has",
                hint=closest(name, sorted(known)) if known else "ingest masks with --labels",
            )
    whole = tuple(record for record in labelled if set(wanted) <= set(record.classes.values()))
    if not whole and labelled:
        lacking = {name: sum(name not in record.classes.values() for record in labelled) for name in wanted}
        why = ", ".join(f"'{name}' in {count}" for name, count in lacking.items() if count)
        raise ConfigError(
            f"{source} asks for {len(wanted)} classes, and all {len(labelled)} labelled scans are left out, because "
            f"not every class was looked for in them: {why}",
            hint=f"name in {source} only classes that were looked for in the same scans",
        )
    return whole
