from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from voxelstem.backbones.disentangled import Disentangled, DisentangledConfig
from voxelstem.backbones.experts import (
    ABSENT,
    ContrastSet,
    Gaussian,
    SetConfig,
    SetLatents,
    drop_contrasts,
    encode_set,
    hide_names,
    index_contrasts,
    product_of_experts,
    prototypes,
    synthesise,
)
from voxelstem.chance import Chance

KNOWN = ("T1w", "T2w", "FLAIR", "DWI")
CHANNELS = 3


def naive_product(mean: Tensor, logvar: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    means, variances = torch.zeros(len(mean), *mean.shape[2:]), torch.zeros(len(mean), *mean.shape[2:])
    for row in range(len(mean)):
        for cell in itertools.product(*map(range, mean.shape[2:])):
            precision, total = 1.0, 0.0
            for contrast in range(mean.shape[1]):
                if present[row, contrast]:
                    own = 1 / math.exp(float(logvar[row, contrast, *cell]))
                    precision += own
                    total += own * float(mean[row, contrast, *cell])
            means[row, *cell] = total / precision
            variances[row, *cell] = 1 / precision
    return means, variances


def draw(rows: int = 5, contrasts: int = 4) -> SetLatents:
    generator = torch.Generator().manual_seed(0)
    mean, logvar, contrast = torch.randn(3, rows, contrasts, CHANNELS, 2, 2, 1, generator=generator)
    index = torch.stack([torch.randperm(contrasts, generator=generator) for _ in range(rows)])
    index[:1, 1:] = ABSENT
    index[1:2, 2] = ABSENT
    index[2:3, 0] = len(KNOWN)
    return SetLatents(subject=Gaussian(mean=mean, logvar=logvar), contrast=contrast, index=index)


def turned(latents: SetLatents, order: list[int]) -> SetLatents:
    subject = Gaussian(mean=latents.subject.mean[:, order], logvar=latents.subject.logvar[:, order])
    return SetLatents(subject=subject, contrast=latents.contrast[:, order], index=latents.index[:, order])


def head(seed: int = 0) -> ContrastSet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = ContrastSet(SetConfig(contrasts=KNOWN, dim=16, heads=2), CHANNELS)
        # Weights of ordinary size, so that an answer hangs on everything.
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return made


def test_the_product_of_experts_equals_its_naive_twin() -> None:
    latents = draw()
    present = latents.index != ABSENT
    mean, variance = naive_product(latents.subject.mean, latents.subject.logvar, present)
    found = product_of_experts(latents.subject.mean, latents.subject.logvar, present)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.logvar.exp(), variance)


def test_without_any_contrast_the_prior_is_left() -> None:
    found = product_of_experts(torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool))
    assert (found.mean == 0).all()
    assert (found.logvar == 0).all()


def test_a_sure_expert_outweighs_the_others_and_extremes_stay_finite() -> None:
    mean, there = torch.tensor([[[1.0], [-3.0]]]), torch.ones(1, 2, dtype=torch.bool)
    sure = product_of_experts(mean, torch.tensor([[[-200.0], [0.0]]]), there)
    assert float(sure.mean) == pytest.approx(1.0)
    unsure = product_of_experts(mean, torch.full((1, 2, 1), 200.0), there)
    assert float(unsure.mean) == pytest.approx(0.0)
    assert sure.logvar.isfinite().all()


def test_what_stands_in_place_of_an_absent_contrast_never_enters() -> None:
    latents = draw()
    present = latents.index != ABSENT
    hole = ~present.view(*present.shape, 1, 1, 1, 1)
    spoilt = SetLatents(
        subject=Gaussian(
            mean=latents.subject.mean.masked_fill(hole, math.nan),
            logvar=latents.subject.logvar.masked_fill(hole, math.nan),
        ),
        contrast=latents.contrast.masked_fill(hole, math.nan),
        index=latents.index,
    )
    assert torch.equal(head()(spoilt), head()(latents))
    assert head()(latents).isfinite().all()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[1:])
def test_the_order_of_the_contrasts_changes_no_answer(order: tuple[int, ...]) -> None:
    latents = draw()
    with torch.no_grad():
        torch.testing.assert_close(head()(turned(latents, list(order))), head()(latents), atol=1e-6, rtol=1e-6)


def test_every_contrast_changes_the_answer_and_so_does_its_name() -> None:
    latents = draw()
    before = head()(latents)
    for place in range(4):
        index = latents.index.clone()
        index[3, place] = ABSENT
        gone = SetLatents(subject=latents.subject, contrast=latents.contrast, index=index)
        assert not torch.allclose(head()(gone)[3], before[3], atol=1e-4)
        index[3, place] = len(KNOWN)
        renamed = SetLatents(subject=latents.subject, contrast=latents.contrast, index=index)
        assert not torch.allclose(head()(renamed)[3], before[3], atol=1e-4)


def test_one_contrast_is_enough_and_none_is_refused() -> None:
    latents = draw(rows=1)
    assert head()(latents).shape == (1, 1)
    none = SetLatents(subject=latents.subject, contrast=latents.contrast, index=torch.full_like(latents.index, ABSENT))
    with pytest.raises(ValueError, match="at least one contrast"):
        head()(none)


def test_contrasts_are_numbered_and_the_unseen_are_counted() -> None:
    found = index_contrasts([["DWI", "T1w"], ["SWI"], ["SWI", "PD", "T2w"]], KNOWN)
    assert found.index.tolist() == [[3, 0, ABSENT], [4, ABSENT, ABSENT], [4, 4, 1]]
    assert found.unseen == {"SWI": 2, "PD": 1}
    assert found.present.sum(dim=1).tolist() == [2, 1, 3]


@pytest.mark.parametrize(("rows", "known"), [([["T1w"], []], KNOWN), ([], KNOWN), ([["T1w"]], ("T1w", "T1w"))])
def test_a_patient_without_contrasts_and_a_doubled_name_are_refused(rows: Any, known: Any) -> None:
    with pytest.raises(ValueError, match="contrast"):
        index_contrasts(rows, known)


def test_dropping_keeps_one_contrast_at_least_and_follows_its_share() -> None:
    present = torch.ones(4000, 4, dtype=torch.bool)
    present[::2, 1:] = False
    left = drop_contrasts(present, Chance.of(0, count=4000), 0.5)
    assert left.any(dim=1).all()
    assert not (left & ~present).any()
    assert left[::2].sum() == 2000
    # Four contrasts of which one is always kept: 1 - (0.5 - 0.5^4 / 4) of them stay.
    assert float(left[1::2].float().mean()) == pytest.approx(0.5 + 0.5**4 / 4, abs=0.02)
    assert torch.equal(drop_contrasts(present, Chance.of(0, count=4000), 0.0), present)


def test_what_is_dropped_depends_on_the_row_s_own_key() -> None:
    present = torch.ones(6, 4, dtype=torch.bool)
    whole = drop_contrasts(present, Chance.of(3, count=6), 0.5)
    assert torch.equal(drop_contrasts(present[2:4], Chance.of(3, first=2, count=2), 0.5), whole[2:4])
    with pytest.raises(ValueError, match="share"):
        drop_contrasts(present, Chance.of(0, count=6), 1.0)


def test_hidden_names_become_unknown_and_absent_ones_stay_absent() -> None:
    index = torch.arange(4).expand(2000, -1).clone()
    index[:, 3] = ABSENT
    hidden = hide_names(index, Chance.of(0, count=2000), 0.25, unknown=4)
    assert (hidden[:, 3] == ABSENT).all()
    assert float((hidden[:, :3] == 4).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert ((hidden == index) | (hidden == 4)).all()


def test_training_draws_by_the_key_only() -> None:
    latents, made = draw(), head()
    first, again = (made(latents, chance=Chance.of(1, count=5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, made(latents, chance=Chance.of(2, count=5)))


@dataclass(frozen=True)
class Said:
    subject_mean: Tensor
    subject_logvar: Tensor
    contrast_mean: Tensor
    contrast_logvar: Tensor


class Toy:
    """Latents that are plain functions of the voxels, to be checked by eye."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def latents(self, x: Tensor) -> Said:
        self.rows.append(len(x))
        return Said(x, 2 * x, 3 * x, 4 * x)

    def reconstruct(self, subject: Tensor, contrast: Tensor) -> Tensor:
        return subject[:, :1] + contrast[:, :1]


def test_a_set_is_encoded_in_one_pass_without_the_absent() -> None:
    toy, scans = Toy(), torch.rand(2, 3, 1, 2, 2, 2)
    index = torch.tensor([[0, ABSENT, 1], [ABSENT, 3, ABSENT]])
    found = encode_set(toy, scans, index)
    assert toy.rows == [3]
    there = (index != ABSENT)[..., None, None, None, None]
    assert torch.equal(found.subject.mean, scans * there)
    assert torch.equal(found.subject.logvar, 2 * scans * there)
    assert torch.equal(found.contrast, 3 * scans * there)


def test_a_prototype_is_the_mean_of_its_contrast_and_synthesis_uses_it() -> None:
    contrast, index = torch.rand(5, 2, 2, 1, 2), torch.tensor([0, 2, 2, 0, 4])
    found = prototypes(contrast, index, known=4)
    torch.testing.assert_close(found[2], contrast[1:3].mean(dim=(0, 2, 3, 4)))
    assert found[[1, 3]].isnan().all()
    subject = torch.rand(3, 2, 2, 2, 2)
    made = synthesise(Toy(), subject, found[0])
    torch.testing.assert_close(made, subject[:, :1] + found[0, 0])
    with pytest.raises(ValueError, match="prototype"):
        synthesise(Toy(), subject, found[1])


@pytest.mark.parametrize(
    "changes",
    [{"contrasts": ()}, {"contrasts": ("T1w", "T1w")}, {"dim": 6}, {"outputs": 0}, {"drop": 1.0}, {"hide": -0.1}],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"contrasts|dim|drop"):
        SetConfig(**changes)


def test_a_network_without_variances_is_equally_sure_of_all_contrasts() -> None:
    config = DisentangledConfig(width=2, levels=3, latent=4, block_ijk=(16, 16, 16), vae=False)
    torch.manual_seed(0)
    found = encode_set(Disentangled(config), torch.rand(1, 2, 1, 16, 16, 16), torch.tensor([[0, 1]]))
    assert found.subject.logvar.eq(0).all()
    assert not found.subject.mean.eq(0).all()
