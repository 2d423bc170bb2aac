from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.fewlabelled import make_store, make_weights

from voxelstem import adapt
from voxelstem.adapted import Adapted, read_run
from voxelstem.certainty.calibrators import Temperature
from voxelstem.findings import Weights
from voxelstem.judging import operating
from voxelstem.judging.entries import enter
from voxelstem.judging.evidence import Played
from voxelstem.judging.operating import Fixed, fix_threshold, operating_point, rates
from voxelstem.store import Store

# fairlearn 0.15.0, MetricFrame of scikit-learn's recall_score and precision_score (pos_label True, then False), over
# there = (a * a + 3 * a) % 11 < 5, said = (7 * a + 2) % 5 < 2 or (a % 4 == 0 and there), group GE where a % 3, a < 60.
FAIRLEARN = {
    "all": (0.5454545454545454, 0.5789473684210527, 0.42857142857142855, 0.6875),
    "GE": (0.6666666666666666, 0.64, 0.5263157894736842, 0.7619047619047619),
    "SIEMENS": (0.2857142857142857, 0.46153846153846156, 0.2222222222222222, 0.5454545454545454),
}


@pytest.mark.parametrize(("group", "figures"), FAIRLEARN.items())
def test_rates_of_all_and_of_each_group_are_fairlearn_s(group: str, figures: tuple[float, ...]) -> None:
    place = np.arange(60)
    there = (place * place + 3 * place) % 11 < 5
    said = ((place * 7 + 2) % 5 < 2) | ((place % 4 == 0) & there)
    of = np.where(place % 3 > 0, "GE", "SIEMENS")
    chosen = np.ones(60, dtype=bool) if group == "all" else of == group
    found = rates(there[chosen], said[chosen]).facts()
    assert [one.estimate for one in found.values()] == pytest.approx(figures, abs=1e-6)
    assert found["sensitivity"].subjects + found["specificity"].subjects == chosen.sum()
    assert found["ppv"].subjects == (said & chosen).sum()


def test_of_nobody_there_is_no_rate() -> None:
    found = rates(np.array([True, True]), np.array([True, True]))
    assert found.npv.subjects == 0
    assert np.isnan(found.npv.estimate)
    assert found.npv.low is None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("operating")
    with pytest.MonkeyPatch.context() as patch:
        key = tmp_path_factory.getbasetemp() / "operating.key"
        key.write_text("5a" * 32)  # always the same, and so are the splits
        patch.setenv("VOXELSTEM_KEY", str(key))
        make_store(folder, 36)
        make_weights(folder)
        adapt.run(
            weights=folder / "weights",
            store=folder / "store",
            labels=folder / "contrast.csv",
            task="classify",
            mode="probe",
            out=folder / "run",
        )
    return folder


@pytest.fixture
def one(place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Played, Adapted]:
    monkeypatch.setenv("VOXELSTEM_KEY", str(place.parent / "operating.key"))
    adapted = read_run(place / "run")
    entry = enter(adapted, Store.open(place / "store"), place / "contrast.csv", place / "features", commercial=False)
    played = Played(
        name="run",
        task="classify",
        contest=entry.contest,
        outcomes=entry.contest.score(adapted.head, entry.features),
        assurance=adapted.assurance,
        features=entry.features,
    )
    return played, adapted


def test_no_test_subject_has_a_say_in_the_threshold(one: tuple[Played, Adapted], tmp_path: Path) -> None:
    played, adapted = one
    fixed = fix_threshold(played, adapted, tmp_path)
    assert fixed.on == f"{len(adapted.subjects)} labelled subjects, each by a head of another fold"
    truth = played.contest.truth
    tested = set(played.contest.subjects)
    turned = {s: ({"yes": "no", "no": "yes"}[label] if s in tested else label) for s, label in truth.labels.items()}
    other = replace(played, contest=replace(played.contest, truth=replace(truth, labels=turned), tested=()))
    assert fix_threshold(other, adapted, tmp_path).threshold == fixed.threshold


def test_validation_subjects_come_first_and_are_asked_of_the_run_s_own_head(
    one: tuple[Played, Adapted], tmp_path: Path
) -> None:
    played, adapted = one
    truth, tested = played.contest.truth, set(played.contest.subjects)
    moved = tuple(
        replace(record, split="validation") if record.subject in tested else record for record in truth.records
    )
    known = [truth.labels[subject] for subject in tested]
    fixed = fix_threshold(
        replace(played, contest=replace(played.contest, truth=replace(truth, records=moved))), adapted, tmp_path
    )
    assert fixed.on == f"{len(known)} validation subjects"


def test_the_point_is_counted_at_that_threshold(one: tuple[Played, Adapted], tmp_path: Path) -> None:
    played, adapted = one
    found = operating_point(played, adapted, tmp_path)
    assert found is not None
    assert found.threshold is not None
    right = [o.scores[1] >= found.threshold for o in played.outcomes.values() if o.truth == 1]
    assert found.figures["sensitivity"].estimate == pytest.approx(np.mean(right))
    assert found.positive == "yes"
    assert not found.by_group  # phantoms have neither sex nor scanner


def test_what_predict_answers_is_counted_beside_on_the_same_subjects(
    one: tuple[Played, Adapted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule is the findings' own: the class that they name, whatever the threshold is."""
    monkeypatch.setattr(operating, "fix_threshold", lambda *_: Fixed(threshold=0.99999, on="nobody"))
    played, adapted = one
    said: dict[str, list[bool]] = {"yes": [], "no": []}
    for subject, outcome in played.outcomes.items():
        (record,) = (r for r in played.contest.tested if r.subject == subject)
        (finding,) = played.contest.task.findings(
            adapted.head,
            played.features(record.key),
            Weights(sha256="0" * 64, name="late phase", licence="mit"),
            adapted.assurance,
        )
        said["yes" if outcome.truth == 1 else "no"].append(finding.answer == "yes")
    found = operating_point(played, adapted, tmp_path)
    assert found is not None
    assert found.answers["sensitivity"].estimate == pytest.approx(np.mean(said["yes"]))
    assert found.answers["specificity"].estimate == pytest.approx(1 - np.mean(said["no"]))
    assert found.answers["sensitivity"].estimate > 0.5 > found.figures["sensitivity"].estimate
    assert found.answers["sensitivity"].subjects == found.figures["sensitivity"].subjects == len(said["yes"])


def test_the_threshold_is_told_on_the_scale_of_findings(one: tuple[Played, Adapted], tmp_path: Path) -> None:
    played, adapted = one
    plain = replace(played, assurance=replace(played.assurance, calibrator=None))
    found = operating_point(plain, adapted, tmp_path)
    assert found is not None
    assert found.shown == found.threshold
    sure = replace(played.assurance, calibrator=Temperature(temperature=0.25, classes=2, subjects=19))
    found = operating_point(replace(played, assurance=sure), adapted, tmp_path)
    assert found is not None
    assert found.threshold is not None
    stated = found.threshold
    assert found.shown == pytest.approx(stated**4 / (stated**4 + (1 - stated) ** 4))
    # Whoever is above the one is above the other.
    for outcome in played.outcomes.values():
        calibrated = sure.chances(np.array(outcome.scores))[1]
        assert (calibrated >= found.shown) == (outcome.scores[1] >= stated)


def test_too_few_subjects_leave_the_point_unmeasured_and_say_why(one: tuple[Played, Adapted], tmp_path: Path) -> None:
    played, adapted = one
    few = replace(played, contest=replace(played.contest, labelled=played.contest.labelled[:4]))
    found = operating_point(few, adapted, tmp_path)
    assert found is not None
    assert found.threshold is None
    assert "10 are needed, 3 a class" in found.why
    assert found.shown is None
    assert found.answers["sensitivity"].subjects  # what predict answers needs no threshold
    whole = replace(adapted, config=replace(adapted.config, mode="full"))
    told = operating_point(played, whole, tmp_path)
    assert told is not None
    assert "train the network anew" in told.why


def test_three_classes_have_no_one_threshold(one: tuple[Played, Adapted], tmp_path: Path) -> None:
    played, adapted = one
    three = replace(played, contest=replace(played.contest, classes=("a", "b", "c")))
    assert operating_point(three, adapted, tmp_path) is None
