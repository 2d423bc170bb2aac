"""The worst and the best held-out cases: which they are, and what the expert and the network said of each.

A mean hides what went wrong. Nobody is named: a case is called by the first letters of its key in the store, which is a
digest or a keyed hash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from voxelstem.report import page
from voxelstem.report.figures import INK, Picture, Plane, blank, show_scan, show_slice, slice_axes, to_png
from voxelstem.report.marks import written
from voxelstem.study import Volume

KEY_LETTERS = 8
KEY = re.compile(r"s?[0-9a-f]{16,}")
"""A digest of a scan or the pseudonym of a subject; anything else might be a name."""
SOFT_TISSUE = (-160.0, 240.0)
"""HU that a CT is shown in."""
TRUTH, PREDICTED = "#56b4e9", "#ffb000"
"""Colours of outlines: told apart on grey without red, green or blue cones. The prediction is dashed, too."""
MARGIN_MM, SMALLEST_MM = 12.0, 50.0
"""About what is asked in the close-up, and the least edge of a close-up."""
MOST_CLASSES = 8
"""Whose probabilities are shown beside a scan; the most probable ones, and the true one."""
FEWEST_ROWS = 4
SOFT = "#aab2bd"
LEAST_CHANCE = 1e-12
_PLANES: tuple[Plane, ...] = ("axial", "coronal")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """Keys of the worst and of the best cases, the worst and the best of all first. No key stands in both."""

    worst: tuple[str, ...]
    best: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """A held-out scan, what is true of it and what was said."""

    key: str
    """In the store: of the scan, or the subject's pseudonym."""
    figure: float
    """By which it was chosen."""
    scan: Volume
    counted: bool = False
    """Whether the figure counts something, and is told without decimals."""
    truth: Shaped[np.ndarray, "i j k"] | None = None
    """Voxels of what is asked, on the scan's own grid: 0 or False is background. None for a scan-level task."""
    predicted: Shaped[np.ndarray, "i j k"] | None = None
    said: Mapping[str, str] = field(default_factory=dict)
    """What stands beside the scan, line by line: `{"true": "63", "predicted": "71.2 years"}`."""
    chances: Mapping[str, float] = field(default_factory=dict)
    """Predicted probability of each class, drawn as bars."""
    true_classes: tuple[str, ...] = ()
    """Which of them are true."""

    def __post_init__(self) -> None:
        """Guard what is shown.

        Raises:
            ValueError: a key that may be a name (it is not repeated here), a mask on another grid or without its other
                half, a probability that is none, or a true class without one.
        """
        if not KEY.fullmatch(self.key):
            raise ValueError("a case must be named by its key in the store: 16 letters or more of a hexadecimal digest")
        masks = [mask for mask in (self.truth, self.predicted) if mask is not None]
        if len(masks) == 1 or any(mask.shape != self.scan.shape_ijk for mask in masks):
            raise ValueError("outlines need the voxels of truth and prediction, both on the scan's own grid")
        if any(not 0 <= chance <= 1 for chance in self.chances.values()):
            raise ValueError("what is shown beside a case must be probabilities, in [0, 1]")
        if self.chances and not set(self.true_classes) <= set(self.chances):
            raise ValueError("a true class must be one of those with a probability")

    @property
    def short(self) -> str:
        """What the case is called."""
        return self.key[:KEY_LETTERS]


def choose(figures: Mapping[str, float], count: int, *, less_is_better: bool) -> Chosen:
    """The `count` worst and best cases by their own figure; equal ones in the order of their keys.

    With fewer than twice as many cases the worst come first: of five cases, `count` 3 gives three worst and two best.

    Args:
        figures: Key to figure; cases whose figure is NaN are passed over.
        count: How many of either.
        less_is_better: True for an error or a loss.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"at least one case must be wanted, got {count}")
    sign = -1.0 if less_is_better else 1.0
    known = {key: sign * figure for key, figure in figures.items() if not math.isnan(figure)}
    worst = sorted(known, key=lambda key: (known[key], key))[: min(count, -(-len(known) // 2))]
    best = sorted(known.keys() - set(worst), key=lambda key: (-known[key], key))[:count]
    return Chosen(worst=tuple(worst), best=tuple(best))


def log_loss(truth: int, scores: Sequence[float]) -> float:
    """Minus the logarithm of the probability that was given to the true class: 0 is sure and right.

    Good 1952. A probability of 0 counts as `LEAST_CHANCE`, so that certain errors can be put in order.

    Raises:
        ValueError: the truth is no class of the scores, or its score is no probability.
    """
    if not 0 <= truth < len(scores) or not 0 <= scores[truth] <= 1:
        raise ValueError(f"class {truth} has no probability among {len(scores)} scores")
    return abs(math.log(max(scores[truth], LEAST_CHANCE)))  # minus the logarithm of 1 would be -0


def answers_log_loss(truth: Sequence[float], scores: Sequence[float]) -> float:
    """`log_loss` of answers that do not exclude one another, mean over the classes whose truth is known.

    Args:
        truth: 1, 0 or NaN for each class.
        scores: Probability of each.

    Raises:
        ValueError: as `log_loss`.
    """
    known = [(int(true), score) for true, score in zip(truth, scores, strict=True) if not math.isnan(true)]
    losses = [log_loss(true, (1 - score, score)) for true, score in known]
    return math.fsum(losses) / len(losses) if losses else math.nan


def case_picture(
    case: Case, *, metric: str, place: str, low: float = SOFT_TISSUE[0], high: float = SOFT_TISSUE[1]
) -> Picture:
    """The case in an axial and a coronal slice, and beside them what was said.

    With outlines the slices run through the middle of what is asked (half of its voxels lie below, half above), and a
    close-up of the axial one stands beside; without them, through the middle of the scan.

    Args:
        case: What to show.
        metric: What `case.figure` is, in words.
        place: Which case it is: `worst 1 of 84`.
        low: The HU that are black; scans without a unit use their own range.
        high: The HU that are white.
    """
    figure = blank(6.5, 2.9)
    axes = figure.subplots(1, 3, width_ratios=[1, 1, 1.1])
    # Where nothing is there, what was predicted falsely is what to look at.
    asked = case.predicted if case.truth is not None and not (case.truth > 0).any() else case.truth
    at = _middle(case.scan, None if asked is None else asked > 0)
    for place_, plane in enumerate(_PLANES):
        index = at[2 if plane == "axial" else 1]
        grey = show_scan(case.scan, plane, index, low=low, high=high)
        slice_axes(axes[place_], grey, case.scan, plane, title=plane)
        axes[place_].set_anchor("N")
        _outline(axes[place_], case, plane, index)
    if asked is not None:
        _close_up(axes[2], case, asked > 0, at[2], low=low, high=high)
        _legend(figure)
    elif case.chances:
        _bars(axes[2], case)
    else:
        _lines(axes[2], case)
    heading = f"{place[:1].upper()}{place[1:]} by {metric}: {_figure(case)}. Case {case.short}."
    words = " ".join([_drawn(case), _in_words(case)]).strip()
    return Picture(
        png=to_png(figure),
        alt=f"{heading} Axial and coronal slice of a {case.scan.modality} scan. {words}".rstrip(),
        caption=f"{heading} {words}".rstrip(),
    )


def cases_section(
    worst: Sequence[Picture], best: Sequence[Picture], *, metric: str, title: str = "Worst and best cases"
) -> page.Section:
    """The part of the page that shows them, the worst first."""
    told = (
        f"Chosen by {metric} on each held-out subject, equal ones in the order of their keys; nothing was picked by "
        "hand. The worst show what goes wrong, the best do not show what is usual. Slices are shown as radiologists "
        "do: the patient's right (R) is on the left. Cases are named by the first letters of keys that name no person."
    )
    parts = [page.paragraph(told)]
    for heading, pictures in (("Worst", worst), ("Best", best)):
        parts.append(f"<h3>{heading}</h3>")
        parts += [page.picture(one) for one in pictures] or [page.paragraph("None: too few subjects were held out.")]
    return page.section(title, *parts)


def _figure(case: Case) -> str:
    """The figure as it is told: what rounds to nothing is 0.000, with no sign."""
    if case.counted:
        return f"{case.figure:.0f}"
    return "0.000" if abs(case.figure) < 0.0005 else f"{case.figure:.3g}"  # noqa: PLR2004 - three decimals


def _middle(scan: Volume, asked: Bool[np.ndarray, "i j k"] | None) -> tuple[int, int, int]:
    """The slice along each axis that half of the voxels lie below; the scan's own middle where there are none."""
    if asked is None or not asked.any():
        i, j, k = (edge // 2 for edge in scan.shape_ijk)
        return i, j, k
    found: list[int] = []
    for axis in range(3):
        heaped = np.cumsum(asked.sum(axis=tuple(other for other in range(3) if other != axis)))
        found.append(int(np.searchsorted(heaped, heaped[-1] / 2)))
    return found[0], found[1], found[2]


def _outline(axes: Any, case: Case, plane: Plane, index: int) -> None:
    """Draw where truth and prediction end; every kind of voxel has a line of its own."""
    if case.truth is None or case.predicted is None:
        return
    ends = axes.get_xlim(), axes.get_ylim()
    for mask, colour, width, line in ((case.truth, TRUTH, 2.0, "solid"), (case.predicted, PREDICTED, 1.2, "dashed")):
        cut = show_slice(mask.astype(np.int16), plane, index)
        # A rim of background closes outlines at the edge of the scan.
        rimmed = np.pad(cut, 1)
        down, across = (np.arange(-1, edge + 1) for edge in cut.shape)
        for kind in np.unique(cut[cut > 0]):
            options: dict[str, Any] = {"colors": colour, "linewidths": width, "linestyles": line}
            drawn = axes.contour(across, down, (rimmed == kind).astype(np.float64), levels=[0.5], **options)
            drawn.set_path_effects([withStroke(linewidth=width + 1.2, foreground="black", alpha=0.55)])
    axes.set_xlim(ends[0])
    axes.set_ylim(ends[1])


def _close_up(axes: Any, case: Case, asked: Bool[np.ndarray, "i j k"], index: int, *, low: float, high: float) -> None:
    """The axial slice again, only what lies about the thing that is asked."""
    grey = show_scan(case.scan, "axial", index, low=low, high=high)
    slice_axes(axes, grey, case.scan, "axial", title="close-up")
    axes.set_anchor("N")
    _outline(axes, case, "axial", index)
    cut = show_slice(asked, "axial", index)
    edges = [np.flatnonzero(cut.any(axis=axis)) for axis in (1, 0)]
    if not all(edge.size for edge in edges):
        edges = [np.arange(size) for size in cut.shape]
    across_mm, down_mm = case.scan.spacing_mm[0], case.scan.spacing_mm[1]
    middle = [(edge[0] + edge[-1]) / 2 * size for edge, size in zip(edges, (down_mm, across_mm), strict=True)]
    extent = [(edge[-1] - edge[0] + 1) * size for edge, size in zip(edges, (down_mm, across_mm), strict=True)]
    half = max(SMALLEST_MM, max(extent) + 2 * MARGIN_MM) / 2
    axes.set_xlim((middle[1] - half) / across_mm, (middle[1] + half) / across_mm)
    axes.set_ylim((middle[0] + half) / down_mm, (middle[0] - half) / down_mm)


def _legend(figure: Figure) -> None:
    lines = [
        Line2D([], [], color=TRUTH, lw=2.4, label="truth"),
        Line2D([], [], color=PREDICTED, lw=1.8, ls="--", label="prediction"),
    ]
    figure.legend(handles=lines, loc="outside lower left", ncols=2, fontsize=8.5, frameon=False, handlelength=3)


def _bars(axes: Any, case: Case) -> None:
    """Probabilities of the classes; a full bar is true."""
    names = _shown(case)
    for row, name in enumerate(names):
        true = name in case.true_classes
        colour, edge = (TRUTH, 1.1) if true else (SOFT, 0.0)
        axes.barh(row + 0.22, case.chances[name], color=colour, height=0.3, ec=INK, lw=edge)
        label = f"{written(name)}  {case.chances[name]:.2f}" + ("  (true)" if true else "")
        how: dict[str, Any] = {"fontsize": 8, "color": INK, "fontweight": "bold" if true else "normal"}
        axes.text(0.02, row - 0.02, label, va="bottom", **how)
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(names), FEWEST_ROWS) - 0.5, -0.6)
    axes.set_yticks([])
    axes.set_xticks([0, 0.5, 1])
    axes.tick_params(labelsize=8, colors=INK)
    axes.set_xlabel("predicted probability", fontsize=8.5, color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _lines(axes: Any, case: Case) -> None:
    """What was said of the scan, line by line."""
    axes.axis("off")
    text = "\n".join(f"{written(name)}: {written(said)}" for name, said in case.said.items())
    axes.text(0.0, 0.5, text, fontsize=9.5, color=INK, va="center", linespacing=1.8, transform=axes.transAxes)


def _shown(case: Case) -> list[str]:
    """The most probable classes and those that are true, the most probable first."""
    ranked = sorted(case.chances, key=lambda name: (-case.chances[name], name))
    kept = {*case.true_classes[:MOST_CLASSES], *ranked[: max(MOST_CLASSES - len(case.true_classes), 0)]}
    return [name for name in ranked if name in kept]


def _drawn(case: Case) -> str:
    """What the outlines show; nothing where there are none."""
    if case.truth is None or case.predicted is None:
        return ""
    if not (case.truth > 0).any():
        return (
            "Nothing is there; the slices run through the middle of what was predicted."
            if (case.predicted > 0).any()
            else "Nothing is there, and nothing was predicted."
        )
    missed = "" if (case.predicted > 0).any() else " Nothing was predicted."
    return f"Solid outline: truth; dashed: prediction, in the slices through the middle of the truth.{missed}"


def _in_words(case: Case) -> str:
    said = [f"{name}: {text}" for name, text in case.said.items()]
    if case.chances:
        said.append(f"true: {', '.join(case.true_classes) or 'none of the classes'}")
        said.append("predicted: " + ", ".join(f"{name} {case.chances[name]:.2f}" for name in _shown(case)))
    text = "; ".join(said)
    return f"{text[:1].upper()}{text[1:]}." if text else ""
