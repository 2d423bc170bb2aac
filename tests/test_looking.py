from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from voxelstem.errors import ConfigError, IngestError
from voxelstem.looking import region_of, volumes_of
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.study import Acquisition, InputSpec, Study, Volume

CT = InputSpec(spacing_mm=(8.0, 8.0, 8.0), low_hu=-200.0, high_hu=300.0, block_ijk=(16, 16, 16))


@pytest.fixture(scope="module")
def study() -> Study:
    return phantom(PhantomConfig(seed=1, spacing_mm=(7.0, 7.0, 8.0)))


def named(volume: Volume, contrast: str) -> Volume:
    return replace(volume, acquisition=Acquisition(contrast=contrast))


def test_contrasts_are_seen_in_the_order_of_the_run_and_other_modalities_not_at_all(study: Study) -> None:
    (plain,) = study.volumes
    early, late = named(plain, "arterial"), named(plain, "portal")
    both = replace(study, volumes=(replace(plain, modality="MR"), late, early))
    assert volumes_of(both, CT, ("arterial", "portal")) == (early, late)
    assert volumes_of(study, CT, ()) == (plain,)


@pytest.mark.parametrize(
    ("modalities", "contrasts", "code"),
    [(("MR",), (), "other-modality"), (("CT", "CT"), (), "several-volumes"), (("CT",), ("late",), "lacks-contrast")],
)
def test_a_study_that_does_not_fit_is_refused_with_a_reason(
    study: Study, modalities: tuple[str, ...], contrasts: tuple[str, ...], code: str
) -> None:
    (plain,) = study.volumes
    other = replace(study, volumes=tuple(replace(plain, modality=name) for name in modalities))
    with pytest.raises(IngestError) as caught:
        volumes_of(other, CT, contrasts)
    assert caught.value.code == code


def test_a_box_and_a_mask_of_the_same_voxels_are_one_region(study: Study, tmp_path: Path) -> None:
    (volume,) = study.volumes
    middle = volume.affine_ras[:3, :3] @ (np.array(volume.shape_ijk) // 2) + volume.affine_ras[:3, 3]
    low, high = middle - 30.0, middle + 30.0
    box = (float(low[0]), float(low[1]), float(low[2])), (float(high[0]), float(high[1]), float(high[2]))
    region = region_of(volume, None, box)
    assert 0 < region.sum() < region.size
    nib.Nifti1Image(region.astype(np.uint8), volume.affine_ras).to_filename(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(region_of(volume, tmp_path / "mask.nii.gz", None), region)


def test_a_region_that_is_nowhere_in_the_scan_is_refused(study: Study, tmp_path: Path) -> None:
    (volume,) = study.volumes
    with pytest.raises(ConfigError, match="no region"):
        region_of(volume, None, None)
    with pytest.raises(ConfigError, match="box does not fit"):
        region_of(volume, None, ((9000.0, 9000.0, 9000.0), (9001.0, 9001.0, 9001.0)))
    shifted = volume.affine_ras.copy()
    shifted[0, 3] += 1.0
    nib.Nifti1Image(np.ones(volume.shape_ijk, dtype=np.uint8), shifted).to_filename(tmp_path / "mask.nii.gz")
    with pytest.raises(ConfigError, match="another grid"):
        region_of(volume, tmp_path / "mask.nii.gz", None)
