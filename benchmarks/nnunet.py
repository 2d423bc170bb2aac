"""What we export for nnU-Net, loaded by nnU-Net's own code: `dynamic_network_architectures` and voxelstem in one place.

    python benchmarks/nnunet.py [--sizes tiny L] [--write]

For each size a network of ours is drawn, exported with `voxelstem weights export nnunet`'s function and read as nnU-Net
reads it (`torch.load(weights_only=True)`). The peer's network is built from the adaptation plan in the file. Then

- the whole state is loaded strictly, and stem and stages each into their own submodule, strictly, as nnU-Net's loader
  of pretrained encoders does; where `nnunetv2` is installed its `load_pretrained_weights` loads the file too;
- both networks see the same small scan, ours as (i, j, k), the peer's as (k, j, i) as SimpleITK gives arrays: printed
  is max|a - b| / max|b|, of the output at most 1e-5 in fp32, and in double precision at most 1e-10 of bottleneck and
  output (a bottleneck of six cells, normalised over them, makes fp32's rounding ten times larger, to about 6e-5);
- the peer's own state, drawn by its own initialisation, comes in through `import_nnssl`, and the same is compared.

`--write` keeps the peer's answers for tiny in `tests/golden/nnssl.json`, so that our tests need no peer. L needs about
4 GB and two minutes on two cores; see `benchmarks/requirements-peers.txt`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import math
import pydoc
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from voxelstem.backbones.unet import resenc
from voxelstem.card import Card, write_weights
from voxelstem.config import flatten
from voxelstem.model import load, make_model
from voxelstem.study import INPUT_SPECS
from voxelstem.weights.nnssl import FILE, PLAN, WEIGHTS, export_nnssl, import_nnssl

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "golden"))

import cases

GOALS = {"fp32": 1e-5, "fp64": 1e-10}
SHAPES = {"tiny": (16, 24, 32), "L": (64, 32, 96)}
"""Blocks (i, j, k); three different edges, or a wrong order of axes could hide."""
GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "nnssl.json"
RESENC_L: dict[str, Any] = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1], *[[2, 2, 2]] * 5],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1] * 5,
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
"""What nnU-Net understands by the word ResEncL."""


def peer_network(plan: Mapping[str, Any]) -> nn.Module:
    """The peer's network as the plan in a checkpoint asks for it."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    asked = plan["architecture_plans"]
    settings = dict(RESENC_L if asked["arch_kwargs"] is None else asked["arch_kwargs"])
    for name in ("conv_op", "norm_op", "dropout_op", "nonlin"):
        settings[name] = pydoc.locate(settings[name]) if settings[name] else None
    return ResidualEncoderUNet(
        input_channels=plan["pretrain_num_input_channels"], num_classes=1, deep_supervision=False, **settings
    ).eval()


def scan(size: str) -> Tensor:
    """A small scan (1, 1, i, j, k) by formula."""
    shape = SHAPES[size]
    return torch.from_numpy(cases.uniform(f"nnssl {size}", math.prod(shape))).reshape(1, 1, *shape)


@torch.inference_mode()
def peer_answers(network: Any, x_ijk: Tensor) -> dict[str, Tensor]:
    """Bottleneck and output of the peer, turned to (i, j, k)."""
    network.to(x_ijk.dtype)
    skips = network.encoder(x_ijk.permute(0, 1, 4, 3, 2).contiguous())
    return {"bottleneck": skips[-1].permute(0, 1, 4, 3, 2), "output": network.decoder(skips).permute(0, 1, 4, 3, 2)}


@torch.inference_mode()
def our_answers(folder: Path, x_ijk: Tensor) -> dict[str, Tensor]:
    """The same of a weights folder of ours."""
    network = load(folder).backbone.to(x_ijk.dtype)
    features = network.features(x_ijk)
    return {"bottleneck": features[-1], "output": network.decode(features)}


def compare(what: str, folder: Path, peer: Any, x_ijk: Tensor) -> bool:
    """Print how far apart the two are, and say whether that is within the goals."""
    fine = True
    for name, x in (("fp32", x_ijk), ("fp64", x_ijk.double())):
        ours, peers = our_answers(folder, x), peer_answers(peer, x)
        far = {part: float((ours[part] - peers[part]).abs().max() / peers[part].abs().max()) for part in peers}
        print(f"  {what:42} {name}  " + "  ".join(f"{part} {value:.1e}" for part, value in far.items()))
        fine &= far["output"] <= GOALS[name] and (name == "fp32" or far["bottleneck"] <= GOALS[name])
    return fine


def loaders(path: Path, plan: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """The peer's network with the file's weights, by every way that nnU-Net has."""
    state = torch.load(path, weights_only=True)[WEIGHTS]
    network = peer_network(plan)
    network.load_state_dict(state, strict=True)
    yield "all names, strictly", network
    network = peer_network(plan)
    network.decoder.load_state_dict(
        {name.removeprefix("decoder."): x for name, x in state.items() if name.startswith("decoder.")}, strict=True
    )
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        part = {name.removeprefix(f"{key}."): x for name, x in state.items() if name.startswith(f"{key}.")}
        network.get_submodule(key).load_state_dict(part, strict=True)
    yield "stem, stages and decoder each, strictly", network
    if importlib.util.find_spec("nnunetv2"):
        from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

        network = peer_network(plan)
        with contextlib.redirect_stdout(io.StringIO()):
            load_pretrained_weights(network, path)
        # It leaves the heads as they were drawn, by design.
        heads = {name: x for name, x in state.items() if name.startswith("decoder.seg_layers.")}
        network.load_state_dict(heads, strict=False)
        yield "nnunetv2's load_pretrained_weights", network


def check(size: str, folder: Path) -> bool:
    """Everything of one size, in an empty folder."""
    config = resenc("L" if size == "L" else "tiny")
    spec = replace(INPUT_SPECS["mri-nnssl"], block_ijk=config.block_ijk, preset="")
    card = Card(architecture=flatten(config), spec=spec, trained=("block",), licence="cc0-1.0", recipe="drawn")
    write_weights(folder / "ours", make_model(card, seed=0).backbone.state_dict(), card)
    path = export_nnssl(folder / "ours", folder / "out") / FILE
    found = torch.load(path, weights_only=True, mmap=True)
    counts = Counter(".".join(name.split(".")[:2]) for name in found[WEIGHTS])
    print(f"{size}: {len(found[WEIGHTS])} names in {path.stat().st_size / 1e6:.1f} MB: {dict(counts)}")
    x = scan(size)
    fine = [compare(f"out: {how}", folder / "ours", peer, x) for how, peer in loaders(path, found[PLAN])]
    torch.manual_seed(1)
    peer = peer_network(found[PLAN])
    torch.save({WEIGHTS: peer.state_dict(), PLAN: found[PLAN]}, folder / "peer.pth")
    import_nnssl(folder / "peer.pth", folder / "in")
    fine.append(compare("in: drawn by the peer itself", folder / "in", peer, x))
    return all(fine)


def write(folder: Path) -> None:
    """Keep names, shapes and answers of the peer's tiny network, its weights drawn from their names."""
    config = resenc("tiny")
    card = Card(architecture=flatten(config), spec=replace(INPUT_SPECS["mri-nnssl"], block_ijk=config.block_ijk))
    write_weights(folder / "ours", make_model(card, seed=0).backbone.state_dict(), card)
    plan = torch.load(export_nnssl(folder / "ours", folder / "out") / FILE, weights_only=True)[PLAN]
    peer = peer_network(plan)
    shapes = {name: list(parameter.shape) for name, parameter in peer.named_parameters()}
    plain = {parameter.data_ptr(): name for name, parameter in peer.named_parameters()}
    peer.load_state_dict(cases.fill("nnssl", shapes), strict=False)
    answers = peer_answers(peer, scan("tiny"))
    content = {
        "peer": f"dynamic_network_architectures {version('dynamic-network-architectures')}",
        "block_ijk": SHAPES["tiny"],
        "shapes": shapes,
        "names": {name: plain[x.data_ptr()] for name, x in peer.state_dict().items()},
        "bottleneck": [round(value, 7) for value in answers["bottleneck"].mean(dim=(0, 2, 3, 4)).tolist()],
        "output": [round(value, 7) for value in answers["output"].flatten()[:: cases.SAMPLES // 4].tolist()],
    }
    GOLDEN.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")


def main() -> None:
    """Ask both, print how far apart they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--write", action="store_true", help="keep the peer's answers in tests/golden, compare nothing")
    asked = parser.parse_args()
    names = ("dynamic-network-architectures", "nnunetv2", "voxelstem", "torch")
    print(", ".join(f"{name} {_version(name)}" for name in names) + f"; goals {GOALS}")
    fine = True
    for size in asked.sizes if not asked.write else ():
        with tempfile.TemporaryDirectory() as folder:
            fine &= check(size, Path(folder))
    if asked.write:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
        return
    print("all equal within the goal" if fine else "MISSED")
    sys.exit(not fine)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
