from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from voxelstem.errors import AuditError
from voxelstem.finetune import loop
from voxelstem.finetune.cases import Case, Seen
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.loop import cut, fit, in_turns, loss_of, turns_of
from voxelstem.finetune.network import Tuned, build
from voxelstem.model import Model

CONFIG = FinetuneConfig(steps=3, batch=2, patch_ijk=(8, 8, 8), jitter=0.0)


def case(*, target: float = 0, marked: int | None = 0, shape: tuple[int, int, int] = (16, 12, 10)) -> Case:
    """A scan whose voxels are their own flat index; one voxel of it is labelled, or it is labelled as a whole."""
    image = torch.arange(float(np.prod(shape))).view(1, *shape)
    seen = Seen(image=image, affine_ras=np.eye(4), shape_ijk=shape)
    if marked is None:
        return Case(seen=seen, target=target)
    truth = torch.zeros(shape, dtype=torch.int64)
    truth.view(-1)[marked] = 1
    return Case(seen=seen, truth=truth, marked=(np.array([marked]),))


def network(model: Model, *, voxels: bool) -> Tuned:
    return build(model, out=2, config=CONFIG, voxels=voxels, seed=0)[0]


@pytest.mark.parametrize("marked", [0, 777, 16 * 12 * 10 - 1])
def test_a_patch_about_a_labelled_voxel_holds_it_wherever_it_lies(unet: Model, marked: int) -> None:
    net, rng = network(unet, voxels=True), np.random.default_rng(0)
    corners: set[float] = set()
    for _ in range(20):
        image, truth = cut(case(marked=marked), replace(CONFIG, foreground=1.0), net, rng)
        assert image.shape == (1, 8, 8, 8)
        assert truth.sum() == 1
        assert image[0][truth == 1] == marked
        corners.add(float(image[0, 0, 0, 0]))
    assert len(corners) > 1 or marked != 777


def test_patches_without_a_wish_lie_anywhere(unet: Model) -> None:
    net, rng = network(unet, voxels=True), np.random.default_rng(0)
    drawn = [cut(case(), replace(CONFIG, foreground=0.0), net, rng)[0] for _ in range(80)]
    assert len({float(image[0, 0, 0, 0]) for image in drawn}) > 40


def test_image_and_truth_are_mirrored_together(unet: Model) -> None:
    net, rng = network(unet, voxels=True), np.random.default_rng(0)
    config = replace(CONFIG, foreground=1.0, mirror=(0, 1, 2))
    for _ in range(12):
        image, truth = cut(case(marked=777), config, net, rng)
        assert image[0][truth == 1] == 777


def test_classes_of_scans_are_drawn_equally_often_and_numbers_as_they_come() -> None:
    few = [case(target=0, marked=None)] * 9 + [case(target=1, marked=None)]

    def share(cases: list[Case]) -> float:
        rng = np.random.default_rng(0)
        return float(np.mean([float(one.target) for one in in_turns(cases)(400, rng)]))

    assert 0.4 < share(few) < 0.6
    assert share([replace(one, target=float(one.target)) for one in few]) < 0.2
    assert len(turns_of([case(marked=3), case(marked=9)])) == 1


def test_the_same_seed_trains_the_same_network(unet: Model) -> None:
    tuned = [network(unet, voxels=False) for _ in range(3)]
    cases = [case(target=index % 2, marked=None) for index in range(4)]
    for net, seed in zip(tuned, (1, 1, 2), strict=True):
        fit(net, cases, CONFIG, loss=loss_of("classify", CONFIG), seed=seed)
    first, same, other = (net.state_dict() for net in tuned)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_frozen_encoder_stays_bit_for_bit_and_the_decoder_moves(unet: Model) -> None:
    net = network(unet, voxels=True)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    config = replace(CONFIG, schedule="frozen", weight_decay=0.1)
    fit(net, [case(marked=500)], config, loss=loss_of("segment", config), seed=0)
    moved = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith("backbone.decoder") for name in moved)


def test_every_step_is_reported_and_nothing_is_left_trainable(unet: Model) -> None:
    heard: list[float] = []
    net = network(unet, voxels=True)
    fit(
        net,
        [case(marked=500)],
        replace(CONFIG, optimiser="sgd"),
        loss=loss_of("segment", CONFIG),
        seed=0,
        report=heard.append,
    )
    assert len(heard) == 3
    assert all(np.isfinite(heard))
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_numbers_are_compared_by_huber() -> None:
    loss = loss_of("regress", CONFIG)(torch.tensor([[0.5], [3.0]]), torch.tensor([0.0, 0.0]))
    assert loss.item() == pytest.approx((0.5 * 0.25 + 2.5) / 2)


def test_layers_farther_from_the_answer_learn_slower_by_the_decay_of_each(unet: Model) -> None:
    config = replace(CONFIG, layer_decay=0.5)
    net = network(unet, voxels=True)
    groups = loop._solver(net, config).param_groups  # pyright: ignore[reportPrivateUsage]
    assert groups[-1]["pace"] == 1.0
    paces = {id(parameter): group["pace"] for group in groups for parameter in group["params"]}
    by_depth = {depth: [id(p) for _, p in named] for depth, named in net.backbone.param_groups()}
    last = max(by_depth)
    encoder, rest = net.groups()
    assert {id(p) for p in (*encoder, *rest)} == set(paces)
    for parameter in encoder:
        depth = next(depth for depth, ids in by_depth.items() if id(parameter) in ids)
        assert paces[id(parameter)] == 0.5 ** (last - depth)


def test_training_stops_and_goes_back_to_where_held_out_scans_were_told_best(unet: Model) -> None:
    config = replace(CONFIG, steps=60, looks=30, patience=2, lr=0.5)  # a rate that ruins whatever it finds
    net, asked = network(unet, voxels=True), []
    cases, held = [case(marked=777)], [case(marked=500)]
    watch = loop.Watch(net, held, config, loss_of("segment", config), 0)
    before = watch._ask()  # pyright: ignore[reportPrivateUsage]
    fit(net, cases, config, loss=loss_of("segment", config), seed=0, report=asked.append, held=held)
    assert len(asked) < 60
    after = loop.Watch(net, held, config, loss_of("segment", config), 0)._ask()  # pyright: ignore[reportPrivateUsage]
    again = network(unet, voxels=True)
    fit(again, cases, config, loss=loss_of("segment", config), seed=0)
    last = loop.Watch(again, held, config, loss_of("segment", config), 0)._ask()  # pyright: ignore[reportPrivateUsage]
    assert after <= last
    assert np.isfinite(before)


def test_without_held_out_scans_every_step_is_taken(unet: Model) -> None:
    asked: list[float] = []
    config = replace(CONFIG, steps=5, patience=1, looks=5)
    fit(network(unet, voxels=True), [case()], config, loss=loss_of("segment", config), seed=0, report=asked.append)
    assert len(asked) == 5


def test_training_that_diverges_says_so_instead_of_keeping_what_is_no_network(unet: Model) -> None:
    net, broken = network(unet, voxels=True), case(marked=777)
    broken.seen.image[0, 0, 0, 0] = torch.nan
    config = replace(CONFIG, patch_ijk=(16, 12, 10), steps=2)
    with pytest.raises(AuditError, match="diverged"):
        fit(net, [broken], config, loss=loss_of("segment", config), seed=0)
    watch = loop.Watch(network(unet, voxels=True), [case()], CONFIG, loss_of("segment", CONFIG), 0)
    with pytest.raises(AuditError, match="no look"):
        watch.take_best()
