from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from voxelstem.backbones import compute
from voxelstem.backbones.compute import MOST_ERROR, choose, relative_error
from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.errors import ConfigError

CONFIG = ScanVitConfig(
    patch_ijk=(4, 4, 4),
    block_ijk=(16, 16, 8),
    block=EncoderConfig(dim=180, depth=2, heads=2),
    scan=EncoderConfig(depth=0),
    inputs="unit",
)
BLOCK = CONFIG.block_ijk


@pytest.fixture(scope="module")
def backbone() -> ScanVit:
    torch.manual_seed(0)
    return ScanVit(CONFIG).eval().requires_grad_(False)


@pytest.fixture
def blocks() -> Tensor:
    return torch.rand(3, 1, *BLOCK, generator=torch.Generator().manual_seed(1))


class Other(nn.Module):
    """A backbone of another family."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def encode_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        means = blocks.flatten(1).mean(dim=1, keepdim=True) * self.weight
        return means, means[:, None]


def test_auto_measures_the_ways_and_takes_an_exact_one(backbone: ScanVit, blocks: Tensor) -> None:
    found = choose(backbone, block_ijk=BLOCK)
    assert found.relative_error <= MOST_ERROR["fp32"]
    assert found.precision == "fp32"
    tried = {entry.name: entry for entry in found.tried}
    assert set(tried) == {"reference", "lean", "openvino"}
    assert tried["openvino"].note
    assert tried["openvino"].seconds_per_block is None
    assert all((tried[name].seconds_per_block or 0) > 0 for name in ("reference", "lean"))
    assert relative_error(found.encode_blocks(blocks), backbone.encode_blocks(blocks)) <= 1e-5


@pytest.mark.parametrize("way", ["reference", "lean"])
def test_only_takes_that_way(way: Any, backbone: ScanVit, blocks: Tensor) -> None:
    found = choose(backbone, block_ijk=BLOCK, only=way)
    assert [entry.name for entry in found.tried] == [found.name] == [way]
    assert relative_error(found.encode_blocks(blocks), backbone.encode_blocks(blocks)) <= 1e-5


def test_bf16_is_right_and_says_its_error(backbone: ScanVit, blocks: Tensor) -> None:
    found = choose(backbone, block_ijk=BLOCK, only="lean", precision="bf16")
    assert found.precision == "bf16"
    assert 1e-5 < found.relative_error <= MOST_ERROR["bf16"]
    assert {part.dtype for part in found.encode_blocks(blocks)} == {torch.float32}


def test_a_way_that_is_not_exact_is_never_taken(backbone: ScanVit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compute.MOST_ERROR, "bf16", 1e-7)
    with pytest.raises(ConfigError, match="no bf16 computation of these weights is exact enough"):
        choose(backbone, block_ijk=BLOCK, only="lean", precision="bf16")


def test_another_family_is_computed_as_it_is() -> None:
    found = choose(Other(), block_ijk=(4, 4, 4))
    assert found.name == "reference"
    assert [entry.name for entry in found.tried] == ["reference"]
    with pytest.raises(ConfigError, match="has no lean form"):
        choose(Other(), block_ijk=(4, 4, 4), only="lean")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"only": "leen"}, "no way 'leen'"),
        ({"precision": "fp16"}, "no precision 'fp16'"),
        pytest.param(
            {"device": "cuda"},
            "sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)
def test_what_is_not_there_is_refused(changes: dict[str, Any], said: str, backbone: ScanVit) -> None:
    with pytest.raises(ConfigError, match=said):
        choose(backbone, block_ijk=BLOCK, **changes)


def test_compile_without_a_compiler_is_refused(backbone: ScanVit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        choose(backbone, block_ijk=BLOCK, compile=True)


@pytest.mark.slow
def test_compiled_gives_the_references_numbers(backbone: ScanVit, blocks: Tensor) -> None:
    found = choose(backbone, block_ijk=BLOCK, only="compiled")
    assert relative_error(found.encode_blocks(blocks), backbone.encode_blocks(blocks)) <= 1e-5


def test_openvino_gives_the_references_numbers_for_any_number_of_rows(backbone: ScanVit, blocks: Tensor) -> None:
    pytest.importorskip("openvino", reason="the cpu extra is not installed")
    found = choose(backbone, block_ijk=BLOCK, only="openvino")
    for rows in (1, 3, 2):
        part = blocks[:rows]
        assert relative_error(found.encode_blocks(part), backbone.encode_blocks(part)) <= 1e-5


def test_openvino_says_in_what_it_computes(backbone: ScanVit) -> None:
    pytest.importorskip("openvino", reason="the cpu extra is not installed")
    found = choose(backbone, block_ijk=BLOCK, only="openvino", precision="bf16")
    assert (found.precision == "fp32") == (found.relative_error < 1e-5)


def test_openvino_is_tried_unasked_where_many_blocks_wait(backbone: ScanVit) -> None:
    pytest.importorskip("openvino", reason="the cpu extra is not installed")
    found = choose(backbone, block_ijk=BLOCK, blocks_ahead=10**9)
    assert next(entry for entry in found.tried if entry.name == "openvino").seconds_per_block is not None


def test_the_error_is_the_largest_gap_over_the_largest_value_of_either_tensor() -> None:
    wanted = torch.tensor([1.0, -4.0]), torch.tensor([2.0])
    assert relative_error((torch.tensor([1.0, -3.0]), torch.tensor([2.0])), wanted) == 0.25
    # What is loud in one does not hide what is wrong in the other.
    assert relative_error((torch.tensor([1.0, -3.0]), torch.tensor([1.0])), wanted) == 0.5
    assert relative_error((torch.tensor([math.nan, -4.0]), torch.tensor([2.0])), wanted) == math.inf
    assert relative_error((wanted[0], torch.tensor([math.inf])), wanted) == math.inf


def test_blocks_side_by_side_are_what_they_are_alone_and_threads_stay_as_they_were(backbone: ScanVit) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        lean = choose(backbone, block_ijk=BLOCK, only="lean")
        blocks = torch.rand(5, 1, *BLOCK, generator=torch.Generator().manual_seed(2))
        together = lean.encode_blocks(blocks)
        for row in range(5):
            alone = lean.encode_blocks(blocks[row : row + 1])
            torch.testing.assert_close(together[0][row], alone[0][0])
            torch.testing.assert_close(together[1][row], alone[1][0])
        assert torch.get_num_threads() == 4
        assert len([thread for thread in threading.enumerate() if thread.name.startswith("block")]) >= 4
    finally:
        torch.set_num_threads(before)
