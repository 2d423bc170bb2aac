"""Settings are trees of frozen dataclasses; files and command lines hold only the differences from a recipe.

A difference is a dotted name and a value: `optim.lr = 0.001`. A resolved config written by `to_toml` replays exactly.
TOML has no null, so an optional setting that is off is written as the word "none".
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from voxelstem.errors import ConfigError
from voxelstem.table import closest

Config = TypeVar("Config")
NoneType = type(None)
PLACES = ("features", "like", "head.prompts", "head.tokenizer")
"""Settings of runs that may name a file or folder of a user."""
_ROOTED = re.compile(r"[/~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\")


def overlay(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return a copy of `config` in which the settings named by `changes` ("a.b": value) have new values.

    Lists become tuples and ints become floats where the field says so; nothing else is converted.

    Raises:
        ConfigError: no such setting, a value of another type, or a value that the config itself refuses.
    """
    return _overlay(config, changes, "")


def _overlay(config: Any, changes: Mapping[str, Any], prefix: str) -> Any:
    kinds = get_type_hints(type(config))
    groups: dict[str, dict[str, Any]] = {}
    fitted: dict[str, Any] = {}
    for name, value in changes.items():
        head, dot, rest = name.partition(".")
        if head not in kinds:
            raise ConfigError(f"unknown setting '{prefix}{head}'", hint=closest(head, list(kinds)))
        group = dataclasses.is_dataclass(getattr(config, head))
        left_out = value in (None, "none") and NoneType in get_args(kinds[head])
        if not dot and group and not left_out and not dataclasses.is_dataclass(value):
            parts = [field.name for field in dataclasses.fields(getattr(config, head))]
            raise ConfigError(
                f"'{prefix}{head}' is a group of settings, got {value!r}",
                hint=f"set one: {head}.{f', {head}.'.join(parts)}",
            )
        if not dot:
            fitted[head] = _fit(prefix + head, kinds[head], value)
        elif not group:
            raise ConfigError(f"'{prefix}{head}' is one value, not a group, so '{prefix}{name}' is unknown")
        else:
            groups.setdefault(head, {})[rest] = value
    for head, inner in groups.items():
        fitted[head] = _overlay(fitted.get(head, getattr(config, head)), inner, f"{prefix}{head}.")
    try:
        return dataclasses.replace(config, **fitted)
    except ValueError as error:
        problem = f"{prefix.rstrip('.')}: {error}" if prefix else str(error)
        raise ConfigError(problem, hint=_another(prefix, list(fitted), str(error))) from error


def _another(prefix: str, names: Sequence[str], problem: str) -> str:
    """What to do where a config refuses what was set; of several settings the message may say which one it was."""
    said = re.split(r"[^\w.]", problem, maxsplit=1)[0].rpartition(".")[2]
    name = said if said in names else names[0] if len(names) == 1 else ""
    return f"give '{prefix}{name}' another value, or leave it out" if name else ""


def _fit(name: str, kind: Any, value: Any) -> Any:
    """Check `value` against the annotation `kind`, and give it back in that type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _fit_any(name, kind, value)
    if origin is Literal:
        if value not in inner or isinstance(value, bool) not in {isinstance(option, bool) for option in inner}:
            options = ", ".join(map(repr, inner))
            hint = closest(str(value), [str(option) for option in inner])
            raise ConfigError(f"{name} must be one of {options}, got {value!r}", hint=hint)
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        if len(value) != len(kinds):
            raise ConfigError(f"{name} must have {len(kinds)} values, got {len(value)}: {value!r}")
        return tuple(
            _fit(f"{name}[{at}]", each, item) for at, (each, item) in enumerate(zip(kinds, value, strict=True))
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is NoneType and value in (None, "none"):
        return None
    if kind is Any or (
        isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) <= (kind is bool)
    ):
        return value
    raise ConfigError(f"{name} must be {_spell(kind)}, got {value!r}")


def _fit_any(name: str, kind: Any, value: Any) -> Any:
    # None first, because the word "none" would fit `str` too; float last, because it would swallow an int.
    for option in sorted(get_args(kind), key=lambda option: (option is not NoneType, option is float)):
        try:
            return _fit(name, option, value)
        except ConfigError:
            continue
    raise ConfigError(f"{name} must be {_spell(kind)}, got {value!r}")


def _spell(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_spell(option) for option in get_args(kind))
    if get_origin(kind) is tuple:
        # Whoever types a setting knows no tuples; the quotes keep a shell's hands off the brackets.
        return f"a list such as '{_write_value(_example(kind))}'"
    return "none" if kind is NoneType else kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def _example(kind: Any) -> Any:
    """A value that a list or one of its parts could have."""
    inner = get_args(kind)
    if get_origin(kind) is tuple:
        return tuple(map(_example, inner[:1] * 2 if inner[1:] == (...,) else inner))
    if get_origin(kind) in (Union, types.UnionType):
        return _example(next(option for option in inner if option is not NoneType))
    if get_origin(kind) is Literal:
        return inner[0]
    return {bool: True, int: 1, float: 0.5}.get(kind, "NAME")


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Read `a.b=value` words of a command line. Values are TOML; a bare word is a text.

    >>> parse_assignments(["optim.lr=1e-3", "views.size=[16, 16, 16]", "mode=probe"])
    {'optim.lr': 0.001, 'views.size': [16, 16, 16], 'mode': 'probe'}

    Raises:
        ConfigError: a word without `=`, or a setting given twice.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise ConfigError(
                f"cannot read the setting '{assignment}'", hint="write name=value, such as optim.lr=0.001"
            )
        if name.strip() in changes:
            raise ConfigError(f"setting '{name.strip()}' is given twice", hint="keep one of them")
        changes[name.strip()] = _parse_value(text.strip())
    return changes


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"]
    return value if len(parsed) == 1 and isinstance(value, bool | int | float | str | list) else text


def read_toml(path: Path) -> dict[str, Any]:
    """Read the differences that a TOML file holds, as dotted names and values.

    Raises:
        ConfigError: the file is absent or is not TOML.
    """
    try:
        return _flat(tomllib.loads(path.read_text(encoding="utf-8")), "")
    except FileNotFoundError as error:
        raise ConfigError(f"there is no config file '{path.name}'", hint="check the path after --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file '{path.name}' is not TOML: {error}") from error


def _flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def flatten(config: Any) -> dict[str, Any]:
    """List every setting of a config by its dotted name."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        group = dataclasses.is_dataclass(value)
        flat |= (
            {f"{field.name}.{name}": inner for name, inner in flatten(value).items()} if group else {field.name: value}
        )
    return flat


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings for others to read: of what a user keeps somewhere (`PLACES`, `….source`), its name alone.

    So of every other text that begins as a path does, here or under Windows. `hub:owner/name` is everybody's.
    """

    def told(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value.startswith("hub:"):
            return value
        kept = name in PLACES or name.endswith(".source") or _ROOTED.match(value)
        return PureWindowsPath(value).name if kept else value  # it parts at both kinds of slash

    return {name: told(name, value) for name, value in settings.items()}


def to_toml(config: Any) -> str:
    """Write every setting, one a line, spelt as on the command line; `read_toml` and `overlay` replay it exactly."""
    return "".join(f"{name} = {text}\n" for name, text in spelt(flatten(config)).items())


def spelt(settings: Mapping[str, Any]) -> dict[str, str]:
    """The values of flat settings as TOML and the command line spell them.

    Raises:
        ConfigError: a value that cannot be written.
    """
    return {name: _write_value(value) for name, value in settings.items()}


def _write_value(value: Any) -> str:
    match value:
        case None:
            return '"none"'
        case bool():
            return str(value).lower()
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's text, except for DEL
        case int():
            return str(value)
        case float():
            return repr(value) if math.isfinite(value) else str(value)
        case list() | tuple():
            return f"[{', '.join(map(_write_value, value))}]"
        case _:
            raise ConfigError(f"a {type(value).__name__} cannot be written as a setting")
