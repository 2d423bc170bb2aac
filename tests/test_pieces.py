from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.clinic import WEIGHTS

from voxelstem.pieces import check_classes, measure, present

TURN = np.deg2rad(25.0)
STRAIGHT = np.array([[0.8, 0, 0, -10], [0, 0.6, 0, 5], [0, 0, 2.5, 30], [0, 0, 0, 1]])
OBLIQUE = np.array(
    [
        [0.8 * np.cos(TURN), -0.6 * np.sin(TURN), 0, -10],
        [0.8 * np.sin(TURN), 0.6 * np.cos(TURN), 0, 5],
        [0, 0, 2.5, 30],
        [0, 0, 0, 1],
    ]
)


def naive_pieces(mask):
    """One voxel after another: which voxels hang together by a face, an edge or a corner."""
    left = {tuple(map(int, at)) for at in np.argwhere(mask)}
    pieces = []
    while left:
        piece, waiting = set(), [min(left)]
        while waiting:
            at = waiting.pop()
            if at in left:
                left.remove(at)
                piece.add(at)
                steps = itertools.product((-1, 0, 1), repeat=3)
                waiting += [tuple(a + b for a, b in zip(at, step, strict=True)) for step in steps]
        pieces.append(piece)
    return pieces


def naive_place(voxels, affine):
    """Volume, centre and box of voxels, by all their corners."""
    middle = np.mean([affine[:3, :3] @ at + affine[:3, 3] for at in voxels], axis=0)
    corners = [
        affine[:3, :3] @ (np.array(at) + step) + affine[:3, 3]
        for at in voxels
        for step in itertools.product((-0.5, 0.5), repeat=3)
    ]
    edges = affine[:3, :3].T
    voxel_mm3 = abs(np.dot(edges[0], np.cross(edges[1], edges[2])))
    return len(voxels) * voxel_mm3, middle, np.min(corners, axis=0), np.max(corners, axis=0)


def check_place(place, voxels, affine):
    volume, middle, low, high = naive_place(voxels, affine)
    assert place.volume_mm3 == pytest.approx(volume)
    np.testing.assert_allclose(place.centre_ras_mm, middle, atol=1e-9)
    np.testing.assert_allclose(place.low_ras_mm, low, atol=1e-9)
    np.testing.assert_allclose(place.high_ras_mm, high, atol=1e-9)


@pytest.mark.parametrize("affine", [STRAIGHT, OBLIQUE], ids=["straight", "oblique"])
@settings(max_examples=40)
@given(hnp.arrays(np.int16, (5, 4, 6), elements=st.sampled_from([0, 0, 0, 1, 3])))
def test_every_class_and_piece_is_measured_as_by_hand(affine, labels):
    found = measure(labels, affine, {1: "liver", 3: "lesion"}, weights=WEIGHTS, least_mm3=0.0)
    for value, name in ((1, "liver"), (3, "lesion")):
        told = [one for one in found.findings if one.name == name]
        pieces = naive_pieces(labels == value)
        if not pieces:
            assert not told
            assert name in found.absent
            continue
        check_place(told[0].place, set().union(*pieces), affine)
        assert [one.part for one in told] == list(range(len(told)))
        assert len(told) == (1 if len(pieces) == 1 else 1 + len(pieces))
        for one in told[1:]:
            # Pieces of one size may come in any order: each must be one of them.
            match = [p for p in pieces if np.allclose(naive_place(p, affine)[1], one.place.centre_ras_mm)]
            check_place(one.place, match[0], affine)
        volumes = [one.place.volume_mm3 for one in told[1:]]
        assert volumes == sorted(volumes, reverse=True)


def test_pieces_below_the_limit_are_counted_but_not_listed():
    labels = np.zeros((10, 4, 4), np.int16)
    labels[0:3, 0, 0] = 1
    labels[5, 0, 0] = 1
    labels[7:9, 0, 0] = 1
    found = measure(labels, np.eye(4), {1: "lesion"}, weights=WEIGHTS, least_mm3=2.0)
    assert [(one.part, one.place.volume_mm3) for one in found.findings] == [(0, 6.0), (1, 3.0), (2, 2.0)]
    assert [one.what for one in found.unsaid] == ["lesion"]
    assert found.unsaid[0].why.startswith("its pieces smaller than 2 mm3 (1)")


def test_a_class_of_specks_is_not_found_and_the_reason_is_said():
    labels = np.zeros((10, 4, 4), np.int16)
    labels[::3, 0, 0] = 1
    found = measure(labels, np.eye(4), {1: "lesion"}, weights=WEIGHTS, least_mm3=2.0)
    assert not found.findings
    assert not found.absent
    assert found.unsaid[0].why == "its largest piece of 4 has 1 mm3, less than 2"


def test_only_so_many_pieces_are_listed():
    labels = np.zeros((20, 1, 1), np.int16)
    labels[::2] = 1
    found = measure(labels, np.eye(4), {1: "lesion"}, weights=WEIGHTS, least_mm3=0.0, most_parts=3)
    assert [one.part for one in found.findings] == [0, 1, 2, 3]
    assert found.unsaid[0].why.startswith("its further pieces (7)")


def test_a_mirrored_scan_has_positive_volumes():
    labels = np.ones((2, 2, 2), np.int16)
    found = measure(labels, np.diag([-1.0, 1.0, 2.0, 1.0]), {1: "liver"}, weights=WEIGHTS, least_mm3=0.0)
    assert found.findings[0].place.volume_mm3 == pytest.approx(16.0)


def test_an_empty_map_has_only_absent_classes():
    found = measure(np.zeros((2, 3, 4), np.uint8), np.eye(4), {2: "spleen", 1: "liver"}, weights=WEIGHTS, least_mm3=1.0)
    assert (found.findings, found.absent) == ((), ("liver", "spleen"))


@pytest.mark.parametrize(
    ("labels", "classes", "said"),
    [
        ([0, 1, 2], {1: "liver"}, "holds 2, which no class"),
        ([0, -1, 1], {1: "liver"}, "holds -1"),
        ([0, 1, 2], {1: "liver", 2: "liver"}, "one name"),
        ([0, 1, 1], {0: "background", 1: "liver"}, "0 is background"),
    ],
)
def test_a_label_map_whose_numbers_have_no_one_name_is_refused(labels, classes, said):
    array = np.array(labels, np.int16).reshape(3, 1, 1)
    with pytest.raises(ValueError, match=said):
        check_classes(array, classes)
    with pytest.raises(ValueError, match=said):
        measure(array, np.eye(4), classes, weights=WEIGHTS, least_mm3=0.0)


@given(hnp.arrays(np.int16, (3, 4, 2), elements=st.integers(0, 40)))
def test_the_numbers_that_occur_are_those_that_any_voxel_has(labels):
    assert present(labels) == {int(value) for value in labels.ravel() if value}


def test_limits_below_zero_and_bad_affines_are_refused():
    labels = np.zeros((2, 2, 2), np.int16)
    with pytest.raises(ValueError, match="negative"):
        measure(labels, np.eye(4), {}, weights=WEIGHTS, least_mm3=-1.0)
    with pytest.raises(ValueError, match="finite"):
        measure(labels, np.full((4, 4), np.nan), {}, weights=WEIGHTS, least_mm3=0.0)
