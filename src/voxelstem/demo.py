"""The whole journey in minutes: scans -> store -> pretrained model -> adapted heads -> a page that tells how good.

Phantoms make it possible anywhere; real scans join where they can be had. Everything goes through the same verbs
that the commands call.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np

from voxelstem import adapt, evaluate, pretrain, samples
from voxelstem.adapted import read_run
from voxelstem.embed import embed_volume_cached
from voxelstem.engine.journal import read_journal
from voxelstem.errors import ConfigError, StoreError, VoxelstemError
from voxelstem.features import embedder
from voxelstem.ingest import IngestReport, ingest
from voxelstem.intake import IntakeConfig
from voxelstem.judging.rival import caveats
from voxelstem.manifest import write_whole
from voxelstem.metrics import Score
from voxelstem.model import Model, load
from voxelstem.progress import Advance, progress
from voxelstem.recipes import named
from voxelstem.report import figures, page
from voxelstem.sources.phantom import PhantomConfig, PhantomFiles, phantom_files
from voxelstem.store import Fractions, Record, Store
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.tasks.segment import Segment, compare
from voxelstem.truth import Truth

ORGANS = ("lung_left", "lung_right", "liver", "spleen", "kidney_left", "kidney_right", "spine", "heart")
ONLY_CT = IntakeConfig(modality="CT")
MANY_ORGANS = ("ts_abdomen", "ts_upper_abdomen")
"""The two real scans with many labelled organs."""
PUBLIC_KEY = hashlib.sha256(b"voxelstem demo 205").digest()
"""A key that anyone may know: nobody in the demo is private. Under this one `MANY_ORGANS` are test subjects, so no
model of the demo was ever trained on them, and the other real scans are training subjects."""
SCRATCH_SEEDS = 3
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much the demo does."""

    phantoms: int
    steps: int
    unet_steps: int
    """Of the U-Net from scratch beside segmentations, 0 for none: in a few steps it learns nothing to compare with."""
    few: int
    """Labelled subjects of the second segmentation run; the first has one."""
    labelled: int
    """Labelled subjects of the scan-level runs."""


FULL = Size(phantoms=72, steps=500, unet_steps=100, few=5, labelled=16)
QUICK = Size(phantoms=16, steps=20, unet_steps=0, few=2, labelled=6)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One run of `adapt`."""

    labels: Path
    task: str
    mode: str
    budget: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """The two stores and what was said while they were filled."""

    store: Path
    real: Path | None
    files: PhantomFiles
    reports: tuple[IngestReport, ...]
    remarks: tuple[str, ...]


def run(out: Path, *, quick: bool = False, data: Path | None = None) -> Path:
    """Make everything below `out` and return the path of the page. Started again, it goes on where it stopped.

    Args:
        out: The demo's folder.
        quick: Take two minutes instead of ten: fewer phantoms, fewer steps.
        data: A folder that `voxelstem samples` made, or a copy of one; it is read and never written to.

    Raises:
        VoxelstemError: a step failed; its message says which and what to do.
    """
    return journey(out, QUICK if quick else FULL, data)


def journey(out: Path, size: Size, data: Path | None) -> Path:
    """Do what `run` says, as much of it as `size` says."""
    began = time.monotonic()
    target = out / "report" / "index.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        _claim(out, size)
        with public_key(out):
            gathered = gather(out, size, data)
            weights = out / "run" / "weights"
            if not weights.exists():
                pretrain.run(replace(named("tiny"), steps=size.steps), store=gathered.store, out=out / "run")
            runs, evaluation = judge(out, size, gathered, weights)
            real = [] if gathered.real is None else judge_real(gathered.real, load(weights), out / "features")
            minutes = (time.monotonic() - began) / 60
            sections = tell(out, gathered, runs, (evaluation, real), minutes=minutes)
            lead = "From scans to a small pretrained model, few-label heads and honest figures. Not a medical device."
            target.parent.mkdir(exist_ok=True)
            write_whole(target, page.page("Voxelstem demo", sections, lead=lead).encode())
    except OSError as error:
        raise StoreError(
            f"the demo cannot write into '{out.name}': {error.strerror}",
            hint="free about 1 GB or choose another --out, then start it again: it goes on where it stopped",
        ) from error
    return target


def _claim(out: Path, size: Size) -> None:
    """A demo goes on only where one of the same size began: heads of a quick one would pass for those of a full one."""
    mark, now = out / "demo.json", json.dumps({"voxelstem": version("voxelstem"), **asdict(size)})
    if mark.exists() and mark.read_text(encoding="utf-8") != now:
        raise ConfigError(
            f"'{out.name}' holds a demo of another size or version", hint="remove that folder, or choose another --out"
        )
    write_whole(mark, now.encode())


@contextmanager
def public_key(out: Path) -> Generator[None]:
    """Hash subjects with a key that anyone may know: nobody in the demo is private, and so the splits repeat."""
    path, before = out / "public.key", os.environ.get("VOXELSTEM_KEY")
    write_whole(path, PUBLIC_KEY.hex().encode())
    os.environ["VOXELSTEM_KEY"] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["VOXELSTEM_KEY"]
        else:
            os.environ["VOXELSTEM_KEY"] = before


def gather(out: Path, size: Size, data: Path | None) -> Gathered:
    """Draw the phantoms, fetch the real scans, and ingest both; the two many-organ scans get a store of their own."""
    with progress("draw phantoms", size.phantoms) as advance:
        configs = (PhantomConfig(seed=seed) for seed in range(size.phantoms))
        files = phantom_files(out / "phantoms", _counted(configs, advance))
    store, remarks = out / "store", []
    reports = [ingest([files.scans], store, labels=files.labels, reports=files.reports, config=ONLY_CT)]
    try:
        found = samples.fetch(out / "samples") if data is None else samples.there(data)
    except VoxelstemError as error:
        if data is not None:
            raise
        remarks.append(f"No real scans in this run, phantoms only: {error.problem}")
        return Gathered(store=store, real=None, files=files, reports=tuple(reports), remarks=tuple(remarks))
    # The MR goes along on purpose: a store for CT refuses it, and the ledger says so. Here the real scans have no
    # labels, so that the table over phantom subjects stays one of phantoms.
    reports.append(ingest([found.scans, found.mr], store, config=ONLY_CT))
    real = out / "real"
    if not real.exists():
        Store.create(real, fractions=Fractions(train=0.0, validation=0.0, test=1.0))
    reports.append(ingest([found.scans], real, labels=found.labels, config=ONLY_CT))
    return Gathered(store=store, real=real, files=files, reports=tuple(reports), remarks=tuple(remarks))


def judge(out: Path, size: Size, gathered: Gathered, weights: Path) -> tuple[dict[str, Path], evaluate.Evaluation]:
    """Adapt with few labels, then score on the held-out phantoms beside the baselines."""
    organs, spleen, cache = out / "organs.json", gathered.files.tables["spleen"], out / "features"
    write_whole(organs, json.dumps({"classes": dict(enumerate(ORGANS, start=1))}).encode())
    wanted = {
        "segment_1": Wanted(labels=organs, task="segment", mode="probe", budget=1),
        f"segment_{size.few}": Wanted(labels=organs, task="segment", mode="probe", budget=size.few),
        "spleen_probe": Wanted(labels=spleen, task="classify", mode="probe", budget=size.labelled),
        "spleen_knn": Wanted(labels=spleen, task="classify", mode="knn", budget=size.labelled),
    }
    runs = {name: out / "adapted" / name / "pretrained" for name in wanted}
    for name, one in wanted.items():
        if not (runs[name] / "adapt.json").exists():
            adapt.run(
                weights=weights,
                store=gathered.store,
                labels=one.labels,
                task=one.task,
                mode=one.mode,
                out=runs[name],
                budget=one.budget,
                settings={"features": str(cache)},
            )
    # The U-Net from scratch, which costs as much as all the rest, stands beside the run of more labels alone.
    steps = {"segment_1": 0, f"segment_{size.few}": size.unet_steps}
    judged = [
        evaluate.run(
            [runs[name]],
            store=gathered.store,
            labels=organs,
            out=out / "scores" / name,
            config=evaluate.EvaluateConfig(nested="never", unet_steps=count, features=str(cache)),
        )
        for name, count in steps.items()
    ]
    scan = [runs[name] for name in wanted if name.startswith("spleen")]
    how = evaluate.EvaluateConfig(nested="never", unet_steps=0, features=str(cache))
    judged.append(evaluate.run(scan, store=gathered.store, labels=spleen, out=out / "scores" / "spleen", config=how))
    # Runs of one model are one line over budgets here, whatever parts their folders.
    scores = (replace(score, name=score.name.rpartition("/")[2]) for one in judged for score in one.scores)
    return runs, replace(judged[0], scores=tuple(scores))


def judge_real(real: Path, model: Model, cache: Path) -> list[Score]:
    """Fit to one of the two many-organ CTs and test on the other, both ways: per-scan figures, no interval."""
    store = Store.open(real)
    records = tuple(record for record in store if set(ORGANS) <= set(record.classes.values()))
    truth = Truth(records=records, labels={}, classes=ORGANS)
    models = {"pretrained": [model], "scratch": [model.scratch(seed=seed) for seed in range(SCRATCH_SEEDS)]}
    makers = {name: [embedder(one, store, cache, tokens=True) for one in several] for name, several in models.items()}
    makers["intensity"] = [evaluate.intensity_features(store, model.spec, model.backbone.patch_ijk)]
    contests = [
        evaluate.Contest(
            store=store,
            truth=truth,
            task=Segment(),
            mode="probe",
            classes=ORGANS,
            labelled=tuple(other for other in records if other.subject != tested.subject),
            tested=(tested,),
            seed=0,
        )
        for tested in records
    ]
    repeats: dict[str, evaluate.Repeats] = {}
    with progress("real CTs", (1 + sum(map(len, makers.values()))) * len(contests)) as advance:
        for name, several in makers.items():
            # Each list is made before the next contest comes: generators would all see the last one.
            outcomes = [list(_counted((c.fit_and_score(features) for features in several), advance)) for c in contests]
            repeats[name] = _by_subject(outcomes)
        repeats["atlas"] = _by_subject([list(_counted([c.atlas(model.spec)], advance)) for c in contests])
    return evaluate.table_of(contests[0], repeats, task="segment, real CT", budget=1)


def _counted(items: Iterable[Item], advance: Advance) -> Iterator[Item]:
    for item in items:
        yield item
        advance()


def _by_subject(outcomes: Sequence[Sequence[evaluate.Outcomes]]) -> evaluate.Repeats:
    """Join contests with one tested subject each: subject to its outcomes over the repeats."""
    return {subject: tuple(one[subject] for one in repeats) for repeats in outcomes for subject in repeats[0]}


def tell(
    out: Path,
    gathered: Gathered,
    runs: Mapping[str, Path],
    judged: tuple[evaluate.Evaluation, list[Score]],
    *,
    minutes: float,
) -> list[page.Section]:
    """Everything worth seeing, in the order of the journey."""
    evaluation, real = judged
    store, model = Store.open(gathered.store), load(out / "run" / "weights")
    cache = out / "features"
    shown = _shown(store, gathered)
    curves = figures.training_curves(read_journal(out / "run"))
    sections = [
        _ingested(store, gathered),
        page.section("Pretraining", page.paragraph(_trained(out / "run")), page.picture(curves)),
        page.section("What the tokens see", *(_tokens(picked, record, model, cache) for picked, record in shown)),
        page.section("Nearest neighbours", page.picture(_neighbours(store, model, cache))),
        page.section("Segmentation on a held-out phantom", _segmented(store, runs, cache)),
        page.scores_section(evaluation.scores, "Pretrained, scratch, intensity: held-out phantoms"),
    ]
    if real:
        sections.append(page.scores_section(real, "The two real many-organ CTs (n=2, no interval)"))
    small = (
        "The model is tiny and saw few scans for minutes. It shows that the machinery works, not what a model of "
        "useful size can do."
    )
    remarks = (small, *caveats(score.name for score in evaluation.scores), *gathered.remarks)
    sections.append(page.limits_section(evaluation.test_subjects, phantoms=True, remarks=remarks))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sections.append(
        page.environment_section(
            {
                "voxelstem": version("voxelstem"),
                "torch": version("torch"),
                "Python": platform.python_version(),
                "Processor cores": os.cpu_count() or 0,
                "Seed": 0,
                "Minutes of this start": f"{minutes:.1f}",
                "Peak memory": f"{peak:.1f} GiB",
            }
        )
    )
    return sections


def _ingested(store: Store, gathered: Gathered) -> page.Section:
    refused = Counter(refusal.code for refusal in store.refusals())
    splits = {name: len(store.subjects(split=name)) for name in ("train", "validation", "test")}
    formats = Counter(record.provenance.source_format for record in store)
    remarks = (
        f"Sources: {', '.join(f'{count} {name}' for name, count in sorted(formats.items()))}.",
        f"{sum(record.has_labels for record in store)} of them are phantoms, written as NIfTI files.",
        "Phantoms are drawn by a program and real scans come from two public packages; nobody here is a patient of "
        "yours.",
        *gathered.remarks,
    )
    subjects = len(store.subjects())
    return page.ingest_section(kept=len(store), subjects=subjects, splits=splits, refused=refused, remarks=remarks)


def _trained(run: Path) -> str:
    records = read_journal(run)
    steps = int(records[-1]["step"])
    # A resumed run counts its seconds anew: add up what each start spent.
    clock = [record["seconds"] for record in records if "seconds" in record]
    spent = sum(now for now, then in zip(clock, [*clock[1:], 0.0], strict=True) if then < now)
    return f"{steps} steps of the recipe tiny in {spent / 60:.1f} minutes on this machine, without any label."


def _shown(store: Store, gathered: Gathered) -> list[tuple[Store, Record]]:
    """A held-out scan for the pictures: the first test phantom, and a real CT where there is one."""
    labelled = [record for record in store if record.split == "test" and record.has_labels]
    shown = [(store, labelled[0])]
    if gathered.real is not None:
        real = Store.open(gathered.real)
        subject = pseudonym(MANY_ORGANS[0], site_key())
        shown.insert(0, (real, next(record for record in real if record.subject == subject)))
    return shown


def _tokens(store: Store, record: Record, model: Model, cache: Path) -> str:
    networks = {"pretrained": model, "scratch (untrained)": model.scratch(seed=0)}
    named_ = {name: embedder(network, store, cache, tokens=True)(record.key) for name, network in networks.items()}
    drawn = figures.token_pca(store.volume(record.key), named_, low=-160.0, high=240.0)
    return page.picture(drawn)


def _neighbours(store: Store, model: Model, cache: Path) -> figures.Picture:
    """Held-out scans only, phantoms and real ones together."""
    records = [record for record in store if record.split == "test"][:16]
    embedded = np.stack([embed_volume_cached(model, store, r.key, cache, tokens=True).scan for r in records])
    captions = ["phantom" if record.report else "real CT" for record in records]
    return figures.neighbours([store.volume(r.key) for r in records], embedded, captions, queries=(0, 1))


def _segmented(store: Store, runs: Mapping[str, Path], cache: Path) -> str:
    """Truth beside prediction of the run with most labels."""
    name = [name for name in runs if name.startswith("segment")][-1]
    adapted = read_run(runs[name])
    record = next(record for record in store if record.split == "test" and record.has_labels)
    features = embedder(load(adapted.weights), store, cache, tokens=True, see=adapted.config.see)(record.key)
    assert isinstance(adapted.task, Segment)  # it was chosen by its name
    predicted = adapted.task.predict(adapted.head, features, record.affine_ras, record.shape_ijk)
    truth = store.labels(record.key)
    assert truth is not None  # it was chosen for having labels
    dice = compare(predicted.array, truth, adapted.head.classes)
    picture = figures.segmentation(store.volume(record.key), truth, predicted, dice, low=-160.0, high=240.0)
    return page.picture(picture)
