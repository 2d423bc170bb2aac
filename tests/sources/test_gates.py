from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest

from voxelstem.errors import IngestError
from voxelstem.sources import gates, nifti
from voxelstem.sources.gates import ImageFacts
from voxelstem.sources.phantom import PhantomConfig, phantom

DATA = Path(os.environ.get("VOXELSTEM_DATA", Path(__file__).parents[3] / "shared" / "data"))
real = pytest.mark.skipif(
    not ((DATA / "starter").is_dir() and (DATA / "sts").is_dir()),
    reason="the folder of real scans is absent (VOXELSTEM_DATA)",
)
REAL_CT = ("starter/crlm_1004.nii.gz", "starter/lidc_0002.nii.gz", "starter/ts_example_ct.nii.gz")
REAL_MR = ("starter/oms07_T1.nii.gz", "starter/stroke_T2.nii.gz", "sts/STS_019/MR_T1_image.nii.gz")
CT_CLASS, MR_CLASS = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"


def refused(code):
    return pytest.raises(IngestError, check=lambda problem: problem.code == code)


@functools.cache
def invented(seed=4):
    """(i, j, k) HU of an invented patient."""
    return phantom(PhantomConfig(seed=seed, spacing_mm=(3.0, 3.0, 4.0))).volumes[0].array[0]


@functools.cache
def scan(name):
    return nifti.read(DATA / name, subject="s").volumes[0].array[0]


def padded(hu, value):
    """As scanners do it: what lies outside the round field of view gets one value."""
    i, j = np.ogrid[: hu.shape[0], : hu.shape[1]]
    outside = ((i / hu.shape[0] - 0.5) ** 2 + (j / hu.shape[1] - 0.5) ** 2) > 0.23
    return np.where(outside[..., None], np.float32(value), hu)


def wrapped(hu, low):
    return (np.rint(hu) - low) % 4096 + low


def with_dense_ball(hu):
    """A blurred ball of metal in the middle."""
    index = np.stack(np.meshgrid(*[np.arange(n) - n / 2 for n in hu.shape], indexing="ij"), axis=-1)
    share = np.clip((9 - np.linalg.norm(index, axis=-1)) / 6, 0, 1)
    return ((1 - share) * hu + 6000 * share).astype(np.float32)


FAULTS = {
    "no-rescale": [lambda a: a + 1024, lambda a: np.maximum(a + 1000, 0), lambda a: a + 8192],
    "rescaled-twice": [lambda a: a - 1024, lambda a: a - 8192],
    "wrong-slope": [lambda a: a * 2, lambda a: a / 2, lambda a: (a + 1024) * 2 - 1024, lambda a: a * 10],
    "inverted": [lambda a: -a],
    "wrong-unit": [lambda a: a / 1000, lambda a: (a - a.mean()) / a.std()],
    "windowed": [lambda a: np.rint(np.clip((a + 160) / 400, 0, 1) * 255)],
    "wrapped": [lambda a: wrapped(with_dense_ball(a), -1024)],
}
CASES = [(code, number) for code, made in FAULTS.items() for number in range(len(made))]


@pytest.mark.parametrize("seed", [4, 5])
@pytest.mark.parametrize("padding", [None, -1024, -2000, -3024, -32768])
def test_hounsfield_units_pass_with_and_without_padding(seed, padding):
    hu = invented(seed)
    gates.check_hu(hu if padding is None else padded(hu, padding))


@pytest.mark.parametrize(("code", "number"), CASES)
def test_what_was_done_to_a_ct_is_found_and_named(code, number):
    with refused(code):
        gates.check_hu(FAULTS[code][number](invented()).astype(np.float32))


@pytest.mark.parametrize(("code", "number"), [case for case in CASES if case[0] in ("no-rescale", "rescaled-twice")])
def test_padding_does_not_hide_a_wrong_offset(code, number):
    fault = FAULTS[code][number]
    with pytest.raises(IngestError):
        gates.check_hu(fault(padded(invented(), -2000.0)).astype(np.float32))


def test_halved_padding_is_not_taken_for_air():
    with pytest.raises(IngestError):
        gates.check_hu(padded(invented(), -2000.0) / 2)


def test_metal_itself_is_no_overflow():
    dense = with_dense_ball(invented())
    gates.check_hu(dense)
    gates.check_hu(np.minimum(dense, 3071))


def test_air_whose_noise_overflowed_is_found():
    noisy = invented() + np.random.default_rng(0).normal(0, 12, invented().shape)
    with pytest.raises(IngestError):
        gates.check_hu(wrapped(np.maximum(noisy, -1030), -1024).astype(np.float32))
    few = np.maximum(invented(), -1000).copy()
    few[1:60:2, 1, 1::3] = 3071  # air below -1024 in some voxels
    with refused("wrapped"):
        gates.check_hu(few)


def test_values_like_no_scan_are_not_hu():
    with refused("not-hu"):
        gates.check_hu(np.random.default_rng(0).uniform(-1024, 3071, (40, 40, 40)).astype(np.float32))
    with refused("not-hu"):
        gates.check_hu(np.random.default_rng(0).exponential(4000, (40, 40, 40)).astype(np.float32))


def test_a_crop_without_air_passes_only_where_it_may_be_one():
    rng = np.random.default_rng(0)
    crop = rng.normal(60, 20, (40, 40, 40)).astype(np.float32)
    crop[:8] -= 160  # fat
    gates.check_hu(crop, airless=True)
    with refused("not-hu"):
        gates.check_hu(crop)
    with refused("not-hu"):  # an MR: nothing below zero
        gates.check_hu(np.abs(crop) * 4 + 5, airless=True)
    with refused("wrong-unit"):
        gates.check_hu(crop / 1000, airless=True)


@pytest.mark.parametrize("code", ["no-rescale", "rescaled-twice", "wrong-slope", "inverted"])
def test_what_was_done_to_a_scan_with_air_is_found_also_where_air_may_lack(code):
    with refused(code):
        gates.check_hu(FAULTS[code][0](invented()).astype(np.float32), airless=True)


def test_very_few_voxels_are_not_judged():
    few = np.arange(10 * 10 * 10, dtype=np.float32).reshape(10, 10, 10)
    gates.check_hu(few)
    gates.check_mr(few)


def test_a_ct_that_is_said_to_be_mr_is_refused():
    with refused("wrong-modality"):
        gates.check_mr(invented())
    with refused("no-rescale"):
        gates.check_mr(invented() + 1024)
    with refused("wrong-unit"):
        gates.check_mr(invented() / 1000)


@real
@pytest.mark.parametrize("name", REAL_CT)
def test_real_ct_passes_and_its_faults_do_not(name):
    hu = scan(name)
    gates.check_hu(hu)
    with refused("wrong-modality"):
        gates.check_mr(hu)
    for code, number in CASES:
        if code in ("no-rescale", "rescaled-twice", "wrong-slope"):
            with refused(code):
                gates.check_hu(FAULTS[code][number](hu).astype(np.float32))
        else:
            with pytest.raises(IngestError):
                gates.check_hu(FAULTS[code][number](hu).astype(np.float32))


@real
@pytest.mark.parametrize("name", REAL_MR)
def test_real_mr_passes_as_mr_and_not_as_ct(name):
    mr = scan(name)
    gates.check_mr(mr)
    for array in (mr, mr - 1024):
        for airless in (False, True):
            with pytest.raises(IngestError):
                gates.check_hu(array, airless=airless)


def test_air_makes_a_ct():
    made = np.random.default_rng(0).normal(40, 20, (10, 10, 10))
    made[:5] = -1000
    assert gates.tell_kind(made)[0] == "CT"
    assert gates.tell_kind(made - made.min())[0] == "MR"


def test_a_little_air_and_bone_make_a_ct_too():
    made = np.random.default_rng(0).normal(40, 20, (20, 20, 20))
    made[0, 0, 0], made[0, 0, 1] = -1000, 900
    assert gates.tell_kind(made)[0] == "CT"


def test_a_phase_image_is_no_ct():
    phase = np.random.default_rng(0).integers(-4096, 4096, (10, 10, 10))
    phase[0, 0, 0] = -4096
    assert gates.tell_kind(phase)[0] == "MR"


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
@pytest.mark.parametrize("modality", [None, "CT"])
def test_even_regions_of_few_whole_numbers_are_a_label_map(dtype, modality):
    mask = np.zeros((20, 20, 20), dtype)
    mask[5:15, 5:15, 5:15] = 3
    mask[8:12, 8:12, 8:12] = 40
    assert gates.tell_kind(mask, modality=modality)[0] == "label-map"


def test_an_eight_bit_picture_is_no_label_map():
    picture = np.random.default_rng(0).integers(0, 60, (20, 20, 20)).astype(np.uint8)
    assert gates.tell_kind(picture)[0] == "MR"


def test_a_scattered_binary_mask_is_still_a_label_map():
    mask = (np.random.default_rng(0).random((20, 20, 20)) < 0.05).astype(np.uint8)
    assert gates.tell_kind(mask)[0] == "label-map"


def test_who_knows_the_modality_decides_it():
    crop = np.random.default_rng(0).normal(60, 20, (10, 10, 10))
    assert gates.tell_kind(crop)[0] == "MR"
    assert gates.tell_kind(crop, modality="CT") == ("CT", f"said to be CT: values {crop.min():g} to {crop.max():g}")
    crop[:5] = -1000
    assert gates.tell_kind(crop, modality="MR")[0] == "MR"


def facts(**changed):
    known = {
        "modality": "CT",
        "sop_class": CT_CLASS,
        "image_type": ("ORIGINAL", "PRIMARY", "AXIAL"),
        "burned_in": "NO",
        "patient_position": "HFS",
        "orientation": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    }
    return ImageFacts(**{**known, **changed})


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"modality": "MR", "sop_class": MR_CLASS, "image_type": ("ORIGINAL", "PRIMARY", "M", "SE")},
        {"modality": "MR", "sop_class": f"{MR_CLASS}.1"},
        {"image_type": ("DERIVED", "PRIMARY", "AXIAL")},
        {"image_type": (), "burned_in": "", "sop_class": "", "patient_position": "", "orientation": ()},
        {"patient_position": "FFS", "orientation": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0)},
        {"orientation": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)},
    ],
)
def test_original_pictures_pass_without_a_doubt(changed):
    assert gates.check_image(facts(**changed)) == ()


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}, "localizer"),
        ({"image_type": ("original", "primary", "localizer ")}, "localizer"),
        ({"image_type": ("DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE")}, "derived"),
        ({"image_type": ("DERIVED", "SECONDARY", "MPR")}, "derived"),
        ({"image_type": ("DERIVED", "PRIMARY", "MIP")}, "projection"),
        ({"image_type": ("DERIVED", "SECONDARY", "SCREEN SAVE")}, "screen-save"),
        ({"image_type": ("DERIVED", "SECONDARY", "DOSE_INFO")}, "dose-screen"),
        ({"sop_class": "1.2.840.10008.5.1.4.1.1.7"}, "secondary-capture"),
        ({"sop_class": "1.2.840.10008.5.1.4.1.1.7.2"}, "secondary-capture"),
        ({"burned_in": "YES"}, "burned-in"),
        ({"modality": "PT", "sop_class": "1.2.840.10008.5.1.4.1.1.128"}, "wrong-modality"),
        ({"modality": ""}, "wrong-modality"),
        ({"sop_class": MR_CLASS}, "wrong-modality"),
        ({"sop_class": f"{MR_CLASS}.4"}, "wrong-modality"),
        ({"modality": "MR"}, "wrong-modality"),
        ({"sop_class": "1.2.840.10008.5.1.4.1.1.128"}, "wrong-modality"),
    ],
)
def test_other_pictures_are_refused_with_their_own_code(changed, code):
    with refused(code):
        gates.check_image(facts(**changed))


@pytest.mark.parametrize(
    "orientation", [(-1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0), (0.0, 1.0, 0.0, -1.0, 0.0, 0.0)]
)
def test_an_axial_picture_against_its_patient_position_is_a_doubt(orientation):
    (doubt,) = gates.check_image(facts(orientation=orientation))
    assert doubt.startswith("patient-position")
