"""The front door's `load`: weights as a `Model`, a finished run of `adapt` as an `AdaptedModel`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

from voxelstem.card import is_run
from voxelstem.model import Model
from voxelstem.study import InputSpec, Study, Volume
from voxelstem.weights import hub

if TYPE_CHECKING:
    from voxelstem.adapted import Adapted
    from voxelstem.artefact import RunCard
    from voxelstem.predict import Predicted


class AdaptedModel:
    """A finished run of `adapt`: says of a study what `voxelstem predict` says of it."""

    def __init__(self, folder: str | Path, *, commercial: bool = False) -> None:
        """Load the run in `folder`; with `commercial`, one whose licence forbids commercial use is refused.

        Raises:
            ConfigError: it is no finished run, its task answers by prompts, or the licence forbids commercial use.
            CheckpointError: a file in it is damaged, or another one than `adapt` wrote.
        """
        from voxelstem.predict import Predictor  # tasks and formats, which whoever loads weights does without

        self.predictor = Predictor(Path(folder), commercial=commercial)

    @property
    def run(self) -> Adapted:
        """The run as it was read: settings, head, and whom it learned from."""
        return self.predictor.adapted

    @property
    def model(self) -> Model:
        """The network below the head; its `embed` is that of weights."""
        return self.predictor.model

    @property
    def spec(self) -> InputSpec:
        """How scans are fed."""
        return self.model.spec

    @property
    def card(self) -> RunCard:
        """What the run says of itself: parent, labels, splits, calibration, licence."""
        return self.run.card

    def predict(
        self,
        study: Study | Volume,
        *,
        region: Bool[np.ndarray, "i j k"] | None = None,
        least_mm3: float = 0.0,
        most_parts: int = 20,
    ) -> Predicted:
        """Findings of a study, and a mask where the run labels voxels. All of it is preliminary.

        Args:
            study: One examination, or a volume of it.
            region: The mask that a run with `see.region` looks at, on the scan's grid.
            least_mm3: Smaller pieces of a structure are not listed by themselves.
            most_parts: So many pieces of a structure are listed.

        Raises:
            ConfigError: the study has not the contrasts that the run was trained on, or a region is missing.
            IngestError: a volume is refused.
        """
        whole = study if isinstance(study, Study) else Study(subject="", volumes=(study,))
        return self.predictor.predict(whole, region=region, least_mm3=least_mm3, most_parts=most_parts)


def load(name: str | Path, *, commercial: bool = False) -> Model | AdaptedModel:
    """Load weights (a folder, a known name or `hub:owner/name`) or the folder of a finished run of `adapt`.

    Where types are checked, `voxelstem.weights.hub.load` gives a `Model` and `AdaptedModel(folder)` the other.

    Args:
        name: What to load.
        commercial: Refuse what a licence does not let be used commercially.

    Raises:
        ConfigError: a malformed name, or the licence is not for commercial use.
        CheckpointError: nothing there, damage, or no network.
    """
    if is_run(Path(name)):
        return AdaptedModel(name, commercial=commercial)
    return hub.load(name, commercial=commercial)
