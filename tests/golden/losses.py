"""What the peers' losses and ours are both asked: logits, embeddings and masks drawn from names.

Nothing here knows any implementation. The answers of `lightly` and `spectre-fm` are kept in `losses.npz`, which
`peer_losses.py` makes in the peers' environment (`benchmarks/requirements-peers.txt`).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from cases import uniform

ANSWERS = Path(__file__).with_name("losses.npz")
TOLERANCE = 1e-6
"""Relative to the largest number of the answer."""

PROTOTYPES = 24
TEMPERATURES = (0.04, 0.05, 0.06, 0.07)
"""The teacher's, one for each step."""
STUDENT_TEMPERATURE = 0.1
CENTRE_MOMENTUM = 0.9
VIEWS, GLOBALS, SAMPLES = 5, 2, 3
GRID = (2, 3, 4)
HIDDEN = (5, 0, 24, 11)
"""Patches that are hidden in each row: few, none, all."""
SINKHORN = ((0.05, 3), (0.07, 3), (0.07, 1))
"""Temperature and iterations."""
SIGLIP = ((2.3026, -10.0), (2.3026, 0.0), (4.0, -3.5))
"""Logarithm of the factor on cosines, and bias; SPECTRE's start first."""


def cosines(name: str, *shape: int) -> Tensor:
    """Logits, as a head gives them."""
    return torch.from_numpy(uniform(f"losses/{name}", math.prod(shape)).reshape(shape))


def seen(step: int) -> tuple[Tensor, Tensor]:
    """Logits of the teacher's global views and of the student's views, (view, sample, prototype)."""
    return (
        cosines(f"teacher {step}", GLOBALS, SAMPLES, PROTOTYPES),
        cosines(f"student {step}", VIEWS, SAMPLES, PROTOTYPES),
    )


def masks() -> Tensor:
    """Which patches are hidden, (row, patch)."""
    drawn = cosines("mask", len(HIDDEN), math.prod(GRID)).argsort(dim=1).argsort(dim=1)
    return drawn < torch.tensor(HIDDEN)[:, None]


def behind(step: int) -> tuple[Tensor, Tensor]:
    """Logits of teacher and student of the hidden patches, (hidden, prototype), in C-order."""
    return (
        cosines(f"patch teacher {step}", sum(HIDDEN), PROTOTYPES),
        cosines(f"patch student {step}", sum(HIDDEN), PROTOTYPES),
    )


def embeddings() -> Tensor:
    """Rows to spread out, of different lengths."""
    return cosines("embeddings", 7, 12) * torch.linspace(0.2, 5, 7)[:, None]


def patches() -> tuple[Tensor, Tensor]:
    """Patch tokens of student and teacher, (row, patch, dim)."""
    return cosines("patches student", 3, 6, 8), cosines("patches teacher", 3, 6, 8)


def pairs() -> tuple[Tensor, Tensor]:
    """Projected embeddings of scans and of their reports, (sample, dim), of different lengths."""
    longer = torch.linspace(0.1, 4, 9)[:, None]
    return cosines("pairs image", 9, 16) * longer, cosines("pairs text", 9, 16) * longer.flip(0)
