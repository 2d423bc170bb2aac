from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from voxelstem.backbones.unet import UNet, resenc
from voxelstem.errors import CheckpointError
from voxelstem.weights.nnssl_names import (
    KJI,
    config_of,
    merged,
    plain,
    theirs,
    to_ours,
    to_theirs,
    under_one_root,
    widened,
)

PEER = json.loads((Path(__file__).parents[1] / "golden" / "nnssl.json").read_text())
LARGE = {
    "encoder.stem": 8,
    "encoder.stages": 440,
    "decoder.encoder": 448,
    "decoder.stages": 40,
    "decoder.transpconvs": 10,
    "decoder.seg_layers": 10,
}


@functools.cache
def shapes_of(size: str, **changes: object) -> dict[str, Tensor]:
    """A network's tensors without memory."""
    with torch.device("meta"):
        return UNet(replace(resenc("tiny" if size == "tiny" else "L"), **changes)).state_dict()


@pytest.fixture
def drawn() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return UNet(resenc("tiny")).state_dict()


def names_of(size: str, **changes: object) -> dict[str, Tensor]:
    """The names of a network's tensors, each with a number."""
    return {name: torch.zeros(1) for name in shapes_of(size, **changes)}


def counts(names: dict[str, Tensor]) -> dict[str, int]:
    return dict(Counter(".".join(name.split(".")[:2]) for name in names))


def test_the_large_network_has_264_tensors_under_956_names():
    ours = names_of("L")
    written = to_theirs(ours)
    assert len(ours) == 264
    assert len(written) == 956
    assert counts(written) == LARGE


def test_an_encoder_alone_has_448_names():
    written = to_theirs(names_of("L", decoder=False))
    assert counts(written) == {"encoder.stem": 8, "encoder.stages": 440}


def test_every_name_of_the_peer_s_network_is_written_and_means_the_same_tensor():
    written = to_theirs(shapes_of("tiny"))
    assert sorted(written) == sorted(PEER["names"])
    assert {name: plain(name) for name in PEER["names"]} == PEER["names"]
    assert {plain(name): list(x.shape) for name, x in written.items()} == PEER["shapes"]


def test_plain_names_are_those_of_our_network():
    assert all(plain(alias) == name for name in shapes_of("L") for alias in theirs(name))
    assert all(plain(name) == name for name in shapes_of("L"))


def test_aliases_share_one_memory(drawn: dict[str, Tensor]):
    places: dict[str, set[int]] = {}
    for name, tensor in to_theirs(drawn).items():
        places.setdefault(plain(name), set()).add(tensor.data_ptr())
    assert len(places) == len(drawn)
    assert {len(found) for found in places.values()} == {1}


def test_out_and_in_again_is_the_same_to_the_bit(drawn: dict[str, Tensor]):
    back, different = merged(to_theirs(drawn))
    ours = to_ours(back, resenc("tiny"))
    assert different == ()
    assert list(ours) == list(drawn)
    assert all(torch.equal(ours[name], tensor) for name, tensor in drawn.items())


def test_kernels_of_theirs_run_k_j_i(drawn: dict[str, Tensor]):
    name = "encoder.stages.1.blocks.0.conv1.conv.weight"
    written = to_theirs(drawn)[name]
    for at in ((0, 1, 2), (2, 0, 1)):
        i, j, k = at
        assert written[3, 2, k, j, i] == drawn[name][3, 2, i, j, k]


@pytest.mark.parametrize("axes", [KJI, (0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_kernels_are_turned_as_the_plan_says(axes: tuple[int, int, int], drawn: dict[str, Tensor]):
    name = "encoder.stem.convs.0.conv.weight"
    ours = to_ours(drawn, resenc("tiny"), axes)
    for at in ((0, 1, 2), (2, 2, 1)):
        # What ours has at `at`, theirs has where axis n holds the place along our axis that n is.
        there = [0, 0, 0]
        for ours_axis, axis in enumerate(axes):
            there[axis] = at[ours_axis]
        assert ours[name][5, 0][at] == drawn[name][5, 0][tuple(there)]


@given(st.sampled_from(["conv", "alias", "both"]), st.booleans(), st.booleans())
def test_either_set_of_names_gives_the_same_tensors(which: str, second_encoder: bool, first_encoder: bool):
    names = {name: torch.tensor([float(at)]) for at, name in enumerate(PEER["shapes"])}
    written = {alias: names[plain(alias)] for alias in PEER["names"]}

    def chosen(name: str) -> bool:
        if name.startswith("encoder.") and not first_encoder and second_encoder:
            return False
        if name.startswith("decoder.encoder.") and not second_encoder:
            return False
        return (
            which == "both" or ".weight" not in name or (".all_modules." in name) == (which == "alias") or alone(name)
        )

    def alone(name: str) -> bool:
        return not any(word in name for word in (".conv.", ".norm.", ".all_modules."))

    found, different = merged({name: x for name, x in written.items() if chosen(name)})
    assert different == ()
    assert {name: float(x) for name, x in found.items()} == {name: float(x) for name, x in names.items()}


def test_where_two_names_differ_all_modules_is_taken_and_they_are_named(drawn: dict[str, Tensor]):
    state = to_theirs(drawn)
    name = "encoder.stages.2.blocks.0.conv2.conv.weight"
    state |= {name: state[name] + 1, f"decoder.{name}": state[name] + 2}
    found, different = merged(state)
    assert different == (name,)
    assert torch.equal(to_ours(found, resenc("tiny"))[name], drawn[name])


def test_the_encoder_s_own_tensor_goes_before_the_decoder_s(drawn: dict[str, Tensor]):
    state = to_theirs(drawn)
    state |= {name: x + 1 for name, x in state.items() if name.startswith("decoder.encoder.")}
    found, different = merged(state)
    assert len(different) == sum(name.startswith("encoder.") for name in drawn)
    assert torch.equal(found["encoder.stem.convs.0.conv.bias"], drawn["encoder.stem.convs.0.conv.bias"])


def test_sizes_are_read_off_the_tensors():
    for size in ("tiny", "L"):
        config = resenc("tiny" if size == "tiny" else "L")
        assert config_of(shapes_of(size), config.block_ijk) == config
    assert config_of(shapes_of("L", decoder=False), (160, 160, 160)) == replace(resenc("L"), decoder=False)
    odd = {"strides": (1, 2, 4), "channels": 3, "out_channels": 2}
    assert config_of(shapes_of("tiny", **odd), (32, 32, 32)) == replace(resenc("tiny"), **odd)


def test_an_encoder_may_come_without_its_name_or_under_another(drawn: dict[str, Tensor]):
    encoder = {name: x for name, x in drawn.items() if name.startswith("encoder.")}
    bare = {name.removeprefix("encoder."): x for name, x in encoder.items()}
    other = {f"backbone.{name}": x for name, x in bare.items()}
    assert under_one_root(bare).keys() == encoder.keys()
    assert under_one_root(other, "backbone.stages", "backbone.stem").keys() == encoder.keys()
    assert under_one_root(drawn).keys() == drawn.keys()


def test_a_repeated_stem_says_of_equal_channels_what_it_said_of_one(drawn: dict[str, Tensor]):
    one, three = UNet(resenc("tiny")).eval(), UNet(resenc("tiny", channels=3)).eval()
    one.load_state_dict(drawn)
    three.load_state_dict(widened(drawn, 3))
    x = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        a, b = one.decode(one.features(x)), three.decode(three.features(x.expand(-1, 3, -1, -1, -1)))
    assert float((a - b).abs().max() / a.abs().max()) <= 1e-5
    with pytest.raises(CheckpointError, match="takes 3 channels"):
        widened(widened(drawn, 3), 2)


def test_all_odd_names_and_shapes_are_told_at_once(drawn: dict[str, Tensor]):
    odd = {name: x for name, x in drawn.items() if name != "decoder.transpconvs.1.bias"}
    odd |= {"projector.weight": torch.zeros(3), "encoder.stem.convs.0.norm.bias": torch.zeros(3)}
    with pytest.raises(CheckpointError) as caught:
        to_ours(odd, resenc("tiny"))
    for word in ("decoder.transpconvs.1.bias", "projector.weight", "encoder.stem.convs.0.norm.bias (3,)"):
        assert word in str(caught.value)


def test_what_is_no_resenc_u_net_is_refused(drawn: dict[str, Tensor]):
    for state in (
        {},
        {"eva.blocks.0.norm1.weight": torch.zeros(3)},
        {name: x for name, x in drawn.items() if "stem" not in name},
        {name: x for name, x in drawn.items() if ".stages.1." not in name},
        drawn | {"encoder.stages.7.blocks.0.conv2.conv.weight": torch.zeros(8, 8, 3, 3, 3)},
    ):
        with pytest.raises(CheckpointError, match="no ResEnc U-Net"):
            config_of(state, (32, 32, 32))


def test_unequal_strides_are_refused(drawn: dict[str, Tensor]):
    with pytest.raises(CheckpointError, match="equal strides"):
        config_of(drawn | {"decoder.transpconvs.0.weight": torch.zeros(32, 16, 1, 2, 2)}, (32, 32, 32))


def test_sizes_that_no_memory_holds_take_none(drawn: dict[str, Tensor]):
    wide = torch.empty(1).expand(2**61, 1, 1, 1, 1)
    state = drawn | {"encoder.stages.2.blocks.0.conv2.conv.weight": wide}
    with pytest.raises(CheckpointError):
        to_ours(state, config_of(state, (32, 32, 32)))
