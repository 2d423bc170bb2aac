"""Names to classes: a table is data, so that adding a plug-in is one file and one line."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from voxelstem.errors import ConfigError


def closest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """Say which known name was probably meant, or list them all."""
    guess = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean '{guess[0]}'?" if guess else f"known: {', '.join(sorted(known))}"


class Table(Mapping[str, Any]):
    """Plug-ins of one kind by name, imported only when asked for.

    `entries` maps a name to "module:attribute". Packages outside this one add lines through the
    entry point group `voxelstem.<kind>`; a built-in name always wins over one from outside.
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        """Hold the lines; nothing is imported yet."""
        self.kind = kind
        self._entries = entries

    def _targets(self) -> dict[str, str]:
        outside = {point.name: point.value for point in entry_points(group=f"voxelstem.{self.kind}")}
        return outside | self._entries

    def __getitem__(self, name: str) -> Any:
        """Import and return the plug-in.

        Raises:
            ConfigError: no line has this name.
        """
        targets = self._targets()
        if name not in targets:
            raise ConfigError(f"unknown {self.kind} '{name}'", hint=closest(name, targets))
        module, _, attribute = targets[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        """Names, the built-in ones and those from outside."""
        return iter(self._targets())

    def __len__(self) -> int:
        """How many lines there are."""
        return len(self._targets())
