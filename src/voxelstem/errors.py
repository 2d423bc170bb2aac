"""What can go wrong, said in one clear sentence: the cause first, then the next step."""

from __future__ import annotations

from typing import Any


class VoxelstemError(Exception):
    """A problem that the user can act on.

    The command line prints `problem` and `hint` without a traceback and ends with exit code 2.
    """

    def __init__(self, problem: str, *, hint: str = "") -> None:
        """Keep the sentence about the cause and the one about the next step apart."""
        super().__init__(problem)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        """Both sentences, for logs and the terminal."""
        return f"{self.problem}\n  hint: {self.hint}" if self.hint else self.problem

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel whole between processes: the usual way would forget what is given by keyword."""
        return _rebuild, (type(self), self.args, self.__dict__)


class ConfigError(VoxelstemError):
    """A setting, a name or an argument is wrong."""


class IngestError(VoxelstemError):
    """A source was refused. `code` is the short reason that the ledger counts."""

    def __init__(self, problem: str, *, code: str, hint: str = "") -> None:
        """Refuse with a reason `code` such as `corrupt` or `not-3d`."""
        super().__init__(problem, hint=hint)
        self.code = code


class StoreError(VoxelstemError):
    """A store cannot be opened, read or written. `code` is there where the values of a scan are at fault."""

    def __init__(self, problem: str, *, hint: str = "", code: str = "") -> None:
        """`code` is the reason by which doors refuse such values, `z-scored` for one."""
        super().__init__(problem, hint=hint)
        self.code = code


class CheckpointError(VoxelstemError):
    """A checkpoint or a weights folder is absent, damaged or of another shape."""


class AuditError(VoxelstemError):
    """An evaluation would not be honest: leakage, no held-out subjects, one class only."""


def _rebuild(kind: type[VoxelstemError], args: tuple[Any, ...], state: dict[str, Any]) -> VoxelstemError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error
