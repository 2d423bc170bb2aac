"""What a user gets wrong, as whole commands: exit code 2, no traceback, cause and next step, nothing by halves.

One case of each verb starts a process of its own, and with `-m slow` all of them do; the others enter at `cli.run`, as
the process would, because importing torch takes longer than the refusal.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Image

import voxelstem
from voxelstem import cli
from voxelstem.card import Card, write_weights
from voxelstem.ingest import ingest
from voxelstem.model import make_model
from voxelstem.sources import nifti
from voxelstem.sources.phantom import PhantomConfig, phantom_files
from voxelstem.store.catalogue import FILE_NAME
from voxelstem.study import InputSpec

SPEC = InputSpec(spacing_mm=(8.0, 8.0, 8.0), low_hu=-200.0, high_hu=300.0, block_ijk=(16, 16, 16))
SMALL = {"name": "scan_vit", "block_ijk": (16, 16, 16), "block.dim": 24, "block.depth": 1, "block.heads": 2}
BRAINS = {
    "unit99-weights": InputSpec(
        modality="MR", spacing_mm=(4.0, 4.0, 4.0), block_ijk=(16, 16, 16), normalisation="unit99"
    ),
    "unit-weights": InputSpec(
        modality="MR", spacing_mm=(4.0, 4.0, 4.0), block_ijk=(16, 16, 16), low_hu=0.0, high_hu=1.0
    ),
}
"""Two ways to be fed from 0 to 1."""
CLASSIFY = ["--labels", "src/contrast.csv", "--task", "classify", "--mode", "knn"]
FEW_STEPS = ["steps=1", "loader.batch=1", "backbone.block.depth=1", "backbone.scan.depth=1"]


@pytest.fixture(autouse=True)
def one_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests here share one site key, because they share one store."""
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "bad-input.key"))


def bad_brains() -> dict[str, np.ndarray]:
    """A head of smooth tissue in air: one voxel no number; tissue brought to mean 0; the whole volume so."""
    i, j, k = np.indices((28, 26, 24)) - np.array([14, 13, 12])[:, None, None, None]
    noise = np.random.default_rng(0).normal(0, 20, i.shape)
    head = np.where(i**2 + j**2 + k**2 < 110, 500 + 30 * i + 10 * j + noise, 0).astype(np.float32)
    hole = head.copy()
    hole[14, 13, 12] = np.nan
    tissue = head > 0
    scored = np.where(tissue, (head - head[tissue].mean()) / head[tissue].std(), 0).astype(np.float32)
    return {"brain": head, "nan": hole, "scored": scored, "scored-whole": (head - head.mean()) / head.std()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms, their store, small weights, a store of MR, and every kind of bad file."""
    home = tmp_path_factory.mktemp("bad")
    # A settled key: it decides which phantoms are held out.
    key = tmp_path_factory.getbasetemp() / "bad-input.key"
    key.write_text("01" * 32 + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(key))
        files = phantom_files(
            home / "src",
            [PhantomConfig(seed=n, spacing_mm=(9.0, 9.0, 9.0), phase="portal" if n % 2 else "none") for n in range(10)],
        )
        ingest([files.scans], home / "store", labels=files.labels)
        for folder in ("empty", "corrupt", "flat", "mr"):
            (home / folder).mkdir()
        whole = (files.scans / "phantom-0000" / "ct.nii.gz").read_bytes()
        (home / "corrupt" / "ct.nii.gz").write_bytes(whole[: len(whole) // 2])
        Nifti1Image(np.zeros((20, 20), np.int16), np.eye(4)).to_filename(home / "flat" / "ct.nii.gz")
        noise = np.random.default_rng(0).integers(0, 900, (24, 24, 24)).astype(np.int16)
        nifti.write(home / "mr" / "t1.nii.gz", noise, np.diag([2.0, 2.0, 2.0, 1.0]))
        ingest([home / "mr"], home / "mr-store")
        for folder, scan in bad_brains().items():
            (home / folder).mkdir()
            Nifti1Image(scan, np.diag([2.0, 2.0, 2.0, 1.0])).to_filename(home / folder / "t1.nii.gz")
        shutil.copytree(home / "store", home / "newer")
        with sqlite3.connect(home / "newer" / FILE_NAME) as catalogue:
            catalogue.execute("PRAGMA user_version = 99")
        catalogue.close()
        model = make_model(Card(architecture=SMALL, spec=SPEC), seed=0)
        write_weights(home / "weights", model.backbone.state_dict(), model.card)
        for name, spec in BRAINS.items():
            write_weights(home / name, model.backbone.state_dict(), Card(architecture=SMALL, spec=spec))
        (home / "file").write_text("in the way")
    return home


def start(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command as a user has it."""
    return subprocess.run(
        [sys.executable, "-m", "voxelstem", *words], cwd=home, capture_output=True, text=True, check=False, timeout=300
    )


def say(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The same in this process. An error that the command line does not catch fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(home), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def files(home: Path) -> set[Path]:
    """All there is, without what SQLite leaves beside a catalogue."""
    return {path for path in home.rglob("*") if not path.name.startswith((f"{FILE_NAME}-", "writer.lock"))}


def check_refused(answer: subprocess.CompletedProcess[str], *said: str) -> None:
    """Exit code 2, one sentence about the cause and one about the next step."""
    assert answer.returncode == 2, answer.stderr
    assert "Traceback" not in answer.stderr
    cause, step = answer.stderr.splitlines()[-2:]
    assert cause.startswith("error: ")
    assert step.startswith("  hint: ")
    for words in said:
        assert words in cause + step


VERBS = ("ingest", "show", "embed", "pretrain", "adapt", "evaluate")
INGEST = ["--store", "new"]
EMBED = ["--weights", "weights", "--out", "new"]


WRONG = [
    (["ingest", "nowhere", *INGEST], "no file or folder 'nowhere'"),
    (["ingest", "empty", *INGEST], "no scan was found in the folder 'empty'"),
    (["ingest", "src/scans", *INGEST, "--labels", "nowhere"], "no folder of masks 'nowhere'"),
    (["ingest", "src/scans", *INGEST, "--reports", "nowhere.csv"], "nowhere.csv"),
    (["ingest", "src/scans", "--store", "file"], "file"),
    (["ingest", "mr", "--store", "newer"], "newer version of voxelstem"),
    (["show", "nowhere"], "no file or folder 'nowhere'"),
    (["show", "empty"], "'empty' is nothing that voxelstem knows"),
    (["show", "corrupt/ct.nii.gz"], "cut off before its end"),
    (["show", "flat/ct.nii.gz"], "three axes"),
    (["show", "newer"], "upgrade voxelstem"),
    (["embed", "nowhere", *EMBED], "no file or folder 'nowhere'"),
    (["embed", "empty", *EMBED], "no scan was found"),
    (["embed", "mr", "--weights", "nowhere", "--out", "new"], "not a weights folder"),
    (["pretrain", "tiny", "--store", "nowhere", "--out", "new"], "no store in 'nowhere'"),
    (["pretrain", "tiny", "--store", "newer", "--out", "new"], "newer version of voxelstem"),
    (["pretrain", "tiny", "--store", "mr-store", "--out", "new"], "no CT scan"),
    (["pretrain", "tiny", "--store", "store", "--out", "new", "optim.lrr=1"], "did you mean 'lr'"),
    (["pretrain", "tinny", "--store", "store", "--out", "new"], "did you mean 'tiny'"),
    (["pretrain", "tiny", "--store", "store", "--out", "file/new"], "cannot be written"),
    (["adapt", "--weights", "weights", "--store", "mr-store", *CLASSIFY, "--out", "new"], "trained on CT"),
    (["adapt", "--weights", "weights", "--store", "newer", *CLASSIFY, "--out", "new"], "newer version"),
    (["adapt", "--weights", "nowhere", "--store", "store", *CLASSIFY, "--out", "new"], "not a weights folder"),
    (["adapt", "--weights", "weights", "--store", "store", *CLASSIFY, "--out", "new", "head.neighbor=1"], "neigh"),
    (["adapt", "--weights", "weights", "--store", "store", *CLASSIFY[:3], "clasify", *CLASSIFY[4:], "--out", "new"],
     "did you mean 'classify'"),
    (["adapt", "--weights", "weights", "--store", "store", *CLASSIFY[:5], "kn", "--out", "new"], "mean 'knn'"),
    (["adapt", "--weights", "weights", "--store", "store", *CLASSIFY, "--out", "file/new"], "cannot be written"),
    (["evaluate", "nowhere", "--store", "store", "--labels", "src/contrast.csv", "--out", "new"], "finished run"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_wrong_use_is_refused_and_leaves_nothing_behind(made: Path, words: list[str], said: str):
    before = files(made)
    check_refused(say(made, *words), said)
    assert files(made) == before


@pytest.mark.parametrize(("words", "said"), [next(case for case in WRONG if case[0][0] == verb) for verb in VERBS])
def test_every_verb_refuses_as_a_process_too(made: Path, words: list[str], said: str):
    check_refused(start(made, *words), said)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "said"), WRONG)
def test_all_wrong_use_is_refused_as_a_process_too(made: Path, words: list[str], said: str):
    check_refused(start(made, *words), said)


@pytest.mark.parametrize(
    ("words", "code"),
    [(["corrupt"], "corrupt"), (["flat"], "not-3d"), (["mr", "--modality", "CT"], "wrong-modality")],
)
def test_a_scan_refused_by_ingest_stands_in_the_ledger_and_alone_it_fails(
    made: Path, tmp_path: Path, words: list[str], code: str
):
    alone = say(made, "ingest", *words, "--store", str(tmp_path / "alone"), "--json")
    check_refused(alone, "every scan was refused", "voxelstem show")
    assert [line["code"] for line in json.loads(alone.stdout)["refusals"]] == [code]
    beside = start(made, "ingest", "src/scans/phantom-0001", *words, "--store", str(tmp_path / "both"))
    assert (beside.returncode, "Traceback" in beside.stderr) == (3, False)
    assert f"refused ({code})" in beside.stdout
    shown = json.loads(say(made, "show", str(tmp_path / "both"), "--json").stdout)
    assert (shown["kept"], [line["code"] for line in shown["refused"]]) == (1, [code])


@pytest.mark.parametrize(
    ("folder", "code"), [("corrupt", "corrupt"), ("flat", "not-3d"), ("mr", "wrong-modality")]
)  # fmt: skip
def test_a_scan_refused_by_embed_has_its_line_and_alone_it_fails(made: Path, tmp_path: Path, folder: str, code: str):
    rest = ["--weights", "weights", "--out", str(tmp_path / "out")]
    check_refused(say(made, "embed", folder, *rest), "every scan was refused")
    assert not list(tmp_path.rglob("*.npz"))
    beside = say(made, "embed", "src/scans/phantom-0001", folder, *rest, "--json")
    assert (beside.returncode, "Traceback" in beside.stderr) == (3, False)
    assert [line["code"] for line in json.loads(beside.stdout)["refusals"]] == [code]
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    assert code in (tmp_path / "out" / "manifest.csv").read_text()


@pytest.mark.parametrize(
    ("folder", "weights", "code", "said"),
    [
        ("nan", "unit99-weights", "not-finite", "NaN"),
        ("scored", "unit99-weights", "z-scored", "z-scored over tissue alone"),
        ("scored", "unit-weights", "z-scored", "z-scored over tissue alone"),
        ("scored-whole", "unit-weights", "z-scored", "window 0 to 1"),
    ],
)
def test_a_brain_that_the_weights_cannot_see_as_they_were_taught_is_refused(
    made: Path, tmp_path: Path, folder: str, weights: str, code: str, said: str
):
    answer = say(made, "embed", folder, "brain", "--weights", weights, "--out", str(tmp_path / "out"), "--json")
    assert answer.returncode == 3
    (line,) = json.loads(answer.stdout)["refusals"]
    assert line["code"] == code
    assert said in line["reason"]
    assert len(list(tmp_path.rglob("*.npz"))) == 1, "the brain beside it is embedded"


def test_z_scores_of_a_whole_brain_are_brought_to_0_to_1_with_a_word(made: Path, tmp_path: Path):
    answer = say(made, "embed", "scored-whole", "brain", "--weights", "unit99-weights", "--out", str(tmp_path / "out"))
    assert answer.returncode == 0
    assert (tmp_path / "out" / "manifest.csv").read_text().count("unit99 undoes a shift and a scale") == 1
    one, two = (np.load(path)["scan"] for path in tmp_path.rglob("*.npz"))
    np.testing.assert_allclose(one, two, atol=1e-4)


def test_a_volume_with_a_hole_of_nan_never_enters_a_store(made: Path, tmp_path: Path):
    check_refused(say(made, "ingest", "nan", "--store", str(tmp_path / "store")), "every scan was refused")
    shown = json.loads(say(made, "show", str(tmp_path / "store"), "--json").stdout)
    assert (shown["kept"], [line["code"] for line in shown["refused"]]) == (0, ["not-finite"])


def test_evaluate_answers_in_json(made: Path, tmp_path: Path):
    run, labels = str(tmp_path / "run"), ["--labels", "src/contrast.csv"]
    assert say(made, "adapt", "--weights", "weights", "--store", "store", *CLASSIFY, "--out", run).returncode == 0
    answer = say(made, "evaluate", run, "--store", "store", *labels, "--out", str(tmp_path / "report"), "--json")
    facts = json.loads(answer.stdout)
    assert {score["name"] for score in facts["scores"]} == {"run", "scratch", "intensity", "radiomics", "majority"}
    assert facts["test_subjects"] >= 1
    assert Path(facts["report"]).is_file()
    check_refused(
        say(made, "evaluate", run, "--store", "newer", *labels, "--out", str(tmp_path / "other")), "newer version"
    )
    assert not (tmp_path / "other").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here: it takes root on Linux")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, *, leave: int) -> None:
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(b"\0" * (free - leave))


def test_a_disk_that_fills_up_while_ingesting_leaves_a_whole_store(made: Path, small_disk: Path):
    fill(small_disk, leave=700_000)
    check_refused(start(made, "ingest", "src/scans", "--store", str(small_disk / "store")), "the disk is full")
    (small_disk / "filler").unlink()
    store = voxelstem.Store.open(small_disk / "store")
    assert 0 < len(store) < 10
    assert all(store.volume(record.key).shape_ijk == record.shape_ijk for record in store)
    assert say(made, "ingest", "mr", "--store", str(small_disk / "store")).returncode == 0


@pytest.mark.parametrize("leave", [0, 20_000])
@pytest.mark.parametrize(
    ("words", "whole"),
    [
        (["ingest", "src/scans", "--store"], "volumes"),
        (["embed", "src/scans", "--weights", "weights", "--tokens", "--out"], "manifest.csv"),
        (["pretrain", "tiny", "--store", "store", *FEW_STEPS, "--out"], "weights"),
        (["adapt", "--weights", "weights", "--store", "store", *CLASSIFY, "--out"], "adapt.json"),
    ],
)
def test_a_full_disk_is_told_and_nothing_counts_as_finished(
    made: Path, small_disk: Path, words: list[str], whole: str, leave: int
):
    fill(small_disk, leave=leave)
    check_refused(say(made, *words, str(small_disk / "out")), "space")
    assert not (small_disk / "out" / whole).exists()
    assert not list(small_disk.glob("out/checkpoints/step-*"))
