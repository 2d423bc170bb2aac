from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from voxelstem.heads import attending
from voxelstem.heads.attending import AttendConfig, Attention, Fitted, Loss, fit, parts_of, pool, score
from voxelstem.metrics import auroc
from voxelstem.protocols import Head

DIM = 12
QUICK = AttendConfig(steps=120)


def drawn(seed: int = 0, *, dim: int = 5, hidden: int = 3, out: int = 2) -> Attention:
    rng = np.random.default_rng(seed)
    return Attention(
        middle=rng.normal(size=dim),
        scale=rng.uniform(0.5, 2, size=dim),
        look=rng.normal(size=(hidden, dim)),
        gate=rng.normal(size=(hidden, dim)),
        rank=rng.normal(size=hidden),
        weight=rng.normal(size=(out, dim)),
        bias=rng.normal(size=out),
    )


def naive(attention: Attention, bag: np.ndarray) -> tuple[list[float], list[float]]:
    """Equation 9, one number after another: shares and logits."""
    rows = [[(x - m) / s for x, m, s in zip(h, attention.middle, attention.scale, strict=True)] for h in bag]
    loud = []
    for row in rows:
        total = 0.0
        for v, u, w in zip(attention.look, attention.gate, attention.rank, strict=True):
            seen = sum(a * b for a, b in zip(v, row, strict=True))
            gated = sum(a * b for a, b in zip(u, row, strict=True))
            total += w * math.tanh(seen) / (1 + math.exp(-gated))
        loud.append(math.exp(total))
    shares = [one / sum(loud) for one in loud]
    pooled = [sum(share * row[at] for share, row in zip(shares, rows, strict=True)) for at in range(len(rows[0]))]
    logits = [
        sum(a * b for a, b in zip(w, pooled, strict=True)) + b
        for w, b in zip(attention.weight, attention.bias, strict=True)
    ]
    return shares, logits


def entropy(truth: np.ndarray) -> Loss:
    known = torch.from_numpy(truth)
    return lambda logits, rows: F.cross_entropy(logits, known[torch.from_numpy(rows)])


def planted(count: int, seed: int) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray]]:
    """Bags whose mean is 0, so that it says nothing; three marked members say by their sign what the bag is."""
    rng = np.random.default_rng(seed)
    bags, marked, truth = [], [], np.arange(count) % 2
    for kind in truth:
        bag = rng.normal(size=(int(rng.integers(30, 60)), DIM))
        at = rng.permutation(len(bag))[:3]
        bag[at, 0] += 5
        bag[at, 1] += 2.5 * (2 * kind - 1)
        bags.append((bag - bag.mean(axis=0)).astype(np.float32))
        marked.append(at)
    return bags, truth, marked


def fitted_to(bags: list[np.ndarray], truth: np.ndarray, *, config: AttendConfig = QUICK, seed: int = 0) -> Fitted:
    parts = parts_of([f"s{index}" for index in range(len(bags))], truth, config, seed=seed)
    return fit(bags, entropy(truth), 2, config=config, parts=parts, seed=seed)


def ranked(attention: Attention, bags: list[np.ndarray], truth: np.ndarray) -> float:
    logits = np.stack([attention.score(bag) for bag in bags])
    return float(auroc(truth == 1, logits[:, 1] - logits[:, 0]))


def test_shares_and_logits_are_those_of_equation_9() -> None:
    attention, bag = drawn(), np.random.default_rng(1).normal(size=(7, 5))
    shares, logits = naive(attention, bag)
    np.testing.assert_allclose(attention.weights(bag), shares, rtol=1e-12)
    np.testing.assert_allclose(attention.score(bag), logits, rtol=1e-12)


def test_what_is_fitted_is_what_is_applied() -> None:
    attention, rng = drawn(), np.random.default_rng(2)
    bags = [rng.normal(size=(length, 5)) for length in (4, 1, 9)]
    rows = torch.from_numpy((np.concatenate(bags) - attention.middle) / attention.scale)
    matrices = [torch.from_numpy(array) for array in (attention.look, attention.gate, attention.rank)]
    packed = pool(rows, [4, 1, 9], *matrices).numpy()
    np.testing.assert_allclose(packed, [attention.pooled(bag) for bag in bags], rtol=1e-10)


@given(st.integers(0, 1000), st.integers(1, 40))
def test_the_order_of_the_members_does_not_matter(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    attention, bag, order = drawn(seed), rng.normal(size=(count, 5)), rng.permutation(count)
    np.testing.assert_allclose(attention.score(bag[order]), attention.score(bag), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(attention.weights(bag[order]), attention.weights(bag)[order], rtol=1e-9)
    assert attention.weights(bag).sum() == pytest.approx(1)


def test_a_bag_of_one_is_a_linear_head() -> None:
    attention, row = drawn(), np.random.default_rng(3).normal(size=5)
    plain = attention.weight @ ((row - attention.middle) / attention.scale) + attention.bias
    np.testing.assert_allclose(attention.score(row[None]), plain)


def test_large_bags_are_looked_at_in_parts_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, bag = drawn(), np.random.default_rng(4).normal(size=(23, 5))
    whole = attention.weights(bag), attention.score(bag)
    monkeypatch.setattr(attending, "ROWS_AT_ONCE", 5)
    np.testing.assert_allclose(attention.weights(bag), whole[0], rtol=1e-12)
    np.testing.assert_allclose(attention.score(bag), whole[1], rtol=1e-12)


def test_members_far_from_all_that_was_learned_give_no_warning_and_no_nan() -> None:
    bag = np.array([[1e6] * 5, [-1e6] * 5, [0.0] * 5])
    assert np.isfinite(drawn().score(bag)).all()


def test_a_head_survives_as_plain_arrays() -> None:
    attention, bag = drawn(), np.random.default_rng(5).normal(size=(6, 5))
    again = Attention.of({name: array.copy() for name, array in attention.arrays().items()} | {"other": bag})
    np.testing.assert_array_equal(again.score(bag), attention.score(bag))


def test_a_few_members_decide_where_the_mean_says_nothing() -> None:
    bags, truth, _ = planted(40, seed=0)
    others, wanted, marked = planted(60, seed=1)
    assert max(np.abs(bag.mean(axis=0)).max() for bag in others) < 1e-6
    attention = fitted_to(bags, truth).attention
    assert ranked(attention, others, wanted) > 0.97
    shares = [float(attention.weights(bag)[at].sum()) for bag, at in zip(others, marked, strict=True)]
    assert np.mean(shares) > 3 * np.mean([3 / len(bag) for bag in others])


def test_so_they_do_with_few_labels() -> None:
    others, wanted, _ = planted(60, seed=1)
    found = []
    for seed in (2, 3, 4):
        bags, truth, _ = planted(16, seed=seed)
        fitted = fitted_to(bags, truth)
        assert fitted.steps == QUICK.few_steps
        found.append(ranked(fitted.attention, others, wanted))
    assert np.mean(found) > 0.75


def test_where_nothing_is_to_be_learned_held_out_subjects_stop_it_before_it_does_harm() -> None:
    rng = np.random.default_rng(6)
    steps, found = [], []
    for seed in range(3):
        bags = [rng.normal(size=(20, DIM)).astype(np.float32) for _ in range(84)]
        truth = np.arange(84) % 2
        fitted = fitted_to(bags[:24], truth[:24], seed=seed)
        steps.append(fitted.steps)
        logits = np.stack([fitted.attention.score(bag) for bag in bags[24:]])
        found.append(float(F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(truth[24:]))))
    assert np.mean(steps) < QUICK.steps / 4
    assert np.mean(found) < math.log(2) + 0.05


def test_no_step_says_the_same_of_every_bag() -> None:
    bags, truth, _ = planted(8, seed=0)
    attention = fit(
        bags,
        entropy(truth),
        2,
        config=AttendConfig(few_steps=1, lr=1e-12),
        parts=np.zeros(8, dtype=np.int64),
        seed=0,
    ).attention
    np.testing.assert_allclose([attention.score(bag) for bag in bags], 0, atol=1e-6)
    np.testing.assert_allclose(attention.weights(bags[0]), 1 / len(bags[0]), rtol=1e-4)


def test_the_same_seed_gives_the_same_head() -> None:
    bags, truth, _ = planted(8, seed=0)
    heads = [fitted_to(bags, truth, config=AttendConfig(few_steps=5, most=20), seed=seed) for seed in (1, 1, 2)]
    for name, array in heads[0].attention.arrays().items():
        np.testing.assert_array_equal(array, heads[1].attention.arrays()[name])
    assert (heads[0].attention.weight != heads[2].attention.weight).any()


def test_torch_s_own_numbers_are_left_alone() -> None:
    bags, truth, _ = planted(8, seed=0)
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    fitted_to(bags, truth, config=AttendConfig(few_steps=2))
    assert torch.equal(torch.rand(3), wanted)


def test_members_are_standardised_with_every_bag_weighing_alike() -> None:
    rng = np.random.default_rng(8)
    bags = [rng.normal(3, 2, size=(length, 4)).astype(np.float32) for length in (5, 50, 11)]
    attention = fitted_to(bags, np.array([0, 1, 0]), config=AttendConfig(few_steps=1)).attention
    middle, variance = np.zeros(4), np.zeros(4)
    for bag in bags:
        middle += sum(row for row in bag) / len(bag) / 3
    for bag in bags:
        variance += sum((row - middle) ** 2 for row in bag) / len(bag) / 3
    np.testing.assert_allclose(attention.middle, middle, rtol=1e-5)
    shrunk = np.sqrt((3 * variance + 10 * variance.mean()) / 13)
    np.testing.assert_allclose(attention.scale, 2 * shrunk, rtol=1e-5)


def test_a_column_that_never_changes_does_no_harm() -> None:
    bags, truth, _ = planted(8, seed=0)
    told = [np.column_stack([bag, np.full(len(bag), 1e4 + 0.1, np.float32)]) for bag in bags]
    assert np.isfinite(fitted_to(told, truth, config=AttendConfig(few_steps=5)).attention.score(told[0])).all()


def test_more_than_one_logit_and_any_loss_of_logits_and_places_will_do() -> None:
    """A loss in which bags are compared to one another, as survival has it: 0 is to rank above 1, and so on."""
    bags, _, _ = planted(6, seed=0)
    seen: list[int] = []

    def loss(logits: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        seen.extend(rows.tolist())
        return F.softplus(logits[:, 0].diff()[torch.from_numpy(np.diff(rows) > 0)]).sum() + logits.square().sum()

    fitted = fit(bags, loss, 3, config=AttendConfig(few_steps=3), parts=np.zeros(6, dtype=np.int64), seed=0)
    assert fitted.attention.score(bags[0]).shape == (3,)
    assert set(seen) == set(range(6))


def test_subjects_are_held_out_whole_and_every_part_sees_every_class() -> None:
    config = AttendConfig(enough=5, folds=4)
    subjects = [f"s{index // 2}" for index in range(40)]
    strata = np.array([(index // 2) % 2 for index in range(40)])
    parts = parts_of(subjects, strata, config, seed=0)
    for subject in set(subjects):
        assert len({int(parts[index]) for index, one in enumerate(subjects) if one == subject}) == 1
    for part in range(4):
        assert set(strata[parts == part]) == {0, 1}
        assert (parts == part).sum() == 10
    assert (parts != parts_of(subjects, strata, config, seed=1)).any()
    np.testing.assert_array_equal(parts, parts_of(subjects, strata, config, seed=0))


def test_too_few_subjects_of_one_class_are_all_learned_from() -> None:
    strata = np.array([0] * 30 + [1] * 9)
    subjects = [f"s{index}" for index in range(39)]
    assert (parts_of(subjects, strata, AttendConfig(enough=10), seed=0) == 0).all()
    assert (parts_of(subjects, strata, AttendConfig(enough=9), seed=0) > 0).any()


@dataclass(frozen=True)
class Seen:
    tokens: np.ndarray
    scan: np.ndarray
    tokens_affine_ras: np.ndarray


def test_shares_are_laid_out_as_the_patches_lie() -> None:
    attention, tokens = drawn(), np.random.default_rng(9).normal(size=(2, 3, 4, 5))
    head = Head(mode="attention", classes=(), arrays=attention.arrays(), facts={"bag": "tokens"})
    said = score(head, Seen(tokens, np.zeros(5), np.eye(4)))
    flat = tokens.reshape(-1, 5)
    assert said.kind == "tokens"
    assert said.shares[1, 2, 3] == pytest.approx(attention.weights(flat)[-1])
    assert said.shares.sum() == pytest.approx(1)
    np.testing.assert_array_equal(said.logits, attention.score(flat))


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="must have the shape"):
        replace(drawn(), rank=np.zeros(4))
    with pytest.raises(ValueError, match="'bias' is not finite"):
        replace(drawn(), bias=np.array([0.0, np.nan]))
    arrays = drawn().arrays()
    del arrays["gate"]
    with pytest.raises(ValueError, match="'gate' is missing"):
        Attention.of(arrays)
    for bag in (np.zeros((0, 5)), np.zeros((3, 4)), np.zeros(5)):
        with pytest.raises(ValueError, match="members of 5 numbers"):
            drawn().score(bag)


def test_what_cannot_be_fitted_is_refused() -> None:
    parts = np.zeros(2, dtype=np.int64)
    for bags in ([], [np.zeros((0, 3)), np.ones((1, 3))], [np.ones((2, 3)), np.ones((2, 4))]):
        with pytest.raises(ValueError, match="bags of at least one member"):
            fit(bags, entropy(np.array([0, 1])), 2, config=QUICK, parts=parts, seed=0)
    pair = [np.ones((2, 3)), np.zeros((2, 3))]
    with pytest.raises(ValueError, match="one part for each of the 2 bags"):
        fit(pair, entropy(np.array([0, 1])), 2, config=QUICK, parts=np.zeros(3, dtype=np.int64), seed=0)
    for held in (np.arange(2), parts):
        with pytest.raises(ValueError, match="not finite"):
            fit(pair, lambda logits, _: logits.sum() * math.nan, 2, config=QUICK, parts=held, seed=0)


@pytest.mark.parametrize(
    "settings", [{"hidden": 0}, {"folds": 1}, {"lr": 0.0}, {"decay": -1.0}, {"drop": 1.0}, {"lr": 1.0, "decay": 1.0}]
)
def test_settings_without_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be|at least"):
        AttendConfig(**settings)
