from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.layers import grid_positions
from voxelstem.losses.position import place_of
from voxelstem.objectives.mae import Mae, MaeConfig
from voxelstem.protocols import Batch
from voxelstem.views.crop import ViewKind

DECODER = EncoderConfig(dim=24, depth=1, heads=2)


def mae(make: Any, *, grid: tuple[int, int, int] = (1, 1, 1), scan_depth: int = 1, **settings: Any) -> Mae:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mae(MaeConfig(grid=grid, decoder=DECODER, **settings), make.backbone(scan_depth=scan_depth))


def test_the_loss_falls_on_a_batch_that_repeats(make):
    objective, batch = mae(make, grid=(2, 2, 2)), make.batch(16)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        output = objective.step(batch, progress=0.0)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_gradients_reach_both_levels_on_a_grid_of_blocks(make):
    objective = mae(make, grid=(2, 2, 2))
    assert objective.trains_scan_level
    objective.step(make.batch(16), progress=0.0).loss.backward()
    grads = {name: parameter.grad for name, parameter in objective.learner.named_parameters()}
    idle = {name for name, grad in grads.items() if grad is None or not grad.abs().sum() > 0}
    # Nothing is hidden behind the backbone's own mask token: hidden patches never enter.
    assert idle == {"mask_token"}


def test_without_a_scan_level_only_the_blocks_learn(make):
    objective = mae(make, scan_depth=0)
    assert not objective.trains_scan_level
    assert objective.step(make.batch(), progress=0.0).loss.isfinite()


class Spy:
    """Remembers what the encoder was asked and what it answered."""

    def __init__(self, objective: Mae, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        real = objective.backbone.encode

        def encode(blocks: Any, grid: Any, *, keep: Any, chance: Any) -> Any:
            tokens = real(blocks, grid, keep=keep, chance=chance)
            self.calls.append((blocks.clone(), keep.clone(), tokens))
            return tokens

        monkeypatch.setattr(objective.backbone, "encode", encode)


def test_the_encoder_never_sees_a_hidden_voxel(make, monkeypatch: pytest.MonkeyPatch):
    objective, batch = mae(make), make.batch()
    spy = Spy(objective, monkeypatch)
    objective.step(batch, progress=0.0)
    _, keep, tokens = spy.calls[0]
    assert keep.shape == (3, 1, 2)
    view = batch.views["global"].clone()
    for sample in range(3):
        for patch in set(range(8)) - set(keep[sample, 0].tolist()):
            i, j, k = 4 * (patch // 4), 4 * (patch // 2 % 2), 4 * (patch % 2)
            view[sample, 0, 0, i : i + 4, j : j + 4, k : k + 4] = torch.rand(4, 4, 4)
    objective.step(replace(batch, views={"global": view}), progress=0.0)
    _, keep_again, again = spy.calls[1]
    assert not torch.equal(view, batch.views["global"])
    assert torch.equal(keep, keep_again)
    assert torch.equal(tokens.patches, again.patches)
    assert torch.equal(tokens.scan, again.scan)


def test_each_row_hides_other_patches_and_each_seed_too(make, monkeypatch: pytest.MonkeyPatch):
    objective = mae(make, grid=(2, 2, 2))
    spy = Spy(objective, monkeypatch)
    for seed in (1, 2):
        objective.step(replace(make.batch(16), seed=seed), progress=0.0)
    one, two = (call[1].flatten(0, 1).sort(dim=1).values for call in spy.calls)
    assert len({tuple(row) for row in one.tolist()}) > 6
    assert not torch.equal(one, two)


def test_a_perfect_guess_would_cost_nothing_and_a_flat_one_costs_the_variance(make, monkeypatch: pytest.MonkeyPatch):
    objective = mae(make, keep=0.5, decode=0.5)
    for parameter in objective.decoder.answer.parameters():
        torch.nn.init.zeros_(parameter)
    # Targets are normalised to variance 1, so guessing 0 everywhere costs 1.
    assert float(objective.step(make.batch(), progress=0.0).loss.detach()) == pytest.approx(1.0, abs=1e-3)


def test_the_reconstruction_is_that_of_a_naive_loop(make, monkeypatch: pytest.MonkeyPatch):
    objective, batch = mae(make, normalise_targets=False, decode=0.75), make.batch(samples=2)
    for parameter in objective.decoder.answer.parameters():
        torch.nn.init.constant_(parameter, 0.0)
    spy = Spy(objective, monkeypatch)
    loss = objective.step(batch, progress=0.0).loss
    errors = []
    for sample, patch in itertools.product(range(2), range(8)):
        if patch not in spy.calls[0][1][sample, 0].tolist():
            i, j, k = 4 * (patch // 4), 4 * (patch // 2 % 2), 4 * (patch % 2)
            box = batch.views["global"][sample, 0, 0, i : i + 4, j : j + 4, k : k + 4]
            errors += [float(value) ** 2 for value in box.flatten()]
    assert float(loss.detach()) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_a_patch_s_place_is_that_of_a_naive_loop():
    grid, cells = (2, 1, 3), (2, 2, 1)
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(2, 2, 2, 3, generator=generator) * 100
    positions = grid_positions(cells)
    seen = place_of(positions.expand(2 * 2 * 6, -1, -1), places, grid)
    wanted = torch.empty(2, 2 * 6 * 4, 3)
    for sample in range(2):
        tokens = itertools.product(
            range(2), itertools.product(*map(range, grid)), itertools.product(*map(range, cells))
        )
        for row, (view, block, cell) in enumerate(tokens):
            start, extent = places[sample, view]
            for axis in range(3):
                whole = grid[axis] * cells[axis]
                number = block[axis] * cells[axis] + cell[axis]
                wanted[sample, row, axis] = start[axis] + (number + 0.5) / whole * extent[axis]
    assert torch.allclose(seen, wanted, atol=1e-3)


def test_the_position_term_counts_only_when_it_has_a_weight(make):
    batch = make.batch(16)
    without, with_ = (
        mae(make, grid=(2, 2, 2), position_weight=weight).step(batch, progress=0.0) for weight in (0.0, 2.0)
    )
    difference = float(with_.loss.detach() - without.loss.detach())
    position = next(value for name, value in with_.scalars.items() if "position" in name)
    assert difference == pytest.approx(2.0 * position, rel=1e-4)
    assert position > 0


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"decode": 0.0}, {"keep": 0.7, "decode": 0.7}])
def test_shares_that_cannot_be_are_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="keep"):
        MaeConfig(**wrong)


def test_a_batch_needs_no_local_views(make):
    batch: Batch = make.batch()
    only = replace(batch, views={"global": batch.views["global"]}, places_mm={"global": batch.places_mm["global"]})
    one, two = (mae(make).step(b, progress=0.0).loss for b in (batch, only))
    assert torch.equal(one, two)


@pytest.mark.parametrize("wrong", [{"grid": (0, 1, 1)}, {"position_weight": -1.0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MaeConfig(**wrong)


def test_a_view_must_be_the_grid_of_blocks(make):
    config, backbone = MaeConfig(grid=(2, 1, 1)), make.backbone().config
    config.check(ViewKind(size_ijk=(16, 8, 8)), ViewKind(count=0), batch=1, backbone=backbone)
    with pytest.raises(ValueError, match=r"which is \(16, 8, 8\), got \(8, 8, 8\)"):
        config.check(ViewKind(size_ijk=(8, 8, 8)), ViewKind(count=0), batch=1, backbone=backbone)


def test_a_share_that_rounds_to_no_patch_is_refused(make):
    backbone = make.backbone().config
    for wrong in ({"keep": 0.01}, {"decode": 0.01}, {"keep": 0.95, "decode": 0.05}):
        with pytest.raises(ValueError, match="of the 8 in a block"):
            MaeConfig(**wrong).check(ViewKind(size_ijk=(8, 8, 8)), ViewKind(count=0), batch=1, backbone=backbone)


def test_a_recipe_without_global_views_is_refused(make):
    with pytest.raises(ValueError, match=r"views\.global_\.count"):
        MaeConfig().check(ViewKind(count=0), ViewKind(), batch=1, backbone=make.backbone().config)


def test_a_decoder_without_blocks_is_refused_for_it_could_not_know_positions():
    with pytest.raises(ValueError, match=r"decoder\.depth"):
        MaeConfig(decoder=replace(DECODER, depth=0))
    assert MaeConfig(decoder=replace(DECODER, depth=0), encode_masks=True).encode_masks


def idle(objective: Mae) -> set[str]:
    """Parameters that a step gives no gradient."""
    return {name for name, member in objective.named_parameters() if member.grad is None or not member.grad.any()}


@pytest.mark.parametrize("position_weight", [0.0, 1.0])
@pytest.mark.parametrize("scan_depth", [0, 1])
def test_only_the_backbone_s_mask_token_gets_no_gradient(make, position_weight: float, scan_depth: int):
    objective = mae(make, grid=(2, 1, 1), scan_depth=scan_depth, position_weight=position_weight)
    view = make.batch(16).views["global"][..., :8, :8]
    batch = replace(make.batch(16), views={"global": view})
    objective.step(batch, progress=0.0).loss.backward()
    assert idle(objective) == {"backbone.mask_token"}
    assert any("locate" in name for name in objective.state_dict()) == bool(position_weight)


@pytest.mark.parametrize("encode_masks", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_views_of_one_value_give_a_finite_loss_and_gradient(make, encode_masks: bool, normalise: bool):
    objective = mae(make, encode_masks=encode_masks, normalise_targets=normalise)
    batch = make.batch()
    flat = replace(batch, views={"global": torch.full_like(batch.views["global"], 0.3)})
    loss = objective.step(flat, progress=0.0).loss
    loss.backward()
    assert loss.isfinite()
    assert all(member.grad.isfinite().all() for member in objective.parameters() if member.grad is not None)


@pytest.mark.parametrize("encode_masks", [False, True])
def test_the_mean_over_shares_is_the_loss_of_the_whole_batch(make, encode_masks: bool):
    objective, batch = mae(make, position_weight=0.5, encode_masks=encode_masks), make.batch(samples=4, views=2)
    whole = objective.step(batch, progress=0.0).loss
    halves = [objective.step(batch.part(start, start + 2), progress=0.0).loss for start in (0, 2)]
    torch.testing.assert_close(torch.stack(halves).mean(), whole, rtol=1e-6, atol=1e-6)


class TestMasksInTheEncoder:
    """SimMIM."""

    def test_every_parameter_of_the_first_level_learns_and_the_scan_level_does_not(self, make):
        objective = mae(make, encode_masks=True)
        assert objective.backbone.has_scan_level
        assert not objective.trains_scan_level
        objective.step(make.batch(), progress=0.0).loss.backward()
        assert {name.removeprefix("backbone.").split("_")[0] for name in idle(objective)} == {"scan"}

    def test_a_hidden_voxel_counts_as_truth_only(self, make):
        objective, batch = mae(make, encode_masks=True, keep=0.25, decode=0.75), make.batch()
        told: list[Any] = []
        objective.decoder.register_forward_hook(lambda _module, _given, answer: told.append(answer))
        loss = objective.step(batch, progress=0.0).loss
        kept = batch.chance.blocks(1).blocks(1).purpose("patches").uniform(8).argsort(dim=1)[:, :2]
        view = torch.rand_like(batch.views["global"])
        for sample, patch in itertools.product(range(3), range(8)):
            if patch in kept[sample].tolist():
                box = (sample, 0, 0, *(slice(4 * at, 4 * at + 4) for at in (patch // 4, patch // 2 % 2, patch % 2)))
                view[box] = batch.views["global"][box]
        other = objective.step(replace(batch, views={"global": view}), progress=0.0).loss
        assert torch.equal(told[0], told[1])
        assert not torch.equal(loss, other)

    def test_the_loss_is_that_of_a_naive_loop(self, make):
        objective, batch = mae(make, encode_masks=True, normalise_targets=False, decode=0.5), make.batch()
        order = batch.chance.blocks(1).blocks(1).purpose("patches").uniform(8).argsort(dim=1).tolist()
        errors = []
        for sample in range(3):
            view = batch.views["global"][sample]
            masked = torch.tensor([[patch not in order[sample][:2] for patch in range(8)]])
            tokens = objective.backbone.encode_blocks(view, masked=masked)[1][0]
            for patch in order[sample][2:6]:
                i, j, k = 4 * (patch // 4), 4 * (patch // 2 % 2), 4 * (patch % 2)
                voxels = view[0, 0, i : i + 4, j : j + 4, k : k + 4].flatten()
                errors += (objective.decoder(tokens[patch]) - voxels).square().tolist()
        wanted = sum(errors) / len(errors)
        assert float(objective.step(batch, progress=0.0).loss.detach()) == pytest.approx(wanted, rel=1e-5)

    def test_the_loss_falls_on_a_batch_that_repeats(self, make):
        objective, batch = mae(make, encode_masks=True), make.batch(samples=2)
        optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
        losses = []
        for _ in range(30):
            loss = objective.step(batch, progress=0.0).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.9 * losses[0]
