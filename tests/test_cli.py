from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import voxelstem
from voxelstem import cli
from voxelstem.sources.phantom import PhantomConfig, phantom_files
from voxelstem.terminal import DONE, SOME_REFUSED, WRONG

COMMANDS = {
    "samples": ["--out", "--json"],
    "demo": ["--out", "--quick", "--data"],
    "ingest": ["--store", "--workers", "--labels", "--reports", "--json"],
    "show": ["--json"],
    "pretrain": ["--store", "--out", "--config", "--dry-run"],
    "embed": ["--weights", "--out", "--precision", "--tokens"],
    "adapt": ["--weights", "--store", "--labels", "--task", "--mode", "--out", "--budget"],
    "evaluate": ["--store", "--labels", "--out"],
}


def the_command(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "voxelstem", *words], capture_output=True, text=True, check=False, **options
    )


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]):
    # One command line in this process: exit code, stdout, stderr.

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.run([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def check_refusal(answer: tuple[int, str, str]) -> str:
    """Hold an answer to the rule for wrong use."""
    code, out, err = answer
    assert code == WRONG
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2
    return err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag_and_shows_an_example(say, command: str):
    code, out, _ = say(command, "--help")
    assert code == DONE
    assert f"voxelstem {command}" in out.split("For example:")[1]
    assert [flag for flag in COMMANDS[command] if flag not in out] == []


def test_help_lists_the_commands_in_the_order_of_the_journey(say):
    _, out, _ = say("--help")
    listed = [line.split()[1] for line in out.splitlines() if line.startswith("│ ") and line[2].isalpha()]
    assert [name for name in listed if name in COMMANDS] == list(COMMANDS)


def test_the_version_is_the_package_s(say):
    assert say("--version") == (DONE, f"{voxelstem.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["paint"], 'Unknown command "paint"'),
        (["ingest"], "SOURCES requires"),
        (["ingest", "scans"], "--store requires"),
        (["ingest", "scans", "--stor", "here"], "Did you mean --store?"),
        (["ingest", "scans", "--store", "here", "--workers", "many"], 'unable to convert "many" into int'),
        (["embed", "scans", "--weights", "w", "--out", "o", "--precision", "fp8"], "precision"),
    ],
)
def test_wrong_use_is_told_in_one_sentence(say, words: list[str], sentence: str):
    assert sentence in check_refusal(say(*words))


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("optimm.lr=1", "unknown setting 'optimm'"),
        ("steps", "cannot read the setting 'steps'"),
        ("steps=few", "steps must be"),
    ],
)
def test_a_misspelt_setting_is_refused_before_anything_runs(say, tmp_path: Path, assignment: str, sentence: str):
    answer = say("pretrain", "tiny", assignment, "--store", tmp_path / "store", "--out", tmp_path / "run")
    assert sentence in check_refusal(answer)
    assert not (tmp_path / "run").exists()


def test_a_misspelt_recipe_is_refused(say, tmp_path: Path):
    answer = say("pretrain", "tinny", "--store", tmp_path / "store", "--out", tmp_path / "run")
    assert "tiny" in check_refusal(answer)


def test_an_absent_config_file_is_refused(say, tmp_path: Path):
    words = ["pretrain", "tiny", "--store", tmp_path / "s", "--out", tmp_path / "r", "--config", tmp_path / "no.toml"]
    assert "there is no config file 'no.toml'" in check_refusal(say(*words))


@pytest.mark.parametrize("command", ["ingest", "show", "embed"])
def test_an_absent_path_is_refused(say, tmp_path: Path, command: str):
    rest = {
        "ingest": ["--store", tmp_path / "store"],
        "show": [],
        "embed": ["--weights", tmp_path, "--out", tmp_path / "out"],
    }
    check_refusal(say(command, tmp_path / "absent.nii.gz", *rest[command]))


def test_an_answer_that_finds_the_disk_full_says_so():
    with Path("/dev/full").open("w") as full:
        answer = subprocess.run(
            [sys.executable, "-m", "voxelstem", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert answer.returncode == WRONG
    assert answer.stderr.startswith("error: the disk is full")


def test_a_reader_that_stops_reading_is_no_error(tmp_path: Path):
    voxelstem.Store.create(tmp_path / "store")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        words = [sys.executable, "-m", "voxelstem", "show", str(tmp_path / "store"), "--json"]
        answer = subprocess.run(words, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (DONE, "")


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


def test_a_store_without_ct_is_refused_by_a_ct_recipe(say, tmp_path: Path):
    voxelstem.Store.create(tmp_path / "store")
    answer = say("pretrain", "tiny", "--store", tmp_path / "store", "--out", tmp_path / "run")
    assert "no CT scan" in check_refusal(answer)
    assert not (tmp_path / "run").exists()


def test_the_module_is_the_command():
    answer = the_command("--version")
    assert (answer.returncode, answer.stdout.strip()) == (DONE, voxelstem.__version__)
    assert the_command("paint").returncode == WRONG


def test_help_takes_no_torch():
    code = "import sys; from voxelstem import cli; cli.run(['--help']); sys.stderr.write(str('torch' in sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stderr == "False"
