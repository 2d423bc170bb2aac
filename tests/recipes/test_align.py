from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from voxelstem.config import overlay, read_toml, to_toml
from voxelstem.engine.optim import make_optimizer
from voxelstem.engine.scans import choose
from voxelstem.errors import ConfigError
from voxelstem.pretrain import make_loader, make_objective
from voxelstem.recipes import align, named
from voxelstem.store import Store
from voxelstem.study import INPUT_SPECS
from voxelstem.views.report import SPECTRE

NAMES = ["ct.align", "ct.spectre_stage2", "tiny.align", "tiny.spectre_stage2"]


@pytest.mark.parametrize("name", NAMES)
def test_a_view_is_a_whole_scan_of_whole_blocks_with_one_report(name: str):
    recipe = named(name)
    assert recipe.recipe == name
    assert (recipe.views.global_.count, recipe.views.local.count) == (1, 0)
    assert all(
        size % block == 0 for size, block in zip(recipe.views.global_.size_ijk, recipe.spec.block_ijk, strict=True)
    )
    assert recipe.views.report is not None
    assert recipe.backbone.scan.depth > 0


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_the_report_and_the_tower_are_written_and_changed_like_any_other(name: str, tmp_path: Path):
    recipe = named(name)
    (tmp_path / "config.toml").write_text(to_toml(recipe), encoding="utf-8")
    assert overlay(recipe, read_toml(tmp_path / "config.toml")) == recipe
    changed = overlay(recipe, {"views.report.findings.drop_p": 0.5, "objective.text.max_tokens": 64})
    assert changed.views.report is not None
    assert changed.views.report.findings.drop_p == 0.5
    assert changed.objective.text.max_tokens == 64


def test_spectre_s_second_stage_has_the_released_settings():
    recipe = named("ct.spectre_stage2")
    assert recipe.spec == INPUT_SPECS["ct-stage2"]
    assert recipe.views.global_.size_ijk == (384, 384, 256)
    assert recipe.views.report is SPECTRE
    objective, optim = recipe.objective, recipe.optim
    assert (objective.hidden, objective.bottleneck, objective.out) == (2048, 256, 512)
    assert (objective.temperature_start, objective.bias_start, objective.form) == (2.3026, -10.0, "released")
    assert objective.text == align.QWEN
    assert (align.QWEN.rank, align.QWEN.alpha, align.QWEN.dropout, align.QWEN.pooling) == (16, 64.0, 0.05, "last")
    assert optim.peak(recipe.loader.batch) == pytest.approx(1e-3 * math.sqrt(144 / 1024))
    assert (optim.layer_decay, optim.weight_decay, optim.clip_norm, optim.patch_embed_scale) == (0.9, 0.01, 1.0, 0.2)
    assert (recipe.steps, recipe.loader.batch, objective.frozen_image) == (59_000, 144, 0.1)
    assert (recipe.backbone.scan.depth, recipe.backbone.scan.dim, recipe.backbone.scan.eps) == (4, 1080, 1e-6)


def test_the_tower_of_spectre_is_asked_for_by_its_folder():
    with torch.device("meta"), pytest.raises(ConfigError, match="Qwen3-Embedding"):
        make_objective(named("ct.spectre_stage2"))


def test_the_new_scan_level_learns_at_the_full_rate_and_the_blocks_below_it_slower():
    recipe = overlay(named("tiny.align"), {"optim.layer_decay": 0.5, "backbone.block.depth": 1})
    objective = make_objective(recipe)
    optimizer = make_optimizer(objective, objective.learner.param_groups(), recipe.optim)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: scales[id(p)] for name, p in objective.named_parameters() if p.requires_grad}
    assert {rate for name, rate in rates.items() if name.startswith(("backbone.scan_", "image_head", "text_head"))} == {
        1.0
    }
    assert max(rate for name, rate in rates.items() if "block_encoder.blocks.0" in name) < 1.0
    assert rates["backbone.embed.weight"] < rates["backbone.block_encoder.blocks.0.fc1.weight"]


@pytest.mark.parametrize("name", ["tiny.align", "tiny.spectre_stage2"])
def test_a_step_learns_from_scans_and_their_reports(name: str, phantoms: Store):
    config = overlay(named(name), {"loader.batch": 2})
    objective = make_objective(config)
    loader = make_loader(config, phantoms, choose(phantoms, config.spec, config.views).scans)
    batch = loader.batch(0)
    assert all("lung" in text.lower() or "lesion" in text.lower() or "spleen" in text.lower() for text in batch.texts)
    objective.step(batch, progress=0.5).loss.backward()
    learned = [name for name, parameter in objective.named_parameters() if parameter.grad is not None]
    assert {name.partition(".")[0] for name in learned} >= {
        "backbone",
        "image_head",
        "text_head",
        "temperature",
        "bias",
    }
    assert any(name.startswith("backbone.block_encoder") for name in learned)
