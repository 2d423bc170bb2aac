from __future__ import annotations

import json

import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Image

from voxelstem.errors import CheckpointError, ConfigError, IngestError, StoreError
from voxelstem.report.words import describe
from voxelstem.show import run_page, show
from voxelstem.store import Refusal, Store, Writer, write
from voxelstem.study import Acquisition, LabelMap, Provenance, Report, Study, Volume

CARD = {"architecture": {"name": "scan_vit"}, "spec": {"modality": "CT"}, "licence": "Apache-2.0"}


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / "store")
    rng = np.random.default_rng(0)
    for number in range(3):
        volume = Volume(
            array=rng.integers(-1000, 1000, size=(1, 8, 6, 5 + number)).astype(np.float32),
            affine_ras=np.diag([1.0, 1.0, 2.0, 1.0]),
            modality="CT",
            provenance=Provenance(source_format="phantom", sha256="", orientation="RAS"),
            labels=LabelMap(array=np.ones((8, 6, 5 + number), np.int16), classes={1: "liver"}),
        )
        write(
            store,
            Study(subject=f"s{number:024x}", volumes=(volume,), report=Report(rest_text="clear") if number else None),
        )
    with Writer(store.path) as writer:
        writer.refuse(Refusal(source="0123456789abcdef.nii.gz", code="corrupt", reason="it is cut off"))
    return store.path


def test_a_store_is_told_as_the_interface_says(store):
    facts = json.loads(json.dumps(show(store)))
    assert facts["kind"] == "store"
    assert (facts["kept"], facts["subjects"]) == (3, 3)
    assert facts["refused"] == [
        {"source": "0123456789abcdef.nii.gz", "code": "corrupt", "reason": "it is cut off"},
    ]
    assert sum(facts["splits"].values()) == 3
    assert facts["bytes"] == sum(path.stat().st_size for path in store.rglob("*.b2nd"))
    assert facts["shape_ijk"] == {"least": [8, 6, 5], "median": [8, 6, 6], "most": [8, 6, 7]}
    text = describe(facts)
    for part in (
        "3 scans of 3 subjects",
        "corrupt: it is cut off",
        "8 x 6 x 5 to 8 x 6 x 7",
        "liver 3",
        "2 with a report",
    ):
        assert part in text


def test_every_file_is_checked_and_what_is_damaged_is_named(store):
    whole = show(store)
    assert (whole["checked"], whole["checked_by"], whole["damaged"]) == (6, "digest", [])
    assert "checked: 6 files (every voxel), 0 damaged" in describe(whole)
    path = next((store / "volumes").rglob("*.b2nd"))
    healthy = path.read_bytes()
    path.write_bytes(healthy[:200] + bytes([healthy[200] ^ 4]) + healthy[201:])
    (damage,) = json.loads(json.dumps(show(store)))["damaged"]
    assert (damage["kind"], damage["name"]) == ("volumes", path.stem)
    assert "1 damaged" in describe(show(store))


def test_a_large_store_is_checked_by_size_unless_more_is_asked_for(store, monkeypatch):
    monkeypatch.setattr("voxelstem.show.VERIFY_UP_TO", 10)
    first, second = sorted((store / "volumes").rglob("*.b2nd"))[:2]
    flipped = bytearray(first.read_bytes())
    flipped[200] ^= 4
    first.write_bytes(flipped)
    assert (show(store)["checked_by"], show(store)["damaged"]) == ("size", [])
    assert [file["name"] for file in show(store, verify=True)["damaged"]] == [first.stem]
    second.write_bytes(second.read_bytes()[:-1])
    (cut,) = show(store)["damaged"]
    assert cut["name"] == second.stem
    second.unlink()
    assert "missing" in show(store)["damaged"][0]["reason"]


def test_near_copies_are_told_apart_from_independent_scans(tmp_path):
    store = Store.create(tmp_path / "store")
    kernels = tuple(
        Volume(
            array=np.full((1, 4, 4, 4), float(number), np.float32),
            affine_ras=np.eye(4),
            modality="CT",
            provenance=Provenance(source_format="dicom", sha256="", orientation="LPS"),
            acquisition=Acquisition(group="g", contrast="venous", session="1"),
        )
        for number in range(2)
    )
    write(store, Study(subject=f"s{1:024x}", volumes=kernels, report=Report(rest_text="clear", language="de")))
    facts = show(store.path)
    assert (facts["kept"], facts["acquisitions"]) == (2, 1)
    assert (facts["contrasts"], facts["formats"], facts["reports_by_language"]) == (
        {"venous": 2},
        {"dicom": 2},
        {"de": 2},
    )
    assert "independent scans: 1" in describe(facts)


def test_an_empty_store_is_told_too(tmp_path):
    Store.create(tmp_path)
    assert describe(show(tmp_path)).startswith("store: 0 scans of 0 subjects, 0 bytes")


def test_a_scan_is_told_with_its_shape_spacing_orientation_and_range(tmp_path):
    rng = np.random.default_rng(0)
    array = rng.integers(-1000, 1200, size=(9, 8, 7)).astype(np.int16)
    array[0, 0, :2] = -1000, 1200
    Nifti1Image(array, np.diag([-1.0, -1.5, 2.0, 1.0])).to_filename(tmp_path / "scan.nii.gz")
    facts = json.loads(json.dumps(show(tmp_path / "scan.nii.gz")))
    (volume,) = facts["volumes"]
    assert facts["kind"] == "scan"
    assert (volume["shape_ijk"], volume["spacing_mm"], volume["orientation"]) == ([9, 8, 7], [1.0, 1.5, 2.0], "LPS")
    assert (volume["modality"], volume["low"], volume["high"], volume["unit"]) == ("CT", -1000.0, 1200.0, "HU")
    assert "CT scan (nifti): 9 x 8 x 7 voxels of 1 x 1.5 x 2 mm" in describe(facts)


def test_a_run_tells_how_far_it_is_and_forgets_a_line_that_was_cut_off(tmp_path):
    (tmp_path / "config.toml").write_text('recipe = "tiny"\nsteps = 100\n')
    (tmp_path / "journal.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    for name in ("step-00000002", ".step-00000003.unfinished"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").write_text('{"step": 2}')
    facts = show(tmp_path)
    assert (facts["kind"], facts["step"], facts["steps"], facts["finished"]) == ("run", 2, 100, False)
    assert facts["checkpoints"] == ["step-00000002"]
    assert describe(facts).startswith("run tiny: step 2 of 100, not finished")
    assert "loss 1.5" in describe(facts)
    assert show(tmp_path / "checkpoints" / "step-00000002")["manifest"] == {"step": 2}


@pytest.mark.parametrize(
    ("files", "kind", "said"),
    [
        ({"config.json": json.dumps(CARD), "model.safetensors": ""}, "weights", "licence: Apache-2.0"),
        ({"evaluation.json": '{"auroc": 0.8}', "index.html": ""}, "report", "auroc: 0.8"),
        (
            {"adapt.json": '{"sha256": "ab", "labelled": [1, 2]}', "config.toml": 'mode = "probe"'},
            "adapted",
            "mode: probe",
        ),
    ],
)
def test_folders_are_known_by_what_they_hold(tmp_path, files, kind, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    facts = show(tmp_path)
    assert facts["kind"] == kind
    assert said in describe(facts)
    json.dumps(facts)


def test_what_nobody_knows_is_a_clear_error(tmp_path):
    (tmp_path / "letter.txt").write_text("Dear colleague")
    for path, said in ((tmp_path, "nothing that voxelstem knows"), (tmp_path / "letter.txt", "nothing that voxelstem")):
        with pytest.raises(ConfigError, match=said):
            show(path)
    with pytest.raises(ConfigError, match="there is no file or folder 'nowhere'"):
        show(tmp_path / "nowhere")


def test_a_scan_that_would_be_refused_says_why(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"\x1f\x8b not gzip")
    with pytest.raises(IngestError, match="damaged"):
        show(tmp_path / "scan.nii.gz")


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000, '{"architecture": null, "spec": {}}'])
def test_weights_whose_card_is_none_are_refused(tmp_path, text: str):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a voxelstem card"):
        show(tmp_path)


@pytest.mark.parametrize(
    "odd",
    [
        {"extras": {"../../outside": "0" * 64}},
        {"extras": ["heads.safetensors"]},
        {"spec": {"low_hu": 10.0, "high_hu": -10.0}},
        {"trained": [1, 2]},
        {"notes": "one"},
    ],
)
def test_a_card_that_no_weights_can_have_is_refused(tmp_path, odd: dict[str, object]):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps(CARD))
    assert show(tmp_path)["kind"] == "weights"
    (tmp_path / "config.json").write_text(json.dumps(CARD | odd))
    with pytest.raises(CheckpointError, match="is not a voxelstem card"):
        show(tmp_path)


def test_a_page_is_drawn_of_a_run_and_says_where_it_is(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "journal.jsonl").write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "lo')
    assert run_page(run) == run / "report" / "index.html"
    assert "1 steps, not finished" in run_page(run, tmp_path / "deep" / "page.html").read_text()


def test_a_page_needs_a_run_and_a_place(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        run_page(tmp_path)
    (tmp_path / "journal.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        run_page(tmp_path, tmp_path / "file" / "page.html")
