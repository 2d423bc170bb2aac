"""SPECTRE's names for the tensors of its network, and ours: pure maps, the same bits both ways.

The network is `backbones/scan_vit.py`; only names and order differ. SPECTRE keeps queries apart from keys and values
and turns row d of a head together with row d + half (half-split RoPE); we keep all three in one matrix and turn
neighbours. So the maps only rename, join and permute. Names and shapes: `spectre-fm` 0.2.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.heads import AlignHead
from voxelstem.backbones.layers import pair_order
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.backbones.sizes import SIZES
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.weights.foreign import FLOATS, fit

State = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

_BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.proj.weight": "attn.proj.weight",
    "attn.proj.bias": "attn.proj.bias",
    "ls1.gamma": "scale1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "fc1.weight",
    "mlp.fc1.bias": "fc1.bias",
    "mlp.fc2.weight": "fc2.weight",
    "mlp.fc2.bias": "fc2.bias",
    "ls2.gamma": "scale2",
}
"""Their names to ours for what is the same tensor in both."""
_HEAD = {
    **{f"layers.{at}.{kind}": f"mlp.{at}.{kind}" for at in (0, 2, 4) for kind in ("weight", "bias")},
    "last_layer.weight_g": "gain",
    "last_layer.weight_v": "direction",
}
_TODAY = {
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}
"""What torch's parametrizations call the two tensors of weight normalisation, to the released names."""


def size_of(backbone: State) -> str:
    """Which of `SIZES` the backbone has, by its width and its patch.

    Raises:
        CheckpointError: none of them, or no backbone of SPECTRE at all.
    """
    weight = backbone.get("patch_embed.proj.weight")
    if weight is None or weight.ndim != 5:  # noqa: PLR2004 - (dim, channel, i, j, k)
        if "patch_proj.weight" in backbone:
            raise CheckpointError(
                "what was given as the backbone is a combiner of SPECTRE's",
                hint="a combiner is given as --combiner, and its backbone as --backbone",
            )
        fit(backbone, shapes(SIZES["spectre-large"])[0], what="SPECTRE backbone")
    else:
        width, patch = weight.shape[0], tuple(weight.shape[2:])
        same = [name for name, config in SIZES.items() if config.block.dim == width]
        exact = [name for name in same if SIZES[name].patch_ijk == patch]
        if same:
            # With another patch `fit` will name what differs from the size that it is nearest to.
            return (exact or same)[0]
    widths = ", ".join(f"{name} {config.block.dim}" for name, config in SIZES.items())
    raise CheckpointError(
        f"the backbone is none of SPECTRE's sizes: its patch embedding has shape {tuple(weight.shape)}"
        if weight is not None
        else "the backbone has no patch embedding",
        hint=f"widths that are known: {widths}",
    )


def shapes(config: ScanVitConfig) -> tuple[Shapes, Shapes]:
    """SPECTRE's names and shapes, in its order: of the backbone, and of the combiner (empty without a scan level)."""
    block, scan = config.block, config.scan
    patch = {
        "patch_embed.proj.weight": (block.dim, config.channels, *config.patch_ijk),
        "patch_embed.proj.bias": (block.dim,),
    }
    project = {"patch_proj.weight": (scan.dim, 2 * block.dim), "patch_proj.bias": (scan.dim,)}
    return _encoder_shapes(block, patch), _encoder_shapes(scan, project) if scan.depth else {}


def to_ours(backbone: State, combiner: State | None, config: ScanVitConfig) -> dict[str, Tensor]:
    """Turn SPECTRE's tensors into the state of `ScanVit(config)`; `to_theirs` gives the same bits back.

    SPECTRE's backbone has no mask token: that starts at zero.

    Raises:
        CheckpointError: names or shapes are not those of `config` (all are listed), or another RoPE base.
    """
    wanted, wanted_combiner = shapes(config)
    fit(backbone, wanted, what="SPECTRE backbone")
    _check_periods(backbone, config.block, what="backbone")
    weight = backbone["patch_embed.proj.weight"]
    ours = {
        "mask_token": torch.zeros(config.block.dim, dtype=weight.dtype),
        "embed.weight": weight.reshape(config.block.dim, -1),
        "embed.bias": backbone["patch_embed.proj.bias"],
        **_encoder_to_ours(backbone, config.block, "block_encoder"),
    }
    if wanted_combiner:
        combiner = combiner or {}
        fit(combiner, wanted_combiner, what=f"SPECTRE combiner for a backbone {config.block.dim} wide")
        _check_periods(combiner, config.scan, what="combiner")
        ours |= {f"scan_project.{kind}": combiner[f"patch_proj.{kind}"] for kind in ("weight", "bias")}
        ours |= _encoder_to_ours(combiner, config.scan, "scan_encoder")
    return ours


def to_theirs(state: State, config: ScanVitConfig) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Turn the state of `ScanVit(config)` into SPECTRE's backbone and combiner (None without a scan level).

    The mask token is left out: SPECTRE's backbone has none.

    Raises:
        CheckpointError: `state` is not that of `config`.
        ConfigError: the network centres its inputs, which SPECTRE's does not.
    """
    if config.inputs != "unit":
        raise ConfigError(
            "these weights take voxels centred at zero, SPECTRE's take them in [0, 1]",
            hint="train with a size of `backbones/sizes.py` to be able to export it",
        )
    with torch.device("meta"):
        fit(state, {name: tuple(x.shape) for name, x in ScanVit(config).state_dict().items()}, what="weights")
    wanted, wanted_combiner = shapes(config)
    backbone = _encoder_to_theirs(state, config.block, "block_encoder") | {
        "patch_embed.proj.weight": state["embed.weight"].reshape(wanted["patch_embed.proj.weight"]),
        "patch_embed.proj.bias": state["embed.bias"],
    }
    if not wanted_combiner:
        return {name: backbone[name] for name in wanted}, None
    combiner = _encoder_to_theirs(state, config.scan, "scan_encoder")
    combiner |= {f"patch_proj.{kind}": state[f"scan_project.{kind}"] for kind in ("weight", "bias")}
    return {name: backbone[name] for name in wanted}, {name: combiner[name] for name in wanted_combiner}


def head_to_ours(head: State, dim: int, *, what: str) -> dict[str, Tensor]:
    """Turn an alignment head for embeddings of `dim` numbers into the state of `AlignHead(dim)`.

    Raises:
        CheckpointError: names or shapes of another network; all are listed.
    """
    head = {_TODAY.get(name, name): tensor for name, tensor in head.items()}
    with torch.device("meta"):
        ours = AlignHead(dim).state_dict()
    fit(head, {theirs: tuple(ours[name].shape) for theirs, name in _HEAD.items()}, what=what)
    return {name: head[theirs] for theirs, name in _HEAD.items()}


def head_to_theirs(head: State) -> dict[str, Tensor]:
    """Turn the state of an `AlignHead` into SPECTRE's names, as they were released."""
    return {theirs: head[name] for theirs, name in _HEAD.items()}


def _encoder_shapes(config: EncoderConfig, entry: Shapes) -> Shapes:
    """Of one transformer; `entry` is the layer that its tokens come from."""
    dim, hidden = config.dim, round(config.dim * config.mlp_ratio)
    registers: Shapes = {"reg_token": (1, config.registers, dim)} if config.registers else {}
    block: Shapes = {
        "norm1.weight": (dim,),
        "norm1.bias": (dim,),
        "attn.q.weight": (dim, dim),
        "attn.q.bias": (dim,),
        "attn.kv.weight": (2 * dim, dim),
        "attn.kv.bias": (2 * dim,),
        "attn.proj.weight": (dim, dim),
        "attn.proj.bias": (dim,),
        "ls1.gamma": (dim,),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
        "mlp.fc1.weight": (hidden, dim),
        "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (dim, hidden),
        "mlp.fc2.bias": (dim,),
        "ls2.gamma": (dim,),
    }
    periods: Shapes = {"rope.periods": (config.dim // config.heads // 6,)}
    blocks = {f"blocks.{at}.{name}": shape for at in range(config.depth) for name, shape in block.items()}
    end: Shapes = {"norm.weight": (dim,), "norm.bias": (dim,)}
    return {"cls_token": (1, 1, dim), **registers, **entry, **periods, **blocks, **end}


def _periods(config: EncoderConfig) -> Tensor:
    """Of the rotary positions, with the bits that SPECTRE computes: base^(2k / (head_dim / 3)) in single precision."""
    head_dim = config.dim // config.heads
    return config.rope_base ** (2 * torch.arange(head_dim // 6, dtype=torch.float32) / (head_dim // 3))


def _check_periods(state: State, config: EncoderConfig, *, what: str) -> None:
    """We compute the periods from the base, so a file that was trained with others would be misread."""
    if state["rope.periods"].dtype not in FLOATS:
        raise CheckpointError(f"the {what}'s rope.periods are no real numbers", hint="the file is damaged")
    found, wanted = state["rope.periods"].float(), _periods(config)
    # Computed on another device the last bits may differ, and half precision keeps few of them.
    if not torch.allclose(found, wanted, rtol=4 * torch.finfo(state["rope.periods"].dtype).eps, atol=0.0):
        raise CheckpointError(
            f"the {what}'s rope.periods run to {float(found.max()):g}, those of base {config.rope_base:g} "
            f"to {float(wanted.max()):g}",
            hint="it was trained with other rotary positions than SPECTRE's presets",
        )


def _rows(config: EncoderConfig) -> Tensor:
    """Which of their query (or key) rows stands at each of our rows."""
    head_dim = config.dim // config.heads
    return (torch.arange(config.heads)[:, None] * head_dim + torch.tensor(pair_order(head_dim))).flatten()


def _encoder_to_ours(state: State, config: EncoderConfig, to: str) -> dict[str, Tensor]:
    rows = _rows(config)
    tokens = [state[name] for name in ("cls_token", "reg_token") if name in state]
    ours = {f"{to}.prefix": torch.cat(tokens, dim=1)[0]}
    for at in range(config.depth):
        their, our = f"blocks.{at}.", f"{to}.blocks.{at}."
        ours |= {our + name: state[their + theirs] for theirs, name in _BLOCK.items()}
        for kind in ("weight", "bias"):
            query, (key, value) = state[f"{their}attn.q.{kind}"], state[f"{their}attn.kv.{kind}"].chunk(2)
            ours[f"{our}attn.qkv.{kind}"] = torch.cat([query[rows], key[rows], value])
    return ours | {f"{to}.norm.{kind}": state[f"norm.{kind}"] for kind in ("weight", "bias")}


def _encoder_to_theirs(state: State, config: EncoderConfig, of: str) -> dict[str, Tensor]:
    rows = _rows(config).argsort()
    prefix = state[f"{of}.prefix"]
    theirs = {"cls_token": prefix[None, :1], "rope.periods": _periods(config)}
    if config.registers:
        theirs["reg_token"] = prefix[None, 1:]
    for at in range(config.depth):
        their, our = f"blocks.{at}.", f"{of}.blocks.{at}."
        theirs |= {their + name: state[our + ours] for name, ours in _BLOCK.items()}
        for kind in ("weight", "bias"):
            query, key, value = state[f"{our}attn.qkv.{kind}"].chunk(3)
            theirs[f"{their}attn.q.{kind}"] = query[rows]
            theirs[f"{their}attn.kv.{kind}"] = torch.cat([key[rows], value])
    return theirs | {f"norm.{kind}": state[f"{of}.norm.{kind}"] for kind in ("weight", "bias")}
