"""Which members of a bag matter: gated attention over the frozen vectors of a scan, then one linear map.

A scan's embedding averages over its blocks or patches, and a finding in a few of them drowns in the rest. Here a head
learns from labels of whole scans which members to look at (multiple-instance learning; Ilse et al. 2018, "Attention-
based deep multiple instance learning", equation 9). How much it looked at each can be shown to a reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from scipy.special import softmax
from torch import Tensor

from voxelstem.heads.bags import Kind, Wanted, bag_of
from voxelstem.protocols import Features, Head

Loss = Callable[[Float[Tensor, "row out"], Int[np.ndarray, "row"]], Float[Tensor, ""]]
"""Of the logits of some bags, and of which ones these are: their places among all that are fitted."""
ROWS_AT_ONCE = 1 << 13
"""Members that a fitted head looks at in one go; bounds the memory of a whole body in fine patches."""
PRIOR = 10.0
"""The spread of a column is estimated as if this many more bags had shown the average spread of all columns."""
LEAST_SPREAD = 0.01
"""Mean vectors of bags are taken to spread by at least this share of what their members do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttendConfig:
    """What attention pooling looks at, and how it is fitted."""

    bag: Wanted = "auto"
    """What is looked at: a scan's blocks, or its patches. `auto`: blocks if most of the scans have several of them."""
    hidden: int = 32
    """Rows of V and of U in equation 9."""
    steps: int = 200
    """Steps of AdamW at most; the subjects that are held out in turn say how many."""
    few_steps: int = 50
    """Steps where too few subjects are labelled to hold any of them out."""
    every: int = 10
    """Steps between two looks at those who are held out."""
    folds: int = 4
    """Parts of the subjects that are held out in turn."""
    enough: int = 10
    """Labelled subjects of every class that it takes to hold any out."""
    batch: int = 16
    """Bags of one step."""
    lr: float = 0.01
    decay: float = 1.0
    """AdamW's weight decay (times `lr`, at every step), on all but the bias."""
    drop: float = 0.2
    """Share of a bag's members that a step leaves out, drawn anew each time."""
    most: int = 4096
    """Members of a bag that are learned from; of a larger bag as many are drawn, once. A prediction looks at all."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a count, rate or share without sense.
        """
        counts = (self.hidden, self.steps, self.few_steps, self.every, self.enough, self.batch, self.most)
        if min(counts) < 1 or self.folds < 2:  # noqa: PLR2004 - one part cannot be held out
            raise ValueError("attention takes at least 2 folds, and at least 1 of whatever else is counted")
        if self.lr <= 0 or self.decay < 0 or not 0 <= self.drop < 1:
            raise ValueError("lr must be positive, decay not negative, and drop a share below 1")
        if self.lr * self.decay >= 1:
            raise ValueError(f"lr * decay must be below 1, got {self.lr * self.decay:g}: a step would undo all others")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Attention:
    """A fitted head: gated attention over standardised members, and a linear map of what it pools."""

    middle: Float[np.ndarray, "dim"]
    scale: Float[np.ndarray, "dim"]
    """A member h is seen as (h - middle) / scale."""
    look: Float[np.ndarray, "hidden dim"]
    """V of equation 9."""
    gate: Float[np.ndarray, "hidden dim"]
    """U of equation 9."""
    rank: Float[np.ndarray, "hidden"]
    """w of equation 9."""
    weight: Float[np.ndarray, "out dim"]
    bias: Float[np.ndarray, "out"]

    def __post_init__(self) -> None:
        """See that the arrays fit together.

        Raises:
            ValueError: they do not, or hold what is no number.
        """
        dim, hidden, out = len(self.middle), len(self.rank), len(self.bias)
        wanted = {"middle": (dim,), "scale": (dim,), "look": (hidden, dim), "gate": (hidden, dim), "rank": (hidden,)}
        wanted |= {"weight": (out, dim), "bias": (out,)}
        for name, array in self.arrays().items():
            if array.shape != wanted[name]:
                raise ValueError(f"attention's '{name}' must have the shape {wanted[name]}, got {array.shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"attention's '{name}' is not finite")

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Attention:
        """Undo `arrays`; others among them are left alone.

        Raises:
            ValueError: one is missing, or they do not fit together.
        """
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"attention's '{missing[0]}' is missing")
        return cls(**{name: arrays[name] for name in names})

    def weights(self, bag: Float[np.ndarray, "member dim"]) -> Float[np.ndarray, "member"]:
        """How much each member is looked at: shares that add up to 1 (equation 9).

        Raises:
            ValueError: the bag is empty, or its vectors are not of this head's kind.
        """
        if bag.ndim != 2 or not len(bag) or bag.shape[1] != len(self.middle):  # noqa: PLR2004 - member, dim
            raise ValueError(f"a bag is members of {len(self.middle)} numbers, got the shape {bag.shape}")
        scores = [
            (np.tanh(part @ self.look.T) / (1 + np.exp(-np.clip(part @ self.gate.T, -500, None)))) @ self.rank
            for part in self._standard(bag)
        ]
        return softmax(np.concatenate(scores))

    def pooled(self, bag: Float[np.ndarray, "member dim"]) -> Float[np.ndarray, "dim"]:
        """Sum of the standardised members, each by its share (equation 7).

        Raises:
            ValueError: as `weights`.
        """
        shares, start, total = self.weights(bag), 0, np.zeros(len(self.middle))
        for part in self._standard(bag):
            total += shares[start : start + len(part)] @ part
            start += len(part)
        return total

    def score(self, bag: Float[np.ndarray, "member dim"]) -> Float[np.ndarray, "out"]:
        """Logits of a bag; the order of its members does not matter.

        Raises:
            ValueError: as `weights`.
        """
        return self.weight @ self.pooled(bag) + self.bias

    def _standard(self, bag: Float[np.ndarray, "member dim"]) -> Iterator[Float[np.ndarray, "part dim"]]:
        for start in range(0, len(bag), ROWS_AT_ONCE):
            yield (bag[start : start + ROWS_AT_ONCE].astype(np.float64) - self.middle) / self.scale


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scored:
    """What a head says of a scan, and where it looked."""

    logits: Float[np.ndarray, "out"]
    kind: Kind
    """What it looked at."""
    shares: Float[np.ndarray, "gi gj gk"]
    """How much it looked at each block or patch, as they lie in the scan; all of them add up to 1."""


def score(head: Head, features: Features) -> Scored:
    """What a task's head says of a scan: its arrays are an `Attention`, and its fact `bag` says what it looks at.

    Raises:
        ValueError: the scan has no such vectors, or the head is of another sort.
    """
    attention, bag = Attention.of(head.arrays), bag_of(features, cast(Kind, head.facts["bag"]))
    shares = attention.weights(bag.members).reshape(bag.grid)
    return Scored(logits=attention.score(bag.members), kind=bag.kind, shares=shares)


def pool(
    members: Float[Tensor, "member dim"],
    lengths: Sequence[int],
    look: Float[Tensor, "hidden dim"],
    gate: Float[Tensor, "hidden dim"],
    rank: Float[Tensor, "hidden"],
) -> Float[Tensor, "bag dim"]:
    """Gated attention pooling of bags that lie one after the other (Ilse et al. 2018, equations 7 and 9).

    z = sum_k a_k h_k with a = softmax_k(w . (tanh(V h_k) * sigmoid(U h_k))); `look`, `gate` and `rank` are V, U and w.
    """
    scores = ((members @ look.T).tanh() * (members @ gate.T).sigmoid()) @ rank
    each = zip(scores.split(list(lengths)), members.split(list(lengths)), strict=True)
    return torch.stack([score.softmax(dim=0) @ bag for score, bag in each])


def parts_of(
    subjects: Sequence[str], strata: Shaped[np.ndarray, "bag"], config: AttendConfig, *, seed: int
) -> Int[np.ndarray, "bag"]:
    """Of each bag the part of the subjects that it is held out with; all 0 where there are too few of a stratum.

    Args:
        subjects: Of each bag; those of one subject go together.
        strata: Of each bag the class, or whatever else every part should see; a subject's first counts.
        config: How many parts, and what is enough.
        seed: Of the draw.
    """
    first = {subject: index for index, subject in reversed(list(enumerate(subjects)))}
    names = np.array(sorted(first))
    kinds = strata[[first[str(name)] for name in names]]
    if min(np.unique(kinds, return_counts=True)[1]) < max(config.enough, config.folds):
        return np.zeros(len(subjects), dtype=np.int64)
    rng = np.random.default_rng([seed, 1])
    turns = np.concatenate([rng.permutation(np.flatnonzero(kinds == kind)) for kind in np.unique(kinds)])
    part = {str(names[turn]): place % config.folds for place, turn in enumerate(turns)}
    return np.array([part[subject] for subject in subjects])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fitted:
    """A fitted head, and how many steps it took: with 0 it says of all bags the same."""

    attention: Attention
    steps: int


def fit(
    bags: Sequence[Float[np.ndarray, "_ dim"]],
    loss: Loss,
    out: int,
    *,
    config: AttendConfig,
    parts: Int[np.ndarray, "bag"],
    seed: int,
) -> Fitted:
    """Fit attention and the linear map above it together. The same seed gives the same head.

    The first step stands at mean pooling and at a map that says 0 of every bag. Where there are several parts, each is
    held out in turn, and all bags are then learned from for as many steps as served those that were held out best:
    none at all if none did.

    Args:
        bags: Their frozen vectors; bags may differ in length.
        loss: To be made small: of the logits of some bags, and of which ones these are.
        out: How many logits there are.
        config: How.
        parts: Of each bag the part that it is held out with, as `parts_of` gives them.
        seed: Of the first weights, the batches and what they leave out.

    Raises:
        ValueError: no bag, an empty one, vectors of different lengths, parts of another number of bags, or a loss that
            is no number.
    """
    if not bags or any(bag.ndim != 2 or not len(bag) or bag.shape[1] != bags[0].shape[1] for bag in bags):  # noqa: PLR2004
        raise ValueError("attention is fitted to bags of at least one member, all vectors of one length")
    if len(parts) != len(bags):
        raise ValueError(f"there must be one part for each of the {len(bags)} bags, got {len(parts)}")
    problem = _Problem.of(bags, loss, out, config, seed)
    everyone, steps = np.arange(len(bags)), config.few_steps
    if len(np.unique(parts)) > 1:
        curve = np.zeros(config.steps // config.every + 1)
        for part in np.unique(parts):
            held = everyone[parts == part]
            descent = problem.descend(everyone[parts != part], config.steps, held=held, seed=seed)
            curve += np.array(descent.curve) * len(held)
        if not np.isfinite(curve).all():
            raise ValueError("the loss of the bags that were held out is not finite")
        steps = config.every * int(curve.argmin())
    learned = problem.descend(everyone, steps, held=everyone[:0], seed=seed).learned
    return Fitted(attention=problem.finish(learned), steps=steps)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Learned:
    """What the steps change."""

    look: Tensor
    gate: Tensor
    rank: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Descent:
    learned: _Learned
    curve: tuple[float, ...]
    """Loss of the bags that were held out: before the first step, and after every few."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Problem:
    """Bags to be learned from."""

    bags: tuple[Float[np.ndarray, "_ dim"], ...]
    loss: Loss
    out: int
    config: AttendConfig
    middle: Float[np.ndarray, "dim"]
    scale: Float[np.ndarray, "dim"]
    spread: float
    """Root mean square length of the bags' standardised means."""

    @classmethod
    def of(
        cls, bags: Sequence[Float[np.ndarray, "_ dim"]], loss: Loss, out: int, config: AttendConfig, seed: int
    ) -> _Problem:
        """Thin large bags, and measure them all; each bag weighs alike."""
        rng = np.random.default_rng([seed, 2])
        thinned = tuple(
            bag if len(bag) <= config.most else bag[np.sort(rng.permutation(len(bag))[: config.most])] for bag in bags
        )
        means = np.stack([bag.mean(axis=0, dtype=np.float64) for bag in thinned])
        middle = means.mean(axis=0)
        variance = np.mean([np.square(bag - middle).mean(axis=0) for bag in thinned], axis=0)
        shrunk = np.sqrt((len(bags) * variance + PRIOR * variance.mean()) / (len(bags) + PRIOR))
        floor = 1e-6 * np.maximum(np.abs(means).max(axis=0), 1e-6)
        # Members of length 1 on average: what a step changes does not grow with the dimension.
        scale = np.where(shrunk > floor, shrunk, 1.0) * math.sqrt(len(middle))
        spread = float(np.sqrt(np.square((means - middle) / scale).sum(axis=1).mean()))
        return cls(
            bags=thinned,
            loss=loss,
            out=out,
            config=config,
            middle=middle.astype(np.float32),
            scale=scale.astype(np.float32),
            spread=max(spread, LEAST_SPREAD),
        )

    def descend(
        self, rows: Int[np.ndarray, "row"], steps: int, *, held: Int[np.ndarray, "held"], seed: int
    ) -> _Descent:
        """Learn from some of the bags, and look every now and then at those that are held out."""
        rng = np.random.default_rng([seed, 3])
        learned = self._start(rng)
        free = [learned.look, learned.gate, learned.rank, learned.weight]
        groups = [{"params": free, "weight_decay": self.config.decay}, {"params": [learned.bias], "weight_decay": 0.0}]
        solver = torch.optim.AdamW(groups, lr=self.config.lr)
        curve: list[float] = []
        for step, batch in zip(range(steps + 1), self._batches(rows, rng), strict=False):
            if len(held) and step % self.config.every == 0:
                with torch.no_grad():
                    curve.append(float(self.loss(self._logits(learned, held, None), held)))
            if step < steps:
                solver.zero_grad()
                self.loss(self._logits(learned, batch, rng), batch).backward()
                solver.step()
        return _Descent(learned=learned, curve=tuple(curve))

    def finish(self, learned: _Learned) -> Attention:
        """What was learned, as plain arrays."""
        return Attention(
            middle=self.middle,
            scale=self.scale,
            look=learned.look.detach().numpy(),
            gate=learned.gate.detach().numpy(),
            rank=learned.rank.detach().numpy(),
            weight=learned.weight.detach().numpy() / np.float32(self.spread),
            bias=learned.bias.detach().numpy(),
        )

    def _start(self, rng: np.random.Generator) -> _Learned:
        """Mean pooling, as `rank` is 0; a linear map of 0."""
        dim, hidden = len(self.middle), self.config.hidden
        drawn = [torch.from_numpy(rng.normal(size=(hidden, dim)).astype(np.float32)) for _ in range(2)]
        zeros = torch.zeros(hidden), torch.zeros(self.out, dim), torch.zeros(self.out)
        look, gate, rank, weight, bias = (tensor.requires_grad_() for tensor in (*drawn, *zeros))
        return _Learned(look=look, gate=gate, rank=rank, weight=weight, bias=bias)

    def _batches(self, rows: Int[np.ndarray, "row"], rng: np.random.Generator) -> Iterator[Int[np.ndarray, "batch"]]:
        """Turn after turn through the bags, in an order drawn anew; what is left of a turn is left out."""
        size = min(self.config.batch, len(rows))
        while True:
            order = rng.permutation(rows)
            for start in range(0, len(order) - size + 1, size):
                yield order[start : start + size]

    def _logits(
        self, learned: _Learned, rows: Int[np.ndarray, "row"], rng: np.random.Generator | None
    ) -> Float[Tensor, "row out"]:
        """Of some bags: of all their members, or of those that `rng` leaves."""
        parts = [self.bags[row] for row in rows]
        if rng is not None and self.config.drop:
            parts = [part[_kept(len(part), self.config.drop, rng)] for part in parts]
        members = torch.from_numpy((np.concatenate(parts) - self.middle) / self.scale).float()
        pooled = pool(members, [len(part) for part in parts], learned.look, learned.gate, learned.rank)
        # In units of how far the bags' means lie apart, which is little where bags are large.
        return pooled / self.spread @ learned.weight.T + learned.bias


def _kept(count: int, drop: float, rng: np.random.Generator) -> Int[np.ndarray, "kept"]:
    """Which members stay: at least one."""
    kept = np.flatnonzero(rng.random(count) >= drop)
    return kept if len(kept) else rng.integers(count, size=1)
