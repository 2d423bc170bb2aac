from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.fewlabelled import QUICK, make_store, make_weights

from voxelstem import adapt, evaluate


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
        ("classify", "contrast.csv", ("ROC", "recall", "Worst and best cases", "log loss")),
        ("regress", "ages.csv", ("agreement", "Worst and best cases", "absolute error")),
        ("survive", "times.csv", ("risk",)),
        ("segment", "labels.json", ("Dice", "Worst and best cases", "mean Dice")),
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
    assert "radiomics" in {score.name for score in found.scores} or task == "segment"
