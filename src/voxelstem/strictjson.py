"""JSON that was written from records, read back strictly: nothing missing, unknown, doubled or of another type."""

from __future__ import annotations

import dataclasses
import json
import types
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints


def read(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, a field is there twice, it is too deeply nested, or a number is NaN or infinite.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_once)
    except RecursionError as problem:
        raise ValueError("this JSON is too deeply nested") from problem


def build(kind: Any, told: Any, where: str) -> Any:
    """What was read from JSON, as the annotation `kind` says; `where` is what messages call it.

    Records, tuples, texts, numbers, words of a `Literal`, and any of these or None.

    Raises:
        ValueError: a field is missing or unknown, a value is of another type, or a record refuses it.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        return None if told is None else build(inner[0], told, where)
    if origin is Literal:
        kind = str
    if dataclasses.is_dataclass(kind) and isinstance(told, dict):
        return _record(kind, told, where)
    if origin is tuple and isinstance(told, list):
        kinds = inner[:1] * len(told) if inner[1:] == (...,) else inner
        if len(kinds) != len(told):
            raise ValueError(f"{where} must have {len(kinds)} values, got {len(told)}")
        return tuple(build(each, one, f"{where}[{at}]") for at, (each, one) in enumerate(zip(kinds, told, strict=True)))
    if kind is float and type(told) is int and abs(told) <= 2**53:  # what a float holds exactly
        return float(told)
    if isinstance(kind, type) and type(told) is kind:
        return told
    raise ValueError(f"{where} is of another type: {type(told).__name__}")


def _record(kind: Any, told: dict[str, Any], where: str) -> Any:
    kinds = get_type_hints(kind)
    for name in kinds:
        if name not in told:
            raise ValueError(f"{where} lacks '{name}'")
    if len(told) > len(kinds):
        raise ValueError(f"{where} has {len(told) - len(kinds)} unknown fields")
    built = {name: build(each, told[name], f"{where}.{name}") for name, each in kinds.items()}
    try:
        return kind(**built)
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from problem


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no finite number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    told = dict(pairs)
    if len(told) != len(pairs):
        raise ValueError("a field is there twice")
    return told
