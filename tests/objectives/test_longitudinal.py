from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from voxelstem.backbones.disentangled import Disentangled, DisentangledConfig
from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.backbones.trajectory import TrajectoryConfig
from voxelstem.errors import ConfigError
from voxelstem.objectives.longitudinal import Longitudinal, LongitudinalConfig
from voxelstem.protocols import Batch
from voxelstem.testing import make_batch
from voxelstem.views.crop import ViewKind

EDGE = 8
NETWORK = DisentangledConfig(width=2, levels=2, latent=6, block_ijk=(EDGE,) * 3, vae=False)


def objective(*, columns: int = 3, vae: bool = False, **changes: Any) -> Longitudinal:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LongitudinalConfig(trajectory=TrajectoryConfig(hidden=8, columns=columns), **changes)
        made = Longitudinal(config, Disentangled(dataclasses.replace(NETWORK, vae=vae)))
        torch.nn.init.normal_(made.trajectory.move[-1].weight, std=0.1)
        return made


def batch(samples: int = 5, *, seed: int = 0, **targets: Tensor) -> Batch:
    made = make_batch((EDGE,) * 3, samples=samples, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    views = {"global": made.views["global"][:, :1], "other": made.views["other"]}
    age = 20 + 60 * torch.rand(samples, 1, generator=generator)
    years = 0.5 + 3 * torch.rand(samples, 1, generator=generator)
    volumes, later = torch.randn(2, samples, 3, generator=generator)
    known = {
        "copy": torch.zeros(samples, 1),
        "years": years,
        "age": torch.cat([age, age + years], dim=1),
        "volumes": volumes,
        "volumes_other": later,
    }
    return Batch(views=views, places_mm=made.places_mm, seed=made.seed, targets=known | targets)


def terms(batch: Batch, **changes: Any) -> dict[str, float]:
    return objective(**changes).step(batch, progress=0.5).scalars


def test_the_terms_are_what_their_formulas_say() -> None:
    made, given = objective(), batch()
    a, b, years = given.views["global"][:, 0], given.views["other"][:, 0], given.targets["years"]
    with torch.no_grad():
        said = made.step(given, progress=0.5)
        first, second = made.backbone.latents(a), made.backbone.latents(b)
        (identity, state), (_, later) = map(made.trajectory.split, (first.subject_mean, second.subject_mean))
        foreseen = made.trajectory.foresee(state, years, given.targets["age"][:, :1])
        expected = made.backbone.reconstruct(torch.cat([identity, foreseen], 1), second.contrast_mean)
        rate = (given.targets["volumes_other"] - given.targets["volumes"]) / years
        trust = years.clamp(max=1) ** 2
        gaps = F.huber_loss(made.trajectory.volume_change(state, later) / years, rate, reduction="none")
        wanted = {
            "follow_up": F.smooth_l1_loss(expected, b, beta=0.1),
            "dynamics": F.huber_loss(foreseen, later),
            "order": F.huber_loss(made.trajectory.years_between(state, later), years),
            "change": (trust * gaps).sum() / (3 * trust.sum()),
        }
    for name, value in wanted.items():
        assert said.scalars[f"loss/{name}"] == pytest.approx(float(value), rel=1e-4)
    weights = made.config
    total = sum(
        weight * said.scalars[f"loss/{name}"]
        for name, weight in {
            "reconstruction": 2 * weights.reconstruction,
            "follow_up": weights.follow_up,
            "identity": weights.identity,
            "dynamics": weights.dynamics,
            "order": weights.order,
            "change": weights.change,
        }.items()
    )
    assert float(said.loss.detach()) == pytest.approx(total, rel=1e-5)


def test_exchanging_the_scans_and_the_sign_of_time_changes_neither_order_nor_rates() -> None:
    given = batch()
    turned = dataclasses.replace(
        given,
        views={"global": given.views["other"], "other": given.views["global"]},
        targets={
            **given.targets,
            "years": -given.targets["years"],
            "age": given.targets["age"].flip(1),
            "volumes": given.targets["volumes_other"],
            "volumes_other": given.targets["volumes"],
        },
    )
    there, back = terms(given), terms(turned)
    for name in ("order", "change", "identity", "reconstruction"):
        assert there[f"loss/{name}"] == pytest.approx(back[f"loss/{name}"], rel=1e-5)


def test_copies_and_unknown_times_say_nothing_of_time() -> None:
    years = batch().targets["years"].clone()
    years[1] = math.nan
    copy = torch.zeros(5, 1)
    copy[0] = 1.0
    given = batch(copy=copy, years=years)
    far = dataclasses.replace(given, views={**given.views, "other": given.views["other"].clone()})
    far.views["other"][:2] = 0.0
    there, moved = terms(given), terms(far)
    for name in ("follow_up", "dynamics", "order", "change"):
        assert there[f"loss/{name}"] == pytest.approx(moved[f"loss/{name}"], rel=1e-6)
    assert there["known/order"] == 3
    assert there["loss/reconstruction"] != moved["loss/reconstruction"]


def test_where_no_time_is_known_the_rest_still_learns() -> None:
    made = objective()
    said = made.step(batch(years=torch.full((5, 1), math.nan)), progress=0.5)
    assert "loss/order" not in said.scalars
    assert said.scalars["known/order"] == 0
    said.loss.backward()
    gradients = [parameter.grad for parameter in made.backbone.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_scans_of_bad_quality_teach_no_rates() -> None:
    quality = torch.tensor([[1.0], [0.0], [1.0], [math.nan], [1.0]])
    wild = batch().targets["volumes"].clone()
    wild[[1, 3]] += 50
    assert terms(batch(quality=quality, volumes=wild))["loss/change"] == pytest.approx(
        terms(batch(quality=quality))["loss/change"], rel=1e-6
    )


def test_identity_gets_no_gradient_from_time_and_state_none_from_identity() -> None:
    only = {"reconstruction": 0.0, "follow_up": 0.0, "dynamics": 0.0, "change": 0.0, "order": 0.0, "identity": 0.0}
    for term, reaches in (("order", slice(3, None)), ("identity", slice(None, 3))):
        made = objective(**{**only, term: 1.0})
        made.step(batch(), progress=0.5).loss.backward()
        gradient = made.backbone.subject_mean.weight.grad
        assert gradient is not None
        touched = gradient.flatten(1).abs().sum(dim=1) > 0
        expected = torch.zeros(6, dtype=torch.bool)
        expected[reaches] = True
        assert torch.equal(touched, expected)


def test_two_pairs_of_one_subject_are_not_told_apart() -> None:
    """A subject's twin in the batch is no negative: a batch of one subject alone leaves nothing to tell apart."""
    alone = torch.full((5, 1), 3.0)
    assert terms(batch(subject=alone))["loss/identity"] == pytest.approx(0.0, abs=1e-6)
    own = terms(batch(subject=torch.arange(5.0)[:, None]))["loss/identity"]
    assert own == terms(batch())["loss/identity"]
    two = terms(batch(subject=torch.tensor([[0.0], [1], [2], [3], [0]])))["loss/identity"]
    assert 0 < two < own


def test_the_divergence_rises_over_its_share_of_the_run() -> None:
    made, given = objective(vae=True, kl=1.0, kl_warm_up=0.5), batch()
    losses = [made.step(given, progress=progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    kl = losses[0].scalars["loss/kl"]
    for output, weight in zip(losses, (0.0, 0.5, 1.0, 1.0), strict=True):
        assert float((output.loss - losses[0].loss).detach()) == pytest.approx(weight * kl, rel=1e-4, abs=1e-5)


def test_single_scans_and_other_columns_are_refused_with_what_to_do() -> None:
    given = batch()
    with pytest.raises(ConfigError, match="needs pairs"):
        objective().step(dataclasses.replace(given, views={"global": given.views["global"]}), progress=0.0)
    with pytest.raises(ConfigError, match="change of 4 structures"):
        objective(columns=4).step(given, progress=0.0)
    size = EncoderConfig(dim=24, depth=1, heads=2)
    other = ScanVit(ScanVitConfig(block_ijk=(8, 8, 8), block=size, scan=size))
    with pytest.raises(ConfigError, match="subject and contrast"):
        Longitudinal(LongitudinalConfig(), other)


@pytest.mark.parametrize(
    ("global_", "local", "samples", "network"),
    [(2, 0, 4, NETWORK), (1, 1, 4, NETWORK), (1, 0, 1, NETWORK), (1, 0, 4, SimpleNamespace(name="scan_vit"))],
)
def test_a_recipe_that_cannot_work_is_refused(global_: int, local: int, samples: int, network: Any) -> None:
    views = [ViewKind(count=count, size_ijk=(EDGE,) * 3) for count in (global_, local)]
    with pytest.raises(ValueError, match="longitudinal"):
        LongitudinalConfig().check(views[0], views[1], batch=samples, backbone=network)


@pytest.mark.parametrize("changes", [{"order": -1.0}, {"kl_warm_up": 2.0}, {"temperature": 0.0}, {"change": math.inf}])
def test_settings_out_of_range_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"weights|kl_warm_up"):
        LongitudinalConfig(**changes)
