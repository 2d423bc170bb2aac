from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from voxelstem.card import (
    Card,
    against_commerce,
    check_commercial,
    check_folder,
    link_files,
    members,
    read_card,
    read_tensors,
    read_text,
    write_weights,
)
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.study import INPUT_SPECS, InputSpec

SPEC = InputSpec(modality="CT", spacing_mm=(1.5, 2.0, 3.0), low_hu=-150.0, high_hu=250.0, block_ijk=(8, 8, 4))
CARD = Card(
    architecture={"name": "scan_vit", "patch_ijk": (4, 4, 2), "block.dim": 24},
    spec=SPEC,
    licence="apache-2.0",
    data=("12 CT scans from phantom sources",),
    recipe="tiny",
    trained=("block", "scan"),
    notes=("made for a test",),
)
HEADS = {"image.gain": torch.ones(4, 1)}
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5)}


def test_tensors_and_card_come_back_as_they_were(tmp_path: Path):
    card = write_weights(tmp_path / "w", TENSORS, CARD)
    assert read_card(tmp_path / "w") == card
    assert replace(card, sha256="") == CARD
    back = read_tensors(tmp_path / "w", card)
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[name], TENSORS[name]) for name in TENSORS)


def test_the_folder_is_the_hub_s_layout_readable_by_others(tmp_path: Path):
    write_weights(tmp_path / "w", TENSORS, CARD)
    files = sorted((tmp_path / "w").iterdir())
    assert [path.name for path in files] == ["README.md", "config.json", "model.safetensors"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in files)
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_the_readme_says_what_it_is_what_it_saw_and_that_it_is_no_medical_device(tmp_path: Path):
    card = write_weights(tmp_path / "w", TENSORS, CARD)
    readme = (tmp_path / "w" / "README.md").read_text()
    assert readme.startswith("---\nlibrary_name: voxelstem\nlicense: apache-2.0\n---\n")
    for fact in [
        "Not a medical device",
        "12 CT scans",
        "fed at 1.5 x 2 x 3 mm",
        "[-150, 250]",
        card.sha256,
        "made for",
    ]:
        assert fact in readme


def test_an_untrained_model_s_readme_says_so(tmp_path: Path):
    write_weights(tmp_path / "w", TENSORS, replace(CARD, trained=()))
    text = (tmp_path / "w" / "README.md").read_text()
    assert "none (untrained)" in text
    assert "Origin: untrained: drawn at random" in text
    write_weights(tmp_path / "ours", TENSORS, CARD)
    assert "Origin: trained with voxelstem" in (tmp_path / "ours" / "README.md").read_text()


def test_weights_are_never_written_over(tmp_path: Path):
    write_weights(tmp_path / "w", TENSORS, CARD)
    before = (tmp_path / "w" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="w exists already"):
        write_weights(tmp_path / "w", {"other": torch.zeros(1)}, CARD)
    assert (tmp_path / "w" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("at", [0, 9, -1])
def test_damaged_tensors_are_refused(tmp_path: Path, at: int):
    card = write_weights(tmp_path / "w", TENSORS, CARD)
    path = tmp_path / "w" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="differs from the card's sha256"):
        read_tensors(tmp_path / "w", card)


def test_tensors_that_are_not_there_are_missed(tmp_path: Path):
    card = write_weights(tmp_path / "w", TENSORS, CARD)
    (tmp_path / "w" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        read_tensors(tmp_path / "w", card)


@pytest.mark.parametrize(
    "header",
    [(2**63 - 1).to_bytes(8, "little") + b"{}", b"\xff" * 8 + b"{}", b"", b"\x02" + b"\0" * 7 + b"[]", b"PK\x03\x04"],
)
def test_a_poisoned_header_is_refused_though_its_digest_is_right(tmp_path: Path, header: bytes):
    card = write_weights(tmp_path / "w", TENSORS, CARD)
    path = tmp_path / "w" / "model.safetensors"
    path.write_bytes(header)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(tmp_path / "w", replace(card, sha256=hashlib.sha256(header).hexdigest()))


GOOD: dict[str, Any] = {"architecture": {"name": "scan_vit"}, "spec": {"modality": "CT"}}


@pytest.mark.parametrize(
    "foreign",
    [
        {"model_type": "vit", "hidden_size": 768},
        [1, 2],
        {},
        GOOD | {"spec": {"colour": "red"}},
        GOOD | {"spec": {"low_hu": 5.0, "high_hu": -5.0}},
        GOOD | {"spec": {"normalisation": "histogram"}},
        GOOD | {"spec": {"normalisation": "zscore", "low_hu": 0.0}},
        GOOD | {"spec": "CT"},
        GOOD | {"architecture": "resnet"},
        GOOD | {"architecture": {"layers": 3}},
        GOOD | {"architecture": {"name": 3}},
        GOOD | {"trained": "block"},
        GOOD | {"sha256": 5},
    ],
)
def test_another_tool_s_config_is_refused(tmp_path: Path, foreign: Any):
    (tmp_path / "config.json").write_text(json.dumps(foreign))
    with pytest.raises(CheckpointError, match="is not a voxelstem card"):
        read_card(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{}"])
def test_a_damaged_config_is_refused(tmp_path: Path, data: bytes):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match="is not a voxelstem card"):
        read_card(tmp_path)


def test_what_a_newer_version_added_is_left_out(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(GOOD | {"colour": "red"}))
    assert read_card(tmp_path) == Card(architecture={"name": "scan_vit"}, spec=InputSpec())


def test_a_folder_without_config_is_no_weights_folder(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is not a weights folder"):
        read_card(tmp_path / "nowhere")


def test_a_full_disk_is_a_clear_error_and_nothing_is_left(tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"weights 'w' \(0.4 MB\) could not be written: .*too large"):
            write_weights(tmp_path / "w", {"a": torch.zeros(100_000)}, CARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------- files beside the tensors


def write_more(folder: Path) -> Card:
    return write_weights(folder, TENSORS, CARD, {"heads.safetensors": HEADS}, {"text/config.json": '{"layers": 2}\n'})


def test_further_files_are_listed_with_their_digests_and_come_back(tmp_path: Path):
    card = write_more(tmp_path / "w")
    assert read_card(tmp_path / "w") == card == check_folder(tmp_path / "w")
    digests = {name: hashlib.sha256((tmp_path / "w" / name).read_bytes()).hexdigest() for name in card.extras}
    assert card.extras == digests
    assert sorted(card.extras) == ["heads.safetensors", "text/config.json"]
    assert torch.equal(read_tensors(tmp_path / "w", card, "heads.safetensors")["image.gain"], HEADS["image.gain"])
    assert read_text(tmp_path / "w", card, "text/config.json") == '{"layers": 2}\n'
    assert read_tensors(tmp_path / "w", card).keys() == TENSORS.keys()


def test_the_members_of_a_folder_are_all_of_its_files_and_no_stray_one(tmp_path: Path):
    card = write_more(tmp_path / "w")
    written = {path.relative_to(tmp_path / "w").as_posix() for path in (tmp_path / "w").rglob("*") if path.is_file()}
    (tmp_path / "w" / "stray.txt").write_text("x")
    assert set(members(tmp_path / "w", card)) == written
    (tmp_path / "w" / "README.md").unlink()
    assert set(members(tmp_path / "w", card)) == written - {"README.md"}


@pytest.mark.parametrize("file", ["heads.safetensors", "text/config.json"])
def test_a_damaged_or_lost_further_file_is_refused(tmp_path: Path, file: str):
    card = write_more(tmp_path / "w")
    path = tmp_path / "w" / file
    read = read_text if file.endswith("json") else read_tensors
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for check in (lambda: read(tmp_path / "w", card, file), lambda: check_folder(tmp_path / "w")):
        with pytest.raises(CheckpointError, match="differs from the card's sha256"):
            check()
    path.unlink()
    with pytest.raises(CheckpointError, match=f"has no {file}"):
        read(tmp_path / "w", card, file)


def test_a_file_that_the_weights_came_without_is_told_as_that(tmp_path: Path):
    card = write_weights(tmp_path / "w", TENSORS, CARD)
    with pytest.raises(CheckpointError, match=r"came without heads\.safetensors"):
        read_tensors(tmp_path / "w", card, "heads.safetensors")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "a//x", ".x", "a\\x", "", "config.json", "README.md", "x\n"])
def test_no_file_is_written_outside_the_folder_or_over_another(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="cannot be named"):
        write_weights(tmp_path / "w", TENSORS, CARD, {name: HEADS})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extras", [{"../x": "0" * 64}, {"x": "short"}, {"x": 5}, ["x"], {"/etc/passwd": "0" * 64}])
def test_a_card_that_names_files_outside_its_folder_is_refused(tmp_path: Path, extras: Any):
    (tmp_path / "config.json").write_text(json.dumps(GOOD | {"extras": extras}))
    with pytest.raises(CheckpointError, match="is not a voxelstem card"):
        read_card(tmp_path)


def test_the_normaliser_is_kept_with_the_weights(tmp_path: Path):
    write_weights(tmp_path / "w", TENSORS, replace(CARD, spec=INPUT_SPECS["mri-fomo25"]))
    assert json.loads((tmp_path / "w" / "config.json").read_text())["spec"]["normalisation"] == "unit99"
    assert read_card(tmp_path / "w").spec == INPUT_SPECS["mri-fomo25"]


def test_a_card_from_before_origin_and_extras_is_read(tmp_path: Path):
    write_weights(tmp_path / "w", TENSORS, CARD)
    config = tmp_path / "w" / "config.json"
    old = json.loads(config.read_text())
    del old["origin"], old["extras"], old["spec"]["preset"], old["spec"]["resampling"], old["spec"]["normalisation"]
    config.write_text(json.dumps(old))
    card = read_card(tmp_path / "w")
    assert (card.origin, card.extras, card.spec) == ("", {}, SPEC)
    assert read_tensors(tmp_path / "w", card).keys() == TENSORS.keys()


# --------------------------------------------------------------------------------------------- the tensors


def test_tensors_that_share_memory_or_run_across_it_come_back_as_they_were(tmp_path: Path):
    whole = torch.arange(12.0)
    tensors = {"whole": whole, "part": whole[3:6], "turned": whole.view(3, 4).T, "same": whole, "none": torch.zeros(0)}
    card = write_weights(tmp_path / "w", tensors, CARD)
    back = read_tensors(tmp_path / "w", card)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    again = write_weights(tmp_path / "again", back, CARD)
    assert again.sha256 == card.sha256


def test_large_tensors_are_written_from_where_they_are(tmp_path: Path):
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from voxelstem.card import Card, write_weights; from voxelstem.study import InputSpec\n"
        "tensors = {str(i): torch.ones(1_500_000) for i in range(16)}\n"
        "card = Card(architecture={}, spec=InputSpec())\n"
        "write_weights(Path(sys.argv[1], 'small'), {'0': tensors['0'][:9]}, card)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "write_weights(Path(sys.argv[1], 'w'), tensors, card)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 24_000  # KiB; the tensors are 94,000
    assert (tmp_path / "w" / "model.safetensors").stat().st_size > 96_000_000


@pytest.mark.parametrize("left", [3, 40, -100, -1])
def test_a_file_that_was_cut_short_is_told_as_that(tmp_path: Path, left: int):
    card = write_weights(tmp_path / "w", TENSORS, CARD)
    path = tmp_path / "w" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:left])
    said = f"cut short: {len(data[:left])} of" if left != 3 else "differs from the card's sha256"
    with pytest.raises(CheckpointError, match=said):
        read_tensors(tmp_path / "w", card)
    if left == -1:
        with pytest.raises(CheckpointError, match=f"{len(data) - 1} of {len(data)} bytes"):
            check_folder(tmp_path / "w")


# --------------------------------------------------------------------------------- licence, origin, README


@pytest.mark.parametrize(
    "licence",
    [
        "cc-by-nc-sa-4.0",
        "CC BY-NC-SA 4.0",
        "CC BY NC 4.0",
        "CC-BY-NC-ND",
        "Non-Commercial use only",
        "noncommercial",
        "for non commercial research",
        "research only",
        "Academic licence",
        "not stated",
        "Not Stated",
        "",
        "unknown",
        "other",
    ],
)
def test_weights_that_are_not_for_commerce_are_refused_where_it_is_claimed(licence: str):
    with pytest.raises(ConfigError, match="cannot be used commercially") as error:
        check_commercial(replace(CARD, licence=licence, origin="lab/vit on the Hub"))
    assert "voxelstem models" in error.value.hint
    assert "lab/vit on the Hub" in error.value.hint


@pytest.mark.parametrize(
    "licence", ["apache-2.0", "MIT", "mit", "cc-by-4.0", "CC BY-SA 4.0", "bsd-3-clause", "NCSA", "ncsa"]
)
def test_free_licences_pass(licence: str):
    assert against_commerce(licence) == ""
    check_commercial(replace(CARD, licence=licence))


def test_the_readme_names_licence_origin_preset_and_intended_use(tmp_path: Path):
    spec = replace(SPEC, preset="ct-odd")
    card = replace(CARD, licence="cc-by-nc-sa-4.0", origin="lab/vit on the Hub", spec=spec)
    write_weights(tmp_path / "w", TENSORS, card, {"heads.safetensors": HEADS})
    readme = (tmp_path / "w" / "README.md").read_text()
    assert "license: cc-by-nc-sa-4.0\n" in readme
    for fact in ["cc-by-nc-sa-4.0. Not for commercial use.", "Origin: lab/vit", "preset `ct-odd`", "## Intended use"]:
        assert fact in readme
    assert "`heads.safetensors`: sha256 `" in readme
    native = replace(CARD, spec=replace(SPEC, resampling="native"))
    write_weights(tmp_path / "n", TENSORS, native)
    assert "fed at its own spacing" in (tmp_path / "n" / "README.md").read_text()
    write_weights(tmp_path / "f", TENSORS, replace(CARD, spec=replace(SPEC, resampling="fit")))
    assert "fits one block" in (tmp_path / "f" / "README.md").read_text()
    assert read_card(tmp_path / "f").spec.resampling == "fit"


@pytest.mark.parametrize("licence", ["MIT\ninjected: yes", "a: b", "[x", "GPL 3 # or later"])
def test_an_odd_licence_cannot_break_the_readme_s_head(tmp_path: Path, licence: str):
    write_weights(tmp_path / "w", TENSORS, replace(CARD, licence=licence))
    head = (tmp_path / "w" / "README.md").read_text().split("---")[1].strip().splitlines()
    assert head == ["library_name: voxelstem", f"license: {json.dumps(licence)}"]


def test_linked_files_are_the_files_themselves_also_where_a_link_leads_to_them(tmp_path: Path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "source/text").mkdir(parents=True)
    (tmp_path / "cache/blob").write_bytes(b"tensors")
    (tmp_path / "source/model.safetensors").symlink_to("../cache/blob")
    (tmp_path / "source/text/config.json").write_text("{}")
    link_files(tmp_path / "source", ["model.safetensors", "text/config.json"], tmp_path / "run")
    assert not (tmp_path / "run/model.safetensors").is_symlink()
    assert (tmp_path / "run/model.safetensors").samefile(tmp_path / "cache/blob")
    assert (tmp_path / "run/text/config.json").samefile(tmp_path / "source/text/config.json")
    with pytest.raises(FileNotFoundError):
        link_files(tmp_path / "source", ["absent"], tmp_path / "run")
