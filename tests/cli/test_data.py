from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from voxelstem.card import Card, write_weights
from voxelstem.model import make_model
from voxelstem.sources import nifti
from voxelstem.sources.brain import BrainConfig, brain_subject
from voxelstem.sources.brain_files import brain_files
from voxelstem.sources.phantom import PhantomConfig, phantom, phantom_files
from voxelstem.store import Store
from voxelstem.study import InputSpec
from voxelstem.terminal import DONE, SOME_REFUSED


def test_an_ingest_that_refuses_one_scan_keeps_the_others_and_says_so(say, tmp_path: Path):
    files = phantom_files(tmp_path, [PhantomConfig(seed=1, spacing_mm=(8.0, 8.0, 8.0))])
    (files.scans / "broken.nii.gz").write_bytes(b"not a scan")
    code, out, err = say("ingest", files.scans, "--store", tmp_path / "store", "--json")
    facts = json.loads(out)
    assert code == SOME_REFUSED
    assert (facts["kept"], facts["refused"]) == (1, 1)
    assert facts["refusals"][0]["scan"] == "broken.nii.gz"
    assert "ingest 2/2" in err
    code, out, _ = say("show", tmp_path / "store", "--json")
    facts = json.loads(out)
    assert (code, facts["kept"], facts["subjects"], len(facts["refused"])) == (DONE, 1, 1, 1)
    code, out, _ = say("ingest", files.scans / "phantom-0001", "--store", tmp_path / "store")
    assert code == DONE
    assert "0 kept, 1 there already, 0 refused" in out


def test_an_ingest_says_which_reports_found_no_scan(say, tmp_path: Path):
    files = phantom_files(tmp_path, [PhantomConfig(seed=1, spacing_mm=(8.0, 8.0, 8.0))])
    (tmp_path / "reports.csv").write_text("scan,report\nelsewhere/ct.nii.gz,nothing\n")
    code, out, _ = say("ingest", files.scans, "--store", tmp_path / "store", "--reports", tmp_path / "reports.csv")
    assert code == DONE
    assert "reports unused: 1 " in out
    _, out, _ = say("ingest", files.scans, "--store", tmp_path / "store")
    assert "unused" not in out


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    architecture = {"name": "scan_vit", "block_ijk": (16, 16, 16), "block.dim": 24, "block.depth": 1, "block.heads": 2}
    spec = InputSpec(spacing_mm=(10.0, 10.0, 10.0), block_ijk=(16, 16, 16))
    card = Card(architecture=architecture | {"scan.depth": 0}, spec=spec, trained=("block",), licence="cc0-1.0")
    write_weights(tmp_path / "weights", make_model(card, seed=0).backbone.state_dict(), card)
    return tmp_path / "weights"


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    volume = phantom(PhantomConfig(seed=1, spacing_mm=(10.0, 10.0, 10.0))).volumes[0]
    nifti.write(tmp_path / "ct.nii.gz", volume.array[0].astype(np.int16), volume.affine_ras)
    return tmp_path / "ct.nii.gz"


def test_weights_over_a_scan_become_a_picture(say, scan: Path, weights: Path, tmp_path: Path):
    out = tmp_path / "inside.png"
    code, told, _ = say("show", scan, "--weights", weights, "--at", "10,9,8", "--out", out, "--json")
    facts = json.loads(told)
    assert (code, facts["at_ijk"], facts["picture"]) == (DONE, [10, 9, 8], str(out))
    assert out.read_bytes().startswith(b"\x89PNG")
    place = ",".join(map(str, facts["at_mm"])) + "mm"
    code, told, _ = say("show", scan, "--weights", weights, "--at", place, "--out", out)
    assert code == DONE
    assert "+ is voxel 10, 9, 8" in told
    assert f"picture: {out}" in told


def test_a_run_becomes_a_page(say, refusal, tmp_path: Path):
    (tmp_path / "journal.jsonl").write_text('{"step": 0, "loss": 2.0}\n')
    out = tmp_path / "page.html"
    code, told, _ = say("show", tmp_path, "--out", out, "--json")
    assert (code, json.loads(told)) == (DONE, {"page": str(out)})
    assert "1 steps, not finished" in out.read_text()
    assert "add --weights" in refusal("show", tmp_path, "--at", "1,1,1", "--out", out)


def test_a_picture_needs_weights_and_a_place_inside(refusal, scan: Path, weights: Path, tmp_path: Path):
    assert "add --weights" in refusal("show", scan, "--at", "1,1,1")
    assert "is no place" in refusal("show", scan, "--weights", weights, "--at", "here")
    assert "outside the scan" in refusal("show", scan, "--weights", weights, "--at", "1,1,900")
    assert "add --weights" in refusal("show", scan, "--commercial")
    assert "three questions" in refusal("show", scan, "--weights", weights, "--verify")
    assert "not a weights folder" in refusal("show", scan, "--weights", tmp_path / "absent")
    assert not (tmp_path / "inside.png").exists()


def test_tables_of_volumes_are_noted_beside_the_scans(say, refusal, tmp_path: Path):
    like = BrainConfig(seed=0, shape_ijk=(16, 20, 16), spacing_mm=(10.0, 10.0, 10.0))
    files = brain_files(tmp_path / "made", brain_subject(1, contrasts=("T1w",), like=like))
    words = ("ingest", files.scans, "--store", tmp_path / "store")
    assert "add --volumes FILE" in refusal(*words, "--qc", files.qc)
    assert not (tmp_path / "store").exists()
    code, out, _ = say(*words, "--volumes", files.volumes, "--qc", files.qc, "--json")
    assert code == DONE
    assert json.loads(out)["volumes"] == {"scans": 1, "unusable": 0, "unmatched": 0}
    assert any(name.startswith("volume:") for record in Store.open(tmp_path / "store") for name in record.labels)
