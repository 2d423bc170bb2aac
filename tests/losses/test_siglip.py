from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from voxelstem.losses.siglip import Form, cosines, pair_figures, siglip


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


def naive_cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)


def naive_released(image: Tensor, text: Tensor, temperature: float, bias: float) -> float:
    loss, count = 0.0, len(image)
    for i, one in enumerate(image.tolist()):
        for j, other in enumerate(text.tolist()):
            logit = math.exp(temperature) * naive_cosine(one, other) + bias
            loss -= log_sigmoid(logit if i == j else -logit) / count
    return loss


def naive_paper(image: Tensor, text: Tensor, temperature: float) -> float:
    """Equation by equation: each image among the texts, then each text among the images, then the average of both."""
    count, directions = len(image), []
    for rows, columns in ((image, text), (text, image)):
        loss = 0.0
        for i, one in enumerate(rows.tolist()):
            logits = [math.exp(temperature) * naive_cosine(one, other) for other in columns.tolist()]
            others = [log_sigmoid(-logit) for j, logit in enumerate(logits) if j != i]
            loss -= (log_sigmoid(logits[i]) + sum(others) / (count - 1)) / count
        directions.append(loss)
    return sum(directions) / 2


def ones(value: float) -> Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize(("temperature", "bias"), [(2.3026, -10.0), (0.0, 0.0), (4.0, 2.0)])
def test_the_released_form_equals_its_naive_twin(temperature: float, bias: float) -> None:
    image, text = torch.randn(6, 5) * 3, torch.randn(6, 5)
    found = siglip(cosines(image, text), ones(temperature), ones(bias))
    assert float(found) == pytest.approx(naive_released(image, text, temperature, bias), rel=1e-5)


def test_the_paper_s_form_equals_its_naive_twin_in_both_directions() -> None:
    image, text = torch.randn(6, 5) * 3, torch.randn(6, 5)
    found = siglip(cosines(image, text), ones(2.3), ones(-10.0), form="paper")
    assert float(found) == pytest.approx(naive_paper(image, text, 2.3), rel=1e-5)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_loss_and_gradients_are_those_of_the_peer(golden: Any, case: int) -> None:
    temperature, bias = (ones(value).requires_grad_() for value in golden.cases.SIGLIP[case])
    image, text = (side.requires_grad_() for side in golden.cases.pairs())
    loss = siglip(cosines(image, text), temperature, bias)
    loss.backward()
    golden.agrees(f"spectre/siglip/{case}/loss", loss)
    for name, leaf in {"image": image, "text": text}.items():
        golden.agrees(f"spectre/siglip/{case}/{name}", leaf.grad)
    for name, leaf in {"temperature": temperature, "bias": bias}.items():
        golden.agrees(f"spectre/siglip/{case}/{name}", leaf.grad[0])


@pytest.mark.parametrize("form", ["released", "paper"])
def test_the_mean_over_shares_is_the_loss_of_the_whole_batch(form: Form) -> None:
    cosine = cosines(torch.randn(6, 5), torch.randn(6, 5))
    parts = [siglip(cosine[at : at + 2], ones(2.0), ones(-1.0), first=at, form=form) for at in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), siglip(cosine, ones(2.0), ones(-1.0), form=form))


def test_pairs_that_are_alike_among_others_that_are_not_cost_nothing() -> None:
    # Factor 40: logits of +20 for pairs and -20 for others.
    cosine = torch.eye(4)
    assert float(siglip(cosine, ones(math.log(40)), ones(-20.0))) < 1e-6
    assert float(siglip(1 - cosine, ones(math.log(40)), ones(-20.0))) > 20


def test_no_pair_of_a_single_sample_is_divided_by_nothing() -> None:
    assert float(siglip(torch.ones(1, 1), ones(0.0), ones(5.0), form="paper")) == pytest.approx(-log_sigmoid(1.0))


def test_extreme_logits_stay_finite_with_their_gradient() -> None:
    temperature, bias = ones(9.0).requires_grad_(), ones(-10.0).requires_grad_()
    loss = siglip(-torch.eye(3), temperature, bias)
    loss.backward()
    assert loss.isfinite()
    assert temperature.grad is not None
    assert temperature.grad.isfinite()


def test_a_lower_precision_around_it_changes_nothing() -> None:
    image, text = torch.randn(4, 6), torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = siglip(cosines(image, text), ones(2.0), ones(-1.0))
    assert torch.equal(found, siglip(cosines(image, text), ones(2.0), ones(-1.0)))


def test_figures_say_how_alike_pairs_and_others_are_and_who_comes_first() -> None:
    cosine = torch.tensor([[0.9, 0.1, 0.2, 0.0], [0.8, 0.5, 0.3, 0.1]])
    figures = pair_figures(cosine)
    assert float(figures["cosine/pairs"]) == pytest.approx(0.7)
    assert float(figures["cosine/others"]) == pytest.approx(1.5 / 6)
    assert float(figures["top1"]) == 0.5
    assert float(pair_figures(cosine, first=2)["top1"]) == 0.0


def test_the_first_place_is_chance_where_all_texts_are_equally_near() -> None:
    assert float(pair_figures(torch.ones(5, 5))["top1"]) == pytest.approx(0.2)
