from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import voxelstem
from voxelstem.terminal import DONE, WRONG

COMMANDS = {
    "samples": ["--out", "--json"],
    "demo": ["--out", "--quick", "--data"],
    "ingest": ["--store", "--workers", "--labels", "--reports", "--json"],
    "show": ["--verify", "--against", "--weights", "--at", "--out", "--commercial", "--json"],
    "models": ["--json"],
    "weights": [],
    "pretrain": ["--store", "--out", "--config", "--dry-run"],
    "embed": ["--weights", "--out", "--precision", "--tokens", "--like-spectre", "--spacing", "--pool", "--compile"],
    "search": ["--index", "--add", "--weights", "--top", "--among", "--protocol", "--json"],
    "adapt": ["--weights", "--store", "--labels", "--task", "--mode", "--out", "--budget", "--commercial"],
    "evaluate": ["--store", "--labels", "--out", "--commercial", "--pretrained-on", "--nested", "--unet-steps"],
}


def the_command(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "voxelstem", *words], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "weights"])
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
def test_wrong_use_is_told_in_one_sentence(refusal, words: list[str], sentence: str):
    assert sentence in refusal(*words)


@pytest.mark.parametrize("command", ["ingest", "show", "embed"])
def test_an_absent_path_is_refused(refusal, tmp_path: Path, command: str):
    rest = {
        "ingest": ["--store", tmp_path / "store"],
        "show": [],
        "embed": ["--weights", tmp_path, "--out", tmp_path / "out"],
    }
    refusal(command, tmp_path / "absent.nii.gz", *rest[command])


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


def test_the_module_is_the_command():
    answer = the_command("--version")
    assert (answer.returncode, answer.stdout.strip()) == (DONE, voxelstem.__version__)
    assert the_command("paint").returncode == WRONG


def test_help_takes_no_torch():
    code = "import sys; from voxelstem import cli; cli.run(['--help']); sys.stderr.write(str('torch' in sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stderr == "False"
