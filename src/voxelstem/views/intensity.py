"""Raw values to network input: the only place where a window is applied."""

from __future__ import annotations

from jaxtyping import Float, Shaped
from torch import Tensor

from voxelstem.study import InputSpec


def window(hu: Float[Tensor, "*shape"], spec: InputSpec) -> Float[Tensor, "*shape"]:
    """Map [low_hu, high_hu] to [0, 1] and clamp what lies outside."""
    return squeeze_(lift(hu, spec), spec)


def lift(hu: Shaped[Tensor, "*shape"], spec: InputSpec) -> Float[Tensor, "*shape"]:
    """The first half of `window`: 0 is the low end of the window, so that air is 0. New memory; integers become float.

    Resampling may stand between the halves, or before or after both: it is linear, and clamping is what is not.
    """
    return hu - spec.low_hu


def squeeze_(lifted: Float[Tensor, "*shape"], spec: InputSpec) -> Float[Tensor, "*shape"]:
    """The second half of `window`, in place: two passes through fresh memory less."""
    return lifted.div_(spec.high_hu - spec.low_hu).clamp_(0.0, 1.0)
