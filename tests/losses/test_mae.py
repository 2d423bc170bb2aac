from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from voxelstem.losses.mae import normalise_patches, reconstruction


def test_it_equals_its_naive_twin() -> None:
    voxels = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(0))
    got = normalise_patches(voxels)
    for row, patch in np.ndindex(2, 3):
        values = voxels[row, patch].tolist()
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        expected = [(value - mean) / math.sqrt(variance + 1e-6) for value in values]
        torch.testing.assert_close(got[row, patch], torch.tensor(expected))


def test_every_patch_has_mean_zero_and_variance_one() -> None:
    got = normalise_patches(torch.rand(5, 64, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.5)
    torch.testing.assert_close(got.mean(dim=-1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.square().mean(dim=-1), torch.ones(5), atol=1e-3, rtol=0)


def test_brightness_and_contrast_of_a_patch_do_not_matter() -> None:
    voxels = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalise_patches(4 * voxels + 3), normalise_patches(voxels), atol=1e-3, rtol=1e-3)


def test_a_patch_of_air_becomes_zero_and_not_noise() -> None:
    assert not normalise_patches(torch.zeros(2, 16)).any()
    assert normalise_patches(torch.full((2, 16), 0.7)).abs().max() < 1e-3


@pytest.mark.parametrize("normalise", [False, True])
def test_the_error_equals_its_naive_twin(normalise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, voxels = (torch.rand(2, 3, 8, generator=generator) for _ in range(2))
    errors = []
    for row, patch in np.ndindex(2, 3):
        wanted = normalise_patches(voxels[row, patch]) if normalise else voxels[row, patch]
        errors += [(a - b) ** 2 for a, b in zip(predicted[row, patch].tolist(), wanted.tolist(), strict=True)]
    assert float(reconstruction(predicted, voxels, normalise=normalise)) == pytest.approx(sum(errors) / len(errors))


def test_a_guess_in_half_precision_is_compared_in_single() -> None:
    voxels = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    error = reconstruction(torch.zeros(2, 8, dtype=torch.bfloat16), voxels, normalise=True)
    assert error.dtype == torch.float32
    assert float(error) == pytest.approx(1.0, abs=1e-3)
