"""Our network with SPECTRE's weights says what `spectre-fm` 0.2.1 says. Its answers lie in `golden/spectre.npz`."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def opened(name: str) -> ModuleType:
    """A module of `tests/golden`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


cases = opened("cases")
ours = opened("ours")
ANSWERS = np.load(cases.ANSWERS)
SHAPES = json.loads(cases.SHAPES.read_text())["shapes"]


def agree(answers: Iterable[tuple[str, Tensor]], within: float = cases.TOLERANCE) -> list[str]:
    """Compare with the peer's answers; gives back whose were compared."""
    apart = {name: cases.distance(cases.digest(answer), ANSWERS[name]) for name, answer in answers}
    far = {name: value for name, value in apart.items() if not value <= within}
    assert not far, f"further than {within} from spectre-fm: {far}"
    return list(apart)


@pytest.fixture(scope="module")
def small():
    return ours.network("small", SHAPES)


def test_a_scan_is_windowed_cut_and_ordered_as_by_the_peer():
    names = agree(ours.windowing(), within=1e-7)  # what float32 loses in the kept means
    assert len(names) == 3 * len(cases.WINDOWED)


def test_positions_turn_queries_as_in_the_peer():
    assert len(agree(ours.turned())) == len(cases.TURNED)


def test_the_periods_of_the_peer_are_the_formula():
    for grid, head_dim, base in cases.TURNED:
        kept = ANSWERS[f"periods/{grid}/{head_dim}/{base}"][3:]
        np.testing.assert_allclose(cases.periods(head_dim, base).numpy(), kept, rtol=1e-6)


def test_both_heads_project_as_the_peer_s():
    assert agree(ours.heads(SHAPES)) == ["image_head", "text_head"]


def test_small_s_backbone_and_combiner_answer_as_the_peer_s(small):
    names = agree(ours.answers("small", small))
    assert len(names) == len(cases.BLOCKS) + len(cases.EPSILONS) * len(cases.GRIDS)


def test_the_epsilon_of_the_scan_level_tells(small):
    """Otherwise the test above could not notice a wrong one."""
    both = [
        [answer for name, answer in ours.answers("small", small, blocks=()) if f"/{eps}/" in name]
        for eps in (1e-5, 1e-6)
    ]
    for loose, tight in zip(*both, strict=True):
        assert cases.distance(cases.digest(loose), cases.digest(tight)) > 10 * cases.TOLERANCE


@pytest.mark.parametrize("shape", cases.SCANS)
def test_a_whole_scan_is_embedded_as_by_the_peer(small, shape):
    agree(ours.scans("small", small, shapes=[shape]))


def test_large_answers_as_the_peer_s_on_small_blocks():
    agree(ours.answers("large", ours.network("large", SHAPES), blocks=cases.BLOCKS[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["base", "large"])
def test_larger_sizes_answer_as_the_peer_s(size):
    network = ours.network(size, SHAPES)
    agree(ours.answers(size, network))
    agree(ours.scans(size, network, shapes=cases.SCANS[1:]))


def test_numbers_drawn_from_names_never_change():
    drawn = cases.uniform("a name", 6)
    np.testing.assert_array_equal(drawn, cases.uniform("a name", 8)[:6])
    np.testing.assert_array_equal(32768 * drawn, [-7272, 7838, -6238, 12930, 20517, -6687])
    many = cases.uniform("many", 100_000)
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 3**-0.5) < 0.01
