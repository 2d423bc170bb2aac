from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.chance import Chance
from voxelstem.views.mask import draw_cuboids

GRIDS = st.tuples(*[st.integers(1, 6)] * 3)


def draw(rows: int, grid: tuple[int, int, int], ratio: float, seed: int = 0) -> torch.Tensor:
    return draw_cuboids(Chance.of(seed, count=rows), grid, ratios=torch.full((rows,), ratio))


@settings(max_examples=60, deadline=None)
@given(grid=GRIDS, ratio=st.floats(0, 1), seed=st.integers(0, 99))
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
