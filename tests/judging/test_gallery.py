from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.fewlabelled import QUICK, make_store, make_weights

from voxelstem import adapt, evaluate
from voxelstem.certainty.assurance import Assurance
from voxelstem.heads.boxes import Matched
from voxelstem.heads.risks import Foretold
from voxelstem.judging import gallery as room
from voxelstem.judging.contest import once
from voxelstem.judging.evidence import Played
from voxelstem.judging.gallery import gallery
from voxelstem.report.figures import Picture
from voxelstem.study import Survival
from voxelstem.tasks.classify import Classify
from voxelstem.tasks.detect import Detect, Detected
from voxelstem.tasks.regress import Regress
from voxelstem.tasks.retrieve import Retrieve
from voxelstem.tasks.survive import Survive
from voxelstem.tasks.zeroshot import Zeroshot


@pytest.fixture(autouse=True)
def one_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        make_store(folder, count=24)
        make_weights(folder)
        rows = (folder / "contrast.csv").read_text().splitlines()[1:]
        names = [row.split(",")[0] for row in rows]
        ages = [f"{name},{40 + place}" for place, name in enumerate(names)]
        (folder / "ages.csv").write_text("\n".join(["subject,value", *ages]) + "\n")
        times = [f"{name},{5 + 3 * place},{int(place % 3 > 0)}" for place, name in enumerate(names)]
        (folder / "times.csv").write_text("\n".join(["subject,time,event", *times]) + "\n")
    return folder


@pytest.mark.parametrize(
    ("task", "labels", "wanted"),
    [
        pytest.param(
            "classify", "contrast.csv", ("ROC", "recall", "Worst and best cases", "log loss"), marks=pytest.mark.slow
        ),
        ("regress", "ages.csv", ("agreement", "Worst and best cases", "absolute error")),
        pytest.param(
            "survive",
            "times.csv",
            ("risk", "Worst and best cases", "s part of the integrated Brier score", "none by "),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "detect",
            "labels.json",
            ("FROC of one: liver", "Worst and best cases: one", "false boxes", "Found: "),
            marks=pytest.mark.slow,
        ),
        pytest.param("segment", "labels.json", ("Dice", "Worst and best cases", "mean Dice"), marks=pytest.mark.slow),
    ],
)
def test_a_page_shows_how_its_task_went_and_what_was_not_measured(
    place: Path, tmp_path: Path, task: str, labels: str, wanted: tuple[str, ...]
) -> None:
    runs = [
        adapt.run(
            weights=place / "weights",
            store=place / "store",
            labels=place / labels,
            task=task,
            mode="probe",
            out=tmp_path / name,
            settings={"see.beside": "intensity"} if name == "two" else {},
        )
        for name in ("one", "two")
    ]
    found = evaluate.run(runs, store=place / "store", labels=place / labels, out=tmp_path / "report", config=QUICK)
    page = (tmp_path / "report" / "index.html").read_text()
    for word in (
        *wanted,
        "Pictures: one",
        "What labels buy: one",
        "NOT MEASURED: mode probe was asked for",
        "these labels say the same of all",
        "Runs against each other",
        "Comparison with readers",
        "How sure the runs may be",
    ):
        assert word in page, word
    assert "phantom-" not in page
    told = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert "readers" in told["not_measured"]
    assert {(pair["one"], pair["other"]) for pair in told["compared"]} == {("one", "two")} | (
        {("one", "unet"), ("two", "unet")} if task == "segment" else set()
    )
    assert {one.run for one in found.sureness} == {"one", "two"}
    assert "radiomics" in {score.name for score in found.scores} or task in ("segment", "detect")


def shown(task: Any, outcomes: list[Any], classes: tuple[str, ...] = ("no", "yes")) -> str:
    """The page of a run with these outcomes, of so few subjects that no case is shown."""
    by_subject = {f"s{at}": outcome for at, outcome in enumerate(outcomes)}
    contest: Any = SimpleNamespace(
        task=task, classes=classes, truth=SimpleNamespace(findings={}), tested=(), labelled=()
    )
    features: Any = None
    played = Played(
        name="run", task="x", contest=contest, outcomes=by_subject, assurance=Assurance(), features=features
    )
    return "".join(part.body for part in gallery(played, {"run": once(by_subject)}, [], None))


def test_whatever_picture_there_cannot_be_stands_there_in_words() -> None:
    alike = [SimpleNamespace(truth=1, scores=(0.3, 0.7))] * 3
    text = shown(Classify(), alike)
    assert "no picture of &#x27;yes&#x27;: every test subject of whom that is known has it" in text
    assert "no picture of worst and best cases: 3 test subjects can be told apart, 4 are the least" in text
    assert "no test subject of whom that is known has it" in shown(
        Classify(), [SimpleNamespace(truth=0, scores=(0.3, 0.7))] * 3
    )
    text = shown(Retrieve(), [SimpleNamespace(average_precision=0.5)] * 3)
    assert "no picture of all answers together: a list of like cases has no curve" in text
    assert "no picture: answers by prompts" in shown(Zeroshot(), [])
    seen = Matched(scores=(0.5,), hits=(True,), truths=1)
    none = Matched(scores=(0.5,), hits=(False,), truths=0)
    text = shown(Detect(), [Detected(by_class={"cyst": seen, "stone": none})] * 3, ("cyst", "stone"))
    assert "no picture of &#x27;stone&#x27;: no test subject has any" in text
    assert text.count("<img") == 1
    assert "FROC of run: cyst" in text


def test_who_was_lost_from_sight_early_is_no_good_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of them the Brier score counts next to nothing, however they fared: they would all be among the best."""
    monkeypatch.setattr(room, "_of_times", lambda *_: Picture(png=b"", alt="", caption=""))

    def fate(time: float, *, event: bool) -> Foretold:
        alive = tuple(time > moment for moment in (0.0, 10.0, 20.0))
        truth = Survival(time=time, event=event)
        return Foretold(truth=truth, risk=0.0, chances=(1.0, 0.5, 0.2), alive=alive, shares=(0.1, 0.2, 0.3), weight=1.0)

    known = [fate(5, event=True), fate(25, event=False), fate(30, event=True)]
    text = shown(Survive(), [*known, fate(5, event=False), fate(20, event=False)])
    assert "3 test subjects can be told apart, 4 are the least; 2 of 5 test subjects stand in neither list" in text
    assert "lost from sight before the horizon" in text


@pytest.mark.parametrize(
    ("time", "event", "said"),
    [
        (5.0, True, {"true": "event at 5", "predicted": "75% none by 5", "risk": "0.5"}),
        (90.0, False, {"true": "none until 90", "predicted": "20% none by 20", "risk": "0.5"}),
    ],
)
def test_beside_a_case_stands_what_came_and_what_was_foretold_of_it(
    time: float, event: bool, said: dict[str, str]
) -> None:
    head: Any = SimpleNamespace(arrays={"moments": np.array([0.0, 10.0, 20.0])})
    outcome = SimpleNamespace(truth=Survival(time=time, event=event), chances=(1.0, 0.5, 0.2), risk=0.5)
    assert room._foretold(outcome, head) == said


@pytest.mark.parametrize(
    ("unit", "predicted", "bias"), [("1", "17.81", "bias -2 [-2, -2], "), ("cm", "17.81 cm", "bias -2 [-2, -2] cm, ")]
)
def test_a_number_without_a_unit_is_not_followed_by_a_one(unit: str, predicted: str, bias: str) -> None:
    task, key = Regress(unit=unit), "0123456789abcdef"
    outcome = SimpleNamespace(truth=34.5, predicted=17.81)
    store = SimpleNamespace(volume=lambda _: None)
    played: Any = SimpleNamespace(contest=SimpleNamespace(task=task, store=store), outcomes={"s0": outcome})
    record: Any = SimpleNamespace(key=key, subject="s0")
    assert room._case(played, None, record, 16.69).said == {"true": "34.5", "predicted": predicted}
    text = shown(task, [SimpleNamespace(truth=float(at), predicted=at - 2.0) for at in range(3)])
    assert bias in text
