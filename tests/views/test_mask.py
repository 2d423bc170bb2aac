from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.chance import Chance
from voxelstem.views.mask import above_lowest, draw_blocks, draw_cuboids, draw_ratios, draw_voxels

GRIDS = st.tuples(*[st.integers(1, 6)] * 3)


def draw(rows: int, grid: tuple[int, int, int], ratio: float, seed: int = 0) -> torch.Tensor:
    return draw_cuboids(Chance.of(seed, count=rows), grid, ratios=torch.full((rows,), ratio))


@settings(max_examples=60, deadline=None)
@given(grid=GRIDS, ratio=st.floats(0, 1, width=32), seed=st.integers(0, 99))  # ratios travel as float32
def test_every_row_hides_exactly_its_share(grid: tuple[int, int, int], ratio: float, seed: int) -> None:
    masks = draw(3, grid, ratio, seed)
    patches = grid[0] * grid[1] * grid[2]
    assert masks.shape == (3, patches)
    assert masks.sum(dim=1).tolist() == [round(ratio * patches)] * 3


def test_nothing_or_everything_can_be_hidden() -> None:
    assert not draw(2, (4, 4, 4), 0.0).any()
    assert draw(2, (4, 4, 4), 1.0).all()


def test_the_same_generator_draws_the_same_masks() -> None:
    assert torch.equal(draw(4, (6, 6, 6), 0.45, 1), draw(4, (6, 6, 6), 0.45, 1))
    assert not torch.equal(draw(4, (6, 6, 6), 0.45, 1), draw(4, (6, 6, 6), 0.45, 2))


def test_rows_differ() -> None:
    assert len({tuple(row.tolist()) for row in draw(8, (6, 6, 6), 0.45)}) == 8


def test_hidden_patches_lie_together_more_than_salt_and_pepper_would() -> None:
    masks = draw(32, (8, 8, 8), 0.3).unflatten(1, (8, 8, 8))
    beside = torch.cat([masks[:, :, :, 1:][masks[:, :, :, :-1]], masks[:, 1:][masks[:, :-1]]]).float().mean()
    # For patches hidden one by one, a hidden patch's neighbour would be hidden 30 % of the time.
    assert beside > 0.6


def test_every_patch_is_hidden_now_and_then() -> None:
    masks = draw(100, (5, 4, 3), 0.4)
    assert masks.any(dim=0).all()
    assert not masks.all(dim=0).any()


def test_a_row_hides_the_same_whatever_lies_beside_it() -> None:
    chance, ratios = Chance.of(3, count=6), torch.linspace(0.1, 0.9, 6)
    whole = draw_cuboids(chance, (4, 5, 6), ratios=ratios)
    parts = [draw_cuboids(chance.part(a, b), (4, 5, 6), ratios=ratios[a:b]) for a, b in ((0, 1), (1, 4), (4, 6))]
    assert torch.equal(torch.cat(parts), whole)


def test_no_row_is_no_mask() -> None:
    assert draw_cuboids(Chance.of(0, count=0), (2, 2, 2), ratios=torch.zeros(0)).shape == (0, 8)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999), samples=st.integers(1, 40), views=st.integers(1, 4), parts=st.sampled_from([1, 2, 4, 5])
)
def test_exactly_the_share_of_views_is_masked_where_it_is_a_whole_number(
    seed: int, samples: int, views: int, parts: int
) -> None:
    ratios = draw_ratios(seed, (views, samples), share=1 / parts, ratios=(0.2, 0.7))
    taken = ratios > 0
    assert ratios.shape == (views, samples)
    assert abs(int(taken.sum()) - views * samples / parts) < 1
    assert ((ratios[taken] >= 0.2) & (ratios[taken] < 0.7)).all()


def test_every_part_of_the_range_of_ratios_holds_one_view() -> None:
    for seed in range(20):
        ratios = draw_ratios(seed, (2, 16), share=0.5, ratios=(0.2, 0.7))
        taken = ratios[ratios > 0]
        assert ((taken - 0.2) / 0.5 * 16).floor().sort().values.tolist() == list(range(16))


def test_a_sample_s_ratios_follow_from_its_number_in_the_whole_batch() -> None:
    whole = draw_ratios(7, (2, 12), share=0.5, ratios=(0.1, 0.5))
    parts = [draw_ratios(7, (2, b - a), first=a, share=0.5, ratios=(0.1, 0.5)) for a, b in ((0, 3), (3, 4), (4, 12))]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_over_the_seeds_every_view_is_masked_equally_often_and_on_average_by_the_middle_ratio() -> None:
    drawn = torch.stack([draw_ratios(seed, (2, 8), share=0.5, ratios=(0.2, 0.7)) for seed in range(400)])
    often = (drawn > 0).float().mean(dim=0)
    assert ((often - 0.5).abs() < 0.1).all()
    assert abs(float(drawn[drawn > 0].mean()) - 0.45) < 0.01


class TestBlocks:
    """Salt and pepper in whole blocks."""

    @settings(max_examples=60, deadline=None)
    @given(grid=GRIDS, ratio=st.floats(0, 1), seed=st.integers(0, 99))
    def test_every_row_hides_exactly_its_share(self, grid: tuple[int, int, int], ratio: float, seed: int) -> None:
        blocks = grid[0] * grid[1] * grid[2]
        masked = draw_blocks(Chance.of(seed, count=3), grid, ratio=ratio)
        assert masked.shape == (3, blocks)
        assert masked.sum(dim=1).tolist() == [round(ratio * blocks)] * 3

    def test_of_a_thousand_blocks_three_quarters_are_750(self) -> None:
        voxels = draw_voxels(Chance.of(0), (160, 160, 160), block_ijk=(16, 16, 16), ratio=0.75)
        assert int(voxels.sum()) == 750 * 16**3

    def test_voxels_of_a_block_are_hidden_together(self) -> None:
        voxels = draw_voxels(Chance.of(1, count=2), (8, 6, 4), block_ijk=(4, 3, 2), ratio=0.5)
        assert voxels.shape == (2, 1, 8, 6, 4)
        masked = draw_blocks(Chance.of(1, count=2), (2, 2, 2), ratio=0.5)
        for row, i, j, k in np.ndindex(2, 8, 6, 4):
            assert voxels[row, 0, i, j, k] == masked[row, (i // 4) * 4 + (j // 3) * 2 + k // 2]

    def test_a_row_hides_the_same_whatever_lies_beside_it_and_rows_differ(self) -> None:
        chance = Chance.of(3, count=6)
        whole = draw_blocks(chance, (4, 5, 6), ratio=0.3)
        parts = [draw_blocks(chance.part(a, b), (4, 5, 6), ratio=0.3) for a, b in ((0, 1), (1, 4), (4, 6))]
        assert torch.equal(torch.cat(parts), whole)
        assert len({tuple(row) for row in whole.tolist()}) == 6

    def test_every_block_is_hidden_as_often_as_another(self) -> None:
        often = draw_blocks(Chance.of(0, count=4000), (3, 2, 2), ratio=0.25).float().mean(dim=0)
        # Four standard deviations of a share of 0.25 among 4000.
        assert ((often - 0.25).abs() < 4 * (0.25 * 0.75 / 4000) ** 0.5).all()

    def test_blocks_that_do_not_fill_a_view_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"blocks of \(4, 4, 4\) voxels must fill a view, got one of \(8, 8, 6\)"):
            draw_voxels(Chance.of(0), (8, 8, 6), block_ijk=(4, 4, 4), ratio=0.5)


def test_air_and_a_removed_face_hold_the_lowest_value_of_their_own_view() -> None:
    views = torch.tensor([[0.0, 0.0, 0.3, 1.0], [-1.2, 0.4, -1.2, 0.0]]).reshape(2, 1, 4, 1, 1)
    wanted = torch.tensor([[False, False, True, True], [False, True, False, True]])
    assert torch.equal(above_lowest(views).flatten(1), wanted)
