from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest

from voxelstem.answers import Answer
from voxelstem.certainty.assurance import Assurance, assure
from voxelstem.certainty.calibration import CalibrationFigure
from voxelstem.certainty.thresholds import coverage
from voxelstem.certainty.volumes import Sizes
from voxelstem.heads.boxes import Matched
from voxelstem.judging.contest import Contest
from voxelstem.judging.evidence import (
    Played,
    against,
    between,
    difference_of_shares,
    prevalence,
    sureness,
)
from voxelstem.protocols import Example
from voxelstem.store import Record
from voxelstem.study import Acquisition
from voxelstem.tasks.classify import Classify, Guess
from voxelstem.tasks.detect import Detected
from voxelstem.tasks.regress import Measured, Regress
from voxelstem.truth import Truth


@dataclass(frozen=True)
class Seen:
    scan: np.ndarray
    tokens: None = None
    tokens_affine_ras: None = None


@dataclass(frozen=True)
class Line:
    """What is asked of a record here."""

    key: str
    subject: str
    labels: dict[str, str] = field(default_factory=dict)
    acquisition: Acquisition = field(default_factory=Acquisition)


def contest(task: Any, tested: int, labels: dict[str, str] | None = None, labelled: tuple[str, ...] = ()) -> Contest:
    return Contest(
        store=cast(Any, None),
        truth=Truth(records=(), labels=labels or {}, classes=("no", "yes")),
        task=task,
        mode="probe",
        classes=("no", "yes"),
        labelled=tuple(cast(Record, Line(key=name, subject=name)) for name in labelled),
        tested=tuple(cast(Record, Line(key=f"t{place}", subject=f"t{place}")) for place in range(tested)),
        seed=0,
    )


def guesses(count: int, seed: int, boast: float, prefix: str) -> dict[str, Guess]:
    rng = np.random.default_rng(seed)
    chance = rng.uniform(0.1, 0.9, count)
    truth = rng.random(count) < chance
    odds = (chance / (1 - chance)) ** boast
    said = odds / (1 + odds)
    return {
        f"{prefix}{place}": Guess(truth=int(there), scores=(1 - share, share))
        for place, (there, share) in enumerate(zip(truth, said.tolist(), strict=True))
    }


def scans(count: int, middle: float = 2.0) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(7).normal(size=(count, 5)) + middle
    return {f"t{place}": row for place, row in enumerate(rows)}


def played(outcomes: dict[str, Any], sure: Assurance, task: Any, name: str = "run") -> Played:
    rows = scans(len(outcomes))
    return Played(
        name=name,
        task="classify",
        contest=contest(task, len(outcomes)),
        outcomes=outcomes,
        assurance=sure,
        features=lambda key: cast(Any, Seen(scan=rows[key])),
    )


def known(count: int = 40) -> list[Example]:
    rows = np.random.default_rng(3).normal(size=(count, 5)) + 2.0
    return [
        Example(subject=f"k{place}", key=f"k{place}", features=Seen(scan=row), affine_ras=np.eye(4))
        for place, row in enumerate(rows)
    ]


def test_calibration_is_measured_before_and_after_and_sets_by_how_often_they_hold_the_truth() -> None:
    sure = assure(guesses(300, 1, 3.0, "k"), known())
    found = sureness(played(guesses(200, 2, 3.0, "t"), sure, Classify()))
    assert found.subjects == 300
    assert found.calibrated["ece"].estimate < found.stated["ece"].estimate
    assert found.calibrated["brier"].estimate < found.stated["brier"].estimate
    assert found.stated["slope"].estimate < 0.5
    assert abs(found.calibrated["slope"].estimate - 1) < abs(found.stated["slope"].estimate - 1)
    assert found.covered is not None
    assert found.covered.low is not None
    assert found.covered.high is not None
    assert found.covered.low <= 0.93
    assert found.covered.high >= 0.87
    assert found.level == pytest.approx(0.9)
    assert found.set_size is not None
    assert 1.0 <= found.set_size <= 2.0
    assert found.flagged is not None
    assert found.flagged.estimate < 0.25
    assert found.flagged_by_centres is not None
    assert found.flagged_by_centres.estimate < 0.25
    assert found.width is not None
    assert 0.01 < found.width < 0.3
    assert sum(each.rows for each in found.bins) == 200
    assert sum(each.held for each in found.bins) >= len(found.bins) - 1


def test_a_run_without_assurance_has_stated_figures_only() -> None:
    found = sureness(played(guesses(50, 2, 1.0, "t"), Assurance(notes=("not calibrated: too few",)), Classify()))
    assert set(found.stated) == {"ece", "brier", "slope"}
    assert not found.calibrated
    assert found.covered is None
    assert found.level is None
    assert found.flagged is None
    assert found.width is None
    assert found.bins == ()
    assert found.notes == ("not calibrated: too few",)


def test_intervals_of_numbers_are_held_to_their_word() -> None:
    rng = np.random.default_rng(0)

    def measured(prefix: str, count: int) -> dict[str, Measured]:
        truth, error = rng.normal(50, 10, count), rng.normal(0, 3, count)
        return {
            f"{prefix}{place}": Measured(truth=float(value), predicted=float(value + gap))
            for place, (value, gap) in enumerate(zip(truth, error, strict=True))
        }

    found = sureness(played(measured("t", 200), assure(measured("k", 100), known()), Regress()))
    assert not found.stated
    assert found.covered is not None
    assert abs(found.covered.estimate - 0.9) < 0.07
    assert found.set_size is None


def of_makers(one: Played, makers: dict[str, str]) -> Played:
    """The same, with scans of these makers."""
    lines = tuple(
        cast(
            Record,
            Line(key=name, subject=name, acquisition=Acquisition(facts={"Manufacturer": maker} if maker else {})),
        )
        for name, maker in makers.items()
    )
    return replace(one, contest=replace(one.contest, tested=lines))


def test_sets_and_intervals_are_measured_as_each_maker_s_subjects_would_get_them() -> None:
    rng = np.random.default_rng(0)

    def measured(prefix: str, count: int) -> dict[str, Measured]:
        """The first half errs by 1 at most, the second by 10."""
        return {
            f"{prefix}{at:03d}": Measured(
                truth=0.0, predicted=float(rng.uniform(-1, 1)) * (1 if at < count // 2 else 10)
            )
            for at in range(count)
        }

    def makers(names: list[str]) -> dict[str, str]:
        return {name: "GE" if at < len(names) // 2 else "Siemens" for at, name in enumerate(names)}

    learned, tested = measured("k", 400), measured("t", 400)
    known_of = {name: maker.lower() for name, maker in makers(list(learned)).items()}
    sure = assure(learned, known(), groups=known_of)
    one = replace(played({name: tested[name] for name in tested}, sure, Regress()), features=lambda _: None)  # type: ignore[arg-type, return-value]
    one = replace(one, assurance=replace(sure, known=None, centres=None))
    found = sureness(of_makers(one, makers(list(tested))))
    held = [
        sure.of_group(maker.lower()).quantity(tested[name].predicted, "1")
        for name, maker in makers(list(tested)).items()
    ]
    told = [q.low is not None and q.high is not None and q.low <= 0.0 <= q.high for q in held]
    assert found.covered is not None
    assert found.covered.estimate == pytest.approx(np.mean(told))
    groups = found.by_group["scanner"]
    assert groups["ge"].estimate == pytest.approx(0.9, abs=0.06)  # by the common threshold all 200 would be held
    assert groups["siemens"].estimate == pytest.approx(0.9, abs=0.06)

    easy, hard = guesses(300, 1, 1.0, "e"), guesses(300, 2, 1.0, "h")
    hard = {name: Guess(truth=1 - said.truth, scores=said.scores) for name, said in hard.items()}
    sets = assure(easy | hard, [], groups=dict.fromkeys(easy, "ge") | dict.fromkeys(hard, "siemens"))
    new = {name: said for at, (name, said) in enumerate((easy | hard).items()) if at % 3 == 0}
    of = {name: {"e": "GE MEDICAL SYSTEMS", "h": "SIEMENS"}[name[0]] for name in new}
    of[min(new)] = ""
    judged = sureness(of_makers(replace(one, outcomes=new, assurance=sets, task="classify"), of))
    kept = [
        (
            sets.of_group({"e": "ge", "h": "siemens"}[name[0]] if maker else "")
            .certainty(("no", "yes"), np.array(new[name].scores))[1]
            .conformal
            or ()
        )
        for name, maker in of.items()
    ]
    assert judged.covered is not None
    truths = [("no", "yes")[said.truth] for said in new.values()]
    assert judged.covered.estimate == pytest.approx(np.mean([t in own for t, own in zip(truths, kept, strict=True)]))
    assert judged.set_size == pytest.approx(np.mean([len(own) for own in kept]))


def answers(count: int, seed: int, prefix: str) -> dict[str, Answer]:
    """Two classes that boast, the second known of every other subject, and one of whom nobody knows."""
    rng = np.random.default_rng(seed)
    found: dict[str, Answer] = {}
    for at in range(count):
        chance = rng.uniform(0.1, 0.9, 2)
        truth = (rng.random(2) < chance).astype(float)
        odds = (chance / (1 - chance)) ** 3.0
        said = odds / (1 + odds)
        found[f"{prefix}{at}"] = Answer(
            classes=("a", "b", "c"),
            truth=(float(truth[0]), math.nan if at % 2 else float(truth[1]), math.nan),
            scores=(float(said[0]), float(said[1]), 0.5),
            thresholds=(0.5, 0.5, 0.5),
        )
    return found


def test_yes_and_no_of_many_classes_are_measured_before_and_after_like_one_class_of_two() -> None:
    sure, new = assure(answers(400, 1, "k"), known()), answers(300, 2, "t")
    assert sure.yesno is not None
    found = sureness(played(new, sure, Classify()))
    for kind in ("ece", "brier", "slope"):
        for side, calibrated in ((found.stated, False), (found.calibrated, True)):
            each: list[float] = []
            for at, name in enumerate(("a", "b")):
                rows = [one for one in new.values() if not math.isnan(one.truth[at])]
                said = [
                    sure.present(name, one.scores[at]).probability if calibrated else one.scores[at] for one in rows
                ]
                alone = [Guess(truth=int(one.truth[at]), scores=(1 - p, p)) for one, p in zip(rows, said, strict=True)]
                each.append(CalibrationFigure(kind=cast(Any, kind))(alone))
            assert side[kind].estimate == pytest.approx(np.mean(each))
            assert side[kind].low is not None
    assert found.calibrated["ece"].estimate < found.stated["ece"].estimate
    assert abs(found.calibrated["slope"].estimate - 1) < abs(found.stated["slope"].estimate - 1)
    assert found.covered is None
    assert set(found.ends) == {"a", "b"}
    assert all(one.overall.held and sum(each.held for each in one.bins) >= 4 for one in found.ends.values())
    assert not found.unmeasured
    assert not sureness(played(new, Assurance(), Classify())).calibrated
    nothing = sureness(played(new, Assurance(), Classify()))
    assert not nothing.ends
    assert nothing.unmeasured == {"intervals of the probability of yes or no": "the run has none"}


def in_boxes(count: int, seed: int, prefix: str, boast: float = 1.0, each: int = 3) -> dict[str, Detected]:
    """Boxes of one class that are right as often as they say, or boast."""
    rng = np.random.default_rng(seed)
    found: dict[str, Detected] = {}
    for at in range(count):
        chance = rng.uniform(0.1, 0.9, each)
        hits = rng.random(each) < chance
        odds = (chance / (1 - chance)) ** boast
        said = tuple((odds / (1 + odds)).tolist())
        found[f"{prefix}{at}"] = Detected(
            by_class={"ball": Matched(scores=said, hits=tuple(hits.tolist()), truths=each)}
        )
    return found


def in_sizes(count: int, seed: int, prefix: str, error: float) -> dict[str, Sizes]:
    """Livers about as large as they are marked, and spleens a little nearer to it."""
    rng = np.random.default_rng(seed)
    found: dict[str, Sizes] = {}
    for at in range(count):
        liver, spleen = 1.5e6 * rng.uniform(0.8, 1.2), 2e5 * rng.uniform(0.8, 1.2)
        marked = {"liver": liver * (1 + error * rng.normal()), "spleen": spleen * (1 + error / 2 * rng.normal())}
        found[f"{prefix}{at}"] = Sizes(predicted_mm3=marked, true_mm3={"liver": liver, "spleen": spleen})
    return found


def test_probabilities_of_boxes_are_measured_before_and_after_with_their_ends() -> None:
    sure = assure(in_boxes(120, 1, "k", boast=3.0), known())
    found = sureness(played(in_boxes(60, 2, "t", boast=3.0), sure, cast(Any, None)))
    assert found.boxes == 180
    assert found.calibrated["ece"].estimate < found.stated["ece"].estimate
    assert abs(found.calibrated["slope"].estimate - 1) < abs(found.stated["slope"].estimate - 1)
    assert found.stated["ece"].subjects == 60
    assert found.stated["ece"].low is not None
    assert set(found.ends) == {"ball"}
    assert found.ends["ball"].overall.rows == 180
    assert found.ends["ball"].overall.held
    assert not found.unmeasured
    plain = sureness(played(in_boxes(60, 2, "t", boast=3.0), Assurance(), cast(Any, None)))
    assert plain.stated == found.stated
    assert not plain.calibrated
    assert plain.unmeasured == {"intervals of the probability of a box": "the run has none"}


def test_boxes_of_too_few_subjects_are_not_measured_and_it_says_so() -> None:
    sure = assure(in_boxes(40, 1, "k"), known())
    none = Detected(by_class={"ball": Matched(scores=(), hits=(), truths=1)})
    found = sureness(played(in_boxes(2, 2, "t") | {"t2": none, "t3": none}, sure, cast(Any, None)))
    assert not found.stated
    assert found.boxes == 0
    assert not found.ends
    why = "2 test subjects have any, 3 are the least"
    assert found.unmeasured == {
        "how often boxes are right that are said to be": why,
        "intervals of the probability of a box, 'ball'": why,
    }


class Marks:
    """A task that labels voxels, of which nothing else is asked here."""

    metrics = ()

    def mark(self) -> None:
        """Stands for that of a real one."""


def test_intervals_of_volumes_are_held_to_their_word_of_each_structure_and_of_all() -> None:
    sure = assure(in_sizes(100, 1, "k", 0.1), known())
    new = {who: (one,) for who, one in in_sizes(100, 2, "t", 0.1).items()}
    plain = played({who: {"liver": 0.9} for who in new}, sure, cast(Any, Marks()))
    found = sureness(replace(plain, sizes=new))
    assert found.volumes is not None
    assert found.volumes.level == pytest.approx(0.9)
    assert found.volumes.overall.estimate == pytest.approx(0.9, abs=0.06)
    assert set(found.volumes.by_structure) == {"liver", "spleen"}
    assert not found.unmeasured
    # Where segmentations err by three times as much as they did while held out, the promise is broken, and it shows.
    worse = {who: (one,) for who, one in in_sizes(100, 2, "t", 0.3).items()}
    broken = sureness(replace(plain, sizes=worse)).volumes
    assert broken is not None
    assert broken.overall.high is not None
    assert broken.overall.high < 0.65


def test_volumes_that_could_not_be_measured_are_named_with_the_reason() -> None:
    sure = assure(in_sizes(100, 1, "k", 0.1), known())
    what = "how often intervals of volumes hold the true volume"
    new = {who: (one,) for who, one in in_sizes(5, 2, "t", 0.1).items()}
    plain = played({who: {"liver": 0.9} for who in new}, sure, cast(Any, Marks()))
    assert sureness(replace(plain, assurance=Assurance())).unmeasured == {what: "the run has none"}
    few = dict(list(new.items())[:2])
    assert sureness(replace(plain, sizes=few)).unmeasured == {what: "2 test subjects have any, 3 are the least"}
    no_spleen = {
        who: tuple(Sizes(predicted_mm3={**one.predicted_mm3, "spleen": 0.0}, true_mm3=one.true_mm3) for one in scans)
        for who, scans in new.items()
    }
    found = sureness(replace(plain, sizes=no_spleen))
    assert found.unmeasured == {f"{what}, 'spleen'": "0 test subjects have any, 3 are the least"}
    assert found.volumes is not None
    assert set(found.volumes.by_structure) == {"liver"}
    assert found.volumes.missed == 5


def test_two_runs_are_compared_subject_by_subject_and_the_better_one_is_above_zero() -> None:
    good, bad = guesses(120, 2, 1.0, "t"), guesses(120, 2, 1.0, "t")
    rng = np.random.default_rng(9)
    bad = {name: replace(one, scores=tuple(rng.permutation(one.scores).tolist())) for name, one in bad.items()}
    one, other = (played(some, Assurance(), Classify(), name) for name, some in (("good", good), ("bad", bad)))
    found = {pair.metric: pair for pair in between([one, other])}
    assert set(found) == {"auroc", "balanced_accuracy"}
    assert found["auroc"].difference.low is not None
    assert found["auroc"].difference.low > 0
    assert (found["auroc"].one, found["auroc"].other) == ("good", "bad")
    apart = replace(other, outcomes={name: bad[name] for name in list(bad)[:100]})
    assert between([one, apart]) == []


def test_of_errors_less_is_better() -> None:
    truth = {f"t{place}": float(place) for place in range(30)}
    near = {name: Measured(truth=value, predicted=value + 1) for name, value in truth.items()}
    far = {name: Measured(truth=value, predicted=value + 5) for name, value in truth.items()}
    runs = [played(cast(Any, some), Assurance(), Regress(), name) for name, some in (("near", near), ("far", far))]
    (mae,) = [pair for pair in between(runs) if pair.metric == "mae"]
    assert mae.difference.estimate == pytest.approx(4.0)


def test_shares_of_classes_are_those_of_subjects() -> None:
    labels = {"a": "yes", "b": "no", "t0": "yes", "t1": "no", "t2": "no", "t3": "no"}
    one = replace(
        played(guesses(4, 0, 1.0, "t"), Assurance(), Classify()), contest=contest(Classify(), 4, labels, ("a", "b"))
    )
    found = prevalence(one)
    assert found is not None
    assert found.labelled == {"no": 0.5, "yes": 0.5}
    assert found.tested == {"no": 0.75, "yes": 0.25}
    assert prevalence(played(guesses(4, 0, 1.0, "t"), Assurance(), Classify())) is None
    assert prevalence(replace(one, contest=contest(Classify(), 4, labels, ()))) is None


def test_a_shift_of_shares_is_told_where_it_is_beyond_chance_and_not_where_it_is_not() -> None:
    def shift(yes_labelled: int, yes_tested: int) -> str:
        labels = {f"a{place}": "yes" if place < yes_labelled else "no" for place in range(100)}
        labels |= {f"t{place}": "yes" if place < yes_tested else "no" for place in range(100)}
        learned = tuple(name for name in labels if name.startswith("a"))
        one = replace(
            played(guesses(100, 0, 1.0, "t"), Assurance(), Classify()),
            contest=contest(Classify(), 100, labels, learned),
        )
        found = prevalence(one)
        assert found is not None
        assert found.shift["yes"].estimate == pytest.approx((yes_tested - yes_labelled) / 100)
        return found.words

    assert "beyond chance: 'no' 50% to 80%, 'yes' 50% to 20%" in shift(50, 20)
    assert "intervals include zero" in shift(50, 44)


def test_the_interval_of_a_difference_of_shares_is_newcombe_s() -> None:
    # Newcombe 1998, table II, method 10: 56/70 - 48/80, 9/10 - 3/10 and 10/10 - 0/20.
    for one, other, low, high in (
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0),
    ):
        found = difference_of_shares(one, other)
        assert found.low == pytest.approx(low, abs=6e-5)
        assert found.high == pytest.approx(high, abs=6e-5)
    wide = difference_of_shares((9, 10), (3, 10), looks=3)
    assert wide.level == pytest.approx(1 - 0.05 / 3)
    assert wide.low is not None
    assert wide.low < 0.1705
    with pytest.raises(ValueError, match="somebody"):
        difference_of_shares((0, 0), (1, 2))


# fairlearn 0.15.0, MetricFrame(metrics=mean of held, sensitive_features=sex).by_group on subjects 0..39 with
# held = place % 7 > 0 and sex = F where place % 3 == 0, else M.
FAIRLEARN_HELD = {"F": 0.8571428571428571, "M": 0.8461538461538461}


def test_coverage_is_told_of_each_sex_as_fairlearn_s_metric_frame_does() -> None:
    sure = assure(guesses(300, 1, 1.0, "k"), known())
    outcomes = guesses(40, 2, 1.0, "t")
    one = played(outcomes, sure, Classify())
    lines = tuple(
        cast(
            Record,
            Line(key=f"t{at}", subject=f"t{at}", acquisition=Acquisition(sex="F" if at % 3 == 0 else "M")),
        )
        for at in range(40)
    )
    found = sureness(replace(one, contest=replace(one.contest, tested=lines)))
    assert set(found.by_group) == {"sex"}
    groups = found.by_group["sex"]
    assert {name: value.subjects for name, value in groups.items()} == {"F": 14, "M": 26}
    assert found.covered is not None
    mean = (14 * groups["F"].estimate + 26 * groups["M"].estimate) / 40
    assert mean == pytest.approx(found.covered.estimate)
    assert not sureness(one).by_group
    held = np.array([at % 7 > 0 for at in range(40)])
    sexes = ["F" if at % 3 == 0 else "M" for at in range(40)]
    by_group = coverage(held, [str(at) for at in range(40)], groups=sexes).by_group
    assert {name: value.estimate for name, value in by_group.items()} == pytest.approx(FAIRLEARN_HELD, abs=1e-6)


def test_a_run_is_put_beside_a_baseline_and_above_zero_is_better() -> None:
    near = {f"t{place}": Measured(truth=float(place), predicted=place + 1.0) for place in range(30)}
    far = {name: (replace(one, predicted=one.truth + 5),) for name, one in near.items()}
    (mae,) = [pair for pair in against(played(near, Assurance(), Regress()), "unet", far) if pair.metric == "mae"]
    assert (mae.one, mae.other) == ("run", "unet")
    assert mae.difference.estimate == pytest.approx(4.0)
