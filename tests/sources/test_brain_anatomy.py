from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from voxelstem.sources.brain import BrainConfig, invent
from voxelstem.sources.brain_anatomy import (
    CLASSES,
    HIPPOCAMPUS_MM,
    INSIDE,
    VALUE,
    VENTRICLE_SHAPE,
    Waves,
    draw_blob,
    paint,
)

AXES = tuple(np.arange(-80.0, 80.1, 4.0) for _ in range(3))


@pytest.fixture
def head():
    return invent(BrainConfig(seed=1, pathology="none"))[1]


def still(head):
    """The same head before the bending."""
    flat = replace(head.folds, amplitude=0.0)
    return replace(head, bend=(flat, flat, flat), folds=flat)


def test_waves_are_their_sum_at_every_place():
    waves = Waves.draw(np.random.default_rng(0), length_mm=(20.0, 60.0), amplitude=2.0, count=5)
    axes = (np.array([-3.0, 1.0]), np.array([0.0, 7.0, 9.0]), np.array([2.0]))
    found = waves(axes)
    for at in np.ndindex(2, 3, 1):
        place = np.array([axis[index] for axis, index in zip(axes, at, strict=True)])
        terms = [np.cos(vector @ place + phase) for vector, phase in zip(waves.vectors, waves.phases, strict=True)]
        assert found[at] == pytest.approx(2.0 * np.sqrt(2 / 5) * sum(terms), abs=1e-4)


def test_waves_have_the_spread_and_the_lengths_that_were_asked_for():
    waves = Waves.draw(np.random.default_rng(1), length_mm=(20.0, 60.0), amplitude=2.0, count=40)
    wide = tuple(np.arange(0.0, 600.0, 13.0) for _ in range(3))
    assert waves(wide).std() == pytest.approx(2.0, rel=0.15)
    lengths = 2 * np.pi / np.linalg.norm(waves.vectors, axis=1)
    assert lengths.min() >= 20.0
    assert lengths.max() <= 60.0


def test_unbent_structures_have_the_volumes_that_the_head_says(head):
    fine = tuple(np.arange(-80.0, 80.0, 1.5) for _ in range(3))
    place = still(head).place(fine)
    voxel = 1.5**3
    ventricles = (head.ventricle_level(place) < 1.0).sum() * voxel
    assert ventricles == pytest.approx(head.ventricles_mm3, rel=0.02)
    for name, size in head.hippocampi_mm3.items():
        assert (head.hippocampus_level(place, name) < 1.0).sum() * voxel == pytest.approx(size, rel=0.05)
    assert (head.depth_mm(place) > 0).sum() * voxel == pytest.approx(head.intracranial_mm3, rel=0.02)


def test_the_bending_moves_every_structure_and_tears_nothing(head):
    assert (paint(head, AXES).label != paint(still(head), AXES).label).mean() > 0.03
    for axis, wave in enumerate(head.bend):
        slope = np.gradient(wave(AXES), AXES[axis], axis=axis)
        # Below 1 the order of places along the axis stays.
        assert np.abs(slope).max() < 1.0


def test_structures_of_all_ages_lie_apart_and_inside_the_skull():
    for seed, age in ((0, 20.0), (1, 85.0), (2, 85.0)):
        head = invent(BrainConfig(seed=seed, age_years=age, session=3, ventricle_growth=0.12))[1]
        place = head.place(AXES)
        ventricles, depth = head.ventricle_level(place) < 1.0, head.depth_mm(place)
        assert not (ventricles & (depth < 0)).any()
        for name in head.hippocampi_mm3:
            found = head.hippocampus_level(place, name) < 1.0
            assert found.any()
            assert (found & ventricles).sum() < 0.2 * found.sum()
            assert not (found & (depth < 0)).any()


def test_a_lesion_is_drawn_in_the_label_and_not_in_the_tissue(head):
    ill = replace(head, blob=draw_blob(head, np.random.default_rng(3)))
    painted, healthy = paint(ill, AXES), paint(head, AXES)
    assert (painted.tissue == healthy.label).all()
    changed = painted.label != painted.tissue
    assert changed.sum() > 20
    assert (painted.label[changed] == VALUE["lesion"]).all()


def test_no_lesion_touches_ventricles_or_hippocampi():
    for seed in range(10):
        _, head = invent(BrainConfig(seed=seed, pathology="infarct"))
        place = head.place(AXES)
        x, y, z = (along - middle for along, middle in zip(place, head.blob.centre_mm, strict=True))
        ball = x**2 + y**2 + z**2 < head.blob.radius_mm**2
        others = head.ventricle_level(place) < 1.0
        for name in head.hippocampi_mm3:
            others |= head.hippocampus_level(place, name) < 1.0
        assert ball.any()
        assert not (ball & others).any()


def test_a_head_without_white_matter_has_no_place_for_a_lesion(head):
    with pytest.raises(ValueError, match="no place in the white matter"):
        draw_blob(replace(head, cortex_mm=80.0), np.random.default_rng(0))


def test_names_and_shapes_fit_together():
    assert set(INSIDE) < set(CLASSES.values())
    assert list(CLASSES) == list(range(1, 10))
    assert max(VENTRICLE_SHAPE) == 1.0
    assert len(HIPPOCAMPUS_MM) == 3
