from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from voxelstem.embedding import Embedding
from voxelstem.heads.bags import bag_of, kind_of


def embedded(blocks: int, *, tokens: bool = True) -> Embedding:
    rng = np.random.default_rng(blocks)
    return Embedding(
        scan=rng.normal(size=6).astype(np.float32),
        blocks=rng.normal(size=(blocks, 6)).astype(np.float32),
        grid=(1, 1, blocks),
        coverage=1.0,
        tokens=rng.normal(size=(2, 3, 4 * blocks, 5)).astype(np.float32) if tokens else None,
        tokens_affine_ras=np.eye(4) if tokens else None,
    )


@dataclass(frozen=True)
class Plain:
    """A baseline's features: tokens perhaps, no blocks."""

    scan: np.ndarray
    tokens: np.ndarray | None = None
    tokens_affine_ras: np.ndarray | None = None


def test_scans_of_several_blocks_are_bags_of_blocks_and_scans_of_one_are_bags_of_patches() -> None:
    assert kind_of([embedded(8), embedded(4), embedded(1)], "auto") == "blocks"
    assert kind_of([embedded(8), embedded(1)], "auto") == "tokens"
    assert kind_of([embedded(1), embedded(1)], "auto") == "tokens"


def test_what_is_asked_for_is_taken() -> None:
    assert kind_of([embedded(8)], "tokens") == "tokens"
    assert kind_of([embedded(1, tokens=False)], "blocks") == "blocks"


def test_a_baseline_has_bags_of_patches_where_it_has_patches_and_else_of_its_one_vector() -> None:
    assert kind_of([Plain(np.ones(3), np.ones((2, 2, 2, 3)))], "auto") == "tokens"
    for wanted in ("auto", "blocks", "tokens"):
        assert kind_of([Plain(np.ones(3))], wanted) == "scan"
    bag = bag_of(Plain(np.arange(3.0)), "scan")
    assert bag.grid == (1, 1, 1)
    np.testing.assert_array_equal(bag.members, [[0.0, 1.0, 2.0]])


def test_members_lie_in_the_order_of_their_grid() -> None:
    scan = embedded(2)
    assert scan.tokens is not None
    bag = bag_of(scan, "tokens")
    assert bag.grid == (2, 3, 8)
    np.testing.assert_array_equal(bag.members.reshape(*bag.grid, 5)[1, 2, 7], scan.tokens[1, 2, 7])
    blocks = bag_of(scan, "blocks")
    assert blocks.grid == (1, 1, 2)
    np.testing.assert_array_equal(blocks.members, scan.blocks)


def test_a_scan_of_one_block_whose_patches_were_not_kept_is_refused_and_not_averaged() -> None:
    with pytest.raises(ValueError, match="patch tokens here, and 1 of 2 scans have none"):
        kind_of([embedded(1), embedded(1, tokens=False)], "auto")
    with pytest.raises(ValueError, match="looks at patch tokens, and the scan has none"):
        bag_of(embedded(1, tokens=False), "tokens")


def test_what_has_no_blocks_cannot_be_looked_at_by_blocks() -> None:
    with pytest.raises(ValueError, match="blocks here, and 1 of 1 scans have none"):
        kind_of([Plain(np.ones(3), np.ones((2, 2, 2, 3)))], "blocks")
    with pytest.raises(ValueError, match="looks at blocks"):
        bag_of(Plain(np.ones(3)), "blocks")
    with pytest.raises(ValueError, match="at least one scan"):
        kind_of([], "auto")
