from __future__ import annotations

from pathlib import Path

import pytest

from voxelstem.judging.config import EvaluateConfig


def test_settings_without_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="unet_steps"):
        EvaluateConfig(unet_steps=-1)
    with pytest.raises(ValueError, match="nested"):
        EvaluateConfig(nested="perhaps")  # pyright: ignore[reportArgumentType]


def test_embeddings_rest_beside_the_report_or_where_it_is_said(tmp_path: Path) -> None:
    assert EvaluateConfig().rest(tmp_path) == tmp_path / "features"
    assert EvaluateConfig(features="shared").rest(tmp_path) == Path("shared")
