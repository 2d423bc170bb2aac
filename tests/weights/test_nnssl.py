"""Files made here stand for released ones; the peer's answers lie in `golden/nnssl.json` (`benchmarks/nnunet.py`)."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import pickletools
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from voxelstem import model
from voxelstem.backbones.unet import UNet, UNetConfig, resenc
from voxelstem.card import Card, check_folder, read_tensors, write_weights
from voxelstem.config import flatten
from voxelstem.errors import CheckpointError
from voxelstem.study import INPUT_SPECS
from voxelstem.weights.known import KNOWN
from voxelstem.weights.nnssl import CITE, FILE, PLAN, PLAN_FILE, WEIGHTS, export_nnssl, import_nnssl, plan_of
from voxelstem.weights.nnssl_names import to_theirs

GOLDEN = Path(__file__).parents[1] / "golden"
PEER = json.loads((GOLDEN / "nnssl.json").read_text())
TINY = resenc("tiny")
SPEC = replace(INPUT_SPECS["mri-nnssl"], preset="", block_ijk=TINY.block_ijk)
LOADER_ASKS = {
    "architecture_plans",
    "pretrain_plan",
    "pretrain_num_input_channels",
    "recommended_downstream_patchsize",
    "key_to_encoder",
    "key_to_stem",
    "keys_to_in_proj",
    "key_to_lpe",
}
CITED = "Wald et al. 2025, An OpenMind for 3D medical vision self-supervised learning"


@functools.cache
def drawn(config: UNetConfig = TINY) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return UNet(config).state_dict()


def checkpoint(path: Path, state: dict[str, Tensor] | None = None, **entries: Any) -> Path:
    """A file as nnssl writes it, with the state of its training."""
    content = {
        WEIGHTS: to_theirs(drawn()) if state is None else state,
        PLAN: plan_of(TINY, SPEC, dataset="Dataset745_OpenMind"),
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(7)}}, "param_groups": []},
        "current_epoch": 1000,
        "trainer_name": "BaseMAETrainer",
        "init_args": {"fold": "all"},
        "citations": [{"type": "dataset", "name": "OpenMind", "apa_citations": [CITED, CITED]}],
    }
    torch.save({name: value for name, value in (content | entries).items() if value is not None}, path)
    return path


def ours(folder: Path, config: UNetConfig = TINY, **changes: Any) -> Path:
    """A weights folder of ours."""
    card = Card(architecture=flatten(config), spec=SPEC, trained=("block",), licence="cc-by-4.0", recipe="brain")
    write_weights(folder, drawn(config), replace(card, **changes))
    return folder


def refused(path: Path, tmp_path: Path, **how: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_nnssl(path, tmp_path / "refused", **how)
    assert not (tmp_path / "refused").exists()
    assert str(tmp_path) not in str(caught.value)
    return str(caught.value)


# --- in


def test_the_peer_s_weights_compute_here_what_they_compute_there(tmp_path: Path):
    found = importlib.util.spec_from_file_location("golden_cases", GOLDEN / "cases.py")
    assert found is not None
    assert found.loader is not None
    cases = importlib.util.module_from_spec(found)
    found.loader.exec_module(cases)
    weights = cases.fill("nnssl", PEER["shapes"])
    state = {name: weights[plain] for name, plain in PEER["names"].items()}
    import_nnssl(checkpoint(tmp_path / FILE, state), tmp_path / "out")
    network = model.load(tmp_path / "out").backbone
    shape = PEER["block_ijk"]
    x = torch.from_numpy(cases.uniform("nnssl tiny", math.prod(shape))).reshape(1, 1, *shape)
    with torch.inference_mode():
        features = network.features(x)
        output = network.decode(features).flatten()[:: cases.SAMPLES // 4]
    for got, kept in ((features[-1].mean(dim=(0, 2, 3, 4)), "bottleneck"), (output, "output")):
        wanted = torch.tensor(PEER[kept])
        assert float((got - wanted).abs().max() / wanted.abs().max()) <= 1e-5


def test_a_checkpoint_comes_in_to_the_bit_with_its_card(tmp_path: Path):
    card = import_nnssl(checkpoint(tmp_path / FILE), tmp_path / "out", about=KNOWN["openmind-resenc-l-mae"])
    tensors = read_tensors(tmp_path / "out", card)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in drawn().items())
    assert (card.spec, card.licence, card.recipe) == (SPEC, "cc-by-4.0", "nnssl BaseMAETrainer")
    assert card.data == KNOWN["openmind-resenc-l-mae"].data
    assert sum(note == CITE + CITED for note in card.notes) == 1
    assert any("arXiv 2412.17041" in note for note in card.notes)
    assert check_folder(tmp_path / "out") == card
    assert model.load(tmp_path / "out").spec.normalisation == "zscore"


@pytest.mark.parametrize("beside", [True, False])
def test_the_licence_is_what_a_readme_beside_the_file_declares(beside: bool, tmp_path: Path):
    if beside:
        (tmp_path / "README.md").write_text("---\ntags: [mri]\nlicense: 'CC-BY-4.0'\n---\n# Weights\nlicense: mit\n")
    card = import_nnssl(checkpoint(tmp_path / FILE), tmp_path / "out")
    assert card.licence == ("cc-by-4.0" if beside else "not stated")


def test_the_plan_s_axes_spacing_and_blocks_come_in_as_i_j_k(tmp_path: Path):
    plan = plan_of(TINY, SPEC, dataset="x")
    plan["pretrain_plan"]["configurations"] = {
        "median": {
            "spacing": [3.0, 1.0, 0.5],
            "patch_size": [16, 32, 64],
            "normalization_schemes": ["ZScoreNormalization"],
        }
    }
    card = import_nnssl(checkpoint(tmp_path / FILE, **{PLAN: plan}), tmp_path / "out")
    assert (card.spec.spacing_mm, card.spec.block_ijk) == ((0.5, 1.0, 3.0), (64, 32, 16))
    plan["pretrain_plan"]["transpose_forward"] = [2, 0, 1]  # their arrays then run (i, k, j)
    card = import_nnssl(checkpoint(tmp_path / FILE, **{PLAN: plan}), tmp_path / "turned")
    assert (card.spec.spacing_mm, card.spec.block_ijk) == ((3.0, 0.5, 1.0), (16, 64, 32))
    name = "encoder.stem.convs.0.conv.weight"
    # What our first axis is was theirs' first, our second (j) their third.
    theirs = to_theirs(drawn())[name]
    assert torch.equal(read_tensors(tmp_path / "turned", card)[name], theirs.permute(0, 1, 2, 4, 3))


def test_no_resampling_is_obeyed_as_the_scan_s_own_spacing(tmp_path: Path):
    plan = plan_of(TINY, replace(SPEC, resampling="native"), dataset="x")
    assert plan["pretrain_plan"]["configurations"]["noresample"]["spacing"] is None
    card = import_nnssl(checkpoint(tmp_path / FILE, **{PLAN: plan}), tmp_path / "out")
    assert card.spec.resampling == "native"
    assert card.spec.spacing_mm == (1.0, 1.0, 1.0)


def test_an_encoder_alone_comes_in_bare_and_its_plan_from_beside(tmp_path: Path):
    bare = {name.removeprefix("encoder."): x for name, x in to_theirs(drawn()).items() if name.startswith("encoder.")}
    torch.save(bare, tmp_path / "encoder.pth")
    (tmp_path / PLAN_FILE).write_text(json.dumps(plan_of(TINY, SPEC, dataset="x")))
    card = import_nnssl(tmp_path / "encoder.pth", tmp_path / "out")
    assert card.spec == SPEC
    assert card.architecture["decoder"] is False
    backbone = model.load(tmp_path / "out").backbone
    assert len(backbone.state_dict()) == sum(name.startswith("encoder.") for name in drawn())


def test_without_any_plan_the_usual_way_is_assumed_and_said(tmp_path: Path):
    card = import_nnssl(checkpoint(tmp_path / FILE, **{PLAN: None}), tmp_path / "out")
    assert card.spec == INPUT_SPECS["mri-nnssl"]
    assert any("assumed" in note for note in card.notes)


def test_channels_are_made_of_the_one(tmp_path: Path):
    card = import_nnssl(checkpoint(tmp_path / FILE), tmp_path / "out", channels=4)
    stem = read_tensors(tmp_path / "out", card)["encoder.stem.convs.0.conv.weight"]
    assert stem.shape == (8, 4, 3, 3, 3)
    assert torch.allclose(stem.sum(dim=1, keepdim=True), drawn()["encoder.stem.convs.0.conv.weight"], atol=1e-6)
    assert model.load(tmp_path / "out").backbone.config.channels == 4


def test_tensors_that_differ_under_their_two_names_are_noted(tmp_path: Path):
    state = to_theirs(drawn())
    state |= {"encoder.stem.convs.0.norm.bias": torch.ones(8)}
    card = import_nnssl(checkpoint(tmp_path / FILE, state), tmp_path / "out")
    assert any(note.startswith("1 tensors differ") for note in card.notes)
    taken = read_tensors(tmp_path / "out", card)["encoder.stem.convs.0.norm.bias"]
    assert torch.equal(taken, drawn()["encoder.stem.convs.0.norm.bias"])


def test_foreign_keys_are_refused_and_can_be_left_out(tmp_path: Path):
    state = to_theirs(drawn()) | {"projector.0.weight": torch.zeros(4, 4)}
    path = checkpoint(tmp_path / FILE, state)
    said = refused(path, tmp_path)
    assert "1 unknown: projector.0.weight" in said
    assert "encoder_only" in said
    card = import_nnssl(path, tmp_path / "out", encoder_only=True)
    assert any("left out" in note for note in card.notes)


def test_another_network_is_refused(tmp_path: Path):
    path = checkpoint(tmp_path / FILE, {"eva.blocks.0.norm1.weight": torch.zeros(3), "eva.pos_embed": torch.zeros(3)})
    assert "no ResEnc U-Net" in refused(path, tmp_path)


def test_wrong_sizes_are_refused(tmp_path: Path):
    state = to_theirs(drawn())
    name = "encoder.stages.1.blocks.0.conv1.all_modules.0.weight"
    assert "of another shape" in refused(checkpoint(tmp_path / FILE, state | {name: torch.zeros(2, 2)}), tmp_path)
    plan = plan_of(TINY, replace(SPEC, block_ijk=(30, 32, 32)), dataset="x")
    assert "must fill block_ijk" in refused(checkpoint(tmp_path / FILE, **{PLAN: plan}), tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path):
    state = to_theirs(drawn() | {"decoder.seg_layers.1.bias": torch.tensor([float("nan")])})
    assert "decoder.seg_layers.1.bias" in refused(checkpoint(tmp_path / FILE, state), tmp_path)


class Planted:
    """Asks the unpickler to run a program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch planted",)


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    said = refused(checkpoint(tmp_path / FILE, logging=Planted()), tmp_path)
    assert "posix.system" in said
    assert "nothing of it was run" in said
    assert not (tmp_path / "planted").exists()


def damaged(change: Any) -> dict[str, Any]:
    plan = plan_of(TINY, SPEC, dataset="x")
    change(plan, plan["pretrain_plan"]["configurations"]["onemmiso"])
    return plan


@pytest.mark.parametrize(
    "change",
    [
        lambda plan, _: plan.pop("pretrain_plan"),
        lambda plan, _: plan["pretrain_plan"].update(configurations={}),
        lambda plan, _: plan["pretrain_plan"].update(transpose_forward=[0, 0, 1]),
        lambda _, configuration: configuration.update(patch_size=[32, 32]),
        lambda _, configuration: configuration.update(patch_size=["a", 1, 1]),
        lambda _, configuration: configuration.update(patch_size=[2**20, 2**20, 32]),
        lambda _, configuration: configuration.update(spacing=[float("nan"), 1, 1]),
        lambda _, configuration: configuration.update(spacing=[0, 1, 1]),
        lambda _, configuration: configuration.update(normalization_schemes=["CTNormalization"]),
        lambda _, configuration: configuration.update(use_mask_for_norm=[True]),
        lambda plan, one: plan["pretrain_plan"]["configurations"].update(noresample={**one, "spacing": None}),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(change: Any, tmp_path: Path):
    said = refused(checkpoint(tmp_path / FILE, **{PLAN: damaged(change)}), tmp_path)
    assert "adaptation plan cannot be followed" in said


@pytest.mark.parametrize("plan", ["word", 7, ["list"], {}])
def test_a_plan_that_is_none_is_refused(plan: Any, tmp_path: Path):
    assert "cannot be followed" in refused(checkpoint(tmp_path / FILE, **{PLAN: plan}), tmp_path)


def test_a_damaged_plan_beside_the_file_is_refused(tmp_path: Path):
    (tmp_path / PLAN_FILE).write_text("{" * 100_000)
    assert "cannot be followed" in refused(checkpoint(tmp_path / FILE, **{PLAN: None}), tmp_path)


# --- out


def test_what_goes_out_is_plain_and_has_all_that_nnu_net_s_loader_asks_for(tmp_path: Path):
    out = export_nnssl(ours(tmp_path / "ours", notes=(CITE + CITED, "a note")), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {FILE, PLAN_FILE, "config.json", "README.md"}
    found = torch.load(out / FILE, weights_only=True)
    assert found.keys() == {WEIGHTS, PLAN, "init_args", "trainer_name", "citations"}
    assert found[PLAN].keys() == LOADER_ASKS
    assert found["citations"][0]["apa_citations"] == [CITED]
    assert json.loads((out / PLAN_FILE).read_text()) == found[PLAN] | {"trainer_name": "voxelstem"}
    stem = found[PLAN]["key_to_stem"]
    for key in found[PLAN]["keys_to_in_proj"]:
        assert key.startswith(stem)
        assert found[WEIGHTS][f"{key}.weight"].shape == (8, 1, 3, 3, 3)
    assert sorted(found[WEIGHTS]) == sorted(PEER["names"])


def test_the_file_names_nothing_but_torch_s_own_tensors(tmp_path: Path):
    out = export_nnssl(ours(tmp_path / "ours"), tmp_path / "out")
    with zipfile.ZipFile(out / FILE) as archive:
        (name,) = [entry for entry in archive.namelist() if entry.endswith("data.pkl")]
        named = {str(argument) for code, argument, _ in pickletools.genops(archive.read(name)) if code.name == "GLOBAL"}
    assert named == {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}


def test_aliases_are_written_once(tmp_path: Path):
    out = export_nnssl(ours(tmp_path / "ours"), tmp_path / "out")
    numbers = 4 * sum(tensor.numel() for tensor in drawn().values())
    assert (out / FILE).stat().st_size < numbers + 1000 * len(PEER["names"])


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (TINY, 160),
        (replace(TINY, decoder=False), 68),
        (replace(TINY, skips="none"), 68),
        (replace(TINY, channels=3), 160),
    ],
)
def test_out_and_in_again_is_the_same_to_the_bit(config: UNetConfig, names: int, tmp_path: Path):
    out = export_nnssl(ours(tmp_path / "ours", config), tmp_path / "out")
    assert len(torch.load(out / FILE, weights_only=True)[WEIGHTS]) == names
    card = import_nnssl(out / FILE, tmp_path / "again")
    back = read_tensors(tmp_path / "again", card)
    wanted = {name: x for name, x in drawn(config).items() if names > 68 or name.startswith("encoder.")}
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in wanted.items())
    assert card.spec == SPEC
    assert card.licence == "cc-by-4.0"
    assert card.architecture["channels"] == config.channels


def test_weights_that_nnu_net_would_feed_otherwise_are_refused(tmp_path: Path):
    for number, spec in enumerate((INPUT_SPECS["mri-fomo25"], INPUT_SPECS["ct-stage2"])):
        folder = ours(tmp_path / f"ours{number}", spec=replace(spec, block_ijk=(32, 32, 32), preset=""))
        with pytest.raises(CheckpointError, match="z-scores"):
            export_nnssl(folder, tmp_path / "out")
    card = Card(architecture={"name": "scan_vit"}, spec=SPEC)
    write_weights(tmp_path / "vit", {"a": torch.zeros(1)}, card)
    with pytest.raises(CheckpointError, match="'scan_vit'"):
        export_nnssl(tmp_path / "vit", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_kept(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export_nnssl(ours(tmp_path / "ours"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_resenc_l_goes_by_its_word_and_other_sizes_by_their_settings():
    assert plan_of(resenc("L"), SPEC, dataset="x")["architecture_plans"] == {
        "arch_class_name": "ResEncL",
        "arch_kwargs": None,
        "arch_kwargs_requiring_import": None,
    }
    asked = plan_of(resenc("S"), SPEC, dataset="x")["architecture_plans"]
    assert asked["arch_kwargs"]["features_per_stage"] == list(resenc("S").features)
    assert asked["arch_kwargs"].keys() >= set(asked["arch_kwargs_requiring_import"])


@pytest.mark.slow
def test_the_whole_resenc_l_goes_out_under_956_names_and_comes_back(tmp_path: Path):
    config = resenc("L")
    folder = ours(tmp_path / "ours", config, spec=INPUT_SPECS["mri-nnssl"])
    out = export_nnssl(folder, tmp_path / "out")
    assert len(torch.load(out / FILE, weights_only=True, mmap=True)[WEIGHTS]) == 956
    # 102,348,965 numbers once, not four times.
    assert (out / FILE).stat().st_size < 4 * 102_348_965 + 2**20
    card = import_nnssl(out / FILE, tmp_path / "again")
    back = read_tensors(tmp_path / "again", card)
    assert len(back) == 264
    assert all(torch.equal(back[name], tensor) for name, tensor in drawn(config).items())
    assert card.spec == INPUT_SPECS["mri-nnssl"]
