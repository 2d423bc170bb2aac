from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from voxelstem.backbones.disentangled import DisentangledConfig
from voxelstem.backbones.unet import UNet, UNetConfig
from voxelstem.errors import ConfigError
from voxelstem.losses.masked import masked_mse
from voxelstem.losses.volumes import known_class, volume_regression
from voxelstem.objectives.anatomy import Anatomy, AnatomyConfig
from voxelstem.protocols import Batch
from voxelstem.testing import make_batch
from voxelstem.views.crop import ViewKind
from voxelstem.views.mask import draw_voxels

NONE = ViewKind(count=0)


def backbone() -> UNetConfig:
    return UNetConfig(features=(4, 10), depths=(1, 1), strides=(1, 2), block_ijk=(8, 8, 8))


def anatomy(**settings: Any) -> Anatomy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Anatomy(AnatomyConfig(columns=3, mask_block=4, mask_ratio=0.5, **settings), UNet(backbone()))


@pytest.fixture
def batch() -> Batch:
    return make_batch((8, 8, 8), samples=4)


def painted(objective: Anatomy, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Truth, what was hidden, what is painted and the bottleneck, step by step."""
    truth, chance = batch.views["global"].flatten(0, 1), batch.chance.blocks(2)
    masked = draw_voxels(chance, (8, 8, 8), block_ijk=(4, 4, 4), ratio=0.5)
    features = objective.backbone.features(truth.masked_fill(masked, 0.0))
    return truth, masked, objective.backbone.decode(features), features[-1]


def test_the_loss_is_the_weighed_sum_of_three_terms(batch: Batch) -> None:
    objective = anatomy()
    truth, masked, guess, bottleneck = painted(objective, batch)
    assert (objective.anatomy_count, objective.pathology_count) == (5, 3)
    assert objective.volumes is not None
    assert objective.health is not None
    twice = {name: values.repeat_interleave(2, 0) for name, values in batch.targets.items()}
    wanted = {
        "reconstruction": masked_mse(guess, truth, masked).value,
        "anatomy": volume_regression(objective.volumes(bottleneck[:, :5]), twice["volumes"]).value,
        "pathology": known_class(objective.health(bottleneck[:, 5:8]), twice["pathology"][:, 0]).value,
    }
    output = objective.step(batch, progress=0.3)
    for name, value in wanted.items():
        assert output.scalars[f"loss/{name}"] == pytest.approx(float(value.detach()), rel=1e-5), name
    total = 0.70 * wanted["reconstruction"] + 0.15 * wanted["anatomy"] + 0.15 * wanted["pathology"]
    torch.testing.assert_close(output.loss, total)
    assert output.scalars["known/reconstruction"] == 8 * 256
    assert output.scalars["known/anatomy"] == 2 * 11


def test_the_released_form_is_minus_the_cosine(batch: Batch) -> None:
    objective = anatomy(anatomy_form="released")
    _, _, _, bottleneck = painted(objective, batch)
    assert objective.volumes is not None
    guess = objective.volumes(bottleneck[:, :5]).detach().double().numpy()
    # Its readout ends in a layer norm.
    assert np.abs(guess.mean(axis=1)).max() < 1e-5
    cosines = []
    for row, truth in zip(guess, batch.targets["volumes"].repeat_interleave(2, 0).double().numpy(), strict=True):
        known = ~np.isnan(truth)
        cosines.append(row[known] @ truth[known] / np.linalg.norm(row[known]) / np.linalg.norm(truth[known]))
    found = objective.step(batch, progress=0.0).scalars["loss/anatomy"]
    assert found == pytest.approx(-np.mean(cosines), abs=1e-5)


def test_the_last_fifth_of_the_bottleneck_answers_nothing_but_the_picture(batch: Batch) -> None:
    objective = anatomy()
    seen: list[torch.Tensor] = []
    real = objective.backbone.features

    def features(x: torch.Tensor) -> list[torch.Tensor]:
        maps = real(x)
        maps[-1].retain_grad()
        seen.append(maps[-1])
        return maps

    objective.backbone.features = features
    objective.backbone.rise = lambda maps, _chance: maps[0]
    objective.backbone.paint = lambda finest: torch.zeros_like(batch.views["global"].flatten(0, 1)) * finest.sum()
    objective.step(batch, progress=0.0).loss.backward()
    assert seen[0].grad is not None
    moved = seen[0].grad.abs().sum(dim=(0, 2, 3, 4)) > 0
    assert moved.tolist() == [True] * 8 + [False] * 2


def test_every_voxel_says_where_it_lies_between_the_views_of_its_scan(batch: Batch) -> None:
    objective = anatomy(place_weight=0.5, place_mm=40.0)
    assert objective.locate is not None
    truth, masked, _, _ = painted(objective, batch)
    said = objective.locate(objective.backbone.rise(objective.backbone.features(truth.masked_fill(masked, 0.0))))
    said = said.detach().numpy().reshape(4, 2, 3, 8, 8, 8)
    errors = []
    for sample, places in enumerate(batch.places_mm["global"].numpy()):
        guessed, true = [], []
        for view, (start, extent) in enumerate(places):
            for at in np.ndindex(8, 8, 8):
                guessed.append(said[sample, view][:, *at])
                true.append((start + (np.array(at) + 0.5) / 8 * extent) / 40.0)
        off = np.abs((np.array(guessed) - np.mean(guessed, 0)) - (np.array(true) - np.mean(true, 0)))
        errors.append(np.where(off < 1, off**2 / 2, off - 0.5).mean())
    output, without = (each.step(batch, progress=0.0) for each in (objective, anatomy()))
    assert output.scalars["loss/place"] == pytest.approx(np.mean(errors), rel=1e-4)
    difference = float((output.loss - without.loss).detach())
    assert difference == pytest.approx(0.5 * output.scalars["loss/place"], rel=1e-4)


def test_what_is_hidden_does_not_reach_the_network(batch: Batch) -> None:
    objective = anatomy()
    entered: list[torch.Tensor] = []
    objective.backbone.encoder.stem.register_forward_pre_hook(lambda _module, given: entered.append(given[0]))
    objective.step(batch, progress=0.0)
    _, masked, _, _ = painted(objective, batch)
    assert not entered[0][masked].any()
    assert torch.equal(entered[0][~masked], batch.views["global"].flatten(0, 1)[~masked])


def test_a_learned_number_stands_where_it_is_asked_for(batch: Batch) -> None:
    objective = anatomy(fill="token")
    assert objective.mask_token is not None
    objective.mask_token.data.fill_(0.7)
    entered: list[torch.Tensor] = []
    objective.backbone.encoder.stem.register_forward_pre_hook(lambda _module, given: entered.append(given[0]))
    objective.step(batch, progress=0.0).loss.backward()
    _, masked, _, _ = painted(objective, batch)
    assert (entered[0][masked] == 0.7).all()
    assert objective.mask_token.grad is not None
    assert objective.mask_token.grad.abs().sum() > 0
    assert anatomy().mask_token is None


def test_of_whom_nothing_is_known_nothing_is_said_but_that(batch: Batch) -> None:
    unknown = {name: torch.full_like(batch.targets[name], math.nan) for name in ("volumes", "pathology")}
    output = anatomy().step(replace(batch, targets=unknown), progress=0.0)
    assert output.scalars.keys() == {
        "loss/reconstruction",
        *(f"known/{name}" for name in ("reconstruction", "anatomy", "pathology")),
    }
    assert output.scalars["known/anatomy"] == output.scalars["known/pathology"] == 0
    assert float(output.loss.detach()) == pytest.approx(0.7 * output.scalars["loss/reconstruction"])
    released = anatomy(unknown_pathology="positive").step(replace(batch, targets=unknown), progress=0.0)
    assert released.scalars["known/pathology"] == 8


def test_air_and_what_is_flagged_do_not_count(batch: Batch) -> None:
    views = batch.views["global"].clone()
    views[..., :4] = 0.0
    airy = replace(batch, views={"global": views})
    objective = anatomy(background="ignored")
    truth, masked, guess, _ = painted(objective, airy)
    found = objective.step(airy, progress=0.0).scalars
    counted = truth > 0
    assert found["known/reconstruction"] == int((masked & counted).sum())
    wanted = masked_mse(guess, truth, masked & counted).value
    assert found["loss/reconstruction"] == pytest.approx(float(wanted.detach()), rel=1e-5)
    flags = torch.ones_like(views)
    flags[..., :2, :, :] = 0.0
    flagged = objective.step(replace(airy, views={"global": views, "counted:global": flags}), progress=0.0).scalars
    assert flagged["known/reconstruction"] == int((masked & counted & (flags.flatten(0, 1) > 0)).sum())


def test_the_visible_part_counts_only_when_it_has_a_weight(batch: Batch) -> None:
    without, with_ = (anatomy(visible_weight=weight).step(batch, progress=0.0) for weight in (0.0, 0.5))
    assert "loss/visible" not in without.scalars
    difference = float((with_.loss - without.loss).detach())
    assert difference == pytest.approx(0.5 * with_.scalars["loss/visible"], rel=1e-4)


def test_samples_hide_the_same_however_they_are_shared_out(batch: Batch) -> None:
    objective = anatomy(anatomy_weight=0.0, pathology_weight=0.0)
    whole = objective.step(batch, progress=0.0).loss
    halves = [objective.step(batch.part(at, at + 2), progress=0.0).loss for at in (0, 2)]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


def test_a_batch_that_does_not_say_what_is_asked_is_refused(batch: Batch) -> None:
    with pytest.raises(ConfigError, match="learns from 'volumes'") as caught:
        anatomy().step(replace(batch, targets={}), progress=0.0)
    assert "objective.anatomy_weight=0" in str(caught.value.hint)
    wide = batch.targets | {"volumes": torch.zeros(4, 8)}
    with pytest.raises(ConfigError, match=r"objective\.columns is 3, and the store's scans have 8 volumes"):
        anatomy().step(replace(batch, targets=wide), progress=0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_ratio": 0.0},
        {"mask_ratio": 1.0},
        {"mask_block": 0},
        {"reconstruction_weight": 0.0},
        {"anatomy_weight": -1.0},
        {"anatomy_channels": 0.8},
        {"columns": 0},
        {"place_weight": -1.0},
        {"place_mm": 0.0},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AnatomyConfig(**wrong)


def test_views_and_networks_that_do_not_fit_are_refused() -> None:
    config, view = AnatomyConfig(mask_block=4), ViewKind(size_ijk=(8, 8, 8))
    config.check(view, NONE, batch=1, backbone=backbone())
    with pytest.raises(ValueError, match="needs a U-Net with its decoder"):
        config.check(view, NONE, batch=1, backbone=DisentangledConfig())
    with pytest.raises(ValueError, match="its decoder"):
        config.check(view, NONE, batch=1, backbone=replace(backbone(), decoder=False))
    with pytest.raises(ValueError, match=r"multiple of 4 \(objective\.mask_block\)"):
        config.check(ViewKind(size_ijk=(8, 8, 6)), NONE, batch=1, backbone=backbone())
    with pytest.raises(ValueError, match="none or all of the 1 blocks"):
        AnatomyConfig(mask_block=8).check(view, NONE, batch=1, backbone=backbone())
    with pytest.raises(ValueError, match=r"set views\.global_\.count to 2"):
        replace(config, place_weight=1.0).check(view, NONE, batch=1, backbone=backbone())
