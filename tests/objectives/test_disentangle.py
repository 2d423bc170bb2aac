from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from voxelstem.backbones.disentangled import Disentangled, DisentangledConfig
from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.backbones.unet import UNet, UNetConfig
from voxelstem.errors import ConfigError
from voxelstem.losses.contrast import between_groups, nt_xent, standardised
from voxelstem.objectives.disentangle import Disentangle, DisentangleConfig
from voxelstem.protocols import Batch
from voxelstem.testing import check_objective, make_batch
from voxelstem.views.crop import ViewKind

EDGE = (8, 8, 8)
NONE = ViewKind(count=0)
NETWORK = DisentangledConfig(width=4, levels=2, latent=6, block_ijk=EDGE)
UNET = UNetConfig(features=(4, 8), depths=(1, 1), strides=(1, 2), block_ijk=EDGE, skips="dropped")
OURS = {"columns": 3, "anatomy_weight": 0.2, "pathology_weight": 0.3, "nt_xent_weight": 0.1, "vicreg_weight": 0.05}
OURS |= {"leak_weight": 0.4, "name_weight": 0.6}


def disentangle(network: Any = NETWORK, **settings: Any) -> Disentangle:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = UNet if isinstance(network, UNetConfig) else Disentangled
        return Disentangle(DisentangleConfig(latent=6, **settings), kind(network))


@pytest.fixture
def batch() -> Batch:
    return make_batch(EDGE, samples=4)


def smooth_l1(guess: np.ndarray, truth: np.ndarray) -> float:
    distance = np.abs(guess - truth)
    return float(np.where(distance < 0.1, distance**2 / 0.2, distance - 0.05).mean())


def cosines(one: np.ndarray, other: np.ndarray) -> list[float]:
    rows = [(a.ravel(), b.ravel()) for a, b in zip(one, other, strict=True)]
    return [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in rows]


def released_by_hand(objective: Disentangle, batch: Batch) -> dict[str, float]:
    """Each term as the specification writes it, one scan after the other, without masks and without draws."""
    network = objective.backbone

    def array(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().double().numpy()

    a, b = batch.views["global"][:, 0], batch.views["other"][:, 0]
    of_a, of_b = network.latents(a), network.latents(b)
    sa, ma, sb, mb = of_a.subject_mean, of_a.contrast_mean, of_b.subject_mean, of_b.contrast_mean

    def r(subject: torch.Tensor, contrast: torch.Tensor, truth: torch.Tensor) -> float:
        return smooth_l1(array(network.reconstruct(subject, contrast)), array(truth))

    mean = (sa + sb) / 2
    spread = 0.0
    for each in (of_a, of_b):
        for mu, logvar in ((each.subject_mean, each.subject_logvar), (each.contrast_mean, each.contrast_logvar)):
            m, s = array(mu), array(logvar)
            spread += float((np.exp(s) + m**2 - 1 - s).mean() / 2)
    apart = cosines(array(ma), array(mb))
    return {
        "self": r(sa, ma, a) + r(sb, mb, b),
        "cross true": r(sa, mb, b) + r(sb, ma, a),
        "cross released": r(mean, mb, a) + r(mean, ma, b),
        "kl": spread,
        "subject": 1 - float(np.mean(cosines(array(sa), array(sb)))),
        "contrast all": float(np.mean(apart)),
        # The last sample of the batch is a copy.
        "contrast": float(np.mean(apart[:3])),
    }


@pytest.mark.parametrize(("swap", "repel_copies"), [("true", False), ("released", True)])
def test_the_loss_is_that_of_the_specification(batch: Batch, swap: Any, repel_copies: bool) -> None:
    objective = disentangle(mask_ratio=0.0, swap=swap, repel_copies=repel_copies).eval()
    wanted = released_by_hand(objective, batch)
    output = objective.step(batch, progress=0.05)
    cross = wanted[f"cross {swap}"]
    contrast = wanted["contrast all" if repel_copies else "contrast"]
    found = {"self": wanted["self"], "cross": cross, "kl": wanted["kl"], "subject": wanted["subject"]}
    found |= {"contrast": contrast}
    for name, value in found.items():
        assert output.scalars[f"loss/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    # Halfway through its rise over the first tenth of the run, the divergence has half of its weight.
    total = 3 * wanted["self"] + cross + 0.0005 * wanted["kl"] + 0.5 * wanted["subject"] + 0.5 * contrast
    assert float(output.loss.detach()) == pytest.approx(total, rel=1e-4)


def test_both_scans_pass_the_encoder_together_and_hide_other_blocks(batch: Batch) -> None:
    objective = disentangle(mask_ratio=0.5)
    entered: list[torch.Tensor] = []
    real = objective.backbone.latents

    def latents(x: torch.Tensor) -> Any:
        entered.append(x)
        return real(x)

    objective.backbone.latents = latents
    same = replace(batch, views={"global": batch.views["other"], "other": batch.views["other"]})
    objective.step(same, progress=0.5)
    assert len(entered) == 1
    hidden = (entered[0] == 0).flatten(1)
    assert hidden.sum(dim=1).tolist() == [256] * 8
    assert not any(torch.equal(hidden[row], hidden[row + 4]) for row in range(4))


def test_latents_are_drawn_in_training_by_the_batch_s_chance_and_not_at_all_in_evaluation(batch: Batch) -> None:
    objective = disentangle()
    one, again, other = (
        objective.step(replace(batch, seed=seed), progress=0.5).scalars["loss/self"] for seed in (1, 1, 2)
    )
    assert one == again != other
    no_mask = disentangle(mask_ratio=0.0).eval()
    one, other = (no_mask.step(replace(batch, seed=seed), progress=0.5).loss for seed in (1, 2))
    assert torch.equal(one, other)


def test_a_batch_of_copies_has_no_repulsion_and_says_so(batch: Batch) -> None:
    copies = batch.targets | {"copy": torch.ones(4, 1)}
    output = disentangle().step(replace(batch, targets=copies), progress=0.5)
    assert "loss/contrast" not in output.scalars
    assert output.scalars["known/contrast"] == 0


def test_two_sessions_in_one_contrast_are_not_pushed_apart_and_unknown_contrasts_are(batch: Batch) -> None:
    nan = float("nan")
    contrast = torch.tensor([[1.0, 1.0], [0.0, 1.0], [nan, nan], [0.0, 0.0]])
    output = disentangle().step(replace(batch, targets=batch.targets | {"contrast": contrast}), progress=0.5)
    assert output.scalars["known/contrast"] == 2


def test_without_variances_there_is_no_divergence(batch: Batch) -> None:
    output = disentangle(replace(NETWORK, vae=False)).step(batch, progress=0.5)
    assert "loss/kl" not in output.scalars
    assert "loss/kl" in disentangle().step(batch, progress=0.5).scalars


@pytest.mark.parametrize("network", [NETWORK, UNET], ids=["disentangled", "unet"])
def test_all_terms_keep_the_contract_of_objectives(network: Any) -> None:
    masked = 1.0 if isinstance(network, UNetConfig) else 0.0

    def make() -> Disentangle:
        kind = UNet if isinstance(network, UNetConfig) else Disentangled
        return Disentangle(DisentangleConfig(latent=6, masked_weight=masked, **OURS), kind(network))

    check_objective(make, size_ijk=EDGE)


def test_our_terms_are_weighed_and_said_by_name(batch: Batch) -> None:
    objective = disentangle(UNET, masked_weight=2.0, **OURS)
    output = objective.step(batch, progress=1.0)
    weights = {"self": 3.0, "cross": 1.0, "kl": 0.001, "subject": 0.5, "contrast": 0.5, "masked": 2.0}
    weights |= {"anatomy": 0.2, "pathology": 0.3, "nt_xent": 0.1, "leak": 0.4, "name": 0.6}
    weights |= {"invariance": 1.25, "variance": 1.25, "covariance": 0.05}
    assert {name for name in output.scalars if name.startswith("loss/")} == {f"loss/{name}" for name in weights}
    total = sum(weight * output.scalars[f"loss/{name}"] for name, weight in weights.items())
    assert float(output.loss.detach()) == pytest.approx(total, rel=1e-5)
    # Scan b's volumes are its own where the batch says them; else those of the pair: 11 known of 12, twice.
    assert output.scalars["known/anatomy"] == 22
    assert output.scalars["known/pathology"] == 4


def test_subjects_are_told_apart_by_the_mean_over_their_latents_cells(batch: Batch) -> None:
    objective = disentangle(mask_ratio=0.0, nt_xent_weight=1.0, temperature=0.5).eval()
    one, other = (
        objective.backbone.latents(batch.views[name][:, 0]).subject_mean.mean(dim=(2, 3, 4))
        for name in ("global", "other")
    )
    found = objective.step(batch, progress=0.5).scalars["loss/nt_xent"]
    assert found == pytest.approx(float(nt_xent(*standardised(one, other), temperature=0.5).detach()), rel=1e-5)


def test_a_subject_that_is_in_a_batch_twice_is_not_told_from_itself(batch: Batch) -> None:
    objective = disentangle(mask_ratio=0.0, nt_xent_weight=1.0).eval()
    twice = {"global": torch.cat([batch.views["global"][:2]] * 2), "other": torch.cat([batch.views["other"][:2]] * 2)}
    subject = torch.tensor([[7.0], [8.0], [7.0], [8.0]])
    given = replace(batch, views=twice, targets=batch.targets | {"subject": subject})
    found = objective.step(given, progress=0.5).scalars["loss/nt_xent"]
    # The two samples of a subject are equal: without them each view has the others of the other subject twice.
    one, other = (
        objective.backbone.latents(twice[name][:2, 0]).subject_mean.mean(dim=(2, 3, 4)) for name in ("global", "other")
    )
    both = torch.cat([one, other]).detach().double()
    both = (both - both.mean(dim=0)) / (both.std(dim=0, correction=0) + 1e-3 * both.std(dim=0, correction=0).mean())
    views = torch.nn.functional.normalize(both, dim=1)
    near = (views @ views.T / 0.1).exp()
    costs = [-(near[i, i ^ 2] / (near[i, i ^ 2] + 2 * near[i, i ^ 1] + 2 * near[i, i ^ 3])).log() for i in range(4)]
    assert found == pytest.approx(float(torch.stack(costs).mean()), rel=1e-4)


def test_contrasts_are_named_by_one_half_and_kept_out_of_the_other(batch: Batch) -> None:
    objective = disentangle(mask_ratio=0.0, leak_weight=1.0, name_weight=1.0, names=4).eval()
    assert objective.names is not None
    contrast = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, math.nan], [0.0, 3.0]])
    given = replace(batch, targets=batch.targets | {"contrast": contrast})
    found = objective.step(given, progress=0.5).scalars
    costs, subjects, groups = [], [], []
    for side, name in enumerate(("global", "other")):
        for row in range(4):
            latents = objective.backbone.latents(batch.views[name][row : row + 1, 0])
            subjects.append(latents.subject_mean.mean(dim=(2, 3, 4))[0])
            groups.append(contrast[row, side])
            if not contrast[row, side].isnan():
                said = objective.names(latents.contrast_mean.mean(dim=(2, 3, 4)))[0].log_softmax(dim=0)
                costs.append(-float(said[int(contrast[row, side])].detach()))
    assert found["known/name"] == len(costs) == 7
    assert found["loss/name"] == pytest.approx(np.mean(costs), rel=1e-4)
    leak = between_groups(torch.stack(subjects).detach(), torch.stack(groups))
    assert found["loss/leak"] == pytest.approx(float(leak), rel=1e-4)
    with pytest.raises(ConfigError, match=r"objective\.names is 4, and the batch holds contrast number 9"):
        objective.step(replace(given, targets=given.targets | {"contrast": 3.0 * contrast}), progress=0.5)


def test_air_does_not_count_where_it_is_ignored(batch: Batch) -> None:
    views = {name: view.clone() for name, view in batch.views.items()}
    for view in views.values():
        view[..., :4] = 0.0
    airy, objective = replace(batch, views=views), disentangle(background="ignored")
    found = objective.step(airy, progress=0.5).scalars
    assert found["known/self"] == found["known/cross"] == 8 * 256


def test_the_mean_over_shares_is_the_loss_of_the_whole_batch(batch: Batch) -> None:
    objective = disentangle()
    known = replace(
        batch, targets=batch.targets | {"copy": torch.zeros(4, 1), "contrast": torch.tensor([[0.0, 1.0]] * 4)}
    )
    whole = objective.step(known, progress=0.5).loss
    halves = [objective.step(known.part(at, at + 2), progress=0.5).loss for at in (0, 2)]
    torch.testing.assert_close(torch.stack(halves).mean(), whole, rtol=1e-5, atol=1e-6)


def test_what_is_no_pair_is_refused(batch: Batch) -> None:
    single = replace(batch, views={"global": batch.views["global"]})
    with pytest.raises(ConfigError, match="compares two scans of a subject") as caught:
        disentangle().step(single, progress=0.0)
    assert "views.pair" in str(caught.value.hint)
    small = replace(batch, views=batch.views | {"other": batch.views["other"][..., :4]})
    with pytest.raises(ConfigError, match="both scans of a pair are seen alike"):
        disentangle().step(small, progress=0.0)
    with pytest.raises(ConfigError, match=r"learns 5 values of 'volumes' of each scan, and the store says 3 values"):
        disentangle(columns=5, anatomy_weight=1.0).step(batch, progress=0.0)


def test_a_network_without_maps_is_refused() -> None:
    size = EncoderConfig(dim=12, depth=1, heads=2)
    with pytest.raises(ConfigError, match="'scan_vit' has none"):
        Disentangle(
            DisentangleConfig(), ScanVit(ScanVitConfig(block_ijk=EDGE, block=size, scan=replace(size, depth=0)))
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"self_weight": 0.0},
        {"cross_weight": -1.0},
        {"mask_ratio": 1.0},
        {"kl_warm_up": 2.0},
        {"temperature": 0.0},
        {"latent": 0},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DisentangleConfig(**wrong)


def test_parts_of_a_recipe_that_do_not_fit_are_refused() -> None:
    view = ViewKind(size_ijk=EDGE)
    DisentangleConfig().check(view, NONE, batch=1, backbone=NETWORK)
    with pytest.raises(ValueError, match=r"multiple of 4 \(objective\.mask_block\)"):
        DisentangleConfig().check(ViewKind(size_ijk=(8, 8, 6)), NONE, batch=1, backbone=NETWORK)
    with pytest.raises(ValueError, match="one view of each scan"):
        DisentangleConfig().check(replace(view, count=2), NONE, batch=1, backbone=NETWORK)
    with pytest.raises(ValueError, match="micro-batch of 2 or more"):
        DisentangleConfig(nt_xent_weight=1.0).check(view, NONE, batch=1, backbone=NETWORK)
    with pytest.raises(ValueError, match="needs a U-Net with its decoder"):
        DisentangleConfig(masked_weight=1.0).check(view, NONE, batch=1, backbone=NETWORK)


def invented_pairs(seed: int, people: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A ball somewhere in 8 voxels along each axis: bright in one contrast, dark in the other."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 3, indexing="ij"))
    centre = 2.5 + 2 * torch.rand(people, 3, 1, 1, 1, generator=generator)
    inside = ((axes - centre).square().sum(1, keepdim=True).sqrt() < 2.2).float()
    return 0.1 + 0.8 * inside, 0.9 - 0.8 * inside


def learnt(swap: Any, *, steps: int) -> tuple[float, float]:
    """Errors on unseen people: b painted from the subject seen in a, with b's contrast, and with a's."""
    a, b = invented_pairs(0, 32)
    objective = disentangle(replace(NETWORK, width=6, latent=8, vae=False), swap=swap, mask_ratio=0.0)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    order = torch.Generator().manual_seed(1)
    for step in range(steps):
        rows = torch.randperm(32, generator=order)[:8]
        turned = (torch.rand(8, generator=order) < 0.5)[:, None, None, None, None]
        first, second = torch.where(turned, b[rows], a[rows]), torch.where(turned, a[rows], b[rows])
        views = {"global": first[:, None], "other": second[:, None]}
        batch = Batch(views=views, places_mm={}, seed=step, targets={"copy": torch.zeros(8, 1)})
        objective.step(batch, progress=step / steps).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network = objective.eval().backbone
    a, b = invented_pairs(1, 32)
    with torch.no_grad():
        subject, contrasts = network.latents(a).subject_mean, [network.latents(each).contrast_mean for each in (b, a)]
        own, others = (smooth_l1(network.reconstruct(subject, each).numpy(), b.numpy()) for each in contrasts)
    return own, others


def test_a_true_swap_paints_the_other_contrast_and_the_released_one_does_not() -> None:
    own, others = learnt("true", steps=40)
    assert own < 0.4 * others
    released_own, released_others = learnt("released", steps=40)
    assert released_own > 0.6 * released_others
    assert own < 0.5 * released_own
