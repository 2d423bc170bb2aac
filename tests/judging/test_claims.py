from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.draws import counts_of
from tests.fewlabelled import make_store, make_weights

from voxelstem import adapt, evaluate
from voxelstem.adapted import read_run
from voxelstem.answers import Answer
from voxelstem.certainty.assurance import Assurance, assure
from voxelstem.certainty.calibration import CalibrationFigure, calibration_error, recalibration, wilson_interval
from voxelstem.heads.boxes import Matched
from voxelstem.judging import claims
from voxelstem.judging.claims import (
    CalibrationOfEach,
    Claims,
    Told,
    calibrated,
    claims_of,
    ends_of_each,
    figures_of_each,
)
from voxelstem.judging.entries import enter
from voxelstem.judging.evidence import Played, sureness
from voxelstem.predict import Predictor
from voxelstem.store import Store
from voxelstem.study import Study
from voxelstem.tasks.detect import Detected


def boxes(count: int, seed: int, *, boast: float = 1.0) -> dict[str, Detected]:
    """Two classes; of the first each subject has 0 to 5 boxes, of the second every other subject has one."""
    rng = np.random.default_rng(seed)
    found: dict[str, Detected] = {}
    for at in range(count):
        own: dict[str, Matched] = {}
        for name, many in (("ball", int(rng.integers(6))), ("cube", at % 2)):
            chance = rng.uniform(0.1, 0.9, many)
            hits = rng.random(many) < chance
            odds = (chance / (1 - chance)) ** boast
            own[name] = Matched(
                scores=tuple((odds / (1 + odds)).tolist()), hits=tuple(hits.tolist()), truths=int(hits.sum()) + 1
            )
        found[f"s{at:03d}"] = Detected(by_class=own)
    return found


def told(outcomes: dict[str, Detected]) -> dict[str, Told]:
    return {name: claims_of(one) for name, one in outcomes.items()}


def naive(kind: str, sample: list[Told]) -> float:
    """The figure of each class from its claims in one list, averaged over classes that have one."""
    found: list[float] = []
    for name in sorted({name for one in sample for name in one}):
        chance = np.array([p for one in sample if name in one for p in one[name].chances])
        there = np.array([t for one in sample if name in one for t in one[name].there])
        found.append(
            {
                "ece": lambda chance=chance, there=there: calibration_error(there, chance),
                "brier": lambda chance=chance, there=there: float(((chance - there) ** 2).mean()),
                "slope": lambda chance=chance, there=there: recalibration(there, chance).slope,
            }[kind]()
        )
    defined = [value for value in found if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


@pytest.mark.parametrize("kind", ["ece", "brier", "slope"])
def test_figures_of_boxes_are_those_of_all_boxes_of_a_class_and_draws_take_whole_subjects(kind: str) -> None:
    sample = list(told(boxes(30, 4)).values())
    figure = CalibrationOfEach(figure=CalibrationFigure(kind=cast(Any, kind)))
    assert figure(sample) == pytest.approx(naive(kind, sample), abs=1e-6)
    picks = np.random.default_rng(1).integers(0, 30, (20, 30))
    slow = [naive(kind, [sample[at] for at in row]) for row in picks.tolist()]
    assert figure.of_draws(sample, counts_of(picks, 30)) == pytest.approx(slow, abs=1e-6, nan_ok=True)


def test_many_boxes_are_counted_in_parts_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = list(told(boxes(20, 5)).values())
    counts = counts_of(np.random.default_rng(1).integers(0, 20, (40, 20)), 20)
    figure = CalibrationOfEach(figure=CalibrationFigure(kind="slope"))
    whole = figure.of_draws(sample, counts)
    monkeypatch.setattr(claims, "AT_ONCE", 100)
    assert figure.of_draws(sample, counts) == pytest.approx(whole, abs=1e-7, nan_ok=True)


def test_repeats_are_measured_one_by_one_and_averaged() -> None:
    one, other = (list(told(boxes(12, seed)).values()) for seed in (1, 2))
    figure = CalibrationOfEach(figure=CalibrationFigure(kind="brier"))
    both = replace(figure, repeated=True)(list(zip(one, other, strict=True)))
    assert both == pytest.approx((figure(one) + figure(other)) / 2)


def answer(*truth: float) -> Answer:
    chances = (0.2, 0.7, 0.9)
    return Answer(classes=("a", "b", "c"), truth=truth, scores=chances, thresholds=(0.5, 0.5, 0.5))


def test_draws_in_which_nobody_of_a_class_is_leave_that_class_out() -> None:
    sample = [claims_of(answer(1.0, 0.0 if at % 2 else math.nan, math.nan)) for at in range(4)]
    figure = CalibrationOfEach(figure=CalibrationFigure(kind="brier"))
    found = figure.of_draws(sample, np.array([[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 2.0, 0.0]]))
    assert found == pytest.approx([(0.8**2 + 0.7**2) / 2, 0.8**2])
    assert math.isnan(figure([{}, {}]))
    assert math.isnan(figure([]))


def test_only_what_is_known_is_claimed() -> None:
    assert claims_of(answer(1.0, math.nan, 0.0)) == {
        "a": Claims(chances=(0.2,), there=(True,)),
        "c": Claims(chances=(0.9,), there=(False,)),
    }
    nothing, one = Matched(scores=(), hits=(), truths=2), Matched(scores=(0.6,), hits=(True,), truths=1)
    assert claims_of(Detected(by_class={"a": nothing, "b": one})) == {"b": Claims(chances=(0.6,), there=(True,))}
    for wrong in ({"chances": (), "there": ()}, {"chances": (0.5,), "there": ()}):
        with pytest.raises(ValueError, match="a chance and a truth"):
            Claims(**cast(Any, wrong))


def test_calibrated_claims_are_what_findings_state() -> None:
    sure = assure(boxes(100, 1, boast=3.0), [])
    for one in told(boxes(10, 2, boast=3.0)).values():
        after = calibrated(sure, one)
        for name, own in one.items():
            assert after[name].there == own.there
            assert after[name].chances == tuple(sure.present(name, chance).probability for chance in own.chances)
    plain = claims_of(boxes(3, 2)["s002"])
    assert calibrated(Assurance(), plain) == plain


def test_a_head_that_boasts_is_found_out_and_its_calibration_is_seen_to_help() -> None:
    sure, new = assure(boxes(200, 1, boast=3.0), []), told(boxes(200, 2, boast=3.0))
    before, after = figures_of_each(new), figures_of_each({who: calibrated(sure, one) for who, one in new.items()})
    assert before["slope"].high is not None
    assert before["slope"].high < 0.6
    assert after["slope"].low is not None
    assert after["slope"].high is not None
    assert after["slope"].low < 1 < after["slope"].high
    assert after["ece"].estimate < before["ece"].estimate / 2
    assert after["brier"].estimate < before["brier"].estimate


def test_ends_are_the_means_of_those_that_findings_state_and_the_share_that_of_all_claims() -> None:
    sure, new = assure(boxes(100, 1), []), told(boxes(50, 2))
    found = ends_of_each(sure, new)
    assert set(found) == {"ball", "cube"}
    for name, ends in found.items():
        low, high, there = list[float](), list[float](), list[bool]()
        for one in new.values():
            if name in one:
                for chance, true in zip(one[name].chances, one[name].there, strict=True):
                    said = sure.present(name, chance)
                    assert said.low is not None
                    assert said.high is not None
                    low.append(said.low)
                    high.append(said.high)
                    there.append(true)
        assert ends.overall.rows == len(there)
        assert ends.overall.mean_low == pytest.approx(sum(low) / len(low))
        assert ends.overall.mean_high == pytest.approx(sum(high) / len(high))
        assert ends.overall.came_true.estimate == pytest.approx(sum(there) / len(there))
        assert ends.overall.came_true.subjects == sum(name in one for one in new.values())
        assert ends.overall.held
    # One answer of each subject is Wilson's, and is looked at in bins of similar ends too.
    (cube,) = [found["cube"]]
    assert cube.overall.came_true == wilson_interval(cube.overall.came_true.estimate, 25)
    assert sum(each.rows for each in cube.bins) == 25
    assert not found["ball"].bins


def test_the_interval_of_a_share_of_boxes_draws_whole_subjects() -> None:
    """Ten boxes of a subject that are all right or all wrong tell as much as one."""
    sure = assure(boxes(100, 1), [])
    new = {f"s{at}": {"ball": Claims(chances=(0.5,) * 10, there=(at % 2 == 0,) * 10)} for at in range(80)}
    share = ends_of_each(sure, new)["ball"].overall.came_true
    alone = wilson_interval(0.5, 80)
    assert share.low is not None
    assert share.high is not None
    assert alone.low is not None
    assert alone.high is not None
    assert share.high - share.low == pytest.approx(alone.high - alone.low, rel=0.15)
    rng = np.random.default_rng(0)
    own = [one["ball"].there for _, one in sorted(new.items())]
    draws = []
    for _ in range(2000):
        drawn = [own[at] for at in rng.integers(0, 80, 80)]
        draws.append(sum(map(sum, drawn)) / sum(map(len, drawn)))
    assert (share.low, share.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.05)


@pytest.mark.parametrize("right", [True, False])
def test_boxes_that_are_all_right_or_all_wrong_have_an_interval_of_some_width(right: bool) -> None:
    sure = assure(boxes(100, 1), [])
    new = {f"s{at}": {"ball": Claims(chances=(0.5,) * 4, there=(right,) * 4)} for at in range(6)}
    assert ends_of_each(sure, new)["ball"].overall.came_true == wilson_interval(float(right), 6)


def test_ends_that_do_not_hold_are_seen_not_to() -> None:
    sure, new = assure(boxes(200, 1), []), told(boxes(100, 2))
    turned = {
        who: {
            n: replace(own, there=tuple(p < 0.2 and t for p, t in zip(own.chances, own.there, strict=True)))
            for n, own in one.items()
        }
        for who, one in new.items()
    }
    assert all(ends.overall.held for ends in ends_of_each(sure, new).values())
    assert not any(ends.overall.held for ends in ends_of_each(sure, turned).values())


def test_a_class_of_too_few_subjects_or_without_ends_has_none() -> None:
    sure, new = assure(boxes(100, 1), []), told(boxes(50, 2))
    few = {
        who: one if at < 3 else {n: own for n, own in one.items() if n == "ball"}
        for at, (who, one) in enumerate(sorted(new.items()))
    }
    assert set(ends_of_each(sure, few)) == {"ball"}
    assert ends_of_each(Assurance(), new) == {}


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_figures_do_not_depend_on_the_order_of_boxes_or_subjects(data: st.DataObject) -> None:
    sample = list(told(boxes(8, data.draw(st.integers(0, 20)))).values())
    turned = [
        {n: Claims(chances=own.chances[::-1], there=own.there[::-1]) for n, own in one.items()}
        for one in data.draw(st.permutations(sample))
    ]
    for kind in ("ece", "brier", "slope"):
        figure = CalibrationOfEach(figure=CalibrationFigure(kind=cast(Any, kind)))
        assert figure(turned) == pytest.approx(figure(sample), abs=1e-6, nan_ok=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of coarse phantoms, and a run that finds their livers."""
    folder = tmp_path_factory.mktemp("claims")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(folder / "site.key"))
        make_store(folder, count=24)
        (folder / "liver.json").write_text(json.dumps({"classes": {"1": "liver"}}))
        adapt.run(
            weights=make_weights(folder),
            store=folder / "store",
            labels=folder / "liver.json",
            task="detect",
            mode="probe",
            out=folder / "livers",
            settings={"see.beside": "intensity", "head.background": 800, "head.rounds": 1, "head.iterations": 20},
        )
    return folder


def test_boxes_of_phantoms_are_held_to_the_probabilities_that_predict_states(place: Path) -> None:
    store, adapted = Store.open(place / "store"), read_run(place / "livers")
    entry = enter(adapted, store, place / "liver.json", place / "features", commercial=False)
    outcomes = entry.contest.score(adapted.head, entry.features)
    played = Played(
        name="livers",
        task="detect",
        contest=entry.contest,
        outcomes=outcomes,
        assurance=adapted.assurance,
        features=entry.features,
    )
    found, predictor = sureness(played), Predictor(place / "livers")
    stated, low, high = list[float](), list[float](), list[float]()
    for record in entry.contest.tested:
        said = predictor.predict(Study(subject="t", volumes=(store.volume(record.key),))).findings.findings
        own = calibrated(adapted.assurance, claims_of(outcomes[record.subject]))["liver"].chances
        of_findings = [one.certainty for one in said if one.certainty is not None]
        # All that is counted is among what was stated: a box that finds a liver again is passed over.
        assert {round(p, 5) for p in own} <= {round(one.probability, 5) for one in of_findings}
        stated += own
        for one in own:
            ((end_low, end_high), *_) = [
                (at.low or 0.0, at.high or 0.0) for at in of_findings if abs(at.probability - one) < 2e-5
            ]
            low.append(end_low)
            high.append(end_high)
    there = np.array([hit for name in sorted(outcomes) for hit in outcomes[name].by_class["liver"].hits])
    assert found.boxes == len(stated) == len(there)
    assert 0 < there.sum() <= len(outcomes)
    brier = sum(
        (p - t) ** 2
        for name in outcomes
        for p, t in zip(
            calibrated(adapted.assurance, claims_of(outcomes[name]))["liver"].chances,
            outcomes[name].by_class["liver"].hits,
            strict=True,
        )
    ) / len(there)
    assert found.calibrated["brier"].estimate == pytest.approx(brier)
    assert found.calibrated["brier"].estimate < found.stated["brier"].estimate
    ends = found.ends["liver"].overall
    assert (ends.mean_low, ends.mean_high) == pytest.approx((np.mean(low), np.mean(high)), abs=1e-4)
    assert ends.came_true.estimate == pytest.approx(there.mean())
    assert not found.unmeasured


@pytest.mark.slow
def test_evaluate_puts_probabilities_of_boxes_on_the_page_and_into_the_json(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOXELSTEM_KEY", str(place / "site.key"))
    report = evaluate.run(
        [place / "livers"], store=place / "store", labels=place / "liver.json", out=tmp_path / "report"
    )
    (sure,) = report.sureness
    assert set(sure.stated) == set(sure.calibrated) == {"ece", "brier", "slope"}
    facts = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    (told,) = facts["sureness"]
    assert told["boxes"] == sure.boxes > 0
    assert told["calibrated"]["ece"]["estimate"] == sure.calibrated["ece"].estimate
    assert told["ends"]["liver"]["overall"]["rows"] == sure.boxes
    page = (tmp_path / "report" / "index.html").read_text()
    assert str(sure.calibrated["ece"]) in page
    assert "ends of the probability that a box is right" in page
    assert "of a box: NOT MEASURED" not in page
    assert "calibration" in report.measured
