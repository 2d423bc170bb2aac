"""Files made here stand for the released one: same names, fewer features."""

from __future__ import annotations

import argparse
import functools
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from voxelstem import model
from voxelstem.backbones.disentangled import Disentangled, DisentangledConfig
from voxelstem.card import against_commerce, check_folder, read_tensors
from voxelstem.errors import CheckpointError
from voxelstem.study import INPUT_SPECS
from voxelstem.weights.fomo25 import import_fomo25, their_name, to_ours

WIDTHS = (2, 4, 8, 16, 32)
LATENT = 3
HEADS = ("mu_shared", "logvar_shared", "mu_modality", "logvar_modality")


@functools.cache
def theirs() -> dict[str, Tensor]:
    """The 74 tensors as their code names them, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.3
        bias = shape[1] if "upsample" in name else shape[0]
        state[f"{name}.bias"] = torch.randn(bias, generator=generator) * 0.1

    def convolution(name: str, inputs: int, width: int) -> None:
        put(f"{name}.conv", width, inputs, 3, 3, 3)
        put(f"{name}.norm", width)

    before = 1
    for level, width in enumerate(WIDTHS):
        place = f"encoder.encoder_conv{level}" if level else "encoder.in_conv"
        convolution(f"{place}.conv1", before, width)
        convolution(f"{place}.conv2", width, width)
        before = width
    before = 2 * LATENT
    for number, width in enumerate(WIDTHS[-2::-1], start=1):
        put(f"decoder.upsample{number}", before, width, 2, 2, 2)
        convolution(f"decoder.decoder_conv{number}.conv1", width, width)
        before = width
    put("decoder.out_conv", 1, WIDTHS[0], 1, 1, 1)
    for head in HEADS:
        put(f"conv_{head}", LATENT, sum(WIDTHS), 1, 1, 1)
    return state


def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subject, contrast and reconstruction by plain arithmetic on their tensors, in double precision."""
    weights = {name: tensor.double() for name, tensor in theirs().items()}

    def convolved(x: Tensor, name: str) -> Tensor:
        x = F.conv3d(x, weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"], padding=1)
        x = F.instance_norm(x, weight=weights[f"{name}.norm.weight"], bias=weights[f"{name}.norm.bias"])
        return F.leaky_relu(x, 0.01)

    x = x.double()
    maps: list[Tensor] = []
    for level in range(len(WIDTHS)):
        place = f"encoder.encoder_conv{level}" if level else "encoder.in_conv"
        x = F.max_pool3d(x, 2) if level else x
        x = convolved(convolved(x, f"{place}.conv1"), f"{place}.conv2")
        maps.append(x)
    pooled = torch.cat([F.adaptive_avg_pool3d(each, x.shape[2:]) for each in maps], dim=1)
    subject, contrast = (
        F.conv3d(pooled, weights[f"conv_mu_{kind}.weight"], weights[f"conv_mu_{kind}.bias"])
        for kind in ("shared", "modality")
    )
    x = torch.cat((subject, contrast), dim=1)
    for number in range(1, len(WIDTHS)):
        up = f"decoder.upsample{number}"
        x = F.conv_transpose3d(x, weights[f"{up}.weight"], weights[f"{up}.bias"], stride=2)
        x = convolved(x, f"decoder.decoder_conv{number}.conv1")
    return subject, contrast, F.conv3d(x, weights["decoder.out_conv.weight"], weights["decoder.out_conv.bias"])


def lightning(path: Path, prefix: str = "model.", state: dict[str, Tensor] | None = None, **entries: Any) -> Path:
    """A file as Lightning writes it."""
    content = {
        "epoch": 99,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {prefix + name: tensor for name, tensor in (state or theirs()).items()},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}],
        "hyper_parameters": {"config": {"patch_size": (64, 64, 64), "model_name": "mmunetvae"}},
    }
    torch.save(content | entries, path)
    return path


def refused(path: Path, tmp_path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_fomo25(path, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    assert str(tmp_path) not in str(caught.value)
    return str(caught.value)


def test_the_released_size_has_74_tensors_and_its_number_of_parameters():
    with torch.device("meta"):
        network = Disentangled(DisentangledConfig())
    shapes = {their_name(name): tensor.shape for name, tensor in network.state_dict().items()}
    numbers = {
        part: sum(shape.numel() for name, shape in shapes.items() if name.startswith(part))
        for part in ("encoder.", "decoder.", "conv_")
    }
    assert len(shapes) == 74
    assert numbers == {"encoder.": 14_134_944, "decoder.": 3_744_673, "conv_": 1_016_832}


def test_imported_weights_compute_what_their_own_arithmetic_gives(tmp_path: Path):
    assert len(theirs()) == 74
    import_fomo25(lightning(tmp_path / "fomo.ckpt"), tmp_path / "out")
    network = model.load(tmp_path / "out").backbone
    x = torch.rand(1, 1, 64, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        latents = network.latents(x)
        found = latents.subject_mean, latents.contrast_mean
        painted = network.reconstruct(*found)
    for ours, wanted in zip((*found, painted), forward(x), strict=True):
        assert float((ours - wanted).abs().max() / wanted.abs().max()) <= 1e-4


@pytest.mark.parametrize(
    "prefix", ["", "model.", "_orig_mod.", "model._orig_mod.", "_orig_mod.model.", "module.model."]
)
def test_whatever_wraps_every_name_is_taken_off_and_bits_stay(prefix: str, tmp_path: Path):
    card = import_fomo25(lightning(tmp_path / "fomo.ckpt", prefix), tmp_path / "out")
    ours = read_tensors(tmp_path / "out", card)
    assert len(ours) == 74
    assert all(torch.equal(tensor, theirs()[their_name(name)]) for name, tensor in ours.items())


def test_the_card_binds_the_weights_to_their_own_normaliser_and_forbids_commerce(tmp_path: Path):
    card = import_fomo25(lightning(tmp_path / "fomo.ckpt"), tmp_path / "out")
    assert card.spec == INPUT_SPECS["mri-fomo25"]
    assert card.spec.normalisation == "unit99"
    assert against_commerce(card.licence)
    assert any("2601.13166" in note for note in card.notes)
    assert check_folder(tmp_path / "out") == card


def test_settings_kept_as_python_objects_are_left_unread_and_named(tmp_path: Path):
    settings = argparse.Namespace(patch=64, optimiser=functools.partial(math.hypot, 1), where=Path("/somewhere"))
    path = lightning(tmp_path / "fomo.ckpt", hyper_parameters={"config": settings})
    with pytest.raises(Exception, match=r"argparse.Namespace|functools.partial|pathlib"):
        torch.load(path, weights_only=True)
    card = import_fomo25(path, tmp_path / "out")
    (note,) = [note for note in card.notes if "left unread" in note]
    assert "argparse.Namespace" in note
    assert "pathlib" in note
    assert "somewhere" not in note


class Planted:
    """Asks the unpickler to run a program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch planted",)


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    said = refused(lightning(tmp_path / "fomo.ckpt", hyper_parameters={"x": Planted()}), tmp_path)
    assert "posix.system" in said
    assert not (tmp_path / "planted").exists()


def test_missing_unknown_and_misshapen_tensors_are_named_at_once(tmp_path: Path):
    state = {name: x for name, x in theirs().items() if name != "decoder.out_conv.bias"}
    state |= {"seg_head.weight": torch.zeros(2), "conv_mu_modality.bias": torch.zeros(7)}
    said = refused(lightning(tmp_path / "fomo.ckpt", state=state), tmp_path)
    for word in ("decoder.out_conv.bias", "seg_head.weight", "conv_mu_modality.bias (7,) instead of (3,)"):
        assert word in said


def test_another_network_is_refused(tmp_path: Path):
    assert "not those of FOMO25" in refused(lightning(tmp_path / "a.ckpt", state={"w.weight": torch.ones(3)}), tmp_path)
    no_levels = {name: x for name, x in theirs().items() if "encoder_conv" not in name}
    assert "no network that can be" in refused(lightning(tmp_path / "b.ckpt", state=no_levels), tmp_path)
    tall = theirs() | {f"encoder.encoder_conv{n}.conv1.conv.weight": torch.ones(1) for n in range(5, 99)}
    assert "no network that can be" in refused(lightning(tmp_path / "c.ckpt", state=tall), tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path):
    state = theirs() | {"conv_mu_shared.bias": torch.full((LATENT,), float("inf"))}
    assert "subject_mean.bias" in refused(lightning(tmp_path / "fomo.ckpt", state=state), tmp_path)


def test_without_variances_the_latents_are_their_means(tmp_path: Path):
    state = {name: x for name, x in theirs().items() if "logvar" not in name}
    import_fomo25(lightning(tmp_path / "fomo.ckpt", state=state), tmp_path / "out")
    network = model.load(tmp_path / "out").backbone
    assert network.config.vae is False
    assert network.latents(torch.zeros(1, 1, 16, 16, 16)).subject_logvar is None


def test_names_map_one_to_one():
    config = DisentangledConfig(width=2, latent=LATENT)
    ours = to_ours(theirs(), config)
    assert sorted(their_name(name) for name in ours) == sorted(theirs())
    with pytest.raises(ValueError, match="no tensor"):
        their_name("encoder.stem.weight")
