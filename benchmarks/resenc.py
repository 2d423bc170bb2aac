"""One forward pass of ResEnc-L with equal weights: ours against `dynamic-network-architectures`, nnU-Net's networks.

    python benchmarks/resenc.py [--size 160] [--repeats 3] [--threads N] [--encoder] [--write]

Encoder and decoder, one block of `size`^3 voxels, one channel, fp32, in inference mode on the processor. Before
anything is timed the script checks that both give the same numbers. The peer runs at its default and in the memory
format `channels_last_3d`, so does ours; the sides take turns. Printed are medians of clock and of processor time, and
the ratio of our default to the faster of the peer's. With `--encoder` ours makes an embedding's map (no decoder, no
other map kept) beside the peer's encoder. With `--write` nothing is timed: the peer's answers on small networks are
kept in `tests/golden/resenc.npz`, so that our tests need no peer.

Run it alone on the machine, in the peers' environment (`benchmarks/requirements-peers.txt`). At 160^3 a pass takes
about a minute and 6 GB.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "golden"))

import cases
import resenc_cases as golden

from voxelstem.backbones.unet import UNet, UNetConfig, resenc

AGREE = 1e-5
"""max|a - b| / max|b| that is allowed between the outputs."""
GOAL = 1.0


def peer_of(config: UNetConfig) -> Any:
    """The peer's network of the same sizes."""
    stages = len(config.features)
    return ResidualEncoderUNet(
        input_channels=config.channels,
        n_stages=stages,
        features_per_stage=list(config.features),
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=list(config.strides),
        n_blocks_per_stage=list(config.depths),
        num_classes=config.out_channels,
        n_conv_per_stage_decoder=[1] * (stages - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=False,
    )


def canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The peer's tensors without its second names for them."""
    return {
        name: tensor
        for name, tensor in state.items()
        if ".all_modules." not in name and not name.startswith("decoder.encoder.")
    }


def make_sides(config: UNetConfig, *, encoder: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """The ways to compute it, all with the same weights."""
    torch.manual_seed(0)
    ours, peer = UNet(config).eval(), peer_of(config).eval()
    loaded = peer.load_state_dict(ours.state_dict(), strict=False)
    if loaded.unexpected_keys or canonical(peer.state_dict()).keys() != ours.state_dict().keys():
        raise SystemExit("the two networks do not have the same tensors")

    def of(network: nn.Module, kind: torch.memory_format) -> Callable[[Tensor], Tensor]:
        own = copy.deepcopy(network).to(memory_format=kind)
        return lambda block: forward(own, block.contiguous(memory_format=kind), encoder=encoder)

    formats = {"default": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
    pairs = [(whose, name) for name in formats for whose in ("peer", "ours")]
    return {f"{whose}, {name}": of({"peer": peer, "ours": ours}[whose], formats[name]) for whose, name in pairs}


def forward(network: Any, block: Tensor, *, encoder: bool) -> Tensor:
    """One pass."""
    if isinstance(network, UNet):
        return network.encoder(block) if encoder else network.decode(network.features(block))
    return network.encoder(block)[-1] if encoder else network(block)


Spent = dict[str, list[tuple[float, float]]]
"""Seconds of each pass by the clock, and of all processors."""


def timed(sides: dict[str, Callable[[Tensor], Tensor]], block: Tensor, repeats: int) -> Spent:
    """Time the sides in turns, after one untimed round in which their outputs are compared."""
    wanted = sides["peer, default"](block)
    largest = float(wanted.abs().max())
    for name, side in sides.items():
        error = float((side(block) - wanted).abs().max()) / largest
        print(f"{name:24} max|a - b| / max|b| = {error:.1e}", flush=True)
        if name.endswith("default") and not error <= AGREE:
            raise SystemExit(f"{name} gives other numbers")
    spent: Spent = {name: [] for name in sides}
    for turn in range(repeats):
        # Whoever comes first in a round is not always the same.
        names = list(sides)[turn % len(sides) :] + list(sides)[: turn % len(sides)]
        for name in names:
            begin = time.perf_counter(), time.process_time()
            sides[name](block)
            spent[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        print(f"round {turn + 1}: " + ", ".join(f"{name} {spent[name][-1][0]:.2f} s" for name in sides), flush=True)
    return spent


@torch.inference_mode()
def write() -> None:
    """Keep what the peer says on small networks: the bottleneck, and every head from fine to coarse."""
    answers: dict[str, Tensor] = {}
    for name, sizes in golden.SIZES.items():
        network = peer_of(UNetConfig(**sizes, block_ijk=golden.BLOCKS[name])).eval()
        network.decoder.deep_supervision = True
        network.load_state_dict(golden.weights(name, canonical(network.state_dict())), strict=False)
        answers[f"{name}/bottleneck"] = network.encoder(golden.block(name))[-1]
        answers |= {f"{name}/head{level}": head for level, head in enumerate(network(golden.block(name)))}
    np.savez_compressed(golden.ANSWERS, **{name: cases.digest(answer) for name, answer in answers.items()})
    print(f"{len(answers)} answers in {golden.ANSWERS.name}")


def main() -> None:
    """Check, time, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=160, help="edge of the block in voxels, a multiple of 32 above it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--encoder", action="store_true", help="the encoder alone")
    parser.add_argument("--write", action="store_true", help="keep the peer's answers for our tests")
    given = parser.parse_args()
    if given.write:
        write()
        return
    torch.set_num_threads(given.threads)
    config = resenc("L")
    if given.size % config.patch or given.size <= config.patch:
        raise SystemExit(f"--size must be a multiple of {config.patch} above it: the peer norms no single voxel")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {given.threads} threads, torch {torch.__version__}, "
        f"dynamic-network-architectures {version('dynamic-network-architectures')}"
    )
    block = torch.randn(1, config.channels, *(given.size,) * 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        spent = timed(make_sides(config, encoder=given.encoder), block, given.repeats)
    part = "encoder" if given.encoder else "whole network"
    for clock, said in enumerate(("clock", "processor")):
        middle = {name: statistics.median(passed[clock] for passed in passes) for name, passes in spent.items()}
        print(f"{said}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in middle.items()))
        best = min(seconds for name, seconds in middle.items() if name.startswith("peer"))
        ratio = middle["ours, default"] / best
        print(f"{said}: {part}, {given.size}^3, ours / the peer's faster format = {ratio:.2f} (goal <= {GOAL})")
    print(f"highest memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
