from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.fewlabelled import FRACTIONS, QUICK, SPEC, make_store, make_weights

from voxelstem import adapt, evaluate
from voxelstem.adapt import command_of
from voxelstem.adapted import read_run, resolve
from voxelstem.card import Card, read_card, write_weights
from voxelstem.errors import AuditError, CheckpointError, ConfigError
from voxelstem.features import embedder, examples_of
from voxelstem.model import make_model
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Store, split_of, write
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.study import Study
from voxelstem.weights.hub import load


@pytest.fixture(autouse=True)
def one_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests here share one site key, because they share one store."""
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        make_store(folder)
    make_weights(folder)
    return folder


@pytest.mark.parametrize(
    ("task", "mode", "labels"),
    [("classify", "knn", "contrast.csv"), ("classify", "probe", "contrast.csv"), ("segment", "probe", "labels.json")],
)
def test_a_run_can_be_read_back_whole(place: Path, tmp_path: Path, task: str, mode: str, labels: str) -> None:
    out = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / labels,
        task=task,
        mode=mode,
        out=tmp_path / "run",
        budget=2,
        settings={"seed": 3},
    )
    read = read_run(out)
    assert (read.config.task, read.config.mode, read.config.budget, read.config.seed) == (task, mode, 2, 3)
    assert len(read.subjects) == 2
    assert all(split_of(subject, FRACTIONS) == "train" for subject in read.subjects)
    assert (read.weights / "model.safetensors").is_file()
    assert not [path for path in tmp_path.iterdir() if path != out]
    store = Store.open(place / "store")
    truth = adapt.read_truth(store, place / labels, read.task, SPEC)
    features = embedder(load(read.weights), store, tmp_path / "features", tokens=read.task.voxels)
    example = next(examples_of(store, truth.of("test"), truth, features, read.task))
    assert read.task.outcome(read.head, example)


def test_scratch_needs_no_weights_and_follows_its_seed(place: Path, tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = adapt.run(
            weights="scratch",
            store=place / "store",
            labels=place / "contrast.csv",
            task="classify",
            mode="knn",
            out=tmp_path / name,
            settings={"seed": seed, "like": str(place / "weights")},
        )
        digests.append((out / "weights" / "model.safetensors").read_bytes())
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_the_run_holds_no_name_of_a_subject_and_no_pickle(place: Path, tmp_path: Path) -> None:
    out = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / "contrast.csv",
        task="classify",
        mode="probe",
        out=tmp_path / "run",
    )
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.toml",
        "head.json",
        "head.safetensors",
        "assurance.safetensors",
        "adapt.json",
        "README.md",
        "SHA256SUMS",
        "weights",
        "features",
    }
    for path in out.glob("*.*"):
        assert b"phantom-" not in path.read_bytes()


def arguments(place: Path, out: Path, **changes: object) -> dict[str, object]:
    usual = {
        "weights": place / "weights",
        "store": place / "store",
        "labels": place / "contrast.csv",
        "task": "classify",
        "mode": "probe",
        "out": out / "run",
    }
    return usual | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "clasify"}, "did you mean 'classify'"),
        ({"mode": "prob"}, "did you mean 'probe'"),
        ({"task": "segment", "mode": "knn"}, "no mode 'knn'"),
        ({"budget": 99}, "more than the"),
        ({"budget": 1}, "each of 2 classes"),
        ({"budget": 0}, "at least 1"),
        ({"settings": {"head.neigbours": 3}}, "neighbours"),
        ({"settings": {"budget": 3}}, "use --budget"),
        ({"settings": {"like": "x"}}, "scratch only"),
        ({"weights": "scratch"}, "add like=<weights folder>"),
    ],
)
def test_wrong_use_is_one_clear_sentence(place: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt.run(**arguments(place, tmp_path, **changes))  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


def test_labels_of_strangers_are_refused_without_naming_them(place: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("subject,label\nmueller,yes\n")
    with pytest.raises(ConfigError, match="none of the 1 labelled subjects") as caught:
        adapt.run(**arguments(place, tmp_path, labels=tmp_path / "labels.csv"))  # pyright: ignore[reportArgumentType]
    assert "mueller" not in str(caught.value)


def test_labels_without_a_scan_are_refused_or_left_out_and_counted(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (place / "contrast.csv").read_text() + "mueller,yes\nmaier,no\n"
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ConfigError, match="2 of 14 labelled subjects have no CT scan in the store: rows 14, 15"):
        adapt.run(**arguments(place, tmp_path, labels=tmp_path / "labels.csv"))  # pyright: ignore[reportArgumentType]
    some = {"labels": tmp_path / "labels.csv", "settings": {"unknown": "left_out"}}
    adapt.run(**arguments(place, tmp_path, **some))  # pyright: ignore[reportArgumentType]
    assert caplog.messages == ["2 of 14 labelled subjects are not in the store (no CT scan)"]


def test_one_class_only_is_refused(place: Path, tmp_path: Path) -> None:
    lines = ["subject,label", *(f"phantom-{seed:04d},yes" for seed in range(12))]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(AuditError, match="same label"):
        adapt.run(**arguments(place, tmp_path, labels=tmp_path / "labels.csv"))  # pyright: ignore[reportArgumentType]


def test_ct_weights_refuse_a_store_of_mri(place: Path, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "mr")
    study = phantom(PhantomConfig(seed=1, spacing_mm=(10.0, 10.0, 10.0)))
    write(
        store,
        Study(
            subject=pseudonym("a", site_key()),
            volumes=tuple(replace(volume, modality="MR") for volume in study.volumes),
        ),
    )
    with pytest.raises(ConfigError, match="trained on CT, the store holds MR"):
        adapt.run(**arguments(place, tmp_path, store=tmp_path / "mr"))  # pyright: ignore[reportArgumentType]


def test_a_finished_run_is_never_written_over(place: Path, tmp_path: Path) -> None:
    adapt.run(**arguments(place, tmp_path, mode="knn"))  # pyright: ignore[reportArgumentType]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ConfigError, match="finished run already"):
        adapt.run(**arguments(place, tmp_path))  # pyright: ignore[reportArgumentType]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_an_interrupted_run_goes_on(place: Path, tmp_path: Path) -> None:
    left = tmp_path / ".run.unfinished"
    (left / "weights").mkdir(parents=True)
    (left / "weights" / "model.safetensors").write_bytes(b"half")
    (left / "head.json").write_text("{")
    out = adapt.run(**arguments(place, tmp_path))  # pyright: ignore[reportArgumentType]
    assert not left.exists()
    assert load(read_run(out).weights).spec == SPEC


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a finished run"):
        read_run(tmp_path)


def test_arrays_of_a_head_survive_the_disk(place: Path, tmp_path: Path) -> None:
    out = adapt.run(**arguments(place, tmp_path))  # pyright: ignore[reportArgumentType]
    head = read_run(out).head
    again = adapt.run(**arguments(place, tmp_path / "again"))  # pyright: ignore[reportArgumentType]
    for name, array in read_run(again).head.arrays.items():
        np.testing.assert_array_equal(array, head.arrays[name])


def unet_weights(folder: Path) -> Path:
    architecture = {"name": "unet", "features": (4, 8), "depths": (1, 1), "strides": (1, 2), "block_ijk": (16, 16, 16)}
    model = make_model(Card(architecture=architecture, spec=SPEC), seed=0)
    write_weights(folder / "unet", model.backbone.state_dict(), model.card)
    return folder / "unet"


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        pytest.param("segment", "labels.json", marks=pytest.mark.slow),
        ("classify", "contrast.csv"),
        ("regress", "ages.csv"),
    ],
)
def test_a_whole_network_is_trained_kept_and_scored_beside_itself_from_scratch(
    place: Path, tmp_path: Path, task: str, labels: str
) -> None:
    if task == "regress":
        rows = (place / "contrast.csv").read_text().splitlines()[1:]
        ages = [f"{row.split(',')[0]},{40 + index}" for index, row in enumerate(rows)]
        (place / labels).write_text("\n".join(["subject,value", *ages]) + "\n")
    weights, truth = unet_weights(tmp_path), place / labels
    out = adapt.run(
        weights=weights,
        store=place / "store",
        labels=truth,
        task=task,
        mode="full",
        out=tmp_path / "run",
        budget=2,
        settings={"full.steps": 2, "full.schedule": "sawtooth", "full.warm_up": 0.2},
    )
    read = read_run(out)
    assert read.config.full is not None
    assert (read.config.full.steps, read.config.full.schedule) == (2, "sawtooth")
    card = read_card(out / "weights")
    assert card.parent == read_card(weights).sha256
    assert card.spec == SPEC
    found = evaluate.run([out], store=place / "store", labels=truth, out=tmp_path / "report", config=QUICK)
    names = {score.name for score in found.scores}
    assert {"run", "scratch", "intensity"} <= names
    assert any("NOT MEASURED" in line for line in found.checked) == (task != "segment")


def test_a_run_whose_weights_say_another_spacing_is_refused(place: Path, tmp_path: Path) -> None:
    out = adapt.run(**arguments(place, tmp_path))
    path = out / "weights" / "config.json"
    card = json.loads(path.read_text())
    card["spec"]["spacing_mm"] = [4.0, 4.0, 4.0]
    path.unlink()
    path.write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="fitted to scans fed with another spacing_mm"):
        read_run(out)


def test_a_task_that_cannot_train_whole_networks_says_which_modes_it_has(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zeroshot has no mode 'full'"):
        adapt.run(**arguments(place, tmp_path, task="zeroshot", mode="full"))


def test_the_command_that_makes_a_run_again_names_no_place_of_whoever_made_it() -> None:
    settings = {
        "head.prompts": "klinik-bern/alice/p.toml",
        "head.tokenizer": "C:\\alice\\tokens",
        "features": "alice/cache",
        "like": "alice/weights",
        "title": "late phase",
        "seed": 3,
    }
    config = resolve("zeroshot", "prompts", budget=None, settings=settings)
    words = shlex.split(command_of("scratch", config, labelled=False))
    assert 'head.prompts="p.toml"' in words
    assert 'head.tokenizer="tokens"' in words
    assert 'like="WEIGHTS"' in words
    assert {'title="late phase"', "seed=3"} <= set(words)
    assert not any("alice" in word or word.startswith("features") for word in words)
    assert len([word for word in words if "=" in word]) == 5
