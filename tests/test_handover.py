from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tests.fewlabelled import SPEC, make_store, make_weights

import voxelstem as vs
from voxelstem import adapt
from voxelstem.adapted import read_run, resolve
from voxelstem.artefact import SEAL, check_seal, seal
from voxelstem.card import Card, write_weights
from voxelstem.certainty.assurance import Assurance
from voxelstem.certainty.yesno import Told, fit_yesno
from voxelstem.cli import run as command
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.features import embedder
from voxelstem.finetune.cases import see
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.tune import Asked, tuned
from voxelstem.handover import export_run, placeless
from voxelstem.model import load, make_model
from voxelstem.store import Store
from voxelstem.study import InputSpec
from voxelstem.weights.openvino import run as compute

UNET = {"name": "unet", "features": (4, 8), "depths": (1, 1), "strides": (1, 2), "block_ijk": (16, 16, 16)}
LABELS = {"classify": "contrast.csv", "regress": "ages.csv", "survive": "times.csv", "segment": "labels.json"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("handover")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(folder / "site.key"))
        make_store(folder)
        make_weights(folder)
        zscore = InputSpec(spacing_mm=SPEC.spacing_mm, block_ijk=SPEC.block_ijk, normalisation="zscore")
        for name, spec in (("unet", SPEC), ("unet-z", zscore)):
            model = make_model(Card(architecture=UNET, spec=spec, licence="cc-by-nc-4.0"), seed=0)
            write_weights(folder / name, model.backbone.state_dict(), model.card)
        who = [line.split(",")[0] for line in (folder / "contrast.csv").read_text().splitlines()[1:]]
        rows = {
            "ages.csv": ["subject,value", *(f"{one},{40 + age}" for age, one in enumerate(who))],
            "times.csv": ["subject,time,event", *(f"{one},{9 + 7 * n},{int(n % 3 > 0)}" for n, one in enumerate(who))],
        }
        for name, lines in rows.items():
            (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def one_key(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXELSTEM_KEY", str(place / "site.key"))


def made(place: Path, task: str, mode: str, weights: str = "weights", **settings: Any) -> Path:
    """A run, made once."""
    short = {"full.steps": 2} if mode in ("full", "adapters") else {}
    out = place / "-".join([task, mode, weights, *map(str, settings.values())]).replace("/", "_")
    if not out.exists():
        adapt.run(
            weights=place / weights,
            store=place / "store",
            labels=place / LABELS[task],
            task=task,
            mode=mode,
            out=out,
            settings=short | {name.replace("__", "."): value for name, value in settings.items()},
        )
    return out


def needs_openvino() -> None:
    pytest.importorskip("openvino", reason="the cpu extra is not installed")


@pytest.mark.parametrize(
    ("task", "settings", "outputs"),
    [
        ("classify", {}, ["logits", "probabilities"]),
        ("regress", {}, ["value"]),
        ("survive", {}, ["risk", "survival"]),
        ("survive", {"head__kind": "hazard"}, ["survival"]),
        ("segment", {}, ["logits"]),
    ],
)
def test_blocks_and_head_one_after_the_other_say_what_the_run_says(
    place: Path, tmp_path: Path, task: str, settings: dict[str, str], outputs: list[str]
) -> None:
    needs_openvino()
    folder = made(place, task, "probe", **settings)
    out = export_run("openvino", folder, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        *("blocks.xml", "blocks.bin", "head.xml", "head.bin"),
        *("answers.json", "config.json", "README.md", "parity.json"),
    }
    assert (out / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    parity = json.loads((out / "parity.json").read_text())["files"]
    assert parity["head.xml"]["outputs"] == outputs
    assert parity["head.xml"]["relative_error"] <= 1e-5
    read, store = read_run(folder), Store.open(place / "store")
    features = embedder(load(read.weights), store, tmp_path / "features", tokens=True)(next(iter(store)).key)
    task_: Any = read.task
    if task == "segment":
        assert features.tokens is not None
        rows = features.tokens.reshape(-1, features.tokens.shape[-1])
        (said,) = compute(out / "head.xml", {"tokens": torch.from_numpy(rows)})
        wanted = task_.logits(read.head, rows[:, None, None]).reshape(said.shape)
        np.testing.assert_allclose(said.numpy(), wanted, atol=1e-4)
        return
    said = compute(out / "head.xml", {"scan": torch.from_numpy(features.scan[None])})
    answer = task_.answer(read.head, features)
    if task == "survive":
        np.testing.assert_allclose(said[-1][0].numpy(), answer.curve.value, atol=1e-4)
        return
    wanted = read.assurance.chances(answer) if task == "classify" else [answer]
    np.testing.assert_allclose(said[-1].numpy().ravel(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("task", "mode", "weights"),
    [
        ("segment", "full", "unet"),
        ("classify", "full", "unet"),
        ("regress", "full", "unet"),
        ("segment", "adapters", "weights"),
        ("classify", "adapters", "weights"),
    ],
)
def test_a_tuned_network_says_of_real_crops_what_it_says_here(
    place: Path, tmp_path: Path, task: str, mode: str, weights: str
) -> None:
    needs_openvino()
    folder = made(place, task, mode, weights)
    out = export_run("openvino", folder, tmp_path / "out")
    (parity,) = json.loads((out / "parity.json").read_text())["files"].values()
    assert parity["relative_error"] <= 1e-4
    assert parity.get("changed_answers", 0) == 0
    told = json.loads((out / "answers.json").read_text())
    assert told["crop"]["voxels_ijk"] == [16, 16, 16]
    read, store = read_run(folder), Store.open(place / "store")
    model = load(read.weights)
    asked = Asked(task=task, voxels=read.task.voxels, classes=read.head.classes, targets={})
    net = tuned(model, read.head, asked, read.config.full or FinetuneConfig())
    crop = see(store, [next(iter(store)).key], model.spec).image[None, :, :16, :16, :16]
    said = compute(out / "network.xml", {"crop": crop})
    with torch.no_grad():
        wanted = net(crop)
    if task == "segment":
        assert torch.equal(said[0].argmax(1), wanted.argmax(1))
    if task == "regress":
        wanted = wanted[:, 0] * float(read.head.arrays["weight"][0]) + float(read.head.arrays["bias"][0])
    assert float((said[0] - wanted).abs().max() / wanted.abs().max()) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("task", "mode", "weights"), [("classify", "probe", "weights"), ("segment", "full", "unet-z")])
def test_onnx_says_the_same(place: Path, tmp_path: Path, task: str, mode: str, weights: str) -> None:
    for package in ("onnx", "onnxscript", "openvino"):
        pytest.importorskip(package, reason="the cpu extra is not installed")
    out = export_run("onnx", made(place, task, mode, weights), tmp_path / "out")
    parity = json.loads((out / "parity.json").read_text())["files"]
    assert set(parity) == ({"network.onnx"} if mode == "full" else {"blocks.onnx", "head.onnx"})
    assert all(entry["relative_error"] <= entry["most"] <= 1e-4 for entry in parity.values())


def test_the_temperature_of_the_run_is_in_the_graph(place: Path, tmp_path: Path) -> None:
    needs_openvino()
    folder = made(place, "classify", "probe")
    told = json.loads((export_run("openvino", folder, tmp_path / "out") / "answers.json").read_text())
    calibrator = read_run(folder).assurance.calibrator
    assert told["temperature"] == (1.0 if calibrator is None else calibrator.temperature)
    assert told["calibration"] == ("none" if calibrator is None else "temperature")
    assert told["classes"] == ["no", "yes"]
    assert "preliminary" in told["notice"]


def test_yes_and_no_to_each_class_leave_with_the_run_s_calibration(place: Path, tmp_path: Path) -> None:
    needs_openvino()
    rows = [line.split(",") for line in (place / "contrast.csv").read_text().splitlines()[1:]]
    table = [f"{who},{int(label == 'yes')},{at // 2 % 2}" for at, (who, label) in enumerate(rows)]
    (place / "each.csv").write_text("\n".join(["subject,late,bright", *table]) + "\n")
    folder = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / "each.csv",
        task="classify",
        mode="probe",
        out=tmp_path / "run",
    )
    bare = json.loads((export_run("openvino", folder, tmp_path / "bare") / "answers.json").read_text())
    assert bare["calibration"] == {"bright": "none", "late": "none"}
    rng = np.random.default_rng(0)
    # One in five is true whatever is stated: what leaves must be far from what the head says of any scan.
    there = np.arange(60) % 5 == 0
    known = {"late": Told(chance=np.clip(0.5 + 0.05 * there + 0.3 * rng.normal(size=60), 0.01, 0.99), there=there)}
    yesno = fit_yesno(known, fewest=10).yesno
    arrays = Assurance(yesno=yesno, subjects=60).arrays()
    save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, folder / "assurance.safetensors")
    seal(folder)
    out = export_run("openvino", folder, tmp_path / "out")
    assert json.loads((out / "answers.json").read_text())["calibration"] == {"bright": "none", "late": "platt"}
    read, task = read_run(folder), read_run(folder).task
    scan = embedder(load(read.weights), Store.open(place / "store"), tmp_path / "f", tokens=False)
    moved = 0.0
    for record in Store.open(place / "store"):
        features = scan(record.key)
        _, said = compute(out / "head.xml", {"scan": torch.from_numpy(features.scan[None])})
        raw: Any = task.answer(read.head, features)  # pyright: ignore[reportAttributeAccessIssue]
        wanted = [read.assurance.present(name, p).probability for name, p in zip(read.head.classes, raw, strict=True)]
        np.testing.assert_allclose(said[0].numpy(), wanted, atol=1e-4)
        late = read.head.classes.index("late")
        moved = max(moved, abs(float(wanted[late] - raw[late])))
    assert moved > 0.05


@pytest.mark.parametrize(
    ("task", "mode", "settings", "said"),
    [
        ("classify", "knn", {}, "classify in mode knn cannot be written as a graph"),
        ("classify", "attention", {}, "classify in mode attention cannot be written as a graph"),
        ("segment", "probe", {"see__beside": "intensity"}, "put together outside of the network"),
    ],
)
def test_what_no_graph_can_say_is_refused(
    place: Path, tmp_path: Path, task: str, mode: str, settings: dict[str, str], said: str
) -> None:
    needs_openvino()
    folder = made(place, task, mode, **settings)
    with pytest.raises(CheckpointError, match=said):
        export_run("openvino", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tuned_u_net_goes_to_nnu_net_with_its_head_and_comes_back(place: Path, tmp_path: Path) -> None:
    from voxelstem.weights.nnssl import import_nnssl

    folder = made(place, "segment", "full", "unet-z")
    out = export_run("nnunet", folder, tmp_path / "out")
    labels = json.loads((out / "dataset.json").read_text())["labels"]
    read = read_run(folder)
    assert labels == {"background": 0} | {name: place for place, name in enumerate(read.head.classes, start=1)}
    import_nnssl(out / "fold_0" / "checkpoint_final.pth", tmp_path / "back", modality="CT")
    back, ours = load(tmp_path / "back"), load(read.weights)
    assert back.spec == ours.spec
    crop = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        found, wanted = (net.backbone.decode(net.backbone.features(crop)) for net in (back, ours))
    assert found.shape[1] == len(labels)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("task", "mode", "weights", "said"),
    [
        ("classify", "full", "unet", "this run is classify in mode full"),
        ("segment", "probe", "weights", "this run is segment in mode probe"),
        ("segment", "adapters", "weights", "nnU-Net's is 'unet'"),
    ],
)
def test_other_runs_are_not_nnu_net_s(
    place: Path, tmp_path: Path, task: str, mode: str, weights: str, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        export_run("nnunet", made(place, task, mode, weights), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_whole_copy_is_a_run_without_features_and_without_anybody_s_folders(place: Path, tmp_path: Path) -> None:
    folder = adapt.run(
        weights="scratch",
        store=place / "store",
        labels=place / "contrast.csv",
        task="classify",
        mode="probe",
        out=tmp_path / "run",
        settings={"like": str(place / "weights"), "features": str(tmp_path / "features")},
    )
    assert str(tmp_path) in (folder / "config.toml").read_text()
    assert str(tmp_path) not in (folder / "README.md").read_text()
    assert str(tmp_path) not in (folder / "adapt.json").read_text()
    out = export_run("hub", folder, tmp_path / "copy")
    check_seal(out, whole=True)
    assert not (out / "features").exists()
    for path in (one for one in out.rglob("*") if one.is_file()):
        assert str(tmp_path).encode() not in path.read_bytes()
        assert b"phantom-" not in path.read_bytes()
    one, other = read_run(folder), read_run(out)
    assert other.config == replace(one.config, features=None, like="weights")
    assert other.card == one.card
    np.testing.assert_array_equal(one.head.arrays["weight"], other.head.arrays["weight"])
    assert isinstance(vs.load(out), vs.AdaptedModel)


def test_settings_of_a_copy_name_no_place_of_whoever_made_the_run() -> None:
    files = {"head.prompts": "klinik-bern/alice/p.toml", "head.tokenizer": "C:\\alice\\tokens", "seed": 3}
    config = placeless(resolve("zeroshot", "prompts", budget=None, settings=files | {"features": "alice"}))
    assert config == resolve(
        "zeroshot", "prompts", budget=None, settings={"head.prompts": "p.toml", "head.tokenizer": "tokens", "seed": 3}
    )
    kept = resolve("classify", "probe", budget=None, settings={"like": "hub:owner/name"})
    assert placeless(kept) == kept


def test_a_copy_that_does_not_match_leaves_nothing_behind(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(place, "regress", "probe")

    def damaged(looked: Path, *, whole: bool) -> None:
        if looked != folder:
            raise CheckpointError("damaged on its way")
        check_seal(looked, whole=whole)

    monkeypatch.setattr("voxelstem.handover.check_seal", damaged)
    with pytest.raises(CheckpointError, match="on its way"):
        export_run("hub", folder, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_below_the_temporary_folder_is_said(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_openvino()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("voxelstem.handover.tempfile.TemporaryDirectory", full)
    with pytest.raises(CheckpointError, match="'out' could not be written: No space left on device"):
        export_run("openvino", made(place, "regress", "probe"), tmp_path / "out")


def test_a_run_whose_weights_were_damaged_is_not_copied(place: Path, tmp_path: Path) -> None:
    copy = export_run("hub", made(place, "regress", "probe"), tmp_path / "copy")
    tensors = copy / "weights" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"weights/model\.safetensors of the run 'copy'"):
        export_run("hub", copy, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_run_without_a_card_is_not_shared(place: Path, tmp_path: Path) -> None:
    copy = export_run("hub", made(place, "regress", "probe"), tmp_path / "copy")
    facts = json.loads((copy / "adapt.json").read_text())
    del facts["card"]
    (copy / "adapt.json").write_text(json.dumps(facts))
    (copy / SEAL).unlink()
    assert read_run(copy).card.version == ""
    with pytest.raises(CheckpointError, match="wrote no card"):
        export_run("hub", copy, tmp_path / "again")


def test_what_is_no_layout_of_runs_or_no_run_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written as spectre"):
        export_run("spectre", made(place, "regress", "probe"), tmp_path / "out")
    with pytest.raises(ConfigError, match="not a finished run"):
        export_run("hub", place / "weights", tmp_path / "out")


def test_the_command_takes_runs_and_minds_their_licence(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(place, "segment", "full", "unet-z")
    words = ["weights", "export", "nnunet", str(folder), "--out"]
    assert command([*words, str(tmp_path / "refused"), "--commercial"]) == 2
    assert "cc-by-nc-4.0: no commercial use" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    assert command([*words, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "plans.json").is_file()
