from __future__ import annotations

import numpy as np
import pytest
import torch

from voxelstem.certainty.calibrators import Platt
from voxelstem.heads.manylabels import chances
from voxelstem.protocols import Head
from voxelstem.tasks.segment import Segment
from voxelstem.weights.heads import ScanHead, TokenHead

DIM = 5
RNG = np.random.default_rng(0)
MIDDLE, SCALE = 1000 + RNG.normal(size=DIM), RNG.uniform(0.5, 2.0, DIM)
ROWS = MIDDLE + SCALE * RNG.normal(size=(7, DIM))


def head(weight: np.ndarray, bias: np.ndarray, **more: np.ndarray) -> Head:
    arrays = {"middle": MIDDLE, "scale": SCALE, "weight": weight, "bias": bias}
    return Head(mode="probe", classes=("a", "b", "c"), arrays=arrays | more)


def said(module: torch.nn.Module, rows: np.ndarray = ROWS) -> list[np.ndarray]:
    return [output.numpy() for output in module(torch.from_numpy(rows).float())]


def slow_logits(given: Head, row: np.ndarray) -> list[float]:
    """One product after the other, in float64."""
    found = []
    for weights, start in zip(np.atleast_2d(given.arrays["weight"]), given.arrays["bias"], strict=True):
        total = float(start)
        for number, weight, middle, scale in zip(row, weights, MIDDLE, SCALE, strict=True):
            total += weight * (number - middle) / scale
        found.append(total)
    return found


def test_classes_are_the_naive_softmax_at_a_temperature():
    given = head(RNG.normal(size=(3, DIM)), RNG.normal(size=3))
    logits, probabilities = said(ScanHead(given, "one", temperature=2.5))
    for row, plain, share in zip(ROWS, logits, probabilities, strict=True):
        wanted = slow_logits(given, row)
        np.testing.assert_allclose(plain, wanted, atol=2e-4)  # float32 of numbers about 1000
        powers = [np.exp(one / 2.5) for one in wanted]
        np.testing.assert_allclose(share, [power / sum(powers) for power in powers], atol=1e-4)


def test_yes_and_no_are_standardised_class_by_class():
    arrays = {
        "middle": MIDDLE + RNG.normal(size=(3, DIM)),
        "scale": RNG.uniform(0.5, 2.0, (3, DIM)),
        "weight": RNG.normal(size=(3, DIM)),
        "bias": RNG.normal(size=3),
    }
    given = Head(mode="probe", classes=("a", "b", "c"), arrays=arrays, facts={"answers": "each"})

    class Seen:
        tokens = None
        tokens_affine_ras = None

        def __init__(self, scan: np.ndarray) -> None:
            self.scan = scan

    _, probabilities = said(ScanHead(given, "each"))
    wanted = [chances(given, Seen(row.astype(np.float32)), neighbours=1, temperature=1.0) for row in ROWS]
    np.testing.assert_allclose(probabilities, wanted, atol=1e-5)


def test_yes_and_no_come_out_calibrated_class_by_class():
    given = head(RNG.normal(size=(3, DIM)), RNG.normal(size=3))
    lines = [(0.5, -1.0), (1.0, 0.0), (2.0, 0.25)]
    logits, probabilities = said(ScanHead(given, "each", lines=lines))
    plain, raw = said(ScanHead(given, "each"))
    np.testing.assert_array_equal(logits, plain)
    for at, (scale, shift) in enumerate(lines):
        wanted = [Platt(scale=scale, shift=shift, positives=9, negatives=9).apply(raw[:, at])]
        np.testing.assert_allclose(probabilities[:, at], wanted[0], atol=1e-4)
    with pytest.raises(ValueError, match="3 classes need as many lines, got 2"):
        ScanHead(given, "each", lines=lines[:2])


def test_a_number_comes_in_its_unit():
    given = head(RNG.normal(size=DIM), np.array([60.0]))
    (value,) = said(ScanHead(given, "value"))
    np.testing.assert_allclose(value, [slow_logits(given, row)[0] for row in ROWS], atol=2e-4)


def test_a_risk_bends_the_baseline_and_a_certain_death_stays_one():
    baseline = np.array([0.9, 0.5, 0.0])
    given = head(RNG.normal(size=DIM), np.zeros(1), baseline=baseline)
    del given.arrays["bias"]
    risk, survival = said(ScanHead(given, "cox"))
    for one, curve in zip(risk, survival, strict=True):
        np.testing.assert_allclose(curve, [chance ** np.exp(one) for chance in baseline], rtol=1e-5)


def test_hazards_are_multiplied_interval_by_interval():
    given = head(RNG.normal(size=(4, DIM)), RNG.normal(size=4))
    (survival,) = said(ScanHead(given, "hazard"))
    for row, curve in zip(ROWS, survival, strict=True):
        alive, wanted = 1.0, []
        for logit in slow_logits(given, row):
            alive *= 1 - 1 / (1 + np.exp(-logit))
            wanted.append(alive)
        np.testing.assert_allclose(curve, wanted, atol=1e-4)


def test_hazards_far_out_are_certain_and_no_nan():
    given = head(np.zeros((2, DIM)), np.array([-500.0, 500.0]))
    (survival,) = said(ScanHead(given, "hazard"))
    np.testing.assert_array_equal(survival, np.tile([1.0, 0.0], (7, 1)))


def test_a_head_that_is_not_linear_is_refused():
    votes = Head(mode="knn", classes=("a",), arrays={"rows": np.zeros((2, DIM)), "truth": np.zeros(2)})
    for kind in ("one", "value", "cox", "hazard"):
        with pytest.raises(ValueError, match="no linear map"):
            ScanHead(votes, kind)
    with pytest.raises(ValueError, match="no linear map"):
        ScanHead(head(np.zeros(DIM), np.zeros(1)), "cox")  # without a baseline


def test_cells_of_a_token_lie_as_segment_lays_them():
    sub, kinds = 2, 3
    arrays = {
        "middle": MIDDLE.astype(np.float32),
        "scale": SCALE.astype(np.float32),
        "weight": RNG.normal(size=(DIM, sub**3 * kinds)).astype(np.float32),
        "bias": RNG.normal(size=sub**3 * kinds).astype(np.float32),
    }
    given = Head(mode="probe", classes=("a", "b"), arrays=arrays, facts={"sub": 2.0})
    (cells,) = said(TokenHead(given))
    assert cells.shape == (7, sub, sub, sub, kinds)
    grid = Segment().logits(given, ROWS.astype(np.float32).reshape(7, 1, 1, DIM))
    for place in range(7):
        block = grid[place * sub : (place + 1) * sub]
        np.testing.assert_allclose(cells[place], block, atol=1e-4)
