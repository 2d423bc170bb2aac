"""Any set of contrasts of one session -> one description, whatever their number and order.

Every contrast gives its own opinion of the subject as a Gaussian; a product of experts weighs them by how sure they
are (Hinton 2002; with the prior as one more expert: Wu and Goodman 2018). What is particular to each contrast becomes
a token that says which contrast it is, and attention pools the tokens. A contrast that is not there counts for
nothing; one that training never saw is the contrast `unknown`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from voxelstem.backbones.encoder import init_linear
from voxelstem.backbones.pools import AttentionPool
from voxelstem.chance import Chance

ABSENT = -1
"""Index of a contrast that a patient does not have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gaussian:
    """A belief about each cell: its mean, and the logarithm of its variance."""

    mean: Float[Tensor, "row *rest"]
    logvar: Float[Tensor, "row *rest"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Indexed:
    """Which contrasts each patient has, as numbers."""

    index: Int64[Tensor, "row contrast"]
    """Place in the list of known contrasts, one past its end for an unknown one, `ABSENT` where there is none."""
    unseen: Mapping[str, int]
    """Names that training never saw, and how often they came."""

    @property
    def present(self) -> Bool[Tensor, "row contrast"]:
        """Where there is a scan."""
        return self.index != ABSENT


def index_contrasts(rows: Sequence[Sequence[str]], known: Sequence[str]) -> Indexed:
    """Number the contrasts of each patient; shorter sets are filled up with `ABSENT`.

    Raises:
        ValueError: a patient without any contrast, or a known contrast that is named twice.
    """
    if len(set(known)) != len(known):
        raise ValueError(f"each known contrast is named once, got {', '.join(known)}")
    empty = [number for number, names in enumerate(rows) if not names]
    if empty or not rows:
        raise ValueError(f"every row needs at least one contrast; there is none in row {empty[0] if empty else 0}")
    places = {name: place for place, name in enumerate(known)}
    widest = max(map(len, rows))
    index = [[places.get(name, len(known)) for name in names] + [ABSENT] * (widest - len(names)) for names in rows]
    unseen = Counter(name for names in rows for name in names if name not in places)
    return Indexed(index=torch.tensor(index), unseen=dict(unseen))


def product_of_experts(
    mean: Float[Tensor, "row contrast *rest"],
    logvar: Float[Tensor, "row contrast *rest"],
    present: Bool[Tensor, "row contrast"],
) -> Gaussian:
    """Multiply the contrasts' Gaussians with each other and with N(0, 1), the expert that is always there.

    1 / variance = 1 + sum of 1 / variance_i, and mean = variance * sum of mean_i / variance_i. The weights are a
    softmax over -logvar (0 for the prior), so no variance is too small or too large for floating point. Without any
    contrast the prior is left: mean 0, logvar 0. What stands in place of an absent contrast never enters, not even NaN.
    """
    there = present.view(*present.shape, *[1] * (mean.ndim - 2))
    precision = torch.where(there, -logvar.float(), -torch.inf)
    prior = torch.zeros_like(precision[:, :1])
    total = torch.logsumexp(torch.cat([prior, precision], dim=1), dim=1)
    weight = (precision - total[:, None]).exp()
    return Gaussian(mean=(weight * torch.where(there, mean.float(), 0.0)).sum(dim=1), logvar=-total)


def drop_contrasts(present: Bool[Tensor, "row contrast"], chance: Chance, share: float) -> Bool[Tensor, "row contrast"]:
    """Leave out each contrast with probability `share`, but never a patient's last one (modality dropout).

    Args:
        present: Where there is a scan.
        chance: A key for each row.
        share: In [0, 1); 0 leaves all there.

    Raises:
        ValueError: a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share of dropped contrasts lies in [0, 1), got {share}")
    drawn = chance.purpose("dropped contrasts").uniform(present.shape[1])
    drawn = torch.where(present, drawn, -1.0)
    best = drawn == drawn.amax(dim=1, keepdim=True)
    return present & ((drawn >= share) | best)


def hide_names(index: Int[Tensor, "row contrast"], chance: Chance, share: float, *, unknown: int) -> Tensor:
    """Call a `share` of the contrasts `unknown`, so that the token for what training never saw is trained too."""
    drawn = chance.purpose("hidden names").uniform(index.shape[1])
    return torch.where((drawn < share) & (index != ABSENT), unknown, index)


@dataclass(frozen=True, kw_only=True, slots=True)
class SetConfig:
    """What is made of a set of contrasts."""

    contrasts: tuple[str, ...] = ("T1w", "T2w", "FLAIR", "DWI")
    """Those that training sees; all others are `unknown`."""
    dim: int = 64
    """Of a contrast's token."""
    heads: int = 4
    outputs: int = 1
    """Numbers that the head answers with: 1 logit for yes or no, a logit for each class, or values."""
    drop: float = 0.3
    """Share of contrasts that are left out in training."""
    hide: float = 0.1
    """Share of contrasts whose name is hidden in training."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: one is out of range, or a contrast is named twice.
        """
        if not self.contrasts or len(set(self.contrasts)) != len(self.contrasts):
            raise ValueError(f"contrasts are named, each once, got {self.contrasts}")
        if min(self.dim, self.heads, self.outputs) < 1 or self.dim % self.heads:
            raise ValueError(
                "dim, heads and outputs must be >= 1 and heads divide dim, got "
                f"{self.dim}, {self.heads} and {self.outputs}"
            )
        if not (0 <= self.drop < 1 and 0 <= self.hide < 1):
            raise ValueError(f"drop and hide lie in [0, 1), got {self.drop} and {self.hide}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SetLatents:
    """What a disentangling network said of each contrast of some patients; anything may stand where none is."""

    subject: Gaussian
    """(row, contrast, channel, a, b, c)."""
    contrast: Float[Tensor, "row contrast channel a b c"]
    """Means of the contrast's own latent."""
    index: Int64[Tensor, "row contrast"]
    """As in `Indexed`."""


def encode_set(
    network: Any, scans: Float[Tensor, "row contrast 1 i j k"], index: Int64[Tensor, "row contrast"]
) -> SetLatents:
    """Give every scan that is there to the network, all in one pass; absent ones are not computed.

    Args:
        network: Has `latents(x)` as `backbones.disentangled.Disentangled` has.
        scans: Normalised as the network wants them.
        index: As in `Indexed`.
    """
    present = index != ABSENT
    latents = network.latents(scans[present])

    def spread(part: Tensor) -> Tensor:
        return part.new_zeros(*present.shape, *part.shape[1:]).masked_scatter(
            present.view(*present.shape, *[1] * (part.ndim - 1)), part
        )

    mean, logvar = latents.subject_mean, latents.subject_logvar
    # Without variances all contrasts are equally sure.
    subject = Gaussian(mean=spread(mean), logvar=spread(torch.zeros_like(mean) if logvar is None else logvar))
    return SetLatents(subject=subject, contrast=spread(latents.contrast_mean), index=index)


class ContrastSet(nn.Module):
    """A head for answers about a patient from any set of contrasts; the same answer in whatever order they come."""

    Config = SetConfig

    def __init__(self, config: SetConfig, channels: int) -> None:
        """`channels` of each of the network's two latents (256 for the released one).

        The token of the unknown contrast begins at 0, in the middle of the others: it says nothing until it is trained.
        """
        super().__init__()
        self.config = config
        self.unknown = len(config.contrasts)
        # Mean and maximum over cells: a small lesion is lost in a mean.
        self.describe = nn.Linear(4 * channels, config.dim)
        self.identity = nn.Embedding(self.unknown + 1, config.dim)
        self.pool = AttentionPool(config.dim, config.heads, mlp_ratio=2.0)
        self.shared = nn.Linear(2 * channels, config.dim)
        self.answer = nn.Sequential(nn.LayerNorm(2 * config.dim), nn.Linear(2 * config.dim, config.outputs))
        for part in (self.describe, self.shared, self.answer):
            part.apply(init_linear)
        nn.init.trunc_normal_(self.identity.weight, std=0.02)
        with torch.no_grad():
            self.identity.weight[self.unknown] = 0.0

    def forward(self, latents: SetLatents, *, chance: Chance | None = None) -> Float[Tensor, "row output"]:
        """Answer for each patient; `chance` has a key for each row, and without it nothing is dropped or hidden.

        Raises:
            ValueError: a patient without any contrast.
        """
        return self.answer(self.embed(latents, chance=chance))

    def embed(self, latents: SetLatents, *, chance: Chance | None = None) -> Float[Tensor, "row 2*dim"]:
        """One vector for each patient: what its contrasts agree on, and what each says for itself.

        Raises:
            ValueError: a patient without any contrast.
        """
        index, present = latents.index, latents.index != ABSENT
        if not bool(present.any(dim=1).all()):
            raise ValueError("every row needs at least one contrast")
        if chance is not None:
            present = drop_contrasts(present, chance, self.config.drop)
            index = hide_names(index, chance, self.config.hide, unknown=self.unknown)
        agreed = product_of_experts(latents.subject.mean, latents.subject.logvar, present).mean
        own = torch.cat([_summary(latents.subject.mean), _summary(latents.contrast)], dim=-1)
        own = torch.where(present[..., None], own, 0.0)
        tokens = self.describe(own) + self.identity(index.clamp(min=0))
        return torch.cat([self.shared(_summary(agreed)), self.pool(tokens, present.float())], dim=-1)


def prototypes(
    contrast: Float[Tensor, "row channel a b c"], index: Int[Tensor, " row"], *, known: int
) -> Float[Tensor, "known channel"]:
    """What is typical of each known contrast: the mean of its latent over scans and cells; NaN where none came."""
    vectors = contrast.flatten(2).mean(dim=2)
    rows = [vectors[index == place].mean(dim=0) for place in range(known)]
    return torch.stack(rows)


def synthesise(
    network: Any, subject: Float[Tensor, "row channel a b c"], prototype: Float[Tensor, " channel"]
) -> Float[Tensor, "row 1 i j k"]:
    """Show the patients in a contrast that they do not have: what the set says of them, with its prototype.

    Args:
        network: Has `reconstruct(subject, contrast)`.
        subject: Means of the product of experts.
        prototype: A row of `prototypes`.

    Raises:
        ValueError: no scan of this contrast was there to make the prototype of.
    """
    if not bool(prototype.isfinite().all()):
        raise ValueError("no scan of the wanted contrast was seen, so it has no prototype")
    return network.reconstruct(subject, prototype.view(1, -1, 1, 1, 1).expand(len(subject), -1, *subject.shape[2:]))


def _summary(latent: Float[Tensor, "*lead channel a b c"]) -> Float[Tensor, "*lead 2*channel"]:
    """Mean and maximum over the cells."""
    cells = latent.flatten(-3)
    return torch.cat([cells.mean(dim=-1), cells.amax(dim=-1)], dim=-1)
