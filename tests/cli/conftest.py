"""One command line in this process, for every test of a command."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from voxelstem import cli
from voxelstem.terminal import WRONG

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Exit code, stdout and stderr of a command."""

    def run(*words: object) -> tuple[int, str, str]:
        code = cli.run([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refusal(say: Say) -> Callable[..., str]:
    """What a refused command says; held to the rule for wrong use."""

    def run(*words: object) -> str:
        code, out, err = say(*words)
        assert (code, out) == (WRONG, "")
        assert err.startswith("error: ")
        assert "Traceback" not in err
        assert len(err.splitlines()) <= 2
        return err

    return run
