"""The winner of FOMO25's methods track: its Lightning checkpoint in, 74 tensors of the disentangling U-Net-VAE.

Names and numbers: jbanusco/fomo25 at de35782 (arXiv 2601.13166). Scans were read as (i, j, k) there, as here, so
kernels stay as they are. The file holds the optimiser's state and settings as Python objects too; those stay unread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from voxelstem.backbones.disentangled import Disentangled, DisentangledConfig
from voxelstem.card import Card, digest, write_weights
from voxelstem.config import flatten
from voxelstem.errors import CheckpointError
from voxelstem.study import INPUT_SPECS, InputSpec
from voxelstem.weights.foreign import check_finite, fit, one_line, read_checkpoint
from voxelstem.weights.known import KNOWN, Known

SPEC = INPUT_SPECS["mri-fomo25"]
RELEASED = KNOWN["fomo2jomo"]
_WHAT = "FOMO25's U-Net-VAE"
_LATENTS = {
    "subject_mean": "conv_mu_shared",
    "subject_logvar": "conv_logvar_shared",
    "contrast_mean": "conv_mu_modality",
    "contrast_logvar": "conv_logvar_modality",
}
_LEVEL = re.compile(r"encoder\.(?:in_conv|encoder_conv\d{1,3})\.conv1\.conv\.weight", re.ASCII)
_NOTE = (
    "It learned on blocks of 64 voxels at 1 mm, with values brought to [0, 1] by their 99th percentile, air at 0; "
    "it knows no z-scores."
)


def import_fomo25(path: Path, out: Path, *, about: Known = RELEASED, spec: InputSpec = SPEC) -> Card:
    """Take the tensors out of FOMO25's checkpoint `path` and write them to the weights folder `out`.

    Weights trained with the same code elsewhere come in by the same way; `about` then says what they are.

    Args:
        path: The `.ckpt`, or its tensors as `.safetensors`.
        out: The folder to make.
        about: Licence, data and origin.
        spec: How scans are fed.

    Raises:
        CheckpointError: another network, code in the file, values that are not finite, or `out` cannot be written.
    """
    found = read_checkpoint(path, ("state_dict",))
    config = config_of(found.tensors, spec)
    tensors = to_ours(found.tensors, config)
    check_finite({path.name: tensors})
    left_out = one_line(", ".join(found.left_out))
    card = Card(
        architecture=flatten(config),
        spec=spec,
        licence=about.licence,
        data=about.data,
        recipe="fomo25",
        trained=("block",),
        parent=digest(path),
        origin=about.origin,
        notes=(_NOTE, *((f"Objects of {left_out} in the file were left unread.",) if left_out else ()), *about.cite),
    )
    return write_weights(out, tensors, card)


def config_of(state: Mapping[str, Tensor], spec: InputSpec = SPEC) -> DisentangledConfig:
    """The sizes of a network by its tensors under their names.

    Raises:
        CheckpointError: they are no such network's.
    """
    first, latent = state.get("encoder.in_conv.conv1.conv.weight"), state.get("conv_mu_shared.weight")
    if first is None or latent is None or first.ndim != 5 or latent.ndim != 5:  # noqa: PLR2004 - kernels
        raise CheckpointError(
            f"the file's {len(state)} tensors are not those of {_WHAT}: it has no first convolution or no latents",
            hint="a fine-tuned network of FOMO25's has others; give the pretrained one",
        )
    try:
        return DisentangledConfig(
            channels=first.shape[1],
            width=first.shape[0],
            levels=sum(_LEVEL.fullmatch(name) is not None for name in state),
            latent=latent.shape[0],
            block_ijk=spec.block_ijk,
            vae="conv_logvar_shared.weight" in state,
        )
    except ValueError as error:
        raise CheckpointError(
            f"the checkpoint describes no network that can be: {error}", hint="the file is not whole"
        ) from error


def to_ours(theirs: Mapping[str, Tensor], config: DisentangledConfig) -> dict[str, Tensor]:
    """Rename the tensors; their bits stay.

    Raises:
        CheckpointError: tensors are missing, too many or of another shape; all of them are named.
    """
    try:
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in Disentangled(config).state_dict().items()}
    except (RuntimeError, TypeError) as error:  # sizes beyond 64 bits
        raise CheckpointError(f"{_WHAT}: sizes beyond every memory", hint="the file is not whole") from error
    fit(theirs, {their_name(name): shape for name, shape in shapes.items()}, what=_WHAT)
    return {name: theirs[their_name(name)] for name in shapes}


def their_name(ours: str) -> str:
    """The key of a tensor in FOMO25's file, below `model.`.

    >>> their_name("levels.0.conv2.norm.bias"), their_name("rises.3.conv.conv.weight")
    ('encoder.in_conv.conv2.norm.bias', 'decoder.decoder_conv4.conv1.conv.weight')
    """
    match ours.split("."):
        case ["levels", "0", *rest]:
            return ".".join(["encoder.in_conv", *rest])
        case ["levels", level, *rest]:
            return ".".join([f"encoder.encoder_conv{level}", *rest])
        case ["rises", level, "upsample", leaf]:
            return f"decoder.upsample{int(level) + 1}.{leaf}"
        case ["rises", level, "conv", *rest]:
            return ".".join([f"decoder.decoder_conv{int(level) + 1}.conv1", *rest])
        case ["out", leaf]:
            return f"decoder.out_conv.{leaf}"
        case [latent, leaf] if latent in _LATENTS:
            return f"{_LATENTS[latent]}.{leaf}"
        case _:
            raise ValueError(f"'{ours}' is no tensor of a disentangling U-Net-VAE")
