"""Look inside a model at one scan: what its tokens tell apart, where its cls tokens look, what resembles a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from voxelstem.backbones.layers import grid_positions
from voxelstem.embedding import Embedding, Feeding
from voxelstem.errors import ConfigError
from voxelstem.geometry import voxel_to_patient
from voxelstem.model import Model, Reference
from voxelstem.progress import progress
from voxelstem.report import figures
from voxelstem.report.figures import INK, Picture, Plane
from voxelstem.report.words import describe_inside
from voxelstem.streaming import Laid
from voxelstem.study import Volume
from voxelstem.views import cells
from voxelstem.views.tile import stitch_tokens

Place = tuple[int, int, int]
PLANES: tuple[Plane, ...] = ("axial", "coronal")
MARK, WIDTH = "#39ff88", 3.1
"""Colour of the cross, and inches of a column."""
SOFT_TISSUE = {"low": -160.0, "high": 240.0}
"""HU; for the eye only. The model sees the window of its own spec."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inside:
    """What was drawn, and the numbers beside it as plain values that JSON can take."""

    picture: Picture
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One column of the picture: a number for every cell of a grid over the scan."""

    title: str
    below: str
    """What the numbers are; stands under their scale of colours."""
    values: Float[np.ndarray, "ti tj tk"]
    colours: str
    """Name of a colour map."""
    low: float
    high: float


def look_inside(
    volume: Volume,
    model: Model,
    *,
    at_ijk: Place | None = None,
    at_mm: tuple[float, float, float] | None = None,
) -> Inside:
    """Draw what a model makes of a scan, on the axial and the coronal slice through a chosen place.

    The columns: the scan; the three main directions of its patch tokens as colours; where the cls token of each block
    looks in its last layer (mean over the heads; 1 is an even look at all its patches); where the cls token of the
    scan level looks among the blocks, if that level is trained; and the cosine of every token with the token at the
    place.

    Args:
        volume: The scan.
        model: Weights whose backbone gives patch tokens.
        at_ijk: The place as a voxel of `volume.array`, counted from 0 along R, A and S.
        at_mm: The place in the patient instead, RAS+, mm. Without either it is the centre of the body.

    Raises:
        ConfigError: the place lies outside the scan, or the model does not take such a scan.
    """
    place = _place(volume, at_ijk, at_mm)
    seen = _watch(volume, model, place)
    tokens, grid = figures.body_colours(seen.embedding, volume)
    panels = [*_attention(seen, model), _similarity(seen.embedding, grid, volume, place)]
    facts = _facts(volume, model, seen.embedding, place, panels)
    return Inside(
        picture=Picture(
            png=figures.to_png(_draw(volume, place, (tokens, grid), panels, facts)),
            alt=f"Axial and coronal slice of a {volume.modality} scan through voxel {place}, beside its patch tokens "
            "in colour and, over the scan: " + ", ".join(panel.title for panel in panels).replace("\n", " "),
            caption="Equal colours mean similar tokens. Attention says where a cls token looked; it explains no "
            "embedding and tells nothing about disease.",
        ),
        facts=facts,
    )


def _place(volume: Volume, at_ijk: Place | None, at_mm: tuple[float, float, float] | None) -> Place:
    """The chosen voxel, checked; the centre of the body if none was chosen."""
    if at_ijk is not None and at_mm is not None:
        raise ConfigError("the place is given twice", hint="give it as a voxel or in mm")
    shape = np.array(volume.shape_ijk)
    if at_mm is not None:
        chosen = np.linalg.inv(volume.affine_ras)[:3] @ np.array([*at_mm, 1.0])
    elif at_ijk is not None:
        chosen = np.array(at_ijk, dtype=np.float64)
    else:
        body = np.argwhere(figures.solid(volume)[::4, ::4, ::2]) * (4, 4, 2)
        chosen = body.mean(axis=0) if len(body) else (shape - 1) / 2
    i, j, k = (int(number) for number in np.round(chosen))
    if not all(0 <= at < size for at, size in zip((i, j, k), shape, strict=True)):
        low, high = np.sort(voxel_to_patient(np.array([[0.0, 0.0, 0.0], shape - 1.0]), volume.affine_ras), axis=0)
        raise ConfigError(
            f"voxel {(i, j, k)} lies outside the scan, which has {volume.shape_ijk}",
            hint="count from 0 along right, front and head; in mm the scan runs from "
            f"{np.round(low).tolist()} to {np.round(high).tolist()}",
        )
    return i, j, k


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What one way through the network left behind."""

    embedding: Embedding
    described: Tensor
    """The blocks as they enter the scan level."""
    looks: Float[np.ndarray, "ti tj tk"] | None
    """How much its block's cls token looks at each token, 1 being an even look; NaN where that was not asked for."""


@torch.inference_mode()
def _watch(volume: Volume, model: Model, place: Place) -> _Seen:
    """Embed the scan in fp32; watch the attention of those blocks that the slices through `place` cut."""
    backbone, watched = model.backbone, getattr(model.backbone, "shows_attention", False)
    underway = model.begin(volume, Feeding(spec=model.spec, tokens=True))
    tiling = underway.laid.tiling
    cut = np.zeros(tiling.grid, dtype=bool)
    _, block_j, block_k = _block_at(place, volume, underway.laid)
    cut[:, :, block_k] = cut[:, block_j] = watched
    looks: list[Tensor] = []
    with progress("look inside", underway.count) as advance:
        for start, blocks in underway.blocks():
            for index, block in enumerate(blocks, start):
                cls, patches = backbone.encode_blocks(block[None])
                underway.take(index, cls[0].float(), patches[0].float())
                unknown = torch.full(patches.shape[1:2], torch.nan)
                shares = backbone.cls_attention(block[None])[0].float().mean(dim=0) if cut.flat[index] else unknown
                looks.append(shares * len(shares))
                advance()
    laid = stitch_tokens(torch.stack(looks)[..., None], tiling, backbone.patch_ijk)[..., 0].numpy()
    return _Seen(
        embedding=underway.finish(Reference(backbone=backbone)),
        described=underway.described,
        looks=laid if watched else None,
    )


def _block_at(place: Place, volume: Volume, laid: Laid) -> Place:
    """The block of the grid in which a voxel of the scan lies."""
    at = np.linalg.inv(laid.affine_ras) @ volume.affine_ras @ np.array([*place, 1.0])
    tiling = laid.tiling
    i, j, k = (
        int(np.clip((round(where) - origin) // block, 0, count - 1))
        for where, origin, block, count in zip(at[:3], tiling.origin_ijk, tiling.block_ijk, tiling.grid, strict=True)
    )
    return i, j, k


def _attention(seen: _Seen, model: Model) -> list[Panel]:
    if seen.looks is None:
        return []
    panels = [_panel("where each block's cls looks", "times an even look", seen.looks, "plasma", *_ends(seen.looks))]
    if model.use_scan_level and hasattr(model.backbone, "scan_encoder"):
        scan = _scan_looks(seen, model)
        panels.append(_panel("where the scan's cls looks", "times an even look", scan, "plasma", *_ends(scan)))
    return panels


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Ends of a scale of colours: a few tokens draw most of the attention, beside which all others would be black."""
    low, high = (float(end) for end in np.nanquantile(values, [0.02, 0.98]))
    return low, max(high, low + 1e-3)


@torch.inference_mode()
def _scan_looks(seen: _Seen, model: Model) -> Float[np.ndarray, "ti tj tk"]:
    """Attention of the scan's cls token among the blocks, on the grid of the tokens."""
    backbone, grid = model.backbone, seen.embedding.grid
    positions = grid_positions(grid)[None]
    shares = backbone.scan_encoder.cls_attention(backbone.scan_project(seen.described[None]), positions)[0].mean(dim=0)
    looks = (shares * len(shares)).reshape(grid).numpy()
    assert seen.looks is not None  # a scan level without a look of its blocks is not drawn
    for axis, blocks in enumerate(grid):
        looks = np.repeat(looks, seen.looks.shape[axis] // blocks, axis=axis)
    return looks


def _similarity(seen: Embedding, grid: cells.CellGrid, volume: Volume, place: Place) -> Panel:
    assert seen.tokens is not None  # they were asked for
    here = tuple(member[at] for member, at in zip(grid.members(), place, strict=True))
    tokens = seen.tokens.astype(np.float32)
    unit = tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)
    cosines = unit @ unit[here]
    # The scale of colours spans what lies in the body; padding and air would flatten it.
    inside = cells.tally(figures.solid(volume).astype(np.int8), grid, 2)[..., 1] > 0
    low = float(np.quantile(cosines[inside] if inside.any() else cosines, 0.02))
    return _panel("similar to the token at +", "cosine", cosines, "plasma", min(low, 0.999), 1.0)


def _panel(title: str, below: str, values: np.ndarray, colours: str, low: float, high: float) -> Panel:
    return Panel(title=title, below=below, values=values, colours=colours, low=low, high=high)


def _facts(volume: Volume, model: Model, seen: Embedding, place: Place, panels: Sequence[Panel]) -> dict[str, Any]:
    spec, card, how = model.spec, model.card, seen.facts
    assert how is not None  # it was made a moment ago
    mm = voxel_to_patient(np.array([place], dtype=np.float64), volume.affine_ras)[0]
    return {
        "kind": "inside",
        "weights": {
            "preset": spec.preset,
            "licence": card.licence,
            "trained": list(card.trained),
            "sha256": card.sha256,
        },
        "at_ijk": list(place),
        "at_mm": [round(float(edge), 1) for edge in mm],
        "value": float(volume.array[0][place]),
        "unit": "HU" if volume.modality == "CT" else "of intensity",
        "scan_shape_ijk": list(volume.shape_ijk),
        "scan_spacing_mm": [round(edge, 3) for edge in volume.spacing_mm],
        "fed_spacing_mm": [round(edge, 3) for edge in how.spacing_mm],
        "seen_mm": [round(edge, 1) for edge in how.seen_mm],
        "window": [spec.low_hu, spec.high_hu],
        "normalisation": spec.normalisation,
        "block_ijk": list(spec.block_ijk),
        "grid": list(seen.grid),
        "coverage": seen.coverage,
        "effective_rank": how.effective_rank,
        "hu": how.hu,
        "warnings": list(how.warnings),
        "panels": {panel.title: {"low": round(panel.low, 4), "high": round(panel.high, 4)} for panel in panels},
    }


def _draw(
    volume: Volume,
    place: Place,
    coloured: tuple[np.ndarray, cells.CellGrid],
    panels: Sequence[Panel],
    facts: dict[str, Any],
) -> Figure:
    """One column for the scan, one for the tokens and one for each panel; a row for each plane; then scales, facts."""
    tokens, grid = coloured
    columns, text = 2 + len(panels), describe_inside(facts)
    heights = [WIDTH * _proportion(volume, plane) for plane in PLANES] + [0.5, 0.18 * len(text)]
    figure = figures.blank(WIDTH * columns, sum(heights) + 0.5)
    rows = figure.add_gridspec(4, columns, height_ratios=heights)
    for row, plane in enumerate(PLANES):
        index = place[2 if plane == "axial" else 1]
        grey = figures.show_scan(volume, plane, index, **SOFT_TISSUE)
        scan = np.repeat(grey[..., None], 3, axis=2)
        painted = figures.show_tokens(tokens, grid, plane, index)
        shown = [("scan", scan), ("tokens: three main directions", 0.3 * scan + 0.7 * painted)]
        for panel in panels:
            scaled = Normalize(panel.low, panel.high, clip=True)(figures.show_tokens(panel.values, grid, plane, index))
            shown.append((panel.title, 0.4 * scan + 0.6 * colormaps[panel.colours](scaled)[..., :3]))
        for column, (title, picture) in enumerate(shown):
            axes = figure.add_subplot(rows[row, column])
            figures.slice_axes(axes, picture, volume, plane, title=title if row == 0 else "")
            _mark(axes, volume, plane, place)
    for column, panel in enumerate(panels, start=2):
        _scale(figure, figure.add_subplot(rows[2, column]), panel)
    side = figure.add_subplot(rows[3, :])
    side.axis("off")
    side.text(0.005, 1.0, "\n".join(text), fontsize=9, color=INK, va="top", transform=side.transAxes)
    return figure


def _proportion(volume: Volume, plane: Plane) -> float:
    """Height of a slice by its width, in millimetres."""
    up = 1 if plane == "axial" else 2
    size, edge = volume.shape_ijk, volume.spacing_mm
    return size[up] * edge[up] / (size[0] * edge[0])


def _mark(axes: Any, volume: Volume, plane: Plane, place: Place) -> None:
    """A cross at the chosen place, where `figures.show_slice` puts it: columns run to the left, rows down."""
    up = 1 if plane == "axial" else 2
    x, y = (volume.shape_ijk[axis] - 1 - place[axis] for axis in (0, up))
    rim = [withStroke(linewidth=3, foreground="black")]
    axes.plot([x], [y], "+", color=MARK, ms=9, mew=1.6, path_effects=rim)


def _scale(figure: Figure, axes: Any, panel: Panel) -> None:
    """The scale of colours under a column, in a box of its own so that all slices stay of one size."""
    axes.axis("off")
    mapped = ScalarMappable(Normalize(panel.low, panel.high), panel.colours)
    bar = figure.colorbar(mapped, cax=axes.inset_axes((0.1, 0.7, 0.8, 0.3)), orientation="horizontal")
    bar.set_label(panel.below, fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)
