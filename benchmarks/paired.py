"""Does alignment learn what reports say? Retrieval, sides, negations and mirror images on phantoms with true reports.

    python benchmarks/paired.py [--out DIR] [--train 1500] [--held 500] [--seeds 0 1 2]
                                [--variant NAME=RECIPE,a.b=value …] [--reports FILE.jsonl]

Each variant is pretrained on the training phantoms (4 mm, `sources.paired`) and asked about held-out ones:

- text to scan and scan to text: recall at 1, 5 and 10 of the whole pool, by whole reports and by impressions alone;
- sides: of scans with a finding on one side only, is the prompt with this side nearer than the one with the other;
- mirror images: the same question about the scan with left and right exchanged; how many answers flip;
- negations: is the prompt that says a finding nearer than the one that denies it; balanced accuracy of that answer,
  of the same with a threshold set on 200 training scans, and the AUROC of the difference.

Prompts are those of the package's set `phantom`. Beside each variant: ridge regressions from features of the same scans
to the text tower's vectors (see paired_spaces.py), and how well a ridge that is told the facts finds them in coarse
voxels and in the tower's vectors of reports: what there is to learn. Figures are means over seeds, intervals resample
patients. What is done rests below --out: started again, it goes on. Prints tables for LOG.md and writes paired.json.
--small shows that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from collection import ALL_TEST, ALL_TRAIN
from few_labels import Variant, costs, train
from paired_questions import SECTIONS, Figure, figures_of, negations, recalls, sides
from paired_spaces import Pairs, Vectors, coarse, decodable, histogram, regressed, trained, untrained

from voxelstem import __version__
from voxelstem.aligned import Aligned, read_aligned
from voxelstem.demo import public_key
from voxelstem.ingest import ingest_studies
from voxelstem.manifest import write_whole
from voxelstem.model import Model
from voxelstem.prompts import read_prompts
from voxelstem.sources.paired import PairedConfig, paired, subject
from voxelstem.store import Fractions, Store
from voxelstem.store.subjects import pseudonym, site_key

HELD_FROM = 1_000_000
"""Seeds of held-out phantoms begin here: another number of training phantoms does not change them."""
SMALL = ["loader.batch=4", "steps=2", "objective.chunk=4"]
CALIBRATED_ON = 200
REGRESSED_ON = 3000
"""Training phantoms that a ridge learns from at most: its time grows with their third power."""
TOLD = (
    "contrast", "effusion", "effusion_amount", "kidneys", "spleen", "lung_side", "lung_lobe", "lung_density",
    "liver_lobe", "liver_density",
)  # fmt: skip


def draw(root: Path, seeds: Iterable[int], fractions: Fractions) -> Path:
    """A store of paired phantoms; those that are in it already are not drawn again."""
    store = Store.open(root) if root.exists() else Store.create(root, fractions=fractions)
    known = set(store.subjects())
    missing = [seed for seed in seeds if pseudonym(subject(seed), site_key()) not in known]
    began = time.monotonic()
    ingest_studies((paired(PairedConfig(seed=seed)) for seed in missing), root)
    if missing:
        print(f"drew {len(missing)} phantoms in {time.monotonic() - began:.0f} s", flush=True)
    return root


def baselines(model: Model, space: Aligned, seen: Pairs, held: Pairs, kept: Path) -> list[Vectors]:
    """Ridge regressions from features that no report has shaped; features of this model's own rest in `kept`."""
    plain = {"untrained": untrained(model, seed=0), "histogram": histogram, "coarse": coarse}
    found: list[Vectors] = []
    for name, features in plain.items():
        place = kept / name if name == "untrained" else kept.parent / name
        shut = regressed(f"{name} + ridge", features, held, seen, space, kept=place)
        found.append(dataclasses.replace(shut, learned=shut.learned[:CALIBRATED_ON]))
    return found


def learnable(space: Aligned, held: Pairs, seen: Pairs, kept: Path) -> list[dict[str, Any]]:
    """How well a ridge that is told the facts finds them in coarse voxels and in vectors of texts."""
    voxels = seen.rows(coarse, kept / "coarse/seen.npz"), held.rows(coarse, kept / "coarse/held.npz")
    texts = tuple(space.tower(pairs.texts(SECTIONS["report"])).detach().cpu().numpy() for pairs in (seen, held))
    said, truth = ([{fact: one[fact] for fact in TOLD} for one in pairs.facts] for pairs in (seen, held))
    in_voxels, in_texts = (decodable(rows, said, tested, truth) for rows, tested in (voxels, texts))
    return [
        {"fact": fact, "voxels": in_voxels[fact][0], "text": in_texts[fact][0], "chance": in_voxels[fact][1]}
        for fact in TOLD
    ]


def table(figures: Sequence[Figure]) -> str:
    """Markdown: a line for each question and metric, a column for each contestant."""
    names = list(dict.fromkeys(one.contestant for one in figures))
    lines = [
        f"| question | metric | asked | chance | {' | '.join(names)} |",
        f"|---|---|---:|---:|{'---|' * len(names)}",
    ]
    cells: dict[tuple[str, str], dict[str, Figure]] = {}
    for one in figures:
        cells.setdefault((one.question, one.metric), {})[one.contestant] = one
    for (question, metric), by_name in cells.items():
        first = next(iter(by_name.values()))
        values = [str(by_name[name].value) if name in by_name else "" for name in names]
        lines.append(f"| {question} | {metric} | {first.asked} | {first.chance:.3f} | {' | '.join(values)} |")
    return "\n".join(lines)


def verdicts(figures: Sequence[Figure], variants: Sequence[str]) -> str:
    """The four claims, for each variant."""
    claims = (
        ("text to scan, by report", "recall@10", lambda one: one.value.estimate / one.chance, 10.0, "x chance"),
        ("all findings on one side", "right side", lambda one: one.value.estimate, 0.8, "right"),
        ("mean of all classes", "balanced accuracy", lambda one: one.value.estimate, 0.8, "right"),
        ("all findings on one side", "answer flips", lambda one: one.value.estimate, 0.8, "of answers flip"),
    )
    lines: list[str] = []
    for name in variants:
        for question, metric, measure, least, word in claims:
            found = [
                one
                for one in figures
                if one.contestant == name and one.question.startswith(question) and one.metric == metric
            ]
            for one in found:
                reached = measure(one)
                met = "met" if reached >= least else "MISSED"
                each = " ".join(f"{value:.3f}" for value in one.seeds)
                goal = f"at least {least:g}: {met}; seeds {each}"
                lines.append(f"- {name}: {one.question}, {metric}: {reached:.3g} {word} ({goal})")
    return "\n".join(lines)


def nearest(vectors: Vectors, held: Pairs, reports: Path) -> str:
    """What the phantoms nearest to real reports say; an illustration, nothing is measured."""
    lines = ["| real report | cosine | impression of its nearest phantom |", "|---|---:|---|"]
    for line in reports.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        close = vectors.scans @ vectors.embed([f"{row['findings']}\n{row['impression']}"])[0]
        best = int(close.argmax())
        lines.append(f"| {row['id']} | {close[best]:.3f} | {held.reports[best].impression_text} |")
    return "\n".join(lines)


def asked_for() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/paired"))
    parser.add_argument("--variant", nargs="+", default=["align=tiny.align"], metavar="NAME=RECIPE,a.b=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the pretraining")
    parser.add_argument("--train", type=int, default=1500, help="training phantoms")
    parser.add_argument("--held", type=int, default=500, help="held-out phantoms")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--reports", type=Path, help="real reports, one JSON a line with id, findings and impression")
    parser.add_argument("--small", action="store_true", help="few phantoms and two steps, to see that it runs")
    asked = parser.parse_args()
    asked.variant = [Variant.read(text) for text in asked.variant]
    if asked.small:
        asked.train, asked.held, asked.draws = min(asked.train, 16), min(asked.held, 12), min(asked.draws, 100)
    return asked


def main() -> None:
    asked = asked_for()
    asked.out.mkdir(parents=True, exist_ok=True)
    common = tuple(SMALL if asked.small else [])
    variants = [dataclasses.replace(one, settings=(*one.settings, *common)) for one in asked.variant]
    prompts = read_prompts("phantom")
    with public_key(asked.out):
        seen_at = draw(asked.out / f"seen-{asked.train}", range(asked.train), ALL_TRAIN)
        held_at = draw(asked.out / f"held-{asked.held}", range(HELD_FROM, HELD_FROM + asked.held), ALL_TEST)
        seen, held = Pairs.of(seen_at), Pairs.of(held_at)
        learned = seen.first(CALIBRATED_ON)
        figures: list[Figure] = []
        shown: dict[str, str] = {}
        kept = asked.out / f"features-{asked.train}-{asked.held}"
        told: list[dict[str, Any]] = []
        for number, variant in enumerate(variants):
            contestants: dict[str, list[Vectors]] = {}
            for seed in asked.seeds:
                model = train(asked.out, seen_at, variants, variant, seed)
                space = read_aligned(asked.out / "runs" / variant.folder(seed) / "weights")
                spaces = [trained(space, held, learned, kept / "trained", variant.name)]
                if seed == asked.seeds[0]:
                    if asked.reports:
                        shown[variant.name] = nearest(spaces[0], held, asked.reports)
                    if not number:
                        few = seen.first(REGRESSED_ON)
                        told = learnable(space, held, few, kept)
                        spaces += baselines(model, space, few, held, kept / variant.folder(seed))
                for vectors in spaces:
                    contestants.setdefault(vectors.name, []).append(vectors)
            for name, several in contestants.items():
                answers = [
                    recalls(one, held) | sides(one, held, prompts) | negations(one, held, learned, prompts)
                    for one in several
                ]
                figures += figures_of(name, answers, asked.draws)
    facts = {
        "figures": list(map(dataclasses.asdict, figures)),
        "learnable": told,
        "prompts": prompts.sha256,
        "train": asked.train,
        "held": asked.held,
        "voxelstem": __version__,
    }
    write_whole(asked.out / "paired.json", json.dumps(facts, indent=1).encode())
    print(f"voxelstem {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"{asked.train} training and {asked.held} held-out phantoms, prompts {prompts.sha256[:16]}\n")
    print(costs(asked.out, variants, asked.seeds) + "\n")
    print(
        "| fact told to a ridge | chance | in coarse voxels | in the tower's vectors of reports |\n|---|---:|---:|---:|"
    )
    for line in told:
        print(f"| {line['fact']} | {line['chance']:.2f} | {line['voxels']:.2f} | {line['text']:.2f} |")
    print("\n" + table(figures) + "\n")
    print(verdicts(figures, [variant.name for variant in variants]))
    for name, lines in shown.items():
        print(f"\n{name}:\n\n{lines}")


if __name__ == "__main__":
    main()
