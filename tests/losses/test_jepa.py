from __future__ import annotations

import math

import pytest
import torch

from voxelstem.losses.jepa import feature_error, normalise_features


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_features_are_normalised_as_by_a_naive_loop() -> None:
    tokens = 3 * noise(2, 3, 8) + 1
    got = normalise_features(tokens).flatten(0, 1)
    for row, values in enumerate(tokens.flatten(0, 1).tolist()):
        mean = sum(values) / 8
        variance = sum((value - mean) ** 2 for value in values) / 8
        torch.testing.assert_close(got[row], torch.tensor([(v - mean) / math.sqrt(variance + 1e-6) for v in values]))


def test_a_teacher_gains_nothing_by_shrinking() -> None:
    tokens = noise(4, 32)
    torch.testing.assert_close(normalise_features(0.01 * tokens), normalise_features(tokens), atol=0.02, rtol=0.02)


def test_a_token_of_one_value_becomes_zero() -> None:
    assert not normalise_features(torch.full((2, 8), 0.5)).any()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
def test_the_error_equals_its_naive_twin(beta: float) -> None:
    one, other = noise(3, 5, seed=1), noise(3, 5, seed=2)
    errors = []
    for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True):
        gap = abs(a - b)
        errors.append(gap * gap / (2 * beta) if gap < beta else gap - beta / 2)
    assert float(feature_error(one, other, beta=beta)) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_the_error_is_single_precision_whatever_is_predicted() -> None:
    assert feature_error(noise(2, 4).bfloat16(), noise(2, 4)).dtype == torch.float32
