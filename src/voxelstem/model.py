"""`load`: a weights folder -> Model. The card's InputSpec is obeyed here, whoever calls."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from voxelstem.backbones import BACKBONES
from voxelstem.card import Card, read_card, read_tensors
from voxelstem.config import overlay
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.resampling import grid_affine, grid_coordinates, resampled_count
from voxelstem.study import InputSpec, Study, Volume
from voxelstem.views import resample
from voxelstem.views.intensity import window
from voxelstem.views.tile import Tiling, seen, stitch_tokens, tile


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedding:
    """What a model says of one scan. All float32 on the CPU."""

    scan: Float[np.ndarray, " scan_dim"]
    """concat(cls, mean of block tokens): of the scan-level transformer where it was trained, else of the blocks."""
    blocks: Float[np.ndarray, "n block_dim"]
    """One row for each block, in grid order (C-order, k fastest)."""
    grid: tuple[int, int, int]
    coverage: float
    """Share of the scan's voxels that the network saw."""
    tokens: Float[np.ndarray, "ti tj tk token_dim"] | None = None
    """One vector for each patch over the padded scan, when asked for."""
    tokens_affine_ras: Float[np.ndarray, "4 4"] | None = None
    """Token index (its centre) to millimetres in the patient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A backbone in evaluation mode with the card that says how to feed it."""

    backbone: Any
    card: Card
    use_scan_level: bool
    """Whether a scan's embedding comes from the scan level: where that was trained, and in the `scratch` of such."""
    blocks_per_pass: int = 8

    @property
    def spec(self) -> InputSpec:
        """What the model was trained to see."""
        return self.card.spec

    def scratch(self, *, seed: int) -> Model:
        """The same architecture and spec, untrained: the baseline that keeps everyone honest."""
        untrained = make_model(dataclasses.replace(self.card, trained=(), sha256=f"scratch-{seed}"), seed=seed)
        # By the same way through the network, or the comparison would be one of two poolings as well.
        return dataclasses.replace(untrained, use_scan_level=self.use_scan_level)

    @torch.inference_mode()
    def embed(self, scan: Study | Volume, *, precision: str = "fp32", tokens: bool = False) -> Embedding:
        """Embed a whole scan: resample, window, tile, encode. Nothing of the scan is cut away.

        Raises:
            ConfigError: wrong modality or precision, or a study of several volumes.
        """
        volume = self._only_volume(scan)
        if precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision must be fp32 or bf16, got '{precision}'")
        grid_ras, array = self._at_spacing(volume)
        tiling = Tiling(shape_ijk=(array.shape[1], array.shape[2], array.shape[3]), block_ijk=self.spec.block_ijk)
        blocks = tile(window(array, self.spec), tiling, fill=0.0)
        real = seen(tiling)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            cls, patches = self._encode(blocks)
        share = real.float().mean(dim=(1, 2, 3))
        token_map = stitch_tokens(patches, tiling, self.backbone.patch_ijk).numpy() if tokens else None
        block_rows, scan_row = self._pool(cls, patches, share, tiling.grid)
        return Embedding(
            scan=scan_row.numpy(),
            blocks=block_rows.numpy(),
            grid=tiling.grid,
            coverage=float(real.sum()) / float(np.prod(tiling.shape_ijk)),
            tokens=token_map,
            tokens_affine_ras=self._tokens_affine(grid_ras, tiling) if tokens else None,
        )

    def _only_volume(self, scan: Study | Volume) -> Volume:
        if isinstance(scan, Study):
            if len(scan.volumes) != 1:
                raise ConfigError(f"the study has {len(scan.volumes)} volumes", hint="embed each of study.volumes")
            scan = scan.volumes[0]
        if scan.modality != self.spec.modality:
            raise ConfigError(
                f"these weights were trained on {self.spec.modality}, the scan is {scan.modality}",
                hint=f"choose weights for {scan.modality}, or a {self.spec.modality} scan",
            )
        channels = self.backbone.config.channels
        if scan.array.shape[0] != channels:
            raise ConfigError(
                f"these weights take {channels} channel(s), the scan has {scan.array.shape[0]}",
                hint="embed each channel by itself, or choose other weights",
            )
        return scan

    def _at_spacing(self, volume: Volume) -> tuple[np.ndarray, Tensor]:
        """The scan at the spec's spacing and the affine of that grid; both begin at the same low corner."""
        steps = [want / have for have, want in zip(volume.spacing_mm, self.spec.spacing_mm, strict=True)]
        coordinates = [
            grid_coordinates(resampled_count(size, have, want), start=0.0, step=step)
            for size, have, want, step in zip(
                volume.shape_ijk, volume.spacing_mm, self.spec.spacing_mm, steps, strict=True
            )
        ]
        step_ijk = (steps[0], steps[1], steps[2])
        array = torch.from_numpy(np.ascontiguousarray(volume.array, dtype=np.float32))
        picked = (coordinates[0], coordinates[1], coordinates[2])
        sampled = resample.sample(array, picked, step_ijk=step_ijk, outside=self.spec.low_hu)
        return grid_affine(volume.affine_ras, step_ijk), sampled

    def _tokens_affine(self, grid_ras: np.ndarray, tiling: Tiling) -> np.ndarray:
        affine = grid_ras.copy()
        for axis, (patch, lead) in enumerate(zip(self.backbone.patch_ijk, tiling.lead_ijk, strict=True)):
            affine[:3, axis] = grid_ras[:3, axis] * patch
            affine[:3, 3] += grid_ras[:3, axis] * ((patch - 1) / 2 - lead)
        return affine

    def _encode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        cls, patches = [], []
        for part in blocks.split(self.blocks_per_pass):
            part_cls, part_patches = self.backbone.encode_blocks(part)
            cls.append(part_cls.float())
            patches.append(part_patches.float())
        return torch.cat(cls), torch.cat(patches)

    def _pool(self, cls: Tensor, patches: Tensor, share: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        if self.use_scan_level:
            whole, rows = self.backbone.look_at_scan(cls[None], patches[None], grid)
            rows = rows[0].float()
            return rows, torch.cat([whole[0].float(), rows.mean(dim=0)])
        rows = torch.cat([cls, patches.mean(dim=1)], dim=1)
        return rows, (rows * (share / share.sum())[:, None]).sum(dim=0)


def make_model(card: Card, *, seed: int) -> Model:
    """An untrained model of the card's architecture; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = _build(card)
    use = "scan" in card.trained and backbone.has_scan_level
    return Model(backbone=backbone.eval().requires_grad_(False), card=card, use_scan_level=use)


def load(path: str | Path) -> Model:
    """Load the weights folder `path` and check its digest.

    Raises:
        CheckpointError: no weights there, they are damaged, or config.json describes other ones.
    """
    folder = Path(path)
    card = read_card(folder)
    tensors = read_tensors(folder, card)
    # First without memory: a config.json must not make us allocate more than the file beside it holds.
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in _build(card).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise CheckpointError(
            f"{folder.name}/model.safetensors does not fit the architecture in its config.json: {len(odd)} tensors "
            f"differ, such as {odd[0]} (wanted {wanted.get(odd[0])}, found {found.get(odd[0])})",
            hint="copy the whole folder again: the two files belong together",
        )
    model = make_model(card, seed=0)
    model.backbone.load_state_dict(tensors)
    return model


def _build(card: Card) -> Any:
    kind = BACKBONES[str(card.architecture["name"])]
    return kind(overlay(kind.Config(), card.architecture))
