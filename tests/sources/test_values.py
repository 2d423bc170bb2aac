from __future__ import annotations

import numpy as np
import pytest
from pydicom.dataset import Dataset

from voxelstem.errors import IngestError
from voxelstem.sources.header import Header
from voxelstem.sources.pixels import Layout
from voxelstem.sources.values import AIR_HU, Reading, in_range, padding_range


def refused(code):
    return pytest.raises(IngestError, check=lambda problem: problem.code == code)


def header(**values):
    one = Dataset()
    for keyword, value in values.items():
        setattr(one, keyword, value)
    return Header(name="image 1", dataset=one)


def layout(*, stored=16, signed=True, high=None, bits=16):
    return Layout(
        rows=1,
        columns=4,
        frames=1,
        bits_allocated=bits,
        bits_stored=stored,
        high_bit=stored - 1 if high is None else high,
        signed=signed,
    )


def plane(*values, signed=True):
    return np.array([values], np.int16 if signed else np.uint16)


def read(raw, stored, *, modality="CT", slope=1.0, intercept=0.0, **values):
    reading = Reading(modality)
    return reading, reading.values(raw, stored, header(**values), slope=slope, intercept=intercept)[0]


def test_a_whole_slope_is_exact_and_a_broken_one_is_rounded_once():
    _, values = read(plane(-32768, 0, 1, 32767), layout(), slope=3.0, intercept=-1024.0)
    assert values.tolist() == [-99328.0, -1024.0, -1021.0, 97277.0]
    _, values = read(plane(1, 2, 3, 30_001), layout(), slope=0.1, intercept=0.01)
    assert values.tolist() == [float(np.float32(n * 0.1 + 0.01)) for n in (1, 2, 3, 30_001)]


@pytest.mark.parametrize(
    ("raw", "signed", "expected", "unextended"),
    [
        ((0, 5, 4095, 1), False, (0, 5, 4095, 1), False),
        ((-2048, -1, 0, 2047), True, (-2048, -1, 0, 2047), False),
        ((0x800, 0xFFF, 0, 0x7FF), True, (-2048, -1, 0, 2047), True),  # the sign is not repeated
    ],
)
def test_unused_bits_may_hold_the_sign_or_nothing(raw, signed, expected, unextended):
    values, found, stray = in_range(plane(*raw, signed=signed), layout(stored=12, signed=signed), header())
    assert (values[0].tolist(), found, stray) == (list(expected), unextended, 0)


@pytest.mark.parametrize(
    ("raw", "signed"), [((0, 1, 2, 4096), False), ((0, 1, 2, -2049), True), ((0, -1, 9, 4000), True)]
)
def test_unused_bits_that_nothing_explains_are_counted_in_a_ct_and_refused_in_an_mr(raw, signed):
    stored, pixels = layout(stored=12, signed=signed), plane(*raw, signed=signed)
    reading, values = read(pixels, stored)
    assert (reading.stray, values.tolist()) == (1, pixels[0].tolist())
    with refused("stray-bits"):
        read(pixels, stored, modality="MR")


def test_a_drawing_in_unused_bits_is_taken_out():
    drawn = header()
    drawn.dataset.add_new((0x6000, 0x0102), "US", 12)
    values, *_ = in_range(plane(0x1005, 7, 0x1FFF, 0, signed=False), layout(stored=12, signed=False), drawn)
    assert values[0].tolist() == [5, 7, 4095, 0]


def test_bits_that_are_stored_high_are_shifted_down():
    values, *_ = in_range(plane(0x7FF0, 0x0010, 0, -0x8000), layout(stored=12, high=15), header())
    assert values[0].tolist() == [2047, 1, 0, -2048]


def test_padding_beyond_the_stored_bits_is_no_stray_bit():
    padded = header(PixelPaddingValue=-2000)
    values, *_ = in_range(plane(-2000, 0, 5, 1000), layout(stored=11), padded)
    assert values[0].tolist() == [-2000, 0, 5, 1000]


@pytest.mark.parametrize(
    ("value", "limit", "signed", "expected"),
    [
        (-2000, None, True, (-2000, -2000)),
        (63536, None, True, (-2000, -2000)),  # as GE writes it
        (63536, None, False, (63536, 63536)),
        (-2000, -1500, True, (-2000, -1500)),
        (0, None, False, (0, 0)),
    ],
)
def test_padding_values_are_read_with_the_sign_of_the_pixels(value, limit, signed, expected):
    one = Dataset()
    one.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
    if limit is not None:
        one.add_new("PixelPaddingRangeLimit", "SS", limit)
    assert padding_range(Header(name="image 1", dataset=one), layout(signed=signed)) == expected
    assert padding_range(header(), layout()) is None


def test_padding_of_a_ct_becomes_air_and_is_noted():
    reading, values = read(plane(-2000, 0, 1024, -2000), layout(), intercept=-1024.0, PixelPaddingValue=-2000)
    assert values.tolist() == [AIR_HU, -1024.0, 0.0, AIR_HU]
    assert reading.notes() == ("2 voxels of padding set to -1024 HU",)


def test_a_padding_value_among_tissue_is_not_believed():
    reading, values = read(plane(0, 40, 0, -900), layout(), PixelPaddingValue=0)
    assert values.tolist() == [0.0, 40.0, 0.0, -900.0]
    assert "kept" in reading.notes()[0]


def test_padding_of_an_mr_is_left_as_holes():
    reading, values = read(plane(-5, 7, 9, -5), layout(), modality="MR", PixelPaddingValue=-5)
    assert np.isnan(values).tolist() == [True, False, False, True]
    assert (reading.holes, reading.low, reading.high) == (2, 7.0, 9.0)


def test_hu_beyond_every_scale_prove_a_wrong_sign():
    wrong, _ = read(plane(63536, 0, 1024, 2000, signed=False), layout(signed=False), intercept=-1024.0)
    right, _ = read(plane(0, 0, 1024, 2000, signed=False), layout(signed=False), intercept=-1024.0)
    assert wrong.is_wrapped()
    assert not right.is_wrapped()


def test_many_values_below_air_prove_that_an_unrepeated_sign_is_none():
    wrapped, _ = read(plane(0x801, 0x900, 0, 1024), layout(stored=12), intercept=-1024.0)
    padded, _ = read(plane(0x800, 0x800, 0, 1024), layout(stored=12), intercept=-1024.0)
    standard, _ = read(plane(0xC18, 0xFFF, 0, 1024), layout(stored=12), intercept=0.0)
    assert [one.is_wrapped() for one in (wrapped, padded, standard)] == [True, False, False]
