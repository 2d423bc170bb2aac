from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from voxelstem.backbones.atlas import Atlas, texture
from voxelstem.backbones.lean import LeanVit
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig, patchify
from voxelstem.chance import Chance
from voxelstem.errors import ConfigError

PATCH = (4, 4, 4)


def twin_texture(patch: np.ndarray, cell: int) -> list[list[float]]:
    """The same, voxel by voxel."""
    channels, *edges = patch.shape
    found: list[list[float]] = [[], []]
    for corner in itertools.product(*(range(0, edge, cell) for edge in edges)):
        inside = [slice(low, low + cell) for low in corner]
        found[0].append(math.log(math.sqrt(np.mean(patch[:, *inside].reshape(channels, -1).var(axis=1))) + 0.005))
        squares: list[float] = []
        for channel, *at in itertools.product(range(channels), *(range(low, low + cell) for low in corner)):
            beside = [
                np.clip(np.add(at, step), 0, np.subtract(edges, 1))
                for step in (*np.eye(3, dtype=int), *-np.eye(3, dtype=int))
            ]
            squares.append((sum(patch[channel, *at] - patch[channel, *place] for place in beside) / 6) ** 2)
        found[1].append(math.log(math.sqrt(np.mean(squares)) + 0.005))
    return found


@pytest.mark.parametrize("channels", [1, 2])
def test_texture_is_the_logarithm_of_spreads_and_second_differences(channels: int) -> None:
    patches = torch.rand(2, 3, channels * 4 * 4 * 2, generator=torch.Generator().manual_seed(3))
    found = texture(patches, (4, 4, 2), cell=2)
    assert found.shape == (2, 3, 2, 4)
    for row, patch in itertools.product(range(2), range(3)):
        voxels = patches[row, patch].double().numpy().reshape(channels, 4, 4, 2)
        np.testing.assert_allclose(found[row, patch].numpy(), twin_texture(voxels, 2), atol=1e-4)


def bodies(count: int, *, seed: int = 0) -> torch.Tensor:
    """Blocks of one make: a bright half of varying height, and noise that is stronger in one corner."""
    draw = torch.Generator().manual_seed(seed)
    x = 0.3 + 0.01 * torch.randn(count, 1, 8, 8, 8, generator=draw)
    x[:, :, 4:] += 0.2 + 0.1 * torch.rand(count, 1, 1, 1, 1, generator=draw)
    x[:, :, :4, :4, :4] += 0.05 * torch.randn(count, 1, 4, 4, 4, generator=draw)
    return x.clamp(0, 1)


def make(**changes: object) -> Atlas:
    torch.manual_seed(0)
    settings: dict[str, object] = {"places": 8, "cell": 1, "directions": (8, 8), "dim": 12}
    return Atlas(PATCH, **(settings | changes))  # pyright: ignore[reportArgumentType]


def measured(**changes: object) -> Atlas:
    atlas = make(**({"cell": 2, "directions": (10, 6)} | changes))
    atlas.measure([patchify(part, PATCH) for part in bodies(200).split(32)])
    return atlas


def test_numbers_are_deviations_from_what_is_usual_at_each_place_and_coarse_voxels() -> None:
    atlas, blocks = measured(), patchify(bodies(3, seed=1), PATCH)
    seen = texture(patchify(bodies(200), PATCH), PATCH, cell=2).double().numpy()
    usual, spread = seen.mean(axis=0), seen.std(axis=0) + 0.05
    found = atlas.numbers(blocks).double().numpy()
    for row in range(3):
        twin: list[list[float]] = [[], [], []]
        for place in range(8):
            z = (
                texture(blocks[row : row + 1, place : place + 1], PATCH, cell=2)[0, 0].numpy() - usual[place]
            ) / spread[place]
            z = z.clip(-4, 4)
            twin[0] += z.mean(axis=1).tolist()
            twin[1] += (np.clip(z, 0, 4) ** 2).mean(axis=1).tolist()
            twin[2] += [float(blocks[row, place].mean())]
        np.testing.assert_allclose(found[row], list(itertools.chain(*twin)), atol=2e-4)


def test_directions_of_the_measured_blocks_are_equally_loud_and_independent() -> None:
    atlas = measured()
    numbers = atlas.numbers(patchify(bodies(200), PATCH))
    found = (numbers - atlas.middle) @ atlas.turn.T
    covariance = torch.cov(found.T, correction=0)
    # Within each of the two kinds; of a variance w that is small beside the ridge, w / (w + 0.01) is left.
    for part in (slice(0, 10), slice(10, 16)):
        within = covariance[part, part]
        loud = within.diagonal()
        assert bool(((loud > 0.05) & (loud < 1.001)).all())
        assert (within - loud.diag()).abs().max() < 1e-3
    assert (covariance.diagonal() > 0.9).sum() > 8


def test_something_small_is_told_from_the_usual_although_larger_things_vary_more() -> None:
    atlas = measured()
    plain = bodies(64, seed=2)
    odd = plain.clone()
    odd[:, :, 6, 6, 6] += 0.15  # one voxel; the bright half varies by as much in every voxel
    at = [(atlas.numbers(patchify(x, PATCH)) - atlas.middle) @ atlas.turn.T for x in (plain, odd)]
    shift = (at[1] - at[0]).mean(dim=0)
    assert float(shift.norm()) > 3 * float((at[0] @ (shift / shift.norm())).std())
    # The same at once by the means of patches, whitened: it drowns.
    means = [patchify(x, PATCH).mean(dim=2) for x in (plain, odd)]
    moved = (means[1] - means[0]).mean(dim=0)
    assert float(moved.norm()) < 3 * float((means[0] @ (moved / moved.norm())).std())


def test_nothing_is_usual_before_it_was_measured_and_few_scans_leave_directions_silent() -> None:
    atlas, blocks = make(), patchify(bodies(4), PATCH)
    assert not atlas.is_measured
    assert torch.equal(atlas(blocks), torch.zeros(4, 12))
    atlas.measure([blocks])
    assert atlas.is_measured
    assert bool(torch.isfinite(atlas(patchify(bodies(4, seed=5), PATCH))).all())
    # Four blocks span three directions about their middle.
    assert [int(part.any(dim=1).sum()) for part in atlas.turn.split(8)] == [3, 3]


def test_what_was_measured_is_the_same_however_it_came() -> None:
    one, other = make(cell=2), make(cell=2)
    blocks = patchify(bodies(50), PATCH)
    one.measure([blocks])
    other.measure(list(blocks.split(7)))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], atol=1e-4, rtol=1e-4)


def network(**changes: object) -> ScanVit:
    torch.manual_seed(0)
    settings: dict[str, object] = {"atlas_cell": 2, "atlas_directions": (6, 4)}
    config = ScanVitConfig(patch_ijk=PATCH, block_ijk=(8, 8, 8), **(settings | changes))  # pyright: ignore[reportArgumentType]
    return ScanVit(config)


def test_a_block_s_cls_holds_what_is_unusual_and_its_tokens_stay() -> None:
    vit, blocks = network(), bodies(3, seed=1)
    assert vit.wants_measuring
    bare, tokens = vit.encode_blocks(blocks)
    vit.measure(list(bodies(100).split(20)))
    assert not vit.wants_measuring
    cls, again = vit.encode_blocks(blocks)
    assert vit.atlas is not None
    torch.testing.assert_close(cls, bare + vit.atlas(patchify(blocks, PATCH)))
    assert torch.equal(tokens, again)
    assert 0.3 < float((cls - bare).detach().std()) < 3  # as loud as cls
    assert not network(atlas_cell=0).wants_measuring


def test_noise_of_training_comes_from_the_keys() -> None:
    vit, blocks = network(atlas_noise=0.5), bodies(3, seed=1)
    vit.measure([bodies(100)])
    keys = Chance.of(3, count=3)
    plain, first = vit.encode_blocks(blocks)[0], vit.encode_blocks(blocks, chance=keys)[0]
    assert not torch.equal(plain, first)
    assert torch.equal(first, vit.encode_blocks(blocks, chance=keys)[0])
    torch.testing.assert_close(vit.encode_blocks(blocks[1:], chance=keys.part(1, 3))[0], first[1:])


def test_what_is_hidden_counts_as_usual() -> None:
    vit, blocks = network(), bodies(1)
    vit.measure([bodies(100)])
    other = blocks.clone()
    other[..., :4, :4, :4] = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(2))
    masked = torch.zeros(1, 8, dtype=torch.bool)
    masked[0, 0] = True
    assert torch.equal(vit.encode_blocks(blocks, masked=masked)[0], vit.encode_blocks(other, masked=masked)[0])
    assert not torch.equal(vit.encode_blocks(blocks)[0], vit.encode_blocks(other)[0])
    assert vit.atlas is not None
    parts = [patchify(x, PATCH) for x in (blocks, other)]
    plain, odd = (vit.atlas(part) for part in parts)
    hidden = vit.atlas(parts[1], masked=masked)
    assert float(odd.detach().norm()) > 2 * float(plain.detach().norm())
    assert float(hidden.detach().norm()) < 1.5 * float(plain.detach().norm())
    assert torch.equal(vit.atlas(parts[0], masked=torch.ones_like(masked)), torch.zeros(1, vit.dim))


def test_an_untrained_network_is_shown_the_same() -> None:
    vit, other, none = network(), network(), network(atlas_cell=0)
    vit.measure([bodies(100)])
    other.take_measured(vit)
    none.take_measured(vit)
    assert other.atlas is not None
    assert vit.atlas is not None
    assert all(torch.equal(*pair) for pair in zip(other.atlas.buffers(), vit.atlas.buffers(), strict=True))


def test_blocks_that_lie_otherwise_are_refused() -> None:
    vit, blocks = network(), torch.rand(1, 1, 4, 8, 16)
    for encode in (vit.encode_blocks, LeanVit(vit), lambda x: vit.intermediates(x, [1])):
        with pytest.raises(ConfigError, match="wants whole ones"):
            encode(blocks)


@pytest.mark.parametrize(
    "wrong",
    [{"atlas_cell": -1}, {"atlas_cell": 4}, {"atlas_directions": (0, 3)}, {"atlas_noise": -1.0}],
    ids=str,
)
def test_an_atlas_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="atlas_"):
        network(**wrong)
