"""What survival heads are fitted and judged by: likelihoods of linear risks, and curves of risks of any origin.

Linear risks and their baseline are fitted together. Where something else gives the risks (attention, a network that was
trained whole), the baseline is fitted above them, as Breslow (1972) does it for proportional hazards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from voxelstem import metrics
from voxelstem.errors import AuditError
from voxelstem.heads.survival import Curve, Watched, breslow, censoring, counted_concordance, interval_edges
from voxelstem.losses.survival import Ties, cox_loss, fates, hazard_loss
from voxelstem.study import Survival

Loss = Callable[[Float[Tensor, "row out"], Float[Tensor, "row 2"]], Float[Tensor, ""]]
"""Of what a network says of some rows, and of their times and events (1 if it came, else 0)."""
CERTAIN = 40.0
"""Log odds beyond which float64 knows no difference to certainty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Foretold:
    """What was said of a subject, what came, and what each part of it counts for."""

    truth: Survival
    risk: float
    chances: tuple[float, ...]
    """That the event has not come by each of the head's moments; `alive` says whether it had not."""
    alive: tuple[bool, ...]
    shares: tuple[float, ...]
    """What each moment counts for in the integrated Brier score (nothing once nobody knows), and what the pairs count
    for that the event begins, in Uno's C."""
    weight: float

    @property
    def brier(self) -> float:
        """The subject's own part of the integrated Brier score."""
        rows = zip(self.shares, self.alive, self.chances, strict=True)
        return math.fsum(share * (alive - chance) ** 2 for share, alive, chance in rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a head is fitted to."""

    rows: Float[Tensor, "subject column"]
    time: Float[Tensor, " subject"]
    event: Bool[Tensor, " subject"]

    @classmethod
    def of(cls, rows: Float[np.ndarray, "subject column"], watched: Watched) -> Seen:
        """The same as tensors."""
        return cls(rows=torch.tensor(rows), time=torch.tensor(watched.time), event=torch.tensor(watched.event))

    def part(self, kept: Int[Tensor, " some"]) -> Seen:
        """Some of the subjects."""
        return Seen(rows=self.rows[kept], time=self.time[kept], event=self.event[kept])


class Likelihood(Protocol):
    """A likelihood of weights `at` that are given as one vector."""

    def bend(self, seen: Seen) -> Float[Tensor, " weight"]:
        """About the second derivative of the misfit along each of the weights."""
        ...

    def misfit(self, seen: Seen, at: Float[Tensor, " weight"]) -> Float[Tensor, ""]:
        """Negative log likelihood, summed over subjects."""
        ...

    def weights(self, at: Float[Tensor, " weight"]) -> Float[Tensor, " some"]:
        """Those that are kept small."""
        ...

    def arrays(
        self, at: Float[np.ndarray, "weight"], seen: Seen, right: Float[np.ndarray, "column dim"]
    ) -> dict[str, np.ndarray]:
        """What a head keeps; `right` turns columns back into features."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Cox:
    """Proportional hazards (Cox 1972): one weight for each column, and Breslow's baseline."""

    ties: Ties

    def bend(self, seen: Seen) -> Float[Tensor, " weight"]:
        """See `Likelihood`."""
        return seen.rows.square().mean(dim=0) * seen.event.sum()

    def misfit(self, seen: Seen, at: Float[Tensor, " weight"]) -> Float[Tensor, ""]:
        """See `Likelihood`."""
        return cox_loss(seen.rows @ at, seen.time, seen.event, ties=self.ties) * seen.event.sum()

    def weights(self, at: Float[Tensor, " weight"]) -> Float[Tensor, " some"]:
        """See `Likelihood`."""
        return at

    def arrays(
        self, at: Float[np.ndarray, "weight"], seen: Seen, right: Float[np.ndarray, "column dim"]
    ) -> dict[str, np.ndarray]:
        """See `Likelihood`."""
        baseline = breslow(Watched(time=seen.time.numpy(), event=seen.event.numpy()), seen.rows.numpy() @ at)
        return {"weight": at @ right, "time": baseline.time, "baseline": baseline.value}


@dataclass(frozen=True, kw_only=True, slots=True)
class Hazard:
    """A constant for each interval, and one vector of weights for all or for each of them."""

    edges: Float[Tensor, " edge"]
    own: bool

    @classmethod
    def of(cls, watched: Watched, intervals: int, *, own: bool) -> Hazard:
        """Intervals with about as many events each; with `own`, each has weights of its own."""
        return cls(edges=torch.tensor(interval_edges(watched, intervals)), own=own)

    def bend(self, seen: Seen) -> Float[Tensor, " weight"]:
        """See `Likelihood`."""
        intervals = len(self.edges) - 1
        each, squares = seen.event.sum() / intervals, seen.rows.square().mean(dim=0)
        weights = (squares * each).repeat(intervals) if self.own else squares * each * intervals
        return torch.cat([each.expand(intervals), weights])

    def misfit(self, seen: Seen, at: Float[Tensor, " weight"]) -> Float[Tensor, ""]:
        """See `Likelihood`."""
        intervals = len(self.edges) - 1
        logits = seen.rows @ self.weights(at).view(-1, seen.rows.shape[1]).T + at[:intervals]
        return hazard_loss(logits, fates(seen.time, seen.event, self.edges)) * len(seen.time)

    def weights(self, at: Float[Tensor, " weight"]) -> Float[Tensor, " some"]:
        """See `Likelihood`."""
        return at[len(self.edges) - 1 :]

    def arrays(
        self, at: Float[np.ndarray, "weight"], seen: Seen, right: Float[np.ndarray, "column dim"]
    ) -> dict[str, np.ndarray]:
        """See `Likelihood`."""
        del seen
        bias, weight = np.split(at, [len(self.edges) - 1])
        weight = np.broadcast_to(weight.reshape(-1, len(right)) @ right, (len(bias), right.shape[1]))
        return {"weight": np.ascontiguousarray(weight), "bias": bias, "edges": self.edges.numpy()}


def minimised(model: Likelihood, seen: Seen, strength: float) -> Float[np.ndarray, "weight"]:
    """Weights of the least misfit plus `strength` / 2 times their squared norm, by L-BFGS in float64."""
    bend = model.bend(seen)
    model.weights(bend).add_(strength)  # in place: these are a part of them
    # Columns of an embedding differ by orders of magnitude: measured in their own bends, all weights learn alike.
    unit = bend.clamp(min=1e-9).rsqrt()

    def loss(at: Float[np.ndarray, "weight"]) -> tuple[float, Float[np.ndarray, "weight"]]:
        point = torch.tensor(at, requires_grad=True)
        value = model.misfit(seen, point * unit) + strength / 2 * model.weights(point * unit).square().sum()
        (slope,) = torch.autograd.grad(value, point)
        return float(value.detach()), slope.numpy()

    steps = {"maxiter": 1000, "maxcor": 20, "ftol": 1e-14, "gtol": 1e-5}
    return minimize(loss, np.zeros(len(unit)), jac=True, method="L-BFGS-B", options=steps).x * unit.numpy()


def constants(
    watched: Watched, risk: Float[np.ndarray, "subject"], edges: Float[np.ndarray, "edge"]
) -> Float[np.ndarray, "interval"]:
    """Log odds of the hazard in each interval for a subject of risk 0, as the likelihood of all would have them.

    With equal risks these are the log odds of the labelled subjects' own hazards. Each interval stands alone: the
    slope of its likelihood falls in its constant, which is halved in on; certainty is `CERTAIN`.

    Args:
        watched: Subjects.
        risk: What is added to every constant for each of them.
        edges: Of the intervals, as `fates` takes them.
    """
    known = fates(torch.tensor(watched.time), torch.tensor(watched.event), torch.tensor(edges))
    passed, came = known.passed.numpy(), known.came.numpy()
    reach = CERTAIN + float(np.abs(risk).max())
    low, high = (np.full(len(edges) - 1, end) for end in (-reach, reach))
    for _ in range(80):
        middle = (low + high) / 2
        hazard = expit(middle + risk[:, None])
        slope = (hazard * (passed | came)).sum(axis=0) - came.sum(axis=0)
        low, high = np.where(slope < 0, middle, low), np.where(slope < 0, high, middle)
    return np.clip((low + high) / 2, -CERTAIN, CERTAIN)


def beran(watched: Watched, weights: Float[np.ndarray, "subject"]) -> Curve:
    """Kaplan and Meier's curve of subjects who count for as much as they are near (Beran 1981).

    It has a step at every observed time. Beyond the last of those who count at all it stays where it is.

    Args:
        watched: Subjects.
        weights: What each counts for, not negative; only their shares matter.
    """
    times, place = np.unique(watched.time, return_inverse=True)
    came = np.bincount(place, weights=weights * watched.event, minlength=len(times))
    at_risk = np.cumsum(np.bincount(place, weights=weights, minlength=len(times))[::-1])[::-1]
    left = 1 - came / np.where(at_risk > 0, at_risk, 1.0)
    return Curve(time=times, value=np.cumprod(np.clip(left, 0.0, 1.0)))


def judged_by(watched: Watched, *, least: float, moments: int) -> dict[str, np.ndarray]:
    """By what a head's outcomes are judged: how long the labelled subjects were watched, and moments in equal steps.

    They end where less than `least` of the labelled subjects would still be watched.

    Raises:
        AuditError: hardly anybody was watched beyond time 0.
    """
    uncensored = censoring(watched)
    fair = uncensored.time[uncensored.value >= least]
    if not len(fair) or fair[-1] <= 0:
        raise AuditError(
            f"less than {least:g} of {len(watched)} labelled subjects are watched beyond time 0: curves "
            "cannot be judged",
            hint="label subjects that were watched for longer, or set head.least lower",
        )
    return {
        "censoring_time": uncensored.time,
        "censoring": uncensored.value,
        "moments": np.linspace(0.0, fair[-1], moments + 1),
    }


def cox_of_sets(said: Float[Tensor, "row out"], known: Float[Tensor, "row 2"]) -> Float[Tensor, ""]:
    """Cox's partial likelihood of one event, the first row, against others who were still watched: all other rows.

    A sample of those who were watched tells as much about risks, if slower, as all of them would (Goldstein & Langholz
    1992; for networks Kvamme, Borgan & Scheel 2019, section 3.2): what is trained on few scans at a time can be.
    """
    del known
    return said[:, 0].logsumexp(dim=0) - said[0, 0]


def hazards_of(watched: Watched, intervals: int) -> Loss:
    """The likelihood of hazards by interval, of a network's one risk above what is usual among these subjects."""
    edges = interval_edges(watched, intervals)
    usual = torch.tensor(constants(watched, np.zeros(len(watched)), edges))
    bounds = torch.tensor(edges)

    def loss(said: Float[Tensor, "row out"], known: Float[Tensor, "row 2"]) -> Float[Tensor, ""]:
        told = known.double()
        found = fates(told[:, 0], told[:, 1] > 0, bounds.to(told.device))
        return hazard_loss(said.double() + usual.to(told.device), found)

    return loss


@dataclass(frozen=True, slots=True)
class Concordance(metrics.Counted):
    """Harrell's or Uno's C of subjects."""

    uno: bool

    def counted(
        self, outcomes: Sequence[Foretold], counts: Float[np.ndarray, "draw subject"]
    ) -> Float[np.ndarray, "draw"]:
        """Compute the figure in each draw."""
        watched = Watched.of(outcome.truth for outcome in outcomes)
        risk = np.array([outcome.risk for outcome in outcomes])
        weights = np.array([outcome.weight if self.uno else 1.0 for outcome in outcomes])
        return counted_concordance(counts, watched, risk, weights)
