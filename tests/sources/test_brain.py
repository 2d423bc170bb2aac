from __future__ import annotations

import datetime
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.ingest import ingest_studies
from voxelstem.sources.brain import (
    CONTRASTS,
    DAYS_A_YEAR,
    INTENSITIES,
    OLD,
    YOUNG,
    BrainConfig,
    brain,
    brain_subject,
    invent,
    subject,
    volumes_of,
)
from voxelstem.sources.brain_anatomy import CLASSES, INSIDE, VALUE
from voxelstem.store import Store
from voxelstem.store.volumes import normalise
from voxelstem.study import INTRACRANIAL, VOLUME_LABEL


def sizes(study):
    """Volumes of a study's labels in mm3."""
    return {
        name.removeprefix(VOLUME_LABEL): float(said)
        for name, said in study.labels.items()
        if name.startswith(VOLUME_LABEL)
    }


def label(study):
    return study.volumes[0].labels.array


def picture(study):
    return study.volumes[0].array[0]


def contrast_in_noise(study, name, beside):
    """By how many standard deviations of its neighbours a structure stands out."""
    inside, around = picture(study)[label(study) == VALUE[name]], picture(study)[label(study) == VALUE[beside]]
    return (inside.mean() - around.mean()) / around.std()


def middle(study, name):
    return np.argwhere(label(study) == VALUE[name]).mean(axis=0)


def test_the_same_config_gives_the_same_bytes_and_another_person_other_ones():
    first, again, other = (brain(BrainConfig(seed=seed)) for seed in (3, 3, 4))
    assert first.volumes[0].array.tobytes() == again.volumes[0].array.tobytes()
    assert first.labels == again.labels
    assert (label(first) != label(other)).mean() > 0.05


def test_a_head_is_nested_air_scalp_skull_fluid_cortex_white_matter():
    found = label(brain(BrainConfig(seed=5, age_years=80.0, shape_ijk=(48, 56, 48), spacing_mm=(4.0, 4.0, 4.0))))
    line = found[: found.shape[0] // 2, found.shape[1] // 2, found.shape[2] // 2 + 2]
    _, first = np.unique(line, return_index=True)
    order = [int(value) for value in line[np.sort(first)]]
    wanted = [0, *(VALUE[name] for name in ("scalp", "skull", "csf", "grey_matter", "white_matter", "ventricles"))]
    assert order == wanted
    assert set(range(9)) <= set(np.unique(found))
    assert not found[0].any()
    assert not found[-1].any()


def test_left_and_right_hippocampus_lie_on_their_side_of_the_patient():
    for seed in range(4):
        study = brain(BrainConfig(seed=seed))
        affine = study.volumes[0].affine_ras
        left, right = (
            affine[0, 0] * middle(study, f"hippocampus_{side}")[0] + affine[0, 3] for side in ("left", "right")
        )
        assert left < -15 < 15 < right


@given(seed=st.integers(0, 500), session=st.integers(0, 3))
@settings(max_examples=15)
def test_volume_labels_are_the_voxel_sums_of_the_label_map(seed, session):
    study = brain(BrainConfig(seed=seed, session=session, spacing_mm=(5.0, 5.5, 4.5)))
    voxel = 5.0 * 5.5 * 4.5
    told, counts = sizes(study), {name: float((label(study) == VALUE[name]).sum()) * voxel for name in CLASSES.values()}
    for name in ("csf", "ventricles", "hippocampus_left", "hippocampus_right"):
        assert told[name] == pytest.approx(counts[name])
    # A lesion counts as the tissue that it lies in.
    both = counts["grey_matter"] + counts["white_matter"] + counts["lesion"]
    assert told["grey_matter"] + told["white_matter"] == pytest.approx(both)
    assert float(study.labels["lesion_mm3"]) == pytest.approx(counts["lesion"])
    assert told[INTRACRANIAL] == pytest.approx(sum(told[name] for name in INSIDE))
    assert 0.8e6 < told[INTRACRANIAL] < 1.8e6


def test_volumes_alone_do_not_tell_who_has_a_lesion():
    ill, well = (sizes(brain(BrainConfig(seed=6, pathology=state))) for state in ("infarct", "none"))
    assert ill == well


def test_volumes_add_up_whatever_the_map():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 9, (5, 6, 7)).astype(np.uint8)
    told = {
        name.removeprefix(VOLUME_LABEL): float(said) for name, said in volumes_of(array, (10.0, 20.0, 30.0)).items()
    }
    assert told["csf"] == sum(6000.0 for value in array.ravel() if value == VALUE["csf"])
    assert sum(normalise(told).values()) == pytest.approx(1.0)


def test_all_contrasts_of_a_session_share_grid_labels_and_facts_and_differ_in_looks():
    studies = brain_subject(7, sessions=2)
    assert [one.volumes[0].acquisition.contrast for one in studies] == list(CONTRASTS) * 2
    for session in (studies[:4], studies[4:]):
        for one in session[1:]:
            assert one.volumes[0].affine_ras.tolist() == session[0].volumes[0].affine_ras.tolist()
            assert (label(one) == label(session[0])).all()
            assert one.labels == session[0].labels
            own = (one.volumes[0].acquisition.session, one.volumes[0].acquisition.date)
            assert own == (session[0].volumes[0].acquisition.session, session[0].volumes[0].acquisition.date)
            inside = np.isin(label(one), [VALUE[name] for name in INSIDE])
            assert abs(np.corrcoef(picture(one)[inside], picture(session[0])[inside])[0, 1]) < 0.95
    groups = {one.volumes[0].acquisition.group for one in studies}
    assert len(groups) == 8


def test_contrasts_order_the_tissues_as_they_do_in_life():
    bright = {}
    for contrast in CONTRASTS:
        study = brain(BrainConfig(seed=8, contrast=contrast, pathology="none", noise=0.0))
        bright[contrast] = {name: np.median(picture(study)[label(study) == VALUE[name]]) for name in INSIDE}
    assert bright["T1w"]["ventricles"] < bright["T1w"]["grey_matter"] < bright["T1w"]["white_matter"]
    assert bright["T2w"]["white_matter"] < bright["T2w"]["grey_matter"] < bright["T2w"]["ventricles"]
    assert bright["FLAIR"]["ventricles"] < bright["FLAIR"]["white_matter"] < bright["FLAIR"]["grey_matter"]


def test_an_infarct_is_seen_in_flair_and_dwi_and_in_no_other_contrast():
    for seed in range(5):
        for contrast in CONTRASTS:
            ill, well = (
                brain(BrainConfig(seed=seed, contrast=contrast, pathology=state)) for state in ("infarct", "none")
            )
            assert (label(ill) == VALUE["lesion"]).sum() > 15
            assert ill.labels["pathology"] == "yes"
            assert well.labels["pathology"] == "no"
            if contrast in ("FLAIR", "DWI"):
                assert contrast_in_noise(ill, "lesion", "white_matter") > 2
            else:
                # The very same bytes: nothing of it can be learned from these contrasts.
                assert (picture(ill) == picture(well)).all()


def test_half_of_all_people_are_ill_at_all_ages():
    ages, ill = [], []
    for seed in range(120):
        course, head = invent(BrainConfig(seed=seed))
        ages.append(course.age_years)
        ill.append(head.blob is not None)
    assert 0.35 < np.mean(ill) < 0.65
    assert abs(np.corrcoef(ages, ill)[0, 1]) < 0.2
    assert min(ages) < YOUNG + 8
    assert max(ages) > OLD - 8


def test_a_lesion_lies_in_the_tissue_of_the_brain_and_stays_where_it_is():
    first, later = (brain(BrainConfig(seed=2, session=session, pathology="infarct")) for session in (0, 2))
    assert np.linalg.norm(middle(first, "lesion") - middle(later, "lesion")) < 0.5
    healthy = label(brain(BrainConfig(seed=2, pathology="none")))
    covered = set(healthy[label(first) == VALUE["lesion"]].tolist())
    assert covered <= {VALUE["white_matter"], VALUE["grey_matter"]}


def test_ventricles_grow_and_hippocampi_shrink_at_the_rates_told():
    fine = {"shape_ijk": (60, 72, 60), "spacing_mm": (2.8, 2.8, 2.8), "pathology": "none"}
    config = BrainConfig(seed=9, ventricle_growth=0.10, hippocampus_loss=0.05, **fine)
    before, after = brain(config), brain(replace(config, session=1, years=3.0))
    assert float(before.labels["rate:ventricles"]) == 0.10
    assert float(before.labels["rate:hippocampus"]) == -0.05
    years = after.volumes[0].acquisition.age_years - before.volumes[0].acquisition.age_years
    assert years == pytest.approx(3.0, abs=0.01)
    small, large = sizes(before), sizes(after)
    assert large["ventricles"] / small["ventricles"] == pytest.approx(1.10**years, rel=0.03)
    for side in ("left", "right"):
        left = large[f"hippocampus_{side}"] / small[f"hippocampus_{side}"]
        assert left == pytest.approx(0.95**years, rel=0.06)
    assert large[INTRACRANIAL] == small[INTRACRANIAL]


def test_drawn_rates_are_seen_in_the_label_maps():
    told, seen = [], []
    for seed in range(30):
        first, later = (brain(BrainConfig(seed=seed, session=session)) for session in (0, 2))
        years = later.volumes[0].acquisition.age_years - first.volumes[0].acquisition.age_years
        told.append(float(first.labels["rate:ventricles"]))
        seen.append(np.log(sizes(later)["ventricles"] / sizes(first)["ventricles"]) / years)
    assert np.corrcoef(told, seen)[0, 1] > 0.9


def test_age_is_told_by_the_share_of_the_ventricles():
    ages, shares = [], []
    for seed in range(60):
        study = brain(BrainConfig(seed=seed))
        ages.append(study.volumes[0].acquisition.age_years)
        shares.append(normalise(sizes(study))["ventricles"])
    assert np.corrcoef(ages, shares)[0, 1] > 0.9


def test_days_ages_and_sessions_agree():
    studies = brain_subject(11, sessions=3, contrasts=("T1w",))
    said = [one.volumes[0].acquisition for one in studies]
    days = [datetime.date.fromisoformat(one.date) for one in said]
    for one, day in zip(said[1:], days[1:], strict=True):
        years = (day - days[0]).days / DAYS_A_YEAR
        assert one.age_years - said[0].age_years == pytest.approx(years, abs=0.02)
    assert all(1.0 <= (b - a).days / DAYS_A_YEAR <= 3.01 for a, b in itertools.pairwise(days))
    assert [one.session for one in said] == ["01", "02", "03"]


def test_settling_one_thing_leaves_the_others():
    free = brain(BrainConfig(seed=12))
    course, head = invent(BrainConfig(seed=12))
    for settled in ({"scanner": 1}, {"noise": 0.1}, {"contrast": "T2w"}):
        assert (label(brain(BrainConfig(seed=12, **settled))) == label(free)).all()
    assert invent(BrainConfig(seed=12, pathology="none"))[0] == course
    assert invent(BrainConfig(seed=12, age_years=30.0))[1].radii_mm == head.radii_mm
    assert invent(BrainConfig(seed=12, ventricle_growth=0.01))[0].hippocampus_loss == course.hippocampus_loss


def test_another_grid_shows_the_same_head():
    coarse, fine = (
        sizes(brain(BrainConfig(seed=13, pathology="none", shape_ijk=shape, spacing_mm=(edge,) * 3)))
        for shape, edge in (((32, 36, 32), 5.0), ((64, 72, 64), 2.5))
    )
    for name in ("csf", "grey_matter", "white_matter", "ventricles", INTRACRANIAL):
        assert coarse[name] == pytest.approx(fine[name], rel=0.08)


def test_scanners_differ_in_gain_and_sharpness_and_not_in_the_head():
    levels, edges = [], []
    for scanner in range(4):
        study = brain(BrainConfig(seed=14, scanner=scanner, noise=0.0))
        assert study.labels["scanner"] == str(scanner)
        levels.append(np.median(picture(study)[label(study) == VALUE["white_matter"]]))
        edges.append(np.abs(np.diff(picture(study), axis=0)).max() / levels[-1])
    assert max(levels) / min(levels) > 1.2
    assert max(edges) / min(edges) > 1.1


def test_a_shifted_head_lies_elsewhere_in_the_world_at_each_session_and_not_within_one():
    def place(**settings):
        study = brain(BrainConfig(seed=15, shape_ijk=(40, 44, 40), pathology="none", **settings))
        affine = study.volumes[0].affine_ras
        return affine[:3, :3] @ middle(study, "csf") + affine[:3, 3]

    still = place()
    assert np.linalg.norm(place(session=1) - still) < 0.5
    first, second = place(shift_mm=8.0), place(shift_mm=8.0, session=1)
    assert np.linalg.norm(first - still) > 2
    assert np.linalg.norm(second - first) > 2
    assert (place(shift_mm=8.0, contrast="DWI") == first).all()


def test_brains_rest_in_a_store_exactly_with_their_facts_on_one_grid(tmp_path):
    studies = brain_subject(16, sessions=2, contrasts=("T1w", "DWI"))
    ingest_studies(studies, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    records = list(store)
    assert len(records) == 4
    assert len({record.subject for record in records}) == 1
    assert subject(16) not in {record.subject for record in records}
    by_look = {(record.acquisition.session, record.acquisition.contrast): record for record in records}
    assert set(by_look) == {("01", "T1w"), ("01", "DWI"), ("02", "T1w"), ("02", "DWI")}
    assert by_look["01", "T1w"].study == by_look["01", "DWI"].study != by_look["02", "T1w"].study
    one, first = by_look["01", "T1w"], studies[0]
    assert dict(one.labels) == first.labels
    assert one.modality == "MR"
    assert dict(one.classes) == CLASSES
    assert (store.volume(one.key).array == first.volumes[0].array).all()
    assert (store.labels(one.key).array == label(first)).all()


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"seed": -1}, "negative"),
        ({"contrast": "PET"}, "T1w"),
        ({"pathology": "tumour"}, "infarct"),
        ({"age_years": 4.0}, "age_years"),
        ({"scanner": 9}, "scanner"),
        ({"ventricle_growth": 2.0}, "rates"),
        ({"years": -1.0}, "years"),
        ({"spacing_mm": (0.0, 1.0, 1.0)}, "spacing_mm"),
        ({"noise": -0.1}, "noise"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong, word):
    with pytest.raises(ValueError, match=word):
        BrainConfig(**{"seed": 0} | wrong)


def test_every_contrast_has_an_intensity_for_every_label():
    assert {contrast: len(table) for contrast, table in INTENSITIES.items()} == dict.fromkeys(
        CONTRASTS, len(CLASSES) + 1
    )
