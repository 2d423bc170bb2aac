from __future__ import annotations

from pathlib import Path

import pytest
from tests.fewlabelled import SPEC, make_store, make_weights

import voxelstem as vs
from voxelstem import adapt, door
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.model import Model
from voxelstem.predict import Predictor
from voxelstem.sources.phantom import PhantomConfig, phantom


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("door")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(folder / "site.key"))
        make_store(folder)
        make_weights(folder)
        for task, labels in (("classify", "contrast.csv"), ("segment", "labels.json")):
            adapt.run(
                weights=folder / "weights",
                store=folder / "store",
                labels=folder / labels,
                task=task,
                mode="probe",
                out=folder / task,
                settings={"title": "late phase"} if task == "classify" else {},
            )
    return folder


def test_the_package_s_load_is_this_one():
    assert vs.load is door.load
    assert vs.AdaptedModel is door.AdaptedModel


def test_weights_are_a_model_as_ever(place: Path):
    assert isinstance(vs.load(place / "weights"), Model)
    assert isinstance(vs.load(place / "classify" / "weights"), Model)


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_a_run_says_what_predict_says(place: Path, task: str):
    model = vs.load(str(place / task))
    assert isinstance(model, door.AdaptedModel)
    assert model.spec == SPEC
    assert model.card.task == task
    assert model.card.parent.sha256 == model.model.card.sha256
    study = phantom(PhantomConfig(seed=501, spacing_mm=(7.0, 7.0, 8.0), phase="portal"))
    found, wanted = model.predict(study), Predictor(place / task).predict(study)
    assert found.findings == wanted.findings
    assert found.findings.findings
    assert (found.mask is None) == (task == "classify")
    assert model.predict(study.volumes[0]).findings == found.findings


def test_a_run_under_a_licence_against_commerce_is_refused_where_that_is_claimed(place: Path):
    assert door.load(place / "classify")
    with pytest.raises(ConfigError, match="licence is not stated"):
        door.load(place / "classify", commercial=True)


def test_what_is_nothing_is_refused_as_ever(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no known weights have this name"):
        vs.load("no-such-weights")
    with pytest.raises(ConfigError, match="not a finished run"):
        door.AdaptedModel(tmp_path)
