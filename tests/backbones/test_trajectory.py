from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelstem.backbones.trajectory import Antisymmetric, Trajectory, TrajectoryConfig, age_code

NAN = math.nan


def network(channels: int = 8, **changes: float) -> Trajectory:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Trajectory(TrajectoryConfig(hidden=16, columns=3, **changes), channels)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def subject(rows: int = 4, channels: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(rows, channels, 2, 3, 2, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 33))
def test_swapping_the_scans_flips_every_sign_to_the_last_bit(seed: int, rows: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head, a, b = Antisymmetric(12, 20, 4), 3 * torch.randn(rows, 12), 3 * torch.randn(rows, 12)
    with torch.no_grad():
        there, back = head(a, b), head(b, a)
    assert torch.equal(there, -back)
    assert there.abs().max() > 0
    with torch.no_grad():
        assert (head(a, a) == 0).all()


def test_time_and_volumes_change_their_sign_with_the_order_of_the_scans() -> None:
    made = network()
    _, a = made.split(subject(seed=0))
    _, b = made.split(subject(seed=1))
    with torch.no_grad():
        assert torch.equal(made.years_between(a, b), -made.years_between(b, a))
        assert torch.equal(made.volume_change(a, b), -made.volume_change(b, a))
        assert made.volume_change(a, b).shape == (4, 3)


def test_identity_and_state_are_the_whole_subject() -> None:
    whole = subject()
    identity, state = network(state_share=0.25).split(whole)
    assert state.shape[1] == 2
    assert torch.equal(torch.cat([identity, state], dim=1), whole)


def test_after_no_time_the_state_is_itself_and_only_the_state_moves() -> None:
    made, whole = network(), subject()
    identity, state = made.split(whole)
    zero, unknown, two = torch.zeros(4, 1), torch.full((4, 1), NAN), torch.full((4, 1), 2.0)
    with torch.no_grad():
        assert torch.equal(made.foresee(state, zero, unknown), state)
        assert torch.equal(made.foresee(state, unknown, unknown), state)
        later = made.follow_up(whole, two, unknown)
    assert torch.equal(later[:, :4], identity)
    assert not torch.allclose(later[:, 4:], state)


def test_an_untrained_network_foresees_that_nothing_changes() -> None:
    made, whole = Trajectory(TrajectoryConfig(), 8), subject()
    with torch.no_grad():
        assert torch.equal(made.follow_up(whole, torch.full((4, 1), 5.0), torch.full((4, 1), 70.0)), whole)


def test_the_age_is_heard_and_an_unknown_one_is_no_age() -> None:
    made = network()
    _, state = made.split(subject())
    years = torch.ones(4, 1)
    with torch.no_grad():
        young, middle, unknown = (made.foresee(state, years, torch.full((4, 1), age)) for age in (20.0, 50.0, NAN))
    assert not torch.allclose(young, middle)
    assert not torch.allclose(middle, unknown)
    assert unknown.isfinite().all()
    assert age_code(torch.tensor([[100.0], [50.0], [0.0], [NAN]])).tolist() == [[1, 1], [0, 1], [-1, 1], [0, 0]]


@pytest.mark.parametrize("changes", [{"state_share": 0.0}, {"state_share": 1.0}, {"hidden": 0}, {"columns": -1}])
def test_settings_out_of_range_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"state_share|hidden"):
        TrajectoryConfig(**changes)


def test_a_share_that_leaves_one_side_empty_is_refused() -> None:
    with pytest.raises(ValueError, match="one side empty"):
        Trajectory(TrajectoryConfig(state_share=0.1), 2)
