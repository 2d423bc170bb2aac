"""Truth: what experts said about the scans of a store, matched with a label file, and who of them is learned from."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from voxelstem.errors import AuditError, ConfigError
from voxelstem.prompts import Prompts
from voxelstem.protocols import Task
from voxelstem.store import Record, Store
from voxelstem.store.labels import Kind, Label, match, read_labels, read_table
from voxelstem.store.subjects import pseudonym, site_key
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

    def of(self, split: str) -> tuple[Record, ...]:
        """The labelled scans of one split."""
        return tuple(record for record in self.records if record.split == split)


def read_truth(store: Store, labels: Path, task: Task, spec: InputSpec) -> Truth:
    """Match the label file with the store's scans of the model's modality; a warning counts labels without a scan.

    Raises:
        ConfigError: the file is not what the task needs, nobody matches, or the modality is missing.
    """
    records = [record for record in store if record.modality == spec.modality]
    if not records:
        have = ", ".join(sorted({record.modality for record in store})) or "nothing"
        raise ConfigError(
            f"these weights were trained on {spec.modality}, the store holds {have}",
            hint=f"choose weights for {have}, or a store with {spec.modality} scans",
        )
    if task.voxels:
        wanted = _organs(labels)
        truth = Truth(records=_annotated(records, wanted, labels.name), labels={}, classes=wanted)
    elif is_aligned(task):
        return _asked(records, labels, task, spec)
    elif is_number(task):
        values = {subject: cast(float, value) for subject, value in _one_each(records, labels, "regress", spec).items()}
        records = [record for record in records if record.subject in values]
        truth = Truth(records=tuple(records), labels={}, classes=(), values=values)
    elif is_survival(task):
        told = {s: cast(Survival, label) for s, label in _one_each(records, labels, "survive", spec).items()}
        records = [record for record in records if record.subject in told]
        truth = Truth(records=tuple(records), labels={}, classes=(), survival=told)
    else:
        by_subject = _one_label(records, labels, spec)
        records = [record for record in records if record.subject in by_subject]
        truth = Truth(records=tuple(records), labels=by_subject, classes=tuple(sorted(set(by_subject.values()))))
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
        AuditError: the subjects are all of one class, or none of them has an event.
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
    if truth.findings:
        _check_kinds([truth.findings[subject] for subject in order], truth.classes, word)
    elif truth.survival:
        order = _spread_events(order, truth.survival, budget, word)
    elif truth.labels and not voxels:
        order = _take_turns(order, truth.labels)
        kinds = len({truth.labels[subject] for subject in order})
        if kinds < 2:  # noqa: PLR2004
            raise AuditError(
                f"all {len(order)} labelled {word} subjects have the same label: nothing to tell apart",
                hint="label subjects of another class too",
            )
        if budget is not None and budget < kinds:
            raise ConfigError(f"budget {budget} cannot show each of {kinds} classes once", hint=f"use --budget {kinds}")
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
    """
    if not voxels or truth.classes:
        return truth.classes
    shared = set.intersection(*(set(record.classes.values()) for record in records))
    if not shared:
        raise AuditError("the labelled scans have no structure in common", hint="name the classes in labels.json")
    return tuple(sorted(shared))


def _one_label(records: Sequence[Record], labels: Path, spec: InputSpec) -> dict[str, str]:
    """Subject to label, for those of the records' subjects that have one."""
    return {subject: str(label) for subject, label in _one_each(records, labels, "classify", spec).items()}


def _one_each(records: Sequence[Record], labels: Path, kind: Kind, spec: InputSpec) -> Mapping[str, Label]:
    read = match(read_labels(labels, kind, site_key()), {record.subject for record in records})
    _tell_missing(read.missing, read.missing + len(read.labels), spec)
    return read.labels


def _tell_missing(missing: int, total: int, spec: InputSpec) -> None:
    if missing:
        _log.warning("%d of %d labelled subjects are not in the store (no %s scan)", missing, total, spec.modality)


def _asked(records: Sequence[Record], labels: Path, task: Any, spec: InputSpec) -> Truth:
    """What the labels say of the classes of a prompt set: one of them for a subject, or yes and no to each."""
    prompts, wished = task.ask()
    if task.answers == "one":
        by_subject = {subject: prompts.spelt(label) for subject, label in _one_label(records, labels, spec).items()}
        occurring = tuple(name for name in prompts.classes if name in by_subject.values())
        classes = tuple(wished) if task.classes else occurring
        for label in occurring:
            if label not in classes:
                raise ConfigError(f"{labels.name}: '{label}' is not among the wished classes", hint="add it to them")
        kept = tuple(record for record in records if record.subject in by_subject)
        return Truth(records=kept, labels=by_subject, classes=classes)
    said = _read_findings(labels, prompts, task)
    known = {record.subject for record in records}
    found = {subject: told for subject, told in said.items() if subject in known}
    if not found:
        raise ConfigError(
            f"none of the {len(said)} labelled subjects is among the {len(known)} in the store",
            hint="the ids must be spelt as in the scans, and VOXELSTEM_KEY must name the key the store was made with",
        )
    _tell_missing(len(said) - len(found), len(said), spec)
    occurring = {name for told in found.values() for name in told}
    return Truth(
        records=tuple(record for record in records if record.subject in found),
        labels={},
        classes=tuple(name for name in wished if name in occurring),
        findings=found,
    )


_YES, _NO = ("1", "yes", "true", "present", "positive"), ("0", "no", "false", "absent", "negative")
_UNKNOWN = ("", "-1", "nan", "na", "unknown", "uncertain")


def _read_findings(path: Path, prompts: Prompts, task: Any) -> dict[str, dict[str, bool]]:
    """Columns `subject` and a class each, or `subject,label` where one class alone is asked for.

    Cells say 1 or 0 (yes or no); empty or -1 means that nobody knows, and is left out: Merlin's label files use -1 so.
    """
    key = site_key()
    found: dict[str, dict[str, bool]] = {}
    names: dict[str, str] = {}
    for row, cells in read_table(path, ("subject",)):
        if not names:
            names = _columns(path, tuple(cells), prompts, task)
        told = {name: _yes(cells[column], task.present, f"{path.name}: row {row}") for column, name in names.items()}
        told = {name: bool(value) for name, value in told.items() if value is not None}
        if told and found.setdefault(pseudonym(cells["subject"], key), told) != told:
            raise ConfigError(
                f"{path.name}: row {row} says otherwise of a subject that an earlier row has",
                hint="keep one row for each subject",
            )
    if not found:
        raise ConfigError(f"{path.name} says nothing of any class", hint="write 1 or 0 below the name of a class")
    return found


def _columns(path: Path, columns: tuple[str, ...], prompts: Prompts, task: Any) -> dict[str, str]:
    """Column to class, for the wished classes."""
    others = [name for name in columns if name != "subject"]
    if others == ["label"]:
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


def _yes(cell: str, present: tuple[str, ...], where: str) -> bool | None:
    said = cell.strip().lower().removesuffix(".0")
    if said in _UNKNOWN:
        return None
    if present:
        return said in [word.strip().lower().removesuffix(".0") for word in present]
    if said not in (*_YES, *_NO):
        raise ConfigError(
            f"{where}: '{cell[:20]}' is neither 1 nor 0",
            hint="leave unknown ones empty, or set head.present='[\"WORD\"]'",
        )
    return said in _YES


def _check_kinds(told: Sequence[Mapping[str, bool]], classes: Sequence[str], word: str) -> None:
    if not any(len({truth[name] for truth in told if name in truth}) > 1 for name in classes):
        raise AuditError(
            f"of every class all {len(told)} labelled {word} subjects say the same: nothing to tell apart",
            hint="label subjects of another kind too",
        )


def _organs(path: Path) -> tuple[str, ...]:
    """The names in the `classes` of a labels.json, in its order."""
    try:
        classes = json.loads(path.read_text(encoding="utf-8")).get("classes", {})
        return tuple(dict.fromkeys(str(name) for name in classes.values()))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no label file '{path.name}'", hint="check the path after --labels") from error
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path.name} is not a label file for voxel labels",
            hint='it is JSON such as {"classes": {"1": "liver"}}',
        ) from error


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


def _take_turns(order: Sequence[str], labels: Mapping[str, str]) -> list[str]:
    """Reorder subjects so that every class comes by in turn: the first n are as balanced as they can be."""
    queues = {name: [s for s in order if labels[s] == name] for name in sorted({labels[s] for s in order})}
    longest = max((len(queue) for queue in queues.values()), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues.values() if turn < len(queue)]


def _spread_events(order: Sequence[str], told: Mapping[str, Survival], budget: int | None, word: str) -> list[str]:
    """Reorder subjects so that the first n hold events and censored ones, in about the shares of all of them."""
    if min(len(order), budget or len(order)) < 2:  # noqa: PLR2004 - a risk is in comparison to another
        raise ConfigError(
            f"one labelled {word} subject cannot show who fares better",
            hint="use --budget 2 or more" if len(order) > 1 else "label more subjects",
        )
    # An event at time 0 comes before anybody could be compared: nobody learns from it.
    came = [subject for subject in order if told[subject].event and told[subject].time > 0]
    if not came:
        censored = sum(not told[subject].event for subject in order)
        raise AuditError(
            f"{censored} of {len(order)} labelled {word} subjects are censored, and none has an event after time 0: "
            "nothing to learn from",
            hint="label subjects with an event too, and count `time` from the scan on",
        )
    found = set(came)
    others = [subject for subject in order if subject not in found]
    places = {subject: at / len(queue) for queue in (came, others) for at, subject in enumerate(queue)}
    return sorted((*came, *others), key=places.__getitem__)
