from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.views import cells, resample
from voxelstem.views.slide import Slab
from voxelstem.views.winners import largest, shares, winners

Triple = tuple[int, int, int]


def grid_of(shape: Triple, step: tuple[float, float, float], sub: int = 1) -> cells.CellGrid:
    """Cells of `step` voxels each over a scan, from its low edge."""
    affine, size = cells.cover(np.eye(4), shape, step)
    return cells.lay(np.eye(4), shape, affine, size, sub=sub)


def twin(logits: torch.Tensor, grid: cells.CellGrid) -> np.ndarray:
    """All kinds of all voxels at once."""
    places = [np.clip(p, m.min(), m.max()) for p, m in zip(grid.places(), grid.members(), strict=True)]
    steps = tuple(scale * grid.sub for scale in grid.scale)
    dense = resample.sample(logits, (places[0], places[1], places[2]), step_ijk=steps, outside=0.0)  # pyright: ignore[reportArgumentType]
    return dense.argmax(dim=0).numpy()


def cut(logits: torch.Tensor, axis: int, at: list[int]) -> list[Slab]:
    edges = sorted({0, *at, logits.shape[1 + axis]})
    return [Slab(start=low, values=logits.narrow(1 + axis, low, high - low)) for low, high in pairwise(edges)]


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(3, 14), st.integers(3, 14), st.integers(3, 14)),
    step=st.tuples(*[st.sampled_from([0.4, 0.75, 1.0, 1.7, 2.0, 3.3])] * 3),
    axis=st.integers(0, 2),
    sub=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_slabs_give_what_everything_at_once_gives(
    shape: Triple, step: tuple[float, float, float], axis: int, sub: int, data: st.DataObject
) -> None:
    grid = grid_of(shape, step, sub)
    logits = torch.randn(4, *grid.cells_ijk, generator=torch.Generator().manual_seed(0))
    at = data.draw(st.lists(st.integers(1, max(1, grid.cells_ijk[axis] - 1)), max_size=6))
    found = winners(cut(logits, axis, at), grid, axis=axis)
    wanted = twin(logits, grid)
    # Rounding may decide between kinds that are as good as equal.
    assert (found != wanted).mean() <= 0.002


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(3, 14), st.integers(3, 14), st.integers(3, 14)),
    step=st.tuples(*[st.sampled_from([0.4, 0.75, 1.0, 1.7, 2.0, 3.3])] * 3),
    axes=st.permutations([0, 1, 2]),
    most=st.integers(1, 12),
)
def test_shares_along_another_axis_give_what_the_whole_gives(
    shape: Triple, step: tuple[float, float, float], axes: list[int], most: int
) -> None:
    grid, (axis, across, _) = grid_of(shape, step), axes
    logits = torch.randn(4, *grid.cells_ijk, generator=torch.Generator().manual_seed(0))
    half = [grid.cells_ijk[axis] // 2]
    whole = winners(cut(logits, axis, half), grid, axis=axis)
    parts = shares(grid, axis=across, most=most)
    assert [one.voxels.start for one in parts] == [0, *(one.voxels.stop for one in parts[:-1])]
    assert parts[-1].voxels.stop == shape[across]
    widest = max(one.cells.stop - one.cells.start for one in parts)
    assert widest <= most or len(parts) == shape[across]
    found = [
        winners(
            cut(logits.narrow(1 + across, one.cells.start, one.cells.stop - one.cells.start), axis, half),
            grid,
            axis=axis,
            share=one,
        )
        for one in parts
    ]
    # Rounding may decide between kinds that are as good as equal.
    assert (np.concatenate(found, axis=across) != whole).mean() <= 0.002


def test_what_fits_is_one_share() -> None:
    (one,) = shares(grid_of((9, 8, 7), (1.0, 1.0, 1.0)), axis=1, most=8)
    assert (one.cells.start, one.cells.stop, one.voxels.stop) == (0, 8, 8)


def test_cells_that_are_voxels_are_not_interpolated() -> None:
    grid = grid_of((5, 6, 7), (1.0, 1.0, 1.0))
    logits = torch.randn(3, 5, 6, 7, generator=torch.Generator().manual_seed(2))
    for axis in range(3):
        np.testing.assert_array_equal(winners(cut(logits, axis, [2, 3]), grid, axis=axis), logits.argmax(dim=0).numpy())


def test_of_equal_kinds_the_first_wins() -> None:
    assert largest(torch.ones(3, 1, 2, 2)).tolist() == [[[0, 0], [0, 0]]]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slabs_that_do_not_follow_or_are_too_few_are_refused(axis: int) -> None:
    grid = grid_of((6, 6, 6), (1.0, 1.0, 1.0))
    slabs = cut(torch.zeros(2, 6, 6, 6), axis, [2, 4])
    with pytest.raises(ValueError, match="does not follow"):
        winners([slabs[0], slabs[2]], grid, axis=axis)
    with pytest.raises(ValueError, match="end before"):
        winners(slabs[:2], grid, axis=axis)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_cells_as_large_as_voxels_may_be_more_or_begin_before_them(axis: int) -> None:
    affine = np.eye(4)
    affine[:3, 3] = -2.0
    grid = cells.lay(np.eye(4), (5, 6, 7), affine, (10, 11, 9))
    logits = torch.randn(3, 10, 11, 9, generator=torch.Generator().manual_seed(4))
    found = winners(cut(logits, axis, [3, 6]), grid, axis=axis)
    np.testing.assert_array_equal(found, logits[:, 2:7, 2:8, 2:9].argmax(dim=0).numpy())
