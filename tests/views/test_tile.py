from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from voxelstem.views.tile import Tiling, join_blocks, seen, split_blocks, stitch, stitch_tokens, tile

SHAPES = st.tuples(*[st.integers(1, 11)] * 3)
BLOCKS = st.tuples(*[st.integers(1, 5)] * 3)
Sizes = tuple[int, int, int]


def numbered(shape: Sizes) -> torch.Tensor:
    """A scan of two channels in which every voxel has a number of its own, from 1."""
    return torch.arange(1.0, 1 + 2 * int(np.prod(shape))).reshape(2, *shape)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, block=BLOCKS)
def test_stitching_undoes_tiling_exactly(shape: Sizes, block: Sizes) -> None:
    tiling = Tiling(shape_ijk=shape, block_ijk=block)
    scan = numbered(shape)
    assert torch.equal(stitch(tile(scan, tiling, fill=0.0), tiling), scan)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, block=BLOCKS)
def test_every_voxel_is_in_exactly_one_block(shape: Sizes, block: Sizes) -> None:
    tiling = Tiling(shape_ijk=shape, block_ijk=block)
    blocks = tile(numbered(shape), tiling, fill=0.0)
    assert blocks.shape == (np.prod(tiling.grid), 2, *block)
    assert blocks[blocks > 0].sort().values.tolist() == list(range(1, 1 + 2 * int(np.prod(shape))))


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, block=BLOCKS)
def test_seen_is_true_on_the_scan_and_false_on_padding(shape: Sizes, block: Sizes) -> None:
    tiling = Tiling(shape_ijk=shape, block_ijk=block)
    assert torch.equal(seen(tiling), tile(numbered(shape), tiling, fill=0.0)[:, 0] > 0)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, block=BLOCKS)
def test_padding_is_less_than_a_block_and_even_at_both_ends(shape: Sizes, block: Sizes) -> None:
    tiling = Tiling(shape_ijk=shape, block_ijk=block)
    ends = np.array(tiling.padding).reshape(3, 2)[::-1]
    for (before, after), size, whole in zip(ends, shape, block, strict=True):
        assert 0 <= before <= after <= before + 1
        assert before + after < whole
        assert (before + size + after) % whole == 0


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
    tiling = Tiling(shape_ijk=(3, 5, 4), block_ijk=(4, 4, 4))
    blocks = tile(torch.ones(1, 3, 5, 4), tiling, fill=-7.0)
    assert blocks[:, 0][~seen(tiling)].unique().tolist() == [-7.0]


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, patch=st.tuples(*[st.integers(1, 3)] * 3), per_block=st.tuples(*[st.integers(1, 3)] * 3))
def test_a_stitched_token_lies_where_its_patch_lies(shape: Sizes, patch: Sizes, per_block: Sizes) -> None:
    i, j, k = (a * b for a, b in zip(patch, per_block, strict=True))
    tiling = Tiling(shape_ijk=shape, block_ijk=(i, j, k))
    scan = torch.rand(1, *shape)
    # The token of a patch is the mean of its voxels, in C-order over the patches of each block.
    tokens = split_blocks(tile(scan, tiling, fill=0.0), patch).mean(dim=(2, 3, 4, 5)).T[..., None]
    stitched = stitch_tokens(tokens, tiling, patch)
    padded = F.pad(scan, tiling.padding)[0]
    assert stitched.shape == (*(size // cut for size, cut in zip(padded.shape, patch, strict=True)), 1)
    for ti, tj, tk in np.ndindex(*stitched.shape[:3]):
        a, b, c = (slice(at * size, (at + 1) * size) for at, size in zip((ti, tj, tk), patch, strict=True))
        torch.testing.assert_close(stitched[ti, tj, tk, 0], padded[a, b, c].mean())
