"""The command line: each command parses little and calls one verb.

Results go to stdout, progress and errors to stderr. Exit codes: 0 all done, 2 wrong use or refused input,
3 finished but some items were refused, 130 stopped by the keyboard.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from voxelstem import __version__
from voxelstem.config import overlay, parse_assignments, read_toml
from voxelstem.errors import ConfigError, VoxelstemError
from voxelstem.terminal import DONE, INTERRUPTED, SOME_REFUSED, answer, explain, listed, refused, tell, verdict

app = App(
    name="voxelstem",
    help="Foundation models for CT and MRI scans: from files to a pretrained, adapted and measured model.",
    version=__version__,
    default_parameter=Parameter(negative="", show_env_var=False),
)


def main(words: Sequence[str] | None = None) -> None:
    """Run one command line (the process's own by default) and end the process with its exit code."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    sys.exit(run(sys.argv[1:] if words is None else words))


def run(words: Sequence[str]) -> int:
    """Run one command line and return its exit code; whatever the user can act on is told in one clear sentence."""
    try:
        code = app(words, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()  # here, where a full disk can still be told in words
    except CycloptsError as error:
        return tell(str(error), "`voxelstem COMMAND --help` shows an example")
    except VoxelstemError as error:
        return tell(error.problem, error.hint)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our answer (`| head`) has gone; without this, Python's last flush would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        return tell(*explain(error))
    return code if isinstance(code, int) else DONE


def _triple(text: str | None) -> tuple[float, float, float] | None:
    """Read three lengths in mm."""
    if text is None:
        return None
    try:
        i, j, k = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"'{text}' is no spacing", hint="write three numbers, such as --spacing 1.5,1.5,3") from error
    if not all(0 < edge < math.inf for edge in (i, j, k)):
        raise ConfigError(f"'{text}' is no spacing: each number must be above 0", hint="such as --spacing 1.5,1.5,3")
    return i, j, k


def samples(*, out: Path = Path("samples"), json: bool = False) -> int:
    """Fetch a few real scans with labels, checked against known digests.

    For example:

        voxelstem samples --out samples

    Args:
        out: Folder that receives the scans; SOURCES.md there names their licences.
        json: Answer in JSON.
    """
    from voxelstem import samples as verb

    found = verb.fetch(out)
    answer(asdict(found), f"scans: {found.scans}\nlabels: {found.labels}\nmr: {found.mr}", as_json=json)
    return DONE


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
class Reading:
    """What is done with every scan."""

    modality: Literal["CT", "MR"] | None = None
    """Keep scans of this modality only; refuse all others."""
    spacing: str | None = None
    """Resample every scan to this spacing in mm along right, anterior and superior, such as 1.5,1.5,3."""
    keep_native: bool = False
    """Keep each scan as it was beside the resampled one."""
    repair: bool = False
    """Resample gantry tilt and uneven slices instead of refusing them; the provenance says what was done."""


def ingest(
    sources: list[Path],
    /,
    *,
    store: Path,
    workers: int = 1,
    labels: Path | None = None,
    reports: Path | None = None,
    cluster: str | None = None,
    how: Annotated[Reading | None, Parameter(name="*")] = None,
    json: bool = False,
) -> int:
    """Read scans, check them and keep them in a store; what is refused stands in the store's ledger.

    For example:

        voxelstem ingest scans/ --store store --labels masks/

    Args:
        sources: Scans (.nii, .nii.gz, .nrrd, .mha), DICOM folders, or folders with many of them.
        store: Folder of the store; made when it is not there, added to when it is.
        workers: Processes that read scans side by side.
        labels: Folder of masks with the scans' relative paths; its labels.json names classes and what was looked for.
        reports: File with the reports' texts, .jsonl, .csv or .xlsx; the columns of CT-RATE and Merlin are known.
        cluster: Address of a Ray cluster that reads in place of the workers, such as head:6379.
        how: What is done with every scan.
        json: Answer in JSON.
    """
    from voxelstem import ingest as verb
    from voxelstem.intake import IntakeConfig

    how = how or Reading()
    if workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}")
    if how.keep_native and how.spacing is None:
        raise ConfigError("--keep-native keeps the scan beside the resampled one", hint="add --spacing a,b,c")
    config = IntakeConfig(
        modality=how.modality, spacing_mm=_triple(how.spacing), keep_native=how.keep_native, repair=how.repair
    )
    outcome = verb.ingest(
        sources, store, workers=workers, cluster=cluster, labels=labels, reports=reports, config=config
    )
    facts = {name: value for name, value in asdict(outcome).items() if name != "refusals"}
    facts["refusals"] = listed(outcome.refusals)
    lines = refused(outcome.refusals)
    lines += [f"{outcome.kept} kept, {outcome.skipped} there already, {outcome.refused} refused"]
    if outcome.reports_unused:
        lines += [f"reports unused: {outcome.reports_unused} (their scans were not among the sources)"]
    lines += [f"{outcome.subjects} subjects in {store}"]
    answer(facts, "\n".join(lines), as_json=json)
    return verdict(outcome.kept + outcome.skipped, outcome.refused, f"`voxelstem show {store}` lists what was refused")


def show(path: Path, /, *, verify: bool = False, against: Path | None = None, json: bool = False) -> int:
    """Explain a scan, a store, a run, weights or a report; or say what two stores share.

    For example:

        voxelstem show store --json

    Args:
        path: What to explain.
        verify: Compare every voxel of a store with its checksum, however large the store is.
        against: Another store, or a label file: lists subjects, acquisitions and copies that both hold. The same store
            again compares its training, validation and test parts.
        json: Answer in JSON.
    """
    if against is not None:
        if verify:
            raise ConfigError("--verify and --against are two questions", hint="ask one after the other")
        from voxelstem.store import leakage
        from voxelstem.store.subjects import site_key

        found = leakage.leakage(path, against, site_key())
        answer(found.facts(), leakage.describe(found), as_json=json)
        # What could not be compared (other keys) must not look like a clean answer; a label file holds no copies.
        lacking = any(not why.startswith("copies:") for why in found.unchecked)
        return SOME_REFUSED if found.found or lacking else DONE
    from voxelstem import show as verb

    facts = verb.show(path, verify=verify)
    answer(facts, verb.describe(facts), as_json=json)
    return SOME_REFUSED if facts.get("damaged") else DONE


def export(
    layout: Literal["nifti", "nnunet", "nnunet-b2nd", "nnssl", "tiles"],
    /,
    *,
    store: Path,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Write a store for other programs, or its scans as raw tiles for reading straight to a GPU.

    For example:

        voxelstem export nifti --store store --out exported

    Args:
        layout: `nifti` (one .nii.gz a scan, labels beside), `nnunet` (its raw dataset), `nnunet-b2nd` and `nnssl`
            (their preprocessed folders), or `tiles` (kept inside the store).
        store: Folder of the store.
        out: Folder that receives the files; not for tiles.
        json: Answer in JSON.
    """
    from voxelstem import exchange
    from voxelstem.store import Store
    from voxelstem.store.tiles import write_all

    opened = Store.open(store)
    if layout == "tiles":
        size = write_all(opened)
        answer({"bytes": size}, f"{size / 1e6:.1f} MB of tiles in {store}", as_json=json)
        return DONE
    if out is None:
        raise ConfigError(f"export {layout} needs a folder", hint="add --out DIR")
    match layout:
        case "nifti":
            done = exchange.export_nifti(opened, out)
        case "nnunet":
            done = exchange.export_nnunet(opened, out)
        case _:
            done = exchange.export_b2nd(opened, out, layout="nnssl" if layout == "nnssl" else "nnunet")
    left = f", {done.left_out} left out: the format has no place for them" if done.left_out else ""
    answer(asdict(done), f"{done.kept} scans in {out}{left}", as_json=json)
    return SOME_REFUSED if done.left_out else DONE


def pretrain(
    recipe: str,
    /,
    *settings: str,
    store: Path,
    out: Path,
    config: Path | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> int:
    """Train a backbone on the scans of a store, without labels. Started again, it resumes; when finished, it stays.

    For example:

        voxelstem pretrain tiny --store store --out runs/first steps=200

    Args:
        recipe: Name of a complete config, such as `tiny`.
        settings: Differences from the recipe, such as `optim.lr=0.001`; they win over --config.
        store: Folder of the store.
        out: Folder of the run.
        config: TOML file with differences from the recipe.
        dry_run: Say what would run and what it would cost, but train nothing.
        json: Answer in JSON.
    """
    from voxelstem import pretrain as verb
    from voxelstem import recipes

    changes = (read_toml(config) if config else {}) | parse_assignments(settings)
    resolved = overlay(recipes.named(recipe), changes)
    if dry_run:
        cost = verb.estimate(resolved, store=store)
        answer(cost, "\n".join(f"{name}: {value}" for name, value in cost.items()), as_json=json)
        return DONE
    verb.run(resolved, store=store, out=out)
    answer({"weights": str(out / "weights")}, str(out / "weights"), as_json=json)
    return DONE


def embed(
    sources: list[Path],
    /,
    *,
    weights: str,
    out: Path,
    precision: Literal["fp32", "bf16"] = "fp32",
    tokens: bool = False,
    json: bool = False,
) -> int:
    """Turn scans into embeddings, one .npz each and a manifest.csv. Run again, it skips what is done.

    For example:

        voxelstem embed scans/ --weights runs/first/weights --out embeddings

    Args:
        sources: Scans, DICOM folders, or folders with many of them.
        weights: Weights folder.
        out: Folder of the embeddings.
        precision: Number format of the network's arithmetic; embeddings are stored as float32.
        tokens: Keep the patch tokens too; they are large.
        json: Answer in JSON.
    """
    from voxelstem import embed as verb

    outcome = verb.run(sources, weights=weights, out=out, precision=precision, tokens=tokens)
    facts = {"kept": outcome.kept, "skipped": outcome.skipped, "refused": outcome.refused, "out": str(out)}
    facts |= {"refusals": listed(outcome.refusals)}
    text = "\n".join([*refused(outcome.refusals), f"{outcome.kept} embedded, {outcome.refused} refused, in {out}"])
    answer(facts, text, as_json=json)
    return verdict(outcome.kept, outcome.refused, "give scans of the weights' modality that `voxelstem show` can read")


def adapt(
    *settings: str,
    weights: str,
    store: Path,
    labels: Path,
    task: str,
    mode: str,
    out: Path,
    budget: int | None = None,
) -> int:
    """Fit a head on few labels over frozen weights.

    For example:

        voxelstem adapt --weights weights --store store --labels labels.csv --task classify --mode knn --out runs/knn

    The same on that network untrained: `voxelstem adapt like=weights --weights scratch`, and the rest as above.

    Args:
        settings: Differences from the task's own settings, such as `seed=1`.
        weights: Weights folder, or `scratch` for an untrained network; then `like=WEIGHTS` says of which kind.
        store: Folder of the store.
        labels: labels.csv for scan-level tasks; for voxel-level tasks a labels.json with the wanted classes.
        task: What to learn, such as `classify` or `segment`.
        mode: How freely, such as `knn` or `probe`.
        out: Folder of the run.
        budget: Labelled subjects to learn from; all training subjects when left out.
    """
    from voxelstem import adapt as verb

    changes = parse_assignments(settings)
    done = verb.run(
        weights=weights, store=store, labels=labels, task=task, mode=mode, out=out, budget=budget, settings=changes
    )
    answer({"run": str(done)}, str(done), as_json=False)
    return DONE


def evaluate(runs: list[Path], /, *, store: Path, labels: Path, out: Path, json: bool = False) -> int:
    """Score adapted runs on held-out subjects, with intervals and beside honest baselines.

    For example:

        voxelstem evaluate runs/probe --store store --labels labels.csv --out report

    Args:
        runs: Folders of adapted runs.
        store: Folder of the store.
        labels: The file that `adapt` was given, or one of the same form.
        out: Folder of the report.
        json: Answer in JSON.
    """
    from voxelstem import evaluate as verb

    found = verb.run(runs, store=store, labels=labels, out=out)
    page = str(out / "index.html")
    answer(found.facts() | {"report": page}, page, as_json=json)
    return DONE


# In the order of the journey, which is also the order of --help.
for _place, _command in enumerate((samples, demo, ingest, show, export, pretrain, embed, adapt, evaluate)):
    app.command(_command, sort_key=_place)
