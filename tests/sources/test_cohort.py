from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from voxelstem.errors import VoxelstemError
from voxelstem.heads.survival import Watched, harrell_c, kaplan_meier
from voxelstem.sources import nifti
from voxelstem.sources.cohort import COLUMNS, CohortConfig, Fate, cohort, cohort_files, fate, write_survival
from voxelstem.sources.phantom import phantom_anatomy
from voxelstem.store.labels import read_labels
from voxelstem.store.subjects import pseudonym

COARSE = CohortConfig(spacing_mm=(12.0, 12.0, 12.0))


@pytest.fixture(scope="module")
def many() -> list[Fate]:
    return [fate(COARSE, seed) for seed in range(120)]


def test_the_hazard_is_what_the_patient_s_body_says(many: list[Fate]) -> None:
    for seed in (0, 7, 30):
        known, anatomy = many[seed], phantom_anatomy(COARSE.patient(seed))
        a, b, c = anatomy.organs["spleen"].radii_mm
        assert known.spleen_ml == pytest.approx(4.18879 * a * b * c / 1000, rel=1e-4)
        whole = sum(4.18879 * lesion.radius_mm**3 for lesion in anatomy.lesions)
        assert 4.18879 * known.lesion_mm**3 == pytest.approx(whole, rel=1e-4, abs=1e-9)
        assert known.fat_mm == anatomy.body_mm[0] - anatomy.muscle_mm[0]
        # e^log2(x) is x^(1/ln 2).
        ratio = (known.spleen_ml / 165) ** (1 / math.log(2)) * math.exp((known.lesion_mm + known.fat_mm - 19) / 10)
        assert known.hazard_per_month == pytest.approx(math.log(2) / 24 * ratio)


def test_the_picture_shows_what_decides(many: list[Fate]) -> None:
    """Whoever has the larger spleen or lesions has more voxels of them."""
    seen, drawn = [], []
    for known, study in zip(many, cohort(replace(COARSE, spacing_mm=(6.0, 6.0, 6.0)), range(24)), strict=False):
        (volume,) = study.volumes
        assert volume.labels is not None
        count = {name: (volume.labels.array == value).sum() for value, name in volume.labels.classes.items()}
        ball_ml = 4.18879e-3 * known.lesion_mm**3
        assert count["lesion"] * 0.216 == pytest.approx(ball_ml, rel=0.25, abs=0.6)
        seen.append(math.log(count["spleen"]))
        drawn.append(math.log(known.spleen_ml))
    assert np.corrcoef(seen, drawn)[0, 1] > 0.85


def test_the_true_hazard_ranks_three_pairs_of_four_and_no_single_cause_as_many(many: list[Fate]) -> None:
    watched = Watched.of(known.survival for known in many)
    ceiling = harrell_c(watched, np.array([known.hazard_per_month for known in many]))
    assert 0.7 < ceiling < 0.85
    for cause in ("spleen_ml", "lesion_mm", "fat_mm"):
        assert 0.5 < harrell_c(watched, np.array([getattr(known, cause) for known in many])) < ceiling


def test_hazards_are_fulfilled() -> None:
    """Events fall as exp(-hazard t): the sum of hazards over time is about the number of events."""
    usual = replace(COARSE, per_spleen_doubling=0.0, per_lesion_cm=0.0, per_fat_cm=0.0)
    known = [fate(usual, seed) for seed in range(150)]
    assert {one.hazard_per_month for one in known} == {math.log(2) / 24}
    curve = kaplan_meier(Watched.of(one.survival for one in known))
    for month in (12.0, 24.0, 48.0):
        assert curve.at(np.array([month]))[0] == pytest.approx(0.5 ** (month / 24), abs=0.1)


def test_watches_end_whoever_the_patient_is(many: list[Fate]) -> None:
    """With the event out of reach, everybody is censored at the very time that the others' watches end."""
    safe = [fate(replace(COARSE, median_months=1e9), seed) for seed in range(120)]
    assert not any(one.survival.event for one in safe)
    ends = np.array([one.survival.time for one in safe])
    assert (ends >= 6).all()
    assert (ends <= 60).all()
    assert abs(np.corrcoef(ends, [math.log(one.hazard_per_month) for one in safe])[0, 1]) < 0.2
    for one, other in zip(many, safe, strict=True):
        assert one.survival.time <= other.survival.time
        assert one.survival.event or one.survival.time == other.survival.time
    assert 0.4 < np.mean([one.survival.event for one in many]) < 0.9


def test_another_effect_leaves_the_patient_and_the_luck_as_they_were(many: list[Fate]) -> None:
    other = [fate(replace(COARSE, per_fat_cm=0.0), seed) for seed in range(10)]
    for one, two in zip(many, other, strict=False):
        assert (one.spleen_ml, one.lesion_mm, one.fat_mm) == (two.spleen_ml, two.lesion_mm, two.fat_mm)
        if one.survival.event and two.survival.event:
            luck = [each.survival.time * each.hazard_per_month for each in (one, two)]
            assert luck[0] == pytest.approx(luck[1], abs=0.02)


def test_files_are_what_adapt_reads(tmp_path: Path, many: list[Fate]) -> None:
    files = cohort_files(tmp_path, COARSE, range(3))
    read = read_labels(files.survival, "survive", bytes(32)).labels
    assert read == {pseudonym(known.subject, bytes(32)): known.survival for known in many[:3]}
    with files.survival.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert tuple(rows[0]) == COLUMNS
    assert [float(row["hazard_per_month"]) for row in rows] == pytest.approx([k.hazard_per_month for k in many[:3]])
    for row in rows:
        study = nifti.read(files.scans / row["subject"] / "ct.nii.gz", subject=row["subject"])
        assert study.volumes[0].spacing_mm == pytest.approx((12.0, 12.0, 12.0))
    assert (files.labels / "labels.json").is_file()
    assert len(files.reports.read_text().splitlines()) == 3


def test_the_same_seed_is_the_same_patient() -> None:
    (one,), (other,) = cohort(COARSE, [5]), cohort(COARSE, [5])
    assert one.subject == "cohort-000005"
    assert one.labels == other.labels
    np.testing.assert_array_equal(one.volumes[0].array, other.volumes[0].array)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_fat_cm": math.nan}, "effects must be finite"),
        ({"median_months": 0.0}, "median_months must be positive"),
        ({"watched_months": (9.0, 6.0)}, "from short to long"),
        ({"watched_months": (0.0, 6.0)}, "from short to long"),
        ({"spacing_mm": (0.0, 1.0, 1.0)}, "spacing_mm must be positive"),
        ({"orientation": "XYZ"}, "orientation must be"),
        ({"lesion_radius_mm": (9.0, 3.0)}, "from small to large"),
        ({"noise_hu": -1.0}, "noise_hu"),
    ],
)
def test_settings_without_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CohortConfig(**changes)  # pyright: ignore[reportArgumentType]


def test_a_table_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(VoxelstemError, match=r"survival\.csv cannot be written"):
        write_survival(tmp_path / "absent" / "survival.csv", [])
