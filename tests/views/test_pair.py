from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem import geometry
from voxelstem.views.crop import ViewPlan
from voxelstem.views.pair import KINDS, PairConfig, carry_over

STRICT = {"least_overlap": 1.0, "tolerance_mm": 1e-6}


@dataclass
class Grid:
    shape_ijk: tuple[int, int, int]
    affine_ras: np.ndarray

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return geometry.spacing_mm(self.affine_ras)


def grid(shape=(40, 40, 40), spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), turn_deg: float = 0.0) -> Grid:
    angle = math.radians(turn_deg)
    turned = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turned * spacing
    affine[:3, 3] = origin
    return Grid(shape_ijk=shape, affine_ras=affine)


def plan(start=(10.0, 10.0, 10.0), extent=(16.0, 16.0, 16.0)) -> ViewPlan:
    return ViewPlan(start_mm=start, extent_mm=extent, size_ijk=(8, 8, 8))


def world(place_mm: np.ndarray, on: Grid) -> np.ndarray:
    """Where a point lies that is given in millimetres from the low corner of the first voxel."""
    return geometry.voxel_to_patient(place_mm[None] / on.spacing_mm - 0.5, on.affine_ras)[0]


numbers = st.floats(-30, 30, allow_nan=False)
spacings = st.tuples(*[st.floats(0.5, 3.0)] * 3)


@given(spacings, spacings, st.tuples(numbers, numbers, numbers), st.floats(-180, 180))
def test_both_boxes_have_the_same_corners_in_the_world(one, other, origin, turn):
    a, b = grid(spacing=one, turn_deg=turn), grid(spacing=other, origin=origin, turn_deg=turn)
    found = carry_over(plan(), a, b, least_overlap=0.0, tolerance_mm=1e-6)
    assert isinstance(found, ViewPlan)
    for corner in np.ndindex(2, 2, 2):
        there = [np.add(each.start_mm, np.multiply(corner, each.extent_mm)) for each in (plan(), found)]
        np.testing.assert_allclose(world(there[0], a), world(there[1], b), atol=1e-6)
    back = carry_over(found, b, a, least_overlap=0.0, tolerance_mm=1e-6)
    assert isinstance(back, ViewPlan)
    np.testing.assert_allclose(back.start_mm, plan().start_mm, atol=1e-6)


def test_a_scan_of_equal_geometry_keeps_the_box_and_its_size():
    assert carry_over(plan(), grid(), grid(), **STRICT) == plan()


def test_a_box_that_would_be_oblique_in_the_other_scan_is_refused():
    wide = {"least_overlap": 0.0, "tolerance_mm": 0.5}
    assert carry_over(plan(), grid(), grid(turn_deg=10), **wide) == "axes"
    # A corner that is 11.3 mm from the axis moves by 0.2 mm in one degree.
    assert isinstance(carry_over(plan(), grid(), grid(turn_deg=1), **wide), ViewPlan)
    assert carry_over(plan(), grid(), grid(turn_deg=1), least_overlap=0.0, tolerance_mm=0.1) == "axes"


def test_a_scan_that_does_not_cover_the_box_is_refused():
    moved = grid(origin=(18.0, 0.0, 0.0))
    assert carry_over(plan(), grid(), moved, **STRICT) == "field of view"
    # Half of the box's 16 mm is beyond the other scan's edge.
    assert isinstance(carry_over(plan(), grid(), moved, least_overlap=0.5, tolerance_mm=0.5), ViewPlan)
    assert carry_over(plan(), grid(), moved, least_overlap=0.51, tolerance_mm=0.5) == "field of view"
    assert carry_over(plan(), grid(), grid(origin=(500.0, 0, 0)), least_overlap=0.01, tolerance_mm=0.5) == (
        "field of view"
    )


def test_what_hangs_over_the_first_scan_need_not_be_in_the_second():
    over = plan(start=(-8.0, 10.0, 30.0))
    assert carry_over(over, grid(), grid(), **STRICT) == over
    assert carry_over(over, grid(), grid(origin=(1.0, 0, 0)), **STRICT) == "field of view"


@pytest.mark.parametrize(
    "wrong",
    [
        {"same_session": 0.5},
        {"same_session": 2.0, "any_scan": -1.0},
        {"contrasts": ("T1w", "t1W")},
        {"contrasts": ("",)},
        {"structures": ("thalamus", "thalamus")},
        {"structures": ("total intracranial",)},
        {"least_overlap": 1.5},
        {"tolerance_mm": -1.0},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be|need"):
        PairConfig(**wrong)


def test_kinds_are_drawn_by_their_shares_and_the_others_follow():
    config = PairConfig(same_session=0.25, other_session=0.75)
    rng = np.random.default_rng(0)
    orders = [config.order(rng) for _ in range(400)]
    assert set(orders) == {KINDS[:2], KINDS[1::-1]}
    assert 0.68 < sum(order[0] == "other_session" for order in orders) / 400 < 0.82


def test_a_contrast_that_the_recipe_does_not_name_has_no_index():
    config = PairConfig(contrasts=("T1w", "FLAIR"))
    assert (config.index("t1W"), config.index("FLAIR")) == (0.0, 1.0)
    assert math.isnan(config.index("DWI"))
    assert math.isnan(config.index(""))


def test_without_shares_there_is_no_second_scan():
    assert not PairConfig(same_session=0.0).paired
    assert PairConfig(same_session=0.0).wanted == ()
