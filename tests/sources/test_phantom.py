from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem import geometry, sources
from voxelstem.errors import VoxelstemError
from voxelstem.sources.phantom import (
    ORIENTATIONS,
    PhantomConfig,
    phantom,
    phantom_anatomy,
    phantom_files,
    turn_from_ras,
)

COARSE = (6.0, 6.0, 8.0)


def test_the_same_seed_gives_the_same_bytes():
    config = PhantomConfig(seed=11, spacing_mm=COARSE)
    one, other = phantom(config).volumes[0], phantom(config).volumes[0]
    assert one.array.tobytes() == other.array.tobytes()
    assert one.provenance == other.provenance
    assert phantom(replace(config, seed=12)).volumes[0].provenance.sha256 != one.provenance.sha256


def test_the_patient_does_not_depend_on_the_scanner():
    fine = phantom_anatomy(PhantomConfig(seed=4, lesions=2))
    coarse = phantom_anatomy(PhantomConfig(seed=4, lesions=2, spacing_mm=COARSE, orientation="LPS", noise_hu=3.0))
    assert fine.lesions == coarse.lesions
    assert fine.hu == coarse.hu
    assert fine.body_mm == coarse.body_mm


def test_settling_one_choice_leaves_the_others_alone():
    free = phantom_anatomy(PhantomConfig(seed=6))
    settled = phantom_anatomy(PhantomConfig(seed=6, phase=free.phase, lesions=len(free.lesions)))
    assert settled.hu == free.hu
    assert settled.lesions == free.lesions


@pytest.mark.parametrize("seed", range(3))
def test_random_scans_have_the_size_of_clinical_ones(seed):
    volume = phantom(PhantomConfig(seed=seed)).volumes[0]
    assert 0.4e6 < volume.array.size < 3.2e6
    across, along, between = volume.spacing_mm
    assert across == along
    assert 1.5 <= across <= 3.05
    assert 2.0 <= between <= 5.05
    assert volume.modality == "CT"


def test_lesions_are_found_at_the_stated_place_in_the_patient():
    config = PhantomConfig(seed=3, lesions=1, lesion_radius_mm=(12.0, 14.0), spacing_mm=(3.0, 3.0, 3.0))
    lesion = phantom_anatomy(config).lesions[0]
    volume = phantom(config).volumes[0]
    found = geometry.voxel_to_patient(np.argwhere(volume.labels.array == 9).astype(float), volume.affine_ras)
    np.testing.assert_allclose(found.mean(axis=0), lesion.centre_ras_mm, atol=1.5)


@pytest.mark.parametrize("lesions", [0, 1, 3])
def test_facts_report_and_voxels_agree(lesions):
    study = phantom(PhantomConfig(seed=8, lesions=lesions, spleen="enlarged", phase="portal", spacing_mm=COARSE))
    assert study.labels == {"lesion": "yes" if lesions else "no", "spleen": "enlarged", "contrast": "yes"}
    assert (study.volumes[0].labels.array == 9).any() == bool(lesions)
    assert "splenomegaly" in study.report.text.lower()


def test_brightness_alone_does_not_tell_organs_apart_but_place_does():
    brightness: dict[int, list[float]] = {3: [], 4: [], 8: []}  # liver, spleen, heart
    sides: dict[int, list[float]] = {3: [], 4: [], 8: []}
    noise = []
    for seed in range(6):
        volume = phantom(PhantomConfig(seed=seed, phase="none", spacing_mm=COARSE)).volumes[0]
        for value in (3, 4, 8):
            inside = volume.array[0][volume.labels.array == value]
            brightness[value].append(inside.mean())
            noise.append(inside.std())
            sides[value].append((np.argwhere(volume.labels.array == value) / volume.shape_ijk).mean(axis=0)[0])
    assert np.ptp([np.mean(means) for means in brightness.values()]) < np.mean(noise)
    assert max(sides[4]) < 0.4 < min(sides[8])
    assert max(sides[8]) < 0.5 < min(sides[3])


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48
    assert {"RAS", "LPS", "PIR", "SAL"} <= set(ORIENTATIONS)


@settings(max_examples=48, deadline=None)
@given(orientation=st.sampled_from(ORIENTATIONS), seed=st.integers(0, 9))
def test_turning_to_ras_is_the_exact_way_back(orientation, seed):
    rng = np.random.default_rng(seed)
    array = rng.normal(size=(3, 4, 5))
    affine = np.diag([1.5, 2.0, 2.5, 1.0])
    affine[:3, 3] = [-10.0, 20.5, 300.25]
    turned, drawn = turn_from_ras(array, affine, orientation)
    assert geometry.orientation(drawn) == orientation
    back, again = geometry.to_ras(turned, drawn)
    np.testing.assert_array_equal(back, array)
    np.testing.assert_array_equal(again, affine)


def test_written_files_read_back_as_the_same_scan_and_labels(tmp_path):
    configs = [PhantomConfig(seed=seed, spacing_mm=COARSE) for seed in (0, 1, 2)]
    files = phantom_files(tmp_path, configs)
    found = list(sources.iterate(files.scans))
    assert [source.subject for source in found] == [f"phantom-{seed:04d}" for seed in (0, 1, 2)]
    for source, config in zip(found, configs, strict=True):
        drawn, back = phantom(config).volumes[0], source.read().volumes[0]
        np.testing.assert_array_equal(back.array, drawn.array)
        np.testing.assert_array_equal(back.affine_ras, drawn.affine_ras)
        assert back.modality == "CT"
        assert back.provenance.orientation == drawn.provenance.orientation
        mask = sources.read_labels(files.labels / source.relative)
        np.testing.assert_array_equal(mask.array, drawn.labels.array)
        np.testing.assert_array_equal(mask.affine_ras, drawn.affine_ras)


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VoxelstemError, match="phantoms cannot be written into 'file'"):
        phantom_files(tmp_path / "file", [PhantomConfig(seed=0, spacing_mm=COARSE)])


def test_written_tables_and_reports_name_every_subject(tmp_path):
    files = phantom_files(tmp_path, [PhantomConfig(seed=seed, spacing_mm=COARSE) for seed in (0, 1)])
    assert json.loads((files.labels / "labels.json").read_text())["classes"]["3"] == "liver"
    reports = [json.loads(line) for line in files.reports.read_text().splitlines()]
    assert [line["subject"] for line in reports] == ["phantom-0000", "phantom-0001"]
    assert all(line["findings"].startswith("CT of") and line["impression"] for line in reports)
    for fact, path in files.tables.items():
        with path.open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        assert [row["label"] for row in rows] == [
            phantom(PhantomConfig(seed=seed, spacing_mm=COARSE)).labels[fact] for seed in (0, 1)
        ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"lesions": 9},
        {"lesion_radius_mm": (5.0, 2.0)},
        {"spacing_mm": (0.0, 1.0, 1.0)},
        {"orientation": "RRS"},
        {"noise_hu": -1.0},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PhantomConfig(**{"seed": 0} | wrong)
