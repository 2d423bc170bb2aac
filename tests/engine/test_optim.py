from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from voxelstem import schedules
from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.heads import ProjectorConfig
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.engine.checkpoint import Checkpoints, resume
from voxelstem.engine.optim import OptimConfig, make_optimizer, set_rate
from voxelstem.objectives.dino import Dino, DinoConfig

CONFIG = OptimConfig(lr=0.01, end_lr=0.001, warm_up=0.2, weight_decay=0.05, layer_decay=0.5)


def group_of(objective, optimizer):
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    return {names[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}


def grouped(objective, config=CONFIG):
    return group_of(objective, make_optimizer(objective, objective.learner.param_groups(), config))


@pytest.fixture
def dino() -> Dino:
    size = EncoderConfig(dim=12, depth=2, heads=2, registers=1)
    backbone = ScanVit(ScanVitConfig(block_ijk=(8, 8, 8), block=size, scan=EncoderConfig(depth=0)))
    return Dino(DinoConfig(projector=ProjectorConfig(hidden=8, bottleneck=4, prototypes=6)), backbone)


def test_every_trainable_parameter_stands_in_one_group(make):
    objective = make.objective()
    objective.decoder.answer.requires_grad_(False)
    optimizer = make_optimizer(objective, objective.learner.param_groups(), CONFIG)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    wanted = [id(parameter) for parameter in objective.parameters() if parameter.requires_grad]
    assert sorted(held) == sorted(wanted)


def test_each_layer_further_from_the_output_learns_that_much_slower(make):
    group = grouped(make.objective())
    # Patch embedding 0, the one block 1; the scan level 2 and the objective's own parts are the output.
    assert group["backbone.embed.weight"]["lr_scale"] == pytest.approx(0.5**2)
    assert group["backbone.block_encoder.blocks.0.fc1.weight"]["lr_scale"] == pytest.approx(0.5)
    assert group["backbone.scan_encoder.blocks.0.fc1.weight"]["lr_scale"] == 1.0
    assert group["decoder.answer.weight"]["lr_scale"] == 1.0


def test_layers_learn_as_in_spectre_s_script(dino: Dino):
    """Its rule: 0.9^(L + 1 - id), id 0 for embedding and tokens, the embedding times 0.2, norm and heads 1."""
    group = grouped(dino, OptimConfig(layer_decay=0.9, patch_embed_scale=0.2, decay_tokens=True))
    scale = {name: group[name]["lr_scale"] for name in group}
    backbone, depth = "student.backbone.", 2
    lowest = pytest.approx(0.9 ** (depth + 1))
    assert scale[backbone + "block_encoder.prefix"] == scale[backbone + "mask_token"] == lowest
    lowest = pytest.approx(0.2 * 0.9 ** (depth + 1))
    assert scale[backbone + "embed.weight"] == scale[backbone + "embed.bias"] == lowest
    for index in range(depth):
        name = f"{backbone}block_encoder.blocks.{index}.fc1.weight"
        assert scale[name] == pytest.approx(0.9 ** (depth + 1 - (index + 1)))
    assert scale[backbone + "block_encoder.norm.weight"] == 1.0
    assert scale["student.cls_head.mlp.0.weight"] == scale["student.cls_head.prototypes"] == 1.0


@pytest.mark.parametrize("decay_tokens", [False, True])
def test_matrices_decay_vectors_do_not_and_tokens_as_the_config_says(dino: Dino, decay_tokens: bool):
    group = grouped(dino, OptimConfig(weight_decay=0.05, decay_tokens=decay_tokens))
    tokens = {"student.backbone.mask_token", "student.backbone.block_encoder.prefix"}
    assert tokens < group.keys()
    for name, entry in group.items():
        decays = decay_tokens if name in tokens else dino.get_parameter(name).ndim > 1
        assert entry["weight_decay"] == (0.05 if decays else 0.0), name


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


@pytest.mark.parametrize(
    ("scaling", "batch", "factor"),
    [("none", 1536, 1.0), ("sqrt", 1536, math.sqrt(1.5)), ("linear", 1536, 1.5), ("sqrt", 1024, 1.0)],
)
def test_the_rate_follows_the_batch(make, scaling, batch: int, factor: float):
    objective = make.objective()
    config = OptimConfig(lr=0.004, end_lr=1e-6, warm_up=0.1, lr_scaling=scaling)
    optimizer = make_optimizer(objective, objective.learner.param_groups(), config)
    assert set_rate(optimizer, config, progress=0.1, batch=batch) == pytest.approx(0.004 * factor)
    # Only the peak follows: the end is what the recipe says.
    assert set_rate(optimizer, config, progress=1.0, batch=batch) == pytest.approx(1e-6)


def test_weight_decay_grows_along_a_cosine_where_something_decays(make):
    objective = make.objective()
    config = OptimConfig(weight_decay=0.04, weight_decay_growth=10)
    optimizer = make_optimizer(objective, objective.learner.param_groups(), config)
    for progress in (0.0, 0.25, 0.5, 1.0):
        set_rate(optimizer, config, progress=progress)
        expected = 0.4 - 0.36 * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            assert group["weight_decay"] == pytest.approx(expected if group["decays"] else 0.0)
    assert any(group["weight_decay"] == pytest.approx(0.4) for group in optimizer.param_groups)


def test_each_group_gets_its_share_of_the_rate(make):
    objective = make.objective()
    optimizer = make_optimizer(objective, objective.learner.param_groups(), CONFIG)
    set_rate(optimizer, CONFIG, progress=0.2)
    assert all(group["lr"] == pytest.approx(0.01 * group["lr_scale"]) for group in optimizer.param_groups)


def step_with_ones(objective, optimizer):
    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        name: float((parameter.detach() - before[name]).abs().max()) for name, parameter in objective.named_parameters()
    }


def test_a_step_moves_far_layers_less(make):
    objective = make.objective()
    optimizer = make_optimizer(objective, objective.learner.param_groups(), CONFIG)
    set_rate(optimizer, CONFIG, progress=0.2)
    moved = step_with_ones(objective, optimizer)
    # Adam's first step is the rate itself where nothing decays.
    assert moved["decoder.mask_token"] == pytest.approx(0.01, rel=1e-3)
    assert moved["backbone.embed.bias"] == pytest.approx(0.01 / 4, rel=1e-3)


def test_prototypes_stay_as_drawn_over_their_share_of_the_run_and_learn_after_it(dino: Dino):
    config = OptimConfig(frozen_prototypes=0.5, warm_up=0.1)
    optimizer = make_optimizer(dino, dino.learner.param_groups(), config)
    set_rate(optimizer, config, progress=0.4)
    moved = step_with_ones(dino, optimizer)
    assert moved["student.cls_head.prototypes"] == moved["student.patch_head.prototypes"] == 0.0
    assert moved["student.cls_head.mlp.0.weight"] > 0
    set_rate(optimizer, config, progress=0.5)
    assert step_with_ones(dino, optimizer)["student.cls_head.prototypes"] > 0


def train(objective, batches, config: OptimConfig):
    optimizer = make_optimizer(objective, objective.learner.param_groups(), config)
    for step, batch in enumerate(batches):
        set_rate(optimizer, config, progress=(step + 1) / 5)
        objective.step(batch, progress=0.0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return objective.state_dict()


def test_fused_and_plain_differ_by_rounding_alone_and_fused_repeats_exactly(make):
    objective = make.objective()
    batches = [make.batch(step) for step in range(4)]
    settings = {"weight_decay": 0.3, "weight_decay_growth": 2.0, "layer_decay": 0.9}
    fused = train(copy.deepcopy(objective), batches, OptimConfig(fused=True, **settings))
    again = train(copy.deepcopy(objective), batches, OptimConfig(fused=True, **settings))
    plain = train(copy.deepcopy(objective), batches, OptimConfig(fused=False, **settings))
    for name, value in plain.items():
        assert torch.equal(fused[name], again[name]), name
        assert (fused[name] - value).abs().max() <= 1e-6, name


def naive_adamw(weights, gradients, config: OptimConfig, *, steps: int):
    """The paper's algorithm, one number at a time (Loshchilov and Hutter 2017, algorithm 2)."""
    first, second = [0.0] * len(weights), [0.0] * len(weights)
    for step in range(1, steps + 1):
        progress = step / 10
        rate = schedules.warm_up_cosine(progress, warm_up=config.warm_up, peak=config.lr, end=config.end_lr)
        decay = schedules.cosine(
            progress, start=config.weight_decay, end=config.weight_decay * config.weight_decay_growth
        )
        for i, gradient in enumerate(gradients):
            first[i] = config.betas[0] * first[i] + (1 - config.betas[0]) * gradient
            second[i] = config.betas[1] * second[i] + (1 - config.betas[1]) * gradient**2
            mean = first[i] / (1 - config.betas[0] ** step)
            spread = second[i] / (1 - config.betas[1] ** step)
            weights[i] = weights[i] * (1 - rate * decay) - rate * mean / (math.sqrt(spread) + 1e-8)
    return weights


@pytest.mark.parametrize("fused", [False, True])
def test_steps_follow_the_paper_s_algorithm(fused: bool):
    config = OptimConfig(lr=0.1, warm_up=0.2, weight_decay=0.1, weight_decay_growth=4.0, fused=fused)
    layer = torch.nn.Linear(3, 1, bias=False)
    weights, gradients = [0.5, -1.0, 2.0], [0.3, -0.2, 1e-3]
    layer.weight.data = torch.tensor([weights])
    optimizer = make_optimizer(layer, [(0, list(layer.named_parameters()))], config)
    for step in range(1, 8):
        set_rate(optimizer, config, progress=step / 10)
        layer.weight.grad = torch.tensor([gradients])
        optimizer.step()
    expected = naive_adamw(list(weights), gradients, config, steps=7)
    assert layer.weight.tolist()[0] == pytest.approx(expected, abs=1e-5)


def naive_sgd(weights, gradients, config: OptimConfig, *, steps: int):
    """Nesterov's momentum as nnU-Net runs it: the decay is part of the gradient."""
    speed = [0.0] * len(weights)
    for step in range(steps):
        rate = config.lr * (1 - step / 10) ** 0.9
        for i, gradient in enumerate(gradients):
            slope = gradient + config.weight_decay * weights[i]
            speed[i] = config.momentum * speed[i] + slope
            weights[i] -= rate * (slope + config.momentum * speed[i])
    return weights


SGD = OptimConfig(kind="sgd", lr=0.01, end_lr=0.0, warm_up=0.0, schedule="poly", weight_decay=3e-2, decay_vectors=True)


def sgd_steps(layer, optimizer, steps):
    for step in steps:
        set_rate(optimizer, SGD, progress=step / 10)
        layer.weight.grad = torch.tensor([[0.3, -0.2, 1e-3]]) * (1 + step % 3)
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_sgd_follows_nesterov_and_its_rate_falls_as_a_power(fused: bool):
    layer = torch.nn.Linear(3, 1, bias=False)
    weights, gradients = [0.5, -1.0, 2.0], [0.3, -0.2, 1e-3]
    layer.weight.data = torch.tensor([weights])
    optimizer = make_optimizer(layer, [(0, list(layer.named_parameters()))], replace(SGD, fused=fused))
    for step in range(7):
        assert set_rate(optimizer, SGD, progress=step / 10) == pytest.approx(0.01 * (1 - step / 10) ** 0.9)
        layer.weight.grad = torch.tensor([gradients])
        optimizer.step()
    assert layer.weight.tolist()[0] == pytest.approx(naive_sgd(list(weights), gradients, SGD, steps=7), abs=1e-6)


def test_sgd_goes_on_after_an_interruption_to_the_last_bit(tmp_path):
    def fresh():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 1, bias=False)
        return layer, make_optimizer(layer, [(0, list(layer.named_parameters()))], SGD)

    through, optimizer = fresh()
    sgd_steps(through, optimizer, range(8))
    before, optimizer = fresh()
    sgd_steps(before, optimizer, range(5))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, before, optimizer)
    after, optimizer = fresh()
    assert resume(tmp_path, after, optimizer).step == 5
    sgd_steps(after, optimizer, range(5, 8))
    assert torch.equal(after.weight, through.weight)


def test_vectors_decay_only_where_the_config_says_so(make):
    objective = make.objective()
    for says in (False, True):
        group = grouped(objective, OptimConfig(decay_vectors=says))
        assert group["backbone.embed.bias"]["decays"] is says
        assert group["backbone.embed.weight"]["decays"]


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_a_momentum_out_of_range_is_refused(momentum: float):
    with pytest.raises(ValueError, match="momentum lies in"):
        OptimConfig(momentum=momentum)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"end_lr": -1.0},
        {"warm_up": 1.0},
        {"layer_decay": 0.0},
        {"weight_decay": -0.1},
        {"weight_decay_growth": -1.0},
        {"clip_norm": 0.0},
        {"lr": float("inf")},
        {"lr_batch": 0},
        {"patch_embed_scale": 0.0},
        {"frozen_prototypes": 1.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="need"):
        OptimConfig(**wrong)


@pytest.mark.parametrize("betas", [(0.9, 1.5), (-0.1, 0.9), (1.0, 0.9)])
def test_betas_out_of_range_are_refused(betas: tuple[float, float]):
    with pytest.raises(ValueError, match="betas lie in"):
        OptimConfig(betas=betas)
