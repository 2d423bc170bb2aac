"""What pretraining is worth when labels are few: the same network pretrained and untrained, on phantoms and real CTs.

    python benchmarks/few_labels.py [--out runs/few_labels] [--subjects 120] [--seeds 0 1 2] [--steps N] [--data DIR]

Every seed pretrains one model and draws one untrained one, which begin from the same weights. All see the same draws
of labelled subjects. Figures are averaged over seeds and draws within each held-out subject, and the interval of the
difference resamples subjects. What is done rests below --out: started again, it goes on. It prints tables for LOG.md
and writes every figure to few_labels.json. --small only shows that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from voxelstem import __version__, pretrain, recipes
from voxelstem.adapt import FeaturesOf, Truth, draw, embedder, examples_of
from voxelstem.config import overlay, parse_assignments
from voxelstem.demo import ORGANS, public_key
from voxelstem.evaluate import (
    Contest,
    Outcomes,
    Repeats,
    check_leakage,
    few_label_table,
    intensity_features,
    table_of,
)
from voxelstem.ingest import ingest, ingest_studies
from voxelstem.intake import IntakeConfig
from voxelstem.metrics import Score
from voxelstem.model import Embedding, Model, load
from voxelstem.protocols import Task
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Fractions, Store
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.tasks.classify import Classify
from voxelstem.tasks.segment import Segment

FRACTIONS = Fractions(train=0.6, validation=0.0, test=0.4)
SMALL = ["loader.batch=1", "monitor_every=2", "backbone.block.depth=1", "backbone.scan.depth=1"]
COLUMNS = ("pretrained", "scratch", "intensity", "atlas")
Makers = dict[str, list[Callable[[], FeaturesOf]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What was asked for, and the models once they are there."""

    out: Path
    seeds: tuple[int, ...]
    draws: int
    budgets: tuple[int, ...]
    """Labelled subjects for organs."""
    scan_budgets: tuple[int, ...]
    """Labelled subjects for facts about the whole scan."""
    facts: tuple[str, ...]
    coarse: bool
    pretrained: tuple[Model, ...] = ()

    def models(self) -> dict[str, list[Model]]:
        """One pretrained and one untrained model for each seed."""
        untrained = [model.scratch(seed=seed) for model, seed in zip(self.pretrained, self.seeds, strict=True)]
        return {"pretrained": list(self.pretrained), "scratch": untrained}

    def features(self, model: Model, store: Store) -> FeaturesOf:
        return embedder(model, store, self.out / "features", tokens=True)

    def bright(self, store: Store) -> FeaturesOf:
        """Plain intensity, on patches of the models' size."""
        model = self.pretrained[0]
        return intensity_features(store, model.spec, model.backbone.patch_ijk)

    def contestants(self, store: Store, *, tokens: bool) -> Makers:
        """Features of every contestant, as `few_label_table` takes them; whole-scan tasks keep no tokens in memory."""

        def maker(model: Model) -> Callable[[], FeaturesOf]:
            features = self.features(model, store)
            return lambda: features if tokens else lambda key: without_tokens(features(key))

        makers: Makers = {name: [maker(model) for model in models] for name, models in self.models().items()}
        return makers | {"intensity": [lambda: self.bright(store)]}


def without_tokens(features: object) -> Embedding:
    assert isinstance(features, Embedding)
    return dataclasses.replace(features, tokens=None, tokens_affine_ras=None)


@contextmanager
def clocked(out: Path, stage: str) -> Generator[None]:
    """Add the minutes of a stage to what earlier starts spent on it."""
    path, begin = out / "minutes.json", time.monotonic()
    try:
        yield
    finally:
        spent = json.loads(path.read_text()) if path.exists() else {}
        spent[stage] = spent.get(stage, 0.0) + (time.monotonic() - begin) / 60
        path.write_text(json.dumps(spent))


def phantoms(bench: Bench, subjects: int) -> Store:
    """The store of phantoms with seeds 0, 1, 2, …; those that are in it already are not drawn again."""
    root = bench.out / "store"
    store = Store.open(root) if root.exists() else Store.create(root, fractions=FRACTIONS)
    known, spacing = set(store.subjects()), (6.0, 6.0, 6.0) if bench.coarse else "random"
    wanted = [PhantomConfig(seed=seed, spacing_mm=spacing) for seed in range(subjects)]
    missing = [one for one in wanted if pseudonym(f"phantom-{one.seed:04d}", site_key()) not in known]
    ingest_studies((phantom(one) for one in missing), root)
    store.refresh()
    return store


def train(bench: Bench, recipe: str, settings: Sequence[str]) -> tuple[Model, ...]:
    """One model for each seed."""
    models: list[Model] = []
    for seed in bench.seeds:
        config = overlay(recipes.named(recipe), {**parse_assignments(settings), "seed": seed})
        run = bench.out / f"{recipe}-seed{seed}"
        if not (run / "weights").exists():
            pretrain.run(config, store=bench.out / "store", out=run)
        models.append(load(run / "weights"))
    return tuple(models)


def contest(store: Store, truth: Truth, task: Task, mode: str) -> Contest:
    """All labelled test subjects; whom to learn from is drawn later."""
    check_leakage(store, truth.of("train"), truth.of("test"))
    return Contest(
        store=store,
        truth=truth,
        task=task,
        mode=mode,
        classes=truth.classes,
        labelled=(),
        tested=truth.of("test"),
        seed=0,
    )


def on_phantoms(bench: Bench, store: Store) -> list[Score]:
    """Organs, then facts about the whole scan, of held-out phantoms."""
    organs = Truth(records=tuple(store), labels={}, classes=ORGANS)
    scores = few_label_table(
        contest(store, organs, Segment(), "probe"),
        bench.contestants(store, tokens=True),
        task="organs of phantoms",
        budgets=bench.budgets,
        draws=bench.draws,
        atlas=bench.pretrained[0].spec,
    )
    for fact in bench.facts:
        labels = {record.subject: record.labels[fact] for record in store}
        truth = Truth(records=tuple(store), labels=labels, classes=tuple(sorted(set(labels.values()))))
        for mode in ("probe", "knn"):
            scores += few_label_table(
                contest(store, truth, Classify(), mode),
                bench.contestants(store, tokens=False),
                task=f"{fact} of phantoms",
                budgets=bench.scan_budgets,
                draws=bench.draws,
            )
    return scores


def on_real(bench: Bench, store: Store, data: Path) -> list[Score]:
    """The real CTs with many organs: learn from one and test on the other, then learn from phantoms only."""
    root = bench.out / "real"
    real = Store.open(root) if root.exists() else Store.create(root, fractions=Fractions(train=0, validation=0, test=1))
    ingest([data / "scans"], root, labels=data / "labels", config=IntakeConfig(modality="CT"))
    real.refresh()
    truth = Truth(records=tuple(r for r in real if set(ORGANS) <= set(r.classes.values())), labels={}, classes=ORGANS)
    whole = contest(real, truth, Segment(), "probe")
    halves = [
        dataclasses.replace(
            whole, labelled=tuple(r for r in truth.records if r.subject != record.subject), tested=(record,)
        )
        for record in truth.records
    ]
    # One repeat for each seed; a repeat joins both directions.
    pairs = {
        name: [(bench.features(m, store), bench.features(m, real)) for m in ms] for name, ms in bench.models().items()
    }
    pairs["intensity"] = [(bench.bright(store), bench.bright(real))]
    swapped = {
        name: [joined(half.fit_and_score(seen) for half in halves) for _, seen in both] for name, both in pairs.items()
    }
    swapped["atlas"] = [joined(half.atlas(bench.pretrained[0].spec) for half in halves)]
    scores = table_of(halves[0], repeats(swapped), task="organs of real CTs, from the other one", budget=1)
    most = bench.budgets[-1]
    drawn = {name: [o for pair in both for o in transferred(bench, store, whole, pair)] for name, both in pairs.items()}
    return scores + table_of(whole, repeats(drawn), task="organs of real CTs, from phantoms only", budget=most)


def transferred(bench: Bench, store: Store, real: Contest, features: tuple[FeaturesOf, FeaturesOf]) -> list[Outcomes]:
    """Heads fitted to draws of labelled phantoms, scored on the real scans."""
    truth, outcomes = Truth(records=tuple(store), labels={}, classes=ORGANS), []
    for index in range(bench.draws):
        labelled = draw(truth, bench.budgets[-1], index, voxels=True)
        examples = list(examples_of(store, labelled, truth, features[0], real.task))
        head = real.task.fit(examples, ORGANS, mode=real.mode, seed=index)
        outcomes.append(real.score(head, features[1]))
    return outcomes


def joined(outcomes: Iterable[Outcomes]) -> Outcomes:
    return {subject: outcome for some in outcomes for subject, outcome in some.items()}


def repeats(by_name: dict[str, list[Outcomes]]) -> dict[str, Repeats]:
    return {name: {s: tuple(one[s] for one in several) for s in several[0]} for name, several in by_name.items()}


def tables(scores: Sequence[Score]) -> str:
    """Markdown: a line for each task, mode, metric and number of labelled subjects."""
    lines = [
        "| task | head | metric | labelled | " + " | ".join(COLUMNS) + " | pretrained - scratch | test subjects |",
        "|---|---|---|---:|" + "---|" * (len(COLUMNS) + 2),
    ]
    rows: dict[tuple[str, str, str, int | None], dict[str, Score]] = {}
    for score in scores:
        rows.setdefault((score.task, score.mode, score.metric, score.budget), {})[score.name] = score
    for (task, mode, metric, budget), by_name in rows.items():
        first = by_name["pretrained"]
        cells = [figure(by_name[name]) if name in by_name else "" for name in COLUMNS]
        gain = "" if first.over_scratch is None else str(first.over_scratch)
        lines.append(
            f"| {task} | {mode} | {metric} | {budget} | {' | '.join(cells)} | {gain} | {first.value.subjects} |"
        )
    return "\n".join(lines)


def figure(score: Score) -> str:
    """The mean, or every scan's own figure where they are too few for an interval."""
    each = ", ".join(f"{value:.3f}" for value in score.each)
    return f"{score.value.estimate:.3f} ({each})" if each else str(score.value)


def asked_for() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/few_labels"))
    parser.add_argument("--subjects", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--steps", type=int, help="instead of the recipe's own")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--scan-budgets", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--facts", nargs="+", default=["spleen", "lesion"])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--data", type=Path, help="folder that `voxelstem samples` made, for the real CTs")
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=value", help="differences from the recipe")
    parser.add_argument("--small", action="store_true", help="coarse phantoms and two steps, to see that it runs")
    return parser.parse_args()


def main() -> None:
    asked = asked_for()
    asked.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        out=asked.out,
        seeds=tuple(asked.seeds),
        draws=asked.draws,
        budgets=tuple(asked.budgets),
        scan_budgets=tuple(asked.scan_budgets),
        facts=tuple(asked.facts),
        coarse=asked.small,
    )
    steps = asked.steps or (2 if asked.small else 0)
    settings = [*asked.set, *(SMALL if asked.small else []), *([f"steps={steps}"] if steps else [])]
    with public_key(asked.out):
        with clocked(asked.out, "phantoms"):
            store = phantoms(bench, asked.subjects)
        with clocked(asked.out, "pretraining"):
            bench = dataclasses.replace(bench, pretrained=train(bench, asked.recipe, settings))
        with clocked(asked.out, "measuring"):
            scores = on_phantoms(bench, store)
            scores += on_real(bench, store, asked.data) if asked.data else []
    (asked.out / "few_labels.json").write_text(json.dumps([dataclasses.asdict(score) for score in scores], indent=1))
    spent = json.loads((asked.out / "minutes.json").read_text())
    print(f"voxelstem {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"recipe {asked.recipe} {' '.join(settings)}; pretraining seeds {', '.join(map(str, bench.seeds))}; ", end="")
    print(f"{len(store.subjects('train'))} phantoms to train on, {bench.draws} draws of labelled subjects")
    print("minutes: " + ", ".join(f"{stage} {minutes:.1f}" for stage, minutes in spent.items()) + "\n")
    print(tables(scores))


if __name__ == "__main__":
    main()
