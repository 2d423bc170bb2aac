"""Does it learn? Pretraining recipes and their ablations against untrained networks and intensity, when labels are few.

    python benchmarks/few_labels.py [--out DIR] [--data DIR] [--seeds 0 1 2] [--variant NAME=RECIPE,a.b=value …]

Every variant is pretrained once for each seed: on phantoms and, with --data, on real CTs. Light heads on frozen tokens
are then asked about subjects that this pretraining did not see:

- organs of held-out phantoms, by a linear head (Dice of voxels) and by neighbours (balanced accuracy of tokens);
- the tumours of the sarcoma CTs: each seed has a fold of the patients (of three: seeds 0, 3 and 6 have the first), seen
  neither by its pretraining nor by its heads, so that every patient is held out by one seed or more;
- organs of the two real CTs with many of them, from the other one and from phantoms: printed for each scan.

A variant may continue another one: `NAME=RECIPE,after=OTHER NAME`; or look at its runs in another way, through several
layers at once and with each patch's histogram beside: `NAME=RECIPE,runs_of=OTHER NAME,layers=1+2+3+4,beside=intensity`;
`scratch` is then seen in the same way. Each seed has its own draws of labelled subjects,
and every contestant learns from the same ones: `scratch` is the variant's own network untrained, one for each seed.
Figures are averaged over seeds and draws within a subject, intervals resample subjects, and differences are paired by
subject. What is done rests below --out: started again, it goes on, also with other variants. Prints tables for LOG.md
and writes every figure to few_labels.json. --small only shows that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from collection import Collection, collect
from contests import Contestant, Question, answer, questions_of
from light_heads import mean_of

from voxelstem import __version__, pretrain, recipes
from voxelstem.adapted import SeeConfig
from voxelstem.config import overlay, parse_assignments
from voxelstem.demo import public_key
from voxelstem.evaluate import Outcomes, Repeats, table_of
from voxelstem.manifest import write_whole
from voxelstem.metrics import Interval, Score
from voxelstem.model import Model, load
from voxelstem.pretrain import PretrainConfig

SMALL = ["loader.batch=2", "steps=2", "backbone.block.depth=1", "backbone.scan.depth=0"]
FOLDS = 3
"""Of the sarcoma patients."""
SOFT = "spec.low_hu=-200"
"""A window of soft tissue: at -1000 HU an untrained network of this size finds tumours three times worse."""
JOINED = "layers=1+2+3+4,beside=intensity"
"""What heads see that see most; the untrained network is seen in the same way."""
VARIANTS = (
    f"DINO=tiny.dino,{SOFT},{JOINED}",
    f"no iBOT=tiny.dino,{SOFT},objective.ibot_weight=0,{JOINED}",
    f"no KoLeo=tiny.dino,{SOFT},objective.koleo_weight=0,{JOINED}",
    f"no place=tiny.dino,{SOFT},objective.position_weight=0,{JOINED}",
    f"MAE=tiny.mae,{SOFT},steps=300,{JOINED}",
    f"MAE with place=tiny,{SOFT},steps=300,{JOINED}",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A recipe with differences, under the name of its rows."""

    name: str
    recipe: str
    settings: tuple[str, ...]
    after: str = ""
    """Name of the variant whose weights it continues."""
    runs_of: str = ""
    """Name of the variant whose runs it takes as they are."""
    see: SeeConfig = field(default_factory=SeeConfig)
    """What heads see: `layers=1+2` and `beside=intensity` among the differences say it."""

    @staticmethod
    def read(text: str) -> Variant:
        name, _, rest = text.partition("=")
        recipe, *parts = (part.strip() for part in rest.split(","))
        own = {"after": "", "runs_of": "", "layers": "", "beside": "nothing"}
        own |= {key: value for key, _, value in (part.partition("=") for part in parts) if key in own}
        layers = tuple(int(layer) for layer in own["layers"].split("+") if layer)
        return Variant(
            name=name.strip(),
            recipe=recipe,
            settings=tuple(part for part in parts if part.partition("=")[0] not in own),
            after=own["after"],
            runs_of=own["runs_of"],
            see=overlay(SeeConfig(layers=layers), {"beside": own["beside"]}),
        )

    def config(self, seed: int) -> PretrainConfig:
        return overlay(recipes.named(self.recipe), {**parse_assignments(self.settings), "seed": seed})

    def folder(self, seed: int) -> str:
        plain = "".join(letter if letter.isalnum() else "-" for letter in self.name)
        return f"{plain}-seed{seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One variant on one question."""

    variant: str
    scores: tuple[Score, ...]
    seeds: tuple[float, ...]
    """The pretrained models' figures, seed by seed."""

    def score(self, name: str) -> Score | None:
        return next((score for score in self.scores if score.name == name), None)


def train(out: Path, seen: Path, variants: Sequence[Variant], variant: Variant, seed: int) -> Model:
    """Pretrain, or take what was pretrained before."""
    if variant.runs_of:
        return train(out, seen, variants, next(one for one in variants if one.name == variant.runs_of), seed)
    run = out / "runs" / variant.folder(seed)
    if not (run / "weights").exists():
        weights = None
        if variant.after:
            before = next(one for one in variants if one.name == variant.after)
            train(out, seen, variants, before, seed)
            weights = out / "runs" / before.folder(seed) / "weights"
        began = time.monotonic()
        pretrain.run(variant.config(seed), store=seen, out=run, weights=weights)
        spent = time.monotonic() - began
        write_whole(run / "minutes.json", json.dumps(spent / 60).encode())
    return load(run / "weights")


def rows_of(
    asked: argparse.Namespace, variants: Sequence[Variant], stores: Collection
) -> Iterable[tuple[Question, list[Row]]]:
    """Train and measure everything; a row for each variant on each question."""
    stand = asked.out / "answers"
    repeats = len(asked.seeds)
    questions = questions_of(stores, budgets=asked.budgets, tumour_budgets=asked.tumour_budgets, seeds=asked.seeds)
    rows: dict[str, list[Row]] = {question.name: [] for question in questions}
    for variant in variants:
        models = [train(asked.out, stores.seen[seed % FOLDS], variants, variant, seed) for seed in asked.seeds]
        untrained = [model.scratch(seed=seed) for model, seed in zip(models, asked.seeds, strict=True)]
        teams = {
            # Each repeat is another model's; intensity and the atlas answer all of them.
            "pretrained": [Contestant.of(model, variant.see) for model in models],
            "scratch": [Contestant.of(model, variant.see) for model in untrained],
            "intensity": [Contestant.intensity(models[0])] * repeats,
            "atlas": [Contestant.atlas(models[0])] * repeats,
        }
        found: dict[str, dict[str, list[Outcomes]]] = {question.name: {} for question in questions}
        for name, team in teams.items():
            put = [question for question in questions if name != "atlas" or question.has_atlas]
            for index, contestant in enumerate(team):
                wanted = [(question, place) for question in put for place in question.turns(index)]
                given = answer(stand, contestant, wanted)
                for question, place in wanted:
                    found[question.name].setdefault(name, []).append(given[question.mark(place)])
        for question in questions:
            by_name = found[question.name]
            joined = {name: by_subject(several) for name, several in by_name.items()}
            scores = table_of(question.contest, joined, task=question.task, budget=question.budget)
            each = [mean_of(list(one.values())) for one in by_name["pretrained"]]
            draws = len(each) // repeats
            seeds = tuple(sum(each[start : start + draws]) / draws for start in range(0, len(each), draws))
            rows[question.name].append(Row(variant=variant.name, scores=tuple(scores), seeds=seeds))
    return [(question, rows[question.name]) for question in questions]


def by_subject(several: Sequence[Outcomes]) -> Repeats:
    """Every subject's outcomes in the rounds that tested it."""
    subjects = sorted({subject for one in several for subject in one})
    return {subject: tuple(one[subject] for one in several if subject in one) for subject in subjects}


def tables(found: Iterable[tuple[Question, list[Row]]]) -> str:
    """Markdown: a line for each variant on each question."""
    lines = [
        "| task | head, metric | labelled | variant | pretrained | by seed | scratch | intensity | atlas "
        "| pretrained - scratch | pretrained - intensity |",
        "|---|---|---:|---|---|---|---|---|---|---|---|",
    ]
    for question, rows in found:
        where = f"{question.task} (n={len(question.subjects)})"
        for row in rows:
            first = row.score("pretrained")
            assert first is not None
            cells = [
                where,
                f"{first.mode}, {first.metric}",
                str(question.budget),
                row.variant,
                figure(first),
                " ".join(f"{value:.3f}" for value in row.seeds),
                *(figure(score) if (score := row.score(name)) else "" for name in ("scratch", "intensity", "atlas")),
                gain(first.over_scratch),
                gain(first.over_intensity),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(score: Score) -> str:
    """The mean, or every scan's own figure where they are too few for an interval."""
    each = ", ".join(f"{value:.3f}" for value in score.each)
    if each:
        return f"{score.value.estimate:.3f} ({each})"
    return f"{score.value.estimate:.3f} [{score.value.low:.3f}, {score.value.high:.3f}]"


def gain(interval: Interval | None) -> str:
    """A difference; bold where the interval leaves zero out."""
    if interval is None:
        return ""
    if interval.low is None or interval.high is None:
        return f"{interval.estimate:+.3f}"
    text = f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
    return f"**{text}**" if interval.low > 0 or interval.high < 0 else text


def costs(out: Path, variants: Sequence[Variant], seeds: Sequence[int]) -> str:
    """Markdown: what each variant is, and what a run of it took."""
    lines = ["| variant | recipe and differences | steps | minutes of each run |", "|---|---|---:|---|"]
    for variant in variants:
        base = next(one for one in variants if one.name == (variant.runs_of or variant.name))
        runs = [out / "runs" / base.folder(seed) / "minutes.json" for seed in seeds]
        minutes = " ".join(f"{json.loads(run.read_text()):.1f}" for run in runs if run.exists())
        more = {"after": variant.after, "runs of": variant.runs_of, "layers": "+".join(map(str, variant.see.layers))}
        more["beside"] = variant.see.beside.replace("nothing", "")
        said = (f"{name} {value}" for name, value in more.items() if value)
        what = " ".join((variant.recipe, *variant.settings, *said))
        lines.append(f"| {variant.name} | `{what}` | {variant.config(0).steps} | {minutes} |")
    return "\n".join(lines)


def asked_for() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/few_labels"))
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), metavar="NAME=RECIPE,a.b=value")
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=value", help="differences for every variant")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--phantoms", type=int, default=48)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 5], help="labelled phantoms")
    parser.add_argument("--tumour-budgets", type=int, nargs="+", default=[4, 8], help="labelled sarcoma patients")
    parser.add_argument("--data", type=Path, help="folder of public CTs with starter/, ct/ and sts/")
    parser.add_argument("--small", action="store_true", help="coarse phantoms and two steps, to see that it runs")
    asked = parser.parse_args()
    asked.variant = [Variant.read(text) for text in asked.variant]
    lost = {name for one in asked.variant for name in (one.after, one.runs_of)} - {one.name for one in asked.variant}
    lost -= {""}
    if lost:
        parser.error(f"no variant is called {', '.join(sorted(lost))}")
    return asked


def main() -> None:
    asked = asked_for()
    asked.out.mkdir(parents=True, exist_ok=True)
    common = (*asked.set, *(SMALL if asked.small else []))
    variants = [dataclasses.replace(one, settings=(*one.settings, *common)) for one in asked.variant]
    with public_key(asked.out):
        stores = collect(asked.out, phantoms=asked.phantoms, folds=FOLDS, coarse=asked.small, data=asked.data)
        found = list(rows_of(asked, variants, stores))
    facts = [
        {
            "question": question.name,
            "variant": row.variant,
            "seeds": row.seeds,
            "scores": list(map(dataclasses.asdict, row.scores)),
        }
        for question, rows in found
        for row in rows
    ]
    write_whole(asked.out / "few_labels.json", json.dumps(facts, indent=1).encode())
    print(f"voxelstem {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"pretraining seeds {', '.join(map(str, asked.seeds))}\n")
    print(costs(asked.out, variants, asked.seeds) + "\n")
    print(tables(found))


if __name__ == "__main__":
    main()
