from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from voxelstem.backbones.lowrank import Changed, Draws, LowRankConfig, fold, put_beside
from voxelstem.chance import Chance
from voxelstem.errors import ConfigError

PLAIN = LowRankConfig(rank=2, alpha=8.0, dropout=0.0)
HALF = LowRankConfig(rank=2, alpha=8.0, dropout=0.5)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6, bias=False)
        self.o_proj = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o_proj(torch.tanh(self.q_proj(x)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def made(
    config: LowRankConfig = PLAIN, targets: Sequence[str] = ("q_proj", "o_proj"), *, moved: bool = True
) -> tuple[Network, nn.Module, Draws]:
    torch.manual_seed(0)
    network, draws = Network(), Draws()
    changes = put_beside(network, targets, config, draws)
    if moved:
        for parameter in changes.parameters():
            nn.init.normal_(parameter, std=0.3)
    return network, changes, draws


def rows(count: int = 3, tokens: int = 5) -> Tensor:
    return torch.randn(count, tokens, 6, generator=torch.Generator().manual_seed(1))


def test_the_defaults_are_spectre_s():
    config = LowRankConfig()
    assert (config.rank, config.alpha, config.dropout, config.scaling) == (16, 64.0, 0.05, 4.0)


def test_a_changed_layer_is_w_x_plus_four_b_a_x():
    network, _, _ = made()
    layer: Any = network.layers[0].q_proj
    a, b, weight = (part.tolist() for part in (layer.change.lora_A, layer.change.lora_B, layer.layer.weight))
    for row, found in zip(rows().flatten(0, 1).tolist(), layer(rows()).flatten(0, 1).tolist(), strict=True):
        low = [sum(a[r][i] * row[i] for i in range(6)) for r in range(2)]
        for out in range(6):
            base = sum(weight[out][i] * row[i] for i in range(6))
            assert found[out] == pytest.approx(base + 4.0 * sum(b[out][r] * low[r] for r in range(2)), abs=1e-5)


def test_at_first_nothing_is_changed():
    network, changes, _ = made(moved=False)
    torch.manual_seed(0)
    assert torch.equal(network(rows()), Network()(rows()))
    assert any(float(parameter.detach().abs().max()) > 0 for parameter in changes.parameters())


def test_forward_and_gradients_are_peft_s():
    from peft import LoraConfig, get_peft_model

    network, changes, _ = made()
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "o_proj"], bias="none")
    peer = get_peft_model(Network(), config)  # pyright: ignore[reportArgumentType]
    theirs = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in peer.named_parameters()
        if parameter.requires_grad
    }
    ours = dict(changes.named_parameters())
    assert set(theirs) == set(ours)
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    found, wanted = network(rows()), peer(rows())
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for out in (found, wanted):
        out.square().sum().backward()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-5, atol=1e-6)


def test_only_the_changes_learn_under_the_names_of_their_layers():
    network, changes, _ = made(targets=("q_proj",))
    assert sorted(changes.state_dict()) == [
        f"layers.{layer}.q_proj.lora_{side}" for layer in (0, 1) for side in ("A", "B")
    ]
    network(rows()).sum().backward()
    assert all(parameter.grad is not None for parameter in changes.parameters())
    learning = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    assert learning == {id(parameter) for parameter in changes.parameters()}
    assert isinstance(network.layers[0].o_proj, nn.Linear)


def test_a_target_is_the_end_of_a_name():
    network, _, _ = made(targets=("layers.1.q_proj",))
    assert isinstance(network.layers[0].q_proj, nn.Linear)
    assert isinstance(network.layers[1].q_proj, Changed)


@pytest.mark.parametrize(
    ("targets", "said"), [(("q_proj", "q_porj"), "'q_porj'"), (("proj",), "'proj'"), ((), "called ''")]
)
def test_a_target_that_no_layer_is_called_is_refused_with_those_that_there_are(targets: tuple[str, ...], said: str):
    with pytest.raises(ConfigError) as error:
        made(targets=targets)
    assert said in error.value.problem
    assert "q_proj" in error.value.hint


def test_what_is_dropped_depends_on_the_row_s_key_alone():
    network, _, draws = made(HALF)
    x, chance = rows(4), Chance.of(7, count=4)
    with draws.of(chance):
        whole = network(x)
    with draws.of(chance.part(2, 4)):
        part = network(x[2:])
    assert not torch.allclose(whole, network(x))
    torch.testing.assert_close(whole[2:], part, rtol=0, atol=1e-6)


def test_what_fills_a_row_up_changes_nothing_for_the_tokens_before():
    network, _, draws = made(HALF)
    x = rows()
    with draws.of(Chance.of(7, count=3)):
        short, filled = network(x), network(torch.cat([x, torch.ones(3, 4, 6)], dim=1))
    torch.testing.assert_close(filled[:, :5], short, rtol=0, atol=1e-6)


def test_a_share_is_dropped_and_the_mean_stays():
    _, changes, draws = made(LowRankConfig(rank=2, dropout=0.25))
    change: Any = changes.get_submodule("layers.0.q_proj")
    with draws.of(Chance.of(3, count=20)):
        kept = change._dropped(torch.ones(20, 100, 6))
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float((kept == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_layers_drop_different_inputs():
    _, changes, draws = made(HALF)
    one, other = (changes.get_submodule(f"layers.{layer}.q_proj") for layer in (0, 1))
    with draws.of(Chance.of(3, count=2)):
        first, second = (layer._dropped(torch.ones(2, 9, 6)) for layer in (one, other))  # type: ignore[operator]
    assert not torch.equal(first, second)


def test_without_keys_or_in_evaluation_nothing_is_dropped():
    network, _, draws = made(HALF)
    plain, _, _ = made(PLAIN)
    assert torch.equal(network(rows()), plain(rows()))
    network.eval()
    with draws.of(Chance.of(7, count=3)):
        assert torch.equal(network(rows()), plain(rows()))


def test_torch_s_generator_is_left_alone():
    network, _, draws = made(HALF)
    before = torch.random.get_rng_state()
    with draws.of(Chance.of(7, count=3)):
        network(rows()).sum().backward()
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_pass_repeated_for_its_gradient_drops_what_it_dropped_whatever_ran_between():
    network, changes, draws = made(HALF)
    gradients: list[list[Tensor]] = []
    for repeated in (False, True):
        changes.zero_grad()
        outputs: list[Tensor] = []
        for seed in (1, 2):
            with draws.of(Chance.of(seed, count=3)):
                outputs.append(
                    checkpoint(network, rows(), use_reentrant=False, context_fn=draws.contexts)  # type: ignore[arg-type]
                    if repeated
                    else network(rows())
                )
        (outputs[0].square().sum() + outputs[1].sum()).backward()
        gradients.append([parameter.grad.clone() for parameter in changes.parameters() if parameter.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert draws.chance is None


def test_a_copy_learns_apart():
    network, changes, _ = made()
    twin, own = copy.deepcopy([network, changes])
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.zero_()
    torch.manual_seed(0)
    assert torch.equal(twin(rows()), Network()(rows()))
    assert not torch.equal(network(rows()), twin(rows()))


@given(
    rank=st.integers(-2, 2),
    alpha=st.sampled_from([-1.0, 0.0, 0.5, 64.0, math.inf, math.nan]),
    dropout=st.floats(-0.5, 1.5, allow_nan=False),
)
def test_impossible_numbers_are_refused(rank: int, alpha: float, dropout: float):
    if rank >= 1 and alpha in (0.5, 64.0) and 0 <= dropout < 1:
        assert LowRankConfig(rank=rank, alpha=alpha, dropout=dropout).scaling == alpha / rank
    else:
        with pytest.raises(ValueError, match="need rank"):
            LowRankConfig(rank=rank, alpha=alpha, dropout=dropout)


def test_folded_changes_say_what_they_said_beside_their_layers() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    put_beside(network, ("0", "2"), LowRankConfig(rank=2, alpha=4.0, dropout=0.0), Draws())
    for name, parameter in network.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    x = torch.randn(5, 6)
    said = network(x)
    fold(network)
    assert [type(module) for module in network] == [nn.Linear, nn.GELU, nn.Linear]
    torch.testing.assert_close(network(x), said)
