"""Pictures for the report, as PNG bytes with a text that says what they show.

Slices are shown as radiologists do: the patient's right on the left, front or head up, true proportions.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Shaped
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from voxelstem.metrics import Score
from voxelstem.protocols import Features
from voxelstem.study import LabelMap, Volume
from voxelstem.views import cells

Plane = Literal["axial", "coronal"]
INK, GRID, ACCENT = "#1d2733", "#d5dbe3", "#0b62a4"
ORDER = ("#0b62a4", "#d5690b", "#2b8a57", "#8a4fa3", "#b8324a", "#6b7280")
PANELS = {
    "Loss": ("loss",),
    "Online probe": ("probe",),
    "Collapse? (effective rank)": ("effective_rank",),
    "Collapse? (spread, entropy: 0 is collapsed)": ("spread", "entropy"),
    "Collapse? (the teacher's entropies)": ("teacher_entropy", "prototype_entropy"),
    "Drift of the patches' cosines": ("gram_drift",),
    "Gradient norm": ("grad_norm",),
    "Learning rate": ("lr",),
    "Waiting for data (share)": ("data_wait_share",),
}
"""What stands together on the curves of a run: these numbers, and those whose names go on after a `/`."""
LOGARITHMIC = ("Gradient norm",)
EDGES: dict[Plane, tuple[str, str, str, str]] = {"axial": ("R", "L", "A", "P"), "coronal": ("R", "L", "S", "I")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A figure for the page. `alt` tells those who cannot see it what it shows."""

    png: bytes
    alt: str
    caption: str


def show_slice(array: Shaped[np.ndarray, "i j k *colour"], plane: Plane, index: int) -> np.ndarray:
    """Cut a slice out of a RAS+ array and turn it for the eye: rows run down, columns to the patient's left."""
    return _turn(array[:, :, index] if plane == "axial" else array[:, index])


def show_scan(volume: Volume, plane: Plane, index: int, *, low: float, high: float) -> Float[np.ndarray, "down across"]:
    """A slice of the first channel as grey values in [0, 1]; scans without a unit use their own range instead."""
    array = volume.array[0]
    if volume.modality != "CT":
        low, high = (float(bound) for bound in np.quantile(array[::4, ::4, ::2], [0.01, 0.99]))
    return np.clip((show_slice(array, plane, index) - low) / max(high - low, 1e-6), 0, 1)


def show_tokens(
    values: Shaped[np.ndarray, "ti tj tk *colour"], grid: cells.CellGrid, plane: Plane, index: int
) -> np.ndarray:
    """A slice of the scan in which every voxel has the value of its token."""
    in_i, in_j, in_k = grid.members()
    if plane == "axial":
        return _turn(values[:, :, in_k[index]][np.ix_(in_i, in_j)])
    return _turn(values[:, in_j[index]][np.ix_(in_i, in_k)])


def training_curves(records: Sequence[Mapping[str, float]]) -> Picture:
    """Loss, signs of collapse and the online probe of one run, from the lines of its journal."""
    names = list(dict.fromkeys(name for record in records for name in record if name != "step"))
    panels = {
        title: [name for name in names if name in beginnings or name.startswith(tuple(f"{b}/" for b in beginnings))]
        for title, beginnings in PANELS.items()
    }
    shown = {title: lines for title, lines in panels.items() if lines}
    rows = -(-len(shown) // 2)
    figure = blank(8.0, 2.4 * max(rows, 1))
    for place, (title, lines) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(rows, min(len(shown), 2), place)
        _plain_axes(axes, title, "step")
        for line, colour in zip(lines, ORDER * len(lines), strict=False):
            points = [(record["step"], record[line]) for record in records if line in record]
            steps, values = zip(*points, strict=True)
            mark = "o" if len(points) <= 30 else None  # noqa: PLR2004 - single looks deserve a dot
            axes.plot(steps, values, color=colour, lw=1.4, marker=mark, ms=3, label=line.removeprefix("probe/"))
        if title in LOGARITHMIC and any(record.get(line, 0.0) > 0 for record in records for line in lines):
            axes.set_yscale("log")
        if len(lines) > 1 or title == "Online probe":
            axes.legend(fontsize=7, frameon=False)
    first_last = [f"{line} {_ends(records, line)}" for lines in shown.values() for line in lines]
    return Picture(
        png=to_png(figure),
        alt="Curves over training steps: " + "; ".join(first_last),
        caption="A falling loss alone proves nothing. A rank or entropy that drops towards its floor means collapse; "
        "the probe, which never trains the network, shows whether the tokens became more useful.",
    )


def token_pca(volume: Volume, named: Mapping[str, Features], *, low: float, high: float) -> Picture:
    """The three main directions of each model's patch tokens as red, green and blue, beside the scan."""
    planes: tuple[Plane, ...] = ("axial", "coronal")
    figure = blank(2.7 * (1 + len(named)), 5.4)
    grey = {plane: show_scan(volume, plane, _middle(volume, plane), low=low, high=high) for plane in planes}
    for row, plane in enumerate(planes):
        axes = figure.add_subplot(2, 1 + len(named), row * (1 + len(named)) + 1)
        slice_axes(axes, grey[plane], volume, plane, title="scan" if row == 0 else "")
    for column, (name, features) in enumerate(named.items(), start=2):
        colours, grid = body_colours(features, volume)
        for row, plane in enumerate(planes):
            picture = 0.25 * grey[plane][..., None] + 0.75 * show_tokens(colours, grid, plane, _middle(volume, plane))
            axes = figure.add_subplot(2, 1 + len(named), row * (1 + len(named)) + column)
            slice_axes(axes, picture, volume, plane, title=name if row == 0 else "")
    return Picture(
        png=to_png(figure),
        alt=f"Axial and coronal slice of a {volume.modality} scan beside its patch tokens in colour, for "
        + ", ".join(named),
        caption="Equal colours mean similar tokens (first three principal components of this scan's body). "
        "Organs in colours of their own show what the tokens tell apart; colours differ between models by chance.",
    )


def neighbours(
    volumes: Sequence[Volume],
    embeddings: Float[np.ndarray, "scan dim"],
    captions: Sequence[str],
    *,
    queries: Sequence[int],
    count: int = 3,
    low: float = -160.0,
    high: float = 240.0,
) -> Picture:
    """For each query scan its nearest scans by cosine of the scan embedding, as coronal slices.

    All torsos lie in nearly one direction; the mean over the scans is taken off so that cosines tell them apart.
    """
    embeddings = embeddings - embeddings.mean(axis=0)
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    count = min(count, len(volumes) - 1)
    figure = blank(2.3 * (1 + count), 2.6 * len(queries))
    told: list[str] = []
    for row, query in enumerate(queries):
        cosines = unit @ unit[query]
        ranked = [int(other) for other in np.argsort(-cosines, kind="stable") if other != query][:count]
        told.append(f"{captions[query]}: {', '.join(f'{captions[o]} (cosine {cosines[o]:.2f})' for o in ranked)}")
        for column, scan in enumerate([query, *ranked]):
            axes = figure.add_subplot(len(queries), 1 + count, row * (1 + count) + column + 1)
            middle = _middle(volumes[scan], "coronal")
            image = show_scan(volumes[scan], "coronal", middle, low=low, high=high)
            title = f"query: {captions[scan]}" if column == 0 else f"{captions[scan]}\ncosine {cosines[scan]:.2f}"
            slice_axes(axes, image, volumes[scan], "coronal", title=title)
    return Picture(
        png=to_png(figure),
        alt="Nearest scans by embedding. " + "; ".join(told),
        caption="Left the query, then its nearest scans by cosine similarity of the whole-scan embedding, "
        "after the mean over these scans was taken off.",
    )


def segmentation(
    volume: Volume, truth: LabelMap, predicted: LabelMap, dice: Mapping[str, float], *, low: float, high: float
) -> Picture:
    """Truth and prediction over the scan, where most is labelled, with the Dice of every organ."""
    names = sorted(set(truth.classes.values()) | set(predicted.classes.values()))
    colours = {name: colormaps["tab20"](index % 20)[:3] for index, name in enumerate(names)}
    figure = blank(8.0, 5.6)
    planes: tuple[Plane, ...] = ("axial", "coronal")
    for row, plane in enumerate(planes):
        filled = (truth.array > 0).sum(axis=(0, 1) if plane == "axial" else (0, 2))
        index = int(filled.argmax())
        grey = show_scan(volume, plane, index, low=low, high=high)
        for column, (title, labels) in enumerate((("truth", truth), ("prediction", predicted)), start=1):
            picture = np.repeat(grey[..., None], 3, axis=2)
            cut = show_slice(labels.array, plane, index)
            for value, name in labels.classes.items():
                here = cut == value
                picture[here] = 0.45 * picture[here] + 0.55 * np.array(colours[name])
            axes = figure.add_subplot(2, 3, row * 3 + column)
            slice_axes(axes, picture, volume, plane, title=title if row == 0 else "")
    side = figure.add_subplot(1, 3, 3)
    side.axis("off")
    patches = [
        Patch(color=colours[name], label=f"{name}  {dice[name]:.2f}" if name in dice else f"{name}  –")
        for name in names
    ]
    side.legend(
        handles=patches, title="Dice on this scan", loc="center left", frameon=False, fontsize=8, title_fontsize=9
    )
    told = ", ".join(f"{name} {value:.2f}" for name, value in sorted(dice.items()))
    return Picture(
        png=to_png(figure),
        alt=f"Organ labels over a scan, truth beside prediction. Dice: {told or 'none'}",
        caption="Truth beside prediction on a held-out scan, on the scan's own grid; – where the scan does not hold "
        "the organ.",
    )


def comparison(scores: Sequence[Score], metric: str) -> Picture:
    """Every contestant's figure with its interval, one row each, grouped by the number of labelled subjects."""
    chosen = [score for score in scores if score.metric == metric]
    names = list(dict.fromkeys(score.name for score in chosen))
    groups = list(dict.fromkeys(score.labelled for score in chosen))
    figure = blank(7.0, 0.7 + 0.27 * len(chosen) + 0.25 * len(groups))
    axes = figure.add_subplot(1, 1, 1)
    _plain_axes(axes, "", metric.replace("_", " "))
    height, ticks, labels = 0.0, [], []
    for group in groups:
        for score in (score for score in chosen if score.labelled == group):
            colour = ORDER[names.index(score.name) % len(ORDER)]
            value = score.value
            if value.low is not None and value.high is not None:
                axes.plot([value.low, value.high], [height, height], color=colour, lw=2.2, alpha=0.55)
            axes.plot([value.estimate], [height], "o", color=colour, ms=6)
            ticks.append(height)
            labels.append(f"{score.name} · {group} labelled")
            height += 1.0
        height += 0.6
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x", color=GRID, lw=0.6)
    told = "; ".join(f"{score.name} with {score.labelled} labelled: {score.value}" for score in chosen)
    return Picture(
        png=to_png(figure),
        alt=f"{metric}: {told}",
        caption="Dots are figures on held-out subjects, bars their 95 % intervals over subjects. Whether one "
        "contestant beats another is read from the paired differences in the table, not from overlapping bars.",
    )


def blank(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure's bytes, without the program's version in them, so that equal pictures are equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _plain_axes(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.set_xlabel(below, fontsize=8)
    axes.tick_params(which="both", labelsize=7, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def slice_axes(axes: Any, image: np.ndarray, volume: Volume, plane: Plane, *, title: str) -> None:
    """Show a slice in millimetres with the letters of the patient's sides."""
    across, up = volume.spacing_mm[0], volume.spacing_mm[1 if plane == "axial" else 2]
    axes.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1, aspect=up / across, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=8, color=INK)
    for letter, (x, y) in zip(EDGES[plane], ((0.03, 0.5), (0.97, 0.5), (0.5, 0.96), (0.5, 0.04)), strict=True):
        where: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center", "fontsize": 8}
        rim = [withStroke(linewidth=1.8, foreground="black")]
        axes.text(x, y, letter, color="#ffd84d", fontweight="bold", path_effects=rim, **where)


def _turn(cut: np.ndarray) -> np.ndarray:
    """Let rows run down and columns to the patient's left."""
    return np.swapaxes(cut, 0, 1)[::-1, ::-1]


def _middle(volume: Volume, plane: Plane) -> int:
    return volume.shape_ijk[2 if plane == "axial" else 1] // 2


def body_colours(features: Features, volume: Volume) -> tuple[Float[np.ndarray, "ti tj tk 3"], cells.CellGrid]:
    """Colour every token by its first three principal components within the body; air is black.

    Also gives the grid that says which voxel lies in which token.

    Raises:
        ValueError: there are no tokens.
    """
    if features.tokens is None or features.tokens_affine_ras is None:
        raise ValueError("the picture of tokens needs tokens")
    size = features.tokens.shape
    grid = cells.lay(volume.affine_ras, volume.shape_ijk, features.tokens_affine_ras, (size[0], size[1], size[2]))
    counts = cells.tally(solid(volume).astype(np.int8), grid, 2)
    body = counts[..., 1] > 0.3 * np.maximum(counts.sum(axis=3), 1.0)
    body = body if body.sum() > 3 else np.ones_like(body)  # noqa: PLR2004 - three directions need a few tokens
    rows = features.tokens[body].astype(np.float64)
    rows = rows - rows.mean(axis=0)
    directions = np.linalg.svd(rows[:: max(1, len(rows) // 4000)], full_matrices=False)[2][:3]
    # The sign of a principal component is arbitrary: fix it, so that a picture can be made again.
    directions *= np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(axis=1)])[:, None]
    places = rows @ directions.T
    low, high = np.quantile(places, [0.02, 0.98], axis=0)
    colours = np.zeros((*size[:3], 3), dtype=np.float32)
    colours[body, : len(directions)] = np.clip((places - low) / np.maximum(high - low, 1e-9), 0, 1)
    return colours, grid


def solid(volume: Volume) -> Bool[np.ndarray, "i j k"]:
    """True in the body: denser than lung in CT, brighter than the mean in anything else."""
    return volume.array[0] > (-500.0 if volume.modality == "CT" else float(volume.array[0].mean()))


def _ends(records: Sequence[Mapping[str, float]], name: str) -> str:
    values = [record[name] for record in records if name in record]
    return f"from {values[0]:.3g} to {values[-1]:.3g}"
