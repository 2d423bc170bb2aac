from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from voxelstem.assurance import LEVEL, Assurance, assure
from voxelstem.protocols import Example
from voxelstem.tasks.classify import Guess
from voxelstem.tasks.regress import Measured


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
