"""A run's folder: which settings it belongs to. Started again with the same ones it goes on, with others it refuses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from voxelstem.config import flatten, read_toml, to_toml
from voxelstem.engine.checkpoint import checkpoints
from voxelstem.errors import CheckpointError, ConfigError

CONFIG = "config.toml"
MOST_LISTED = 8
FREE_TO_CHANGE = {
    "loader.threads",
    "loader.workers",
    "loader.timeout_s",
    "loader.ahead",
    "loader.source",
    "checkpoint.background",
    "parallel.kind",
    "parallel.recompute",
    "parallel.compile",
    "parallel.timeout_s",
    "health.",
}
"""Settings that change who reads, computes and looks, and not what is learned: a run may resume with others. Those of
`parallel`, like the number of processes, change results by rounding; the others by not one bit."""


def claim(run: Path, config: Any) -> None:
    """Write the resolved config.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        # By a rename: half a file would read as another run's settings.
        unfinished = run / f".{CONFIG}.unfinished"
        unfinished.write_text(to_toml(config), encoding="utf-8")
        unfinished.replace(run / CONFIG)
    except OSError as error:
        raise ConfigError(
            f"the run folder '{run.name}' cannot be written: {error.strerror}",
            hint="check its rights and free some space, then run the same command again",
        ) from error


def check_settings(run: Path, config: Any, *, free: Collection[str]) -> None:
    """See that what was trained in the run so far was trained by the same config; without a checkpoint, all are free.

    Args:
        run: Its folder.
        config: The resolved config it is started with now.
        free: Settings that may change all the same; a name that ends with a dot is a group.

    Raises:
        CheckpointError: it was trained by another one, whose differences are listed, or nothing says by which.
    """
    finished = (run / "weights").exists()
    if not finished and not checkpoints(run / "checkpoints"):
        return
    if not (run / CONFIG).exists():
        raise CheckpointError(
            f"run '{run.name}' has no {CONFIG} that says how it was trained", hint="choose a new --out"
        )
    changed = differences(read_toml(run / CONFIG), flatten(config), free=free)
    if changed:
        more = f" and {len(changed) - MOST_LISTED} more" if len(changed) > MOST_LISTED else ""
        raise CheckpointError(
            f"run '{run.name}' was {'trained' if finished else 'started'} with other settings: "
            f"{', '.join(changed[:MOST_LISTED])}{more}",
            hint="choose a new --out" if finished else "use the same settings to resume, or choose a new --out",
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, free: Collection[str] = ()) -> list[str]:
    """Settings that differ, each as `name: before -> now`."""
    plain = {name: _plain(value) for name, value in now.items()}
    groups = tuple(name for name in free if name.endswith("."))
    asked = sorted(name for name in before.keys() | plain.keys() if name not in free and not name.startswith(groups))
    return [
        f"{name}: {before.get(name, 'not there')} -> {plain.get(name, 'not there')}"
        for name in asked
        if before.get(name) != plain.get(name)
    ]


def _plain(value: Any) -> Any:
    """A setting as TOML gives it back: lists for tuples, and a word for none."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return "none" if value is None else value
