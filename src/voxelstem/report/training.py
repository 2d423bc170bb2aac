"""The page of a pretraining run: what it cost, whether it stayed healthy, what was left out, and what that proves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from voxelstem.config import without_places
from voxelstem.report import page
from voxelstem.report.figures import training_curves
from voxelstem.report.run import SIGNS, curves

Facts = Mapping[str, Any]
MOST_ROWS = 50
SLOW_DATA = 0.05
"""Share of the time spent waiting for samples, above which training is held up."""
_PROBES = tuple(name for name in SIGNS if name.startswith("probe/"))
_HALF = 0.5
NOTHING_TOLD = 0.02
"""Nats, below which targets tell no view from another."""


def training_page(facts: Facts, lines: Sequence[Mapping[str, Any]]) -> str:
    """Draw the page as one HTML document.

    Args:
        facts: What `show.show` says of the run.
        lines: Of its journal.
    """
    of = f" of {facts['steps']}" if facts["steps"] else ""
    state = "finished" if facts["finished"] else "not finished"
    sections = [
        page.section("Does it learn, and is it healthy?", *_judgement(facts)),
        page.section("Curves", page.picture(training_curves(curves(lines)))),
        page.section("What it took", page.facts(_cost(facts))),
        page.section("What was left out", *_left_out(facts)),
        page.section("What these numbers cannot show", page.note(*_limits(facts))),
        page.section("Settings", _settings(facts)),
    ]
    return page.page(
        f"Pretraining {facts['recipe']}".rstrip(),
        sections,
        lead=f"{facts['steps_taken']}{of} steps, {state}. No label was used to train; labels are only asked by the "
        "probes, which never change the network.",
    )


def warnings(facts: Facts) -> list[str]:
    """What a careful person would point at, in words; empty where nothing stands out."""
    said = _of_signs(facts["signs"])
    if facts.get("data_wait_share", 0.0) > SLOW_DATA:
        said.append(f"Training waited {facts['data_wait_share']:.0%} of its time for samples: give it more readers.")
    if facts["rolled_back"]:
        said.append(f"Times the run went back to a checkpoint: {len(facts['rolled_back'])}; a lower rate may be safer.")
    if not facts["finished"]:
        said.append("The run is not finished: all numbers are of what was done so far.")
    return said


def _of_signs(signs: Mapping[str, Mapping[str, float]]) -> list[str]:
    said = [
        f"The {SIGNS[name].name} did not rise: nothing shows that the tokens became more useful."
        for name in _PROBES
        if name in signs and signs[name]["difference"] <= 0
    ]
    for name in ("effective_rank", "effective_rank/cls"):
        if name in signs and signs[name]["last"] < _HALF * signs[name]["first"]:
            first, last = signs[name]["first"], signs[name]["last"]
            said.append(f"The {SIGNS[name].name} fell from {first:.3g} to {last:.3g}: look for collapse.")
    said += [
        f"The {SIGNS[name].name} fell to {signs[name]['last']:.3g}: tokens point the same way."
        for name in ("spread/patch", "spread/cls")
        if name in signs and signs[name]["last"] < min(_HALF * signs[name]["first"], _HALF)
    ]
    if "teacher_information" in signs and signs["teacher_information"]["last"] < NOTHING_TOLD:
        said.append("The teacher gives one answer to all views: its cls term teaches nothing (collapse).")
    return said


def _judgement(facts: Facts) -> list[str]:
    told = warnings(facts)
    parts = [page.note(*told)] if told else [page.paragraph("Nothing stands out. The table says what was looked at.")]
    if not any(name in facts["signs"] for name in _PROBES):
        parts.append(page.paragraph("There was no probe: fewer than two subjects carried voxel labels."))
    if not facts["signs"]:
        return [*parts, page.paragraph("The run was not looked at yet.")]
    rows = [
        [
            SIGNS[name].name,
            f"{found['first']:.3g}",
            f"{found['last']:.3g}",
            f"{found['difference']:+.3g}",
            SIGNS[name].meaning,
        ]
        for name, found in facts["signs"].items()
    ]
    began = facts["begun_from"]
    caption = "First look, before the first step, and last look, on the same blocks"
    parts.append(page.table(["sign", "before", "after", "difference", "meaning"], rows, caption=caption))
    if began:
        parts.append(
            page.paragraph(
                f"The run began from weights {began}. The differences say what continuing on these scans gained or, "
                "where they are negative, made the network forget, as far as this probe sees."
            )
        )
    return parts


def _cost(facts: Facts) -> dict[str, str]:
    told = {
        "Steps": f"{facts['steps_taken']:,}",
        "Samples": f"{facts['samples']:,}",
        "Time": _duration(facts["seconds"]),
        "Samples a second": f"{facts['samples_per_s']:.3g}",
        "Waiting for data": f"{facts['data_wait_share']:.1%}" if "data_wait_share" in facts else "not measured",
        "Energy": f"{facts['kwh']:.4g} kWh, {facts.get('energy', 'source not stated')}"
        if "kwh" in facts
        else "not measured",
        "Checkpoints kept": ", ".join(facts["checkpoints"]) or "none",
        "Disk": f"{facts['bytes'] / 2**20:,.0f} MiB",
    }
    if "look_seconds" in facts:
        told["Seconds of one look at the health"] = f"{facts['look_seconds']:.2g}"
    return told | ({"Trained on": "; ".join(facts["data"])} if facts.get("data") else {})


def _left_out(facts: Facts) -> list[str]:
    parts: list[str] = []
    if facts["skipped"]:
        rows = [[str(f["step"]), str(f["skipped"]), _names(f.get("samples", []))] for f in facts["skipped"]]
        parts.append(_table(["step", "why", "samples"], rows, "Steps that never reached the weights"))
    if facts["rolled_back"]:
        rows = [
            [str(f["rolled_back_to"]), str(f.get("reason", "")) or "too many bad steps", _names(f.get("excluded", []))]
            for f in facts["rolled_back"]
        ]
        parts.append(_table(["back to step", "why", "steps left out since"], rows, "Ways back to a checkpoint"))
    if facts["quarantined"]:
        rows = [[str(f["quarantined"]), str(f["step"]), str(f.get("reason", ""))] for f in facts["quarantined"]]
        parts.append(_table(["scan", "since step", "why"], rows, "Scans that could not be read"))
    if not parts:
        return [page.paragraph("Nothing: every step was taken, every scan could be read.")]
    said = "Samples and scans are named by the first letters of their keys in the store, which name no person."
    return [*parts, page.paragraph(said)]


def _table(head: list[str], rows: list[list[str]], caption: str) -> str:
    more = f", the first {MOST_ROWS} of {len(rows)}" if len(rows) > MOST_ROWS else ""
    return page.table(head, rows[:MOST_ROWS], caption=caption + more)


def _limits(facts: Facts) -> list[str]:
    energy = (
        ["The energy is an estimate from assumed watts: good for comparing runs on one machine, not for accounts."]
        if str(facts.get("energy", "")).startswith("estimated")
        else []
    )
    return [
        "A falling loss proves nothing by itself, and a probe on a few blocks of a few subjects is a hint: it has no "
        "interval, and choosing a recipe by it makes it too kind. Judge the weights with `voxelstem evaluate` on "
        "subjects that were held out, beside the same network untrained.",
        *energy,
        page.NOT_A_DEVICE,
    ]


def _settings(facts: Facts) -> str:
    settings: Mapping[str, Any] = facts["settings"]
    return page.facts(without_places(settings)) if settings else page.paragraph("The run folder holds no config.toml.")


def _names(samples: object) -> str:
    return ", ".join(map(str, samples)) if isinstance(samples, list | tuple) else str(samples)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
