from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.fewlabelled import make_store

from voxelstem.artefact import (
    SEAL,
    Calibration,
    LabelFacts,
    Parent,
    RunCard,
    Split,
    check_seal,
    page,
    seal,
    sealed,
)
from voxelstem.certainty.assurance import Assurance
from voxelstem.certainty.calibrators import Temperature
from voxelstem.errors import CheckpointError
from voxelstem.store import Store
from voxelstem.study import Survival
from voxelstem.truth import Truth, told_each

FULL = RunCard(
    task="classify",
    mode="probe",
    title="late phase",
    chosen=True,
    modality="CT",
    fed="fed at 8 x 8 x 8 mm",
    licence="cc-by-nc-4.0",
    parent=Parent(name="spectre-large", sha256="a" * 64, origin="its publisher", licence="cc-by-nc-4.0", repo="a/b"),
    weights_sha256="a" * 64,
    labels=LabelFacts(kind="classes", sha256="b" * 64, scans=12, subjects=11, classes={"no": 10, "yes": 1}),
    splits={"learned": Split(subjects=11, scans=12, sha256="c" * 64), "test": Split()},
    calibration=Calibration(subjects=11, parts=("calibrator", "known"), notes=("no conformal sets: few",)),
    command="voxelstem adapt --task classify",
    version="0.11.0",
    torch="2.0",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("artefact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(folder / "site.key"))
        return make_store(folder, count=4)[0]


def head_of(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---")[1])


def test_a_card_survives_adapt_json():
    assert RunCard.of(json.loads(json.dumps(FULL.facts()))) == FULL
    assert RunCard.of({}) == RunCard()
    assert RunCard.of({"task": "segment", "of a newer version": 3}).task == "segment"


@pytest.mark.parametrize(
    "facts",
    [
        {"task": 3},
        {"labels": {"classes": ["a"]}},
        {"parent": "spectre"},
        {"splits": {"test": []}},
        {"splits": [1]},
        {"labels": {"low": "much"}},
        {"chosen": "yes"},
    ],
    ids=str,
)
def test_a_card_of_another_kind_is_refused(facts: dict[str, object]):
    with pytest.raises(ValueError, match="card"):
        RunCard.of(facts)


def test_the_page_says_every_fact_of_the_card():
    text = page(FULL)
    for said in (
        "# late phase",
        "task `classify`, mode `probe` (chosen by mode `auto`)",
        "Not a medical device",
        "Parent: spectre-large, sha256 `" + "a" * 64,
        "Origin of the parent: its publisher",
        "12 scans of 11 subjects",
        "`yes`: 1 subjects",
        "Label file: sha256 `" + "b" * 64,
        "| learned | 11 | 12 | `" + "c" * 64,
        "On 11 labelled subjects, unseen till asked: probabilities of classes",
        "no conformal sets: few",
        "Fewer than 10 subjects show: yes.",
        "voxelstem 0.11.0 and torch 2.0",
        "voxelstem adapt --task classify",
    ):
        assert said in text
    assert head_of(text) == {
        "library_name": "voxelstem",
        "license": "cc-by-nc-4.0",
        "base_model": "a/b",
        "pipeline_tag": "image-classification",
        "tags": ["voxelstem", "medical-imaging", "ct", "classify", "probe", "non-commercial"],
    }


@pytest.mark.parametrize(
    ("licence", "said", "marked"),
    [
        ("cc-by-nc-sa-4.0", "Not for commercial use.", True),
        ("not stated", "Not for commercial use as long as it is not stated.", False),
        ("apache-2.0", "", False),
    ],
)
def test_a_child_inherits_what_its_parent_may_not_be_used_for(licence: str, said: str, marked: bool):
    text = page(dataclasses.replace(FULL, licence=licence))
    (line,) = [line for line in text.splitlines() if line.startswith("- Licence:")]
    assert line == f"- Licence: {licence}, inherited from the parent. {said}".rstrip()
    assert ("non-commercial" in str(head_of(text)["tags"])) == marked


@given(st.text(max_size=30))
def test_what_somebody_typed_stays_one_line_of_text(title: str):
    text = page(dataclasses.replace(FULL, title=title, parent=Parent(repo=title)))
    assert isinstance(head_of(text)["tags"], list)
    (heading,) = [line for line in text.split("\n") if line.startswith("# ")]
    assert not set(heading) & set("`|<>[]")


def test_a_split_s_digest_is_that_of_its_sorted_lines_whatever_their_order(store: Store):
    records = list(store)
    lines = sorted(f"{record.key} {record.subject}\n" for record in records)
    wanted = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert Split.of(records) == Split.of(records[::-1]) == Split(subjects=4, scans=4, sha256=wanted)
    assert Split.of(records[:3]).sha256 != wanted


def test_labels_are_counted_by_kind(store: Store, tmp_path: Path):
    records = tuple(store)
    one, two, three, four = (record.subject for record in records)
    file = tmp_path / "labels.csv"
    file.write_text("subject,label\n")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    plain = Truth(records=records, labels={}, classes=())
    classes = dataclasses.replace(plain, labels={one: "a", two: "b", three: "a", four: "a"}, classes=("a", "b"))
    assert LabelFacts.of(file, classes, records) == LabelFacts(
        kind="classes",
        sha256=digest,
        scans=4,
        subjects=4,
        classes={"a": 3, "b": 1},
        told=told_each(classes, records, ()),
    )
    assert LabelFacts.of(file, classes, records[:2]).classes == {"a": 1, "b": 1}
    numbers = dataclasses.replace(plain, values={one: 3.5, two: -1.0, three: 2.0, four: 9.0})
    found = LabelFacts.of(file, numbers, records[:3])
    assert (found.kind, found.low, found.high, found.subjects) == ("numbers", -1.0, 3.5, 3)
    told = {who: Survival(time=time, event=event) for who, time, event in ((one, 5.0, True), (two, 2.0, False))}
    found = LabelFacts.of(file, dataclasses.replace(plain, survival=told), records[:2])
    assert (found.kind, found.low, found.high, found.events) == ("times", 2.0, 5.0, 1)
    findings = {one: {"x": True, "y": False}, two: {"x": True}, three: {}, four: {"y": True}}
    found = LabelFacts.of(file, dataclasses.replace(plain, findings=findings, classes=("x", "y")), records)
    assert (found.kind, dict(found.classes)) == ("findings", {"x": 2, "y": 1})
    found = LabelFacts.of(file, dataclasses.replace(plain, classes=("liver",)), records)
    assert (found.kind, dict(found.classes)) == ("voxels", {"liver": 4})
    assert LabelFacts.of(None, plain, ()) == LabelFacts()


def test_weights_that_never_saw_a_scan_are_not_called_trained():
    for parent, said in (
        (Parent(name="ours"), "trained with voxelstem"),
        (Parent(name="drawn", untrained=True), "untrained: drawn at random, no scan was learned from"),
        # The architecture was somebody's, the numbers are nobody's.
        (Parent(name="drawn", untrained=True, origin="its publisher"), "untrained: drawn at random"),
    ):
        assert f"Origin of the parent: {said}" in page(dataclasses.replace(FULL, parent=parent))


def test_calibration_says_what_is_held_and_what_is_not():
    held = Assurance(
        calibrator=Temperature(temperature=2.0, classes=2, subjects=12), subjects=12, notes=("no conformal sets: x",)
    )
    found = Calibration.of(held)
    assert found == Calibration(subjects=12, parts=("calibrator",), notes=("no conformal sets: x",))
    assert "nothing is calibrated" in page(dataclasses.replace(FULL, calibration=Calibration.of(Assurance())))
    assert "How sure it is of an answer is not calibrated" in page(dataclasses.replace(FULL, calibration=Calibration()))


def sealed_run(folder: Path) -> Path:
    for name in ("adapt.json", "head.safetensors", "weights/config.json", "weights/model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(np.random.default_rng(len(name)).bytes(50))
    (folder / "features").mkdir()
    (folder / "features" / "scan.npz").write_bytes(b"cache")
    seal(folder)
    return folder


def test_the_seal_names_every_file_but_the_cache_and_itself(tmp_path: Path):
    folder = sealed_run(tmp_path / "run")
    names = {"adapt.json", "head.safetensors", "weights/config.json", "weights/model.safetensors"}
    assert sealed(folder) == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    check_seal(folder, whole=True)


def test_the_seal_is_what_sha256sum_reads(tmp_path: Path):
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("no sha256sum here")
    folder = sealed_run(tmp_path / "run")
    subprocess.run([tool, "-c", SEAL], cwd=folder, check=True, capture_output=True)
    (folder / "head.safetensors").write_bytes(b"another head")
    assert subprocess.run([tool, "-c", SEAL], cwd=folder, check=False, capture_output=True).returncode == 1


@pytest.mark.parametrize("whole", [True, False])
def test_a_changed_or_lost_file_is_named(tmp_path: Path, whole: bool):
    folder = sealed_run(tmp_path / "run")
    (folder / "weights" / "config.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"^weights/config\.json of the run 'run' is damaged"):
        check_seal(folder, whole=whole)
    (folder / "adapt.json").unlink()
    with pytest.raises(CheckpointError, match=r"'run' has no adapt\.json"):
        check_seal(folder, whole=whole)


def test_tensors_of_weights_are_left_to_those_who_load_them(tmp_path: Path):
    folder = sealed_run(tmp_path / "run")
    (folder / "weights" / "model.safetensors").write_bytes(b"x")
    check_seal(folder, whole=False)
    with pytest.raises(CheckpointError, match=r"weights/model\.safetensors"):
        check_seal(folder, whole=True)


def test_what_systems_and_editors_leave_behind_does_not_damage_a_run(tmp_path: Path):
    folder = sealed_run(tmp_path / "run")
    named = sealed(folder)
    strays = (".DS_Store", ".auto.json.123.unfinished", "weights/.nfs0001", "README.md~", "a copy.txt", "features/a b")
    for stray in strays:
        (folder / stray).write_bytes(b"x")
    check_seal(folder, whole=True)  # what comes later is no matter
    seal(folder)  # nor what was there before
    assert sealed(folder) == named
    check_seal(folder, whole=True)
    left = {stray for stray in strays if (folder / stray).exists()}
    assert left == set(strays) - {"README.md~", "a copy.txt"}


def test_weights_lose_no_file_whose_name_cannot_be_sealed(tmp_path: Path):
    folder = sealed_run(tmp_path / "run")
    (folder / "weights" / "merges 2.txt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"the weights hold 'merges 2\.txt'"):
        seal(folder)
    assert (folder / "weights" / "merges 2.txt").exists()


def test_who_edits_the_page_can_still_read_the_run(tmp_path: Path):
    folder = sealed_run(tmp_path / "run")
    (folder / "README.md").write_text("ours")
    seal(folder)
    (folder / "README.md").write_text("ours, and a name of the study")
    check_seal(folder, whole=False)
    with pytest.raises(CheckpointError, match=r"README\.md of the run 'run' is damaged"):
        check_seal(folder, whole=True)


def test_of_voxels_the_page_says_where_a_structure_was_looked_for_and_not_who_shows_it():
    text = page(dataclasses.replace(FULL, labels=LabelFacts(kind="voxels", scans=3, subjects=3, classes={"tumour": 3})))
    assert "`tumour`: looked for in 3 subjects" in text
    assert "Fewer than 10 subjects show" not in text


@pytest.mark.parametrize("text", ["", "no digest\n", f"{'a' * 64}  ../outside\n", f"{'a' * 64}  /root\n"])
def test_a_damaged_seal_says_so(tmp_path: Path, text: str):
    (tmp_path / SEAL).write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        sealed(tmp_path)
    (tmp_path / SEAL).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {SEAL}"):
        sealed(tmp_path)
