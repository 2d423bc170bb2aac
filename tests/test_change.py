from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelstem.backbones.disentangled import Disentangled, DisentangledConfig
from voxelstem.backbones.trajectory import Trajectory, TrajectoryConfig
from voxelstem.card import Card, write_weights
from voxelstem.change import Follower, change_map, conformal_half_width, rates, read_follower
from voxelstem.config import flatten
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.objectives.longitudinal import Longitudinal, LongitudinalConfig
from voxelstem.study import InputSpec, Provenance, Volume

BLOCK = (8, 8, 8)
SPEC = InputSpec(modality="MR", spacing_mm=(2.0, 2.0, 2.0), block_ijk=BLOCK, normalisation="unit99")
NETWORK = DisentangledConfig(width=2, levels=2, latent=4, block_ijk=BLOCK)


def volume(
    seed: int = 0, *, shape: tuple[int, int, int] = (8, 8, 8), edge: float = 2.0, modality: str = "MR"
) -> Volume:
    array = np.random.default_rng(seed).uniform(0, 500, (1, *shape)).astype(np.float32)
    affine = np.diag([edge, edge, edge, 1.0])
    affine[:3, 3] = [-10.0, 5.0, 3.0]
    return Volume(
        array=array,
        affine_ras=affine,
        modality=modality,
        provenance=Provenance(source_format="phantom", sha256="0" * 64, orientation="RAS"),
    )


@dataclass(frozen=True)
class Said:
    subject_mean: Tensor
    contrast_mean: Tensor


class Copying:
    """The subject is the scan itself with a second channel; the picture is that of the subject."""

    def latents(self, x: Tensor) -> Said:
        return Said(torch.cat([x, torch.zeros_like(x)], dim=1), torch.zeros_like(x))

    def reconstruct(self, subject: Tensor, contrast: Tensor) -> Tensor:
        return subject[:, :1] + subject[:, 1:] + contrast


def follower(step: float = 0.0) -> Follower:
    """What changes by `step` a year everywhere."""
    trajectory = Trajectory(TrajectoryConfig(hidden=2), 2)
    last = trajectory.move[-1]
    with torch.no_grad():
        last.bias.fill_(step)
    return Follower(network=Copying(), trajectory=trajectory, spec=SPEC)


def test_an_interval_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        errors = rng.standard_t(3, size=39)
        half = conformal_half_width(errors[:-1], level=0.9)
        assert half is not None
        held += abs(errors[-1]) <= half
    assert held / 2000 == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize(("people", "level", "rank"), [(9, 0.9, 9), (19, 0.95, 19), (20, 0.9, 19), (39, 0.9, 36)])
def test_the_half_width_is_the_right_order_statistic(people: int, level: float, rank: int) -> None:
    errors = np.random.default_rng(1).permutation(np.arange(1.0, people + 1)) * np.where(np.arange(people) % 2, 1, -1)
    assert conformal_half_width(errors, level=level) == rank


def test_too_few_people_give_no_interval_and_unknown_ones_do_not_count() -> None:
    errors = np.arange(1.0, 10.0)
    assert conformal_half_width(errors[:8], level=0.9) is None
    assert conformal_half_width(np.concatenate([errors, [np.nan] * 4]), level=0.9) == 9.0
    assert conformal_half_width(np.full(30, np.nan), level=0.9) is None
    with pytest.raises(ValueError, match="level"):
        conformal_half_width(errors, level=1.0)


def test_rates_carry_their_names_and_their_own_intervals() -> None:
    errors = np.stack([np.arange(1.0, 21.0), np.full(20, np.nan)], axis=1)
    ventricles, other = rates(np.array([2.0, -1.0]), ("ventricles", "hippocampus"), errors, level=0.9)
    assert (ventricles.structure, ventricles.per_year, ventricles.low, ventricles.high) == (
        "ventricles",
        2.0,
        -17.0,
        21,
    )
    assert (other.structure, other.per_year, other.low, other.high) == ("hippocampus", -1.0, None, None)
    with pytest.raises(ValueError, match="every structure"):
        rates(np.zeros(2), ("a",), errors)


def test_without_change_the_same_scan_is_expected_and_found() -> None:
    scan = volume()
    found = change_map(follower(), scan, scan, years=2.0)
    assert np.abs(found.difference.array).max() < 1e-5
    np.testing.assert_allclose(found.expected.affine_ras, scan.affine_ras)
    assert found.observed.array.min() == 0.0
    assert found.observed.array.max() == 1.0


def test_what_was_expected_is_taken_off_what_came() -> None:
    scan = volume(shape=(11, 9, 14))
    found = change_map(follower(0.1), scan, scan, years=2.0)
    np.testing.assert_allclose(found.difference.array, -0.2, atol=1e-5)
    np.testing.assert_allclose(found.difference.array, found.observed.array - found.expected.array, atol=1e-6)
    unknown = change_map(follower(0.1), scan, scan, years=math.nan)
    assert np.abs(unknown.difference.array).max() < 1e-5


def test_a_change_is_found_where_it_is_in_millimetres() -> None:
    first = volume(shape=(16, 16, 16), edge=1.0)
    array = first.array.copy()
    array[0, 10:12, 4:6, 6:8] = 500.0
    before = array.copy()
    before[0, 10:12, 4:6, 6:8] = 0.0
    second = Volume(array=array, affine_ras=first.affine_ras, modality="MR", provenance=first.provenance)
    first = Volume(array=before, affine_ras=first.affine_ras, modality="MR", provenance=first.provenance)
    difference = change_map(follower(), first, second, years=1.0).difference
    assert difference.spacing_mm == (2.0, 2.0, 2.0)
    where = np.array([*np.unravel_index(difference.array[0].argmax(), difference.shape_ijk), 1.0])
    centre = first.affine_ras @ np.array([10.5, 4.5, 6.5, 1.0])
    np.testing.assert_allclose(difference.affine_ras @ where, centre, atol=1.0)


@pytest.mark.parametrize("other", [volume(shape=(8, 8, 9)), volume(edge=2.1), volume(modality="CT")])
def test_scans_on_different_grids_and_of_other_modalities_are_refused(other: Volume) -> None:
    with pytest.raises(ConfigError, match=r"different grids|knows MR"):
        change_map(follower(), volume(), other, years=1.0)


def test_what_learned_of_time_is_read_back_from_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    objective = Longitudinal(
        LongitudinalConfig(trajectory=TrajectoryConfig(hidden=4, columns=3)), Disentangled(NETWORK)
    ).eval()
    torch.nn.init.normal_(objective.trajectory.move[-1].weight)
    card = Card(architecture=flatten(NETWORK), spec=SPEC, licence="other", recipe="test", trained=("block",))
    tensors, texts = objective.beside()
    write_weights(tmp_path / "weights", objective.backbone.state_dict(), card, tensors, texts)
    found = read_follower(tmp_path / "weights")
    mine = Follower(network=objective.backbone, trajectory=objective.trajectory, spec=SPEC)
    a, b, years = torch.rand(2, 1, *BLOCK), torch.rand(2, 1, *BLOCK), torch.tensor([[1.0], [2.0]])
    assert torch.equal(found.change_per_year(a, b, years), mine.change_per_year(a, b, years))
    assert found.change_per_year(a, b, years).shape == (2, 3)
    assert torch.equal(found.expected(a, b, years=2.0), mine.expected(a, b, years=2.0))
    # The rate is the same whichever scan is called the first.
    torch.testing.assert_close(found.change_per_year(b, a, -years), found.change_per_year(a, b, years))
    assert found.spec == SPEC


def test_weights_without_time_are_refused(tmp_path: Path) -> None:
    card = Card(architecture=flatten(NETWORK), spec=SPEC, licence="other", recipe="test", trained=("block",))
    write_weights(tmp_path / "weights", Disentangled(NETWORK).state_dict(), card)
    with pytest.raises(CheckpointError, match="nothing of time"):
        read_follower(tmp_path / "weights")
