"""What a run of `adapt` says of itself: one card, as facts in adapt.json and as README.md, and a seal on its files.

The seal is SHA256SUMS, in the form that `sha256sum -c` reads: a head that was swapped, or a file that was damaged on
its way, is named before anything is said of a scan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voxelstem.card import NOT_STATED, README, against_commerce, digest, trained_where, yaml_word
from voxelstem.certainty.assurance import LEVEL, Assurance
from voxelstem.errors import CheckpointError
from voxelstem.store import Record
from voxelstem.truth import Truth, told_each
from voxelstem.whole import write_whole

SEAL = "SHA256SUMS"
CACHE = "features"
"""Folder inside a run that is no part of it: features of scans, which can be made again."""
_NAME = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*", re.ASCII)
_LINE = re.compile(rf"([0-9a-f]{{64}})  ({_NAME.pattern})", re.ASCII)
_PIPELINES = {"classify": "image-classification", "segment": "image-segmentation", "detect": "object-detection"}
"""The Hub's words for what a model does, where it has one."""
_MADE = f"made to hold the truth for {LEVEL:.0%} of new subjects"
_PARTS = {
    "calibrator": "probabilities of classes",
    "between": "intervals of probabilities (Venn-Abers)",
    "sets": f"sets of classes, {_MADE}",
    "intervals": f"intervals of numbers, {_MADE}",
    "yesno": "probabilities of yes and no",
    "volumes": f"intervals of volumes, {_MADE}",
    "group_sets": "the same sets, group by group",
    "group_intervals": "the same intervals, group by group",
    "known": "how near its nearest labelled scans are",
    "inside": "how near its nearest labelled scans are, by vectors from inside the trained network",
    "centres": "how near the means of the classes are",
}
_OF_SCANS = ("known", "centres", "inside")
"""Parts that are fitted to scans alone, not to answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parent:
    """The weights that a run grew from."""

    name: str = NOT_STATED
    """A known name, or the architecture and recipe; never a place."""
    sha256: str = ""
    origin: str = ""
    untrained: bool = False
    """Whether they were drawn and never saw a scan."""
    licence: str = NOT_STATED
    repo: str = ""
    """On the Hub, where the weights came from there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFacts:
    """What a run learned from; counts alone, nobody by name."""

    kind: str = "none"
    """`classes`, `findings` (yes or no to each), `numbers`, `times`, `voxels`; `none` where prompts learn nothing."""
    sha256: str = ""
    """Of the label file; empty where there was none."""
    scans: int = 0
    subjects: int = 0
    classes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Subjects of each class; of findings those who have it, of voxels those in whom it was looked for."""
    low: float | None = None
    high: float | None = None
    """Range of numbers or of times, in the label file's unit."""
    events: int | None = None
    """How many of the times end with an event; the others are censored."""
    left_out: int = 0
    """Labelled and not learned from, as the user allowed: subjects without a scan of this kind, or scans in which not
    every class was looked for."""
    told: tuple[str, ...] = ()
    """`truth.told_each` of those that were learned from: whoever has the site key can compare labels with these. Empty
    in runs that were made before this was kept."""

    @classmethod
    def of(cls, labels: Path | None, truth: Truth, records: Sequence[Record]) -> LabelFacts:
        """Count what `truth` knows of the scans that were learned from."""
        subjects = sorted({record.subject for record in records})
        file = "" if labels is None else digest(labels)
        told = told_each(truth, records, truth.classes)
        plain = cls(scans=len(records), subjects=len(subjects), sha256=file, left_out=truth.left_out, told=told)
        if truth.survival:
            fates = [truth.survival[subject] for subject in subjects]
            times = [one.time for one in fates]
            events = sum(one.event for one in fates)
            return dataclasses.replace(plain, kind="times", low=min(times), high=max(times), events=events)
        if truth.values:
            known = [truth.values[subject] for subject in subjects]
            return dataclasses.replace(plain, kind="numbers", low=min(known), high=max(known))
        if truth.findings:
            said = [truth.findings[subject] for subject in subjects]
            counts = {name: sum(one.get(name, False) for one in said) for name in truth.classes}
            return dataclasses.replace(plain, kind="findings", classes=counts)
        if truth.labels:
            named = [truth.labels[subject] for subject in subjects]
            counts = {name: named.count(name) for name in truth.classes}
            return dataclasses.replace(plain, kind="classes", classes=counts)
        marked = [(record.subject, set(record.classes.values())) for record in records if record.label_key]
        names = truth.classes or tuple(sorted({name for _, classes in marked for name in classes}))
        counts = {name: len({subject for subject, classes in marked if name in classes}) for name in names}
        return dataclasses.replace(plain, kind="voxels", classes=counts) if marked else plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Which scans a part of a store holds, told so that whoever has the same store can compare, and nobody else."""

    subjects: int = 0
    scans: int = 0
    sha256: str = ""
    """Of the sorted lines `key subject`, both as the store has them, each with a line end."""

    @classmethod
    def of(cls, records: Iterable[Record]) -> Split:
        """Describe these scans."""
        lines = sorted(f"{record.key} {record.subject}\n" for record in records)
        return cls(
            subjects=len({line.split()[1] for line in lines}),
            scans=len(lines),
            sha256=hashlib.sha256("".join(lines).encode()).hexdigest(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """How sure a run may be of what it says."""

    subjects: int = 0
    """Labelled subjects, each unseen by the head that answered, whom it was fitted to."""
    parts: tuple[str, ...] = ()
    """What could be fitted: the names of `Assurance`'s parts."""
    notes: tuple[str, ...] = ()
    """What could not, and why."""

    @classmethod
    def of(cls, assurance: Assurance) -> Calibration:
        """Describe what a run holds."""
        held = sorted({name.partition(".")[0] for name in assurance.arrays() if "." in name})
        return cls(subjects=assurance.subjects, parts=tuple(held), notes=assurance.notes)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCard:
    """What a run is, what it grew from, what it learned from, and what may be done with it."""

    task: str = ""
    mode: str = ""
    title: str = ""
    """What is asked."""
    chosen: bool = False
    """Whether mode `auto` chose the mode."""
    modality: str = ""
    fed: str = ""
    """How scans are fed, in words."""
    licence: str = NOT_STATED
    """The parent's, which the run inherits."""
    parent: Parent = field(default_factory=Parent)
    weights_sha256: str = ""
    """Of the weights inside the run: the parent's own, unless the mode changed the network."""
    labels: LabelFacts = field(default_factory=LabelFacts)
    splits: Mapping[str, Split] = field(default_factory=dict[str, Split])
    """`learned` is what the run learned from; the others are all scans of the modality in each split of the store."""
    calibration: Calibration = field(default_factory=Calibration)
    command: str = ""
    """Makes the run again, given the same store, labels and parent."""
    version: str = ""
    """Of voxelstem; empty in runs of versions that wrote no card."""
    torch: str = ""

    def facts(self) -> dict[str, Any]:
        """As it rests in adapt.json; `of` undoes it."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> RunCard:
        """Read what `facts` gave; what a newer version wrote beside is left out.

        Raises:
            ValueError: a part is of another kind.
        """
        parts: dict[str, Any] = {"parent": Parent, "labels": LabelFacts, "calibration": Calibration}
        try:
            found = {name: _filled(kind, facts.get(name, {})) for name, kind in parts.items()}
            splits = {str(name): _filled(Split, said) for name, said in facts.get("splits", {}).items()}
            return _filled(cls, dict(facts) | found | {"splits": splits})
        except (TypeError, AttributeError) as error:
            raise ValueError("the card of the run is of another kind") from error


def _filled(kind: Any, said: Mapping[str, Any]) -> Any:
    """A record of these entries, JSON's lists as tuples."""
    known = {entry.name for entry in dataclasses.fields(kind)}
    made = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items() if name in known}
    found, plain = kind(**made), kind()
    for name in made:
        value, usual = getattr(found, name), getattr(plain, name)
        optional = usual is None and (value is None or isinstance(value, int | float))
        if not optional and not isinstance(value, Mapping if isinstance(usual, Mapping) else type(usual)):
            raise TypeError(name)
    return found


def seal(folder: Path) -> None:
    """Write down the digest of every file of a finished run; its cache of features is no part of it.

    What a system or an editor leaves there is none either: files whose names begin with a dot stay, and those whose
    names a seal cannot spell go.

    Raises:
        CheckpointError: the weights hold a file whose name a seal cannot spell.
        OSError: a file cannot be read, or the disk does not take it.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    own = [name for name in names if name != SEAL and not name.startswith(f"{CACHE}/")]
    seen = [name for name in own if not any(part.startswith(".") for part in name.split("/"))]
    kept = [name for name in seen if _NAME.fullmatch(name)]
    for name in sorted(set(seen) - set(kept)):
        if name.startswith("weights/"):  # what weights are made of is not thrown away
            raise CheckpointError(
                f"the weights hold {name.removeprefix('weights/')!r}, and a run's files are named by letters, digits, "
                "'.', '-' and '_'",
                hint="rename it in the weights folder, and adapt again",
            )
        (folder / name).unlink()
    write_whole(folder / SEAL, "".join(f"{digest(folder / name)}  {name}\n" for name in kept).encode())


def sealed(folder: Path) -> dict[str, str]:
    """Name to SHA-256 of every file of a run.

    Raises:
        CheckpointError: there is no seal, or it is damaged.
    """
    try:
        lines = (folder / SEAL).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the run '{folder.name}' lacks {SEAL}, which tells its files from others",
            hint="copy the whole run folder again",
        ) from error
    found = [_LINE.fullmatch(line) for line in lines]
    if not found or not all(found):
        raise CheckpointError(f"{SEAL} of the run '{folder.name}' is damaged", hint="copy the whole run folder again")
    return {match[2]: match[1] for match in found if match is not None}


def check_seal(folder: Path, *, whole: bool) -> None:
    """Compare the files of a run with their digests; without `whole`, those alone that decide what is said of a scan.

    Then README.md may be edited, and the weights' tensors are left to `load`. Files that came later are no matter.

    Raises:
        CheckpointError: a file is absent or another one than `adapt` wrote; it is named.
    """
    for name, wanted in sealed(folder).items():
        if not whole and name.startswith("weights/") and name != "weights/config.json":
            continue  # that config.json holds their digests, and is checked here
        if not whole and name == README:
            continue
        if not (folder / name).is_file():
            raise CheckpointError(f"the run '{folder.name}' has no {name}", hint="copy the whole run folder again")
        if digest(folder / name) != wanted:
            raise CheckpointError(
                f"{name} of the run '{folder.name}' is damaged, or not the one that adapt wrote",
                hint="copy the whole run folder again, or adapt again",
            )


def page(card: RunCard) -> str:
    """README.md of a run, as the Hub shows it: the card's facts in words, and nothing else."""
    title = _line(card.title or card.task)
    return f"""{_head(card)}
# {title}

A run of `voxelstem adapt`: task `{card.task}`, mode `{card.mode}`{" (chosen by mode `auto`)" if card.chosen else ""}.
It answers about {_line(card.modality)} scans: {title}.

**Not a medical device.** Not validated for any diagnosis or treatment; every finding is preliminary until a physician
has read the images.

## Intended use
Research: saying `{title}` of scans like those that it learned from. Whoever uses it measures it on labelled scans of
their own site first (`voxelstem evaluate`).

Not for diagnosis, treatment or triage; not for other modalities, body regions or questions than those named here; not
for decisions about a person without a physician.

## Limits
{_bullets(_limits(card))}

## Licence and parent
- Licence: {_line(card.licence)}, inherited from the parent.{_forbidden(card)}
- Parent: {_line(card.parent.name)}, sha256 `{card.parent.sha256 or "none: drawn from the seed"}`
- Origin of the parent: {_origin(card.parent)}
- Weights in this run: sha256 `{card.weights_sha256}`

## Input
{_line(card.modality)}, {card.fed}.

## Labels
{_bullets(_told(card.labels))}

## Splits
A digest stands for the sorted lines `key subject` of the scans: the same store gives the same digests.

| part | subjects | scans | sha256 |
|---|---|---|---|
{_table(card.splits)}

## Calibration
{_bullets(_sure(card.calibration))}

## Make it again
With voxelstem {card.version} and torch {card.torch}; every setting as it was stands in `config.toml`.

```
{card.command}
```

`sha256sum -c {SEAL}` compares every file of this folder with what was written.
"""


def _head(card: RunCard) -> str:
    tags = ["voxelstem", "medical-imaging", card.modality.lower(), card.task, card.mode]
    tags += ["non-commercial"] if against_commerce(card.licence) and card.licence != NOT_STATED else []
    lines = ["---", "library_name: voxelstem", f"license: {yaml_word(card.licence)}"]
    lines += [f"base_model: {yaml_word(card.parent.repo)}"] if card.parent.repo else []
    lines += [f"pipeline_tag: {_PIPELINES[card.task]}"] if card.task in _PIPELINES else []
    return "\n".join([*lines, "tags:", *(f"- {yaml_word(tag)}" for tag in tags if tag), "---"])


def _origin(parent: Parent) -> str:
    return (not parent.untrained and _line(parent.origin)) or trained_where(trained=not parent.untrained)


def _forbidden(card: RunCard) -> str:
    why = against_commerce(card.licence)
    if not why:
        return ""
    unknown = "is not stated" in why
    return " Not for commercial use as long as it is not stated." if unknown else " Not for commercial use."


def _limits(card: RunCard) -> list[str]:
    shown = {} if card.labels.kind == "voxels" else card.labels.classes  # of voxels nobody counted who shows it
    rare = [name for name, count in shown.items() if count < 10]  # noqa: PLR2004 - as `assurance.FEWEST`
    many = f"{card.labels.subjects} labelled subject{'s' if card.labels.subjects != 1 else ''} of one store"
    lines = [f"It learned from {many}; how it does elsewhere is not known."]
    lines += [f"Fewer than 10 subjects show: {', '.join(_line(name) for name in rare)}."] if rare else []
    lines += [] if card.calibration.subjects else ["How sure it is of an answer is not calibrated."]
    return lines


def _told(labels: LabelFacts) -> list[str]:
    words = {"classes": "one class for each subject", "findings": "yes or no to each class", "numbers": "a number"}
    words |= {"times": "a time, with or without event", "voxels": "voxel masks", "none": "none: prompts alone"}
    lines = [f"Kind: {words.get(labels.kind, _line(labels.kind))}; {labels.scans} scans of {labels.subjects} subjects"]
    lines += [f"Label file: sha256 `{labels.sha256}`"] if labels.sha256 else []
    looked = "looked for in " if labels.kind == "voxels" else ""
    lines += [f"`{_line(name)}`: {looked}{count} subjects" for name, count in labels.classes.items()]
    lines += [f"{labels.left_out} more were labelled and left out"] if labels.left_out else []
    if labels.low is not None and labels.high is not None:
        lines.append(f"From {labels.low:g} to {labels.high:g}, in the label file's unit")
    return lines if labels.events is None else [*lines, f"{labels.events} with an event"]


def _table(splits: Mapping[str, Split]) -> str:
    return "\n".join(f"| {name} | {one.subjects} | {one.scans} | `{one.sha256}` |" for name, one in splits.items())


def _sure(calibration: Calibration) -> list[str]:
    fitted = [_PARTS.get(part, part) for part in calibration.parts if part not in _OF_SCANS]
    held = [_PARTS[part] for part in calibration.parts if part in _OF_SCANS]
    lines = [f"On {calibration.subjects} labelled subjects, unseen till asked: {'; '.join(fitted)}"] if fitted else []
    lines += [f"Whether a scan is unlike all labelled ones: {'; '.join(held)}"] if held else []
    return [*lines, *map(_line, calibration.notes)] or ["nothing is calibrated"]


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _line(text: str) -> str:
    """A text that somebody typed, on one line and without what Markdown would take for its own."""
    return re.sub(r"[`|<>\[\]]", " ", " ".join(text.split()))
