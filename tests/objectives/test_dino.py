from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from voxelstem.backbones.heads import ProjectorConfig
from voxelstem.backbones.scan_vit import ScanVit
from voxelstem.losses.koleo import koleo
from voxelstem.losses.position import relative_position
from voxelstem.objectives.dino import Dino, DinoConfig, Projected
from voxelstem.protocols import Batch
from voxelstem.testing import check_objective
from voxelstem.views.crop import ViewKind
from voxelstem.views.mask import draw_ratios

K = 16


PROJECTOR = ProjectorConfig(hidden=24, bottleneck=8, prototypes=K)


def drawn(make: Any, **settings: Any) -> Dino:
    return Dino(DinoConfig(projector=PROJECTOR, **settings), make.backbone(scan_depth=0))


def dino(make: Any, **settings: Any) -> Dino:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return drawn(make, **settings)


def scalar(output: Any, name: str) -> float:
    return next(value for key, value in output.scalars.items() if key.split("/")[-1] == name)


def said(network: Projected, views: Any) -> Any:
    """Logits of (sample, view), each from its cls token."""
    return network.cls_head(network(views.flatten(0, 1))[0]).unflatten(0, views.shape[:2])


class Spy:
    """Remembers what the student's backbone was asked last about the global views, and what it answered."""

    def __init__(self, objective: Dino) -> None:
        self.learner = objective.learner

    def __enter__(self) -> Spy:
        encode_blocks = self.learner.encode_blocks

        def listen(blocks: Any, *, masked: Any, keep: Any, chance: Any) -> Any:
            answer = encode_blocks(blocks, masked=masked, keep=keep, chance=chance)
            if masked is not None:
                self.masked, self.answer = masked, answer
            return answer

        self.learner.encode_blocks = listen
        return self

    def __exit__(self, *error: object) -> None:
        del self.learner.encode_blocks


@pytest.fixture
def batch(make) -> Batch:
    return make.batch(samples=4, views=2)


def test_the_loss_falls_on_a_batch_that_repeats(make, batch: Batch):
    objective = dino(make, momentum_start=1.0, centre_momentum=1.0)
    optimizer = torch.optim.AdamW(objective.student.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        output = objective.step(batch, progress=0.0)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(progress=0.0)
        losses.append(float(output.loss.detach()))
    assert losses[-1] < losses[0] - 0.05


def test_the_order_of_the_samples_does_not_matter_where_nothing_is_masked(make, batch: Batch):
    turned = replace(batch, views={name: view.flip(0) for name, view in batch.views.items()})
    one, two = (dino(make, ibot_weight=0.0).step(b, progress=0.1).loss for b in (batch, turned))
    assert torch.allclose(one, two, atol=1e-5)


def test_swapping_the_two_global_views_does_not_matter_where_nothing_is_masked(make, batch: Batch):
    views = {"global": batch.views["global"].flip(1), "local": batch.views["local"]}
    one, two = (dino(make, ibot_weight=0.0).step(b, progress=0.1).loss for b in (batch, replace(batch, views=views)))
    assert torch.allclose(one, two, atol=1e-5)


def test_the_first_loss_is_that_of_a_naive_loop(make, batch: Batch):
    objective = dino(make, ibot_weight=0.0, koleo_weight=0.0)
    with torch.no_grad():
        student = {name: said(objective.student, view) for name, view in batch.views.items()}
        teacher = said(objective.teacher.network, batch.views["global"])
    temperature, terms = 0.04 + (0.07 - 0.04) * 0.1 / 0.3, []
    for sample in range(4):
        for other in range(2):
            target = (teacher[sample, other] / temperature).softmax(0)
            for name, view in [("global", 0), ("global", 1), ("local", 0), ("local", 1)]:
                if (name, view) != ("global", other):
                    guess = (student[name][sample, view] / 0.1).log_softmax(0)
                    terms.append(-float((target * guess).sum()))
    assert float(objective.step(batch, progress=0.1).loss.detach()) == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_no_gradient_reaches_the_teacher_and_every_part_of_the_student_gets_one(make, batch: Batch):
    objective = dino(make)
    objective.step(batch, progress=0.1).loss.backward()
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    idle = [name for name, parameter in objective.student.named_parameters() if parameter.grad is None]
    assert idle == []


def test_only_after_step_moves_the_teacher_and_towards_the_student(make, batch: Batch):
    objective = dino(make, momentum_start=0.9, momentum_end=1.0)
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.add_(1.0)
    before = [parameter.clone() for parameter in objective.teacher.parameters()]
    objective.step(batch, progress=0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, objective.teacher.parameters(), strict=True))
    objective.after_step(progress=0.0)
    for old, now in zip(before, objective.teacher.parameters(), strict=True):
        assert torch.allclose(now - old, torch.full_like(old, 0.1), atol=1e-5)
    still = [parameter.clone() for parameter in objective.teacher.parameters()]
    objective.after_step(progress=1.0)
    assert all(torch.equal(a, b) for a, b in zip(still, objective.teacher.parameters(), strict=True))


def test_the_centres_follow_the_mean_of_what_the_teacher_said_and_of_hidden_patches_only(make, batch: Batch):
    objective = dino(make, centre_momentum=0.75)
    assert objective.cls_centre.abs().sum() == 0
    with Spy(objective) as spy, torch.no_grad():
        network, views = objective.teacher.network, batch.views["global"].transpose(0, 1).flatten(0, 1)
        cls, patches = network(views)
        objective.step(batch, progress=0.0)
        assert objective.cls_centre.abs().sum() == 0  # a step that is left out must leave no trace
        objective.after_step(progress=0.0)
        expected = [0.25 * network.cls_head(cls).mean(0), 0.25 * network.patch_logits(patches[spy.masked]).mean(0)]
    assert 0 < int(spy.masked.sum()) < spy.masked.numel() / 2
    torch.testing.assert_close(objective.cls_centre, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(objective.patch_centre, expected[1], atol=1e-5, rtol=0)
    assert {"cls_centre", "patch_centre"} <= objective.state_dict().keys()


def test_the_centres_of_micro_batches_are_those_of_the_batch(make, batch: Batch):
    whole, parts = dino(make), dino(make)
    whole.step(batch, progress=0.0)
    for part in (batch.part(0, 2), batch.part(2, 4), batch.part(0, 2)):  # the first is tried once more
        parts.step(part, progress=0.0)
    for objective in (whole, parts):
        objective.after_step(progress=0.0)
    torch.testing.assert_close(parts.cls_centre, whole.cls_centre)
    torch.testing.assert_close(parts.patch_centre, whole.patch_centre)


def test_a_step_that_was_left_out_does_not_move_the_centres(make, batch: Batch):
    once, twice = dino(make), dino(make)
    twice.step(replace(batch, seed=5), progress=0.0)
    for objective in (once, twice):
        objective.step(batch, progress=0.0)
        objective.after_step(progress=0.0)
    assert torch.equal(once.cls_centre, twice.cls_centre)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 100.0])
def test_the_teacher_s_entropy_lies_between_nothing_and_that_of_an_even_spread(make, batch: Batch, temperature: float):
    output = dino(make, teacher_temperature_start=temperature, teacher_temperature_end=temperature).step(
        batch, progress=0.5
    )
    entropy = scalar(output, "teacher_entropy")
    assert 0 <= entropy <= math.log(K) + 1e-4
    if temperature == 100.0:
        assert entropy == pytest.approx(math.log(K), abs=1e-3)


def test_masks_follow_the_seed_of_the_batch(make, batch: Batch):
    same, other = dino(make).step(batch, progress=0.1), dino(make).step(replace(batch, seed=99), progress=0.1)
    assert scalar(same, "ibot") != scalar(other, "ibot")


def test_the_loss_is_the_weighted_sum_of_its_terms(make, batch: Batch):
    output = dino(make, ibot_weight=2.0, koleo_weight=0.5).step(batch, progress=0.1)
    total = scalar(output, "dino") + 2.0 * scalar(output, "ibot") + 0.5 * scalar(output, "koleo")
    assert float(output.loss.detach()) == pytest.approx(total, rel=1e-5)


def test_it_works_without_local_views(make, batch: Batch):
    only = replace(batch, views={"global": batch.views["global"]})
    assert dino(make).step(only, progress=0.1).loss.isfinite()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"koleo_weight": -1.0}, "koleo_weight must be >= 0"),
        ({"gram_weight": math.inf}, "gram_weight must be >= 0"),
        ({"position_weight": math.nan}, "position_weight must be >= 0"),
        ({"teacher_temperature_end": 0.0}, "temperatures"),
        ({"masked_views": 0.0}, "masked_views"),
        ({"gram_refresh": 0.0}, "gram_refresh"),
        ({"mask_ratios": (0.5, 0.2)}, "mask_ratios"),
        ({"mask_ratios": (0.0, 0.2)}, "mask_ratios"),
        ({"momentum_start": -0.1}, "momentum_start"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        DinoConfig(**wrong)


def view(count: int, edge: int = 8) -> ViewKind:
    return ViewKind(count=count, size_ijk=(edge, edge, edge))


@pytest.mark.parametrize(
    ("global_", "local", "batch", "said"),
    [
        (view(1), view(0), 2, "two views or more"),
        (view(2, 6), view(0), 2, r"views\.global_\.size_ijk must be a multiple"),
        (view(2), view(1, 6), 2, r"views\.local\.size_ijk must be a multiple"),
        (view(2), view(0), 1, r"loader\.batch >= 2"),
    ],
)
def test_views_without_pairs_patches_or_neighbours_are_refused(
    make, global_: ViewKind, local: ViewKind, batch: int, said: str
):
    with pytest.raises(ValueError, match=said):
        DinoConfig().check(global_, local, batch=batch, backbone=make.backbone().config)


@pytest.mark.parametrize(("global_", "local"), [(view(2), view(0, 3)), (view(1), view(1, 4))])
def test_two_views_of_any_kind_are_a_pair(make, global_: ViewKind, local: ViewKind):
    DinoConfig().check(global_, local, batch=2, backbone=make.backbone().config)
    DinoConfig(koleo_weight=0.0).check(global_, local, batch=1, backbone=make.backbone().config)


def test_spreading_out_the_local_views_needs_some(make):
    config = DinoConfig(koleo_on="local_logits")
    with pytest.raises(ValueError, match="local_logits needs"):
        config.check(view(2), view(0), batch=2, backbone=make.backbone().config)
    config.check(view(2), view(1, 4), batch=2, backbone=make.backbone().config)


EVERYTHING = {"gram_weight": 1.0, "gram_from": 0.0, "position_weight": 1.0}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"centring": "sinkhorn"},
        {"separate_heads": False},
        {"ibot_weight": 0.0, "koleo_weight": 0.0},
        {"koleo_on": "local_logits"},
        EVERYTHING,
    ],
)
def test_every_member_of_the_family_keeps_the_contract(make, settings: dict[str, Any]):
    check_objective(lambda: drawn(make, **settings), size_ijk=(8, 8, 8))


def test_with_every_setting_no_parameter_of_the_student_is_idle(make, batch: Batch):
    for settings in (EVERYTHING, {"separate_heads": False}, {"centring": "sinkhorn"}):
        objective = dino(make, **settings)
        objective.after_step(progress=0.0)
        objective.step(batch, progress=0.1).loss.backward()
        names = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
        idle = {name for name in names if objective.get_parameter(name).grad is None}
        assert idle == set()


def test_ibot_is_that_of_a_naive_loop_over_hidden_patches(make, batch: Batch):
    objective = dino(make)
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    views = batch.views["global"].transpose(0, 1).flatten(0, 1)
    with Spy(objective) as spy, torch.no_grad():
        found = scalar(objective.step(batch, progress=0.0), "ibot")
        student = objective.student.patch_logits(spy.answer[1])
        teacher = objective.teacher.network.patch_logits(objective.teacher.network(views)[1])
    rows = []
    for row, masked in enumerate(spy.masked):
        terms = [
            -float(((teacher[row, at] / 0.04).softmax(0) * (student[row, at] / 0.1).log_softmax(0)).sum())
            for at in masked.nonzero()[:, 0].tolist()
        ]
        rows.append(sum(terms) / len(terms) if terms else 0.0)
    assert rows.count(0.0) == 4  # half of the 8 views
    assert found == pytest.approx(sum(rows) / 8, rel=1e-4)


def test_every_view_hides_exactly_what_was_drawn_for_it(make):
    objective, batch = dino(make, mask_ratios=(0.25, 0.75)), make.batch(16, samples=8, views=2)
    with Spy(objective) as spy:
        objective.step(batch, progress=0.0)
    wanted = 64 * draw_ratios(batch.seed, (2, 8), share=0.5, ratios=(0.25, 0.75)).flatten().double()
    assert int((wanted > 0).sum()) == 8
    assert spy.masked.sum(dim=1).tolist() == wanted.round().tolist()


def test_koleo_spreads_the_student_s_cls_of_global_views_sample_by_sample(make, batch: Batch):
    objective = dino(make)
    with Spy(objective) as spy:
        found = scalar(objective.step(batch, progress=0.0), "koleo")
    views = spy.answer[0].unflatten(0, (2, 4)).detach()
    expected = []
    for one in torch.nn.functional.normalize(views, dim=-1):
        gaps = [min(float((a - b).norm()) for b in one if b is not a and not torch.equal(a, b)) for a in one]
        expected.append(-sum(math.log(gap) for gap in gaps) / 4)
    assert found == pytest.approx(sum(expected), rel=1e-4)


def test_koleo_on_local_logits_is_the_sum_over_local_views(make, batch: Batch):
    objective = dino(make, koleo_on="local_logits")
    with torch.no_grad():
        logits = said(objective.student, batch.views["local"])
    expected = sum(koleo(logits[:, view]) for view in range(2))
    assert scalar(objective.step(batch, progress=0.0), "koleo") == pytest.approx(float(expected), rel=1e-4)


def test_sinkhorn_s_targets_use_prototypes_more_evenly(make, batch: Batch):
    soft, even = (dino(make, centring=kind).step(batch, progress=0.0) for kind in ("softmax", "sinkhorn"))
    assert scalar(even, "prototype_entropy") > scalar(soft, "prototype_entropy")
    assert "cls_centre" not in dino(make, centring="sinkhorn").state_dict()


def test_an_objective_is_the_mean_over_the_shares_of_a_batch_in_terms_that_look_at_one_sample(make):
    batch = make.batch(16, samples=6, views=2)
    settings: dict[str, Any] = {"koleo_weight": 0.0, "masked_views": 0.3, **EVERYTHING}
    objective = dino(make, **settings)
    objective.after_step(progress=0.0)
    objective.step(batch, progress=0.1).loss.backward()
    whole = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    shares = [batch.part(at, at + 1) for at in range(6)]
    with Spy(objective) as spy:
        hidden = []
        for share in shares:
            (objective.step(share, progress=0.1).loss / 6).backward()
            hidden.append(int(spy.masked.sum()))
    assert 0 in hidden  # one share hides nothing, and works
    for name, gradient in whole.items():
        torch.testing.assert_close(objective.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)


def test_patches_are_anchored_to_the_teacher_of_the_last_refresh(make, batch: Batch):
    objective = dino(make, gram_weight=1.0, gram_from=0.4, gram_refresh=0.2, momentum_start=0.0, momentum_end=0.0)
    anchors = []
    for step in range(10):
        output = objective.step(batch, progress=step / 10)
        assert ("loss/gram" in output.scalars) == (step >= 4)
        if step == 4:
            assert scalar(output, "gram") == 0.0  # nobody to be anchored to yet
        if step in (5, 7):
            assert scalar(output, "gram") > 0.0
        with torch.no_grad():
            for parameter in objective.student.backbone.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))
        objective.after_step(progress=step / 10)
        anchors.append(objective.anchor.network.embed.weight.clone())
        if step in (4, 6, 8):
            teacher = objective.teacher.network.backbone.embed.weight
            assert torch.equal(anchors[-1], teacher)
    changed = [step for step in range(1, 10) if not torch.equal(anchors[step], anchors[step - 1])]
    assert changed == [4, 6, 8]
    assert {"anchor.network.embed.weight", "gram_refreshes"} <= objective.state_dict().keys()


def test_one_head_for_both_is_there_once(make):
    names = dino(make, separate_heads=False).state_dict().keys()
    assert not any("patch_head" in name for name in names)
    assert "student.patch_head.prototypes" in dino(make).state_dict()


def test_without_a_gram_weight_there_is_no_third_network(make):
    assert not any("anchor" in name for name in dino(make).state_dict())


def test_the_question_where_a_patch_is_can_be_answered(make):
    batch = make.batch(8, samples=4, views=2)
    objective = dino(make, ibot_weight=0.0, koleo_weight=0.0, position_weight=1.0)
    with torch.no_grad():
        cls, patches = objective.student(batch.views["global"].flatten(0, 1))
        del cls
        located = objective.locate(patches).reshape(4, -1, 3)
    offsets = torch.tensor([[i, j, k] for i in (0.25, 0.75) for j in (0.25, 0.75) for k in (0.25, 0.75)])
    places = batch.places_mm["global"]
    true_mm = (places[:, :, 0, None] + offsets * places[:, :, 1, None]).flatten(1, 2)
    expected = float(relative_position(located, true_mm))
    assert scalar(objective.step(batch, progress=0.0), "position") == pytest.approx(expected, rel=1e-5)


def test_register_tokens_take_part(make, batch: Batch):
    plain = make.backbone(scan_depth=0)
    config = replace(plain.config, block=replace(plain.config.block, registers=4))
    objective = Dino(DinoConfig(projector=PROJECTOR), ScanVit(config))
    objective.step(batch, progress=0.1).loss.backward()
    prefix = objective.learner.block_encoder.prefix
    assert prefix.shape == (5, 24)
    assert (prefix.grad.abs().sum(dim=1) > 0).all()


def test_a_pretrained_backbone_is_taken_as_it_comes(make):
    backbone = make.backbone(scan_depth=0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.fill_(0.123)
    objective = Dino(DinoConfig(projector=PROJECTOR, gram_weight=1.0), backbone)
    for network in (objective.learner, objective.backbone, objective.anchor.network):
        assert all((parameter == 0.123).all() for parameter in network.parameters())


def test_local_views_of_another_size_and_no_cube_are_taken(make, batch: Batch):
    views = {"global": batch.views["global"], "local": torch.rand(4, 5, 1, 4, 8, 12)}
    assert dino(make).step(replace(batch, views=views), progress=0.1).loss.isfinite()


def test_no_two_views_of_a_batch_draw_alike(make, batch: Batch):
    plain = make.backbone(scan_depth=0)
    moving = ScanVit(replace(plain.config, block=replace(plain.config.block, rope_rescale=2.0)))
    objective = Dino(DinoConfig(projector=PROJECTOR), moving)
    encode, keys = moving.encode_blocks, []

    def listen(blocks: Any, *, masked: Any, keep: Any, chance: Any) -> Any:
        keys.extend(chance.keys.tolist())
        return encode(blocks, masked=masked, keep=keep, chance=chance)

    moving.encode_blocks = listen
    objective.step(batch, progress=0.0)
    assert len(set(keys)) == len(keys) == 4 * (2 + 2)


@pytest.mark.parametrize("prototype", [1.0, 0.0])
def test_a_teacher_that_answers_all_views_alike_is_told_by_its_information(make, batch: Batch, prototype: float):
    apart = dino(make, teacher_temperature_start=0.01).step(batch, progress=0.0).scalars
    objective = dino(make, teacher_temperature_start=0.01)
    with torch.no_grad():
        # All prototypes the same: even. All but one far off: always that one.
        weight = objective.teacher.network.cls_head.prototypes
        weight.copy_(torch.ones_like(weight))
        if not prototype:
            objective.cls_centre[1:] = 100.0
    alike = objective.step(batch, progress=0.0).scalars
    assert apart["teacher_information"] > 0.02
    assert alike["teacher_information"] == pytest.approx(0.0, abs=1e-5)
