"""Commands about scans: fetch some, read them into a store, explain what lies there, write it for others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from voxelstem.cli.triples import place, spacing_mm
from voxelstem.errors import ConfigError
from voxelstem.terminal import DONE, SOME_REFUSED, answer, listed, refused, verdict


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
    volumes: tuple[Path, ...] = ()
    """Tables of structures' volumes such as SynthSeg's; they become scan-level labels `volume:<structure>`."""
    qc: tuple[Path, ...] = ()
    """Tables of scores for these volumes."""

    def check(self) -> None:
        """Refuse options that mean nothing without another.

        Raises:
            ConfigError: there is one.
        """
        if self.keep_native and self.spacing is None:
            raise ConfigError("--keep-native keeps the scan beside the resampled one", hint="add --spacing a,b,c")
        if self.qc and not self.volumes:
            raise ConfigError("--qc scores volumes, and there are none", hint="add --volumes FILE")


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
    how.check()
    config = IntakeConfig(
        modality=how.modality, spacing_mm=spacing_mm(how.spacing), keep_native=how.keep_native, repair=how.repair
    )
    outcome = verb.ingest(
        sources, store, workers=workers, cluster=cluster, labels=labels, reports=reports, config=config
    )
    noted = verb.note_volumes(sources, store, volumes=how.volumes, qc=how.qc) if how.volumes else None
    facts = {name: value for name, value in asdict(outcome).items() if name != "refusals"}
    facts["refusals"] = listed(outcome.refusals)
    lines = refused(outcome.refusals)
    lines += [f"{outcome.kept} kept, {outcome.skipped} there already, {outcome.refused} refused"]
    if outcome.reports_unused:
        lines += [f"reports unused: {outcome.reports_unused} (their scans were not among the sources)"]
    if outcome.reports_empty:
        lines += [f"reports empty: {outcome.reports_empty} (rows without a text)"]
    if noted is not None:
        facts["volumes"] = asdict(noted)
        lines += [
            f"volumes noted for {noted.scans} scans; of the tables' scans {noted.unusable} have no usable volumes and "
            f"{noted.unmatched} are not among the sources"
        ]
    lines += [f"{outcome.subjects} subjects in {store}"]
    answer(facts, "\n".join(lines), as_json=json)
    return verdict(outcome.kept + outcome.skipped, outcome.refused, f"`voxelstem show {store}` lists what was refused")


def show(
    path: Path,
    /,
    *,
    verify: bool = False,
    against: Path | None = None,
    weights: str | None = None,
    at: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    out: Path | None = None,
    commercial: bool = False,
    json: bool = False,
) -> int:
    """Explain a scan, a store, a run, weights or a report; compare two stores; or draw what weights see in a scan.

    For example:

        voxelstem show store --json

    The page of a pretraining run, finished or not:

        voxelstem show runs/first --out first.html

    The tokens and the attention of some weights over a scan:

        voxelstem show scan.nii.gz --weights weights --at 120,96,40 --out inside.png

    Args:
        path: What to explain.
        verify: Compare every voxel of a store with its checksum, however large the store is.
        against: Another store, or a label file: lists subjects, acquisitions and copies that both hold. The same store
            again compares its training, validation and test parts.
        weights: Draw what these make of a scan: a folder, a name that `voxelstem models` lists, or hub:owner/name.
        at: With --weights, the place that the others are compared with: a voxel counted from 0 along right, front and
            head, or mm in the patient, such as -20,35,110mm; the centre of the body when left out.
        out: Of a run, the file of the page that is drawn of it. With --weights, the picture's file; inside.png when
            left out.
        commercial: Say that the use is commercial: weights whose licence forbids that are refused.
        json: Answer in JSON.
    """
    if [verify, against is not None, weights is not None].count(True) > 1:
        raise ConfigError("--verify, --against and --weights are three questions", hint="ask one after the other")
    if weights is not None:
        return _inside(path, weights, at, out or Path("inside.png"), commercial=commercial, as_json=json)
    if out is not None and at is None and (path / "journal.jsonl").is_file():
        return _page(path, out, as_json=json)
    if at is not None or out is not None or commercial:
        raise ConfigError("--at, --out and --commercial are for the picture that weights make", hint="add --weights W")
    if against is not None:
        return _shared(path, against, as_json=json)
    from voxelstem import show as verb
    from voxelstem.report.words import describe

    facts = verb.show(path, verify=verify)
    answer(facts, describe(facts), as_json=json)
    return SOME_REFUSED if facts.get("damaged") else DONE


def _page(run: Path, out: Path, *, as_json: bool) -> int:
    from voxelstem import show as verb

    page = verb.run_page(run, out)
    answer({"page": str(page)}, str(page), as_json=as_json)
    return DONE


def _shared(path: Path, against: Path, *, as_json: bool) -> int:
    from voxelstem.store import leakage
    from voxelstem.store.subjects import site_key

    found = leakage.leakage(path, against, site_key())
    answer(found.facts(), leakage.describe(found), as_json=as_json)
    # What could not be compared (other keys) must not look like a clean answer; a label file holds no copies.
    lacking = any(not why.startswith("copies:") for why in found.unchecked)
    return SOME_REFUSED if found.found or lacking else DONE


def _inside(path: Path, weights: str, at: str | None, out: Path, *, commercial: bool, as_json: bool) -> int:
    from voxelstem import show as verb
    from voxelstem.report.words import describe

    at_ijk, at_mm = place(at)
    facts = verb.inside(path, weights=weights, out=out, at_ijk=at_ijk, at_mm=at_mm, commercial=commercial)
    answer(facts, describe(facts), as_json=as_json)
    return DONE


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
