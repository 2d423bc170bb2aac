from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from voxelstem import components
from voxelstem.components import Component, survey

OBLIQUE = np.array([[0.8, -0.3, 0.0], [0.2, -0.6, 0.4], [0.0, 0.1, 2.5]])


def naive(mask: np.ndarray, directions: np.ndarray) -> Component:
    """One set of voxels, by a list of them."""
    voxels = np.argwhere(mask)
    along = voxels @ directions.T
    i, j, k = voxels.mean(axis=0).tolist()
    (low_a, low_b, low_c), (high_a, high_b, high_c) = along.min(axis=0).tolist(), along.max(axis=0).tolist()
    return Component(voxels=len(voxels), centre_ijk=(i, j, k), low=(low_a, low_b, low_c), high=(high_a, high_b, high_c))


def naive_components(labels: np.ndarray, value: int, directions: np.ndarray) -> list[Component]:
    """Class by class, as scipy labels a mask; its numbers run in C order."""
    pieces, count = ndimage.label(labels == value, np.ones((3, 3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
    return [naive(pieces == number, directions) for number in range(1, count + 1)]


def check(found: Component, wanted: Component) -> None:
    assert found.voxels == wanted.voxels
    for one, other in ((found.centre_ijk, wanted.centre_ijk), (found.low, wanted.low), (found.high, wanted.high)):
        np.testing.assert_allclose(one, other, atol=1e-9)


@settings(max_examples=150, deadline=None)
@given(
    labels=hnp.arrays(
        np.int16,
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
        elements=st.sampled_from([0, 0, 1, 2, 5]),
    ),
    least=st.integers(0, 4),
    most=st.integers(0, 3),
)
def test_one_pass_finds_what_labelling_class_by_class_finds(labels: np.ndarray, least: int, most: int) -> None:
    found = survey(labels, OBLIQUE, least=least, most=most)
    assert set(found) == {int(value) for value in np.unique(labels)} - {0}
    for value, one in found.items():
        wanted = naive_components(labels, value, OBLIQUE)
        large = [piece for piece in wanted if piece.voxels >= least]
        check(one.whole, naive(labels == value, OBLIQUE))
        assert (one.count, one.large) == (len(wanted), len(large))
        assert one.largest == max(piece.voxels for piece in wanted)
        # Of equal ones the first in C order: `sorted` is stable.
        listed = sorted(large, key=lambda piece: -piece.voxels)[:most]
        assert len(one.listed) == len(listed)
        for piece, other in zip(one.listed, listed, strict=True):
            check(piece, other)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_noise_of_many_classes_is_surveyed_in_any_type_and_order_of_memory(kind: type, order: str) -> None:
    noise = np.random.default_rng(0).integers(0, 40, (14, 17, 19))
    labels = np.asarray(np.repeat(noise, 2, axis=2), dtype=kind, order=order)  # pyright: ignore[reportArgumentType, reportCallIssue]
    found = survey(labels, np.eye(3), least=1, most=1000)
    for value in range(1, 40):
        wanted = sorted(naive_components(labels, value, np.eye(3)), key=lambda piece: -piece.voxels)
        assert found[value].count == len(wanted)
        for piece, other in zip(found[value].listed, wanted, strict=True):
            check(piece, other)


def test_the_largest_are_kept_however_often_room_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(1).integers(0, 4, (12, 12, 12)).astype(np.int16)
    labels[:, ::2] = 0
    at_once = survey(labels, np.eye(3), least=1, most=5)
    monkeypatch.setattr(components, "MOST_WAITING", 3)
    assert survey(labels, np.eye(3), least=1, most=5) == at_once


def test_a_spiral_that_meets_itself_last_is_one_component() -> None:
    labels = np.zeros((5, 9, 9), np.int16)
    labels[0, 0, 0] = labels[0, 8, 8] = 1  # begins as two
    labels[1:4, 0, 0] = labels[1:4, 8, 8] = 1
    labels[4, 0] = 1
    labels[4, :, 8] = 1
    (only,) = survey(labels, np.eye(3), least=1, most=9)[1].listed
    assert only.voxels == (labels == 1).sum()


def test_another_class_between_two_corners_does_not_part_them() -> None:
    plane = np.array([[[1, 2], [2, 1]]], np.int16)
    found = survey(plane, np.eye(3), least=1, most=9)
    assert [found[value].count for value in (1, 2)] == [1, 1]


def test_a_map_of_background_holds_nothing() -> None:
    assert survey(np.zeros((3, 4, 5), np.uint8), np.eye(3), least=1, most=9) == {}
