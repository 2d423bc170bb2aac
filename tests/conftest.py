"""What several rooms' tests share: a site key of their own, so that no test touches the user's."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def site_key_file(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a key file of its own, made on first use."""
    path = tmp_path_factory.mktemp("site") / "site.key"
    monkeypatch.setenv("VOXELSTEM_KEY", str(path))
    return path
