from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from voxelstem.backbones.encoder import Encoder, EncoderConfig
from voxelstem.backbones.layers import grid_positions, place_code, rope_turns
from voxelstem.chance import Chance

CONFIG = EncoderConfig(dim=24, depth=2, heads=2, registers=3)


def make(config: EncoderConfig = CONFIG, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    encoder = Encoder(config)
    # Untrained weights of 0.02 hide everything behind the residual: make the branches loud.
    with torch.no_grad():
        for parameter in encoder.blocks.parameters():
            if parameter.ndim > 1:
                parameter.mul_(15)
    return encoder


def tokens(count: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(2, count, 24, generator=torch.Generator().manual_seed(1)), grid_positions((count, 1, 1))[None]


def test_cls_and_tokens_come_back_without_the_registers() -> None:
    cls, out = make()(*tokens())
    assert cls.shape == (2, 24)
    assert out.shape == (2, 8, 24)


def test_it_is_prefix_then_blocks_then_norm_with_the_prefix_unturned() -> None:
    encoder, (x, positions) = make(), tokens()
    turns = rope_turns(positions, 12, base=CONFIG.rope_base)
    turns = torch.cat([torch.ones(1, 4, 6, dtype=turns.dtype), turns], dim=1)
    y = torch.cat([encoder.prefix.expand(2, -1, -1), x], dim=1)
    for block in encoder.blocks:
        y = block(y, turns)
    y = encoder.norm(y)
    cls, out = encoder(x, positions)
    torch.testing.assert_close(cls, y[:, 0])
    torch.testing.assert_close(out, y[:, 4:])


def test_only_places_matter_not_the_order_of_tokens() -> None:
    encoder, (x, positions) = make(), tokens()
    order = torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])
    cls, out = encoder(x, positions)
    cls_again, out_again = encoder(x[:, order], positions[:, order])
    torch.testing.assert_close(cls_again, cls)
    torch.testing.assert_close(out_again, out[:, order])


def test_places_matter() -> None:
    encoder, (x, positions) = make(), tokens()
    assert not torch.allclose(encoder(x, positions)[1], encoder(x, positions.flip(1))[1], atol=1e-3)


def test_each_row_of_a_batch_may_have_its_own_places() -> None:
    encoder, (x, positions) = make(), tokens()
    both = torch.cat([positions, positions.flip(1)])
    cls, out = encoder(x, both)
    for row in range(2):
        cls_alone, out_alone = encoder(x[row : row + 1], both[row : row + 1])
        torch.testing.assert_close(cls[row : row + 1], cls_alone)
        torch.testing.assert_close(out[row : row + 1], out_alone)


def test_with_codes_a_token_knows_its_own_place() -> None:
    encoder, (x, positions) = make(dataclasses.replace(CONFIG, place_codes=4)), tokens()
    assert encoder.place is not None
    code = encoder.place(place_code(positions, 4))
    plain = make()
    plain.load_state_dict({name: value for name, value in encoder.state_dict().items() if name != "place.weight"})
    for found, wanted in zip(encoder(x, positions), plain(x + code, positions), strict=True):
        torch.testing.assert_close(found, wanted)
    assert 0.2 < float(code.detach().square().mean().sqrt()) < 0.5
    # One token by itself has nobody to be turned against; only its code tells where it is.
    alone, elsewhere = positions[:, :1], positions[:, 3:4]
    moved = encoder.intermediates(x[:, :1], alone, [2])[0][1] - encoder.intermediates(x[:, :1], elsewhere, [2])[0][1]
    assert moved.abs().max() > 0.01


def test_weights_start_small_and_biases_at_zero() -> None:
    encoder = Encoder(dataclasses.replace(CONFIG, dim=96, layer_scale=0.1))
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")):
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1), name
        elif "scale" in name:
            assert parameter.eq(0.1).all(), name


def test_every_weight_gets_a_gradient() -> None:
    encoder = make()
    cls, out = encoder(*tokens())
    (cls.square().sum() + (out * torch.randn_like(out)).sum()).backward()
    missing = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert missing == []


@pytest.mark.parametrize(("dim", "heads"), [(24, 5), (32, 2), (20, 4)])
def test_heads_that_three_axes_of_pairs_do_not_fill_are_refused(dim: int, heads: int) -> None:
    with pytest.raises(ValueError, match="multiple of 6"):
        EncoderConfig(dim=dim, heads=heads)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 0},
        {"heads": 0},
        {"depth": -1},
        {"registers": -1},
        {"mlp_ratio": 0.0},
        {"rope_base": -1.0},
        {"rope_shift": -0.1},
        {"rope_jitter": 0.5},
        {"rope_rescale": 0.9},
    ],
)
def test_sizes_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EncoderConfig(**wrong)


def test_intermediates_are_the_normalised_states_and_the_last_is_the_output() -> None:
    encoder, (x, positions) = make(), tokens()
    first, last = encoder.intermediates(x, positions, (1, 2))
    shallow = make(dataclasses.replace(CONFIG, depth=1))
    shallow.load_state_dict({name: value for name, value in encoder.state_dict().items() if "blocks.1." not in name})
    for got, wanted in zip((*first, *last), (*shallow(x, positions), *encoder(x, positions)), strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(encoder.intermediates(x, positions, (2, 1))[1][0], first[0])


@pytest.mark.parametrize("layers", [(0,), (3,), (1, -1)])
def test_layers_that_are_not_there_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="counted from 1 to 2"):
        make().intermediates(*tokens(), layers)


def test_the_cls_attention_leaves_the_prefix_out() -> None:
    encoder, (x, positions) = make(), tokens()
    looks = encoder.cls_attention(x, positions)
    assert looks.shape == (2, 2, 8)
    assert (looks > 0).all()
    assert (looks.sum(dim=-1) < 1).all()


def test_positions_move_only_with_a_generator_and_only_where_the_config_says_so() -> None:
    x, positions = tokens()
    still, moving = make(), make(dataclasses.replace(CONFIG, rope_rescale=2.0))
    plain = still(x, positions)[0]
    assert torch.equal(still(x, positions, chance=Chance.of(0, count=len(x)))[0], plain)
    assert torch.equal(moving(x, positions)[0], plain)
    drawn = [moving(x, positions, chance=Chance.of(seed, count=len(x)))[0] for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-4)
    assert not torch.allclose(drawn[0], plain, atol=1e-4)
