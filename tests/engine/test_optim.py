from __future__ import annotations

import pytest
import torch

from voxelstem.engine.optim import OptimConfig, make_optimizer, set_rate

CONFIG = OptimConfig(lr=0.01, end_lr=0.001, warm_up=0.2, weight_decay=0.05, layer_decay=0.5)


def groups_by_name(objective, optimizer):
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    return {names[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}


def test_every_trainable_parameter_stands_in_one_group(make):
    objective = make.objective()
    objective.predict.requires_grad_(False)
    optimizer = make_optimizer(objective, objective.learner.param_groups(), CONFIG)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    wanted = [id(parameter) for parameter in objective.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(wanted)


def test_each_layer_further_from_the_output_learns_that_much_slower(make):
    objective = make.objective()
    optimizer = make_optimizer(objective, objective.learner.param_groups(), CONFIG)
    group = groups_by_name(objective, optimizer)
    # Patch embedding 0, the one block 1, the scan level 2, so the objective's own parts are 3.
    assert group["backbone.embed.weight"]["lr_scale"] == pytest.approx(0.5**3)
    assert group["backbone.block_encoder.blocks.0.fc1.weight"]["lr_scale"] == pytest.approx(0.5**2)
    assert group["backbone.scan_encoder.blocks.0.fc1.weight"]["lr_scale"] == pytest.approx(0.5)
    assert group["predict.weight"]["lr_scale"] == 1.0


def test_matrices_decay_and_vectors_do_not(make):
    objective = make.objective()
    group = groups_by_name(objective, make_optimizer(objective, objective.learner.param_groups(), CONFIG))
    for name, parameter in objective.named_parameters():
        assert group[name]["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0), name
    assert group["backbone.block_encoder.norm.weight"]["weight_decay"] == 0.0
    assert group["mask_token"]["weight_decay"] == 0.0


def test_warm_up_rises_from_nothing_to_the_peak_and_the_end_is_the_end(make):
    objective = make.objective()
    optimizer = make_optimizer(objective, objective.learner.param_groups(), CONFIG)
    assert set_rate(optimizer, CONFIG, progress=0.0) == 0.0
    assert set_rate(optimizer, CONFIG, progress=0.1) == pytest.approx(0.005)
    assert set_rate(optimizer, CONFIG, progress=0.2) == pytest.approx(0.01)
    assert set_rate(optimizer, CONFIG, progress=0.6) == pytest.approx(0.0055)
    assert set_rate(optimizer, CONFIG, progress=1.0) == pytest.approx(0.001)
    rates = [set_rate(optimizer, CONFIG, progress=step / 100) for step in range(100)]
    assert max(rates) == pytest.approx(0.01)


def test_each_group_gets_its_share_of_the_rate(make):
    objective = make.objective()
    optimizer = make_optimizer(objective, objective.learner.param_groups(), CONFIG)
    set_rate(optimizer, CONFIG, progress=0.2)
    assert all(group["lr"] == pytest.approx(0.01 * group["lr_scale"]) for group in optimizer.param_groups)


def test_a_step_moves_far_layers_less(make):
    objective = make.objective()
    optimizer = make_optimizer(objective, objective.learner.param_groups(), CONFIG)
    set_rate(optimizer, CONFIG, progress=0.2)
    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    for parameter in objective.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {
        name: float((parameter.detach() - before[name]).abs().max()) for name, parameter in objective.named_parameters()
    }
    # Adam's first step is the rate itself where nothing decays.
    assert moved["mask_token"] == pytest.approx(0.01, rel=1e-3)
    assert moved["backbone.embed.bias"] == pytest.approx(0.01 / 8, rel=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"end_lr": -1.0},
        {"warm_up": 1.0},
        {"layer_decay": 0.0},
        {"weight_decay": -0.1},
        {"clip_norm": 0.0},
        {"lr": float("inf")},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="need"):
        OptimConfig(**wrong)


@pytest.mark.parametrize("betas", [(0.9, 1.5), (-0.1, 0.9), (1.0, 0.9)])
def test_betas_out_of_range_are_refused(betas: tuple[float, float]):
    with pytest.raises(ValueError, match="betas lie in"):
        OptimConfig(betas=betas)
