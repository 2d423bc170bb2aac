"""Two scans of one person: how fast each structure changes, with an interval, and what changed beyond expectation.

Nothing here is a diagnosis. A rate's interval is right as often as it says for people like those it was calibrated on;
a map shows where the follow-up differs from what the network foresaw, which has many causes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from voxelstem.backbones.trajectory import FACTS, TENSORS, Trajectory, TrajectoryConfig
from voxelstem.card import read_tensors, read_text
from voxelstem.certainty.thresholds import conformal_quantile
from voxelstem.config import overlay
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.model import load
from voxelstem.resampling import resample
from voxelstem.study import InputSpec, Provenance, Volume
from voxelstem.views.intensity import limits, window
from voxelstem.views.slide import pad, slide

SAME_PLACE_MM = 0.5
"""Two grids are one where their corners lie no farther apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Annualised change of one structure."""

    structure: str
    per_year: float
    """In the unit of the volumes that were learned from, by year."""
    low: float | None
    """None where too few people were held out for an interval."""
    high: float | None
    level: float


def conformal_half_width(errors: Float[np.ndarray, "person"], *, level: float) -> float | None:
    """Half the width of an interval that holds a new person's true value with probability `level` at least.

    Split conformal prediction (Lei et al. 2018): the `conformal_quantile` of the absolute errors on people that were
    not learned from. It promises this for whatever network and distribution, as long as the new person is
    drawn like them; give one error for each person. NaN is left out.

    Returns:
        The half width in the errors' unit, or None where there are too few people for the level (19 for 0.95).

    Raises:
        ValueError: a level outside (0, 1).
    """
    half = conformal_quantile(np.abs(errors[~np.isnan(errors)]), level=level)
    return None if math.isinf(half) else half


def rates(
    predicted: Float[np.ndarray, "structure"],
    structures: Sequence[str],
    errors: Float[np.ndarray, "person structure"],
    *,
    level: float = 0.9,
) -> tuple[Rate, ...]:
    """A person's rates by name, each with its split-conformal interval.

    Args:
        predicted: Change per year of each structure.
        structures: Their names, in the same order.
        errors: Predicted minus true change per year of held-out people, one row each; NaN where nobody knows.
        level: Of the intervals.

    Raises:
        ValueError: not one name and one column of errors for each structure, or a level outside (0, 1).
    """
    if not len(predicted) == len(structures) == errors.shape[1]:
        raise ValueError(
            f"every structure needs a name and a column of errors, got {len(predicted)} rates, {len(structures)} names "
            f"and {errors.shape[1]} columns"
        )
    found: list[Rate] = []
    for name, value, column in zip(structures, predicted.tolist(), errors.T, strict=True):
        half = conformal_half_width(column, level=level)
        low, high = (None, None) if half is None else (value - half, value + half)
        found.append(Rate(structure=name, per_year=value, low=low, high=high, level=level))
    return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Follower:
    """A network that disentangles, with what it learned of time; both in evaluation mode."""

    network: Any
    """Has `latents` and `reconstruct` as `backbones.disentangled.Disentangled` has."""
    trajectory: Trajectory
    spec: InputSpec

    @torch.inference_mode()
    def expected(
        self,
        first: Float[Tensor, "row 1 i j k"],
        second: Float[Tensor, "row 1 i j k"],
        *,
        years: float,
        age_years: float = math.nan,
    ) -> Float[Tensor, "row 1 i j k"]:
        """Paint the follow-up: the first scan's identity, its state `years` later, the second scan's contrast.

        Only how the second scan was taken is read from it; what it shows of the person is not.
        """
        subject = self.network.latents(first).subject_mean
        time, age = first.new_full((len(first), 1), years), first.new_full((len(first), 1), age_years)
        later = self.trajectory.follow_up(subject, time, age)
        return self.network.reconstruct(later, self.network.latents(second).contrast_mean)

    @torch.inference_mode()
    def change_per_year(
        self, first: Float[Tensor, "row 1 i j k"], second: Float[Tensor, "row 1 i j k"], years: Float[Tensor, "row 1"]
    ) -> Float[Tensor, "row structure"]:
        """Annualised change of each structure between scans that are `years` apart (not 0)."""
        _, a = self.trajectory.split(self.network.latents(first).subject_mean)
        _, b = self.trajectory.split(self.network.latents(second).subject_mean)
        return self.trajectory.volume_change(a, b) / years


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangeMap:
    """The follow-up as it was foreseen and as it came, on one grid at the network's spacing; values as the spec's."""

    expected: Volume
    observed: Volume
    difference: Volume
    """Observed minus expected."""
    years: float


def read_follower(folder: Path) -> Follower:
    """Read a weights folder that the objective `longitudinal` trained.

    Raises:
        CheckpointError: the weights know nothing of time, or are damaged.
    """
    model = load(folder)
    if TENSORS not in model.card.extras:
        raise CheckpointError(
            f"{Path(folder).name} has learned nothing of time: it has no {TENSORS}",
            hint="give weights that objective longitudinal trained",
        )
    config = overlay(TrajectoryConfig(), json.loads(read_text(folder, model.card, FACTS)))
    trajectory = Trajectory(config, model.backbone.config.latent)
    trajectory.load_state_dict(read_tensors(folder, model.card, TENSORS))
    return Follower(network=model.backbone, trajectory=trajectory.eval(), spec=model.spec)


def change_map(
    follower: Follower, first: Volume, second: Volume, *, years: float, age_years: float = math.nan
) -> ChangeMap:
    """What changed between two scans beyond what was to be expected after so much time.

    Both scans are brought to the spec's spacing and normaliser; the network looks at them through a window that
    slides, so a scan may be of any size.

    Args:
        follower: As `read_follower` gives it.
        first: The earlier scan.
        second: The follow-up, registered to it: on the same grid.
        years: Between them; NaN (nobody knows) expects what was there before.
        age_years: At the first scan; NaN where nobody knows.

    Raises:
        ConfigError: another modality than the network knows, or scans that do not lie on one grid.
        IngestError: a scan cannot be normalised (`limits` says why).
    """
    _check_pair(first, second, follower.spec)
    spec, scans = follower.spec, list[Tensor]()
    affine = first.affine_ras
    for volume in (first, second):
        array, affine = resample(volume.array, volume.affine_ras, spec.spacing_mm)
        scans.append(window(torch.from_numpy(array.astype(np.float32)), limits(volume.array, spec)))

    def look(box: Float[Tensor, "row 2 i j k"]) -> Tensor:
        return follower.expected(box[:, :1], box[:, 1:], years=years, age_years=age_years)

    # Each by its own air: the two begin at values of their own.
    padded = torch.cat([pad(scan, spec.block_ijk, outside=float(scan.min())) for scan in scans])
    i, j, k = scans[0].shape[1:]
    expected = slide(look, padded, spec.block_ijk)[:, :i, :j, :k].numpy()
    observed = scans[1].numpy()
    notes = ("made by a network: no measurement", *second.provenance.notes)
    said = {"expected": expected, "observed": observed, "difference": observed - expected}
    volumes = {
        name: Volume(
            array=array,
            affine_ras=affine,
            modality=second.modality,
            provenance=Provenance(
                source_format=second.provenance.source_format,
                sha256=second.provenance.sha256,
                orientation=second.provenance.orientation,
                notes=notes if name != "observed" else second.provenance.notes,
            ),
        )
        for name, array in said.items()
    }
    return ChangeMap(**volumes, years=years)


def _check_pair(first: Volume, second: Volume, spec: InputSpec) -> None:
    for volume in (first, second):
        if volume.modality != spec.modality:
            raise ConfigError(
                f"the network knows {spec.modality}, and a scan is {volume.modality}", hint="give scans it knows"
            )
    corner = np.array([*first.shape_ijk, 1.0])
    ends = [scan.affine_ras @ point for scan in (first, second) for point in (np.array([0.0, 0, 0, 1]), corner)]
    apart = max(np.linalg.norm(ends[2] - ends[0]), np.linalg.norm(ends[3] - ends[1]))
    if first.shape_ijk != second.shape_ijk or apart > SAME_PLACE_MM:
        raise ConfigError(
            f"the scans lie on different grids: {first.shape_ijk} and {second.shape_ijk} voxels, "
            f"corners {apart:.1f} mm apart where {SAME_PLACE_MM} mm is the most",
            hint="register the follow-up to the first scan and resample it to the same grid",
        )
