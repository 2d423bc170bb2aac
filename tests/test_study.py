from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from voxelstem.study import INPUT_SPECS, InputSpec, LabelMap, Provenance, Report, Study, Survival, Volume

PROVENANCE = Provenance(source_format="nifti", sha256="0" * 64, orientation="RAS")


def a_volume(**changes) -> Volume:
    parts = {
        "array": np.zeros((1, 4, 5, 6), dtype=np.float32),
        "affine_ras": np.diag([1.0, 2.0, 3.0, 1.0]),
        "modality": "CT",
        "provenance": PROVENANCE,
    }
    return Volume(**(parts | changes))


def test_a_volume_knows_its_shape_and_spacing():
    volume = a_volume()
    assert volume.shape_ijk == (4, 5, 6)
    assert volume.spacing_mm == (1.0, 2.0, 3.0)


def test_a_volume_without_a_channel_axis_is_refused():
    # Under `--jaxtyping-packages` the annotation refuses it first.
    with pytest.raises((ValueError, TypeError), match=r"4 axes|channel i j k"):
        a_volume(array=np.zeros((4, 5, 6), dtype=np.float32))


def test_a_volume_with_a_flat_voxel_is_refused():
    with pytest.raises(ValueError, match="no extent"):
        a_volume(affine_ras=np.diag([1.0, 0.0, 3.0, 1.0]))


def test_labels_on_another_grid_are_refused():
    labels = LabelMap(array=np.zeros((4, 5, 7), dtype=np.int16), classes={1: "liver"})
    with pytest.raises(ValueError, match="do not lie on the volume's grid"):
        a_volume(labels=labels)


@pytest.mark.parametrize("record", [a_volume(), PROVENANCE, InputSpec(), Study(subject="1", volumes=())])
def test_records_cannot_be_changed(record: object):
    name = dataclasses.fields(record)[0].name  # pyright: ignore[reportArgumentType]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, name, None)


def test_two_studies_do_not_share_their_labels():
    assert Study(subject="1", volumes=()).labels is not Study(subject="2", volumes=()).labels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_hu": 100.0, "high_hu": 100.0}, "window is empty"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "spacing_mm must be positive"),
        ({"block_ijk": (32, 0, 32)}, "at least one voxel"),
        ({"normalisation": "zscore", "low_hu": -200.0}, "'zscore' has no window"),
        ({"normalisation": "unit99", "high_hu": 1.0}, "'unit99' has no window"),
        ({"normalisation": "unit99", "resampling": "fit"}, "'unit99' has none"),
        ({"frame_ijk": (64, 48, 64)}, "whole blocks"),
        ({"frame_ijk": (64, 0, 64)}, "whole blocks"),
        ({"frame_ijk": (32, 32, 32), "resampling": "native"}, "needs resampling 'spacing'"),
    ],
)
def test_an_input_spec_guards_its_numbers(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        InputSpec(**changes)


def test_presets_know_their_names_and_those_of_ct_keep_the_window():
    for name, spec in INPUT_SPECS.items():
        assert spec.preset == name
        assert (spec.low_hu, spec.high_hu) == (-1000.0, 1000.0)
        if name.startswith("ct-"):
            assert (spec.modality, spec.normalisation, spec.block_ijk) == ("CT", "window", (128, 128, 64))


def test_each_family_of_brain_weights_is_bound_to_its_own_normaliser():
    nnssl, fomo = INPUT_SPECS["mri-nnssl"], INPUT_SPECS["mri-fomo25"]
    assert (nnssl.modality, nnssl.normalisation, nnssl.block_ijk) == ("MR", "zscore", (160, 160, 160))
    assert (fomo.modality, fomo.normalisation, fomo.block_ijk) == ("MR", "unit99", (64, 64, 64))
    assert nnssl.spacing_mm == fomo.spacing_mm == (1.0, 1.0, 1.0)


def test_digests_from_before_there_was_a_choice_hold():
    told = "InputSpec(modality='CT', spacing_mm=(3.0, 3.0, 3.0), low_hu=-1000.0, high_hu=1000.0, block_ijk=(32, 32, 32)"
    assert InputSpec().mark == told + ", preset='', resampling='spacing')"
    assert InputSpec(frame_ijk=(32, 32, 64)).mark == told + ", preset='', resampling='spacing', frame_ijk=(32, 32, 64))"
    assert InputSpec(normalisation="unit99").mark == told + ", preset='', resampling='spacing', normalisation='unit99')"


def test_a_spec_says_in_words_what_values_become():
    assert InputSpec(low_hu=-160.0, high_hu=240.0).values_in_words == "window [-160, 240] to [0, 1]"
    assert "z-scores of the whole volume" in INPUT_SPECS["mri-nnssl"].values_in_words
    assert "99th percentile" in INPUT_SPECS["mri-fomo25"].values_in_words
    assert not any("1000" in INPUT_SPECS[name].values_in_words for name in ("mri-nnssl", "mri-fomo25"))


def test_a_scan_is_fed_at_the_specs_spacing_or_at_its_own():
    have = (0.9, 0.9, 5.0)
    shape = (512, 512, 60)
    assert INPUT_SPECS["ct-stage1"].grid_spacing_mm(have, shape) == (0.5, 0.5, 1.0)
    assert INPUT_SPECS["ct-stage2"].grid_spacing_mm(have, shape) == (0.75, 0.75, 1.5)
    assert INPUT_SPECS["ct-native"].grid_spacing_mm(have, shape) == have


def test_a_scan_that_is_fit_to_a_block_comes_at_its_extent_over_the_blocks_voxels():
    spec = InputSpec(block_ijk=(224, 224, 160), resampling="fit")
    assert spec.grid_spacing_mm((0.875, 1.0, 5.0), (512, 448, 64)) == (2.0, 2.0, 2.0)


def test_a_spec_says_in_words_where_voxels_come_to_lie():
    assert INPUT_SPECS["ct-stage2"].grid_in_words == "0.75 x 0.75 x 1.5 mm"
    assert INPUT_SPECS["ct-native"].grid_in_words == "its own spacing"
    fit = InputSpec(low_hu=-900.0, resampling="fit").grid_in_words
    assert fit == "the spacing at which all above -900 fits one block"


def test_a_report_reads_as_dictated_without_rewrites_and_codes():
    report = Report(
        findings_text="Cyst.",
        impression_text="Benign.",
        rest_text="CT.",
        history_text="Pain.",
        technique_text="Native.",
        findings_rewrites=("One cyst.",),
        icd10=("Cyst of kidney",),
    )
    assert report.text == "CT.\nClinical history: Pain.\nTechnique: Native.\nFindings: Cyst.\nImpression: Benign."
    assert Report(icd10=("Cyst of kidney",)).text == ""


@pytest.mark.parametrize("time", [-1.0, math.nan, math.inf])
def test_nobody_is_watched_for_no_time(time: float):
    assert Survival(time=0.0, event=False).time == 0
    with pytest.raises(ValueError, match="time must be a number >= 0"):
        Survival(time=time, event=True)
