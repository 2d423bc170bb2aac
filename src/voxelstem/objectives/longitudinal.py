"""Follow a subject through time: what stays is told from what changes, and what changes is foreseen.

For a network that disentangles subject and contrast (`backbones.disentangled`) and pairs of scans from two sessions
(`views.pair`, `other_session`). The subject's latent is cut into identity and state. Between sessions the identity
is the same and unlike that of others (NT-Xent); f(state, years, age) foresees the later state; an antisymmetric head
tells order and time, another how much each structure's volume changed; and the follow-up scan is painted from the
identity, the foreseen state and the follow-up's own contrast. Views should show the whole head: two scans of one
small box are alike wherever it lies, and identity would learn the place.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from voxelstem import distributed
from voxelstem.backbones.disentangled import Latents
from voxelstem.backbones.trajectory import FACTS, TENSORS, Trajectory, TrajectoryConfig
from voxelstem.config import flatten
from voxelstem.errors import ConfigError
from voxelstem.losses.contrast import nt_xent, same_subject
from voxelstem.losses.latent import kl
from voxelstem.losses.longitudinal import annualised, known_huber, latent_dynamics, trusted
from voxelstem.losses.masked import smooth_l1
from voxelstem.losses.terms import Counted, Term, add_up
from voxelstem.protocols import Batch, StepOutput
from voxelstem.views.crop import ViewKind

SURE_YEARS = 1.0
"""A change measured over less time than this is trusted less, as the square of the time: its error stays the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongitudinalConfig:
    """Weights of the terms; what weighs 0 is not computed into the loss but still told."""

    name: str = "longitudinal"
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    """`trajectory.columns` says how many structures the batch's volumes have; 0 leaves the term out."""
    reconstruction: float = 3.0
    """Each scan from its own latents."""
    follow_up: float = 1.0
    """Scan b from the identity of a, the foreseen state and the contrast of b."""
    kl: float = 0.001
    kl_warm_up: float = 0.1
    """Share of the run over which the weight of `kl` rises from 0."""
    identity: float = 0.1
    temperature: float = 0.2
    """Of the cosines that identities are compared by."""
    dynamics: float = 0.5
    order: float = 0.5
    change: float = 10.0
    """Structures change by a tenth of their spread among people in a year: a small number that matters."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a weight below 0, a share outside [0, 1], or no temperature.
        """
        weights = (
            self.reconstruction,
            self.follow_up,
            self.kl,
            self.identity,
            self.dynamics,
            self.order,
            self.change,
        )
        if not all(0 <= weight < math.inf for weight in weights):
            raise ValueError(f"weights must be >= 0 and finite, got {weights}")
        if not 0 <= self.kl_warm_up <= 1 or not 0 < self.temperature < math.inf:
            raise ValueError(
                f"need kl_warm_up in [0, 1] and temperature > 0, got {self.kl_warm_up}, {self.temperature}"
            )

    def check(self, global_: ViewKind, local: ViewKind, *, batch: int, backbone: Any) -> None:
        """Hold the other parts of a recipe against what a step needs.

        Raises:
            ValueError: no view or more than one of a scan, local views, a backbone without subject and contrast, or
                no other sample to tell identities from.
        """
        if (global_.count, local.count) != (1, 0):
            raise ValueError(
                "longitudinal looks at each scan of a pair once: need views.global_.count = 1 and views.local.count = "
                f"0, got {global_.count} and {local.count}"
            )
        if getattr(backbone, "latent", None) is None:
            raise ValueError(f"longitudinal needs backbone disentangled, got {backbone.name}")
        if batch < 2:  # noqa: PLR2004 - one to tell from another
            raise ValueError(f"longitudinal tells subjects apart: need loader.batch >= 2, got {batch}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """What is known of the two scans of each sample."""

    years: Float[Tensor, "sample 1"]
    age: Float[Tensor, "sample 1"]
    other: Float[Tensor, "sample 1"]
    """1 where b is not a copy of a."""

    @property
    def timed(self) -> Float[Tensor, "sample 1"]:
        """1 where b is another scan and the time between is known."""
        return self.other * self.years.isfinite()


class Longitudinal(nn.Module):
    """The disentangling network with a trajectory on its subject's half."""

    Config = LongitudinalConfig

    def __init__(self, config: LongitudinalConfig, backbone: Any) -> None:
        """`backbone` is `backbones.disentangled.Disentangled`.

        Raises:
            ConfigError: it has no latents of subject and contrast.
        """
        super().__init__()
        if not hasattr(backbone, "latents"):
            raise ConfigError(
                "longitudinal needs a network with latents of subject and contrast",
                hint="choose backbone disentangled",
            )
        self.config = config
        self.backbone = backbone
        self.trajectory = Trajectory(config.trajectory, backbone.config.latent)

    @property
    def learner(self) -> Any:
        """The backbone that gradients train."""
        return self.backbone

    @property
    def trains_scan_level(self) -> bool:
        """No: blocks are compared."""
        return False

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        """Compare the first global view of each scan a with the view of its scan b.

        Raises:
            ConfigError: the batch holds no pairs, or other columns of volumes than the head was made for.
        """
        config, pair = self.config, self._pair(batch)
        a, b = batch.views["global"][:, 0], batch.views["other"][:, 0]
        both = self.backbone.latents(torch.cat([a, b]))
        chance = batch.chance
        subjects, contrasts = zip(
            _rows(both, 0, len(a)).drawn(chance.purpose("scan a")),
            _rows(both, len(a), 2 * len(a)).drawn(chance.purpose("scan b")),
            strict=True,
        )
        painted = self.backbone.reconstruct(torch.cat(subjects), torch.cat(contrasts))
        (identity_a, state_a), (identity_b, state_b) = map(self.trajectory.split, subjects)
        foreseen = self.trajectory.foresee(state_a, pair.years, pair.age)
        expected = self.backbone.reconstruct(torch.cat([identity_a, foreseen], dim=1), contrasts[1])
        counted, count = _timed_voxels(pair, b), batch.known.get
        ahead = latent_dynamics(foreseen, state_b, pair.timed, count=count("dynamics"))
        years = self.trajectory.years_between(state_a, state_b)
        order = known_huber(years, pair.years, pair.other, count=count("order"))
        terms = {
            "reconstruction": Term.of(2 * config.reconstruction, smooth_l1(painted, torch.cat([a, b]))),
            "follow_up": Term.of(config.follow_up, smooth_l1(expected, b, counted=counted, count=count("follow_up"))),
            "identity": Term(weight=config.identity, value=self._told_apart(batch, identity_a, identity_b)),
            "dynamics": Term.of(config.dynamics, ahead),
            "order": Term.of(config.order, order),
        }
        if config.trajectory.columns:
            terms["change"] = Term.of(config.change, self._change(batch, pair, state_a, state_b))
        if both.subject_logvar is not None and both.contrast_logvar is not None:
            rise = min(1.0, progress / config.kl_warm_up) if config.kl_warm_up else 1.0
            value = 2 * (kl(both.subject_mean, both.subject_logvar) + kl(both.contrast_mean, both.contrast_logvar))
            terms["kl"] = Term(weight=config.kl * rise, value=value)
        return add_up(terms)

    def known(self, batch: Batch) -> dict[str, Tensor]:
        """How many values the terms rest on, as `Batch.known` names them."""
        pair = self._pair(batch)
        found = {
            "follow_up": _timed_voxels(pair, batch.views["other"][:, 0]).sum(),
            "dynamics": pair.timed.sum(),
            "order": trusted(pair.years, pair.other).sum(),
        }
        if self.config.trajectory.columns:
            found["change"] = trusted(*self._rates(batch, pair)).sum()
        return found

    def after_step(self, *, progress: float) -> None:
        """Nothing follows: there is no teacher."""

    def beside(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
        """Files of a weights folder beside the backbone's: the trajectory and its sizes, as `change` reads them."""
        return {TENSORS: dict(self.trajectory.state_dict())}, {
            FACTS: json.dumps(flatten(self.config.trajectory), indent=2)
        }

    def _told_apart(self, batch: Batch, *identities: Tensor) -> Tensor:
        """Each subject's identity in scan b found among those of the other subjects."""
        one, other = (distributed.rows(part.flatten(2).mean(dim=2)) for part in identities)
        number = batch.targets.get("subject")
        same = None if number is None else same_subject(distributed.rows(number))
        return nt_xent(one, other, same=same, temperature=self.config.temperature)

    def _change(self, batch: Batch, pair: _Pair, first: Tensor, second: Tensor) -> Counted:
        """Annualised change of each structure against what the volumes say."""
        truth, trust = self._rates(batch, pair)
        years = torch.where(truth.isfinite(), pair.years, 1.0)
        said = self.trajectory.volume_change(first, second) / years
        return known_huber(said, truth, trust, count=batch.known.get("change"))

    def _rates(self, batch: Batch, pair: _Pair) -> tuple[Float[Tensor, "sample column"], Float[Tensor, "sample 1"]]:
        """By how much each structure changed in a year, and how far that is trusted."""
        volumes, later = batch.targets.get("volumes"), batch.targets.get("volumes_other")
        columns = self.config.trajectory.columns
        if volumes is None or later is None or volumes.shape[1] != columns:
            raise ConfigError(
                f"the change of {columns} structures is asked for, and pairs have volumes of "
                f"{0 if volumes is None or later is None else volumes.shape[1]}",
                hint="name as many in views.pair.structures as objective.trajectory.columns says, or set this to 0",
            )
        truth = annualised(volumes, later, pair.years)
        trust = pair.other * (pair.years.abs() / SURE_YEARS).clamp(max=1.0).square()
        if "quality" in batch.targets:
            trust = trust * batch.targets["quality"].nan_to_num(0.0)
        return truth, trust

    def _pair(self, batch: Batch) -> _Pair:
        if "other" not in batch.views or not {"copy", "years", "age"} <= batch.targets.keys():
            raise ConfigError(
                "longitudinal needs pairs of scans, and the batch holds single ones",
                hint="set views.pair in the recipe, with other_session above 0",
            )
        targets = batch.targets
        return _Pair(years=targets["years"], age=targets["age"][:, :1], other=1 - targets["copy"])


def _timed_voxels(pair: _Pair, like: Float[Tensor, "sample channel i j k"]) -> Bool[Tensor, "sample channel i j k"]:
    """The voxels of those scans b whose time from a is known."""
    return (pair.timed > 0)[:, :, None, None, None].expand_as(like)


def _rows(latents: Latents, start: int, stop: int) -> Latents:
    """The latents of some rows."""
    subject, contrast = latents.subject_logvar, latents.contrast_logvar
    return Latents(
        subject_mean=latents.subject_mean[start:stop],
        contrast_mean=latents.contrast_mean[start:stop],
        subject_logvar=None if subject is None else subject[start:stop],
        contrast_logvar=None if contrast is None else contrast[start:stop],
    )
