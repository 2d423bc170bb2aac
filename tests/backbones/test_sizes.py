from __future__ import annotations

import math

import pytest
import torch

from voxelstem.backbones.scan_vit import ScanVit
from voxelstem.backbones.sizes import SIZES, sized

# Parameters and buffers as the package `spectre-fm` counts them: both of our prefix, mask token and missing periods
# are told apart below.
COUNTS = {
    "spectre-tiny": (5.7e6, None),
    "spectre-small": (22.1e6, 3.8e6),
    "spectre-base": (86.6e6, 15.4e6),
    "spectre-base-patch32": (97.7e6, 15.4e6),
    "spectre-large": (338_528_175, 58_389_135),
    "spectre-large-patch32": (354.0e6, 58_389_135),
}


@pytest.mark.parametrize("name", SIZES)
def test_each_size_has_as_many_numbers_as_the_original(name: str) -> None:
    config = SIZES[name]
    with torch.device("meta"):
        state = ScanVit(config).state_dict()
    counts = {name: math.prod(tensor.shape) for name, tensor in state.items()}
    scan = sum(count for key, count in counts.items() if key.startswith("scan_"))
    block = sum(counts.values()) - scan - counts["mask_token"]
    periods = config.block.dim // config.block.heads // 6
    wanted_block, wanted_scan = COUNTS[name]
    if isinstance(wanted_block, int):
        assert block + periods == wanted_block
    assert block + periods == pytest.approx(wanted_block, rel=0.01)
    if wanted_scan is not None:
        assert scan + periods == pytest.approx(wanted_scan, rel=0.02)


def test_sized_changes_block_eps_and_level() -> None:
    config = sized("spectre-small", block_ijk=(256, 256, 128), scan_eps=1e-6, scan_level=False)
    assert config.block_ijk == (256, 256, 128)
    assert (config.block.eps, config.scan.eps, config.scan.depth) == (1e-5, 1e-6, 0)
    assert sized("spectre-small") == SIZES["spectre-small"]


def test_unknown_sizes_and_blocks_that_the_patch_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="spectre-large"):
        sized("spectre-larg")
    with pytest.raises(ValueError, match="must divide"):
        sized("spectre-small", block_ijk=(100, 128, 64))
