from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from voxelstem.resampling import resample
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store.likeness import UNLIKE, Likeness, Sketch, compare, sketch


def scan(seed: int = 0, phase: str = "none", spacing: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    config = PhantomConfig(seed=seed, phase=phase, spacing_mm=(spacing, spacing, 5.0))  # pyright: ignore[reportArgumentType]
    volume = phantom(config).volumes[0]
    return volume.array, volume.affine_ras


@pytest.fixture(scope="module")
def one() -> tuple[np.ndarray, np.ndarray]:
    return scan()


def like(one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray], modality: str = "CT") -> Likeness:
    return compare(sketch(*one, modality), sketch(*two, modality))


def test_a_scan_is_like_itself(one):
    found = like(one, one)
    assert found.correlation == pytest.approx(1.0, abs=1e-3)
    assert found.difference < 0.01
    assert found.overlap == 1.0


def test_a_sketch_is_small_and_keeps_the_extent(one):
    drawn = sketch(*one, "CT")
    assert drawn.array.nbytes <= 2.5e6
    extent = np.array(one[0].shape[1:]) * [3.0, 3.0, 5.0]
    assert np.array(drawn.array.shape) * drawn.edge_mm == pytest.approx(extent, rel=0.03)
    large = sketch(np.zeros((1, 300, 200, 100), np.float32), np.diag([1.0, 1.0, 3.0, 1.0]), "MR")
    assert large.array.nbytes <= 2.5e6


@pytest.mark.parametrize("change", ["finer", "coarser", "noise", "kernel", "offset", "crop", "gain"])
def test_copies_differ_less_than_any_other_phase(one, change):
    array, affine = one
    rng = np.random.default_rng(0)
    copies = {
        "finer": lambda: resample(array, affine, (2.0, 2.0, 3.5)),
        "coarser": lambda: resample(array, affine, (6.0, 5.0, 5.0)),
        "noise": lambda: ((array + rng.normal(0, 30, array.shape)).astype(np.float32), affine),
        "kernel": lambda: (ndimage.gaussian_filter(array, [0, 1, 1, 0.6]), affine),
        "offset": lambda: (array + 30, affine),
        "crop": lambda: (np.ascontiguousarray(array[:, 7:-9, 5:, :-11]), affine),
        "gain": lambda: (array * 1.1 - 20, affine),
    }
    found = like(one, copies[change]())
    assert found.correlation > 0.95
    assert found.difference < 0.3
    assert found.overlap > 0.97


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_another_phase_of_one_patient_differs_in_tissue_though_its_details_agree(seed):
    found = like(scan(seed), scan(seed, "portal"))
    assert found.correlation > 0.95
    assert found.difference > 0.6


def test_another_patient_differs(one):
    found = like(one, scan(1))
    assert found.correlation < 0.9
    assert found.difference > 0.6


def test_a_crop_is_found_wherever_it_lies_and_whatever_its_header_says(one):
    array, affine = one
    box = array[:, 20:80, 10:60, 30:70]
    moved = affine.copy()
    moved[:3, 3] += 1000
    found = like(one, (np.ascontiguousarray(box), moved))
    assert found.correlation > 0.95
    assert found.overlap > 0.97


def test_two_halves_share_what_both_show(one):
    array, affine = one
    size = array.shape[3]
    lower, upper = array[..., : round(0.7 * size)], array[..., round(0.1 * size) :]
    found = like((np.ascontiguousarray(lower), affine), (np.ascontiguousarray(upper), affine))
    assert found.overlap == pytest.approx(0.6 / 0.7, abs=0.05)
    assert found.correlation > 0.95


def test_an_inverted_scan_is_no_copy(one):
    array, affine = one
    assert like(one, (-array, affine), "MR").difference > 1


def test_nothing_is_like_a_volume_of_one_value_or_another_modality(one):
    array, affine = one
    assert like(one, (np.zeros_like(array), affine)) == UNLIKE
    assert like((np.zeros_like(array), affine), (np.zeros_like(array), affine), "MR") == UNLIKE
    assert compare(sketch(array, affine, "CT"), sketch(array, affine, "MR")) == UNLIKE


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 3), (40, 40, 1), (3, 200, 2)])
def test_odd_shapes_are_compared_or_left_but_never_break(shape):
    rng = np.random.default_rng(0)
    array = rng.normal(40, 60, (1, *shape)).astype(np.float32)
    found = compare(sketch(array, np.eye(4), "CT"), sketch(scan()[0], np.eye(4), "CT"))
    assert found.difference > 0.4
    assert not math.isnan(found.correlation)
    same = compare(sketch(array, np.eye(4), "CT"), sketch(array, np.eye(4), "CT"))
    assert same == UNLIKE or same.difference == math.inf or same.difference < 0.05


def test_comparing_is_the_same_both_ways(one):
    array, affine = one
    crop = np.ascontiguousarray(array[:, 10:-10]), affine
    there, back = like(one, crop), like(crop, one)
    assert there.correlation == pytest.approx(back.correlation, abs=0.03)
    assert there.overlap == pytest.approx(back.overlap, abs=0.05)


def test_a_part_of_a_cell_of_misplacement_is_made_good():
    rng = np.random.default_rng(1)
    smooth = ndimage.gaussian_filter(rng.normal(0, 1, (96, 96, 96)), 3).astype(np.float32)
    smooth *= 60 / smooth.std()
    first = Sketch(modality="CT", array=smooth[:-3, :-3, :-3], edge_mm=(1.0, 1.0, 1.0))
    second = Sketch(modality="CT", array=smooth[2:-1, 1:-2, 1:-2], edge_mm=(1.0, 1.0, 1.0))
    assert compare(first, second).difference < 0.1
