"""All views of a sample: where they lie in its scan, and how they are made out of one box of voxels.

What is drawn are plans (`draw_sample`); what needs arithmetic (`make_views`) works on any device, so that a process
that reads may hand over small boxes and leave the rest to the GPU that trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from voxelstem.errors import ConfigError
from voxelstem.study import InputSpec
from voxelstem.views.augment import AugmentConfig, AugmentPlan, apply_augment, draw_augment
from voxelstem.views.crop import Crop, ViewKind, ViewPlan, apply_view, check_spacing, covering_crop, draw_views
from voxelstem.views.intensity import Stats, lift, limits, squeeze_
from voxelstem.views.pair import OTHER, PairConfig
from voxelstem.views.report import ReportConfig

Triple = tuple[float, float, float]
ViewPlans = Mapping[str, list[ViewPlan]]
"""Of each kind of view (`global`, `local`)."""
ChangePlans = Mapping[str, list[AugmentPlan]]
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsConfig:
    """The views of one sample: `global_` ones, and smaller `local` ones within the same region if wanted.

    SPECTRE's stage 1, in a spec of 0.5 x 0.5 x 1 mm: 2 global views of 128 x 128 x 64 voxels with scales 1 to 2 and 8
    local ones of 48 x 48 x 24 with scales 1 to 8/3, both spread `uniform`, in a region of `region_scale` 2 (256 x 256 x
    128 voxels, 128 mm along each axis) anywhere in `central_mm` (256, 256, 384), windowed `first`.
    """

    global_: ViewKind = field(default_factory=ViewKind)
    local: ViewKind = field(default_factory=lambda: ViewKind(count=0))
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    region_scale: float = 1.25
    """Views of one sample lie within a region of this times the global view's size, so that they overlap."""
    overhang: float = 0.25
    """The region may reach past the body by this share of its size: whole-scan tiles overhang the scan too, and a
    network that never saw an edge of the scan is lost there."""
    central_mm: Triple | None = None
    """The region lies anywhere within a box of this size about the middle of the scan; None: about the body."""
    windowed: Literal["last", "first"] = "last"
    """Whether HU are clipped to the window after resampling, as they are wherever a model is used, or before."""
    report: ReportConfig | None = None
    """What a sample says of its scan's report; None: nothing. Its words left and right follow the voxels, so there is
    one view, which shows the scan."""
    pair: PairConfig | None = None
    """Which second scan of the same subject a sample shows, at the place of its one global view, as the view `other`,
    and what is said of both; None: each sample is one scan."""
    left_out: str = ""
    """A class of the scans' voxel labels, such as `removed` (a face that was taken off or drawn anew), that does not
    count in what `anatomy` and `disentangle` paint. Beside each view there are then flags of its size, named `counted:`
    and its name: 0 where it lies, else 1."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: no global view, a region without extent, one that reaches less than to the body's edge, no
                middle of the scan to put it in, or several global views where a report or a second scan needs one.
        """
        if self.global_.count < 1:
            raise ValueError(f"global_.count must be >= 1, got {self.global_.count}")
        if not 0 < self.region_scale < math.inf:
            raise ValueError(f"region_scale must be > 0, got {self.region_scale}")
        if not 0 <= self.overhang < math.inf:
            raise ValueError(f"overhang must be >= 0, got {self.overhang}")
        if self.central_mm is not None and not min(self.central_mm) > 0:
            raise ValueError(f"central_mm must be positive, got {self.central_mm}")
        if self.report is not None and (self.global_.count, self.local.count) != (1, 0):
            raise ValueError(
                "a report speaks of one view: with report, global_.count must be 1 and local.count 0, "
                f"got {self.global_.count} and {self.local.count}"
            )
        if self.pair is not None and self.global_.count != 1:
            raise ValueError(
                f"a pair is one view of each of two scans: with pair, global_.count must be 1, got {self.global_.count}"
            )

    @property
    def kinds(self) -> dict[str, ViewKind]:
        """The kinds of views that a sample has, by the names that `Batch.views` gives them."""
        kinds = {"global": self.global_, "local": self.local}
        if self.pair is not None and self.pair.paired:
            kinds[OTHER] = self.global_
        return {name: kind for name, kind in kinds.items() if kind.count}


class Ground(Protocol):
    """What has to be known of a scan to draw from it; a store's records do."""

    @property
    def shape_ijk(self) -> tuple[int, int, int]:
        """Stored voxels along each axis."""
        ...

    @property
    def spacing_mm(self) -> Triple:
        """Edges of one."""
        ...

    @property
    def body_start_ijk(self) -> tuple[int, int, int]:
        """First voxel of the box around the patient."""
        ...

    @property
    def body_size_ijk(self) -> tuple[int, int, int]:
        """Voxels of that box."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Region:
    """A box of a scan's voxels, and what is to be made of it: one sample."""

    voxels: Float32[np.ndarray, "channel i j k"] | np.ndarray
    """HU or intensity, float32 or (where they are whole numbers of HU) int16."""
    crop: Crop
    """Where the box was in the scan."""
    spacing_mm: Triple
    views: ViewPlans
    changes: ChangePlans
    text: str = ""
    """What is said of it."""
    targets: Mapping[str, Float32[np.ndarray, " value"]] = field(default_factory=dict[str, np.ndarray])
    """What is known of it, as in `protocols.Batch`."""
    other: Region | None = None
    """The box of the second scan, of which the view `other` is made."""
    stats: Stats | None = None
    """Of the whole scan; None where the spec's normalisation asks for nothing."""
    flags: Mapping[str, Float32[np.ndarray, "view 1 i j k"]] = field(default_factory=dict[str, np.ndarray])
    """Which voxels of its views count, by the names that they have in `Batch.views`."""

    @property
    def all_flags(self) -> dict[str, Float32[np.ndarray, "view 1 i j k"]]:
        """Those of the second scan's view too."""
        return {**self.flags, **(self.other.flags if self.other else {})}

    @property
    def places_mm(self) -> dict[str, Float32[np.ndarray, "view 2 3"]]:
        """Where the views lie, each in its own scan, as in `protocols.Batch`."""
        places = {
            name: np.stack([_place(plan, change) for plan, change in zip(plans, self.changes[name], strict=True)])
            for name, plans in self.views.items()
        }
        return places | (self.other.places_mm if self.other else {})


def draw_sample(config: ViewsConfig, spec: InputSpec, ground: Ground, rng: np.random.Generator) -> ViewPlans:
    """Draw a region of the scan and, within it, all views of a sample.

    Raises:
        ConfigError: the spec has no spacing, or its values are not in [0, 1] as the changes want them.
    """
    check_spacing(spec)
    _check_frame(config, spec)
    _check_changes(config.augment, spec)
    size_ijk, scale = config.global_.size_ijk, config.region_scale
    region = ViewKind(size_ijk=size_ijk, min_scale=scale, max_scale=scale)
    wide = np.asarray(size_ijk) * np.asarray(spec.spacing_mm) * scale
    shared = draw_views(region, spec, _where(config, spec, ground, wide), rng)[0]
    box = (shared.start_mm, shared.extent_mm)
    plans = {"global": draw_views(config.global_, spec, box, rng)}
    if config.local.count:
        plans["local"] = draw_views(config.local, spec, box, rng)
    return plans


def _check_frame(config: ViewsConfig, spec: InputSpec) -> None:
    """What is shown in training must be what is shown in use."""
    if spec.frame_ijk is None:
        return
    if config.global_.size_ijk != spec.frame_ijk or config.local.count or config.central_mm is not None:
        raise ConfigError(
            f"the spec shows whole scans in a frame of {spec.frame_ijk} voxels about the body, and the views are "
            f"{config.global_.size_ijk} voxels, {config.local.count} local ones, central_mm {config.central_mm}",
            hint="set views.global_.size_ijk to spec.frame_ijk, local.count=0 and central_mm=none, or "
            "spec.frame_ijk=none",
        )


def _check_changes(config: AugmentConfig, spec: InputSpec) -> None:
    """Changes that know only [0, 1] would cut z-scores off, or take roots of negative numbers."""
    changed = (config.smooth_p, config.sharpen_p, config.gamma, config.noise_std, *config.shifts)
    if spec.normalisation == "zscore" and (any(config.shifts) or (config.clip and any(changed))):
        raise ConfigError(
            "views.augment keeps views in [0, 1], and z-scores are not",
            hint="set views.augment.clip=false and views.augment.shift=0, or take spec.normalisation=unit99",
        )


def draw_changes(config: AugmentConfig, views: ViewPlans, rng: np.random.Generator) -> ChangePlans:
    """Draw how each view differs from the scan."""
    return {name: [draw_augment(config, rng) for _ in plans] for name, plans in views.items()}


def mirrored(changes: ChangePlans) -> bool:
    """Whether left and right change sides in the (one) view that a report speaks of."""
    return 0 in changes["global"][0].flip_axes


def covering_region(views: ViewPlans, ground: Ground) -> Crop:
    """The smallest box of stored voxels that all views need."""
    crops = [covering_crop(plan, ground.spacing_mm, ground.shape_ijk) for plans in views.values() for plan in plans]
    low = np.min([crop.start_ijk for crop in crops], axis=0)
    size = np.max([np.add(crop.start_ijk, crop.size_ijk) for crop in crops], axis=0) - low
    return Crop(start_ijk=(int(low[0]), int(low[1]), int(low[2])), size_ijk=(int(size[0]), int(size[1]), int(size[2])))


@torch.no_grad()
def make_views(
    regions: Sequence[Region], spec: InputSpec, config: ViewsConfig, *, device: torch.device = CPU
) -> dict[str, Float[Tensor, "sample view channel i j k"]]:
    """Make all views of some samples, on `device`: boxes are windowed, resampled and changed there.

    Views of one kind lie in one tensor and are changed together, each by its own plan.
    """
    # Nothing here may be rounded to 16 bits: an error of a few HU is more than two tissues differ by.
    with torch.autocast(device.type, enabled=False):
        kinds = {
            name: torch.empty((len(regions), len(plans), len(regions[0].voxels), *plans[0].size_ijk), device=device)
            for name, plans in regions[0].views.items()
        }
        for sample, region in enumerate(regions):
            found = limits(region.stats, spec)
            voxels = lift(torch.from_numpy(region.voxels).to(device, non_blocking=True), found)
            # Where nothing is clamped, before and after are the same.
            first = config.windowed == "first" and found.clamped
            if first:
                squeeze_(voxels, found)
            for name, plans in region.views.items():
                for view, plan, change in zip(kinds[name][sample], plans, region.changes[name], strict=True):
                    view.copy_(_cut_view(voxels, region, plan, change))
                if not first:
                    squeeze_(kinds[name][sample], found)
        for name, views in kinds.items():
            changes = [change for region in regions for change in region.changes[name]]
            apply_augment(views.flatten(0, 1), changes, config.augment)
    others = [region.other for region in regions if region.other is not None]
    return kinds | (make_views(others, spec, config, device=device) if others else {})


def _cut_view(
    voxels: Float[Tensor, "channel i j k"], region: Region, plan: ViewPlan, change: AugmentPlan
) -> Float[Tensor, "channel a b c"]:
    start = region.crop.start_ijk
    end = np.add(start, region.crop.size_ijk)
    # A small view needs a small part of the box.
    crop = covering_crop(plan, region.spacing_mm, (int(end[0]), int(end[1]), int(end[2])))
    within = tuple(slice(part.start - low, part.stop - low) for part, low in zip(crop.slices, start, strict=True))
    return apply_view(
        voxels[:, *within], plan, crop, spacing_mm=region.spacing_mm, outside=0.0, flip_axes=change.flip_axes
    )


def _where(
    config: ViewsConfig, spec: InputSpec, ground: Ground, wide_mm: Float[np.ndarray, "3"]
) -> tuple[Triple, Triple]:
    """Start and extent of the part of the scan that regions of this width lie in."""
    spacing = np.asarray(ground.spacing_mm)
    if spec.frame_ijk is not None:
        # Nowhere else, however long the body: so does whoever uses the model.
        middle = (np.asarray(ground.body_start_ijk) + np.asarray(ground.body_size_ijk) / 2) * spacing
        start, extent = middle - wide_mm / 2, wide_mm
    elif config.central_mm is None:
        start = np.asarray(ground.body_start_ijk) * spacing - config.overhang * wide_mm
        extent = np.asarray(ground.body_size_ijk) * spacing + 2 * config.overhang * wide_mm
    else:
        whole = np.asarray(ground.shape_ijk) * spacing
        extent = np.minimum(whole, config.central_mm)
        start = (whole - extent) / 2
    return (start[0], start[1], start[2]), (extent[0], extent[1], extent[2])


def _place(plan: ViewPlan, change: AugmentPlan) -> Float32[np.ndarray, "2 3"]:
    """Low corner and extent in mm; a mirrored axis begins at the high corner and runs backwards."""
    start, extent = np.array(plan.start_mm, np.float32), np.array(plan.extent_mm, np.float32)
    for axis in change.flip_axes:
        start[axis] += extent[axis]
        extent[axis] *= -1
    return np.stack([start, extent])
