from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import nn

from voxelstem.heads import queries
from voxelstem.heads.queries import Celled, Decoder, Layer, Linear, QueryConfig, dice, fit, logits
from voxelstem.losses.overlap import tversky

DIM, CELL, KINDS = 6, 2, 3
SMALL = QueryConfig(width=8, heads=2, layers=1, steps=40, few_steps=20)


def scan(seed: int, *, tokens: int = 40, subject: str = "") -> Celled:
    """Cells of a kind that the token's first numbers and the mean of the whole scan decide together."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(tokens, DIM)) + 2 * rng.normal(size=DIM)
    kind = np.stack([(rows - rows.mean(axis=0))[:, at : at + KINDS].argmax(axis=1) for at in range(CELL)], axis=1)
    return Celled(
        subject=subject or f"s{seed}",
        tokens=rows.astype(np.float32),
        counts=np.eye(KINDS, dtype=np.float32)[kind],
        importance=np.ones(tokens, np.float32),
    )


def line(seed: int = 0) -> Linear:
    rng = np.random.default_rng(seed)
    return Linear(
        middle=rng.normal(size=DIM).astype(np.float32),
        scale=rng.uniform(1, 2, size=DIM).astype(np.float32),
        weight=rng.normal(size=(DIM, CELL * KINDS)).astype(np.float32),
        bias=rng.normal(size=CELL * KINDS).astype(np.float32),
    )


def applied(start: Linear, tokens: np.ndarray) -> np.ndarray:
    return ((tokens - start.middle) / start.scale @ start.weight + start.bias).reshape(-1, CELL, KINDS)


def drawn(seed: int = 0) -> Decoder:
    """A decoder whose masks are not 0 any more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(dim=DIM, cell=CELL, kinds=KINDS, width=8, heads=2, layers=2)
        nn.init.normal_(decoder.fc2.weight)
    decoder.weight.copy_(torch.from_numpy(line().weight))
    return decoder.eval()


def naive_layer(layer: Layer, asked: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Multi-head attention of queries over themselves and the tokens, one pair after another."""

    def through(module: nn.Linear, row: np.ndarray) -> np.ndarray:
        return module.weight.detach().numpy() @ row + module.bias.detach().numpy()

    def normed(module: nn.LayerNorm, row: np.ndarray) -> np.ndarray:
        plain = (row - row.mean()) / math.sqrt(row.var() + module.eps)
        return plain * module.weight.detach().numpy() + module.bias.detach().numpy()

    width = asked.shape[1]
    part = width // layer.heads
    asking = [normed(layer.norm1, row) for row in asked]
    pairs = [through(layer.kv, row) for row in [*asking, *seen]]
    result = []
    for row, ask in zip(asked, asking, strict=True):
        query, mixed = through(layer.q, ask), np.zeros(width)
        for head in range(layer.heads):
            own = slice(head * part, (head + 1) * part)
            loud = [math.exp(query[own] @ pair[:width][own] / math.sqrt(part)) for pair in pairs]
            for share, pair in zip(loud, pairs, strict=True):
                mixed[own] += share / sum(loud) * pair[width:][own]
        seeing = row + through(layer.proj, mixed)
        hidden = through(layer.fc1, normed(layer.norm2, seeing))
        hidden = np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in hidden])
        result.append(seeing + through(layer.fc2, hidden))
    return np.stack(result)


def test_a_layer_is_multi_head_attention_and_an_mlp() -> None:
    torch.manual_seed(0)
    layer, rng = Layer(8, 2).double(), np.random.default_rng(0)
    asked, seen = rng.normal(size=(KINDS, 8)), rng.normal(size=(5, 8))
    found = layer(torch.from_numpy(asked), torch.from_numpy(seen), torch.zeros(5, dtype=torch.float64))
    np.testing.assert_allclose(found.detach().numpy(), naive_layer(layer, asked, seen), rtol=1e-9, atol=1e-12)


def test_a_token_that_stands_for_three_counts_as_three() -> None:
    decoder = drawn()
    rows = torch.from_numpy(scan(0, tokens=7).tokens)
    many = rows.repeat_interleave(torch.tensor([3, 1, 1, 2, 1, 1, 1]), dim=0)
    with torch.no_grad():
        few = decoder.masks(decoder.see(rows), torch.tensor([3.0, 1, 1, 2, 1, 1, 1]).log())
        torch.testing.assert_close(few, decoder.masks(decoder.see(many), torch.zeros(len(many))))


@given(st.integers(0, 1000), st.integers(1, 30))
def test_a_token_is_labelled_alike_wherever_it_stands_in_the_list(seed: int, count: int) -> None:
    decoder = drawn()
    arrays = {name: tensor.numpy() for name, tensor in decoder.state_dict().items()}
    arrays |= {"middle": np.zeros(DIM, np.float32), "scale": np.ones(DIM, np.float32)}
    rows, order = scan(seed, tokens=count).tokens, np.random.default_rng(seed).permutation(count)
    one = logits(arrays, rows, kinds=KINDS, heads=2)
    np.testing.assert_allclose(logits(arrays, rows[order], kinds=KINDS, heads=2), one[order], rtol=1e-3, atol=1e-4)


def test_what_a_token_is_depends_on_the_others() -> None:
    decoder = drawn()
    rows = torch.from_numpy(scan(0).tokens)
    with torch.no_grad():
        alone, together = (decoder(part, torch.zeros(len(part)))[0] for part in (rows[:1], rows))
    assert (alone - together).abs().max() > 1e-3


def test_large_scans_are_labelled_in_parts_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = fit([scan(seed) for seed in range(2)], line(), balance=0.5, config=SMALL, seed=0)
    rows = scan(5).tokens
    whole = logits(fitted.arrays, rows, kinds=KINDS, heads=2)
    monkeypatch.setattr(queries, "ROWS_AT_ONCE", 7)
    np.testing.assert_allclose(logits(fitted.arrays, rows, kinds=KINDS, heads=2), whole, rtol=1e-5, atol=1e-6)


def test_dice_is_tversky_s_where_cells_hold_one_kind_and_counts_a_full_hit_where_shares_are_met() -> None:
    rng = np.random.default_rng(0)
    said = torch.from_numpy(rng.normal(size=(8, 1, KINDS))).float()
    truth = torch.from_numpy(rng.integers(0, KINDS, size=(8,)))
    hard = torch.eye(KINDS)[truth][:, None]
    grid = said[:, 0].T.reshape(1, KINDS, 2, 2, 2)
    wanted = tversky(grid, truth.reshape(1, 2, 2, 2), missed=0.5, too_much=0.5)
    assert float(dice(said, hard)) == pytest.approx(float(wanted), rel=1e-5)
    assert float(dice(said, said.softmax(dim=2))) == pytest.approx(1)


def test_dice_of_soft_cells_is_that_of_the_slow_twin() -> None:
    rng = np.random.default_rng(1)
    said, counts = rng.normal(size=(5, CELL, KINDS)), rng.uniform(size=(5, CELL, KINDS))
    counts[2] = 0
    each = []
    for kind in range(1, KINDS):
        hits = total = 0.0
        for token in range(5):
            for cell in range(CELL):
                loud = [math.exp(value) for value in said[token, cell]]
                share = loud[kind] / sum(loud) * counts[token, cell].sum()
                hits += min(share, counts[token, cell, kind])
                total += share + counts[token, cell, kind]
        each.append(2 * hits / total)
    found = dice(torch.from_numpy(said), torch.from_numpy(counts))
    assert float(found) == pytest.approx(np.mean(each), rel=1e-4)


def test_the_loss_is_balanced_cross_entropy_and_what_dice_lacks() -> None:
    scans = [scan(seed, tokens=6) for seed in range(2)]
    scans[0].importance[:] = rng_importance = np.array([1, 4, 1, 1, 2, 1], np.float32)
    problem = queries._Problem.of(scans, line(), 0.5, SMALL)
    found = float(problem._loss(problem._begin(0), np.array([0, 1])).detach())
    weighed = [scans[0].counts * rng_importance[:, None, None], scans[1].counts]
    total = sum(counts.sum(axis=(0, 1)) for counts in weighed)
    share = total / total.sum()
    entropies = []
    for one, counts in zip(scans, weighed, strict=True):
        lost = mass = 0.0
        for token, row in enumerate(applied(line(), one.tokens)):
            for cell in range(CELL):
                for kind in range(KINDS):
                    wanted = counts[token, cell, kind] * share[kind] ** -0.5
                    lost -= wanted * (row[cell, kind] - math.log(sum(math.exp(value) for value in row[cell])))
                    mass += wanted
        entropies.append(lost / mass)
    said = torch.from_numpy(np.concatenate([applied(line(), one.tokens) for one in scans]))
    overlap = float(dice(said, torch.from_numpy(np.concatenate(weighed))))
    assert found == pytest.approx(np.mean(entropies) + 1 - overlap, rel=1e-4)


def test_it_begins_as_the_linear_map_and_a_single_subject_does_not_move_it() -> None:
    scans = [scan(0, subject="one"), scan(1, subject="one")]
    fitted = fit(scans, line(), balance=0.5, config=SMALL, seed=0)
    assert fitted.steps == 0
    rows = scan(7).tokens
    np.testing.assert_allclose(
        logits(fitted.arrays, rows, kinds=KINDS, heads=2), applied(line(), rows), rtol=1e-4, atol=1e-5
    )


def above_the_mean(seed: int) -> Celled:
    """Tokens whose kind is whether they lie above the mean of their scan, which is anywhere."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(40, 3))
    above = rows[:, 0] > rows[:, 0].mean()
    rows[:, 0] += 3 * rng.normal()
    return Celled(
        subject=f"s{seed}",
        tokens=rows.astype(np.float32),
        counts=np.eye(2, dtype=np.float32)[above.astype(int)][:, None],
        importance=np.ones(40, np.float32),
    )


def test_queries_learn_what_no_linear_map_can_know() -> None:
    blank = Linear(
        middle=np.zeros(3, np.float32),
        scale=np.full(3, 2, np.float32),
        weight=np.zeros((3, 2), np.float32),
        bias=np.zeros(2, np.float32),
    )
    train, held = ([above_the_mean(seed) for seed in seeds] for seeds in (range(24), range(100, 130)))
    fitted = fit(train, blank, balance=0.0, config=QueryConfig(), seed=0)
    found = [logits(fitted.arrays, one.tokens, kinds=2, heads=4).argmax(axis=2) for one in held]
    truth = [one.counts.argmax(axis=2) for one in held]
    rows, kinds = (
        np.concatenate(side) for side in zip(*((one.tokens, one.counts[:, 0, 1]) for one in train), strict=True)
    )
    plain = LogisticRegression().fit(rows, kinds)
    assert np.mean([plain.predict(one.tokens) == kind[:, 0] for one, kind in zip(held, truth, strict=True)]) < 0.7
    assert np.mean(np.array(found) == np.array(truth)) > 0.8


def test_the_same_seed_gives_the_same_arrays_and_torch_s_own_numbers_are_left_alone() -> None:
    scans = [scan(seed) for seed in range(3)]
    torch.manual_seed(3)
    fits = [fit(scans, line(), balance=0.5, config=SMALL, seed=seed) for seed in (1, 1, 2)]
    after = torch.rand(2)
    for name, array in fits[0].arrays.items():
        np.testing.assert_array_equal(array, fits[1].arrays[name])
    assert (fits[0].arrays["queries"] != fits[2].arrays["queries"]).any()
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(2))


def test_subjects_are_held_out_whole_in_turn_where_few_and_once_where_many() -> None:
    few = queries._parts(["a", "b", "a", "c", "d"], QueryConfig(), 0)
    assert len(few) == 3
    np.testing.assert_array_equal(np.sum(few, axis=0), 1)
    assert all(part[0] == part[2] for part in few)
    many = queries._parts([f"s{index // 2}" for index in range(24)], QueryConfig(), 0)
    assert len(many) == 1
    assert many[0].sum() == 6
    np.testing.assert_array_equal(many[0][::2], many[0][1::2])
    assert len(queries._parts(["a", "b"], QueryConfig(), 0)) == 2


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one scan"):
        fit([], line(), balance=0.5, config=SMALL, seed=0)
    empty = Celled(
        subject="x",
        tokens=scan(0).tokens,
        counts=np.zeros((40, CELL, KINDS), np.float32),
        importance=np.ones(40, np.float32),
    )
    with pytest.raises(ValueError, match="no labelled cell"):
        fit([scan(0), empty], line(), balance=0.5, config=SMALL, seed=0)
    narrow = Celled(
        subject="x", tokens=scan(0).tokens[:, :4], counts=scan(0).counts, importance=np.ones(40, np.float32)
    )
    with pytest.raises(ValueError, match="tokens of one length"):
        fit([scan(0), narrow], line(), balance=0.5, config=SMALL, seed=0)
    short = Linear(middle=line().middle, scale=line().scale, weight=line().weight[:, :3], bias=line().bias[:3])
    with pytest.raises(ValueError, match="has 3 logits a token"):
        fit([scan(0)], short, balance=0.5, config=SMALL, seed=0)
    lost = scan(0)
    lost.tokens[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        fit([lost, scan(1)], line(), balance=0.5, config=SMALL, seed=0)


def test_arrays_of_another_head_are_refused() -> None:
    fitted = fit([scan(0)], line(), balance=0.5, config=SMALL, seed=0)
    with pytest.raises(ValueError, match="tokens of 6 numbers"):
        logits(fitted.arrays, np.zeros((4, 5), np.float32), kinds=KINDS, heads=2)
    for broken in (
        {name: array for name, array in fitted.arrays.items() if name != "queries"},
        {name: array for name, array in fitted.arrays.items() if name != "see.bias"},
        fitted.arrays | {"spread.weight": np.zeros((3, 3), np.float32)},
    ):
        with pytest.raises(ValueError, match="not those of a decoder"):
            logits(broken, scan(0).tokens, kinds=KINDS, heads=2)


@pytest.mark.parametrize("settings", [{"width": 0}, {"heads": 5}, {"lr": 0.0}, {"decay": -1.0}, {"folds": 1}])
def test_settings_without_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be|must divide"):
        QueryConfig(**settings)
