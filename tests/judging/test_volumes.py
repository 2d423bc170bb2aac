from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.fewlabelled import make_store, make_weights

from voxelstem import adapt, evaluate
from voxelstem.adapted import read_run
from voxelstem.certainty.assurance import Assurance, assure
from voxelstem.certainty.calibration import wilson_interval
from voxelstem.certainty.volumes import Sizes
from voxelstem.findings import Finding, Place, Weights
from voxelstem.judging.entries import enter
from voxelstem.judging.evidence import Played, sureness
from voxelstem.judging.volumes import sizes_of, subjects_of_each, volumes_held
from voxelstem.predict import Predictor
from voxelstem.store import Store
from voxelstem.study import Study

SIZES = {"liver": 1.5e6, "spleen": 2e5, "cyst": 4e3}
WEIGHTS = Weights(sha256="0" * 64, name="organs", licence="apache-2.0")


def scan(rng: np.random.Generator, error: float, *, found: float = 1.0) -> Sizes:
    """A scan whose structures are marked about as large as they are; with `found` below 1 cysts are missed."""
    true = {name: size * float(rng.uniform(0.7, 1.3)) for name, size in SIZES.items()}
    marked = {name: size * max(1 + error * float(rng.normal()), 0.05) for name, size in true.items()}
    marked["cyst"] *= rng.random() < found
    return Sizes(predicted_mm3=marked, true_mm3=true)


def scans(count: int, seed: int, error: float, *, found: float = 1.0) -> dict[str, tuple[Sizes, ...]]:
    """One or two scans of each subject."""
    rng = np.random.default_rng(seed)
    return {f"s{at}": tuple(scan(rng, error, found=found) for _ in range(1 + at % 2)) for at in range(count)}


def sure_of(error: float, count: int = 60) -> Assurance:
    rng = np.random.default_rng(1)
    return assure({f"k{at}": scan(rng, error) for at in range(count)}, [])


def naive(sure: Assurance, sizes: dict[str, tuple[Sizes, ...]], only: str = "") -> tuple[float, int]:
    """Ask for a finding of every structure, as `predict` would hand it out; a mean over subjects, and how many."""
    shares: list[float] = []
    for one in sizes.values():
        held: list[bool] = []
        for each in one:
            for name, marked in each.predicted_mm3.items():
                if marked <= 0 or (only and name != only):
                    continue
                finding = Finding(name=name, kind="segment", weights=WEIGHTS, place=Place(volume_mm3=marked))
                told = sure.sized(finding).quantity
                if told is not None:
                    assert told.low is not None
                    assert told.high is not None
                    held.append(told.low <= each.true_mm3[name] / 1000 <= told.high)
        if held:
            shares.append(sum(held) / len(held))
    return sum(shares) / len(shares), len(shares)


def test_coverage_is_that_of_the_findings_of_each_scan_and_a_subject_counts_once() -> None:
    sure, new = sure_of(0.1), scans(40, 2, 0.1, found=0.5)
    found = volumes_held(sure, new)
    assert found is not None
    share, subjects = naive(sure, new)
    assert found.overall.estimate == pytest.approx(share)
    assert found.overall.subjects == subjects == 40
    assert found.overall == wilson_interval(found.overall.estimate, 40)
    for name, value in found.by_structure.items():
        share, subjects = naive(sure, new, name)
        assert value.estimate == pytest.approx(share)
        assert value.subjects == subjects
    assert found.by_structure["cyst"].subjects < 40
    every = [one for own in new.values() for one in own]
    assert found.missed == sum(one.predicted_mm3["cyst"] == 0 for one in every) > 0
    assert found.volumes == 3 * len(every) - found.missed
    assert found.level == pytest.approx(0.9)


def test_a_promise_that_is_kept_is_seen_to_be_and_one_that_is_not_too() -> None:
    sure = sure_of(0.1)
    kept, broken = (volumes_held(sure, scans(150, 3, error)) for error in (0.1, 0.4))
    assert kept is not None
    assert broken is not None
    for share in (kept.overall, *kept.by_structure.values()):
        assert share.low is not None
        assert share.high is not None
        assert share.low < 0.95
        assert share.high > 0.85
    for share in (broken.overall, *broken.by_structure.values()):
        assert share.high is not None
        assert share.high < 0.6


def test_structures_of_too_few_subjects_and_those_without_intervals_are_left_out() -> None:
    sure, new = sure_of(0.1), scans(5, 2, 0.1)
    rare = {
        who: tuple(
            Sizes(predicted_mm3={**one.predicted_mm3, **({} if at < 2 else {"cyst": 0.0})}, true_mm3=one.true_mm3)
            for one in own
        )
        for at, (who, own) in enumerate(new.items())
    }
    found = volumes_held(sure, rare)
    assert found is not None
    assert set(found.by_structure) == {"liver", "spleen"}
    assert subjects_of_each(sure, rare) == {"cyst": 2, "liver": 5, "spleen": 5}
    other = {
        who: tuple(Sizes(predicted_mm3={"eye": 7e3}, true_mm3={"eye": 7e3}) for _ in own) for who, own in new.items()
    }
    assert volumes_held(sure, other) is None  # no interval was made for such a thing
    more = {
        who: tuple(
            Sizes(predicted_mm3={**one.predicted_mm3, "eye": 0.0}, true_mm3={**one.true_mm3, "eye": 7e3}) for one in own
        )
        for who, own in new.items()
    }
    assert volumes_held(sure, more) == volumes_held(sure, new)  # and so it is not missed either
    assert volumes_held(sure, dict(list(new.items())[:2])) is None
    assert volumes_held(sure, {}) is None
    assert volumes_held(Assurance(), new) is None
    assert subjects_of_each(Assurance(), new) == {}


def test_what_is_found_where_nothing_is_counts_with_its_true_volume_of_nothing() -> None:
    ghost = {f"s{at}": (Sizes(predicted_mm3={"cyst": 4e3}, true_mm3={"cyst": 0.0}),) for at in range(4)}
    found = volumes_held(sure_of(0.1), ghost)
    assert found is not None
    assert found.overall.estimate == 0.0
    assert found.missed == 0


def test_intervals_that_are_far_too_wide_are_seen_to_hold_always() -> None:
    """An error of as much as the volume makes intervals that begin at 0: they hold nearly all, and say so."""
    wide = volumes_held(sure_of(0.8), scans(50, 3, 0.05))
    assert wide is not None
    assert wide.overall.estimate == pytest.approx(1.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of coarse phantoms, and a run that segments them."""
    folder = tmp_path_factory.mktemp("volumes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(folder / "site.key"))
        make_store(folder, count=24)
        adapt.run(
            weights=make_weights(folder),
            store=folder / "store",
            labels=folder / "labels.json",
            task="segment",
            mode="probe",
            out=folder / "organs",
            settings={"see.beside": "intensity", "head.iterations": 15},
        )
    return folder


def entered(place: Path, store: Store) -> Played:
    adapted = read_run(place / "organs")
    entry = enter(adapted, store, place / "labels.json", place / "features", commercial=False)
    return Played(
        name="organs",
        task="segment",
        contest=entry.contest,
        outcomes={subject: {"liver": 0.5} for subject in entry.contest.subjects},
        assurance=adapted.assurance,
        features=entry.features,
        sizes=sizes_of("organs", entry.contest, adapted.head, entry.features),
    )


def test_phantoms_are_measured_as_predict_hands_out_their_volumes_and_a_broken_promise_shows(place: Path) -> None:
    store = Store.open(place / "store")
    played, predictor = entered(place, store), Predictor(place / "organs")
    told = list[bool]()
    for record in played.contest.tested:
        volume, labels = store.volume(record.key), store.labels(record.key)
        assert labels is not None
        number = {name: value for value, name in labels.classes.items()}
        voxel_ml = abs(np.linalg.det(volume.affine_ras[:3, :3])) / 1000
        for finding in predictor.predict(Study(subject="t", volumes=(volume,))).findings.findings:
            size = finding.quantity
            if size is not None:
                assert size.low is not None
                assert size.high is not None
                true_ml = (labels.array == number[finding.name]).sum() * voxel_ml
                told.append(size.low <= true_ml <= size.high)
    found = sureness(played)
    assert found.volumes is not None
    assert found.volumes.volumes == len(told) == 3 * len(played.contest.subjects)
    assert found.volumes.overall.estimate == pytest.approx(sum(told) / len(told))  # one scan and three organs of each
    assert found.volumes.overall.high is not None
    assert found.volumes.overall.high >= 0.9
    assert set(found.volumes.by_structure) == {"lung_left", "lung_right", "liver"}
    assert not found.unmeasured
    intervals = played.assurance.volumes
    assert intervals is not None
    thresholds = replace(intervals.thresholds, values=tuple(value / 50 for value in intervals.thresholds.values))
    wrong = replace(played.assurance, volumes=replace(intervals, thresholds=thresholds))
    broken = sureness(replace(played, assurance=wrong)).volumes
    assert broken is not None
    assert broken.overall.high is not None
    assert broken.overall.high < 0.6


@pytest.mark.slow
def test_evaluate_puts_the_coverage_of_volumes_on_the_page_and_into_the_json(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOXELSTEM_KEY", str(place / "site.key"))
    report = evaluate.run(
        [place / "organs"],
        store=place / "store",
        labels=place / "labels.json",
        out=tmp_path / "report",
        config=evaluate.EvaluateConfig(unet_steps=0),
    )
    (sure,) = report.sureness
    assert sure.volumes is not None
    assert sure.volumes == sureness(entered(place, Store.open(place / "store"))).volumes
    facts = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    (told,) = facts["sureness"]
    assert told["volumes"]["overall"]["estimate"] == sure.volumes.overall.estimate
    assert told["unmeasured"] == {}
    page = (tmp_path / "report" / "index.html").read_text()
    assert f"for 90% held it for {sure.volumes.overall}" in page
    assert "intervals of volumes hold the true volume: NOT MEASURED" not in page
    assert "calibration" in report.measured
