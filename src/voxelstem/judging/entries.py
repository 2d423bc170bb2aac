"""Who takes part in an evaluation: a run read back, its contest, and how what it must beat is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxelstem.adapted import Adapted, read_run
from voxelstem.errors import AuditError, ConfigError
from voxelstem.features import FeaturesOf, embedder, open_space, projector, speaker
from voxelstem.judging.contest import Beside, Contest, plain_baselines, tuned_baselines, zeroshot_baselines
from voxelstem.model import Model
from voxelstem.store import Record, Store
from voxelstem.store.leakage import common
from voxelstem.truth import Truth, is_aligned, of_contrast, read_truth, told_each
from voxelstem.weights.hub import load


def check_leakage(store: Store, labelled: Sequence[Record], tested: Sequence[Record]) -> None:
    """See that nobody who was learned from is tested on, neither as a subject nor as a copy of a scan.

    This covers the store's own splits: weights that were pretrained on another store cannot be checked here, and near
    copies under another subject are what `voxelstem show STORE --against STORE` looks for.

    Raises:
        AuditError: somebody is.
    """
    trained = [record for record in store if record.split == "train"]
    for what, count in common([*labelled, *trained], tested).items():
        if count:
            raise AuditError(
                f"{count} of the test {what} were also trained on: the scores would not be honest",
                hint="make a new store with `voxelstem ingest`: it splits by subject",
            )


def check_labels(adapted: Adapted, truth: Truth, labelled: Sequence[Record]) -> None:
    """See that these labels say of those whom a run learned from what the run was told of them.

    Otherwise baselines would be fitted to another question than the run. What a run was not told cannot be compared:
    see `labels_line`.

    Raises:
        ConfigError: they say something else of somebody.
    """
    then = adapted.card.labels.told
    if not then:
        return
    now = told_each(truth, labelled, adapted.head.classes)
    if then == now:
        return
    other = sum(one != another for one, another in zip(then, now, strict=True)) if len(then) == len(now) else len(now)
    if adapted.task.voxels:
        raise ConfigError(
            f"these labels ask for other structures than '{adapted.name}' learned",
            hint="give the labels.json that `adapt` was given",
        )
    raise ConfigError(
        f"these labels say something else of {other} of the {len(now)} subjects that '{adapted.name}' learned from",
        hint="give the label file that `adapt` was given, or adapt again with this one: what is compared with a run "
        "must learn from the same labels",
    )


def labels_line(adapted: Adapted) -> str:
    """What is known of a run whose labels passed `check_labels`; empty where it learned from nobody."""
    if not adapted.labelled:
        return ""
    if told := adapted.card.labels.told:
        return f"{adapted.name}: these labels say the same of all {len(told)} subjects as those that it learned from"
    return (
        f"{adapted.name}: whether these labels are those that it learned from: NOT MEASURED, the run was made before "
        "that was kept"
    )


def read_runs(folders: Sequence[Path]) -> list[Adapted]:
    """Read runs, each under the name of its folder; where two are alike, under as much of the path as parts them.

    Raises:
        ConfigError: a run that is none, or one twice.
        CheckpointError: a file in one is damaged.
    """
    paths = [folder.resolve().parts for folder in folders]
    if len(set(paths)) < len(paths):
        raise ConfigError("one run was named twice: its lines could not be told apart", hint="name it once")
    longest = max(map(len, paths), default=1)
    tails = [{path[-length:] for path in paths} for length in range(1, longest + 1)]
    length = next(count for count, tail in enumerate(tails, start=1) if len(tail) == len(paths))
    found = zip((read_run(folder) for folder in folders), paths, strict=True)
    return [dataclasses.replace(adapted, name="/".join(path[-length:])) for adapted, path in found]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A run that takes part."""

    contest: Contest
    features: FeaturesOf
    baselines: Callable[[], Beside]
    mark: str
    """Entries with the same mark share their baselines."""
    model: Model


def enter(adapted: Adapted, store: Store, labels: Path, folder: Path, *, commercial: bool) -> Entry:
    """Load a run's weights and put its contest together; embeddings rest in `folder`."""
    unknown = adapted.config.unknown
    if is_aligned(adapted.task):
        space = open_space(adapted.weights, adapted.config, commercial=commercial)
        contest = contest_of(adapted, store, read_truth(store, labels, adapted.task, space.model.spec, unknown=unknown))
        return Entry(
            contest=contest,
            features=projector(space, store, folder),
            baselines=lambda: Beside(repeats=zeroshot_baselines(contest, adapted.head, space, folder)),
            # Untrained networks are heard through the heads that were trained: other weights, other baselines.
            # A file of prompts may have been changed between two runs.
            mark=_mark(adapted, space.model) + space.sha256 + str(adapted.head.facts["prompts_sha256"]),
            model=space.model,
        )
    model = load(adapted.weights, commercial=commercial or adapted.config.commercial)
    truth = read_truth(store, labels, adapted.task, model.spec, unknown=unknown)
    if adapted.config.full is not None:
        contest = contest_of(adapted, store, of_contrast(truth, adapted.config.full.contrasts))
        return Entry(
            contest=contest,
            features=speaker(adapted, model, store),
            baselines=lambda: tuned_baselines(contest, model, adapted.config),
            mark=_mark(adapted, model),
            model=model,
        )
    contest = contest_of(adapted, store, truth)
    return Entry(
        contest=contest,
        features=embedder(model, store, folder, tokens=adapted.tokens, see=adapted.config.see),
        baselines=lambda: plain_baselines(contest, model, adapted.config.see, folder),
        mark=_mark(adapted, model),
        model=model,
    )


def contest_of(adapted: Adapted, store: Store, truth: Truth) -> Contest:
    """The run's own labelled scans against all labelled test scans, after the check for leakage."""
    by_key = {record.key: record for record in truth.records}
    missing = [key for key in adapted.labelled if key not in by_key]
    if missing:
        raise ConfigError(
            f"{len(missing)} of the scans that '{adapted.name}' learned from are not in this store, or not labelled",
            hint="evaluate with the store and the labels that `adapt` was given",
        )
    classes = adapted.head.classes
    tested = [
        record for record in truth.of("test") if _can_be_scored(record, truth, classes, voxels=adapted.task.voxels)
    ]
    if not tested:
        raise AuditError("no held-out test subject has labels", hint="ingest and label more subjects")
    strange = sorted({truth.labels[record.subject] for record in tested} - set(classes)) if truth.labels else []
    if strange:
        raise ConfigError(f"test label '{strange[0]}' is none that '{adapted.name}' knows: {', '.join(classes)}")
    labelled = tuple(by_key[key] for key in adapted.labelled)
    check_labels(adapted, truth, labelled)
    check_leakage(store, labelled, tested)
    return Contest(
        store=store,
        truth=truth,
        task=adapted.task,
        mode=adapted.config.mode,
        classes=classes,
        labelled=labelled,
        tested=tuple(tested),
        seed=adapted.config.seed,
    )


def _can_be_scored(record: Record, truth: Truth, classes: tuple[str, ...], *, voxels: bool) -> bool:
    if voxels:
        return set(classes) <= set(record.classes.values())
    return not truth.findings or bool(set(classes) & set(truth.findings[record.subject]))


def _mark(adapted: Adapted, model: Model) -> str:
    """Runs with the same mark share their baselines: same labels, head settings and architecture."""
    config = dataclasses.replace(adapted.config, like=None, features=None, commercial=False)
    return repr((config, adapted.labelled, adapted.head.classes, sorted(model.card.architecture.items()), model.spec))
