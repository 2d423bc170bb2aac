from __future__ import annotations

import dataclasses
import json
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem import strictjson


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    size: float
    kind: Literal["oak", "elm"] = "oak"

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("size must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    name: str
    at: tuple[float, float]
    leaves: tuple[Leaf, ...] = ()
    first: Leaf | None = None


numbers = st.floats(0, 1e6)
leaves = st.builds(Leaf, size=numbers, kind=st.sampled_from(["oak", "elm"]))


@given(
    st.builds(
        Tree,
        name=st.text(),
        at=st.tuples(numbers, numbers),
        leaves=st.lists(leaves, max_size=3).map(tuple),
        first=st.none() | leaves,
    )
)
def test_a_record_that_was_written_is_the_same_when_it_is_read(tree: Tree) -> None:
    text = json.dumps(dataclasses.asdict(tree), allow_nan=False)
    assert strictjson.build(Tree, strictjson.read(text), "tree") == tree


def test_a_whole_number_is_a_number_where_it_is_held_exactly() -> None:
    assert strictjson.build(float, 2**53, "x") == float(2**53)
    with pytest.raises(ValueError, match="x is of another type: int"):
        strictjson.build(float, 2**53 + 1, "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "a", "at": [1, 2], "leaves": []}', "tree lacks 'first'"),
        ('{"name": "a", "at": [1, 2], "leaves": [], "first": null, "root": 1}', "tree has 1 unknown fields"),
        ('{"name": 7, "at": [1, 2], "leaves": [], "first": null}', "tree.name is of another type: int"),
        ('{"name": "a", "at": [1], "leaves": [], "first": null}', "tree.at must have 2 values, got 1"),
        ('{"name": "a", "at": [1, true], "leaves": [], "first": null}', r"tree.at\[1\] is of another type: bool"),
        (
            '{"name": "a", "at": [1, 2], "leaves": [{"size": -1, "kind": "oak"}], "first": null}',
            r"tree.leaves\[0\]: size must not be negative",
        ),
        ('{"name": "a", "name": "b"}', "twice"),
        ('{"at": [NaN, 1]}', "NaN is no finite number"),
        ("[" * 100_000, "nested"),
        ("", "Expecting value"),
    ],
)
def test_what_was_not_written_from_a_record_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        strictjson.build(Tree, strictjson.read(text), "tree")
