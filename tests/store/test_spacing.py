from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from voxelstem.errors import IngestError
from voxelstem.resampling import resample
from voxelstem.store import spacing
from voxelstem.store.spacing import resample_volume

WANTED = (2.0, 3.0, 2.5)


def test_ct_stays_whole_hu_and_within_half_a_unit_of_the_interpolation(make: Any) -> None:
    volume = make.volume()
    result = resample_volume(volume, WANTED)
    exact, affine = resample(volume.array, volume.affine_ras, WANTED)
    np.testing.assert_array_equal(result.array, np.rint(result.array))
    assert np.abs(result.array - exact).max() <= 0.5
    np.testing.assert_array_equal(result.affine_ras, affine)
    assert result.spacing_mm == pytest.approx(WANTED)


def test_other_modalities_are_not_rounded(make: Any) -> None:
    volume = make.volume(modality="MR")
    exact, _ = resample(volume.array, volume.affine_ras, WANTED)
    np.testing.assert_array_equal(resample_volume(volume, WANTED).array, exact)


def test_labels_go_along_and_keep_their_values(make: Any) -> None:
    volume = make.volume(labels=make.mask())
    result = resample_volume(volume, WANTED)
    expected, _ = resample(volume.labels.array[None], volume.affine_ras, WANTED, mode="nearest")
    assert result.labels is not None
    np.testing.assert_array_equal(result.labels.array, expected[0])
    assert result.labels.classes == volume.labels.classes


def test_the_provenance_says_from_what_to_what(make: Any) -> None:
    volume = make.volume()
    volume = replace(volume, provenance=replace(volume.provenance, notes=("earlier",)))
    assert resample_volume(volume, WANTED).provenance.notes == (
        "earlier",
        "resampled from 1 x 1.5 x 2 mm to 2 x 3 x 2.5 mm",
        "rounded to whole HU after resampling",
    )


def test_a_volume_that_has_the_spacing_comes_back_as_it_is(make: Any) -> None:
    volume = make.volume(labels=make.mask())
    assert resample_volume(volume, (1.0, 1.5, 2.0)) is volume


def test_a_result_that_would_fill_the_memory_is_refused_before_it_is_made(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(IngestError, match="millimetres") as refused:
        resample_volume(make.volume(), (0.001, 0.001, 0.001))
    assert refused.value.code == "too-large"
    monkeypatch.setattr(spacing, "MOST_BYTES", 4 * 10 * 9 * 8 - 1)
    with pytest.raises(IngestError):
        resample_volume(make.volume(), WANTED)
    monkeypatch.setattr(spacing, "MOST_BYTES", 4 * 10 * 9 * 8)
    assert resample_volume(make.volume(), WANTED).shape_ijk == (10, 9, 8)
