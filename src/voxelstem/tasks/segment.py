"""A label for every voxel: one linear map from a frozen patch token to the cells of its patch, or queries above it.

The linear head sees nothing but single tokens, so what it can do shows what the tokens know. In mode `attention` a
query for each class looks at all tokens of the scan first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from voxelstem import geometry, metrics
from voxelstem.heads import queries
from voxelstem.protocols import Example, Features, Head
from voxelstem.study import LabelMap
from voxelstem.surfaces import surface_dice
from voxelstem.views import cells, resample
from voxelstem.views.slide import Slab
from voxelstem.views.winners import winners

SURFACE = "nsd:"
"""Before an organ's name among the figures of a scan: its surface Dice."""
ROWS_AT_ONCE = 1 << 22
"""How many logits are interpolated in one go (16 MiB); bounds the memory of a prediction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Settings of the voxel-level head, and the head itself."""

    modes: ClassVar[tuple[str, ...]] = ("probe", "attention")
    metrics: ClassVar[tuple[str, ...]] = ("dice", "nsd")
    voxels: ClassVar[bool] = True
    tunable: ClassVar[bool] = True

    sub: int = 2
    """A token decides on this many cells along each axis of its patch."""
    balance: float = 0.5
    """A class of share s weighs s^-balance: 0 counts voxels, 1 counts classes."""
    decay: float = 1e-3
    """Weight of the squared norm of the head in its loss."""
    iterations: int = 60
    """Steps of L-BFGS; the problem is convex."""
    tokens: int = 6000
    """How many labelled tokens are used at most; tokens without any organ are thinned out first."""
    tolerance_mm: float = 2.0
    """How far apart two surfaces may lie and still agree, in the figure `nsd`: what readers differ by."""
    queries: queries.QueryConfig = field(default_factory=queries.QueryConfig)
    """How large the decoder of `attention` is, and how it is fitted."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a count below 1, or a negative weight.
        """
        if min(self.sub, self.iterations, self.tokens) < 1:
            raise ValueError("sub, iterations and tokens must be at least 1")
        if min(self.balance, self.decay) < 0 or not 0 < self.tolerance_mm < math.inf:
            raise ValueError("balance and decay must not be negative, and tolerance_mm positive")

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        """Fit the head to labelled scans. `classes` names the organs; background comes before them by itself.

        Raises:
            ValueError: an unknown mode, or an example without tokens or labels.
        """
        if mode not in self.modes:
            raise ValueError(f"segment has no mode '{mode}'")
        return self._probe(examples, classes, seed) if mode == "probe" else self._attend(examples, classes, seed)

    def looks_at_tokens(self, mode: str) -> bool:
        """Scans must come with patch tokens in every mode."""
        del mode
        return True

    def logits(self, head: Head, tokens: Float[np.ndarray, "ti tj tk dim"]) -> Float[np.ndarray, "ci cj ck kinds"]:
        """What the head says about every cell; kind 0 is background.

        In mode `attention` it looks at all the tokens that it is given: those of padding are better left out.
        """
        sub, kinds = int(head.facts["sub"]), len(head.classes) + 1
        ti, tj, tk = tokens.shape[:3]
        if head.mode == "attention":
            rows = tokens.reshape(-1, tokens.shape[3])
            flat = queries.logits(head.arrays, rows, kinds=kinds, heads=int(head.facts["heads"]))
        else:
            flat = (tokens - head.arrays["middle"]) / head.arrays["scale"] @ head.arrays["weight"] + head.arrays["bias"]
        spread = flat.reshape(ti, tj, tk, sub, sub, sub, kinds).transpose(0, 3, 1, 4, 2, 5, 6)
        return spread.reshape(ti * sub, tj * sub, tk * sub, kinds)

    def predict(
        self, head: Head, features: Features, affine_ras: Float[np.ndarray, "4 4"], shape_ijk: tuple[int, int, int]
    ) -> LabelMap:
        """Label every voxel of a scan: logits between the centres of cells are interpolated linearly."""
        tokens, tokens_affine = _tokens(features)
        if head.mode == "attention":
            tokens, tokens_affine = _within(tokens, tokens_affine, affine_ras, shape_ijk)
        sub = int(head.facts["sub"])
        grid = cells.lay(affine_ras, shape_ijk, tokens_affine, _size(tokens), sub=sub)
        logits = torch.from_numpy(np.ascontiguousarray(self.logits(head, tokens).transpose(3, 0, 1, 2))).float()
        return LabelMap(array=argmax_at(logits, grid), classes=dict(enumerate(head.classes, start=1)))

    def mark(
        self, head: Head, features: Features, affine_ras: Float[np.ndarray, "4 4"], shape_ijk: tuple[int, int, int]
    ) -> Int[np.ndarray, "i j k"]:
        """`predict` in bounded memory: logits of a few rows of tokens live at a time, along their longest axis."""
        tokens, tokens_affine = _tokens(features)
        if head.mode == "attention":
            tokens, tokens_affine = _within(tokens, tokens_affine, affine_ras, shape_ijk)
        sub, axis = int(head.facts["sub"]), int(np.argmax(tokens.shape[:3]))
        grid = cells.lay(affine_ras, shape_ijk, tokens_affine, _size(tokens), sub=sub)
        return winners(self._slabs(head, tokens, axis, sub), grid, axis=axis)

    def _slabs(self, head: Head, tokens: Float[np.ndarray, "ti tj tk dim"], axis: int, sub: int) -> Iterator[Slab]:
        # Where tokens look at each other, none can be asked without the others.
        rows = tokens.shape[axis] if head.mode == "attention" else 1
        for start in range(0, tokens.shape[axis], rows):
            part = np.take(tokens, range(start, min(start + rows, tokens.shape[axis])), axis=axis)
            logits = np.ascontiguousarray(self.logits(head, part).transpose(3, 0, 1, 2))
            yield Slab(start=start * sub, values=torch.from_numpy(logits).float())

    def outcome(self, head: Head, example: Example) -> dict[str, float]:
        """Dice of every organ that the truth of one scan holds, and its surface Dice by `nsd:` before the name.

        Both on the scan's own grid.

        Raises:
            ValueError: the example has no voxel labels.
        """
        if example.labels is None:
            raise ValueError("a voxel-level task needs voxel labels")
        shape = example.labels.array.shape
        predicted = self.predict(head, example.features, example.affine_ras, (shape[0], shape[1], shape[2]))
        return self._figures(predicted.array, example.labels, example.affine_ras, head.classes)

    def outcome_of_labels(
        self, carried: LabelMap, truth: LabelMap, affine_ras: Float[np.ndarray, "4 4"], classes: tuple[str, ...]
    ) -> dict[str, float]:
        """`outcome` of a label map that came from elsewhere, such as an atlas, on the scan's own grid."""
        return self._figures(numbered(carried, classes), truth, affine_ras, classes)

    def _figures(
        self,
        predicted: Integer[np.ndarray, "i j k"],
        truth: LabelMap,
        affine_ras: Float[np.ndarray, "4 4"],
        classes: tuple[str, ...],
    ) -> dict[str, float]:
        found, wanted = compare(predicted, truth, classes), numbered(truth, classes)
        apart = geometry.spacing_mm(affine_ras)
        surfaces = {
            SURFACE + name: surface_dice(predicted == kind, wanted == kind, apart, tolerance_mm=self.tolerance_mm)
            for kind, name in enumerate(classes, start=1)
            if name in found
        }
        return found | surfaces

    def combine(self, outcomes: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Average each organ over a subject's scans."""
        names = dict.fromkeys(name for outcome in outcomes for name in outcome)
        return {name: metrics.mean([outcome[name] for outcome in outcomes if name in outcome]) for name in names}

    def statistic(self, metric: str) -> Callable[[Sequence[Mapping[str, float]]], float]:
        """`dice`: mean over subjects of their mean over organs; `dice:liver`: of one organ, where it is present.

        `nsd` and `nsd:liver` likewise: normalised surface Dice at `tolerance_mm`.
        """
        kind, _, organ = metric.partition(":")
        if organ:
            name = SURFACE + organ if kind == "nsd" else organ
            return metrics.MeanOf(lambda outcome: outcome.get(name, math.nan))
        return metrics.MeanOf(lambda outcome: metrics.mean(list(of_kind(outcome, kind).values())))

    def _probe(self, examples: Sequence[Example], classes: tuple[str, ...], seed: int) -> Head:
        """Fit the linear map to single tokens that hold at least one voxel."""
        parts = [self._labelled_tokens(example, classes) for example in examples]
        rows, counts = (np.concatenate(side) for side in zip(*parts, strict=True))
        kept, importance = _thin(counts, self.tokens, seed)
        rows, counts = rows[kept], counts[kept] * importance[:, None, None]
        middle, scale = rows.mean(axis=0), np.maximum(rows.std(axis=0), 1e-6)
        weight, bias = self._descend((rows - middle) / scale, counts)
        arrays = {"middle": middle, "scale": scale, "weight": weight, "bias": bias}
        return Head(mode="probe", classes=classes, arrays=arrays, facts={"sub": float(self.sub)})

    def _attend(self, examples: Sequence[Example], classes: tuple[str, ...], seed: int) -> Head:
        """Fit the linear map, and above it queries that see the tokens of a scan together."""
        probe = self._probe(examples, classes, seed)
        fitted = queries.fit(
            [self._celled(example, classes, seed) for example in examples],
            queries.Linear(**probe.arrays),
            balance=self.balance,
            config=self.queries,
            seed=seed,
        )
        facts: dict[str, float | str] = {"heads": float(self.queries.heads), "steps": float(fitted.steps)}
        return Head(mode="attention", classes=classes, arrays=fitted.arrays, facts=probe.facts | facts)

    def _celled(self, example: Example, classes: tuple[str, ...], seed: int) -> queries.Celled:
        """The tokens of the box of the scan, without the padding around it, and what their cells hold."""
        tokens, tokens_affine = _tokens(example.features)
        if example.labels is None:
            raise ValueError("a voxel-level task needs voxel labels")
        shape = example.labels.array.shape
        tokens, tokens_affine = _within(tokens, tokens_affine, example.affine_ras, (shape[0], shape[1], shape[2]))
        counts = self._counted(example, classes, tokens_affine, _size(tokens))
        kept, importance = _thin(counts, self.queries.most, seed)
        rows = tokens.reshape(-1, tokens.shape[3])[kept].astype(np.float32)
        return queries.Celled(subject=example.subject, tokens=rows, counts=counts[kept], importance=importance)

    def _labelled_tokens(
        self, example: Example, classes: tuple[str, ...]
    ) -> tuple[Float[np.ndarray, "token dim"], Float[np.ndarray, "token cell kind"]]:
        """Tokens that hold at least one voxel, and how many voxels of each kind each of their cells holds."""
        tokens, tokens_affine = _tokens(example.features)
        counts = self._counted(example, classes, tokens_affine, _size(tokens))
        held = counts.any(axis=(1, 2))
        return tokens.reshape(-1, tokens.shape[3])[held].astype(np.float32), counts[held].astype(np.float32)

    def _counted(
        self,
        example: Example,
        classes: tuple[str, ...],
        tokens_affine_ras: Float[np.ndarray, "4 4"],
        tokens_ijk: tuple[int, int, int],
    ) -> Float[np.ndarray, "token cell kind"]:
        """How much of each kind each cell of each token holds, in share of a cell."""
        if example.labels is None:
            raise ValueError("a voxel-level task needs voxel labels")
        values = numbered(example.labels, classes)
        grid = cells.lay(example.affine_ras, values.shape, tokens_affine_ras, tokens_ijk, sub=self.sub)
        kinds = len(classes) + 1
        ti, tj, tk = grid.tokens_ijk
        counts = cells.tally(values, grid, kinds).reshape(ti, self.sub, tj, self.sub, tk, self.sub, kinds)
        counts = counts.transpose(0, 2, 4, 1, 3, 5, 6).reshape(ti * tj * tk, self.sub**3, kinds)
        # In share of a cell: a scan with small voxels has no louder voice.
        return counts / max(float(counts.sum(axis=2).max()), 1.0)

    def _descend(
        self, rows: Float[np.ndarray, "token dim"], counts: Float[np.ndarray, "token cell kind"]
    ) -> tuple[Float[np.ndarray, "dim out"], Float[np.ndarray, "out"]]:
        """Minimise the class-balanced cross entropy between soft cell labels and a linear map of the tokens."""
        _, cell, kinds = counts.shape
        share = counts.sum(axis=(0, 1)) / counts.sum()
        loudness = np.where(share > 0, np.maximum(share, 1e-6) ** -self.balance, 0.0)
        wanted = torch.from_numpy((counts * loudness).astype(np.float32))
        wanted /= wanted.sum()
        mass = wanted.sum(dim=2)
        inputs = torch.from_numpy(rows.astype(np.float32))
        weight = torch.zeros(rows.shape[1], cell * kinds, requires_grad=True)
        # Start from the share of each kind: a kind that no label shows stays out of reach.
        start = np.log(np.maximum(share * loudness, 1e-12)).astype(np.float32)
        bias = torch.from_numpy(np.tile(start, cell)).requires_grad_()
        solver = torch.optim.LBFGS([weight, bias], max_iter=self.iterations, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            logits = (inputs @ weight + bias).reshape(wanted.shape)
            fit = (mass * logits.logsumexp(dim=2)).sum() - (wanted * logits).sum()
            loss = fit + self.decay * weight.square().sum() / cell
            loss.backward()
            return loss

        solver.step(closure)
        return weight.detach().numpy(), bias.detach().numpy()


def numbered(labels: LabelMap, classes: tuple[str, ...]) -> Int[np.ndarray, "i j k"]:
    """Renumber voxel labels by name: `classes[0]` becomes 1, and whatever is not in `classes` becomes background."""
    top = max([int(labels.array.max(initial=0)), *labels.classes])
    table = np.zeros(top + 1, dtype=np.int16)
    for value, name in labels.classes.items():
        if name in classes:
            table[value] = classes.index(name) + 1
    return table[np.maximum(labels.array, 0)]


def of_kind(outcome: Mapping[str, float], kind: str) -> dict[str, float]:
    """The `dice` or the `nsd` of each organ in an outcome."""
    if kind == "nsd":
        return {name.removeprefix(SURFACE): value for name, value in outcome.items() if name.startswith(SURFACE)}
    return {name: value for name, value in outcome.items() if not name.startswith(SURFACE)}


def argmax_at(logits: Float[Tensor, "kinds ci cj ck"], grid: cells.CellGrid) -> Int[np.ndarray, "i j k"]:
    """Interpolate cell logits at every voxel of the scan and take the largest, a slab at a time."""
    places = [
        np.clip(place, member.min(), member.max())  # never between a cell of the scan and one of the padding
        for place, member in zip(grid.places(), grid.members(), strict=True)
    ]
    steps = (grid.scale[0] * grid.sub, grid.scale[1] * grid.sub, grid.scale[2] * grid.sub)
    _, count_j, count_k = grid.shape_ijk
    rows = max(1, ROWS_AT_ONCE // (logits.shape[0] * count_j * count_k))
    winners = np.empty(grid.shape_ijk, dtype=np.int16)
    for start in range(0, grid.shape_ijk[0], rows):
        part = slice(start, start + rows)
        dense = resample.sample(logits, (places[0][part], places[1], places[2]), step_ijk=steps, outside=0.0)
        best, winner = dense[0].numpy().copy(), winners[part]
        winner[...] = 0
        for kind in range(1, len(dense)):  # six times as fast as argmax over the first axis
            better = dense[kind].numpy() > best
            np.copyto(best, dense[kind].numpy(), where=better)
            winner[better] = kind
    return winners


def compare(predicted: Integer[np.ndarray, "i j k"], truth: LabelMap, classes: tuple[str, ...]) -> dict[str, float]:
    """Dice (MONAI) of every class that the truth holds; both sides on the scan's own grid.

    `predicted` counts in the order of `classes`, from 1.
    """
    from monai.metrics.meandice import compute_dice

    wanted = numbered(truth, classes)
    present = np.unique(wanted)
    present = present[present > 0]
    # Only what the truth holds is scored, so that the work does not grow with the list of classes.
    place = np.zeros(len(classes) + 1, dtype=np.int64)
    place[present] = np.arange(1, len(present) + 1)
    sides = [torch.from_numpy(place[side])[None, None] for side in (predicted, wanted)]
    dice = compute_dice(sides[0], sides[1], include_background=False, num_classes=len(present) + 1)
    return {classes[int(kind) - 1]: float(value) for kind, value in zip(present, dice[0], strict=True)}


def _tokens(features: Features) -> tuple[Float[np.ndarray, "ti tj tk dim"], Float[np.ndarray, "4 4"]]:
    if features.tokens is None or features.tokens_affine_ras is None:
        raise ValueError("a voxel-level task needs patch tokens")
    return features.tokens, features.tokens_affine_ras


def _size(tokens: Float[np.ndarray, "ti tj tk dim"]) -> tuple[int, int, int]:
    return tokens.shape[0], tokens.shape[1], tokens.shape[2]


def _within(
    tokens: Float[np.ndarray, "ti tj tk dim"],
    tokens_affine_ras: Float[np.ndarray, "4 4"],
    affine_ras: Float[np.ndarray, "4 4"],
    shape_ijk: tuple[int, int, int],
) -> tuple[Float[np.ndarray, "bi bj bk dim"], Float[np.ndarray, "4 4"]]:
    """The box of tokens that holds the voxels of a scan; what lies beyond is padding."""
    grid = cells.lay(affine_ras, shape_ijk, tokens_affine_ras, _size(tokens))
    low, high = zip(*((int(member.min()), int(member.max()) + 1) for member in grid.members()), strict=True)
    moved = tokens_affine_ras.astype(np.float64).copy()
    moved[:3, 3] += moved[:3, :3] @ np.array(low)
    return tokens[low[0] : high[0], low[1] : high[1], low[2] : high[2]], moved


def _thin(
    counts: Float[np.ndarray, "token cell kind"], most: int, seed: int
) -> tuple[Int[np.ndarray, "kept"], Float[np.ndarray, "kept"]]:
    """Choose at most `most` tokens, those with organs first, and say how many each of them stands for."""
    rng = np.random.default_rng(seed)
    organ = counts[:, :, 1:].any(axis=(1, 2))
    kept: list[np.ndarray] = []
    importance: list[np.ndarray] = []
    # Organs may take three quarters of the places; what they leave is the background's.
    room = max(1, most * 3 // 4)
    for group in (np.flatnonzero(organ), np.flatnonzero(~organ)):
        chosen = np.sort(rng.permutation(group)[:room])
        kept.append(chosen)
        importance.append(np.full(len(chosen), len(group) / max(len(chosen), 1), dtype=np.float32))
        room = most - len(chosen)
    return np.concatenate(kept), np.concatenate(importance)
