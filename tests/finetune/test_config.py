from __future__ import annotations

import pytest

from voxelstem.backbones.lowrank import LowRankConfig
from voxelstem.finetune.config import FinetuneConfig


def test_one_scan_is_seen_alone_and_several_contrasts_together() -> None:
    assert FinetuneConfig().channels == 1
    assert FinetuneConfig(contrasts=("T1w", "FLAIR")).channels == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"lr": 0.0}, "positive"),
        ({"foreground": 1.5}, "shares"),
        ({"overlap": 1.0}, "shares"),
        ({"patch_ijk": (8, 0, 8)}, "at least one voxel"),
        ({"mirror": (3,)}, "axes among 0, 1, 2"),
        ({"contrasts": ("T1w", "T1w")}, "must differ"),
        ({"schedule": "valley", "warm_up": 0.6}, "leave a part"),
    ],
)
def test_settings_without_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"layer_decay": 0.0}, {"layer_decay": 1.5}, {"held": 1.0}, {"looks": 0}, {"patience": 0}],
)
def test_decay_and_stopping_have_bounds(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="layer_decay lies in"):
        FinetuneConfig(**changes)  # pyright: ignore[reportArgumentType]


def test_adapters_drop_nothing() -> None:
    with pytest.raises(ValueError, match="must be 0"):
        FinetuneConfig(low_rank=LowRankConfig(dropout=0.1))
