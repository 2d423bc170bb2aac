"""Commands that train and judge: the whole journey at once, or pretrain, adapt and evaluate by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from voxelstem.cli.triples import box_ras_mm
from voxelstem.config import overlay, parse_assignments, read_toml
from voxelstem.errors import ConfigError
from voxelstem.terminal import DONE, answer, listed, refused, verdict


def demo(*, out: Path = Path("demo"), quick: bool = False, data: Path | None = None) -> int:
    """Run the whole journey: scans to store, pretrained model, adapted model and a report.

    For example:

        voxelstem demo --out demo --quick

    Args:
        out: Folder that receives everything the demo makes.
        quick: Take two minutes instead of ten, for a first look.
        data: Folder of real scans to use instead of fetching some.
    """
    from voxelstem import demo as verb

    page = verb.run(out, quick=quick, data=data)
    answer({"report": str(page)}, str(page), as_json=False)
    return DONE


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """What a run begins with, besides its recipe."""

    config: Path | None = None
    """TOML file with differences from the recipe."""
    from_: Annotated[Path | None, Parameter(name="from")] = None
    """Weights folder to continue, trained here or imported; a drawn network when left out."""
    probe: Path | None = None
    """A small labelled store to probe the run on; the training store's own labels when left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What is reckoned up instead of training."""

    dry_run: bool = False
    """Say what would run and what it would take, and whether it fits; train nothing."""
    gpus: int = 0
    """With --dry-run: for so many GPUs, which need not be here."""
    gpu: str = "h100"
    """Of which kind: a100, h100, h200, l40s or rtx4090."""
    gpu_memory_gib: float = 0.0
    """Memory of each, where it is not the data sheet's."""


def pretrain(
    recipe: str,
    /,
    *settings: str,
    store: Path,
    out: Path,
    begin: Annotated[Beginning, Parameter(name="*")] = Beginning(),
    dry: Annotated[DryRun, Parameter(name="*")] = DryRun(),
    json: bool = False,
) -> int:
    """Train a backbone on the scans of a store, without labels. Started again, it resumes; when finished, it stays.

    For example:

        voxelstem pretrain tiny --store store --out runs/first steps=200

    Continue weights on your own scans, with another learning rate:

        voxelstem pretrain tiny --from runs/first/weights --store mine --out runs/second optim.lr=0.0005

    On many processes: `torchrun --nproc-per-node 8 -m voxelstem pretrain …`.

    Args:
        recipe: Name of a complete config, such as `tiny`.
        settings: Differences from the recipe, such as `optim.lr=0.001`; they win over --config.
        store: Folder of the store.
        out: Folder of the run.
        begin: What the run begins with.
        dry: What is reckoned up.
        json: Answer in JSON.
    """
    from voxelstem import pretrain as verb
    from voxelstem import recipes
    from voxelstem.distributed import ranks
    from voxelstem.engine.hardware import Fleet

    changes = (read_toml(begin.config) if begin.config else {}) | parse_assignments(settings)
    resolved = overlay(recipes.named(recipe), changes)
    if dry.dry_run:
        try:
            fleet = Fleet(gpus=dry.gpus, gpu=dry.gpu, memory_gib=dry.gpu_memory_gib)
        except ValueError as error:
            raise ConfigError(str(error), hint="see `voxelstem pretrain --help`") from error
        found = verb.estimate(resolved, store=store, out=out, fleet=fleet)
        answer(found.facts(), found.words(), as_json=json)
        found.check()
        return DONE
    verb.run(resolved, store=store, out=out, weights=begin.from_, probe=begin.probe)
    made = {"weights": str(out / "weights"), "page": str(out / "report" / "index.html")}
    if ranks().rank == 0:  # the others would say the same once more
        answer(made, made["weights"], as_json=json)
    return DONE


@dataclass(frozen=True, kw_only=True, slots=True)
class Learning:
    """What is learned."""

    task: str
    """What to learn, such as `classify` or `segment`; `zeroshot` answers by prompts."""
    mode: str
    """How freely, from `knn`, `probe` and `attention` to `adapters` and `full`; `auto` climbs them while that pays. For
    zeroshot `prompts` or `calibrated`."""
    budget: int | None = None
    """Labelled subjects to learn from; all training subjects when left out."""
    commercial: bool = False
    """Say that the use is commercial: weights whose licence forbids that are refused, in `evaluate` too."""


def adapt(
    *settings: str,
    weights: str,
    store: Path,
    labels: Path | None = None,
    what: Annotated[Learning, Parameter(name="*")],
    out: Path,
) -> int:
    """Fit a head on few labels, over frozen weights or together with them.

    For example:

        voxelstem adapt --weights weights --store store --labels labels.csv --task classify --mode auto --out runs/auto

    Without labels, by prompts, over weights that were aligned with reports:

        voxelstem adapt head.prompts=ct_rate --weights W --store S --task zeroshot --mode prompts --out runs/asked

    The same on that network untrained: `voxelstem adapt like=weights --weights scratch`, and the rest as above.

    Args:
        settings: Differences from the task's own settings, such as `seed=1`.
        weights: Weights folder, or `scratch` for an untrained network; then `like=WEIGHTS` says of which kind.
        store: Folder of the store.
        labels: labels.csv for scan-level tasks; for voxel-level tasks a labels.json with the wanted classes. Prompts
            need none; to calibrate them, a column for each class, 1 or 0.
        what: What is learned.
        out: Folder of the run.
    """
    from voxelstem import adapt as verb

    changes = parse_assignments(settings) | ({"commercial": True} if what.commercial else {})
    done = verb.run(
        weights=weights,
        store=store,
        labels=labels,
        task=what.task,
        mode=what.mode,
        out=out,
        budget=what.budget,
        settings=changes,
    )
    answer({"run": str(done)}, str(done), as_json=False)
    return DONE


@dataclass(frozen=True, kw_only=True, slots=True)
class Judging:
    """What is looked at beside the runs' own figures."""

    pretrained_on: tuple[Path, ...] = ()
    """Stores that the weights were pretrained on: refused if a test subject was in a training split there."""
    nested: str = "few"
    """Whether every labelled subject is cross-fitted too: `few` (scan-level runs with fewer than 20 test subjects),
    `always` or `never`."""
    unet_steps: int = 200
    """Of the U-Net from scratch beside frozen segmentation heads; 0 for none, which the page then says."""
    features: str = ""
    """Folder where embeddings rest, such as that of `adapt`'s `features=DIR`; beside the report if left out."""
    commercial: bool = False
    """Say that the use is commercial: runs over weights whose licence forbids that are refused."""


def evaluate(
    runs: list[Path],
    /,
    *,
    store: Path,
    labels: Path,
    out: Path,
    how: Annotated[Judging, Parameter(name="*")] = Judging(),
    json: bool = False,
) -> int:
    """Score adapted runs on held-out subjects, with intervals and beside honest baselines.

    For example:

        voxelstem evaluate runs/probe --store store --labels labels.csv --out report

        voxelstem evaluate runs/probe --store S --labels labels.csv --pretrained-on pool --nested always --out report

    Args:
        runs: Folders of adapted runs.
        store: Folder of the store.
        labels: The file that `adapt` was given, or one of the same form.
        out: Folder of the report.
        how: What is looked at.
        json: Answer in JSON.
    """
    from voxelstem import evaluate as verb

    try:
        config = verb.EvaluateConfig(
            pretrained_on=how.pretrained_on,
            nested=how.nested,  # pyright: ignore[reportArgumentType]  # it looks for itself
            unet_steps=how.unet_steps,
            features=how.features,
        )
    except ValueError as error:
        raise ConfigError(str(error), hint="see `voxelstem evaluate --help`") from error
    found = verb.run(runs, store=store, labels=labels, out=out, commercial=how.commercial, config=config)
    page = str(out / "index.html")
    answer(found.facts() | {"report": page}, page, as_json=json)
    return DONE


@dataclass(frozen=True, kw_only=True, slots=True)
class Telling:
    """What is written of what was found."""

    format: str = ""
    """Formats, with commas between: json, nifti, seg (DICOM SEG), sr (DICOM SR, TID 1500). Left out: json, and nifti
    where voxels are labelled."""
    max_ram: float = 0.0
    """GiB that the process may hold; a scan that needs more is refused. 0 sets no limit."""
    least_mm3: float = 0.0
    """Smaller pieces of a structure are not listed by themselves."""
    region: Path | None = None
    """A mask of the region that the run looks at, on the scan's grid; for one scan."""
    box: str | None = None
    """The region as a box in mm in the patient (RAS+), from its low to its high corner: --box=-90,-20,40:-60,15,70."""
    repair: bool = False
    """Resample a DICOM series with gantry tilt or uneven slices instead of refusing it."""
    commercial: bool = False
    """Say that the use is commercial: weights whose licence forbids that are refused."""


def predict(
    sources: list[Path],
    /,
    *,
    weights: Path,
    out: Path,
    how: Annotated[Telling, Parameter(name="*")] = Telling(),
    json: bool = False,
) -> int:
    """Say what an adapted run finds in scans. Everything it says is preliminary: a physician must read the images.

    For example:

        voxelstem predict scan.nii.gz --weights runs/probe --out found

        voxelstem predict CT_FOLDER --weights runs/probe --out found --format seg,sr,json --max-ram 4

    Args:
        sources: Files, folders of scans.
        weights: Folder of an adapted run.
        out: Folder of what is written; files are named by hashes.
        how: What is written.
        json: Answer in JSON.
    """
    from voxelstem import predict as verb

    try:
        config = verb.PredictConfig(
            formats=tuple(name.strip() for name in how.format.split(",") if name.strip()),
            max_ram_gib=how.max_ram,
            least_mm3=how.least_mm3,
            region=how.region,
            box_ras_mm=box_ras_mm(how.box),
            repair=how.repair,
            commercial=how.commercial,
        )
    except ValueError as error:
        raise ConfigError(str(error), hint="see `voxelstem predict --help`") from error
    found = verb.run(sources, weights=weights, out=out, how=config)
    lines = [str(path) for path in found.files]
    facts = {
        "files": lines,
        "findings": [len(one.findings) for one in found.findings],
        "refused": listed(found.refusals),
    }
    answer(facts, "\n".join([*lines, *refused(found.refusals)]), as_json=json)
    return verdict(len(found.findings), len(found.refusals), "look into the reasons above")
