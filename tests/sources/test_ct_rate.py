from __future__ import annotations

import numpy as np
import pytest

from voxelstem.sources.ct_rate import annotate
from voxelstem.study import Provenance, Study, Volume


def study() -> Study:
    provenance = Provenance(source_format="nifti", sha256="0" * 64, orientation="RAS")
    volume = Volume(
        array=np.zeros((1, 2, 2, 2), np.float32), affine_ras=np.eye(4), modality="CT", provenance=provenance
    )
    return Study(subject="folder", volumes=(volume,))


def said(relative: str) -> tuple[str, str]:
    found = annotate(study(), relative, None)
    return found.subject, found.volumes[0].acquisition.group


def test_two_reconstructions_of_one_scan_are_linked_and_two_scans_of_a_patient_are_not():
    one, other = said("train/train_12/train_12_a/train_12_a_1.nii.gz"), said("train_12_a_2.nii.gz")
    assert one == other == ("train_12", "train_12_a")
    assert said("train_12_b_1.nii.gz") == ("train_12", "train_12_b")


def test_patients_of_the_two_parts_are_different_people():
    assert said("valid_12_a_1.nii.gz")[0] != said("train_12_a_1.nii.gz")[0]


@pytest.mark.parametrize(
    "relative", ["train_12.nii.gz", "xtrain_1_a_1.nii.gz", "train_1_a_1.nii.gz.bak", "sub-1_T1w.nii"]
)
def test_other_names_mean_nothing(relative):
    assert said(relative) == ("folder", "")
