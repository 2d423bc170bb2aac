from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from voxelstem.backbones.compute import relative_error
from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.layers import grid_positions
from voxelstem.backbones.lean import Form, Kernel, LeanScan, LeanVit
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig

CONFIG = ScanVitConfig(
    channels=2,
    patch_ijk=(4, 4, 2),
    block_ijk=(16, 12, 8),
    block=EncoderConfig(dim=180, depth=2, heads=2, registers=2),
    scan=EncoderConfig(dim=96, depth=1, heads=2, rope_base=100.0, eps=1e-3),
    inputs="centred",
)
"""Heads of 90 (a multiple of 6 but not of 8) and of 48, registers, and inputs that have to be folded."""


def make(config: ScanVitConfig = CONFIG) -> ScanVit:
    """A backbone in which every tensor says something: untrained ones have scales of 1 and biases of 0."""
    draw = torch.Generator().manual_seed(3)
    backbone = ScanVit(config).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(noise * 0.1 if parameter.ndim > 1 else 0.7 + 0.3 * noise)
    return backbone.requires_grad_(False)


def blocks_of(rows: int = 3, shape: tuple[int, int, int] = CONFIG.block_ijk) -> Tensor:
    return torch.rand(rows, CONFIG.channels, *shape, generator=torch.Generator().manual_seed(4))


FORMS = [
    Form(),
    Form(head_multiple=8),
    Form(half_split=True),
    Form(head_multiple=16, half_split=True),
]


@pytest.mark.parametrize("kernel", ["fused", "plain"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_gives_the_references_numbers(form: Form, kernel: Kernel) -> None:
    backbone, blocks = make(), blocks_of()
    lean = LeanVit(backbone, form)
    lean.encoder.set_kernel(kernel)
    with torch.inference_mode():
        assert relative_error(lean(blocks), backbone.encode_blocks(blocks)) <= 2e-6


def test_the_comparison_is_not_blind() -> None:
    backbone, blocks = make(), blocks_of()
    wanted = backbone.encode_blocks(blocks)
    backbone.block_encoder.blocks[1].get_parameter("scale2").mul_(1.001)
    assert relative_error(backbone.encode_blocks(blocks), wanted) > 1e-5


def test_unit_inputs_enter_as_they_are() -> None:
    config = dataclasses.replace(CONFIG, inputs="unit")
    backbone = make(config)
    assert relative_error(LeanVit(backbone)(blocks_of()), backbone.encode_blocks(blocks_of())) <= 2e-6


def test_another_block_size_gets_its_own_table() -> None:
    backbone = make()
    lean = LeanVit(backbone)
    lean(blocks_of())
    other = blocks_of(shape=(8, 8, 4))
    assert relative_error(lean(other), backbone.encode_blocks(other)) <= 2e-6


def test_the_same_input_gives_the_same_output_again() -> None:
    lean, blocks = LeanVit(make()), blocks_of()
    before = blocks.clone()
    first, second = lean(blocks), lean(blocks)
    assert torch.equal(blocks, before)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_plain_form_shares_the_large_tensors() -> None:
    backbone = make()
    pointers = {parameter.data_ptr() for parameter in backbone.parameters()}
    own = [buffer for buffer in LeanVit(backbone).buffers() if buffer.data_ptr() not in pointers]
    assert sum(buffer.numel() for buffer in own) <= backbone.embed.weight.numel() + backbone.dim


def test_bf16_keeps_the_angles_and_the_sum_in_fp32() -> None:
    backbone, blocks = make(), blocks_of()
    lean = LeanVit(backbone, Form(dtype=torch.bfloat16, head_multiple=8))
    table = lean.table((4, 3, 4))
    assert isinstance(table, Tensor)
    assert table.dtype == torch.complex64
    found = lean(blocks)
    assert {part.dtype for part in found} == {torch.float32}
    assert 1e-5 < relative_error(found, backbone.encode_blocks(blocks)) <= 1e-2


def test_the_real_table_is_the_complex_one() -> None:
    backbone = make()
    turns = LeanVit(backbone).table((4, 3, 4))
    parts = LeanVit(backbone, Form(half_split=True)).table((4, 3, 4))
    assert isinstance(turns, Tensor)
    torch.testing.assert_close(torch.complex(*parts), turns)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_scan_level_takes_positions(form: Form) -> None:
    backbone = make()
    described = torch.randn(2, 12, 360, generator=torch.Generator().manual_seed(5))
    found = LeanScan(backbone, form)(described, grid_positions((2, 3, 2)))
    assert relative_error(found, backbone.look_at_scan(described, (2, 3, 2))) <= 2e-6


def test_a_backbone_without_scan_level_has_no_lean_one() -> None:
    alone = dataclasses.replace(CONFIG, scan=dataclasses.replace(CONFIG.scan, depth=0))
    with pytest.raises(ValueError, match="no scan level"):
        LeanScan(ScanVit(alone))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_of_places_are_added_and_places_are_read_in_every_form(form: Form) -> None:
    coded = {
        "block": dataclasses.replace(CONFIG.block, place_codes=4),
        "scan": dataclasses.replace(CONFIG.scan, place_codes=3),
        "place_readout": 5,
        "atlas_cell": 1,
        "atlas_directions": (6, 5),
    }
    backbone, blocks, positions = make(dataclasses.replace(CONFIG, **coded)), blocks_of(), grid_positions((2, 3, 1))
    backbone.measure([torch.rand(20, CONFIG.channels, *CONFIG.block_ijk, generator=torch.Generator().manual_seed(9))])
    assert not backbone.wants_measuring
    for found, wanted in zip(LeanVit(backbone, form)(blocks), backbone.encode_blocks(blocks), strict=True):
        assert relative_error(found, wanted) < 1e-5
    described = torch.randn(2, 6, 2 * backbone.dim, generator=torch.Generator().manual_seed(7))
    for found, wanted in zip(
        LeanScan(backbone, form)(described, positions), backbone.look_at_scan(described, (2, 3, 1)), strict=True
    ):
        assert relative_error(found, wanted) < 1e-5
