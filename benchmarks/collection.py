"""Stores for the learning benchmark: what may be pretrained on, and apart from it the scans that are tested on.

Reads a folder of public CTs laid out as `starter/`, `ct/` and `sts/` (see ROLES). Each store gets links to its scans,
named by patient, so that `ingest` takes the patient from the folder; nothing is copied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from voxelstem.errors import AuditError
from voxelstem.ingest import ingest, ingest_studies
from voxelstem.intake import IntakeConfig
from voxelstem.samples import ORGANS
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Fractions, Store
from voxelstem.store.leakage import leakage
from voxelstem.store.subjects import pseudonym, site_key

ALL_TRAIN = Fractions(train=1.0, validation=0.0, test=0.0)
ALL_TEST = Fractions(train=0.0, validation=0.0, test=1.0)
MIXED = Fractions(train=0.6, validation=0.0, test=0.4)
GTV = "tumour"
SEEN = {
    "crlm_1004": "starter/crlm_1004.nii.gz",
    "crlm_1006": "starter/crlm_1006.nii.gz",
    "lidc_0001": "starter/lidc_0001.nii.gz",
    "lidc_0002": "starter/lidc_0002.nii.gz",
    "lidc_0003": "starter/lidc_0003.nii.gz",
    "lidc_0314": "starter/lidc_0314.nii.gz",
    "STS_007": "starter/sts_007_ct.nii.gz",
    "STS_037": "starter/sts_037_ct.nii.gz",
    "ts_aorta": "ct/ts_aorta_full.nii.gz",
    "hemithorax": "ct/3DCT_lung.mha",
}
"""Real CTs to pretrain on, by patient. The sarcomas with a CT in `sts/` are tested on: none of their scans is here."""
MANY_ORGANS = {
    "ts_abdomen": ("starter/ts_example_ct.nii.gz", "starter/ts_example_seg_fast_force_split.nii.gz"),
    "ts_upper_abdomen": ("ct/ts_dicom_j2k", "ct/ts_dicom_j2k_labels.nii.gz"),
}
"""The two CTs with many organs, which no pretraining here sees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collection:
    """The stores of one benchmark; `sarcomas` and `organs` only where there are real scans."""

    seen: tuple[Path, ...]
    """One for each fold of the sarcoma patients, with all that is pretrained on: phantoms of training subjects, real
    CTs, and the sarcomas of the other folds without their masks."""
    phantoms: Path
    sarcomas: Path | None = None
    """Every scan in it carries `GTV`."""
    held_out: tuple[frozenset[str], ...] = ()
    """Subjects of each fold of the sarcomas."""
    organs: Path | None = None


def collect(out: Path, *, phantoms: int, folds: int, coarse: bool, data: Path | None) -> Collection:
    """Make the stores below `out`, or go on where it stopped.

    Raises:
        AuditError: a scan that is tested on, or a copy of it, is among those that are pretrained on.
    """
    drawn = draw_phantoms(out / "store", range(phantoms), MIXED, coarse=coarse)
    learned = Store.open(drawn).subjects("train")
    train = [seed for seed in range(phantoms) if pseudonym(f"phantom-{seed:04d}", site_key()) in learned]
    seen = tuple(
        draw_phantoms(out / f"seen-{fold}-of-{folds}", train, ALL_TRAIN, coarse=coarse) for fold in range(folds)
    )
    if data is None:
        return Collection(seen=seen, phantoms=drawn)
    scans = {scan.parent.name: scan for scan in sorted(data.glob("sts/*/CT_image.nii.gz"))}
    masks = {patient: (scan, scan.with_name("CT_mask.nii.gz")) for patient, scan in scans.items()}
    sarcomas = test_store(out, "sarcomas", masks, {1: GTV})
    many = {patient: (data / scan, data / mask) for patient, (scan, mask) in MANY_ORGANS.items()}
    names = dict.fromkeys(range(1, 256), "another organ")
    names |= {value: name for name, values in ORGANS.items() for value in values}
    organs = test_store(out, "organs", many, names)
    held_out: list[frozenset[str]] = []
    for fold, root in enumerate(seen):
        others = {patient: scan for place, (patient, scan) in enumerate(scans.items()) if place % folds != fold}
        keep(out, root, {patient: data / scan for patient, scan in SEEN.items()} | others)
        held_out.append(frozenset(pseudonym(patient, site_key()) for patient in scans if patient not in others))
        check_apart(root, organs, set(Store.open(organs).subjects()))
        check_apart(root, sarcomas, held_out[-1])
    return Collection(seen=seen, phantoms=drawn, sarcomas=sarcomas, held_out=tuple(held_out), organs=organs)


def check_apart(seen: Path, tested: Path, subjects: Set[str]) -> None:
    """See that nothing of these subjects, not even a near copy under another name, is among what is pretrained on.

    Raises:
        AuditError: something is.
    """
    found = leakage(seen, tested, site_key())
    shared = {key for one in (*found.subjects, *found.acquisitions) for key in one.in_b}
    shared |= {copy.key_b for copy in found.copies}
    store = Store.open(tested)
    count = sum(store.record(key).subject in subjects for key in shared)
    if count:
        raise AuditError(f"{count} of the scans of '{tested.name}' that are tested on are in '{seen.name}' too")


def draw_phantoms(root: Path, seeds: Sequence[int], fractions: Fractions, *, coarse: bool) -> Path:
    """Phantoms with these seeds; those that are in the store already are not drawn again."""
    store = Store.open(root) if root.exists() else Store.create(root, fractions=fractions)
    known = set(store.subjects())
    wanted = [PhantomConfig(seed=seed, spacing_mm=(6.0, 6.0, 6.0) if coarse else "random") for seed in seeds]
    missing = [one for one in wanted if pseudonym(f"phantom-{one.seed:04d}", site_key()) not in known]
    ingest_studies((phantom(one) for one in missing), root)
    return root


def test_store(out: Path, name: str, scans: Mapping[str, tuple[Path, Path]], classes: Mapping[int, str]) -> Path:
    """A store of scans with masks, all of them test subjects."""
    root = out / name
    if not root.exists():
        Store.create(root, fractions=ALL_TEST)
    labels = out / "links" / f"{name}_labels"
    labels.mkdir(parents=True, exist_ok=True)
    for patient, (_, mask) in scans.items():
        link(labels / f"{patient}/ct.nii.gz", mask)
    about = {"classes": {str(value): organ for value, organ in classes.items()}}
    (labels / "labels.json").write_text(json.dumps(about))
    keep(out, root, {patient: scan for patient, (scan, _) in scans.items()}, labels=labels)
    return root


def keep(out: Path, root: Path, scans: Mapping[str, Path], *, labels: Path | None = None) -> None:
    """Ingest scans by way of links that are named by patient.

    Raises:
        AuditError: not every scan got in.
    """
    links = out / "links" / root.name
    for patient, scan in scans.items():
        members = sorted(scan.iterdir()) if scan.is_dir() else [scan]
        for member in members:
            ending = "".join(member.suffixes[-2:] if member.name.endswith(".gz") else member.suffixes[-1:])
            link(links / patient / (f"ct/{member.name}" if scan.is_dir() else f"ct{ending}"), member)
    report = ingest([links], root, labels=labels, config=IntakeConfig(modality="CT"))
    if report.refused:
        raise AuditError(f"{report.refused} of the scans for '{root.name}' were refused: {report.refusals}")


def link(place: Path, target: Path) -> None:
    """Link to a file, once."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_symlink():
        place.symlink_to(target.resolve())
