"""Ours against the original package of SPECTRE, number by number: `spectre-fm` and voxelstem in one environment.

    python benchmarks/parity.py [--sizes small base large] [--threads N] [--write]

Both are given the same weights (drawn from the names of the tensors, `tests/golden/cases.py`), blocks and scans:
backbone on two sizes of block, feature combiner on several grids with both epsilons, projection heads, windowing and
order of tiles for odd and short scans, rotary positions, and whole scans. Printed is max|a - b| / max|b| of the whole
outputs, at most 1e-5 in fp32; windowing and order of tiles must be equal to the bit. With `--write` the peer's answers
are kept in `tests/golden` (a few hundred numbers of each), so that our tests need no peer.

Needs about 5 GB for large and four minutes on two cores; see `benchmarks/requirements-peers.txt`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "golden"))

import cases
import ours
from cases import BLOCK, BLOCKS, EPSILONS, GRIDS, HEADS, ROPE_BASES, SCANS, SIZES, TOLERANCE, TURNED, WINDOWED

Shapes = dict[str, dict[str, tuple[int, ...]]]


def peer_model(size: str, *, filled: bool = True, **backbone_options: Any) -> Any:
    """The peer's network as its own preset makes it, with our weights."""
    from spectre import SpectreImageFeatureExtractor

    model = SpectreImageFeatureExtractor.from_pretrained(
        f"spectre-{size}", pretrained=False, backbone_kwargs=backbone_options or None
    )
    if filled:
        for part, module in (("backbone", model.backbone), ("combiner", model.feature_combiner)):
            module.load_state_dict(cases.fill(part, shapes_of(module), rope_base=ROPE_BASES[part]))
    return model


def machine() -> str:
    """Name the processor as the system does."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@torch.inference_mode()
def peer_answers(size: str) -> Iterator[tuple[str, Tensor]]:
    """What the peer says for one size of the network."""
    model = peer_model(size, dynamic_img_size=True)
    for shape in BLOCKS:
        yield f"{size}/backbone/{shape}", model.backbone(cases.block(shape))
    dim = model.feature_combiner.patch_proj.in_features
    for eps in EPSILONS:
        set_eps(model.feature_combiner, eps)
        for grid in GRIDS:
            yield f"{size}/combiner/{eps}/{grid}", model.feature_combiner(cases.described(dim, grid), grid)
    set_eps(model.feature_combiner, EPSILONS[0])
    for shape in SCANS:
        yield f"{size}/extract/{shape}", model.extract(torch.from_numpy(cases.scan(shape)).float())


def set_eps(module: nn.Module, eps: float) -> None:
    """The preset's LayerNorm has 1e-5, the authors' scripts used 1e-6."""
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = eps


@torch.inference_mode()
def peer_small_answers() -> Iterator[tuple[str, Tensor]]:
    """What the peer says where no size of the network matters: heads, windowing, rotary positions."""
    from spectre.models.layers.rotary_pos_embed import RotaryPositionEmbedding, rope_apply
    from spectre.windowing import window_scan

    for part, dim in HEADS.items():
        head = peer_head(dim)
        head.load_state_dict(cases.fill(part, shapes_of(head)))
        yield part, head.eval()(cases.described(dim, (2, 2, 2)))
    for shape in WINDOWED:
        blocks, grid = window_scan(torch.from_numpy(cases.scan(shape)).float(), BLOCK)
        yield f"window/{shape}/grid", torch.tensor(grid)
        yield f"window/{shape}/blocks", blocks
        yield f"window/{shape}/corners", cases.corners(blocks)
    for grid, head_dim, base in TURNED:
        rope = RotaryPositionEmbedding(head_dim, num_heads=1, base=base, dtype=torch.float32).eval()
        sin, cos = rope(H=grid[0], W=grid[1], D=grid[2])
        yield f"turned/{grid}/{head_dim}/{base}", rope_apply(cases.queries(grid, head_dim), sin, cos)
        yield f"periods/{grid}/{head_dim}/{base}", rope.periods


def peer_head(dim: int) -> nn.Module:
    """The peer's projection head for embeddings of `dim`."""
    from spectre.ssl.heads.siglip_head import SigLIPProjectionHead

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it uses the old weight norm on purpose
        return SigLIPProjectionHead(input_dim=dim)


def peer_shapes() -> Shapes:
    """Names and shapes of every state that the peer has."""
    found: Shapes = {}
    with torch.device("meta"):
        for size in SIZES:
            model = peer_model(size, filled=False)
            found[f"{size}/backbone"] = shapes_of(model.backbone)
            found[f"{size}/combiner"] = shapes_of(model.feature_combiner)
    return found | {part: shapes_of(peer_head(dim)) for part, dim in HEADS.items()}


def write(shapes: Shapes, answers: dict[str, Tensor]) -> None:
    """Keep the peer's answers: one line for each tensor, and the numbers compressed."""
    facts = {"made_by": {name: version(name) for name in ("spectre-fm", "torch", "timm", "numpy")}, "shapes": shapes}
    # A shape is one word, not a line for each number.
    text = re.sub(r"\[[^\[\]]*\]", lambda found: "".join(found[0].split()), json.dumps(facts, indent=1))
    cases.SHAPES.write_text(text + "\n")
    kept = {name: cases.digest(answer).astype(np.float32) for name, answer in answers.items()}
    np.savez_compressed(cases.ANSWERS, **kept)  # pyright: ignore[reportArgumentType]


def compare(wanted: dict[str, Tensor], found: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Print how far ours is from the peer; the names of what is too far."""
    missed = []
    for name, answer in found:
        theirs = wanted[name].double()
        if answer.shape != theirs.shape:
            apart, share = float("inf"), float("inf")
        else:
            apart = float((answer.double() - theirs).abs().max())
            share = apart / float(theirs.abs().max())
        far = share > (0 if name.startswith("window/") else TOLERANCE)
        missed += [name] * far
        verdict = "MISSED" if far else "met"
        print(f"{name:42} {tuple(theirs.shape)!s:26} {apart:9.1e} {share:9.1e}  {verdict}", flush=True)
    return missed


def compare_size(size: str, shapes: Shapes, wanted: dict[str, Tensor]) -> list[str]:
    """Ask both about one size of the network, one after the other: two of the largest are not held at once."""
    began = time.perf_counter()
    wanted |= peer_answers(size)
    gc.collect()
    asked = time.perf_counter()
    network = ours.network(size, shapes)
    found = itertools.chain(ours.answers(size, network), ours.scans(size, network))
    missed = compare(wanted, found)
    print(f"{size}: the peer took {asked - began:.0f} s, ours {time.perf_counter() - asked:.0f} s")
    return missed


def main() -> None:
    """Ask both, print how far apart they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="keep the peer's answers in tests/golden, ask nobody else")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    warnings.filterwarnings("ignore", message="Scan is smaller than one crop")
    versions = ", ".join(f"{name} {version(name)}" for name in ("spectre-fm", "voxelstem", "torch"))
    print(f"{machine()}, {asked.threads} threads, {versions}, fp32")
    shapes, wanted = peer_shapes(), dict(peer_small_answers())
    if asked.write:
        for size in asked.sizes:
            wanted |= peer_answers(size)
        write(shapes, wanted)
        return
    print(f"{'':42} {'shape':26} {'max|a-b|':>9} {'/ max|b|':>9}  goal <= {TOLERANCE:g}, window 0")
    missed = compare(wanted, itertools.chain(ours.windowing(), ours.turned(), ours.heads(shapes)))
    for size in asked.sizes:
        missed += compare_size(size, shapes, wanted)
    print("all equal within the goal" if not missed else f"MISSED: {', '.join(missed)}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
