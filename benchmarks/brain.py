"""Any set of contrasts, and time: what a small disentangling network learns of phantom brains whose truth is known.

    python benchmarks/brain.py [--out DIR] [--seeds 0 1 2] [--train 80] [--held 40] [--set a.b=value …]

For each seed `brain_mri.tiny_fomo25` is pretrained three times on phantom brains (`sources.brain`: two sessions of four
contrasts): with the true swap, with the released one, and from the first on with `longitudinal` on pairs of sessions.
Held-out brains are then asked:

- probes: contrast and subject from both halves of the latents (`probes.disentanglement`);
- swaps: error of the other contrast, painted from one scan's subject and the other's contrast, and from its own;
- synthesis: error of a contrast painted from a set without it and its prototype;
- sets: AUROC of an infarct, seen in FLAIR and DWI only, by one head from any set of contrasts, and of a set with a
  contrast that training never saw;
- time: correlation of predicted and true change a year of each structure, how often split-conformal intervals hold
  the truth, how often the order of two scans is told; a map of expected and observed change is drawn.

Figures are averaged over seeds within a subject; intervals resample subjects. What is done rests below --out: started
again, it goes on. Prints tables for LOG.md and writes brain.json. --small only shows that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from collection import ALL_TEST, ALL_TRAIN
from torch import Tensor
from torch.nn import functional as F

from voxelstem import __version__, pretrain, recipes
from voxelstem.backbones.experts import (
    ContrastSet,
    Gaussian,
    SetConfig,
    SetLatents,
    index_contrasts,
    product_of_experts,
    prototypes,
    synthesise,
)
from voxelstem.backbones.trajectory import TrajectoryConfig
from voxelstem.chance import Chance
from voxelstem.change import Follower, change_map, conformal_half_width, read_follower
from voxelstem.config import overlay, parse_assignments
from voxelstem.demo import public_key
from voxelstem.ingest import ingest_studies
from voxelstem.manifest import write_whole
from voxelstem.metrics import MEAN, Interval, auroc, averaged, bootstrap_interval
from voxelstem.model import load
from voxelstem.objectives.longitudinal import LongitudinalConfig
from voxelstem.pretrain import PretrainConfig
from voxelstem.probes import Probe, disentanglement
from voxelstem.report.change import change_picture
from voxelstem.sources.brain import CONTRASTS, INTRACRANIAL, VOLUME_LABEL, brain_subject
from voxelstem.store import Fractions, Store
from voxelstem.views.intensity import limits, window
from voxelstem.views.pair import PairConfig

HELD_FROM = 1_000_000
"""Seeds of held-out brains begin here: another number of training brains does not change them."""
SMALL = ["steps=2", "loader.batch=2"]
STRUCTURES = ("csf", "grey_matter", "hippocampus_left", "hippocampus_right", "ventricles", "white_matter")
"""In the order of the columns of `Batch.targets`."""
SESSIONS = 2
SETS: dict[str, tuple[str, ...]] = {
    "all four": CONTRASTS,
    "DWI alone": ("DWI",),
    "T1w and DWI": ("T1w", "DWI"),
    "T1w alone": ("T1w",),
    "T1w and T2w": ("T1w", "T2w"),
}
UNSEEN = "DWI, named as a contrast that training never saw"
LEVEL = 0.8
"""Of the conformal intervals: half of the held-out subjects calibrate them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Brains:
    """All scans of some subjects on the network's grid: (subject, session, contrast, 1, i, j, k), and their facts."""

    scans: Tensor
    names: tuple[str, ...]
    ill: np.ndarray
    shares: np.ndarray
    """(subject, session, structure): of the volume inside the skull."""
    ages: np.ndarray
    keys: tuple[tuple[tuple[str, ...], ...], ...]

    @property
    def years(self) -> np.ndarray:
        """From the first to the last session of each subject."""
        return self.ages[:, -1] - self.ages[:, 0]

    @property
    def rates(self) -> np.ndarray:
        """(subject, structure): true change a year."""
        return (self.shares[:, -1] - self.shares[:, 0]) / self.years[:, None]


def draw(root: Path, seeds: Sequence[int], fractions: Fractions) -> Path:
    """A store of these brains; one that is whole is not drawn again."""
    store = Store.open(root) if root.exists() else Store.create(root, fractions=fractions)
    if len(store) < len(seeds) * SESSIONS * len(CONTRASTS):
        ingest_studies((study for seed in seeds for study in brain_subject(seed, sessions=SESSIONS)), root)
    return root


def read(root: Path, config: PretrainConfig) -> Brains:
    store = Store.open(root)
    found = {(one.subject, one.acquisition.session, one.acquisition.contrast): one for one in store}
    names, visits = tuple(sorted({name for name, _, _ in found})), sorted({visit for _, visit, _ in found})
    table = [[[found[name, visit, kind] for kind in CONTRASTS] for visit in visits] for name in names]

    def scan(key: str) -> Tensor:
        array = store.volume(key).array
        return window(torch.from_numpy(array), limits(array, config.spec))

    def share(record: Any, structure: str) -> float:
        sizes = {name: float(record.labels[VOLUME_LABEL + name]) for name in (structure, INTRACRANIAL)}
        return sizes[structure] / sizes[INTRACRANIAL]

    return Brains(
        scans=torch.stack([torch.stack([torch.stack([scan(o.key) for o in v]) for v in s]) for s in table]),
        names=names,
        ill=np.array([s[0][0].labels["pathology"] == "yes" for s in table]),
        shares=np.array([[[share(v[0], structure) for structure in STRUCTURES] for v in s] for s in table]),
        ages=np.array([[v[0].acquisition.age_years for v in s] for s in table]),
        keys=tuple(tuple(tuple(o.key for o in v) for v in s) for s in table),
    )


def configs(asked: argparse.Namespace, seed: int) -> dict[str, PretrainConfig]:
    """The three trainings of a seed."""
    start = recipes.named("brain_mri.tiny_fomo25")
    # Not the recipe's normaliser: above the 99th percentile all is one, and small infarcts lie there.
    common: dict[str, Any] = {"seed": seed, "objective.repel_copies": False, "spec.normalisation": "zscore"}
    common |= parse_assignments([*asked.set, *(SMALL if asked.small else [])])
    true = overlay(start, common | {"objective.swap": "true"})
    views = dataclasses.replace(true.views, pair=PairConfig(same_session=0.0, other_session=1.0, structures=STRUCTURES))
    objective = LongitudinalConfig(trajectory=TrajectoryConfig(hidden=32, columns=len(STRUCTURES)))
    return {
        "true": true,
        "released": overlay(start, common | {"objective.swap": "released"}),
        "longitudinal": dataclasses.replace(true, views=views, objective=objective),
    }


def train(asked: argparse.Namespace, seen: Path, name: str, seed: int) -> Path:
    """Pretrain, or take what was pretrained before."""
    run = asked.out / "runs" / f"{name}-seed{seed}"
    if not (run / "weights").exists():
        before = train(asked, seen, "true", seed) if name == "longitudinal" else None
        began = time.monotonic()
        pretrain.run(configs(asked, seed)[name], store=seen, out=run, weights=before)
        write_whole(run / "minutes.json", json.dumps((time.monotonic() - began) / 60).encode())
    return run / "weights"


@torch.inference_mode()
def encode(network: Any, scans: Tensor) -> tuple[Gaussian, Tensor]:
    """Latents of (subject, session, contrast) scans: what each says of the subject, and its contrast's mean."""
    parts = [network.latents(part) for part in scans.flatten(0, 2).split(16)]
    mean, logvar, own = (
        torch.cat([getattr(part, name) for part in parts]).unflatten(0, scans.shape[:3])
        for name in ("subject_mean", "subject_logvar", "contrast_mean")
    )
    return Gaussian(mean=mean, logvar=logvar), own


def ask_probes(subject: Gaussian, own: Tensor, held: Brains, seed: int) -> dict[str, Probe]:
    """Both halves of the first session's latents, averaged over cells."""
    rows = [(s, c) for s in range(len(held.names)) for c in range(len(CONTRASTS))]
    halves = [part[:, 0].flatten(0, 1).flatten(2).mean(2).numpy() for part in (subject.mean, own)]
    found = disentanglement(
        *halves, contrasts=[CONTRASTS[c] for _, c in rows], subjects=[held.names[s] for s, _ in rows], seed=seed
    )
    return {name: getattr(found, name) for name in found.__dataclass_fields__}


@torch.inference_mode()
def ask_swaps(network: Any, subject: Gaussian, own: Tensor, held: Brains) -> dict[str, list[float]]:
    """Error of scan b for each subject, over all ordered pairs of contrasts of the first session."""
    errors: dict[str, list[float]] = {"its contrast": [], "the other contrast": [], "itself": []}
    pairs = [(a, b) for a in range(len(CONTRASTS)) for b in range(len(CONTRASTS)) if a != b]
    first, second = map(list, zip(*pairs, strict=True))
    for number in range(len(held.names)):
        said, styles, truth = subject.mean[number, 0], own[number, 0], held.scans[number, 0][second]
        for name, who, how in (
            ("its contrast", first, second),
            ("the other contrast", first, first),
            ("itself", second, second),
        ):
            painted = network.reconstruct(said[who], styles[how])
            errors[name].append(float(F.smooth_l1_loss(painted, truth, beta=0.1)))
    return errors


@torch.inference_mode()
def ask_synthesis(network: Any, known: Tensor, subject: Gaussian, held: Brains) -> dict[str, list[float]]:
    """Error of each contrast, painted from the others' product of experts and its prototype; and of its mean scan."""
    index = torch.arange(len(CONTRASTS)).expand(known.shape[0], known.shape[1], -1).flatten()
    typical = prototypes(known.flatten(0, 2), index, known=len(CONTRASTS))
    errors: dict[str, list[float]] = {"synthesised": [], "mean of other people's": []}
    present = torch.ones(len(held.names), len(CONTRASTS), dtype=torch.bool)
    each: dict[str, list[np.ndarray]] = {name: [] for name in errors}
    for place in range(len(CONTRASTS)):
        there = present.clone()
        there[:, place] = False
        agreed = product_of_experts(subject.mean[:, 0], subject.logvar[:, 0], there).mean
        truth = held.scans[:, 0, place]
        others = (truth.sum(dim=0) - truth) / max(len(truth) - 1, 1)
        for name, painted in (
            ("synthesised", synthesise(network, agreed, typical[place])),
            ("mean of other people's", others),
        ):
            each[name].append(F.smooth_l1_loss(painted, truth, beta=0.1, reduction="none").mean((1, 2, 3, 4)).numpy())
    return {name: np.mean(found, axis=0).tolist() for name, found in each.items()}


def fit_head(subject: Gaussian, own: Tensor, ill: np.ndarray, *, seed: int, steps: int) -> ContrastSet:
    """A head for infarcts on frozen latents of all sessions, with contrasts dropped and names hidden."""
    flat = [part.flatten(0, 1) for part in (subject.mean, subject.logvar, own)]
    truth = torch.from_numpy(np.repeat(ill, own.shape[1])).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ContrastSet(SetConfig(contrasts=CONTRASTS, dim=32, heads=2, drop=0.5), own.shape[3])
    optimiser = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.05)
    rng = np.random.default_rng([seed, 31])
    for step in range(steps):
        rows = torch.from_numpy(rng.choice(len(truth), min(32, len(truth)), replace=False))
        index = torch.arange(len(CONTRASTS)).expand(len(rows), -1)
        mean, logvar, contrast = (part[rows] for part in flat)
        latents = SetLatents(subject=Gaussian(mean=mean, logvar=logvar), contrast=contrast, index=index)
        logits = head(latents, chance=Chance.of(seed * steps + step, count=len(rows)))[:, 0]
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(logits, truth[rows]).backward()
        optimiser.step()
    return head.eval()


@torch.inference_mode()
def ask_head(head: ContrastSet, subject: Gaussian, own: Tensor) -> dict[str, list[float]]:
    """Logits of every subject's first session by set of contrasts."""
    asked = {name: (kinds, kinds) for name, kinds in SETS.items()} | {UNSEEN: (("DWI",), ("a new sequence",))}
    found: dict[str, list[float]] = {}
    for name, (kinds, called) in asked.items():
        at = [CONTRASTS.index(kind) for kind in kinds]
        said = index_contrasts([called] * len(own), CONTRASTS)
        latents = SetLatents(
            subject=Gaussian(mean=subject.mean[:, 0, at], logvar=subject.logvar[:, 0, at]),
            contrast=own[:, 0, at],
            index=said.index,
        )
        found[name] = head(latents)[:, 0].tolist()
    return found


@torch.inference_mode()
def ask_time(follower: Follower, held: Brains) -> tuple[np.ndarray, np.ndarray]:
    """Predicted change a year (standardised columns) and years between, mean over contrasts, of each subject."""
    rates, spans = [], []
    for place in range(len(CONTRASTS)):
        a, b = held.scans[:, 0, place], held.scans[:, -1, place]
        rates.append(follower.change_per_year(a, b, torch.from_numpy(held.years).float()[:, None]).numpy())
        states = [follower.trajectory.split(follower.network.latents(one).subject_mean)[1] for one in (a, b)]
        spans.append(follower.trajectory.years_between(*states)[:, 0].numpy())
    return np.mean(rates, axis=0), np.mean(spans, axis=0)


def pearson(pairs: Sequence[tuple[float, float]]) -> float:
    """Correlation of predicted and true values; NaN where one side does not vary."""
    said, truth = np.array(pairs).T
    return float(np.corrcoef(said, truth)[0, 1]) if len(pairs) > 2 and said.std() and truth.std() else math.nan


def area(pairs: Sequence[tuple[float, float]]) -> float:
    """AUROC of (score, truth)."""
    said, truth = np.array(pairs, dtype=np.float64).T
    return auroc(truth > 0, said)


def over_seeds(
    held: Brains, repeats: Sequence[Sequence[Any]], statistic: Callable[[Sequence[Any]], float] = MEAN
) -> Interval:
    """The statistic over subjects, averaged over seeds; intervals resample subjects."""
    by_subject = {name: tuple(one[number] for one in repeats) for number, name in enumerate(held.names)}
    return bootstrap_interval(by_subject, averaged(statistic))


def covered(said: np.ndarray, truth: np.ndarray) -> list[float]:
    """Whether the interval of each subject of one half, calibrated on the other, holds its truth."""
    half = np.arange(len(said)) % 2 == 0
    hits = np.zeros(said.shape)
    for test in (half, ~half):
        for column in range(said.shape[1]):
            width = conformal_half_width((said - truth)[~test, column], level=LEVEL)
            hits[test, column] = math.nan if width is None else np.abs(said - truth)[test, column] <= width
    return hits.mean(axis=1).tolist()


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What every seed said of every held-out subject, and how to make a figure of it."""

    each: dict[str, list[Sequence[Any]]]
    statistics: dict[str, Callable[[Sequence[Any]], float]]
    probes: dict[str, Interval]

    def add(self, name: str, said: Sequence[Any], statistic: Callable[[Sequence[Any]], float] = MEAN) -> None:
        self.each.setdefault(name, []).append(said)
        self.statistics[name] = statistic

    def figures(self, held: Brains) -> dict[str, Interval]:
        """Over subjects, averaged over seeds; probes seed by seed, since each has folds of its own."""
        return {name: over_seeds(held, said, self.statistics[name]) for name, said in self.each.items()} | self.probes


def measure(asked: argparse.Namespace) -> dict[str, Interval]:
    """Train and ask everything."""
    seen = draw(asked.out / "seen", range(asked.train), ALL_TRAIN)
    away = draw(asked.out / "held", range(HELD_FROM, HELD_FROM + asked.held), ALL_TEST)
    example = configs(asked, 0)["true"]
    known, held = read(seen, example), read(away, example)
    answers = Answers(each={}, statistics={}, probes={})
    for seed in asked.seeds:
        for swap in ("true", "released"):
            network = load(train(asked, seen, swap, seed)).backbone.eval()
            subject, own = encode(network, held.scans)
            for name, probe in ask_probes(subject, own, held, seed).items():
                answers.probes[f"{swap} swap: {name} (chance {probe.chance:.2f}), seed {seed}"] = probe.value
            for name, each in ask_swaps(network, subject, own, held).items():
                answers.add(f"{swap} swap: error of b from a's subject with {name}", each)
        network = load(train(asked, seen, "true", seed)).backbone.eval()
        _add_sets(answers, network, known, held, seed=seed, steps=2 if asked.small else 400)
        follower = read_follower(train(asked, seen, "longitudinal", seed))
        _add_time(answers, follower, known, held)
        _paint(asked.out / f"change-seed{seed}.png", follower, away, held)
    return answers.figures(held)


def _add_sets(answers: Answers, network: Any, known: Brains, held: Brains, *, seed: int, steps: int) -> None:
    (subject, own), (there, styles) = encode(network, held.scans), encode(network, known.scans)
    for name, each in ask_synthesis(network, styles, subject, held).items():
        answers.add(f"error of a contrast that is missing: {name}", each)
    head = fit_head(there, styles, known.ill, seed=seed, steps=steps)
    for name, each in ask_head(head, subject, own).items():
        answers.add(f"AUROC of an infarct, {name}", list(zip(each, held.ill.tolist(), strict=True)), area)


def _add_time(answers: Answers, follower: Follower, known: Brains, held: Brains) -> None:
    rates, spans = ask_time(follower, held)
    spread = known.shares.reshape(-1, len(STRUCTURES)).std(axis=0)
    for column, name in enumerate(STRUCTURES):
        pairs = list(zip(rates[:, column], held.rates[:, column], strict=True))
        answers.add(f"r of the change a year, {name}", pairs, pearson)
    answers.add(f"share of {LEVEL:.0%} intervals that hold the truth", covered(rates * spread, held.rates))
    answers.add("r of the years between two scans", list(zip(spans, held.years, strict=True)), pearson)
    answers.add("share of orders told right", (spans > 0).astype(float).tolist())


def _paint(path: Path, follower: Follower, store: Path, held: Brains) -> None:
    """The held-out subject whose ventricles grew most."""
    number = int(held.rates[:, STRUCTURES.index("ventricles")].argmax())
    volumes = [Store.open(store).volume(held.keys[number][visit][0]) for visit in (0, -1)]
    years, age = float(held.years[number]), float(held.ages[number, 0])
    write_whole(path, change_picture(change_map(follower, *volumes, years=years, age_years=age)).png)


def table(found: Mapping[str, Interval]) -> str:
    return "\n".join(
        ["| held-out brains | figure |", "|---|---|", *(f"| {name} | {one} |" for name, one in found.items())]
    )


def asked_for() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/brain"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=80, help="subjects that are learned from")
    parser.add_argument("--held", type=int, default=40, help="subjects that are asked about")
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=value", help="differences for every training")
    parser.add_argument("--small", action="store_true", help="two steps, to see that it runs")
    return parser.parse_args()


def main() -> None:
    asked = asked_for()
    asked.out.mkdir(parents=True, exist_ok=True)
    with public_key(asked.out):
        found = measure(asked)
    facts = {name: dataclasses.asdict(interval) for name, interval in found.items()}
    write_whole(asked.out / "brain.json", json.dumps(facts, indent=1).encode())
    minutes = [json.loads(path.read_text()) for path in sorted(asked.out.glob("runs/*/minutes.json"))]
    print(f"voxelstem {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"{asked.train} subjects learned from, {asked.held} held out, seeds {', '.join(map(str, asked.seeds))}")
    print(f"minutes of each training: {' '.join(f'{one:.1f}' for one in minutes)}\n")
    print(table(found))


if __name__ == "__main__":
    main()
