"""Run every code block of the README and the documentation, each page in an empty folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

collect_ignore = ["tests/golden/peer_losses.py"]
"""Runs in the peers' environment only."""


def run_shell(example: Example) -> None:
    """Run a `bash` block; a command that fails, or a part of a pipe, fails the page."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", str(example.parsed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def enter(namespace: dict[str, Any]) -> None:
    """Go to an empty folder with a site key, where the project's commands are found first."""
    folder = tempfile.mkdtemp(prefix="page-")
    namespace["_before"] = (Path.cwd(), dict(os.environ), folder)
    os.chdir(folder)
    # One key for ever: with another, other phantoms would be held out, and a page might find none.
    key = Path(folder, ".site.key")
    key.write_text("01" * 32 + "\n")
    os.environ["VOXELSTEM_KEY"] = str(key)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def leave(namespace: dict[str, Any]) -> None:
    """Go back and take the page's folder away."""
    before, environment, folder = namespace["_before"]
    os.chdir(before)
    os.environ.clear()
    os.environ.update(environment)
    shutil.rmtree(folder)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser(language="bash", evaluator=run_shell)],
    patterns=["README.md", "docs/**/*.md"],
    setup=enter,
    teardown=leave,
).pytest()
