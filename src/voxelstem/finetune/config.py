"""How a whole network is fine-tuned: the settings, with the run's other settings in `adapted.AdaptConfig.full`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from voxelstem.backbones.lowrank import LowRankConfig
from voxelstem.losses.overlap import Overlap
from voxelstem.schedules import Tuning, tuning


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """What is trained, on what, and how fast. The spacing and the intensities are the weights' own, always."""

    steps: int = 1000
    batch: int = 2
    lr: float = 1e-3
    """Peak learning rate; FOMO25's winner used 1e-4 with AdamW, nnU-Net 1e-2 with SGD."""
    weight_decay: float = 3e-5
    optimiser: Literal["adamw", "sgd"] = "adamw"
    """SGD has Nesterov momentum 0.99."""
    clip: float = 12.0
    """Largest norm of the gradient."""
    schedule: Tuning = "default"
    warm_up: float = 0.05
    """Share of the steps that a warm-up takes; see `schedules.tuning`."""
    transfer: Literal["all", "encoder"] = "all"
    """Take over whatever fits of the weights, or leave the decoder new."""
    sizes: Literal["kept", "drawn"] = "kept"
    """Leave convolutions as large as pretraining made them, or bring those before a norm to the size of a fresh draw:
    the network answers as before, and one rate moves it as fast as it moves an untrained one."""
    changes: Literal["all", "low_rank"] = "all"
    """What of the pretrained network is trained: all of it, or low-rank changes beside its linear layers, which are
    folded into them in the end (mode `adapters` sets this)."""
    low_rank: LowRankConfig = field(default_factory=lambda: LowRankConfig(rank=8, alpha=16.0, dropout=0.0))
    targets: tuple[str, ...] = ("qkv", "fc1")
    """Names of the linear layers that changes stand beside, or the ends of them."""
    layer_decay: float = 1.0
    """Each layer of the encoder learns by this factor slower than the one above it; levels of a decoder are layers
    above it too, and learn at the full rate themselves."""
    held: float = 0.0
    """Share of the labelled subjects that training does not see: they say which step is kept, and when to stop."""
    looks: int = 20
    """How often they are asked in a run."""
    patience: int = 5
    """After so many looks without a better one training stops."""
    loss: Overlap = "dice_ce"
    """Of segmentations, see `losses.overlap`."""
    patch_ijk: tuple[int, int, int] | None = None
    """What the network sees at once; the block of the weights' InputSpec if None."""
    foreground: float = 0.5
    """Share of the patches of a segmentation that lie about a labelled voxel, each class as often as any other."""
    mirror: tuple[int, ...] = ()
    """Axes (0 = R, 1 = A, 2 = S) along which half of the patches are mirrored."""
    jitter: float = 0.1
    """Contrast and brightness of a patch change by up to this share of its spread."""
    overlap: float = 0.5
    """Of the windows that slide over a scan when it is predicted."""
    contrasts: tuple[str, ...] = ()
    """Scans of one session that are seen together, such as T1w and FLAIR, the labelled one first."""
    fusion: Literal["early", "late"] = "early"
    """Several contrasts are channels of one network, or go through it one by one and are joined behind it."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a count, rate or share without sense, a contrast named twice, or an axis that is none.
        """
        if min(self.steps, self.batch) < 1 or min(self.lr, self.clip) <= 0:
            raise ValueError("steps and batch must be at least 1, and lr and clip positive")
        if not (0 <= self.foreground <= 1 and 0 <= self.overlap < 1 and 0 <= self.jitter < 1) or self.weight_decay < 0:
            raise ValueError("foreground, overlap and jitter are shares, and weight_decay is not negative")
        if self.patch_ijk is not None and min(self.patch_ijk) < 1:
            raise ValueError(f"patch_ijk must be at least one voxel, got {self.patch_ijk}")
        if not set(self.mirror) <= {0, 1, 2}:
            raise ValueError(f"mirror names axes among 0, 1, 2, got {self.mirror}")
        if len(set(self.contrasts)) < len(self.contrasts):
            raise ValueError(f"contrasts must differ, got {self.contrasts}")
        if not 0 < self.layer_decay <= 1 or not 0 <= self.held < 1 or min(self.looks, self.patience) < 1:
            raise ValueError("layer_decay lies in (0, 1], held in [0, 1), and looks and patience are at least 1")
        if self.low_rank.dropout:
            raise ValueError("low_rank.dropout is for towers of text: here nothing is dropped, so it must be 0")
        tuning(0.0, kind=self.schedule, warm_up=self.warm_up)

    @property
    def channels(self) -> int:
        """How many scans are seen together."""
        return max(len(self.contrasts), 1)
