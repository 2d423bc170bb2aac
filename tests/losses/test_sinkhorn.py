from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from voxelstem.losses.sinkhorn import sinkhorn


def naive_sinkhorn(logits: Tensor, temperature: float, iterations: int) -> list[list[float]]:
    """As DINOv2 writes it down, with every factor: a matrix of prototypes by rows that sums to 1."""
    rows, prototypes = logits.shape
    matrix = [[math.exp(float(logits[row, at]) / temperature) for row in range(rows)] for at in range(prototypes)]
    whole = sum(sum(line) for line in matrix)
    matrix = [[value / whole for value in line] for line in matrix]
    for _ in range(iterations):
        matrix = [[value / sum(line) / prototypes for value in line] for line in matrix]
        sums = [sum(line[row] for line in matrix) for row in range(rows)]
        matrix = [[value / sums[row] / rows for row, value in enumerate(line)] for line in matrix]
    return [[matrix[at][row] * rows for at in range(prototypes)] for row in range(rows)]


def draw(rows: int = 6, prototypes: int = 5) -> Tensor:
    return 2 * torch.rand(rows, prototypes, generator=torch.Generator().manual_seed(0)) - 1


def alone(logits: Tensor, temperature: float = 0.07, iterations: int = 3) -> Tensor:
    return sinkhorn(
        logits, temperature=temperature, peak=logits.amax(), total=lambda value: value, iterations=iterations
    )


@pytest.mark.parametrize(("temperature", "iterations"), [(0.04, 3), (0.07, 3), (0.5, 1), (0.07, 10)])
def test_it_equals_its_naive_twin(temperature: float, iterations: int) -> None:
    expected = torch.tensor(naive_sinkhorn(draw(), temperature, iterations))
    torch.testing.assert_close(alone(draw(), temperature, iterations), expected, atol=1e-6, rtol=1e-4)


def test_every_row_sums_to_one_and_in_the_end_every_prototype_is_used_alike() -> None:
    targets = alone(draw(30), iterations=200)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(30))
    torch.testing.assert_close(targets.sum(dim=0), torch.full((5,), 6.0), atol=1e-2, rtol=0)


def test_the_peak_cancels() -> None:
    one, two = (
        sinkhorn(draw(), temperature=0.1, peak=torch.tensor(peak), total=lambda value: value) for peak in (1.0, 0.3)
    )
    torch.testing.assert_close(one, two)


def test_the_smallest_temperature_stays_finite() -> None:
    targets = alone(draw(), temperature=0.005)
    assert targets.isfinite().all()
    assert (targets >= 0).all()


def test_shares_get_the_rows_of_the_whole_even_if_one_share_is_empty() -> None:
    logits = draw(7)
    shares = [logits[:0], logits[:4], logits[4:]]
    answers: list[Tensor | None] = [None] * len(shares)
    meeting, sums = threading.Barrier(len(shares)), [torch.zeros(5)] * len(shares)

    def work(rank: int) -> None:
        def total(value: Tensor) -> Tensor:
            sums[rank] = value
            meeting.wait()
            whole = torch.stack(sums).sum(dim=0)
            meeting.wait()
            return whole

        answers[rank] = sinkhorn(shares[rank], temperature=0.07, peak=logits.amax(), total=total)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat([answer for answer in answers if answer is not None]), alone(logits))


def test_targets_are_lightly_s(golden: Any) -> None:
    # Its SwaV loss holds it; its DINO loss knows centring only.
    logits = golden.cases.behind(0)[0]
    for temperature, iterations in golden.cases.SINKHORN:
        golden.agrees(f"lightly/sinkhorn/{temperature}/{iterations}", alone(logits, temperature, iterations))
