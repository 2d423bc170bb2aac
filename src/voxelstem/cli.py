"""The command line: each command parses little and calls one verb.

Results go to stdout, progress and errors to stderr. Exit codes: 0 all done, 2 wrong use or refused input,
3 finished but some items were refused, 130 stopped by the keyboard.
"""

from __future__ import annotations

import errno
import json as jsonlib
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from cyclopts import App, CycloptsError, Parameter

from voxelstem import __version__
from voxelstem.config import overlay, parse_assignments, read_toml
from voxelstem.errors import VoxelstemError

DONE, WRONG, SOME_REFUSED, INTERRUPTED = 0, 2, 3, 130

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
        return _tell(str(error), "`voxelstem COMMAND --help` shows an example")
    except VoxelstemError as error:
        return _tell(error.problem, error.hint)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our answer (`| head`) has gone; without this, Python's last flush would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        return _tell(*_explain(error))
    return code if isinstance(code, int) else DONE


@runtime_checkable
class _Refusal(Protocol):
    """What a verb says of a scan that it did not take."""

    @property
    def relative(self) -> str: ...
    @property
    def code(self) -> str: ...
    @property
    def reason(self) -> str: ...


def _tell(problem: str, hint: str) -> int:
    sys.stderr.write(f"error: {problem}\n" + (f"  hint: {hint}\n" if hint else ""))
    return WRONG


def _explain(error: OSError) -> tuple[str, str]:
    name = f": '{Path(str(error.filename)).name}'" if error.filename else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "the disk is full", "free some space and run the same command again: what was finished is kept"
        case errno.ENOENT:
            return f"no such file or folder{name}", "check the path"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"no permission{name}", "check who may read and write there"
        case _:
            return f"{error.strerror or error}{name}".lower(), ""


def _answer(data: Any, text: str, *, as_json: bool) -> None:
    sys.stdout.write((jsonlib.dumps(data, indent=2, default=str) if as_json else text) + "\n")


def _refused(refusals: Iterable[_Refusal]) -> list[str]:
    return [f"refused ({line.code}) {line.relative}: {line.reason}" for line in refusals]


def _listed(refusals: Iterable[_Refusal]) -> list[dict[str, str]]:
    return [{"scan": line.relative, "code": line.code, "reason": line.reason} for line in refusals]


def _verdict(through: int, refused: int, hint: str) -> int:
    """The exit code of a command that takes many scans: all refused is refused input, not a job half done."""
    if refused and not through:
        return _tell("nothing got in: every scan was refused", hint)
    return SOME_REFUSED if refused else DONE


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
    _answer(asdict(found), f"scans: {found.scans}\nlabels: {found.labels}\nmr: {found.mr}", as_json=json)
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
    _answer({"report": str(page)}, str(page), as_json=False)
    return DONE


def ingest(
    sources: list[Path],
    /,
    *,
    store: Path,
    workers: int = 1,
    labels: Path | None = None,
    reports: Path | None = None,
    modality: Literal["CT", "MR"] | None = None,
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
        reports: File with the reports' texts, .jsonl or .csv.
        modality: Keep scans of this modality only; refuse all others.
        json: Answer in JSON.
    """
    from voxelstem import ingest as verb

    outcome = verb.ingest(sources, store, workers=workers, labels=labels, reports=reports, modality=modality)
    facts = {name: value for name, value in asdict(outcome).items() if name != "refusals"}
    facts["refusals"] = _listed(outcome.refusals)
    lines = _refused(outcome.refusals)
    lines += [f"{outcome.kept} kept, {outcome.skipped} there already, {outcome.refused} refused"]
    if outcome.reports_unused:
        lines += [f"reports unused: {outcome.reports_unused} (their scans were not among the sources)"]
    lines += [f"{outcome.subjects} subjects in {store}"]
    _answer(facts, "\n".join(lines), as_json=json)
    return _verdict(outcome.kept + outcome.skipped, outcome.refused, f"`voxelstem show {store}` lists what was refused")


def show(path: Path, /, *, json: bool = False) -> int:
    """Explain a scan, a store, a run, weights or a report.

    For example:

        voxelstem show store --json

    Args:
        path: What to explain.
        json: Answer in JSON.
    """
    from voxelstem import show as verb

    facts = verb.show(path)
    _answer(facts, verb.describe(facts), as_json=json)
    return DONE


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
        _answer(cost, "\n".join(f"{name}: {value}" for name, value in cost.items()), as_json=json)
        return DONE
    verb.run(resolved, store=store, out=out)
    _answer({"weights": str(out / "weights")}, str(out / "weights"), as_json=json)
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
    facts |= {"refusals": _listed(outcome.refusals)}
    text = "\n".join([*_refused(outcome.refusals), f"{outcome.kept} embedded, {outcome.refused} refused, in {out}"])
    _answer(facts, text, as_json=json)
    return _verdict(outcome.kept, outcome.refused, "give scans of the weights' modality that `voxelstem show` can read")


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
    _answer({"run": str(done)}, str(done), as_json=False)
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
    _answer(found.facts() | {"report": page}, page, as_json=json)
    return DONE


# In the order of the journey, which is also the order of --help.
for _place, _command in enumerate((samples, demo, ingest, show, pretrain, embed, adapt, evaluate)):
    app.command(_command, sort_key=_place)
