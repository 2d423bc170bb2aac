"""nnssl's names for the tensors of a ResEnc U-Net, and ours: pure maps, the same bits both ways.

`dynamic_network_architectures` 0.4.4 registers each convolution and norm twice (`conv` and `all_modules.0`, `norm` and
`all_modules.1`), and its decoder holds the encoder a second time, so the 264 tensors of ResEnc-L stand under 956 names.
Ours are the plain ones. nnssl reads images through SimpleITK, whose arrays run (k, j, i): its kernels do too, ours run
(i, j, k).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from voxelstem.backbones.unet import UNet, UNetConfig
from voxelstem.errors import CheckpointError
from voxelstem.weights.foreign import fit

State = Mapping[str, Tensor]
Axes = tuple[int, int, int]

KJI: Axes = (2, 1, 0)
"""Which of their axes ours are, as nnssl reads images unless its plan transposes them."""
STAGES, STEM = "encoder.stages", "encoder.stem"
KERNEL_AXES = 5
_ALIAS = (".all_modules.0.", ".all_modules.1.")
_PLAIN = (".conv.", ".norm.")
_OF_DECODER = "decoder."
_ENCODER = "encoder."
_STAGE = re.compile(r"encoder\.stages\.(\d{1,3})\.blocks\.(\d{1,3})\.conv2\.conv\.weight", re.ASCII)
_RISE = re.compile(r"decoder\.transpconvs\.(\d{1,3})\.weight", re.ASCII)


def plain(name: str) -> str:
    """The one name of ours for any of theirs.

    >>> plain("decoder.encoder.stages.1.blocks.0.skip.1.all_modules.1.bias")
    'encoder.stages.1.blocks.0.skip.1.norm.bias'
    """
    for alias, word in zip(_ALIAS, _PLAIN, strict=True):
        name = name.replace(alias, word)
    return name.removeprefix(_OF_DECODER) if name.startswith(_OF_DECODER + _ENCODER) else name


def theirs(name: str) -> tuple[str, ...]:
    """All names under which their file has a tensor of ours.

    >>> theirs("decoder.stages.0.convs.0.norm.bias")
    ('decoder.stages.0.convs.0.norm.bias', 'decoder.stages.0.convs.0.all_modules.1.bias')
    """
    names = [name]
    for alias, word in zip(_ALIAS, _PLAIN, strict=True):
        if word in name:
            names.append(name.replace(word, alias))
    return tuple(names)


def merged(state: State) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Each tensor once, under our names, and those names under which the file has several different ones.

    Of such, what `all_modules` holds is taken, and the encoder's own before the decoder's second one: those are what
    the network computes with (Spark's trainings write such files).
    """
    found: dict[str, list[str]] = {}
    for name in sorted(state, key=lambda name: (not _is_alias(name), name.startswith(_OF_DECODER + _ENCODER))):
        found.setdefault(plain(name), []).append(name)
    one = {name: state[names[0]] for name, names in found.items()}
    different = [name for name, names in found.items() if any(not _same(state[other], one[name]) for other in names)]
    return one, tuple(different)


def under_one_root(state: State, key_to_encoder: str = STAGES, key_to_stem: str = STEM) -> dict[str, Tensor]:
    """The tensors with the encoder's names as everywhere, where a plan says that they begin otherwise.

    A file of an encoder alone may also leave out the word `encoder`.
    """
    bare = not any(_ENCODER in name for name in state)
    stages, stem = ("stages", "stem") if bare and _begins(state, "stages.") else (key_to_encoder, key_to_stem)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = name
        for root, wanted in ((stages, STAGES), (stem, STEM)):
            if name.startswith(f"{root}."):
                ours = wanted + name.removeprefix(root)
        renamed[ours] = tensor
    return renamed


def config_of(state: State, block_ijk: Axes) -> UNetConfig:
    """The sizes of a network by its tensors under our names; strides are 2 where no decoder tells them.

    Raises:
        CheckpointError: they are no ResEnc U-Net's, or strides differ between axes.
        ValueError: `block_ijk` is not filled by the patches.
    """
    places = [(int(found[1]), int(found[2]), name) for name in state if (found := _STAGE.fullmatch(name))]
    count = len({stage for stage, _, _ in places})
    stem = state.get(f"{STEM}.convs.0.conv.weight")
    if stem is None or stem.ndim != KERNEL_AXES or count < 2 or max(stage for stage, _, _ in places) >= count:  # noqa: PLR2004
        raise CheckpointError(
            f"the file's {len(state)} tensors are those of no ResEnc U-Net: it has no stem, or {count} whole stages",
            hint="give weights of a ResEnc network; transformers such as Primus cannot be imported",
        )
    features = [0] * count
    depths = [0] * count
    for stage, _, name in places:
        features[stage] = state[name].shape[0] if state[name].ndim else 0
        depths[stage] += 1
    heads = [tensor for name, tensor in state.items() if name.startswith("decoder.seg_layers.") and tensor.ndim]
    return UNetConfig(
        channels=stem.shape[1],
        out_channels=heads[0].shape[0] if heads else 1,
        features=tuple(features),
        depths=tuple(depths),
        strides=(1, *_strides(state, count - 1)),
        block_ijk=block_ijk,
        decoder=any(name.startswith(_OF_DECODER) for name in state),
    )


def to_ours(state: State, config: UNetConfig, axes: Axes = KJI) -> dict[str, Tensor]:
    """Check `merged` tensors against the network and turn their kernels to (i, j, k); all bits stay.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape; all are named.
    """
    try:
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in UNet(config).state_dict().items()}
    except (RuntimeError, TypeError) as error:  # sizes beyond 64 bits
        raise CheckpointError("ResEnc U-Net: sizes beyond every memory", hint="the file is not whole") from error
    fit(state, shapes, what="ResEnc U-Net", hint="another network, or heads beside it: encoder_only takes the rest")
    return {name: _turned(state[name], axes) for name in shapes}


def to_theirs(state: State) -> dict[str, Tensor]:
    """Our tensors under all of their names, kernels turned to (k, j, i); aliases share one memory.

    A decoder brings the encoder's second set of names with it.
    """
    written = {name: _turned(tensor, KJI) for name, tensor in state.items()}
    twice = any(name.startswith(_OF_DECODER) for name in state)
    first = {alias: tensor for name, tensor in written.items() for alias in theirs(name)}
    encoder = {name: tensor for name, tensor in first.items() if name.startswith(_ENCODER)}
    again = {_OF_DECODER + name: tensor for name, tensor in encoder.items()} if twice else {}
    return encoder | again | {name: tensor for name, tensor in first.items() if name not in encoder}


def widened(state: State, channels: int) -> dict[str, Tensor]:
    """The same network for `channels` equal inputs: the stem's kernel, `channels` times over and divided by it.

    Raises:
        CheckpointError: the network already takes several.
    """
    name = f"{STEM}.convs.0.conv.weight"
    stem = state[name]
    if stem.shape[1] != 1:
        raise CheckpointError(
            f"the network takes {stem.shape[1]} channels: its stem cannot be repeated for {channels}",
            hint=f"leave the channels out, and feed {stem.shape[1]}",
        )
    return {**state, name: stem.repeat(1, channels, 1, 1, 1) / channels}


def _is_alias(name: str) -> bool:
    return any(alias in name for alias in _ALIAS)


def _begins(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or torch.equal(a, b)


def _strides(state: State, rises: int) -> Sequence[int]:
    """Of each stage after the first, by the kernels with which the decoder undoes them."""
    strides = [2] * rises
    for name, tensor in state.items():
        found = _RISE.fullmatch(name)
        if found is None or tensor.ndim != KERNEL_AXES or int(found[1]) >= rises:
            continue
        edges = set(tensor.shape[2:])
        if len(edges) > 1:
            raise CheckpointError(
                f"{name} strides by {tuple(tensor.shape[2:])}, and only networks with equal strides are read",
                hint="give weights of an isotropic network",
            )
        strides[rises - 1 - int(found[1])] = edges.pop()
    return strides


def _turned(tensor: Tensor, axes: Axes) -> Tensor:
    if tensor.ndim != KERNEL_AXES:
        return tensor
    return tensor.permute(0, 1, *(2 + axis for axis in axes)).contiguous()
