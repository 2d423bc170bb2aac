"""Does pretraining save labels on real brains? The hippocampus crops, with 2, 5, 10 and 20 labelled subjects.

    python benchmarks/hippocampus.py [a.b=value …] --data DIR [--out DIR] [--seeds 0 1 2] [--budgets 2 5 10 20]

DIR holds `images` and `labels`: the hippocampus task of the Medical Segmentation Decathlon (T1 crops at 1 mm, anterior
and posterior part labelled). For each seed a small U-Net is pretrained on the unlabelled training images
(`brain_mri.tiny_ssl3d` without volumes and health: what is hidden is painted, and every voxel says where it lies
between two views). Then the whole network is fine-tuned on few labelled subjects, and so is the same network
untrained: same subjects, same patches, same steps, hence the same training time. Every test subject is scored by both,
Dice is averaged over seeds within a subject, intervals resample subjects and differences are paired. The nearest
atlas, carried over without any training, stands beside them.

Settings with a dot, such as `full.steps=300` or `pretrain.steps=800`, change how. What is done rests below --out:
started again, it goes on. Prints tables for LOG.md, writes hippocampus.json, and a page with the curve. --small only
shows that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

import voxelstem
from voxelstem import pretrain, recipes
from voxelstem.backbones.unet import UNetConfig
from voxelstem.config import overlay, parse_assignments
from voxelstem.demo import public_key
from voxelstem.engine.checkpoint import CheckpointConfig
from voxelstem.engine.monitor import HealthConfig
from voxelstem.evaluate import check_leakage, table_of
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.tune import Asked, Speaker, tune
from voxelstem.ingest import ingest_studies
from voxelstem.judging.contest import Contest, Outcomes, Repeats
from voxelstem.manifest import write_whole
from voxelstem.metrics import Score
from voxelstem.model import Model, load, make_model
from voxelstem.pretrain import PretrainConfig
from voxelstem.report import page
from voxelstem.report.figures import Picture, blank, to_png
from voxelstem.store import Store
from voxelstem.study import InputSpec, LabelMap, Study
from voxelstem.tasks.segment import Segment
from voxelstem.truth import Truth, draw

CLASSES = ("anterior", "posterior")
BLOCK = (32, 48, 32)
SPEC = InputSpec(modality="MR", spacing_mm=(1.0, 1.0, 1.0), block_ijk=BLOCK, normalisation="zscore")
FEATURES = (8, 16, 32, 64)
COLOURS = {"pretrained": "#0b6e6e", "scratch": "#c4572b", "atlas": "#777777"}
FULL = FinetuneConfig(steps=200, batch=2, lr=1e-2, schedule="warm_up", warm_up=0.1, sizes="drawn", layer_decay=0.75)
"""Muon leaves weights four times as large as they were drawn: without `sizes` one rate cannot suit both."""
VIEW = (24, 32, 24)
"""Two of them lie in a crop, apart from each other."""


def pretraining(seed: int, changes: dict[str, Any]) -> PretrainConfig:
    """The recipe, at the crops' own size."""
    start = recipes.named("brain_mri.tiny_ssl3d")
    depths, strides = (1,) * len(FEATURES), (1, *(2,) * (len(FEATURES) - 1))
    config = replace(
        start,
        seed=seed,
        steps=800,
        spec=SPEC,
        backbone=UNetConfig(features=FEATURES, depths=depths, strides=strides, block_ijk=BLOCK),
        objective=replace(
            start.objective, anatomy_weight=0.0, pathology_weight=0.0, mask_block=4, place_weight=1.0, place_mm=20.0
        ),
        views=replace(
            start.views, global_=replace(start.views.global_, size_ijk=VIEW, count=2), region_scale=1.6, pair=None
        ),
        health=HealthConfig(every=300, blocks=16),
        checkpoint=CheckpointConfig(every=300),
    )
    return overlay(config, changes)


def collect(data: Path, out: Path) -> Store:
    """The crops with their labels, in a store."""
    if not (out / "store").exists():
        ingest_studies(
            (read(path, data / "labels" / path.name) for path in sorted((data / "images").iterdir())), out / "store"
        )
    return Store.open(out / "store")


def read(image: Path, mask: Path) -> Study:
    study = voxelstem.read(image)
    labels = nib.as_closest_canonical(nib.load(mask))
    array = np.asarray(labels.dataobj).astype(np.int16)
    (volume,) = study.volumes
    named = LabelMap(array=array, classes=dict(enumerate(CLASSES, start=1)))
    return replace(study, volumes=(replace(volume, modality="MR", labels=named),))


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one fine-tuned network scored on every test subject, and how long it learned."""

    outcomes: Outcomes
    seconds: float


def train(out: Path, store: Store, config: PretrainConfig) -> Model:
    run = out / "runs" / f"seed{config.seed}-{mark(config)}"
    if not (run / "weights").exists():
        began = time.monotonic()
        pretrain.run(config, store=store.path, out=run)
        write_whole(run / "minutes.json", json.dumps((time.monotonic() - began) / 60).encode())
    return load(run / "weights")


def answer(out: Path, contest: Contest, model: Model, full: FinetuneConfig, seed: int) -> Answer:
    """Fine-tune and score, or take what was scored before."""
    keys = sorted(record.key for record in (*contest.labelled, *contest.tested))
    path = out / "answers" / f"{mark(model.card.sha256, full, seed, len(contest.labelled), keys)}.json"
    if not path.exists():
        asked = Asked.of("segment", contest.task, contest.truth, contest.classes)
        began = time.monotonic()
        head, card, tensors = tune(model, contest.store, contest.labelled, asked, full, seed=seed)
        seconds = time.monotonic() - began
        tuned = make_model(card, seed=seed)
        tuned.backbone.load_state_dict(tensors)
        speaker = Speaker(replace(tuned, card=card), head, contest.store, asked, full)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"outcomes": contest.score(head, speaker), "seconds": seconds}
        write_whole(path, json.dumps(found).encode())
    return Answer(**json.loads(path.read_text()))


def mark(*what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def contest_of(store: Store, truth: Truth, budget: int, seed: int, most: int | None) -> Contest:
    labelled, tested = draw(truth, budget, seed, voxels=True), truth.of("test")[:most]
    check_leakage(store, labelled, tested)
    return Contest(
        store=store,
        truth=truth,
        task=Segment(),
        mode="full",
        classes=CLASSES,
        labelled=labelled,
        tested=tested,
        seed=seed,
    )


def measure(asked: argparse.Namespace, store: Store) -> tuple[list[Score], dict[str, Any]]:
    """All scores, and what stands beside them: seconds, figures by seed."""
    changes = parse_assignments(asked.settings)
    parts = {
        part: {name.partition(".")[2]: value for name, value in changes.items() if name.startswith(f"{part}.")}
        for part in ("full", "pretrain")
    }
    full = overlay(FULL, parts["full"])
    truth = Truth(records=tuple(store), labels={}, classes=CLASSES)
    models: dict[int, dict[str, Model]] = {}
    for seed in asked.seeds:
        trained = train(asked.out, store, pretraining(seed, parts["pretrain"]))
        models[seed] = {"pretrained": trained, "scratch": trained.scratch(seed=seed)}
    scores: list[Score] = []
    beside: dict[str, Any] = {}
    for budget in asked.budgets:
        repeats: dict[str, list[Outcomes]] = {"pretrained": [], "scratch": [], "atlas": []}
        for seed in asked.seeds:
            contest = contest_of(store, truth, budget, seed, asked.most)
            repeats["atlas"].append(contest.atlas(SPEC))
            for name, model in models[seed].items():
                given = answer(asked.out, contest, model, full, seed)
                repeats[name].append(given.outcomes)
                beside.setdefault(str(budget), {}).setdefault(name, []).append(
                    {"seed": seed, "seconds": given.seconds, "dice": mean_of(given.outcomes)}
                )
                print(
                    f"{budget} labelled, seed {seed}, {name}: {mean_of(given.outcomes):.3f} in {given.seconds:.0f} s",
                    flush=True,
                )
        joined: dict[str, Repeats] = {
            name: {subject: tuple(one[subject] for one in several) for subject in several[0]}
            for name, several in repeats.items()
        }
        scores += table_of(contest, joined, task="segment", budget=budget)
    return scores, beside


def mean_of(outcomes: Outcomes) -> float:
    return float(Segment().statistic("dice")(list(outcomes.values())))


def tables(scores: Sequence[Score], beside: dict[str, Any]) -> str:
    """Markdown: a line for each number of labelled subjects."""
    lines = [
        "| labelled | pretrained | by seed | scratch | by seed | atlas | pretrained - scratch | seconds |",
        "|---:|---|---|---|---|---|---|---|",
    ]
    for budget in dict.fromkeys(score.budget for score in scores):
        one = {score.name: score for score in scores if (score.budget, score.metric) == (budget, "dice")}
        over = one["pretrained"].over_scratch
        assert over is not None
        sure = over.low is not None and (over.low > 0 or (over.high or 0) < 0)
        gain = f"{over.estimate:+.3f} [{over.low:+.3f}, {over.high:+.3f}]"
        runs = beside[str(budget)]
        by_seed = {name: " ".join(f"{run['dice']:.3f}" for run in runs[name]) for name in runs}
        seconds = " / ".join(f"{np.mean([run['seconds'] for run in runs[name]]):.0f}" for name in runs)
        cells = [
            str(budget),
            str(one["pretrained"].value),
            by_seed["pretrained"],
            str(one["scratch"].value),
            by_seed["scratch"],
            str(one["atlas"].value),
            f"**{gain}**" if sure else gain,
            seconds,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curve(scores: Sequence[Score]) -> Picture:
    """Dice over the number of labelled subjects."""
    figure = blank(6.0, 3.6)
    axes = figure.add_subplot(1, 1, 1)
    for name, colour in COLOURS.items():
        mine = [score for score in scores if score.name == name]
        budgets = [score.budget or 0 for score in mine]
        axes.plot(budgets, [score.value.estimate for score in mine], "o-", color=colour, label=name)
        low = [score.value.estimate if score.value.low is None else score.value.low for score in mine]
        high = [score.value.estimate if score.value.high is None else score.value.high for score in mine]
        axes.fill_between(budgets, low, high, color=colour, alpha=0.15, lw=0)
    axes.set_xscale("log")
    ticks = sorted({score.budget or 0 for score in scores})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("labelled subjects")
    axes.set_ylabel("Dice")
    axes.legend(frameon=False, fontsize=8)
    told = "; ".join(f"{score.name} with {score.budget} labelled: {score.value}" for score in scores)
    return Picture(
        png=to_png(figure),
        alt=f"Dice by labelled subjects. {told}",
        caption="Bands are 95 % intervals over test subjects; differences are paired in the table.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="such as full.steps=300 or pretrain.optim.lr=0.001")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("VOXELSTEM_DATA", "data")) / "hippocampus")
    parser.add_argument("--out", type=Path, default=Path("hippocampus"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=int, nargs="+", default=[2, 5, 10, 20])
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    asked.most = None
    if asked.small:
        asked.settings = ["full.steps=3", "pretrain.steps=2", *asked.settings]
        asked.seeds, asked.budgets, asked.most = [0], [2], 3
    asked.out.mkdir(parents=True, exist_ok=True)
    with public_key(asked.out):
        scores, beside = measure(asked, collect(asked.data, asked.out))
    print(tables(scores, beside))
    drawn = curve(scores)
    write_whole(asked.out / "hippocampus.png", drawn.png)
    found = {
        "scores": [dataclasses.asdict(score) for score in scores],
        "runs": beside,
        "threads": torch.get_num_threads(),
    }
    write_whole(asked.out / "hippocampus.json", json.dumps(found, indent=2).encode())
    sections = [
        page.section("Label efficiency", page.picture(drawn)),
        page.scores_section(scores),
        page.limits_section(max(score.value.subjects for score in scores)),
    ]
    write_whole(asked.out / "index.html", page.page("Hippocampus: few labels", sections).encode())
    print(asked.out / "index.html")


if __name__ == "__main__":
    main()
