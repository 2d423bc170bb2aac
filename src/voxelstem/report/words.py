"""What `voxelstem show` says in words of the facts that it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from voxelstem.report.run import SIGNS
from voxelstem.study import PER_VOLUME

Facts = dict[str, Any]
MOST_LINES = 20
KIB = 1024


def describe(facts: Facts) -> str:
    """Say in words for a person what `show` found."""
    told = {
        "store": _describe_store,
        "scan": _describe_scan,
        "run": _describe_run,
        "weights": _describe_weights,
        "inside": lambda found: [*describe_inside(found), f"picture: {found['picture']}"],
    }
    return "\n".join(told.get(facts["kind"], _describe_tree)(facts))


def _describe_store(facts: Facts) -> list[str]:
    lines = [
        f"store: {facts['kept']} scans of {facts['subjects']} subjects, {_size(facts['bytes'])}",
        "subjects by split: " + _pairs(facts["splits"]),
    ]
    if facts["acquisitions"] < facts["kept"]:
        lines.append(f"independent scans: {facts['acquisitions']}; the others are reconstructions or copies of these")
    if facts["kept"]:
        lines += [
            f"modality: {_pairs(facts['modalities'])}; "
            f"{facts['with_voxel_labels']} with voxel labels, {facts['with_report']} with a report",
            f"shape: {_range(facts['shape_ijk'])} voxels; spacing: {_range(facts['spacing_mm'])} mm",
        ]
    said = {"contrast": "contrasts", "session": "sessions", "format": "formats", "reports": "reports_by_language"}
    lines += [f"{word}: {_pairs(facts[name])}" for word, name in said.items() if facts[name]]
    if facts["classes"]:
        lines.append(f"labels: {_pairs(facts['classes'])}")
    refused = facts["refused"]
    if refused:
        lines.append(f"refused: {len(refused)} ({_pairs(facts['refused_by_code'])})")
        lines += [f"  {line['source']}  {line['code']}: {line['reason']}" for line in refused[:MOST_LINES]]
        lines += [f"  … and {len(refused) - MOST_LINES} more (see --json)"] if len(refused) > MOST_LINES else []
    return lines + _describe_check(facts)


def _describe_check(facts: Facts) -> list[str]:
    damaged = facts["damaged"]
    how = "every voxel" if facts["checked_by"] == "digest" else "sizes only; --verify compares every voxel"
    lines = [f"checked: {facts['checked']} files ({how}), {len(damaged)} damaged"]
    lines += [f"  {file['name'][:16]}: {file['reason']}" for file in damaged[:MOST_LINES]]
    return lines + ([f"  … and {len(damaged) - MOST_LINES} more (see --json)"] if len(damaged) > MOST_LINES else [])


def _describe_scan(facts: Facts) -> list[str]:
    lines: list[str] = []
    for volume in facts["volumes"]:
        shape = " x ".join(map(str, volume["shape_ijk"]))
        spacing = " x ".join(f"{edge:g}" for edge in volume["spacing_mm"])
        middle = ", ".join(f"{share} %: {value:g}" for share, value in volume["percentiles"].items())
        lines += [
            f"{volume['modality']} scan ({volume['format']}): {shape} voxels of {spacing} mm along R, A, S",
            f"stored as {volume['orientation']}; {volume['low']:g} to {volume['high']:g} {volume['unit']} ({middle})",
            *(f"note: {note}" for note in volume["notes"]),
        ]
    return lines


def _describe_run(facts: Facts) -> list[str]:
    state = "finished" if facts["finished"] else "not finished"
    of = f" of {facts['steps']}" if facts["steps"] else ""
    last = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in facts["last"].items()}
    lines = [
        f"run {facts['recipe']}: step {facts['step']}{of}, {state}, {_size(facts['bytes'])}".replace("run :", "run:"),
        f"last line of the journal: {_pairs(last) or 'none'}",
        f"checkpoints: {', '.join(facts['checkpoints']) or 'none'}",
    ]
    if facts["samples_per_s"]:
        wait = f", {facts['data_wait_share']:.1%} of it waiting for data" if "data_wait_share" in facts else ""
        lines.append(f"took: {facts['seconds']:.0f} s for {facts['samples']} samples{wait}")
    if "kwh" in facts:
        lines.append(f"energy: {facts['kwh']:.3g} kWh, {facts.get('energy', 'source not stated')}")
    began = f"weights {facts['begun_from']}" if facts["begun_from"] else "the untrained network"
    lines += [f"health since {began}, first look and last:"] if facts["signs"] else []
    lines += [
        f"  {SIGNS[name].name}: {found['first']:.3g} to {found['last']:.3g} ({found['difference']:+.3g})"
        for name, found in facts["signs"].items()
    ]
    for word, mark in (("left out", "skipped"), ("went back", "rolled_back_to"), ("unreadable", "quarantined")):
        found = facts["rolled_back" if mark == "rolled_back_to" else mark]
        lines += [_told(word, mark, line) for line in found[:MOST_LINES]]
        lines += [f"  … and {len(found) - MOST_LINES} more (see --json)"] if len(found) > MOST_LINES else []
    return lines


def _told(word: str, mark: str, line: Mapping[str, Any]) -> str:
    """One step that was left out, one way back, or one scan that could not be read."""
    samples = f" (samples {', '.join(line['samples'])})" if line.get("samples") else ""
    reason = f": {line['reason']}" if line.get("reason") else ""
    reason += f", without steps {', '.join(map(str, line['excluded']))}" if line.get("excluded") else ""
    return f"{word}, step {line['step']}: {line[mark]}{samples}{reason}"


def _describe_weights(facts: Facts) -> list[str]:
    """The card, the most important first; what it does not say is left out."""
    card: Mapping[str, Any] = facts["card"]
    spec: Mapping[str, Any] = card.get("spec") or {}
    size = _size(facts["bytes"])
    count = f"{facts['parameters'] / 1e6:.1f} M parameters, " if facts["parameters"] else ""
    name = (card.get("architecture") or {}).get("name", "")
    lines = [f"weights {name}: {count}{size}".replace("weights :", "weights:")]
    if spec:
        preset = f" (preset {spec['preset']})" if spec.get("preset") else ""
        other = {"native": "its own spacing", "fit": "the spacing at which it fits one block"}
        fed = other.get(spec.get("resampling", ""), f"{_times(spec.get('spacing_mm', ()))} mm")
        window = f"window {spec.get('low_hu'):g} to {spec.get('high_hu'):g}"
        lines.append(
            f"input: {spec.get('modality', '')} at {fed}, {PER_VOLUME.get(spec.get('normalisation', ''), window)}, "
            f"blocks of {_times(spec.get('block_ijk', ()))} voxels{preset}"
        )
    lines.append(f"trained levels: {', '.join(card.get('trained') or ()) or 'none'}")
    said = {"licence": "licence", "origin": "origin", "recipe": "recipe", "parent": "grown from", "sha256": "sha256"}
    lines += [f"{word}: {card[key]}" for key, word in said.items() if card.get(key)]
    for word, found in (("data", card.get("data")), ("note", card.get("notes"))):
        lines += [f"{word}: {line}" for line in found or ()]
    for file, bytes_ in facts["beside"].items():
        lines.append(f"beside: {file}, {_size(bytes_) if bytes_ is not None else 'MISSING'}")
    return lines


def describe_inside(facts: Facts) -> list[str]:
    """How a scan was fed to a model whose tokens were drawn: for the terminal and for the picture itself."""
    at, mm = (", ".join(f"{number:g}" for number in facts[name]) for name in ("at_ijk", "at_mm"))
    scan, spacing, fed = (_times(facts[name]) for name in ("scan_shape_ijk", "scan_spacing_mm", "fed_spacing_mm"))
    weights, (low, high), rank = facts["weights"], facts["window"], facts["effective_rank"]
    values = PER_VOLUME.get(facts["normalisation"], f"{low:g} to {high:g} {facts['unit']}")
    lines = [
        f"+ is voxel {at}, at ({mm}) mm along R, A, S: {facts['value']:g} {facts['unit']}",
        f"scan: {scan} voxels of {spacing} mm, fed at {fed} mm and {values}, "
        f"as {_times(facts['grid'])} blocks of {_times(facts['block_ijk'])} voxels",
        f"seen: {facts['coverage']:.1%} of it, {_times(facts['seen_mm'])} mm"
        + (f"; effective rank of the blocks: {rank:.1f}" if rank is not None else ""),
        f"weights: {weights['sha256'][:12] or 'not kept'}, input {weights['preset'] or 'of their own'}, "
        f"licence {weights['licence']}, trained: {', '.join(weights['trained']) or 'nothing'}",
    ]
    return lines + [f"warning: {line}" for line in facts["warnings"]]


def _describe_tree(facts: Facts) -> list[str]:
    """Anything else: its names and values, one a line, deeper ones further in."""
    lines = [str(facts["kind"])]

    def tell(content: Mapping[str, Any], depth: int) -> None:
        for name, value in content.items():
            if isinstance(value, Mapping) and value:
                lines.append(f"{'  ' * depth}{name}:")
                tell(value, depth + 1)
            else:
                told = _size(int(str(value))) if name == "bytes" else value
                lines.append(f"{'  ' * depth}{name}: {told}")

    tell({name: value for name, value in facts.items() if name != "kind"}, 1)
    return lines


def _pairs(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _range(span: Mapping[str, list[float]]) -> str:
    least, most = (" x ".join(f"{edge:g}" for edge in span[end]) for end in ("least", "most"))
    return least if least == most else f"{least} to {most}"


def _size(count: int) -> str:
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= KIB and len(units) > 1:
        size, units = size / KIB, units[1:]
    return f"{size:.3g} {units[0]}" if size < KIB else f"{size:.0f} {units[0]}"


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
