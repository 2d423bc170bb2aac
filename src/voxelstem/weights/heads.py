"""Heads of runs as graphs: what is said of a scan's vector, of patch tokens, or of a crop by a tuned network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from voxelstem.protocols import Head
from voxelstem.weights.levels import Blocks

Kind = Literal["one", "each", "value", "cox", "hazard"]
"""One of several classes, yes or no to each of many, a number, a risk with its curve, or hazards of intervals."""
OUTPUTS: dict[Kind, tuple[str, ...]] = {
    "one": ("logits", "probabilities"),
    "each": ("logits", "probabilities"),
    "value": ("value",),
    "cox": ("risk", "survival"),
    "hazard": ("survival",),
}
STEEPEST = 50.0
"""Log risks are cut off here, as `tasks.survive` does."""
_LINEAR = ("middle", "scale", "weight", "bias")


class ScanHead(nn.Module):
    """A linear head over a scan's vector: (row, dim) -> the `OUTPUTS` of its kind, each with rows first."""

    def __init__(
        self, head: Head, kind: Kind, *, temperature: float = 1.0, lines: Sequence[tuple[float, float]] = ()
    ) -> None:
        """Take over the arrays.

        Args:
            head: A linear one.
            kind: What it answers.
            temperature: Logits of `one` are divided by it before the softmax.
            lines: Of `each`, scale and shift that bring the log-odds of every class to a calibrated probability.

        Raises:
            ValueError: the head is not linear, or not of this kind, or not one line for each class.
        """
        super().__init__()
        self.kind: Kind = kind
        self.temperature = temperature
        bias = np.zeros(1) if kind == "cox" else None
        found = {name: head.arrays.get(name, bias if name == "bias" else None) for name in _LINEAR}
        if any(array is None for array in found.values()) or (kind == "cox" and "baseline" not in head.arrays):
            raise ValueError("the head is no linear map of a scan's vector")
        middle, scale, weight, bias = (np.asarray(found[name], dtype=np.float64) for name in _LINEAR)
        weight = np.atleast_2d(weight)
        # Heads of many classes standardise each in its own way: one way for all, and the rest goes into weights. In
        # float64, about the middle: nothing large is left that would have to cancel in fp32.
        centre, spread = (np.atleast_2d(one).mean(axis=0) for one in (middle, scale))
        slope = weight / scale
        arrays = {"centre": centre, "spread": spread, "slope": (slope * spread).T}
        arrays["start"] = bias - ((middle - centre) * slope).sum(axis=1)
        for name, array in arrays.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)).float())
        if kind == "each":
            steps = np.array(lines or [(1.0, 0.0)] * len(head.classes), dtype=np.float64)
            if len(steps) != len(head.classes):
                raise ValueError(f"{len(head.classes)} classes need as many lines, got {len(steps)}")
            for place, name in enumerate(("steep", "shift")):
                self.register_buffer(name, torch.from_numpy(steps[:, place].copy()).float())
        if kind == "cox":
            baseline = np.asarray(head.arrays["baseline"], dtype=np.float64)
            self.register_buffer("baseline", torch.from_numpy(baseline).float())

    def forward(self, scan: Float[Tensor, "row dim"]) -> tuple[Tensor, ...]:
        """What is said of each row."""
        own: Any = self  # buffers are tensors; nn.Module cannot say so
        said = (scan - own.centre) / own.spread @ own.slope + own.start
        match self.kind:
            case "one":
                return said, (said / self.temperature).softmax(dim=-1)
            case "each":
                return said, (said * own.steep + own.shift).sigmoid()
            case "value":
                return (said[:, 0],)
            case "cox":
                risk = said[:, 0]
                return risk, own.baseline ** risk.clamp(-STEEPEST, STEEPEST).exp()[:, None]
            case "hazard":
                # log(1 + e^x) without overflow: hazards of the intervals add up.
                hazards = said.clamp(min=0) + (-said.abs()).exp().log1p()
                return ((-hazards.cumsum(dim=-1)).exp(),)


class TokenHead(nn.Module):
    """A linear head over single tokens: (token, dim) -> logits (token, a, b, c, kind) of the cells of its patch."""

    def __init__(self, head: Head) -> None:
        """Take over the arrays of a `segment` probe."""
        super().__init__()
        self.sub, self.kinds = int(head.facts["sub"]), len(head.classes) + 1
        for name in _LINEAR:
            self.register_buffer(name, torch.from_numpy(np.asarray(head.arrays[name], dtype=np.float32)))

    def forward(self, tokens: Float[Tensor, "token dim"]) -> tuple[Float[Tensor, "token a b c kind"]]:
        """Logits; kind 0 is background."""
        own: Any = self
        flat = (tokens - own.middle) / own.scale @ own.weight + own.bias
        return (flat.reshape(-1, self.sub, self.sub, self.sub, self.kinds),)


class Crops(nn.Module):
    """A tuned network with its head: (row, contrast, i, j, k) -> logits (row, kind, i, j, k), or what `above` says."""

    def __init__(self, network: Any, above: ScanHead | None) -> None:
        """Take over a `finetune.network.Tuned`, whose backbone is put into a form that can leave.

        Raises:
            CheckpointError: a backbone that has no such form.
        """
        super().__init__()
        network.backbone = Blocks(network.backbone)
        self.network, self.above = network, above

    def forward(self, crop: Float[Tensor, "row contrast i j k"]) -> tuple[Tensor, ...]:
        """What is said of each crop."""
        said = self.network(crop)
        return (said,) if self.above is None else self.above(said)
