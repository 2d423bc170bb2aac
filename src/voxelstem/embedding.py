"""What a model says of one scan, and how its blocks' tokens become that."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from voxelstem.backbones.pools import POOLS, Pool, mean
from voxelstem.errors import ConfigError, IngestError
from voxelstem.metrics import effective_rank
from voxelstem.sources.gates import FEWEST_VOXELS, check_hu
from voxelstem.streaming import Laid, Scan, columns
from voxelstem.study import InputSpec, Volume
from voxelstem.views.tile import patch_share, stitch_tokens

THICK = 2.0
"""How many times as far apart as the weights saw them slices may lie before a warning."""
FITS, UNJUDGED = "fits", "not-judged"
"""What `Facts.hu` says where the values of a CT are Hounsfield units, and where too few or others were given."""
_AXES = ("right-left", "front-back", "head-foot")


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What was seen of a scan, and how: for the manifest, and for the person who trusts the embedding."""

    seen_mm: tuple[float, float, float]
    """Extent of what the network saw of the scan, along R, A and S."""
    spacing_mm: tuple[float, float, float]
    """Spacing at which it was fed."""
    hu: str
    """`fits`, `not-judged`, or the code by which `sources.gates.check_hu` doubts the values."""
    effective_rank: float | None
    """Of the rows of `blocks` (Roy and Vetterli 2007); None for a single block."""
    compute: str
    """Which way through the network, see `backbones.compute`."""
    precision: str
    relative_error: float
    """max|a - b| / max|b| of that way against the fp32 reference, as measured on one block."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedding:
    """What a model says of one scan. All float32 on the CPU."""

    scan: Float[np.ndarray, " scan_dim"]
    """concat(cls, mean of block tokens): of the scan-level transformer where it was trained, else of the blocks."""
    blocks: Float[np.ndarray, "n block_dim"]
    """One row for each block, in grid order (C-order, k fastest)."""
    grid: tuple[int, int, int]
    coverage: float
    """Share of the scan's voxels that the network saw. What `fit` cuts off is not above the window, and not seen."""
    tokens: Float[np.ndarray, "ti tj tk token_dim"] | None = None
    """One vector for each patch over the blocks, when asked for."""
    tokens_affine_ras: Float[np.ndarray, "4 4"] | None = None
    """Token index (its centre) to millimetres in the patient."""
    facts: Facts | None = None
    """How it was made; None where it was read from a file that does not say."""


class Computing(Protocol):
    """A way through the network: one that `backbones.compute` chose, or `model.Reference`."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def precision(self) -> str:
        """`fp32` or `bf16`."""
        ...

    @property
    def relative_error(self) -> float:
        """max|a - b| / max|b| against the fp32 reference."""
        ...

    def encode_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Cls and patch tokens of each block, in float32."""
        ...


class Fed(Protocol):
    """What is asked of a model here; `model.Model` is one."""

    @property
    def backbone(self) -> Any:
        """The network."""
        ...

    @property
    def use_scan_level(self) -> bool:
        """Whether a scan's embedding comes from the scan level."""
        ...

    @property
    def spec(self) -> InputSpec:
        """What the model was trained to see."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Feeding:
    """How scans are fed to a model, and what is kept of them."""

    spec: InputSpec
    like_spectre: bool = False
    """Cut the scan to whole blocks about its middle, as `spectre-fm` does, instead of padding its end."""
    tokens: bool = False
    pool: Pool = "cls-mean"

    def __post_init__(self) -> None:
        """Guard the pool and the way of feeding.

        Raises:
            ConfigError: no such pool, or whole blocks about the middle of what fits one block or has a frame.
        """
        if self.like_spectre and self.spec.resampling == "fit":
            raise ConfigError(
                "like_spectre has no meaning here: these weights take each scan as one block", hint="leave it out"
            )
        if self.like_spectre and self.spec.frame_ijk is not None:
            raise ConfigError(
                "like_spectre has no meaning here: these weights saw a frame about the body", hint="leave it out"
            )
        if self.pool not in POOLS:
            raise ConfigError(f"pool must be one of {', '.join(POOLS)}, got '{self.pool}'")


class Underway:
    """A scan between its first block and its embedding: gives its blocks, and takes what the network makes of them."""

    def __init__(self, scan: Scan, laid: Laid, model: Fed, feeding: Feeding, *, hu: str) -> None:
        """Lay out room for what will come; `hu` is what is known of its values."""
        self.laid, self.feeding, self.model, self.hu = laid, feeding, model, hu
        self.shape_ijk, self.spacing_mm = scan.shape_ijk, scan.spacing_mm
        self._scan: Scan | None = scan
        tiling = laid.tiling
        self.count = self.left = tiling.grid[0] * tiling.grid[1] * tiling.grid[2]
        # Like the original, which averages over its padding too; and in a frame so does training.
        whole = feeding.like_spectre or feeding.spec.frame_ijk is not None
        self.share = None if whole else patch_share(tiling, model.backbone.patch_ijk)
        self.described = torch.empty(self.count, 2 * model.backbone.dim)
        self.tokens: list[Tensor | None] = [None] * self.count if feeding.tokens else []

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "n channel i j k"]]]:
        """Its blocks, several at a time, each time with the number of the first. Once: then its voxels are let go.

        Raises:
            IngestError: a value is not finite.
            StoreError: it is read from a store, and its file is damaged.
        """
        scan, self._scan = self._scan, None
        assert scan is not None
        start = 0
        for found in columns(scan, self.laid, self.feeding.spec):
            yield start, found
            start += len(found)

    def take(self, index: int, cls: Float[Tensor, " dim"], patches: Float[Tensor, "patch dim"]) -> None:
        """Take the tokens of one block; see `packing.Taker`."""
        share = None if self.share is None else self.share[index : index + 1]
        self.described[index] = torch.cat([cls, mean(patches[None], share)[0]])
        if self.feeding.tokens:
            self.tokens[index] = patches.clone()
        self.left -= 1

    @torch.inference_mode()
    def finish(self, computing: Computing) -> Embedding:
        """Pool what came; all blocks must have been taken."""
        assert self.left == 0
        tiling = self.laid.tiling
        rows, scan_row = self._pool()
        tokens, affine = None, None
        if self.feeding.tokens:
            patches = torch.stack([patches for patches in self.tokens if patches is not None])
            tokens = stitch_tokens(patches, tiling, self.model.backbone.patch_ijk).numpy()
            affine = self._tokens_affine()
        return Embedding(
            scan=scan_row.numpy(),
            blocks=rows.numpy(),
            grid=tiling.grid,
            coverage=self.coverage,
            tokens=tokens,
            tokens_affine_ras=affine,
            facts=self._facts(computing, rows),
        )

    def _pool(self) -> tuple[Tensor, Tensor]:
        """The blocks' rows and the scan's vector."""
        dim, kind = self.model.backbone.dim, self.feeding.pool
        if self.model.use_scan_level:
            whole, found = self.model.backbone.look_at_scan(self.described[None], self.laid.tiling.grid)
            rows, parts = found[0].float(), {"cls": whole[0].float(), "mean": found[0].float().mean(dim=0)}
            return rows, torch.cat([parts[name] for name in kind.split("-")])
        rows = {"cls-mean": self.described, "cls": self.described[:, :dim], "mean": self.described[:, dim:]}[kind]
        seen = torch.ones(self.count) if self.share is None else self.share.mean(dim=1)
        return rows, (rows * (seen / seen.sum())[:, None]).sum(dim=0)

    @property
    def coverage(self) -> float:
        """Share of the scan's voxels that the network sees."""
        return self._within() * self.laid.share

    def _spans(self) -> list[tuple[int, int]]:
        """Of each axis, how many voxels of the resampled scan the blocks see, and how many there are."""
        tiling = self.laid.tiling
        return [
            (min(origin + grid * block, size) - max(origin, 0), size)
            for origin, grid, block, size in zip(
                tiling.origin_ijk, tiling.grid, tiling.block_ijk, tiling.shape_ijk, strict=True
            )
        ]

    def _within(self) -> float:
        """Share of the resampled scan that the blocks see."""
        return float(np.prod([seen / size for seen, size in self._spans()]))

    def _facts(self, computing: Computing, rows: Tensor) -> Facts:
        spacing = np.linalg.norm(self.laid.affine_ras[:3, :3], axis=0)
        lengths = np.array(self.shape_ijk) * np.array(self.spacing_mm)
        seen = np.minimum([seen for seen, _ in self._spans()] * spacing, lengths)
        return Facts(
            seen_mm=(float(seen[0]), float(seen[1]), float(seen[2])),
            spacing_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
            hu=self.hu,
            effective_rank=effective_rank(rows.numpy()) if len(rows) > 1 else None,
            compute=computing.name,
            precision=computing.precision,
            relative_error=computing.relative_error,
            warnings=tuple(self._warnings(spacing)),
        )

    def _warnings(self, fed_mm: Float[np.ndarray, " 3"]) -> Iterator[str]:
        taught, tiling = self.model.spec, self.laid.tiling
        fits = self.feeding.spec.resampling == "fit"
        for name, have, want in zip(_AXES, self.spacing_mm, fed_mm if fits else taught.spacing_mm, strict=True):
            if have > THICK * want:
                met = f"stretched to {want:.3g} mm" if fits else f"the weights saw {want:g} mm"
                yield f"thick: voxels are {have:.3g} mm apart {name}, {met}"
        # A tenth: a grid that was kept because it fits nearly is no other spacing.
        if taught.resampling == "spacing" and (np.abs(fed_mm / taught.spacing_mm - 1) > 0.1).any():  # noqa: PLR2004
            yield f"spacing: fed at {_edges(fed_mm)} mm, the weights saw {_edges(taught.spacing_mm)} mm"
        if taught.resampling == "fit" and not fits:
            yield f"spacing: fed at {_edges(fed_mm)} mm, the weights saw each scan fit to one block"
        for name, size, block in zip(_AXES, tiling.shape_ijk, tiling.block_ijk, strict=True):
            if size < block:
                yield f"small: {size} of the {block} voxels of a block {name} are scan, the rest is padding"
        if (within := self._within()) < 1:
            yield f"cut: the centre crop leaves {1 - within:.1%} of the scan out"
        yield from self._frame_warnings()
        if self.laid.doubt:
            yield self.laid.doubt
        if self.hu not in (FITS, UNJUDGED):
            yield f"hu: the values are not Hounsfield units ({self.hu})"

    def _frame_warnings(self) -> Iterator[str]:
        taught, fed = self.model.spec.frame_ijk, self.feeding.spec.frame_ijk
        if self.laid.cut > 0:
            yield f"cut: the frame about the body leaves {self.laid.cut:.1%} of its box out"
        if taught is not None and fed is None:
            yield f"frame: fed in whole, the weights saw a box of {taught} voxels about the body"

    def _tokens_affine(self) -> Float[np.ndarray, "4 4"]:
        grid_ras = self.laid.affine_ras
        affine = grid_ras.copy()
        for axis, (patch, origin) in enumerate(
            zip(self.model.backbone.patch_ijk, self.laid.tiling.origin_ijk, strict=True)
        ):
            affine[:3, axis] = grid_ras[:3, axis] * patch
            affine[:3, 3] += grid_ras[:3, axis] * ((patch - 1) / 2 + origin)
        return affine


def pack(embedding: Embedding) -> bytes:
    """The .npz form of an embedding."""
    arrays: dict[str, Any] = {
        "scan": embedding.scan,
        "blocks": embedding.blocks,
        "grid": np.array(embedding.grid),
        "coverage": np.array(embedding.coverage),
    }
    if embedding.tokens is not None and embedding.tokens_affine_ras is not None:
        arrays |= {"tokens": embedding.tokens, "tokens_affine_ras": embedding.tokens_affine_ras}
    if embedding.facts is not None:
        arrays["facts"] = np.array(json.dumps(dataclasses.asdict(embedding.facts)))
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    return packed.getvalue()


def read(path: Path) -> Embedding | None:
    """An embedding written before; None where there is none or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            grid = arrays["grid"]
            return Embedding(
                scan=arrays["scan"],
                blocks=arrays["blocks"],
                grid=(int(grid[0]), int(grid[1]), int(grid[2])),
                coverage=float(arrays["coverage"]),
                tokens=arrays.get("tokens"),
                tokens_affine_ras=arrays.get("tokens_affine_ras"),
                facts=_facts(str(arrays["facts"])) if "facts" in arrays else None,
            )
    # One flipped bit in a zip's headers can end in any of these.
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, EOFError, RuntimeError):
        return None


def _facts(text: str) -> Facts:
    """Undo what `pack` does.

    Raises:
        ValueError: these are no facts.
    """
    try:
        found: dict[str, Any] = json.loads(text)
        for name in ("seen_mm", "spacing_mm", "warnings"):
            found[name] = tuple(found[name])
        return Facts(**found)
    except (TypeError, KeyError) as error:
        raise ValueError("no facts of an embedding") from error


def judge(volume: Volume) -> str:
    """What the gate of Hounsfield units says of a volume; it is recorded here, and refused where files are read."""
    if volume.modality != "CT" or volume.array[0].size < FEWEST_VOXELS:
        return UNJUDGED
    try:
        check_hu(volume.array[0], airless=True)
    except IngestError as error:
        return error.code
    return FITS


def _edges(spacing_mm: Any) -> str:
    return " x ".join(f"{edge:.3g}" for edge in spacing_mm)
