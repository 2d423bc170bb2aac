"""Raw values to network input: the only place where a window is applied."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from voxelstem.study import InputSpec


def window(hu: Float[Tensor, "*shape"], spec: InputSpec) -> Float[Tensor, "*shape"]:
    """Map [low_hu, high_hu] to [0, 1] and clamp what lies outside."""
    # In place on a tensor born here: two passes through fresh memory less.
    return (hu - spec.low_hu).div_(spec.high_hu - spec.low_hu).clamp_(0.0, 1.0)
