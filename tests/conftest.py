"""What several rooms' tests share: a site key of their own, so that no test touches the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# A slow machine is no fault of the code under test, and the same code gives the same verdict every time. To look for
# new counterexamples, run with --hypothesis-profile=wandering.
settings.register_profile("wandering", deadline=None)
settings.register_profile("settled", deadline=None, derandomize=True)
settings.load_profile("settled")


@pytest.fixture(autouse=True, scope="session")
def settled_key(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The key of tests that share a store: with another, other phantoms would be held out."""
    (tmp_path_factory.getbasetemp() / "shared-site.key").write_text("01" * 32 + "\n")


@pytest.fixture(autouse=True)
def site_key_file(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a key file of its own, made on first use."""
    path = tmp_path_factory.mktemp("site") / "site.key"
    monkeypatch.setenv("VOXELSTEM_KEY", str(path))
    return path
