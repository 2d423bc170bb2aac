from __future__ import annotations

import pickle

import pytest

from voxelstem import errors
from voxelstem.errors import ConfigError, IngestError, StoreError, VoxelstemError


def test_an_error_shows_the_cause_before_the_next_step():
    assert str(ConfigError("the cause", hint="the next step")) == "the cause\n  hint: the next step"


def test_an_error_without_a_hint_is_one_line():
    assert str(ConfigError("the cause")) == "the cause"


def test_a_refusal_carries_the_code_that_the_ledger_counts():
    refusal = IngestError("cut in half", code="corrupt", hint="fetch it again")
    assert (refusal.problem, refusal.code, refusal.hint) == ("cut in half", "corrupt", "fetch it again")


def test_a_refusal_needs_a_code():
    with pytest.raises(TypeError, match="code"):
        IngestError("cut in half")  # pyright: ignore[reportCallIssue]


def test_a_store_s_error_has_a_code_where_values_are_at_fault():
    assert StoreError("cut off").code == ""
    there = pickle.loads(pickle.dumps(StoreError("scored", code="z-scored", hint="give it raw")))
    assert (there.problem, there.code, there.hint) == ("scored", "z-scored", "give it raw")


def test_every_error_is_caught_at_the_one_door():
    kinds = [kind for name, kind in vars(errors).items() if name.endswith("Error")]
    assert len(kinds) >= 6
    assert all(issubclass(kind, VoxelstemError) for kind in kinds)
