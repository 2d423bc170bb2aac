from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from voxelstem.intake import Intake, IntakeConfig, Task
from voxelstem.sources import Source, iterate, nifti
from voxelstem.sources.bids import read_dataset
from voxelstem.store.subjects import pseudonym

KEY = bytes(range(32))
AFFINE = np.array([[-2.0, 0, 0, 30], [0, -2, 0, 40], [0, 0, 3, -50], [0, 0, 0, 1]])


def scan(path: Path, *, low: int = -1000) -> Path:
    array = np.random.default_rng(0).integers(low, 400, (24, 20, 16)).astype(np.int16)
    array[:4] = low
    nifti.write(path, array, AFFINE)
    return path


def task(path: Path, **rest: object) -> Task:
    (source,) = iterate(path)
    return Task(source=source, name="n", **rest)


@pytest.mark.parametrize(
    "wrong",
    [{"spacing_mm": (0.0, 1.0, 1.0)}, {"spacing_mm": (1.0, float("inf"), 1.0)}, {"keep_native": True}],
)
def test_impossible_wishes_are_refused(wrong):
    with pytest.raises(ValueError, match="spacing_mm"):
        IntakeConfig(**wrong)


def test_an_intake_travels_and_does_not_show_its_key():
    intake = Intake(key=KEY)
    assert pickle.loads(pickle.dumps(intake)) == intake
    assert "key" not in repr(intake)


def test_a_scan_comes_out_encoded_under_a_pseudonym(tmp_path):
    outcome = Intake(key=KEY)(task(scan(tmp_path / "miller.nii.gz")))
    assert (outcome.code, outcome.study.subject) == ("", pseudonym("miller", KEY))
    assert outcome.study.volumes[0].shape_ijk == (24, 20, 16)
    assert "miller" not in repr(outcome)


def test_what_is_known_is_not_read_again_until_the_wishes_change(tmp_path):
    path = scan(tmp_path / "a.nii.gz")
    first = Intake(key=KEY)(task(path))
    again = task(path, known=first.fingerprint)
    assert Intake(key=KEY)(again).study is None
    assert Intake(key=KEY, config=IntakeConfig(spacing_mm=(4.0, 4.0, 4.0)))(again).study is not None


def test_resampling_happens_once_here_and_the_native_scan_stays_by_choice(tmp_path):
    path = scan(tmp_path / "a.nii.gz")
    coarse = IntakeConfig(spacing_mm=(4.0, 4.0, 6.0))
    (volume,) = Intake(key=KEY, config=coarse)(task(path)).study.volumes
    assert (volume.shape_ijk, volume.spacing_mm, volume.native) == ((12, 10, 8), (4.0, 4.0, 6.0), None)
    assert any("resampled from 2 x 2 x 3 mm" in note for note in volume.provenance.notes)
    both = IntakeConfig(spacing_mm=(4.0, 4.0, 6.0), keep_native=True)
    (kept,) = Intake(key=KEY, config=both)(task(path)).study.volumes
    (plain,) = Intake(key=KEY)(task(path)).study.volumes
    assert (kept.key, kept.native.key) == (volume.key, plain.key)
    same = IntakeConfig(spacing_mm=(2.0, 2.0, 3.0), keep_native=True)
    (as_it_was,) = Intake(key=KEY, config=same)(task(path)).study.volumes
    assert (as_it_was.key, as_it_was.native) == (plain.key, None), "what has the spacing already is kept once"


def test_a_mask_is_laid_before_the_scan_is_resampled(tmp_path):
    path = scan(tmp_path / "a.nii.gz")
    nifti.write(tmp_path / "labels" / "a.nii.gz", np.ones((24, 20, 16), np.uint8), AFFINE)
    coarse = Intake(key=KEY, config=IntakeConfig(spacing_mm=(4.0, 4.0, 6.0)))
    outcome = coarse(task(path, mask=tmp_path / "labels" / "a.nii.gz", classes={1: "liver"}))
    assert outcome.mask_code == ""
    assert outcome.study.volumes[0].labels.classes == {1: "liver"}


def test_a_mask_on_another_grid_is_told_and_the_scan_kept(tmp_path):
    path = scan(tmp_path / "a.nii.gz")
    nifti.write(tmp_path / "labels" / "a.nii.gz", np.ones((3, 3, 3), np.uint8), AFFINE)
    outcome = Intake(key=KEY)(task(path, mask=tmp_path / "labels" / "a.nii.gz"))
    assert (outcome.code, outcome.mask_code) == ("", "label-grid")
    assert outcome.study is not None


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "corrupt"),
        (lambda path: path.unlink(), "unreadable"),
        (lambda path: scan(path, low=0), "wrong-modality"),
    ],
)
def test_what_is_wrong_with_a_scan_is_said_without_its_name(tmp_path, spoil, code):
    path = scan(tmp_path / "miller-hans.nii.gz")
    (source,) = iterate(path)
    spoil(path)
    outcome = Intake(key=KEY, config=IntakeConfig(modality="CT"))(Task(source=source, name="n"))
    assert (outcome.code, outcome.study) == (code, None)
    assert "miller" not in outcome.reason


class Hungry(Source):
    def read(self, *, repair: bool = False):  # noqa: ARG002
        raise MemoryError


def test_a_scan_for_which_there_is_no_memory_is_refused(tmp_path):
    path = scan(tmp_path / "a.nii.gz")
    source = Hungry(path=path, relative=path.name, kind="nifti", subject="a")
    assert Intake(key=KEY)(Task(source=source, name="n")).code == "too-large"


def test_a_bids_scan_brings_what_its_tables_say(tmp_path):
    path = scan(tmp_path / "sub-07" / "ses-2" / "anat" / "sub-07_ses-2_T1w.nii.gz", low=0)
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsex\nsub-07\t93\tF\n")
    path.with_name("sub-07_ses-2_T1w.json").write_text(
        json.dumps({"MagneticFieldStrength": 3, "PatientName": "Miller"})
    )
    (source,) = iterate(tmp_path)
    intake = Intake(key=KEY, datasets=(read_dataset(tmp_path),))
    (volume,) = intake(Task(source=source, name="n")).study.volumes
    said = volume.acquisition
    assert (said.session, said.contrast, said.age_years, said.sex) == ("2", "T1w", 90.0, "F")
    assert said.facts["MagneticFieldStrength"] == "3"
    assert "Miller" not in repr(volume)


def test_a_scan_that_got_in_stays_when_other_wishes_would_refuse_it(tmp_path):
    path = scan(tmp_path / "a.nii.gz")
    first = Intake(key=KEY)(task(path))
    only_mr = Intake(key=KEY, config=IntakeConfig(modality="MR"))
    assert only_mr(task(path)).code == "wrong-modality"
    again = only_mr(task(path, known=first.fingerprint))
    assert (again.code, again.study, again.fingerprint) == ("", None, first.fingerprint)
    path.write_bytes(path.read_bytes()[:-9])
    assert only_mr(task(path, known=first.fingerprint)).code == "corrupt", "other bytes are another matter"


@pytest.mark.parametrize("name", ["Miller_" + "x" * 140, "Miller_\u200bPaul"])
def test_long_and_unprintable_names_are_taken_out_too(tmp_path, name):
    path = tmp_path / f"{name}.nii.gz"
    path.write_bytes(b"nothing")
    outcome = Intake(key=KEY)(task(path))
    assert outcome.code == "corrupt"
    assert "Miller" not in outcome.reason


def test_a_zip_that_can_no_longer_be_listed_is_refused_and_nothing_else_happens(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("miller.dcm", b"nothing")
    source = Source(path=path, relative="a.zip", kind="dicom", subject="a", members=("miller.dcm",))
    whole = path.read_bytes()
    at = whole.index(b"PK\1\2")
    path.write_bytes(whole[:at] + b"PK\1\3" + whole[at + 4 :])
    assert Intake(key=KEY)(Task(source=source, name="n")).code in ("corrupt", "empty")
