"""What is looked at when runs are judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from voxelstem.artefact import CACHE
from voxelstem.judging.nested import When
from voxelstem.judging.rival import STEPS


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is looked at beside the runs' own figures."""

    pretrained_on: tuple[Path, ...] = ()
    """Stores that the weights were pretrained on, to see whether a test subject was among them."""
    nested: When = "few"
    """Whether every labelled subject is cross-fitted too: `few` does where a scan-level run has fewer than 20 test
    subjects, `always` and `never` as they say."""
    unet_steps: int = STEPS
    """Of the U-Net from scratch beside frozen segmentation heads, and 0 for none; beside tuned ones it is the run's own
    number."""

    features: str = ""
    """Folder where embeddings rest, such as that of `adapt`'s `features`; beside the report if empty."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a negative number of steps, or another word for `nested`.
        """
        if self.unet_steps < 0 or self.nested not in get_args(When):
            raise ValueError(f"unet_steps is 0 or more, and nested one of {', '.join(get_args(When))}, got {self}")

    def rest(self, out: Path) -> Path:
        """Where embeddings rest when the report is written to `out`."""
        return Path(self.features) if self.features else out / CACHE
