"""What `lightly` and `spectre-fm` answered to the questions in `tests/golden/losses.py`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

CASES = Path(__file__).parents[1] / "golden" / "losses.py"


class Golden:
    """Questions, and a comparison with the answers."""

    def __init__(self) -> None:
        spec = importlib.util.spec_from_file_location("golden_losses", CASES)
        assert spec is not None
        assert spec.loader is not None
        self.cases: Any = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
        spec.loader.exec_module(self.cases)
        self.answers = np.load(self.cases.ANSWERS)

    def agrees(self, name: str, found: Tensor) -> None:
        """Fail unless this is the peer's answer, to the tolerance times its largest number."""
        wanted = torch.from_numpy(self.answers[name])
        assert found.shape == wanted.shape
        far = float((found.detach().double() - wanted.double()).abs().max() / wanted.double().abs().max())
        assert far <= self.cases.TOLERANCE, f"{far:.2g} from {name}"


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()
