from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from voxelstem.views.tile import (
    centre_crop,
    cover,
    join_blocks,
    patch_share,
    seen,
    split_blocks,
    stitch,
    stitch_tokens,
    tile,
)

SHAPES = st.tuples(*[st.integers(1, 11)] * 3)
BLOCKS = st.tuples(*[st.integers(1, 5)] * 3)
Sizes = tuple[int, int, int]


def numbered(shape: Sizes) -> torch.Tensor:
    """A scan of two channels in which every voxel has a number of its own, from 1."""
    return torch.arange(1.0, 1 + 2 * int(np.prod(shape))).reshape(2, *shape)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, block=BLOCKS)
def test_stitching_undoes_tiling_exactly(shape: Sizes, block: Sizes) -> None:
    tiling = cover(shape, block)
    scan = numbered(shape)
    assert torch.equal(stitch(tile(scan, tiling, fill=0.0), tiling), scan)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, block=BLOCKS)
def test_every_voxel_is_in_exactly_one_block(shape: Sizes, block: Sizes) -> None:
    tiling = cover(shape, block)
    blocks = tile(numbered(shape), tiling, fill=0.0)
    assert blocks.shape == (np.prod(tiling.grid), 2, *block)
    assert blocks[blocks > 0].sort().values.tolist() == list(range(1, 1 + 2 * int(np.prod(shape))))


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, block=BLOCKS)
def test_seen_is_true_on_the_scan_and_false_on_padding(shape: Sizes, block: Sizes) -> None:
    tiling = cover(shape, block)
    assert torch.equal(seen(tiling), tile(numbered(shape), tiling, fill=0.0)[:, 0] > 0)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, block=BLOCKS)
def test_padding_is_less_than_a_block_and_all_at_the_far_end(shape: Sizes, block: Sizes) -> None:
    ends = np.array(cover(shape, block).padding).reshape(3, 2)[::-1]
    for (before, after), size, whole in zip(ends, shape, block, strict=True):
        assert before == 0
        assert 0 <= after < whole
        assert (size + after) % whole == 0


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, block=BLOCKS)
def test_a_centre_crop_takes_the_middle_and_pads_short_axes_on_both_sides(shape: Sizes, block: Sizes) -> None:
    scan, tiling = numbered(shape), centre_crop(shape, block)
    expected = scan
    for axis, (size, whole) in enumerate(zip(shape, block, strict=True), start=1):
        if size < whole:
            wide = [list(expected.shape), list(expected.shape)]
            wide[0][axis], wide[1][axis] = (whole - size) // 2, whole - size - (whole - size) // 2
            before, after = (torch.zeros(edge) for edge in wide)
            expected = torch.cat([before, expected, after], dim=axis)
        else:
            kept = size // whole * whole
            expected = expected.narrow(axis, size // 2 - kept // 2, kept)
    assert torch.equal(tile(scan, tiling, fill=0.0), split_blocks(expected, block))


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, block=BLOCKS, crop=st.booleans())
def test_the_slices_of_a_place_are_the_real_voxels_of_its_block(shape: Sizes, block: Sizes, crop: bool) -> None:
    tiling = centre_crop(shape, block) if crop else cover(shape, block)
    blocks, scan = tile(numbered(shape), tiling, fill=0.0), numbered(shape)
    for n, place in enumerate(np.ndindex(*tiling.grid)):
        voxels = scan[(slice(None), *tiling.slices(place))]
        assert blocks[n][blocks[n] > 0].sort().values.tolist() == voxels.flatten().sort().values.tolist()


def test_what_a_centre_crop_cut_away_comes_back_as_the_fill() -> None:
    scan, tiling = numbered((7, 4, 3)), centre_crop((7, 4, 3), (3, 4, 5))
    back = stitch(tile(scan, tiling, fill=0.0), tiling, fill=-1.0)
    assert torch.equal(back[:, :6], scan[:, :6])
    assert back[:, 6:].eq(-1).all()


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, patch=st.tuples(*[st.integers(1, 3)] * 3), per_block=st.tuples(*[st.integers(1, 3)] * 3))
def test_the_share_of_a_patch_is_the_mean_of_what_is_seen_of_it(shape: Sizes, patch: Sizes, per_block: Sizes) -> None:
    i, j, k = (a * b for a, b in zip(patch, per_block, strict=True))
    tiling = cover(shape, (i, j, k))
    expected = split_blocks(seen(tiling).float(), patch).mean(dim=(2, 3, 4)).T
    torch.testing.assert_close(patch_share(tiling, patch), expected)


def test_blocks_come_in_c_order_with_the_last_axis_fastest() -> None:
    array = numbered((4, 6, 6))
    blocks = split_blocks(array, (2, 3, 2))
    for n, (i, j, k) in enumerate(np.ndindex(2, 2, 3)):
        assert torch.equal(blocks[n], array[:, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3, 2 * k : 2 * k + 2])


def test_splitting_keeps_any_axes_that_lead() -> None:
    array = torch.randn(3, 2, 4, 4, 4)
    blocks = split_blocks(array, (2, 4, 2))
    assert blocks.shape == (4, 3, 2, 2, 4, 2)
    for row, channel in np.ndindex(3, 2):
        assert torch.equal(blocks[:, row, channel], split_blocks(array[row, channel], (2, 4, 2)))
    assert torch.equal(join_blocks(blocks, (2, 1, 2)), array)


def test_padding_holds_the_fill() -> None:
    tiling = cover((3, 5, 4), (4, 4, 4))
    blocks = tile(torch.ones(1, 3, 5, 4), tiling, fill=-7.0)
    assert blocks[:, 0][~seen(tiling)].unique().tolist() == [-7.0]


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, patch=st.tuples(*[st.integers(1, 3)] * 3), per_block=st.tuples(*[st.integers(1, 3)] * 3))
def test_a_stitched_token_lies_where_its_patch_lies(shape: Sizes, patch: Sizes, per_block: Sizes) -> None:
    i, j, k = (a * b for a, b in zip(patch, per_block, strict=True))
    tiling = cover(shape, (i, j, k))
    scan = torch.rand(1, *shape)
    # The token of a patch is the mean of its voxels, in C-order over the patches of each block.
    tokens = split_blocks(tile(scan, tiling, fill=0.0), patch).mean(dim=(2, 3, 4, 5)).T[..., None]
    stitched = stitch_tokens(tokens, tiling, patch)
    padded = F.pad(scan, tiling.padding)[0]
    assert stitched.shape == (*(size // cut for size, cut in zip(padded.shape, patch, strict=True)), 1)
    for ti, tj, tk in np.ndindex(*stitched.shape[:3]):
        a, b, c = (slice(at * size, (at + 1) * size) for at, size in zip((ti, tj, tk), patch, strict=True))
        torch.testing.assert_close(stitched[ti, tj, tk, 0], padded[a, b, c].mean())
