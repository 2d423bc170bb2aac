from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from voxelstem.certainty.calibration import log_odds
from voxelstem.certainty.calibrators import fit_platt
from voxelstem.certainty.vennabers import fit_venn_abers
from voxelstem.certainty.yesno import Told, YesNo, fit_yesno


def told(count: int, seed: int, *, boast: float = 3.0) -> Told:
    rng = np.random.default_rng(seed)
    chance = rng.uniform(0.05, 0.95, count)
    odds = (chance / (1 - chance)) ** boast
    return Told(chance=odds / (1 + odds), there=rng.random(count) < chance)


def test_each_question_has_its_own_line_and_its_own_interval() -> None:
    answers = {"nodule": told(80, 0), "effusion": told(50, 1, boast=0.3)}
    found = fit_yesno(answers, fewest=10)
    assert found.yesno is not None
    assert found.lacking == {}
    for name, one in answers.items():
        assert name in found.yesno
        line = fit_platt(log_odds(one.chance), one.there)
        alone = fit_venn_abers(np.stack([1 - one.chance, one.chance], axis=1), one.there.astype(np.int64))
        for chance in (0.0, 0.01, 0.4, 0.93, 1.0):
            said = found.yesno.apply(name, chance)
            assert said.probability == pytest.approx(float(line.apply(np.array([chance]))[0]))
            ends = alone.apply(np.array([[1 - chance, chance]]))
            assert said.low == pytest.approx(min(float(ends.low[0, 1]), said.probability))
            assert said.high == pytest.approx(max(float(ends.high[0, 1]), said.probability))


def test_probabilities_come_true_as_often_as_they_say_and_keep_their_order() -> None:
    found = fit_yesno({"box": told(600, 0, boast=4.0)}, fewest=10).yesno
    assert found is not None
    new = told(4000, 1, boast=4.0)
    said = [found.apply("box", chance) for chance in new.chance.tolist()]
    stated = np.array([one.probability for one in said])
    assert (np.diff(stated[np.argsort(new.chance)]) >= 0).all()
    for low in np.arange(0.0, 1.0, 0.2):
        inside = (stated >= low) & (stated < low + 0.2)
        # 600 known answers: a fifth of them has a standard error of 0.04.
        assert new.there[inside].mean() == pytest.approx(stated[inside].mean(), abs=0.08)


def test_what_has_too_few_answers_of_a_kind_is_left_out_and_says_so() -> None:
    few = Told(chance=np.linspace(0.1, 0.9, 30), there=np.arange(30) >= 25)
    same = Told(chance=np.full(40, 0.5), there=np.arange(40) % 2 == 0)
    found = fit_yesno({"few": few, "same": same, "enough": told(60, 0)}, fewest=10)
    assert found.yesno is not None
    assert found.yesno.names == ("enough",)
    assert found.lacking["few"] == "5 true and 25 false ones, 10 of either kind are the least"
    assert "are the same" in found.lacking["same"]
    with pytest.raises(ValueError, match="'few' were not calibrated"):
        found.yesno.apply("few", 0.5)
    assert fit_yesno({"few": few}, fewest=10).yesno is None
    with pytest.raises(ValueError, match="three answers of either kind"):
        fit_yesno({}, fewest=2)


def test_it_rests_on_disk_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    found = fit_yesno({"a": told(60, 0), "ü b": told(40, 1)}, fewest=10).yesno
    assert found is not None
    save_file({name: np.asarray(array) for name, array in found.arrays().items()}, tmp_path / "a.safetensors")
    arrays = load_file(tmp_path / "a.safetensors")
    again = YesNo.of(arrays)
    for name in ("a", "ü b"):
        assert again.apply(name, 0.3) == found.apply(name, 0.3)
    with pytest.raises(ValueError, match="no names"):
        YesNo.of({name: array for name, array in arrays.items() if name != "names"})
    with pytest.raises(ValueError, match="2 questions need as many lines"):
        YesNo.of(arrays | {"scale": arrays["scale"][:1]})
    with pytest.raises(ValueError, match="a name, a line and an interval"):
        YesNo(names=("a", "a"), lines=found.lines, between=found.between)
