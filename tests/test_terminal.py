from __future__ import annotations

import errno
import json
from dataclasses import dataclass

import pytest

from voxelstem import terminal


@dataclass
class Line:
    relative: str = "a/ct.nii.gz"
    code: str = "corrupt"
    reason: str = "it is cut off"


def test_an_answer_goes_to_stdout_as_text_or_as_json(capsys):
    terminal.answer({"a": 1}, "one", as_json=False)
    assert capsys.readouterr().out == "one\n"
    terminal.answer({"a": 1}, "one", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_a_problem_goes_to_stderr_with_its_next_step(capsys):
    assert terminal.tell("it is wrong", "do this") == terminal.WRONG
    assert capsys.readouterr().err == "error: it is wrong\n  hint: do this\n"


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "the disk is full"), (errno.ENOENT, "no such file"), (errno.EACCES, "no permission")],
)
def test_what_the_system_says_becomes_a_sentence_without_folders(number, said):
    problem, hint = terminal.explain(OSError(number, "?", "/scans/miller/ct.nii"))
    assert problem.startswith(said)
    assert "miller" not in problem
    assert hint


def test_a_refused_scan_is_a_line():
    assert terminal.refused([Line()]) == ["refused (corrupt) a/ct.nii.gz: it is cut off"]
    assert terminal.listed([Line()]) == [{"scan": "a/ct.nii.gz", "code": "corrupt", "reason": "it is cut off"}]


@pytest.mark.parametrize(("through", "refusals", "code"), [(3, 0, 0), (3, 1, 3), (0, 1, 2), (0, 0, 0)])
def test_only_when_nothing_got_through_the_input_was_wrong(through, refusals, code):
    assert terminal.verdict(through, refusals, "?") == code
