"""Our answers to the questions of `cases.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from voxelstem.backbones.heads import AlignHead
from voxelstem.backbones.layers import grid_positions, pair_order, rope_turns, rotate
from voxelstem.backbones.scan_vit import ScanVit
from voxelstem.backbones.sizes import sized
from voxelstem.card import Card
from voxelstem.config import flatten
from voxelstem.model import Model
from voxelstem.study import INPUT_SPECS, Provenance, Volume
from voxelstem.views.intensity import limits, window
from voxelstem.views.tile import centre_crop, tile
from voxelstem.weights.spectre_names import head_to_ours, to_ours

sys.path.insert(0, str(Path(__file__).parent))

import cases
from cases import BLOCK, BLOCKS, EPSILONS, GRIDS, HEADS, ROPE_BASES, SCANS, TURNED, WINDOWED

Shapes = Mapping[str, Mapping[str, Sequence[int]]]


def network(size: str, shapes: Shapes) -> ScanVit:
    """Our network of that size, with the weights that the peer was given."""
    parts = {
        part: cases.fill(part, shapes[f"{size}/{part}"], rope_base=ROPE_BASES[part])
        for part in ("backbone", "combiner")
    }
    config = sized(f"spectre-{size}")
    state = to_ours(parts["backbone"], parts["combiner"], config)
    del parts
    return assigned(state, size, EPSILONS[0])


def assigned(state: Mapping[str, Tensor], size: str, scan_eps: float) -> ScanVit:
    """A network that holds these tensors, not copies of them."""
    with torch.device("meta"):
        network = ScanVit(sized(f"spectre-{size}", scan_eps=scan_eps))
    network.load_state_dict(dict(state), assign=True)
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def answers(size: str, network: ScanVit, *, blocks: Sequence[cases.Triple] = BLOCKS) -> Iterator[tuple[str, Tensor]]:
    """Backbone and combiner."""
    for shape in blocks:
        cls, patches = network.encode_blocks(cases.block(shape))
        yield f"{size}/backbone/{shape}", torch.cat([cls[:, None], patches], dim=1)
    for eps in EPSILONS:
        looking = assigned(network.state_dict(), size, eps)
        for grid in GRIDS:
            scan, rows = looking.look_at_scan(cases.described(2 * network.dim, grid), grid)
            yield f"{size}/combiner/{eps}/{grid}", torch.cat([scan[:, None], rows], dim=1)


def scans(size: str, network: ScanVit, *, shapes: Sequence[cases.Triple] = SCANS) -> Iterator[tuple[str, Tensor]]:
    """Whole scans in HU, embedded as the peer does it: cls of the scan, then its blocks."""
    card = Card(architecture=flatten(network.config), spec=INPUT_SPECS["ct-native"], trained=("block", "scan"))
    model = Model(backbone=network, card=card, use_scan_level=True)
    for shape in shapes:
        volume = Volume(
            array=cases.scan(shape).astype(np.float32)[None],
            affine_ras=np.diag([0.8, 0.7, 1.5, 1.0]),
            modality="CT",
            provenance=Provenance(source_format="phantom", sha256="", orientation="RAS"),
        )
        found = model.embed(volume, like_spectre=True)
        cls, mean = np.split(found.scan, 2)
        np.testing.assert_allclose(mean, found.blocks.mean(axis=0), rtol=0, atol=1e-5)
        yield f"{size}/extract/{shape}", torch.from_numpy(np.concatenate([cls[None], found.blocks]))


def windowing() -> Iterator[tuple[str, Tensor]]:
    """Grid, blocks and corners of whole scans, cut as the peer cuts them."""
    spec = INPUT_SPECS["ct-native"]
    for shape in WINDOWED:
        tiling = centre_crop(shape, BLOCK)
        hu = torch.from_numpy(cases.scan(shape)).float()[None]
        blocks = tile(window(hu, limits(None, spec)), tiling, fill=0.0)
        yield f"window/{shape}/grid", torch.tensor(tiling.grid)
        yield f"window/{shape}/blocks", blocks
        yield f"window/{shape}/corners", cases.corners(blocks)


def turned() -> Iterator[tuple[str, Tensor]]:
    """Rotary positions, in the peer's order of rows."""
    for grid, head_dim, base in TURNED:
        order = pair_order(head_dim)
        turns = rope_turns(grid_positions(grid)[None], head_dim, base=base)
        ours = rotate(cases.queries(grid, head_dim)[None, None, :, order], turns)[0, 0]
        yield f"turned/{grid}/{head_dim}/{base}", ours[:, np.argsort(order)]


@torch.inference_mode()
def heads(shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """Image and text projection."""
    for part, dim in HEADS.items():
        head = AlignHead(dim)
        head.load_state_dict(head_to_ours(cases.fill(part, shapes[part]), dim, what=part))
        yield part, head(cases.described(dim, (2, 2, 2)))
