"""Read a prompt set: for each class several ways to say that it is there, and that it is not.

A set is a TOML file. `name`, `version` and `language` stand first, `about` says in a sentence what it is for; then a
table for each class with `positive` and `negative` (a class that is one of several may leave `negative` out), and
`[sides]` with the classes that change places when left and right do. A result quotes name, version and SHA-256.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxelstem.errors import ConfigError
from voxelstem.table import closest

NAMES = ("abdomen", "ct_rate", "phantom")
"""The sets that come with the package."""
SHOWN = 16
"""Letters of a digest in words for people."""
_HEADER = ("name", "version", "language", "about", "sides")
_EXAMPLE = '[effusion]\npositive = ["There is pleural effusion."]\nnegative = ["No pleural effusion."]'


@dataclass(frozen=True, kw_only=True, slots=True)
class Ensemble:
    """Ways to say one thing and its opposite; the order means nothing."""

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()
    """Empty where the class is one of several that exclude one another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """A prompt set. `sha256` is the digest of the file's bytes: `sha256sum` of the file gives the same."""

    name: str
    version: int
    language: str
    about: str
    sha256: str
    ensembles: Mapping[str, Ensemble]
    """By class, in the file's order."""
    sides: Mapping[str, tuple[str, str]]
    """What has two sides: its classes for the patient's left and right."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the file's order."""
        return tuple(self.ensembles)

    @property
    def count(self) -> int:
        """How many prompts there are."""
        return sum(len(said.positive) + len(said.negative) for said in self.ensembles.values())

    def __str__(self) -> str:
        """`ct_rate v1 (sha256 0123456789abcdef)`."""
        return f"{self.name} v{self.version} (sha256 {self.sha256[:SHOWN]})"

    def spelt(self, name: str) -> str:
        """The class that `name` means: letters' case, blanks and hyphens do not matter, `Lung nodule` is `lung_nodule`.

        Raises:
            ConfigError: there is no such class; the hint names the closest.
        """
        same = "_".join(name.lower().replace("-", " ").replace("_", " ").split())
        if same not in self.ensembles:
            raise ConfigError(
                f"'{name}' is no class of the prompt set {self.name}", hint=closest(same, [*self.classes])
            )
        return same

    def only(self, names: Sequence[str]) -> dict[str, Ensemble]:
        """The ensembles of these classes, in this order.

        Raises:
            ConfigError: there is no such class, or one is named twice.
        """
        chosen = [self.spelt(name) for name in names]
        for at, name in enumerate(chosen):
            if name in chosen[:at]:
                raise ConfigError(f"the class '{name}' is named twice", hint="name it once")
        return {name: self.ensembles[name] for name in chosen}


def read_prompts(source: str | Path) -> Prompts:
    """Read a prompt set of the package by its name, or one of your own by its path (`.toml`).

    Raises:
        ConfigError: no such set or file, it is not TOML, or a part of it is missing or not what it should be.
    """
    path = Path(source)
    if path.suffix != ".toml":
        if str(source) not in NAMES:
            raise ConfigError(
                f"there is no prompt set '{source}'", hint=f"{closest(str(source), list(NAMES))} Or give a .toml file"
            )
        path = Path(__file__).with_name(f"{source}.toml")
    try:
        data = path.read_bytes()
        table = tomllib.loads(data.decode("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no prompt file '{path.name}'", hint="check the path") from error
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}", hint="check the file's rights") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not TOML: {error}", hint=f"a class is written so: {_EXAMPLE}") from error
    ensembles = {name: _ensemble(path.name, name, said) for name, said in table.items() if name not in _HEADER}
    if not ensembles:
        raise ConfigError(f"{path.name} names no class", hint=f"a class is written so: {_EXAMPLE}")
    return Prompts(
        name=_header(path.name, table, "name", str),
        version=_header(path.name, table, "version", int),
        language=_header(path.name, table, "language", str),
        about=_header(path.name, table, "about", str),
        sha256=hashlib.sha256(data).hexdigest(),
        ensembles=ensembles,
        sides=_sides(path.name, table.get("sides", {}), ensembles),
    )


def _header(file: str, table: Mapping[str, Any], name: str, kind: type) -> Any:
    value = table.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) or not value or (kind is int and value < 1):
        wanted = "a whole number from 1" if kind is int else "a text"
        raise ConfigError(f"{file}: '{name}' must be {wanted}", hint="it stands above the first [class]")
    return value


def _ensemble(file: str, name: str, said: Any) -> Ensemble:
    if not isinstance(said, dict):
        raise ConfigError(f"{file}: unknown word '{name}'", hint=closest(name, list(_HEADER)))
    if name != "_".join(name.lower().replace("-", " ").split()):
        raise ConfigError(f"{file}: the class '{name}' is not one lower-case word", hint="write lung_nodule")
    for word in said:
        if word not in ("positive", "negative"):
            raise ConfigError(f"{file}: [{name}] has no '{word}'", hint=closest(word, ["positive", "negative"]))
    ensemble = Ensemble(positive=_texts(file, name, said, "positive"), negative=_texts(file, name, said, "negative"))
    if not ensemble.positive:
        raise ConfigError(f"{file}: [{name}] has no positive prompt", hint=f"write it so: {_EXAMPLE}")
    both = set(ensemble.positive) & set(ensemble.negative)
    if both:
        raise ConfigError(
            f"{file}: [{name}] says {len(both)} prompt(s) as positive and as negative", hint="a prompt says one thing"
        )
    return ensemble


def _texts(file: str, name: str, said: Mapping[str, Any], side: str) -> tuple[str, ...]:
    texts = said.get(side, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ConfigError(f"{file}: [{name}] {side} must be a list of texts, none empty", hint=f"write: {_EXAMPLE}")
    if len(set(texts)) < len(texts):
        raise ConfigError(f"{file}: [{name}] {side} holds a prompt twice", hint="it would count twice: keep one")
    return tuple(texts)


def _sides(file: str, table: Any, ensembles: Mapping[str, Ensemble]) -> dict[str, tuple[str, str]]:
    sides: dict[str, tuple[str, str]] = {}
    for what, pair in table.items() if isinstance(table, dict) else [("sides", None)]:
        if not isinstance(pair, list) or len(pair) != 2:  # noqa: PLR2004 - a left and a right
            raise ConfigError(
                f"{file}: [sides] {what} must name a left and a right class", hint='["a_left", "a_right"]'
            )
        for name in pair:
            if name not in ensembles:
                raise ConfigError(
                    f"{file}: [sides] names '{name}', which is no class of it", hint=closest(str(name), list(ensembles))
                )
        sides[what] = (str(pair[0]), str(pair[1]))
    return sides
