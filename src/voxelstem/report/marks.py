"""How contestants are told apart in a picture: by colour, line and marker at once, so that no one of them is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from voxelstem.metrics import Interval
from voxelstem.report.figures import GRID, INK

BAND = 0.16
"""Opacity of a band: bands that overlap still show the lines in them."""
LONGEST_NAME = 44
"""Letters of a name in a legend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """What one contestant looks like in every picture of a page."""

    colour: str
    line: str | tuple[int, tuple[int, ...]]
    """A name that matplotlib knows, or where dashes begin and how long they and their gaps are."""
    marker: str


MARKS = (
    Mark(colour="#0b62a4", line="-", marker="o"),
    Mark(colour="#d5690b", line="--", marker="s"),
    Mark(colour="#2b8a57", line="-.", marker="^"),
    Mark(colour="#cc79a7", line=":", marker="D"),
    Mark(colour="#1d2733", line=(0, (7, 2, 1, 2, 1, 2)), marker="v"),
)
"""Five colours that stay apart without red, green or blue cones, and reach a contrast of 3 on white."""


def marks_of(names: Sequence[str]) -> dict[str, Mark]:
    """Give each contestant its mark, in the order of the names: name the run first, and its baselines alike everywhere.

    Raises:
        ValueError: nobody, a name that stands twice, or more than can be told apart in one pair of axes.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a picture needs contestants with names of their own, got {', '.join(names) or 'none'}")
    if len(names) > len(MARKS):
        raise ValueError(f"no more than {len(MARKS)} contestants can be told apart in one picture, got {len(names)}")
    return dict(zip(names, MARKS, strict=False))


def written(name: str) -> str:
    """A name as a picture may hold it: not too long, and neither a formula nor hidden from a legend."""
    short = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")


def told(value: Interval) -> str:
    """A figure with its interval in two decimals, or what is known without one."""
    if value.low is None or value.high is None:
        return f"{value.estimate:.2f} ({value.note})"
    return f"{value.estimate:.2f} [{value.low:.2f}, {value.high:.2f}]"


def plain_axes(axes: Any, *, across: str, up: str, title: str = "") -> None:
    """Name the axes, and take away what carries no number."""
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.set_xlabel(across, fontsize=9, color=INK)
    axes.set_ylabel(up, fontsize=9, color=INK)
    axes.tick_params(which="both", labelsize=8, colors=INK)
    axes.grid(visible=True, color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def legend_below(figure: Figure, handles: Sequence[Any], *, title: str = "") -> None:
    """A legend under all axes, where it hides no line."""
    shown = figure.legend(
        handles=list(handles), loc="outside lower left", fontsize=8.5, frameon=False, title=title, handlelength=3.2
    )
    shown.set_alignment("left")
    shown.get_title().set_fontsize(8.5)
    shown.get_title().set_color(INK)


def handle(mark: Mark, label: str, *, marker: bool = False) -> Line2D:
    """A contestant's line in a legend."""
    return Line2D([], [], color=mark.colour, ls=mark.line, lw=1.8, marker=mark.marker if marker else "", label=label)
