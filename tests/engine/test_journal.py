from __future__ import annotations

import importlib.util
import resource
from pathlib import Path

import pytest
from tests.processes import run_together

from voxelstem.engine.journal import Journal, facts_of, is_clock, read_journal
from voxelstem.errors import CheckpointError


def write(run: Path, steps: range, *, resume_at: int) -> None:
    with Journal(run, resume_at=resume_at) as journal:
        for step in steps:
            journal.append({"step": step, "loss": step / 3})


def test_records_come_back_to_the_last_bit(run: Path):
    write(run, range(4), resume_at=0)
    assert read_journal(run) == [{"step": step, "loss": step / 3} for step in range(4)]


def test_a_run_without_a_journal_has_no_records(run: Path):
    assert read_journal(run) == []


def test_lines_of_steps_that_run_again_are_dropped(run: Path):
    write(run, range(5), resume_at=0)
    write(run, range(3, 6), resume_at=3)
    assert [line["step"] for line in read_journal(run)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_last_line_cut_off_by_a_kill_is_left_out_and_written_anew(run: Path, cut: int):
    write(run, range(3), resume_at=0)
    path = run / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [line["step"] for line in read_journal(run)] == [0, 1]
    write(run, range(2, 3), resume_at=2)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damaged", ["{", "3", '{"loss": 1}', "\xff"])
def test_a_damaged_line_before_the_last_is_a_clear_error(run: Path, damaged: str):
    write(run, range(3), resume_at=0)
    path = run / "journal.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damaged.encode("latin-1"), lines[2], b""]))
    with pytest.raises(CheckpointError, match=r"line 2 of journal\.jsonl is damaged") as caught:
        read_journal(run)
    assert "delete this line" in caught.value.hint


def test_every_line_is_on_disk_as_soon_as_it_is_written(run: Path):
    with Journal(run, resume_at=0) as journal:
        journal.append({"step": 0, "loss": 1.5})
        assert read_journal(run) == [{"step": 0, "loss": 1.5}]


def test_tensorboard_gets_the_same_numbers(run: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(run, range(3), resume_at=0)
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(step / 3)) for step in range(3)
    ]


def test_tensorboard_forgets_the_steps_that_run_again(run: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Journal(run, resume_at=0) as journal:
        for step in range(5):
            journal.append({"step": step, "loss": 9.0})
        journal.rewind(2)
        journal.append({"step": 2, "loss": 1.0})
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 9.0), (1, 9.0), (2, 1.0)]


def fill(run: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(run, resume_at=0) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            for step in range(1000):
                journal.append({"step": step, "loss": 0.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_a_clear_error_and_what_was_written_stays_readable(run: Path, monkeypatch: pytest.MonkeyPatch):
    # Without TensorBoard, whose writer has a thread of its own that would speak of the same full disk.
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match="journal cannot be written"):
        fill(run)
    steps = [line["step"] for line in read_journal(run)]
    assert steps == list(range(len(steps)))
    assert len(steps) > 5


def test_facts_are_told_from_what_a_clock_said():
    records = [{"step": 0, "loss": 0.5, "seconds": 1.5, "samples_per_s": 3.0, "read_gb": 0.1, "kwh": 0.2}]
    assert facts_of(records) == [{"step": 0, "loss": 0.5}]
    assert not any(is_clock(name) for name in ("step", "loss", "lr", "grad_norm", "loss/position", "probe/patch_knn"))


def write_together(run: Path) -> int:
    write(run, range(3), resume_at=0)
    return len(read_journal(run))


def test_of_processes_that_train_together_the_first_writes(run: Path, tmp_path: Path):
    run_together(write_together, 2, tmp_path, (run,))
    assert [line["step"] for line in read_journal(run)] == [0, 1, 2]
