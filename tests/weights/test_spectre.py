from __future__ import annotations

import json
import math
import resource
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from voxelstem.backbones.heads import AlignHead
from voxelstem.backbones.qwen3 import TextConfig, read_tower, text_shapes
from voxelstem.backbones.scan_vit import ScanVit
from voxelstem.backbones.sizes import SIZES, sized
from voxelstem.card import Card, check_commercial, check_folder, digest, read_card, read_tensors, write_weights
from voxelstem.config import flatten
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.model import load
from voxelstem.study import INPUT_SPECS
from voxelstem.weights.known import KNOWN, SPECTRE_DATA
from voxelstem.weights.spectre import HEADS, SpectreFiles, export_spectre, import_spectre, read_heads, to_ours
from voxelstem.weights.spectre_names import head_to_theirs, shapes

TEXT = TextConfig(hidden=12, layers=1, heads=2, kv_heads=1, head_dim=6, inter=8, vocab=10, lora_rank=2, lora_alpha=8.0)
State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """All parts of a random `spectre-tiny`, in memory and as the files in which each would be released."""

    parts: Mapping[str, State]
    files: SpectreFiles


def drawn(wanted: Mapping[str, tuple[int, ...]], *, base: float, seed: int) -> State:
    random = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=random) for name, shape in wanted.items()}
    if "rope.periods" in tensors:
        count = len(tensors["rope.periods"])
        tensors["rope.periods"] = base ** (2 * torch.arange(count, dtype=torch.float32) / (2 * count))
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    backbone, combiner = shapes(SIZES["spectre-tiny"])
    parts = {
        "backbone": drawn(backbone, base=1000.0, seed=0),
        "combiner": drawn(combiner, base=100.0, seed=1),
        "image_head": head_to_theirs(AlignHead(384).state_dict()),
        "text_head": head_to_theirs(AlignHead(12).state_dict()),
        "text": drawn(text_shapes(TEXT), base=0.0, seed=2),
    }
    folder = tmp_path_factory.mktemp("released")
    for name, state in parts.items():
        torch.save(state, folder / f"{name}.pt")
    files = {name: folder / f"{name}.pt" for name in parts}
    return Source(parts=parts, files=SpectreFiles(**files, text_config=TEXT))


@pytest.fixture(scope="module")
def whole(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights folder with every part."""
    folder = tmp_path_factory.mktemp("ours") / "tiny"
    import_spectre(source.files, folder)
    return folder


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- import


def test_the_imported_folder_loads_and_holds_the_mapped_tensors(source: Source, whole: Path):
    model = load(whole)
    assert model.use_scan_level
    assert model.spec == INPUT_SPECS["ct-stage2"]
    wanted = to_ours(source.parts["backbone"], source.parts["combiner"], sized("spectre-tiny"))
    assert same(model.backbone.state_dict(), wanted)


def test_the_card_says_licence_origin_data_and_what_is_trained(whole: Path):
    card = check_folder(whole)
    assert card.licence == "cc-by-nc-sa-4.0"
    assert "2511.17209" in card.origin
    assert len(card.data) == 8
    assert any("CT-RATE" in line for line in card.data)
    assert card.trained == ("block", "scan")
    assert card.architecture == flatten(sized("spectre-tiny"))
    assert set(card.extras) == {HEADS, "text/model.safetensors", "text/config.json"}
    with pytest.raises(ConfigError, match="commercial"):
        check_commercial(card)


def test_a_size_that_was_never_released_says_so_in_its_card(whole: Path):
    assert "spectre-large only" in read_card(whole).notes[0]


def test_heads_and_text_tower_are_kept_bit_by_bit(source: Source, whole: Path):
    card = read_card(whole)
    heads = read_heads(whole, card)
    assert list(heads) == ["image", "text"]
    assert same(head_to_theirs(heads["image"]), source.parts["image_head"])
    assert same(head_to_theirs(heads["text"]), source.parts["text_head"])
    config, tensors = read_tower(whole, card)
    assert config == TEXT
    assert same(tensors, source.parts["text"])
    AlignHead(384).load_state_dict(heads["image"])


def test_a_backbone_alone_has_no_scan_level(source: Source, tmp_path: Path):
    card = import_spectre(SpectreFiles(backbone=source.files.backbone), tmp_path / "w")
    assert card.trained == ("block",)
    assert card.extras == {}
    assert not load(tmp_path / "w").backbone.has_scan_level


def test_the_card_says_the_data_that_it_is_told(source: Source, tmp_path: Path):
    files = SpectreFiles(backbone=source.files.backbone)
    assert import_spectre(files, tmp_path / "own").data == SPECTRE_DATA
    told = KNOWN["spectre-large-no-vla"].data
    assert import_spectre(files, tmp_path / "told", data=told).data == told != SPECTRE_DATA


def test_spacing_block_and_eps_go_into_the_folder(source: Source, tmp_path: Path):
    spec = replace(INPUT_SPECS["ct-stage1"], block_ijk=(256, 256, 128))
    files = SpectreFiles(backbone=source.files.backbone, combiner=source.files.combiner)
    card = import_spectre(files, tmp_path / "w", spec=spec, scan_eps=1e-6)
    assert card.spec.spacing_mm == (0.5, 0.5, 1.0)
    config = load(tmp_path / "w").backbone.config
    assert (config.block_ijk, config.block.eps, config.scan.eps) == ((256, 256, 128), 1e-5, 1e-6)


def test_the_hub_s_single_file_gives_both_levels(source: Source, whole: Path, tmp_path: Path):
    names = {"backbone": "model.backbone.", "combiner": "model.feature_combiner."}
    hub = {before + name: x for part, before in names.items() for name, x in source.parts[part].items()}
    save_file(hub, tmp_path / "model.safetensors")
    card = import_spectre(SpectreFiles(backbone=tmp_path / "model.safetensors"), tmp_path / "w")
    assert card.trained == ("block", "scan")
    assert card.sha256 == read_card(whole).sha256


def test_a_checkpoint_of_the_alignment_gives_every_part(source: Source, whole: Path, tmp_path: Path):
    names = {
        "backbone": "backbone_image.",
        "combiner": "feature_comb_image.",
        "image_head": "projection_image.",
        "text_head": "projection_text.",
        "text": "backbone_text.",
    }
    model = {"module." + before + name: x for part, before in names.items() for name, x in source.parts[part].items()}
    model["module.criterion.logit_scale"] = torch.zeros(())
    path = saved(tmp_path / "w.pt", {"model": {**model}, "epoch": 7})
    card = import_spectre(SpectreFiles(backbone=path, text_config=TEXT), tmp_path / "w")
    assert (card.sha256, card.extras) == (read_card(whole).sha256, read_card(whole).extras)


def test_a_checkpoint_of_the_first_stage_gives_the_averaged_backbone(source: Source, tmp_path: Path):
    student = {f"backbone_student.vit.{name}": x + 1 for name, x in source.parts["backbone"].items()}
    teacher = {f"backbone_teacher.vit.{name}": x for name, x in source.parts["backbone"].items()}
    rest = {"backbone_student.mask_token": torch.zeros(1, 1, 192), "head_teacher_dino.last_layer": torch.zeros(3)}
    path = saved(tmp_path / "w.pt", student | teacher | rest)
    import_spectre(SpectreFiles(backbone=path), tmp_path / "w")
    assert torch.equal(load(tmp_path / "w").backbone.embed.bias, source.parts["backbone"]["patch_embed.proj.bias"])


def test_a_part_s_own_file_goes_before_what_the_checkpoint_holds(source: Source, tmp_path: Path):
    both = {f"backbone.{name}": x for name, x in source.parts["backbone"].items()}
    both |= {f"feature_combiner.{name}": x + 1 for name, x in source.parts["combiner"].items()}
    files = SpectreFiles(backbone=saved(tmp_path / "w.pt", both), combiner=source.files.combiner)
    import_spectre(files, tmp_path / "w")
    assert torch.equal(load(tmp_path / "w").backbone.scan_project.bias, source.parts["combiner"]["patch_proj.bias"])


def test_registers_are_told_from_the_file(source: Source, tmp_path: Path):
    with_registers = {**source.parts["backbone"], "reg_token": torch.ones(1, 3, 192)}
    import_spectre(SpectreFiles(backbone=saved(tmp_path / "w.pt", with_registers)), tmp_path / "w")
    prefix = load(tmp_path / "w").backbone.block_encoder.prefix
    assert prefix.shape == (4, 192)
    assert (prefix[1:] == 1).all()


# --- refused


def refused(files: SpectreFiles, out: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        import_spectre(files, out)
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if "unfinished" in path.name] == []


def test_a_combiner_of_another_size_is_refused(source: Source, tmp_path: Path):
    with torch.device("meta"):
        combiner = shapes(SIZES["spectre-small"])[1]
    path = saved(tmp_path / "c.pt", {name: torch.zeros(shape) for name, shape in combiner.items()})
    refused(SpectreFiles(backbone=source.files.backbone, combiner=path), tmp_path / "w", "combiner.*192 wide")


def test_files_given_for_one_another_are_refused(source: Source, tmp_path: Path):
    swapped = SpectreFiles(backbone=source.files.combiner or Path(), combiner=source.files.backbone)
    refused(swapped, tmp_path / "w", "a combiner is given as --combiner")


def test_a_checkpoint_without_the_part_asked_for_is_refused(source: Source, tmp_path: Path):
    path = saved(tmp_path / "c.pt", {"projection_image.x": torch.zeros(1)})
    files = SpectreFiles(backbone=source.files.backbone, combiner=path)
    refused(files, tmp_path / "w", r"'c\.pt' holds image_head and no combiner")


def test_another_family_s_weights_are_refused(tmp_path: Path):
    path = saved(tmp_path / "r.pt", {"conv1.weight": torch.zeros(64, 1, 7, 7, 7), "fc.bias": torch.zeros(2)})
    refused(SpectreFiles(backbone=path), tmp_path / "w", "390 missing(.|\n)*2 unknown: conv1.weight, fc.bias")


def test_a_head_for_another_width_is_refused(source: Source, tmp_path: Path):
    files = SpectreFiles(backbone=source.files.backbone, image_head=source.files.text_head)
    refused(files, tmp_path / "w", r"image head(.|\n)*layers.0.weight \(2048, 12\) instead of \(2048, 384\)")


def test_a_text_tower_of_another_size_is_refused(source: Source, tmp_path: Path):
    files = SpectreFiles(backbone=source.files.backbone, text=source.files.text)
    refused(files, tmp_path / "w", r"text tower: the file's 21 tensors are not the 534")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(source: Source, tmp_path: Path, value: float):
    broken = {**source.parts["backbone"], "norm.bias": torch.full((192,), value)}
    path = saved(tmp_path / "b.pt", broken)
    refused(SpectreFiles(backbone=path), tmp_path / "w", "block_encoder.norm.bias")


@pytest.mark.parametrize("name", ["norm.bias", "rope.periods"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.complex64])
def test_numbers_of_a_kind_that_weights_do_not_have_are_refused(
    source: Source, tmp_path: Path, name: str, dtype: torch.dtype
):
    backbone = source.parts["backbone"]
    path = saved(tmp_path / "b.pt", {**backbone, name: backbone[name].to(dtype)})
    refused(SpectreFiles(backbone=path), tmp_path / "w", name)


@pytest.mark.parametrize(
    "wrong", [{"scan_eps": 0.0}, {"spec": replace(INPUT_SPECS["ct-stage2"], block_ijk=(100, 128, 64))}]
)
def test_settings_that_the_network_cannot_have_are_refused(source: Source, tmp_path: Path, wrong: dict[str, Any]):
    with pytest.raises(ConfigError):
        import_spectre(SpectreFiles(backbone=source.files.backbone), tmp_path / "w", **wrong)


def test_a_folder_is_never_written_over(source: Source, whole: Path):
    with pytest.raises(CheckpointError, match="exists already"):
        import_spectre(source.files, whole)


# --- export


@pytest.fixture(scope="module")
def exported(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_spectre(whole, tmp_path_factory.mktemp("exported") / "plain")


@pytest.mark.parametrize("part", ["backbone", "combiner", "image_head", "text_head", "text"])
def test_each_part_is_written_back_with_the_same_bits_in_both_formats(source: Source, exported: Path, part: str):
    wanted = source.parts[part]
    assert same(load_file(exported / f"{part}.safetensors"), wanted)
    back = torch.load(exported / f"{part}.pt", weights_only=True)
    assert list(back) == list(wanted)
    assert same(back, wanted)


def test_the_torch_file_holds_nothing_but_the_tensors(source: Source, exported: Path):
    bytes_of_tensors = sum(tensor.nbytes for tensor in source.parts["backbone"].values())
    assert (exported / "backbone.pt").stat().st_size < 1.05 * bytes_of_tensors + 100_000


def test_the_check_of_the_export_lies_beside_it(whole: Path, exported: Path):
    facts = json.loads((exported / "parity.json").read_text())
    assert (facts["different"], facts["weights_sha256"]) == (0, read_card(whole).sha256)
    assert facts["sha256"].keys() == {
        path.name for path in exported.iterdir() if path.suffix in (".pt", ".safetensors")
    }
    assert all(digest(exported / name) == value for name, value in facts["sha256"].items())
    assert "cc-by-nc-sa-4.0" in (exported / "README.md").read_text()
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o644}


def test_what_was_exported_is_imported_again_to_the_same_folder(whole: Path, exported: Path, tmp_path: Path):
    files = {part: exported / f"{part}.pt" for part in ("backbone", "combiner", "image_head", "text_head", "text")}
    card = import_spectre(SpectreFiles(**files, text_config=TEXT), tmp_path / "w")
    assert card == read_card(whole)


def test_weights_that_were_trained_here_are_exported_without_their_mask_token(tmp_path: Path):
    config = sized("spectre-tiny", scan_level=False)
    state = ScanVit(config).state_dict()
    card = Card(architecture=flatten(config), spec=INPUT_SPECS["ct-stage1"])
    write_weights(tmp_path / "w", state, card)
    out = export_spectre(tmp_path / "w", tmp_path / "plain")
    assert json.loads((out / "parity.json").read_text())["left_out"] == ["mask_token"]
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "backbone.pt",
        "backbone.safetensors",
        "parity.json",
    ]
    import_spectre(SpectreFiles(backbone=out / "backbone.safetensors"), tmp_path / "again")
    again = read_tensors(tmp_path / "again", read_card(tmp_path / "again"))
    assert same({**again, "mask_token": state["mask_token"]}, state)


def test_another_network_is_not_exported_as_spectre(tmp_path: Path):
    card = Card(architecture={"name": "i3resnet"}, spec=INPUT_SPECS["ct-stage1"])
    write_weights(tmp_path / "w", {"a": torch.zeros(1)}, card)
    with pytest.raises(CheckpointError, match="holds the network 'i3resnet'"):
        export_spectre(tmp_path / "w", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("room", [0.5, 1.001])
def test_a_full_disk_is_said_and_leaves_nothing_behind(whole: Path, tmp_path: Path, room: float):
    # Less than the safetensors need, then enough for them but not for the torch file, which is a little larger.
    size = sum(math.prod(shape) * 4 for shape in shapes(SIZES["spectre-tiny"])[0].values())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * room), hard))
    try:
        with pytest.raises(CheckpointError, match="'plain' could not be written"):
            export_spectre(whole, tmp_path / "plain")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_never_written_over(whole: Path, exported: Path):
    with pytest.raises(CheckpointError, match="plain exists already"):
        export_spectre(whole, exported)
