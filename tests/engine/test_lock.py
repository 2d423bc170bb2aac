from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from voxelstem.engine.lock import locked
from voxelstem.errors import ConfigError

HOLDER = """
import sys, time
from pathlib import Path
from voxelstem.engine.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_a_second_process_is_refused_until_the_first_is_killed(holder: subprocess.Popen[str], tmp_path: Path):
    with (
        pytest.raises(ConfigError, match="another process trains in the run folder 'run'") as caught,
        locked(tmp_path / "run"),
    ):
        pass
    assert "another --out" in caught.value.hint
    assert str(tmp_path) not in str(caught.value)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_it_is_let_go_at_the_end_even_of_a_failure(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        pass


def test_the_same_process_cannot_hold_it_twice(tmp_path: Path):
    with locked(tmp_path), pytest.raises(ConfigError, match="another process"), locked(tmp_path):
        pass


def test_of_processes_that_train_together_only_the_first_holds_it(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path / "run"):
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="another process"), locked(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="'run' cannot be written"), locked(tmp_path / "file" / "run"):
        pass
