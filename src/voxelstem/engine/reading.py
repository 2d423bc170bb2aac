"""From a place in an epoch's order to samples: what the loader's threads and processes do."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float32, Int16
from torch import Tensor

from voxelstem.engine.label_crops import COUNTED, count_flags
from voxelstem.engine.pairing import Partner, find_partner
from voxelstem.engine.targets import Facts
from voxelstem.engine.transfer import Crops
from voxelstem.errors import StoreError
from voxelstem.store.reader import Record
from voxelstem.study import InputSpec
from voxelstem.views.multicrop import (
    ChangePlans,
    Region,
    ViewPlans,
    ViewsConfig,
    covering_region,
    draw_changes,
    draw_sample,
    make_views,
    mirrored,
)
from voxelstem.views.pair import OTHER
from voxelstem.views.report import apply_report, draw_report

_PLACE, _CHANGE, _WORDS, _PARTNER, _PARTNER_CHANGE = 1, 2, 4, 5, 6  # 3 is the loader's, for steps
"""First number of every seed: what is drawn. Streams with different purposes never meet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One opening of one scan, and which of its samples are wanted."""

    key: str
    epoch: int
    place: int
    """Where in the epoch's order the slot stands."""
    phases: tuple[int, ...]
    """Which of the `samples_per_open` samples."""
    aside: frozenset[str] = frozenset()
    """Scans of the same subject that cannot be its partner because they cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Made:
    """A sample whose views are made: as in `Batch`, without its first axis."""

    views: dict[str, Float32[np.ndarray, "view channel i j k"]]
    places_mm: dict[str, Float32[np.ndarray, "view 2 3"]]
    text: str = ""
    """What is said of it."""
    targets: Mapping[str, Float32[np.ndarray, " value"]] = field(default_factory=dict[str, np.ndarray])
    """What is known of it."""


Sample = Made | Region
"""A sample, or all that is needed to make it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """What a slot gave: the samples of its phases, or why there are none."""

    samples: tuple[Sample, ...] = ()
    fault: str = ""
    code: str = ""
    """The reason's code where values are at fault, and not the file (`docs/reference/reasons.md`)."""
    voxels: int = 0
    """How many were decoded."""
    seconds: float = 0.0
    """What decoding them took."""
    blamed: str = ""
    """Key of the scan that has the fault: the slot's, or that of a partner."""
    partners: tuple[str, ...] = ()
    """Key of each sample's second scan, where it has one; the slot's own for a copy."""
    refused: tuple[tuple[tuple[str, str], ...], ...] = ()
    """For each sample with a second scan: keys of those that could not be it, and why."""


@dataclass(slots=True)
class _Tally:
    """What was decoded so far."""

    voxels: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SlotReader:
    """Makes the samples of a slot, in any thread or process, always the same."""

    crops: Crops
    spec: InputSpec
    views: ViewsConfig
    seed: int
    makes: bool = True
    """Whether views are made here; otherwise where the batch is needed."""
    facts: Facts | None = None
    """What is known of the scans, where the recipe asks for it."""

    def __call__(self, slot: Slot) -> Reading:
        """Read the slot; a scan that cannot be read is tried once more."""
        reading = self._attempt(slot)
        return self._attempt(slot) if reading.fault else reading

    def plan(self, record: Record, slot: Slot, phase: int) -> ViewPlans:
        """Draw where the views of one sample lie."""
        return draw_sample(self.views, self.spec, record, self._rng(_PLACE, slot, phase))

    def _attempt(self, slot: Slot) -> Reading:
        samples: list[Sample] = []
        partners: list[str] = []
        refused: list[tuple[tuple[str, str], ...]] = []
        tally, blamed = _Tally(), slot.key
        try:
            record = self.crops.store.record(slot.key)
            for phase in slot.phases:
                views = self.plan(record, slot, phase)
                changes = draw_changes(self.views.augment, views, self._rng(_CHANGE, slot, phase))
                region = self._region(record, views, changes, tally)
                region = replace(region, text=self._text(record, changes, self._rng(_WORDS, slot, phase)))
                if self.facts is not None and self.facts.config.paired:
                    partner = self._partner(self.facts, record, region, slot, phase)
                    blamed = partner.record.key
                    other = self._other(region, partner, slot, phase, tally)
                    region = replace(region, other=self._flagged(other, partner.record))
                    blamed = slot.key
                    partners.append(partner.record.key)
                    refused.append(partner.refused)
                region = self._flagged(region, record)
                if self.facts is not None:
                    region = replace(region, targets=self.facts.targets(slot.key, *partners[-1:]))
                samples.append(self._make(region) if self.makes else region)
        except StoreError as error:
            return Reading(fault=error.problem, code=error.code, blamed=blamed)
        return Reading(
            samples=tuple(samples),
            voxels=tally.voxels,
            seconds=tally.seconds,
            partners=tuple(partners),
            refused=tuple(refused),
        )

    def _region(self, record: Record, views: ViewPlans, changes: ChangePlans, tally: _Tally) -> Region:
        """Read the box that some views of a scan need."""
        crop = covering_region(views, record)
        began = time.perf_counter()
        box = self.crops.read(record.key, crop.start_ijk, crop.size_ijk)
        tally.seconds += time.perf_counter() - began
        tally.voxels += box.numel()
        _check_finite(box, record)
        return Region(
            voxels=box.numpy() if self.makes else _packed(box, record),
            crop=crop,
            spacing_mm=record.spacing_mm,
            views=views,
            changes=changes,
            stats=self.crops.stats(record.key, self.spec),
        )

    def _partner(self, facts: Facts, record: Record, region: Region, slot: Slot, phase: int) -> Partner:
        (plan,) = region.views["global"]
        rng = self._rng(_PARTNER, slot, phase)
        return find_partner(facts, self.crops.store, record, plan, rng=rng, aside=slot.aside)

    def _other(self, region: Region, partner: Partner, slot: Slot, phase: int, tally: _Tally) -> Region:
        """The same place of the second scan: mirrored as the first is, its intensities changed by a plan of its own."""
        views = {OTHER: [partner.plan]}
        (change,) = draw_changes(self.views.augment, views, self._rng(_PARTNER_CHANGE, slot, phase))[OTHER]
        changes = {OTHER: [replace(change, flip_axes=region.changes["global"][0].flip_axes)]}
        if partner.record.key == slot.key:
            return replace(region, views=views, changes=changes, text="")
        return self._region(partner.record, views, changes, tally)

    def _flagged(self, region: Region, record: Record) -> Region:
        """The region with flags of what counts in its own views, where the recipe leaves something out."""
        if not self.views.left_out:
            return region
        places = region.places_mm
        flags = {
            f"{COUNTED}{name}": count_flags(
                self.crops.store, record, places[name], plans[0].size_ijk, self.views.left_out
            )
            for name, plans in region.views.items()
        }
        return replace(region, flags=flags)

    def _rng(self, purpose: int, slot: Slot, phase: int) -> np.random.Generator:
        return np.random.default_rng([purpose, self.seed, slot.epoch, slot.place, phase])

    def _make(self, region: Region) -> Made:
        views = make_views([region], self.spec, self.views)
        made = {name: view[0].numpy() for name, view in views.items()}
        return Made(views=made | region.all_flags, places_mm=region.places_mm, text=region.text, targets=region.targets)

    def _text(self, record: Record, changes: ChangePlans, rng: np.random.Generator) -> str:
        """Some of the scan's report, drawn anew for each sample; nothing where the recipe wants none."""
        if self.views.report is None or record.report is None:
            return ""
        plan = draw_report(self.views.report, record.report, rng)
        return apply_report(plan, record.report, mirrored=mirrored(changes))


def _check_finite(box: Float32[Tensor, "channel i j k"], record: Record) -> None:
    # A single one makes the sum so, and a sum is a tenth of the work of asking each.
    if not math.isfinite(float(box.sum())):
        raise StoreError(
            f"volume '{record.key[:16]}' holds voxels that are not numbers (NaN or infinite)",
            hint="ingest the scan again",
            code="not-finite",
        )


def _packed(
    box: Float32[Tensor, "channel i j k"], record: Record
) -> Float32[np.ndarray, "channel i j k"] | Int16[np.ndarray, "channel i j k"]:
    """The box for the way to the device, in half the bytes where that loses nothing."""
    return (box.to(torch.int16) if (record.slope, record.intercept) == (1.0, 0.0) else box).numpy()
