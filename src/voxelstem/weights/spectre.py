"""SPECTRE's weights in and out: the `.pt` files as released, the Hub's single file, and checkpoints of its training."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from voxelstem.aligned import HEADS
from voxelstem.backbones.qwen3 import TEXT_TENSORS, TextConfig, read_tower
from voxelstem.backbones.scan_vit import ScanVitConfig
from voxelstem.backbones.sizes import sized
from voxelstem.card import README, Card, digest, read_card, read_tensors, write_weights
from voxelstem.config import flatten, overlay
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.study import INPUT_SPECS, InputSpec
from voxelstem.weights import foreign
from voxelstem.weights.foreign import below, check_finite
from voxelstem.weights.known import SPECTRE_DATA, SPECTRE_LICENCE
from voxelstem.weights.spectre_names import State, head_to_ours, head_to_theirs, size_of, to_ours, to_theirs
from voxelstem.weights.text import text_files

__all__ = [
    "HEADS",
    "SpectreFiles",
    "export_spectre",
    "import_spectre",
    "read_heads",
    "size_of",
    "to_ours",
    "to_theirs",
]

PARTS: Mapping[str, tuple[str, ...]] = {
    "backbone": ("backbone_teacher.vit.", "backbone_image.", "backbone_student.vit.", "backbone."),
    "combiner": ("feature_comb_image.", "feature_combiner."),
    "image_head": ("projection_image.",),
    "text_head": ("projection_text.",),
    "text": ("backbone_text.",),
}
"""Under which prefixes a file that holds several parts keeps each; the teacher's (averaged) weights go first."""

_ORIGIN = "SPECTRE (arXiv 2511.17209), released as cclaess/SPECTRE and cclaess/SPECTRE-Large on the Hugging Face Hub"
_NOTES = (
    "Imported from SPECTRE's own files; the terms of the data sets above hold besides the licence.",
    "Counts of series: the paper's table of data, read in a transcription of it.",
    "Whether a backbone was aligned with reports (the one without is named no_vla) cannot be told from its tensors.",
)
_NOT_RELEASED = "Released are the weights of spectre-large only: ask whoever trained these for their licence and data."
_LEFT_OUT = "mask_token"
"""Only pretraining needs it, and SPECTRE's files have no place for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectreFiles:
    """The files of one model. One file may hold several parts (the Hub's, a checkpoint): give it as `backbone`."""

    backbone: Path
    combiner: Path | None = None
    """SPECTRE's word for the scan level."""
    image_head: Path | None = None
    text_head: Path | None = None
    text: Path | None = None
    text_config: TextConfig = dataclasses.field(default_factory=TextConfig)


def import_spectre(
    files: SpectreFiles,
    out: Path,
    *,
    spec: InputSpec = INPUT_SPECS["ct-stage2"],
    scan_eps: float = 1e-5,
    data: tuple[str, ...] = SPECTRE_DATA,
) -> Card:
    """Write SPECTRE's weights as the new weights folder `out`; the size is told from the tensors' shapes.

    `spec` says at which spacing scans shall be fed, and in which blocks. `scan_eps` is LayerNorm's in the scan level:
    the package that released the weights computes with 1e-5, the authors' own scripts with 1e-6. `data` is what the
    card says they saw.

    Raises:
        CheckpointError: a file cannot be read or is none of SPECTRE's, parts of two sizes, not finite, `out` exists.
        ConfigError: blocks that the patches do not fill, or a `scan_eps` that is not positive.
    """
    parts = _gather(files)
    name = size_of(parts["backbone"])
    config = _config(name, parts, spec, scan_eps)
    tensors = to_ours(parts["backbone"], parts.get("combiner"), config)
    extras, texts = {}, {}
    if heads := _heads(parts, config, files.text_config):
        extras[HEADS] = heads
    if "text" in parts:
        tower, texts = text_files(parts["text"], files.text_config)
        extras |= tower
    check_finite({"weights": tensors, **extras})
    card = Card(
        architecture=flatten(config),
        spec=spec,
        licence=SPECTRE_LICENCE,
        origin=_ORIGIN,
        data=data,
        recipe=name,
        trained=("block", "scan") if "combiner" in parts else ("block",),
        notes=_NOTES if name == "spectre-large" else (_NOT_RELEASED, *_NOTES),
    )
    return write_weights(out, tensors, card, extras, texts)


def export_spectre(folder: Path, out: Path) -> Path:
    """Write the weights `folder` under SPECTRE's plain names into the new folder `out`.

    Each part becomes a `.safetensors` file and a `.pt` file of the same tensors: `spectre-fm` reads `.pt` only. Both
    are read back, mapped to our names and compared, which `parity.json` states; the README goes along for its licence.

    Raises:
        CheckpointError: not a network of SPECTRE's, `out` exists, the disk does not take it, or a bit changed.
        ConfigError: the network centres its inputs, which SPECTRE's does not.
    """
    card = read_card(folder)
    if card.architecture["name"] != "scan_vit":
        raise CheckpointError(
            f"{folder.name} holds the network '{card.architecture['name']}', SPECTRE's is 'scan_vit'",
            hint="export it as onnx or openvino",
        )
    if out.exists():
        raise CheckpointError(f"{out.name} exists already", hint="choose another folder or remove this one")
    config = overlay(ScanVitConfig(), card.architecture)
    tensors = read_tensors(folder, card)
    backbone, combiner = to_theirs(tensors, config)
    parts: dict[str, State] = {"backbone": backbone}
    if combiner is not None:
        parts["combiner"] = combiner
    if HEADS in card.extras:
        parts |= {f"{side}_head": head_to_theirs(head) for side, head in read_heads(folder, card).items()}
    if TEXT_TENSORS in card.extras:
        parts["text"] = read_tower(folder, card)[1]
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        files = _write_parts(unfinished, parts)
        facts = _parity(unfinished, parts, config, tensors) | {"weights_sha256": card.sha256, "sha256": files}
        (unfinished / "parity.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if (folder / README).is_file():
            shutil.copyfile(folder / README, unfinished / README)
        for path in unfinished.iterdir():
            path.chmod(0o644)  # safetensors lets only the owner read
        unfinished.rename(out)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"'{out.name}' could not be written: {reason}", hint="free some space") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def read_heads(folder: Path, card: Card) -> dict[str, dict[str, Tensor]]:
    """The states of the alignment heads of a weights folder: `image`, `text`, whichever came with it.

    Raises:
        CheckpointError: there are none, or the file is damaged.
    """
    tensors = read_tensors(folder, card, HEADS)
    found = {side: below(tensors, [f"{side}."]) for side in ("image", "text")}
    return {side: head for side, head in found.items() if head}


def _gather(files: SpectreFiles) -> dict[str, State]:
    """Read every file and sort its tensors by part; a part's own file goes before what others hold of it."""
    own: dict[str, State] = {}
    beside: dict[str, State] = {}
    for part in PARTS:
        path = getattr(files, part)
        if path is None:
            continue
        tensors = foreign.read_tensors(path)
        held = {name: found for name, prefixes in PARTS.items() if (found := below(tensors, prefixes))}
        if held and part not in held:
            raise CheckpointError(
                f"'{path.name}' holds {', '.join(held)} and no {part}", hint=f"give the file of the {part}"
            )
        own[part] = held.get(part, tensors)
        beside |= held if part == "backbone" else {}
    return beside | own


def _config(name: str, parts: Mapping[str, State], spec: InputSpec, scan_eps: float) -> ScanVitConfig:
    try:
        config = sized(name, block_ijk=spec.block_ijk, scan_eps=scan_eps, scan_level="combiner" in parts)
    except ValueError as error:
        raise ConfigError(str(error), hint="choose blocks of whole patches and a positive eps") from error
    return dataclasses.replace(
        config,
        block=dataclasses.replace(config.block, registers=_registers(parts["backbone"])),
        scan=dataclasses.replace(config.scan, registers=_registers(parts.get("combiner", {}))),
    )


def _registers(state: State) -> int:
    tokens = state.get("reg_token")
    return tokens.shape[1] if tokens is not None and tokens.ndim == 3 else 0  # noqa: PLR2004 - (1, token, dim)


def _heads(parts: Mapping[str, State], config: ScanVitConfig, text: TextConfig) -> dict[str, Tensor]:
    level = config.scan if config.scan.depth else config.block
    dims = {"image": 2 * level.dim, "text": text.hidden}
    return {
        f"{side}.{name}": tensor
        for side, dim in dims.items()
        if f"{side}_head" in parts
        for name, tensor in head_to_ours(parts[f"{side}_head"], dim, what=f"{side} head").items()
    }


def _write_parts(folder: Path, parts: Mapping[str, State]) -> dict[str, str]:
    """Each part in both formats; gives back their digests."""
    for part, state in parts.items():
        # A slice would bring the whole tensor that it was cut from into the `.pt`, and safetensors refuses it.
        whole = {name: x if x.is_contiguous() and _owns(x) else x.clone() for name, x in state.items()}
        save_file(whole, folder / f"{part}.safetensors")
        try:
            torch.save(whole, folder / f"{part}.pt")
        except RuntimeError as error:
            # Torch reports a full disk as an error of its own kind.
            raise OSError(errno.EIO, f"{part}.pt: {str(error).splitlines()[0][:200]}") from error
    return {path.name: digest(path) for path in sorted(folder.iterdir())}


def _owns(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def _parity(folder: Path, parts: Mapping[str, State], config: ScanVitConfig, tensors: State) -> dict[str, object]:
    """Read the files back and compare bit for bit, the two networks under our names and the rest as it is.

    Raises:
        CheckpointError: something came back changed.
    """
    different: list[str] = []
    for suffix in ("safetensors", "pt"):
        back = {part: foreign.read_tensors(folder / f"{part}.{suffix}") for part in parts}
        ours = to_ours(back["backbone"], back.get("combiner"), config)
        different += [
            f"{name} ({suffix})" for name, x in ours.items() if name != _LEFT_OUT and not _same(x, tensors[name])
        ]
        rest = [part for part in parts if part not in ("backbone", "combiner")]
        different += [
            f"{part}: {name} ({suffix})"
            for part in rest
            for name, x in parts[part].items()
            if not _same(x, back[part][name])
        ]
    if different:
        raise CheckpointError(
            f"{len(different)} tensors came back changed, such as {different[0]}; nothing was written",
            hint="the disk or the memory of this machine is at fault: run again, elsewhere if need be",
        )
    return {
        "format": "spectre",
        "check": "every file read back and mapped to our names again: the same bits",
        "tensors": sum(len(state) for state in parts.values()),
        "different": 0,
        "left_out": [_LEFT_OUT],
    }


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
