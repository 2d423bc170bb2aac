from __future__ import annotations

import pytest
import torch
from torch import nn

from voxelstem.backbones.readouts import Progressive, Sides


@pytest.mark.parametrize(
    ("channels", "outputs", "widths"), [(160, 101, (1280, 2048, 256, 101)), (96, 2, (768, 1024, 256, 2))]
)
def test_layers_are_as_wide_as_ssl3d_s(channels: int, outputs: int, widths: tuple[int, ...]) -> None:
    layers = [layer for layer in Progressive(channels, outputs, last_norm=True).layers if isinstance(layer, nn.Linear)]
    assert (layers[0].in_features, *(layer.out_features for layer in layers)) == widths


def test_the_first_layer_is_never_wider_than_4096() -> None:
    first = Progressive(1000, 2, last_norm=False).layers[0]
    assert isinstance(first, nn.Linear)
    assert first.out_features == 4096


def test_a_map_is_averaged_to_eight_cells_and_only_a_last_norm_forgets_the_scale() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 4, 4, 4)
    halves = maps.unflatten(4, (2, 2)).unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean(dim=(3, 5, 7))
    for last_norm in (False, True):
        readout = Progressive(3, 5, last_norm=last_norm)
        torch.testing.assert_close(readout(maps), readout.layers(halves.flatten(1)))
        assert bool(readout(maps).mean(dim=1).abs().max() < 1e-6) is last_norm


def test_sides_paint_on_the_grid_of_the_finest_map_and_every_parameter_learns() -> None:
    torch.manual_seed(0)
    sides = Sides((3, 4, 5), (1, 2, 2), latent=6, channels=1)
    features = [torch.randn(2, width, edge, edge, edge) for width, edge in ((3, 8), (4, 4), (5, 2))]
    found = sides.latents(features)
    assert found.subject_mean.shape == (2, 6, 2, 2, 2)
    assert found.subject_logvar is not None
    assert found.contrast_logvar is not None
    picture = sides.reconstruct(found.subject_mean, found.contrast_mean)
    assert picture.shape == (2, 1, 8, 8, 8)
    (picture.square().mean() + found.subject_logvar.sum() + found.contrast_logvar.sum()).backward()
    idle = [name for name, value in sides.named_parameters() if value.grad is None]
    assert idle == []


def test_strides_that_doubling_does_not_undo_are_refused() -> None:
    with pytest.raises(ValueError, match="strides must be 1 or 2"):
        Sides((3, 4), (1, 3), latent=2, channels=1)
