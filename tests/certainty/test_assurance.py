from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from voxelstem.answers import Answer
from voxelstem.certainty.assurance import LEVEL, Assurance, assure, group_of, groups_each
from voxelstem.certainty.vennabers import fit_venn_abers
from voxelstem.certainty.volumes import Sizes
from voxelstem.findings import Finding, Place, Weights
from voxelstem.heads.boxes import Matched
from voxelstem.protocols import Example
from voxelstem.study import Acquisition
from voxelstem.tasks.classify import Guess
from voxelstem.tasks.detect import Detected
from voxelstem.tasks.regress import Measured
from voxelstem.tasks.retrieve import Retrieved


@dataclass(frozen=True)
class Seen:
    scan: np.ndarray
    tokens: None = None
    tokens_affine_ras: None = None


def examples(count: int, seed: int = 0) -> list[Example]:
    rows = np.random.default_rng(seed).normal(size=(count, 6)) + 2.0
    return [
        Example(subject=f"s{place}", key=f"k{place}", features=Seen(scan=row), affine_ras=np.eye(4))
        for place, row in enumerate(rows)
    ]


def guesses(count: int, seed: int = 0, *, boast: float = 3.0) -> dict[str, Guess]:
    """Truths that come with chance p, told as if the odds were to the power of `boast`."""
    rng = np.random.default_rng(seed)
    chance = rng.uniform(0.1, 0.9, count)
    truth = rng.random(count) < chance
    odds = (chance / (1 - chance)) ** boast
    said = odds / (1 + odds)
    return {
        f"s{place}": Guess(truth=int(there), scores=(1 - share, share))
        for place, (there, share) in enumerate(zip(truth, said.tolist(), strict=True))
    }


def test_boasting_probabilities_are_taken_back_and_sets_hold_the_truth_as_often_as_they_say() -> None:
    found = assure(guesses(400), examples(400))
    assert found.calibrator is not None
    assert found.subjects == 400
    assert found.notes == ()
    new = list(guesses(400, seed=1).values())
    stated = np.array([found.chances(np.array(one.scores))[1] for one in new])
    truth = np.array([one.truth for one in new])
    boasted = np.array([one.scores[1] for one in new])

    def log_loss(chance: np.ndarray) -> float:
        return float(-np.log(np.where(truth == 1, chance, 1 - chance)).mean())

    assert log_loss(stated) < log_loss(boasted) - 0.05
    held = []
    for one in new:
        answer, certainty = found.certainty(("no", "yes"), np.array(one.scores))
        assert answer == ("no", "yes")[int(np.argmax(one.scores))]
        assert certainty.calibration == "temperature"
        assert certainty.level == LEVEL
        assert certainty.conformal is not None
        assert certainty.interval == "venn_abers"
        assert certainty.low is not None
        assert certainty.high is not None
        assert certainty.low <= certainty.probability <= certainty.high
        held.append(("no", "yes")[one.truth] in certainty.conformal)
    assert abs(np.mean(held) - LEVEL) < 0.05


def test_a_number_comes_with_an_interval_that_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(50, 10, 300)
    outcomes = {
        f"s{place}": Measured(truth=value, predicted=value + error)
        for place, (value, error) in enumerate(zip(truth.tolist(), rng.normal(0, 3, 300).tolist(), strict=True))
    }
    found = assure(outcomes, examples(300))
    value = found.quantity(40.0, "a")
    assert value.low is not None
    assert value.high is not None
    assert value.high - 40.0 == pytest.approx(40.0 - value.low)
    assert abs((value.high - 40.0) - 1.645 * 3) < 0.7
    assert value.level == LEVEL


def test_a_scan_unlike_the_labelled_ones_is_flagged_and_one_of_them_is_not() -> None:
    known = examples(40)
    found = assure({}, known, notes=("why",))
    strange, usual = found.novelty(np.full(6, -5.0)), found.novelty(known[3].features.scan + 0.01)
    assert strange is not None
    assert usual is not None
    assert strange.flagged
    assert strange.p < 0.05
    assert not usual.flagged
    assert found.notes == ("why",)


def test_too_few_answers_say_why_there_is_nothing() -> None:
    found = assure(guesses(6), examples(4))
    assert found.calibrator is None
    assert found.sets is None
    assert found.known is None
    assert found.subjects == 0
    assert any("6 subjects are fewer than 10" in note for note in found.notes)
    assert any("strange scans are not told apart" in note for note in found.notes)
    answer, certainty = found.certainty(("a", "b"), np.array([0.3, 0.7]))
    assert (answer, certainty.probability, certainty.calibration, certainty.conformal) == ("b", 0.7, "none", None)
    assert found.novelty(np.ones(6)) is None
    assert found.quantity(3.0, "a").low is None


def test_it_survives_the_disk() -> None:
    found = assure(guesses(60), examples(30))
    again = Assurance.of({name: np.array(array) for name, array in found.arrays().items()}, found.notes)
    for scores in ((0.2, 0.8), (0.55, 0.45)):
        assert again.certainty(("a", "b"), np.array(scores)) == found.certainty(("a", "b"), np.array(scores))
    assert again.novelty(np.arange(6.0)) == found.novelty(np.arange(6.0))
    assert again.subjects == found.subjects
    with pytest.raises(ValueError, match="number of subjects"):
        Assurance.of({})


def test_a_class_has_the_ends_of_venn_abers_reaching_out_to_the_temperature() -> None:
    outcomes = guesses(60)
    found = assure(outcomes, examples(60))
    alone = fit_venn_abers(
        np.array([outcomes[name].scores for name in sorted(outcomes)]),
        np.array([outcomes[name].truth for name in sorted(outcomes)]),
    )
    for share in (0.02, 0.3, 0.5, 0.81, 0.99):
        scores = np.array([1 - share, share])
        said, (answer, certainty) = alone.apply(scores[None]), found.certainty(("no", "yes"), scores)
        at = ("no", "yes").index(answer)
        assert certainty.low == pytest.approx(min(said.low[0, at], certainty.probability))
        assert certainty.high == pytest.approx(max(said.high[0, at], certainty.probability))


def test_groups_with_enough_subjects_have_sets_and_intervals_of_their_own() -> None:
    easy, hard = guesses(200, 1, boast=1.0), guesses(200, 2, boast=1.0)
    hard = {f"h{name}": Guess(truth=1 - one.truth, scores=one.scores) for name, one in hard.items()}
    few = {f"f{name}": one for name, one in guesses(5, 3).items()}
    groups = dict.fromkeys(easy, "A") | dict.fromkeys(hard, "B") | dict.fromkeys(few, "C")
    found = assure(easy | hard | few, examples(40), groups=groups)
    assert found.sets is not None
    for group, outcomes in (("A", guesses(400, 5, boast=1.0)), ("B", None)):
        own = found.of_group(group)
        assert own.sets is not None
        assert own.sets.thresholds.values[0] != found.sets.thresholds.values[0]
        if outcomes is not None:
            held = [
                ("no", "yes")[one.truth] in (own.certainty(("no", "yes"), np.array(one.scores))[1].conformal or ())
                for one in outcomes.values()
            ]
            assert abs(np.mean(held) - LEVEL) < 0.06
    for group in ("C", "new", ""):
        assert found.of_group(group).sets is found.sets
    again = Assurance.of(found.arrays()).of_group("B")
    assert again.certainty(("n", "y"), np.array([0.4, 0.6])) == found.of_group("B").certainty(
        ("n", "y"), np.array([0.4, 0.6])
    )
    numbers = {f"s{at}": Measured(truth=0.0, predicted=float(at % 7) * (1 + at // 50)) for at in range(100)}
    told = assure(numbers, examples(40), groups={f"s{at}": "AB"[at // 50] for at in range(100)})
    widths = [told.of_group(group).quantity(0.0, "1").high for group in "AB"]
    assert widths == [6.0, 12.0]
    assert assure(numbers, examples(40), groups=dict.fromkeys(list(numbers)[:50], "A")).group_intervals is None


def test_who_is_of_no_one_group_is_left_out_of_the_groups_and_takes_theirs_from_nobody() -> None:
    easy, hard = guesses(60, 1, boast=1.0), guesses(60, 2, boast=1.0)
    hard = {f"h{name}": Guess(truth=1 - one.truth, scores=one.scores) for name, one in hard.items()}
    odd = {f"o{name}": one for name, one in guesses(7, 3).items()}
    groups = dict.fromkeys(easy, "A") | dict.fromkeys(hard, "B")
    alone = assure(easy | hard, examples(40), groups=groups)
    found = assure(easy | hard | odd, examples(40), groups=groups | {next(iter(odd)): ""})
    assert found.sets is not None
    assert found.group_sets is not None
    assert alone.group_sets is not None
    assert found.sets.thresholds.subjects == (127,)
    assert found.group_sets.thresholds.groups == ("A", "B")
    assert found.group_sets.thresholds.subjects == alone.group_sets.thresholds.subjects == (60, 60)
    numbers = {f"s{at}": Measured(truth=0.0, predicted=float(at % 7) * (1 + at // 50)) for at in range(103)}
    told = assure(numbers, examples(40), groups={f"s{at}": "AB"[at // 50] for at in range(100)})
    assert [told.of_group(group).quantity(0.0, "1").high for group in "AB"] == [6.0, 12.0]


def of_maker(name: str) -> Acquisition:
    return Acquisition(facts={"Manufacturer": name} if name else {})


def test_a_maker_is_one_group_under_all_its_names() -> None:
    for names, group in (
        (("SIEMENS", "Siemens", "Siemens Healthineers", " siemens, AG"), "siemens"),
        (("GE MEDICAL SYSTEMS", "GE", "Ge-Healthcare"), "ge"),
        (("TOSHIBA", "TOSHIBA_MEC"), "toshiba"),
        (("", " ", "--"), ""),
    ):
        assert {group_of(of_maker(name)) for name in names} == {group}


def test_a_subject_is_of_a_group_if_all_its_scans_are() -> None:
    scans = [("a", "SIEMENS"), ("a", "Siemens Healthineers"), ("b", "GE"), ("b", "Philips"), ("c", "GE"), ("c", "")]
    scans += [("d", ""), ("e", "Philips")]
    found = groups_each((subject, of_maker(name)) for subject, name in scans)
    assert found == {"a": "siemens", "e": "philips"}


def test_a_scan_without_a_vector_is_left_out_of_all_that_is_held_against_new_ones() -> None:
    blank = [
        Example(subject="x", key="x", features=Seen(scan=np.zeros(0)), affine_ras=np.eye(4), label="a"),
        *(replace(one, label="ab"[at % 2]) for at, one in enumerate(examples(60))),
    ]
    found, alone = assure({}, blank), assure({}, blank[1:])
    assert found.notes == ()
    assert found.known is not None
    assert found.centres is not None
    assert alone.centres is not None
    np.testing.assert_array_equal(found.centres.means, alone.centres.means)


def test_boxes_are_told_as_shares_of_such_boxes_that_are_right() -> None:
    rng = np.random.default_rng(0)

    def subject() -> Detected:
        scores = rng.uniform(0.05, 0.95, 12)
        hits = rng.random(12) < scores**2
        order = np.argsort(-scores)
        ball = Matched(scores=tuple(scores[order].tolist()), hits=tuple(hits[order].tolist()), truths=12)
        return Detected(by_class={"ball": ball, "rare": Matched(scores=(0.5,), hits=(False,), truths=0)})

    found = assure({f"s{at}": subject() for at in range(60)}, examples(60))
    assert found.subjects == 60
    assert any("boxes of 'rare' are not calibrated: 0 true and 60 false" in note for note in found.notes)
    stated = [found.present("ball", chance) for chance in np.linspace(0.1, 0.9, 9).tolist()]
    for chance, sure in zip(np.linspace(0.1, 0.9, 9).tolist(), stated, strict=True):
        assert sure.calibration == "platt"
        assert sure.interval == "venn_abers"
        assert sure.probability == pytest.approx(chance**2, abs=0.12)
        assert sure.low is not None
        assert sure.high is not None
        assert sure.low <= sure.probability <= sure.high
    assert [one.probability for one in stated] == sorted(one.probability for one in stated)
    assert found.box("ball", 0.5) == found.present("ball", 0.5)
    rare = found.box("rare", 0.93)
    assert (rare.probability, rare.score, rare.calibration, rare.low) == (None, 0.93, "none", None)
    assert Assurance().box("ball", 0.93) == rare


def test_a_temperature_that_labels_did_not_determine_is_told() -> None:
    # Who says yes has no: the best is to say nothing, as far as that can be searched.
    sure = (0.01, 0.99)
    wrong = {f"s{at:02d}": Guess(truth=at % 2, scores=sure if at % 2 == 0 else sure[::-1]) for at in range(40)}
    found = assure(wrong, examples(40))
    assert any("the temperature 20 lies at the end of what is searched" in note for note in found.notes)


def test_shares_of_nearest_cases_are_said_not_to_be_calibrated() -> None:
    ranked = {f"s{at}": Retrieved(truth=at % 2, shares=(0.4, 0.6), average_precision=0.5) for at in range(20)}
    found = assure(ranked, examples(20))
    assert found.subjects == 0
    assert found.known is not None
    assert found.notes == ("not calibrated: the probability of the answer is the share of the nearest labelled cases",)


def test_what_is_inside_a_tuned_network_is_known_apart_from_what_it_says() -> None:
    held = assure({}, examples(40))
    tuned = replace(held, known=None, centres=None, inside=held.known)
    back = Assurance.of(tuned.arrays())
    assert back.novelty(np.full(6, -5.0)) is None
    assert back.novelty_inside(np.full(6, -5.0)) == held.novelty(np.full(6, -5.0))
    assert held.novelty_inside(np.full(6, -5.0)) is None


def test_a_no_is_as_sure_as_the_yes_is_not() -> None:
    rng = np.random.default_rng(0)
    outcomes = {}
    for at in range(80):
        chance = float(rng.uniform(0.05, 0.95))
        truth = math.nan if at % 10 == 0 else float(rng.random() < chance)
        outcomes[f"s{at}"] = Answer(
            classes=("nodule", "gas"), truth=(truth, math.nan), scores=(chance, 0.5), thresholds=(0.5, 0.5)
        )
    found = assure(outcomes, examples(80))
    assert found.yesno is not None
    assert found.yesno.names == ("nodule",)
    assert any("answers of 'gas' are not calibrated: 0 true and 0 false" in note for note in found.notes)
    yes, sure = found.answered("nodule", 0.05)
    there = found.present("nodule", 0.05)
    assert not yes
    assert there.low is not None
    assert there.high is not None
    assert (sure.probability, sure.low, sure.high) == (1 - there.probability, 1 - there.high, 1 - there.low)
    assert found.answered("nodule", 0.95) == (True, found.present("nodule", 0.95))


def test_a_yes_is_what_the_head_says_and_its_probability_how_often_that_is_so() -> None:
    """A head that lets yes and no weigh alike, of something that one in ten has."""
    rng = np.random.default_rng(0)

    def drawn(count: int) -> dict[str, Answer]:
        found: dict[str, Answer] = {}
        for at in range(count):
            there = bool(rng.random() < 0.1)
            # The truth says +1 or -1 of a score of spread one: balanced, the log-odds are twice that score.
            chance = 1 / (1 + math.exp(-2 * rng.normal(1.0 if there else -1.0)))
            found[f"s{at}"] = Answer(classes=("gas",), truth=(float(there),), scores=(chance,), thresholds=(0.5,))
        return found

    sure = assure(drawn(1500), examples(40))
    told = [(one, *sure.answered("gas", one.scores[0], threshold=one.thresholds[0])) for one in drawn(4000).values()]
    assert [yes for _, yes, _ in told] == [one.scores[0] >= one.thresholds[0] for one, _, _ in told]
    sides: dict[bool, list[tuple[float, bool]]] = {True: [], False: []}
    for one, yes, certainty in told:
        assert certainty.low is not None
        assert certainty.high is not None
        assert certainty.low <= certainty.probability <= certainty.high
        sides[yes].append((certainty.probability, (one.truth[0] == 1) == yes))
    for pairs in sides.values():
        said, right = np.array(pairs).T
        assert said.mean() == pytest.approx(right.mean(), abs=0.05)
    assert min(said for said, _ in sides[True]) < 0.3
    assert not sure.answered("gas", 0.6, threshold=0.7)[0]


def test_volumes_have_intervals_that_hold_the_truth_as_often_as_they_say_where_enough_show_the_structure() -> None:
    rng = np.random.default_rng(0)

    def sizes(count: int, prefix: str) -> dict[str, Sizes]:
        found = {}
        for at in range(count):
            true = float(rng.uniform(1e5, 2e6))
            said = {"liver": true * float(rng.lognormal(0, 0.2)), "gland": 500.0 if at < 4 else 0.0}
            found[f"{prefix}{at}"] = Sizes(predicted_mm3=said, true_mm3={"liver": true, "gland": 400.0})
        return found

    found = assure(sizes(150, "s"), examples(40))
    assert any("volume of 'gland' has no interval" in note for note in found.notes)
    weights = Weights(sha256="ab" * 32, name="w", licence="l")
    held = []
    for one in sizes(400, "t").values():
        place = Place(volume_mm3=one.predicted_mm3["liver"])
        told = found.sized(Finding(name="liver", kind="segment", weights=weights, place=place)).quantity
        assert told is not None
        assert told.low is not None
        assert told.high is not None
        assert (told.unit, told.level) == ("mL", LEVEL)
        held.append(told.low <= one.true_mm3["liver"] / 1000 <= told.high)
    assert abs(np.mean(held) - LEVEL) < 0.05
    small = Finding(name="gland", kind="segment", weights=weights, place=Place(volume_mm3=500.0))
    piece = Finding(name="liver", kind="segment", weights=weights, place=Place(volume_mm3=500.0), part=1)
    assert found.sized(small) == small
    assert found.sized(piece) == piece
    again = Assurance.of(found.arrays())
    whole = Finding(name="liver", kind="segment", weights=weights, place=Place(volume_mm3=9e5))
    assert again.sized(whole) == found.sized(whole)
    assert "volumes without intervals" in assure(sizes(6, "u"), examples(40)).notes[0]


def test_a_volume_is_asked_for_by_number_as_a_finding_gets_it() -> None:
    shown = {f"k{at}": Sizes(predicted_mm3={"liver": 1e6}, true_mm3={"liver": 1e6 + 9e3 * at}) for at in range(30)}
    sure = assure(shown, examples(40))
    weights = Weights(sha256="0" * 64, name="organs", licence="apache-2.0")
    finding = Finding(name="liver", kind="segment", weights=weights, place=Place(volume_mm3=9e5))
    size = sure.volume("liver", 900.0)
    assert size is not None
    assert sure.sized(finding).quantity == size
    assert size.low is not None
    assert size.high is not None
    assert 0.0 < size.low < 900.0 < size.high
    assert (size.unit, size.level) == ("mL", LEVEL)
    for name, value in (("liver", 0.0), ("gland", 900.0)):
        assert sure.volume(name, value) is None
    assert Assurance().volume("liver", 900.0) is None


def test_means_of_classes_stand_beside_neighbours() -> None:
    labelled = [replace(one, label="ab"[at % 2]) for at, one in enumerate(examples(60))]
    found = assure({}, labelled)
    assert found.centres is not None
    assert found.centres.means.shape == (2, 6)
    strange = found.centres.apply(np.full((1, 6), -9.0))
    assert bool(strange.flagged[0])
    assert assure({}, examples(60)).centres is not None
