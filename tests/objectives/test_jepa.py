from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.layers import grid_positions
from voxelstem.objectives.jepa import Jepa, JepaConfig
from voxelstem.views.crop import ViewKind

PREDICTOR = EncoderConfig(dim=24, depth=1, heads=2)


def jepa(make: Any, **settings: Any) -> Jepa:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Jepa(JepaConfig(predictor=PREDICTOR, **settings), make.backbone(scan_depth=0))


class Spy:
    """Remembers what student, teacher and predictor were given, and what they answered."""

    def __init__(self, objective: Jepa, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: list[Tensor | None] = []
        self.tokens: list[Tensor] = []
        self.places: list[tuple[Tensor, Tensor]] = []
        for network in (objective.student, objective.teacher.network):
            self._watch(network, monkeypatch)
        objective.predictor.register_forward_pre_hook(lambda _, given: self.places.append((given[1], given[2])))

    def _watch(self, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        real = network.encode_blocks

        def encode_blocks(blocks: Any, *, keep: Any = None, chance: Any = None) -> Any:
            answer = real(blocks, keep=keep, chance=chance)
            self.kept.append(keep)
            self.tokens.append(answer[1].detach())
            return answer

        monkeypatch.setattr(network, "encode_blocks", encode_blocks)


def numbers(places: Tensor) -> list[list[int]]:
    """Which patches of a grid of 2 x 2 x 2 lie at these places."""
    return (places[:, :, None] == grid_positions((2, 2, 2))).all(-1).int().argmax(-1).tolist()


def box(patch: int) -> tuple[slice, ...]:
    return tuple(slice(4 * at, 4 * at + 4) for at in (patch // 4, patch // 2 % 2, patch % 2))


def test_the_loss_is_that_of_a_naive_loop(make, monkeypatch: pytest.MonkeyPatch):
    objective, batch = jepa(make, target=0.5, context=0.25, beta=0.5), make.batch(views=2)
    spy = Spy(objective, monkeypatch)
    loss = objective.step(batch, progress=0.0).loss
    seen, hidden = (numbers(places) for places in spy.places[0])
    monkeypatch.undo()
    positions, errors = grid_positions((2, 2, 2)), []
    with torch.no_grad():
        for row, (sample, view) in enumerate(itertools.product(range(3), range(2))):
            block = batch.views["global"][sample, view][None]
            truth = objective.teacher.network.encode_blocks(block)[1][0]
            tokens = objective.student.encode_blocks(block, keep=torch.tensor([seen[row]]))[1]
            said = objective.predictor(tokens, positions[seen[row]][None], positions[hidden[row]][None])[0]
            for patch, guess in zip(hidden[row], said, strict=True):
                wanted = truth[patch]
                wanted = (wanted - wanted.mean()) / (wanted.var(unbiased=False) + 1e-6).sqrt()
                gaps = (guess - wanted).abs().tolist()
                errors += [gap * gap if gap < 0.5 else gap - 0.25 for gap in gaps]
    assert float(loss.detach()) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_the_teacher_sees_everything_and_the_student_nothing_of_what_is_hidden(make, monkeypatch: pytest.MonkeyPatch):
    objective, batch = jepa(make), make.batch()
    spy = Spy(objective, monkeypatch)
    objective.step(batch, progress=0.0)
    view = batch.views["global"].clone()
    for sample, patches in enumerate(numbers(spy.places[0][1])):
        for patch in patches:
            view[(sample, 0, 0, *box(patch))] += 0.5
    objective.step(replace(batch, views={"global": view}), progress=0.0)
    assert [keep is None for keep in spy.kept] == [True, False] * 2
    teacher, student, teacher_again, student_again = spy.tokens
    assert teacher.shape[1] == 8
    assert torch.equal(student, student_again)
    assert not torch.equal(teacher, teacher_again)


def test_seen_and_hidden_patches_never_meet_and_are_as_many_as_asked(make, monkeypatch: pytest.MonkeyPatch):
    objective = jepa(make, target=0.5, context=0.25)
    spy = Spy(objective, monkeypatch)
    for seed in range(10):
        objective.step(replace(make.batch(), seed=seed), progress=0.0)
    drawn = [
        (set(seen), set(hidden)) for places in spy.places for seen, hidden in zip(*map(numbers, places), strict=True)
    ]
    assert all(len(seen) == 2 and len(hidden) == 4 and not seen & hidden for seen, hidden in drawn)
    assert len({tuple(sorted(hidden)) for _, hidden in drawn}) > 3
    assert len({tuple(sorted(seen)) for seen, _ in drawn}) > 3


def test_moving_the_seen_patches_changes_what_is_predicted(make):
    objective = jepa(make)
    positions, order = grid_positions((2, 2, 2)), torch.tensor([[5, 0, 3, 1, 7]])
    tokens = torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(0))
    seen, hidden = positions[order[:, :3]], positions[order[:, 3:]]
    with torch.no_grad():
        assert not torch.allclose(
            objective.predictor(tokens, seen, hidden), objective.predictor(tokens, seen.flip(1), hidden)
        )


def test_all_but_the_mask_token_and_the_teacher_learns(make):
    objective = jepa(make)
    objective.step(make.batch(), progress=0.0).loss.backward()
    idle = {name for name, member in objective.named_parameters() if member.grad is None or not member.grad.any()}
    assert {name for name in idle if not name.startswith("teacher.")} == {"student.mask_token"}
    assert not any(member.requires_grad for member in objective.teacher.parameters())


def test_the_loss_falls_while_the_teacher_follows_and_does_not_collapse(make):
    objective, batch = jepa(make, momentum_start=0.98), make.batch()
    optimizer = torch.optim.AdamW([*objective.student.parameters(), *objective.predictor.parameters()], lr=3e-3)
    outputs = []
    for _ in range(40):
        output = objective.step(batch, progress=0.0)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(progress=0.0)
        outputs.append(output)
    assert float(outputs[-1].loss.detach()) < 0.8 * float(outputs[0].loss.detach())
    assert outputs[-1].scalars["target_spread"] > 0.1


def test_the_teacher_moves_by_the_schedule_and_stands_still_at_the_end(make):
    objective = jepa(make, momentum_start=0.9)
    with torch.no_grad():
        for member in objective.student.parameters():
            member.add_(1.0)
    before = objective.backbone.embed.weight.clone()
    objective.after_step(progress=1.0)
    assert torch.equal(objective.backbone.embed.weight, before)
    objective.after_step(progress=0.0)
    torch.testing.assert_close(objective.backbone.embed.weight, before + 0.1)


def test_a_teacher_that_says_the_same_everywhere_is_noticed(make):
    objective = jepa(make)
    with torch.no_grad():
        norm = objective.teacher.network.block_encoder.norm
        norm.weight.zero_()
        norm.bias.copy_(torch.randn(24, generator=torch.Generator().manual_seed(0)))
    assert objective.step(make.batch(), progress=0.0).scalars["target_spread"] == pytest.approx(0.0, abs=1e-5)


def test_the_mean_over_shares_is_the_loss_of_the_whole_batch(make):
    objective, batch = jepa(make), make.batch(samples=4, views=2)
    whole = objective.step(batch, progress=0.0).loss
    halves = [objective.step(batch.part(start, start + 2), progress=0.0).loss for start in (0, 2)]
    torch.testing.assert_close(torch.stack(halves).mean(), whole, rtol=1e-6, atol=1e-6)


def test_views_of_one_value_give_a_finite_loss_and_gradient(make):
    objective, batch = jepa(make), make.batch()
    loss = objective.step(replace(batch, views={"global": torch.zeros_like(batch.views["global"])}), progress=0.0).loss
    loss.backward()
    assert loss.isfinite()
    assert all(member.grad.isfinite().all() for member in objective.parameters() if member.grad is not None)


def test_targets_are_normalised_so_a_large_teacher_costs_no_more(make):
    objective, batch = jepa(make), make.batch()
    loss = objective.step(batch, progress=0.0).loss
    with torch.no_grad():
        objective.teacher.network.block_encoder.norm.weight.mul_(10)
    torch.testing.assert_close(objective.step(batch, progress=0.0).loss, loss, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": 0.0},
        {"context": 0.0},
        {"target": 0.7, "context": 0.7},
        {"beta": -1.0},
        {"momentum_start": 1.1},
        {"momentum_end": -0.1},
        {"predictor": replace(PREDICTOR, depth=0)},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        JepaConfig(**wrong)


@pytest.mark.parametrize(
    ("settings", "view", "said"),
    [
        ({}, ViewKind(size_ijk=(8, 8, 6)), "multiple of patch_ijk"),
        ({}, ViewKind(count=0), "views.global_.count"),
        ({"target": 0.01}, ViewKind(size_ijk=(8, 8, 8)), "of the 8 in a view"),
        ({"context": 0.01}, ViewKind(size_ijk=(8, 8, 8)), "of the 8 in a view"),
    ],
)
def test_views_that_do_not_fit_are_refused(make, settings: dict[str, float], view: ViewKind, said: str):
    with pytest.raises(ValueError, match=said):
        JepaConfig(**settings).check(view, ViewKind(count=0), batch=1, backbone=make.backbone().config)


def test_a_view_that_fits_is_taken(make):
    JepaConfig().check(ViewKind(size_ijk=(8, 8, 8)), ViewKind(count=0), batch=1, backbone=make.backbone().config)
