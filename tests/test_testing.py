from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.protocols import Batch, StepOutput
from voxelstem.testing import check_backbone, check_objective, make_batch

SIZE = EncoderConfig(dim=24, depth=1, heads=2)


def scan_vit(*, scan_depth: int = 1, kind: type[ScanVit] = ScanVit) -> ScanVit:
    scan = EncoderConfig(dim=24, depth=scan_depth, heads=2)
    return kind(ScanVitConfig(block_ijk=(8, 8, 8), block=SIZE, scan=scan))


class Mean(nn.Module):
    """The smallest honest objective: tokens should tell how bright their view is."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = scan_vit()
        self.head = nn.Linear(24, 1)

    @property
    def learner(self) -> Any:
        return self.backbone

    @property
    def trains_scan_level(self) -> bool:
        return True

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        del progress
        view = batch.views["global"].flatten(0, 1)
        tokens = self.backbone.encode(view[:, None], (1, 1, 1))
        assert tokens.scan is not None
        # All of the blocks' tokens, so that the gradient reaches the last layer of both levels.
        guess = self.head(tokens.scan)[:, 0] + tokens.blocks.mean((1, 2)) + tokens.patches.square().mean((1, 2, 3))
        return StepOutput(loss=(guess - view.mean((1, 2, 3, 4))).square().mean(), scalars={"mean": float(view.mean())})

    def after_step(self, *, progress: float) -> None:
        pass


def test_the_house_s_backbone_and_a_small_objective_keep_the_contracts():
    check_backbone(scan_vit)
    check_backbone(lambda: scan_vit(scan_depth=0))
    check_objective(Mean)


def test_a_batch_of_noise_replays_and_knows_its_places():
    one, two = make_batch(), make_batch()
    assert all(torch.equal(one.views[name], two.views[name]) for name in one.views)
    assert one.views["local"].shape == (4, 2, 1, 8, 8, 8)
    assert one.places_mm["global"].shape == (4, 2, 2, 3)
    assert (one.places_mm["global"][:, :, 1] > 0).all()


class SeesWhatIsMasked(ScanVit):
    def encode_blocks(
        self, blocks: Tensor, *, masked: Any = None, keep: Any = None, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        del masked
        return super().encode_blocks(blocks, keep=keep, **rest)


class SeesWhatIsNotKept(ScanVit):
    def encode_blocks(
        self, blocks: Tensor, *, masked: Any = None, keep: Any = None, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        cls, tokens = super().encode_blocks(blocks, masked=masked, **rest)
        return cls, tokens if keep is None else tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))


class SortsWhatIsKept(ScanVit):
    def encode_blocks(
        self, blocks: Tensor, *, masked: Any = None, keep: Any = None, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        return super().encode_blocks(blocks, masked=masked, keep=None if keep is None else keep.sort().values, **rest)


class KnowsOneSize(ScanVit):
    def encode_blocks(
        self, blocks: Tensor, *, masked: Any = None, keep: Any = None, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        cls, tokens = super().encode_blocks(blocks, masked=masked, keep=keep, **rest)
        return cls, tokens[:, :8]


class MixesRows(ScanVit):
    def encode_blocks(
        self, blocks: Tensor, *, masked: Any = None, keep: Any = None, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        cls, tokens = super().encode_blocks(blocks, masked=masked, keep=keep, **rest)
        return cls + cls.mean(dim=0), tokens


class ForgetsAGroup(ScanVit):
    def param_groups(self) -> Any:
        return super().param_groups()[:-1]


class GroupsTwice(ScanVit):
    def param_groups(self) -> Any:
        groups = super().param_groups()
        return [*groups, groups[-1]]


class HasAnIdleParameter(ScanVit):
    def __init__(self, config: ScanVitConfig) -> None:
        super().__init__(config)
        self.idle = nn.Parameter(torch.rand(2))


class DrawsFromElsewhere(ScanVit):
    def __init__(self, config: ScanVitConfig) -> None:
        super().__init__(config)
        torch.nn.init.normal_(self.mask_token, generator=torch.Generator().manual_seed(torch.seed() % 2**60))


class HidesState(ScanVit):
    def __init__(self, config: ScanVitConfig) -> None:
        super().__init__(config)
        self.secret = torch.randn(config.block.dim)

    def encode_blocks(
        self, blocks: Tensor, *, masked: Any = None, keep: Any = None, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        cls, tokens = super().encode_blocks(blocks, masked=masked, keep=keep, **rest)
        return cls + self.secret, tokens


class IsBlindToPlaces(ScanVit):
    def look_at_scan(self, described: Tensor, grid: tuple[int, int, int], **rest: Any) -> tuple[Tensor, Tensor]:
        blind = described.sum(dim=1)[:, : self.dim].round() * 0 + self.scan_encoder.prefix[0]
        return blind, super().look_at_scan(described, grid, **rest)[1]


@pytest.mark.parametrize(
    ("kind", "promise"),
    [
        (SeesWhatIsMasked, "masked patches are seen"),
        (SeesWhatIsNotKept, "outside keep enter"),
        (SortsWhatIsKept, "order of keep"),
        (KnowsOneSize, "gives patch tokens of"),
        (MixesRows, "depend on other blocks"),
        (ForgetsAGroup, "every parameter exactly once"),
        (GroupsTwice, "every parameter exactly once"),
        (HasAnIdleParameter, "no gradient reaches idle"),
        (DrawsFromElsewhere, "does not draw the same weights"),
        (HidesState, "state_dict does not hold"),
        (IsBlindToPlaces, "where the blocks lie"),
    ],
)
def test_a_backbone_that_breaks_a_promise_is_found_out(kind: type[ScanVit], promise: str):
    with pytest.raises(AssertionError, match=promise):
        check_backbone(lambda: scan_vit(kind=kind))


class WithoutGraph(Mean):
    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        return StepOutput(loss=super().step(batch, progress=progress).loss.detach())


class NotANumber(Mean):
    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        return StepOutput(loss=super().step(batch, progress=progress).loss * float("nan"))


class ForgetsALevel(Mean):
    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        del progress
        view = batch.views["global"].flatten(0, 1)
        return StepOutput(loss=self.backbone.encode_blocks(view)[1].square().mean() + self.head.weight.sum())


class RollsDice(Mean):
    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        return StepOutput(loss=super().step(batch, progress=progress).loss * (1 + torch.rand(())))


class Counts(Mean):
    count = 0

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        self.count += 1
        return StepOutput(loss=super().step(batch, progress=progress).loss * self.count)


class SpoilsItsBatch(Mean):
    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        batch.views["global"].clamp_(0.2, 0.8)
        return super().step(batch, progress=progress)


class MovesTheLearner(Mean):
    def after_step(self, *, progress: float) -> None:
        del progress
        torch.nn.init.zeros_(self.backbone.mask_token)


class HidesByTheBatch(Mean):
    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        # Replayable, and yet another mask for a sample that stands elsewhere in its share.
        generator = torch.Generator().manual_seed(batch.seed)
        view = batch.views["global"][:, :1]
        patches = view[0, 0, 0].numel() // 64
        masked = torch.rand(len(view), 1, patches, generator=generator) < 0.5
        tokens = self.backbone.encode(view, (1, 1, 1), masked=masked)
        output = super().step(batch, progress=progress)
        return StepOutput(loss=output.loss + tokens.patches.square().mean())


class HasAStrangeTeacher(Mean):
    def __init__(self) -> None:
        super().__init__()
        self.student = scan_vit()

    @property
    def learner(self) -> Any:
        return self.student


@pytest.mark.parametrize(
    ("kind", "promise"),
    [
        (WithoutGraph, "no graph"),
        (NotANumber, "not one finite number"),
        (ForgetsALevel, "no gradient reaches .*scan_"),
        (RollsDice, "same loss to the last bit"),
        (Counts, "state_dict does not hold"),
        (SpoilsItsBatch, "changes its batch"),
        (MovesTheLearner, "changes the learner"),
        (HidesByTheBatch, "how the batch is shared out"),
        (HasAStrangeTeacher, "differ before the first step"),
    ],
)
def test_an_objective_that_breaks_a_promise_is_found_out(kind: type[Mean], promise: str):
    with pytest.raises(AssertionError, match=promise):
        check_objective(kind)
