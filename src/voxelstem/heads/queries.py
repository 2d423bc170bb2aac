"""A label for every cell, seen in the light of the whole scan: one learned query a class looks at all frozen tokens.

After SPECTRE's SEoMT (arXiv 2511.17209), itself after "Your ViT is secretly an image segmentation model" (Kerssies et
al. 2025): a query for each class, no matching, and a mask is the product of what a query became with every cell's
features. There the queries pass through the last blocks of the ViT, which are trained; here the tokens stay frozen and
the queries pass through layers of their own. They look at all tokens, not only at their own mask's. The head begins as
the linear map that it is given and learns what the rest of the scan changes about it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.losses.overlap import EPS

ROWS_AT_ONCE = 1 << 14
"""Tokens that are standardised or painted in one go; bounds the memory of a prediction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryConfig:
    """How large the decoder is, and how it is fitted."""

    width: int = 48
    """Numbers of a query."""
    heads: int = 4
    layers: int = 2
    steps: int = 200
    """Steps of AdamW at most; scans of subjects that are held out say how many."""
    every: int = 10
    """Steps between two looks at those who are held out."""
    enough: int = 8
    """Labelled subjects from which on a quarter of them is held out once. Fewer are held out in turn, in `folds`."""
    folds: int = 3
    few_steps: int = 100
    """Steps at most where subjects are held out in turn."""
    batch: int = 2
    """Scans of one step."""
    lr: float = 2e-3
    decay: float = 0.05
    """AdamW's weight decay (times `lr`, at every step), on all matrices."""
    most: int = 4096
    """Tokens of a scan that are learned from. A prediction looks at all."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a count, rate or share without sense, or a width that the heads do not divide.
        """
        counts = (self.width, self.heads, self.layers, self.steps, self.every, self.few_steps, self.batch, self.most)
        if min(counts) < 1 or min(self.enough, self.folds) < 2:  # noqa: PLR2004 - one held out, one learned from
            raise ValueError("enough and folds must be at least 2, and at least 1 of whatever else is counted")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, got {self.heads} and {self.width}")
        if self.lr <= 0 or self.decay < 0:
            raise ValueError(f"lr must be positive and decay not negative, got {self.lr} and {self.decay}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Celled:
    """A scan to learn from: tokens, and what the cells of each of them hold."""

    subject: str
    tokens: Float[np.ndarray, "token dim"]
    counts: Float[np.ndarray, "token cell kind"]
    """Share of a cell that is of each kind, background first; all 0 in a cell that holds no voxel."""
    importance: Float[np.ndarray, "token"]
    """How many tokens of the scan each of these stands for."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Linear:
    """The linear map that a decoder begins as: standardised tokens to the logits of their cells."""

    middle: Float[np.ndarray, "dim"]
    scale: Float[np.ndarray, "dim"]
    weight: Float[np.ndarray, "dim out"]
    bias: Float[np.ndarray, "out"]


class Layer(nn.Module):
    """Queries look at tokens and at one another, then think; pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        """`width` is shared out evenly over `heads`."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(
        self,
        queries: Float[Tensor, "kind width"],
        seen: Float[Tensor, "token width"],
        loud: Float[Tensor, "token"],
    ) -> Float[Tensor, "kind width"]:
        """A token that stands for n counts as n equal ones would: `loud` is log n."""
        asking = self.norm1(queries)
        rows = torch.cat([asking, seen])
        query = self._split(self.q(asking))
        key, value = (self._split(part) for part in self.kv(rows).chunk(2, dim=1))
        bias = torch.cat([loud.new_zeros(len(asking)), loud])
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(len(asking), -1))
        queries = queries + self.proj(mixed.transpose(0, 1).flatten(1))
        return queries + self.fc2(F.gelu(self.fc1(self.norm2(queries))))

    def _split(self, rows: Float[Tensor, "row width"]) -> Float[Tensor, "head row part"]:
        return rows.view(len(rows), self.heads, -1).transpose(0, 1)


class Decoder(nn.Module):
    """Tokens of one scan -> logits of their cells."""

    weight: Tensor
    bias: Tensor
    """The linear map that it began as; steps do not change it."""

    def __init__(self, *, dim: int, cell: int, kinds: int, width: int, heads: int, layers: int) -> None:
        """`cell` counts the cells of a token; `kinds` the classes with background."""
        super().__init__()
        self.kinds = kinds
        self.register_buffer("weight", torch.zeros(dim, cell * kinds))
        self.register_buffer("bias", torch.zeros(cell * kinds))
        self.see = nn.Linear(dim, width)
        self.queries = nn.Parameter(torch.randn(kinds, width))
        self.layers = nn.ModuleList([Layer(width, heads) for _ in range(layers)])
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.spread = nn.Linear(width, cell * width)
        # Masks of 0: the decoder begins as its linear map.
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def masks(self, seen: Float[Tensor, "token width"], loud: Float[Tensor, "token"]) -> Float[Tensor, "kind width"]:
        """What the queries became after they saw the scan."""
        queries: Tensor = self.queries
        for layer in self.layers:
            queries = layer(queries, seen, loud)
        return self.fc2(F.gelu(self.fc1(self.norm(queries))))

    def paint(
        self,
        tokens: Float[Tensor, "token dim"],
        seen: Float[Tensor, "token width"],
        masks: Float[Tensor, "kind width"],
    ) -> Float[Tensor, "token cell kind"]:
        """Logits of every cell: of the linear map, and of the product of the masks with the cell's features."""
        straight = self.spread(seen)
        # Also what is not bent: a scan's mean can be taken off a token only along a straight line.
        features = (straight + F.gelu(straight)).view(len(seen), -1, masks.shape[1])
        plain = (tokens @ self.weight + self.bias).view(len(tokens), -1, self.kinds)
        return plain + features @ masks.T / math.sqrt(masks.shape[1])

    def forward(
        self, tokens: Float[Tensor, "token dim"], loud: Float[Tensor, "token"]
    ) -> Float[Tensor, "token cell kind"]:
        """Logits of every cell of a scan."""
        seen = self.see(tokens)
        return self.paint(tokens, seen, self.masks(seen, loud))


def dice(logits: Float[Tensor, "token cell kind"], counts: Float[Tensor, "token cell kind"]) -> Float[Tensor, ""]:
    """Soft Dice (Milletari et al. 2016) of cells that hold a little of several kinds; the mean over all but background.

    A cell counts for as much as it holds of the scan.
    """
    said = (logits.softmax(dim=2) * counts.sum(dim=2, keepdim=True)).flatten(0, 1)
    there = counts.flatten(0, 1)
    # Of what is there, the share that is said: a cell that is half liver and said to be half liver is a full hit.
    hits = torch.minimum(said, there).sum(dim=0)
    return ((2 * hits + EPS) / (said.sum(dim=0) + there.sum(dim=0) + EPS))[1:].mean()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fitted:
    """A fitted decoder as plain arrays, and how many steps it took: with 0 it is the linear map that it began as."""

    arrays: dict[str, np.ndarray]
    steps: int


def fit(scans: Sequence[Celled], start: Linear, *, balance: float, config: QueryConfig, seed: int) -> Fitted:
    """Fit a decoder to labelled scans by cross entropy and 1 - Dice over their cells. Equal seeds give equal arrays.

    Subjects are held out first, and all scans are then learned from for as many steps as served those best: none at all
    if the linear map did. So it is with a single subject, who cannot tell what differs between scans.

    Args:
        scans: Of one kind of token, with as many cells and kinds each.
        start: Fitted to the same scans; it knows those that are held out too, so the choice leans to few steps.
        balance: A kind of share s weighs s^-balance in the cross entropy.
        config: How.
        seed: Of the first weights, of who is held out, and of the turns.

    Raises:
        ValueError: no scan, scans of different sorts, one without a label, or a loss that is no number.
    """
    _check(scans, start)
    problem = _Problem.of(scans, start, balance, config)
    everyone, parts = np.arange(len(scans)), _parts([scan.subject for scan in scans], config, seed)
    most = config.steps if len(parts) == 1 else config.few_steps
    curve = np.zeros(most // config.every + 1)
    for held in parts:
        curve += np.array(problem.descend(everyone[~held], most, held=everyone[held], seed=seed).curve)
    if not np.isfinite(curve).all():
        raise ValueError("the loss of the scans that were held out is not finite")
    steps = config.every * int(np.argmin(curve))
    decoder = problem.descend(everyone, steps, held=everyone[:0], seed=seed).decoder
    arrays = {name: tensor.numpy() for name, tensor in decoder.state_dict().items()}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError("the decoder that was fitted is not finite")
    return Fitted(arrays={"middle": start.middle, "scale": start.scale} | arrays, steps=steps)


@torch.no_grad()
def logits(
    arrays: Mapping[str, np.ndarray], tokens: Float[np.ndarray, "token dim"], *, kinds: int, heads: int
) -> Float[np.ndarray, "token cell kind"]:
    """What a fitted decoder says of every cell of a scan, all of whose tokens it must see.

    Raises:
        ValueError: the arrays are not those of a decoder, or the tokens have another length.
    """
    decoder = _rebuilt(arrays, kinds=kinds, heads=heads)
    middle, scale = arrays["middle"], arrays["scale"]
    if tokens.ndim != 2 or tokens.shape[1] != len(middle):  # noqa: PLR2004 - token, dim
        raise ValueError(f"a scan is tokens of {len(middle)} numbers, got the shape {tokens.shape}")

    def parts() -> Iterator[Tensor]:
        for low in range(0, len(tokens), ROWS_AT_ONCE):
            yield torch.from_numpy((tokens[low : low + ROWS_AT_ONCE] - middle) / scale).float()

    seen = torch.cat([decoder.see(part) for part in parts()])
    masks = decoder.masks(seen, torch.zeros(len(seen)))
    painted = [
        decoder.paint(part, near, masks).numpy() for part, near in zip(parts(), seen.split(ROWS_AT_ONCE), strict=True)
    ]
    return np.concatenate(painted)


def _rebuilt(arrays: Mapping[str, np.ndarray], *, kinds: int, heads: int) -> Decoder:
    """The decoder of these arrays."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if name not in ("middle", "scale")}
    try:
        dim, out = tensors["weight"].shape
        width = tensors["queries"].shape[1]
        layers = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
        with torch.random.fork_rng(devices=[]):
            decoder = Decoder(dim=dim, cell=out // kinds, kinds=kinds, width=width, heads=heads, layers=layers)
        decoder.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        raise ValueError("these arrays are not those of a decoder of queries") from error
    return decoder.eval()


def _check(scans: Sequence[Celled], start: Linear) -> None:
    if not scans:
        raise ValueError("queries need at least one scan to learn from")
    for scan in scans:
        if scan.tokens.shape[1] != len(start.middle) or scan.counts.shape[1:] != scans[0].counts.shape[1:]:
            raise ValueError("all scans must have tokens of one length, with as many cells and kinds each")
        if not scan.counts.any():
            raise ValueError("a scan to learn from has no labelled cell")
    if scans[0].counts.shape[1] * scans[0].counts.shape[2] != len(start.bias):
        raise ValueError(f"the linear map has {len(start.bias)} logits a token, cells and kinds are others")


def _parts(subjects: Sequence[str], config: QueryConfig, seed: int) -> list[Bool[np.ndarray, "scan"]]:
    """Which scans are held out, once or in turn; a subject's go together. A single subject is not held out."""
    names = sorted(set(subjects))
    if len(names) == 1:
        return []
    order = np.random.default_rng([seed, 1]).permutation(names).tolist()
    folds = min(config.folds, len(order))
    groups = [order[: len(order) // 4]] if len(order) >= config.enough else [order[at::folds] for at in range(folds)]
    return [np.isin(subjects, group) for group in groups]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Descent:
    decoder: Decoder
    curve: tuple[float, ...]
    """Loss of the scans that were held out: before the first step, and after every few."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Scan:
    tokens: Float[Tensor, "token dim"]
    counts: Float[Tensor, "token cell kind"]
    """With the importance of the tokens."""
    loud: Float[Tensor, "token"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Problem:
    scans: tuple[_Scan, ...]
    start: Linear
    weight: Float[Tensor, "kind"]
    """What a kind weighs in the cross entropy."""
    config: QueryConfig

    @classmethod
    def of(cls, scans: Sequence[Celled], start: Linear, balance: float, config: QueryConfig) -> _Problem:
        """Standardise the tokens and weigh the kinds."""
        laid = tuple(
            _Scan(
                tokens=torch.from_numpy((scan.tokens - start.middle) / start.scale).float(),
                counts=torch.from_numpy(scan.counts * scan.importance[:, None, None]).float(),
                loud=torch.from_numpy(np.log(scan.importance)).float(),
            )
            for scan in scans
        )
        total = torch.stack([scan.counts.sum(dim=(0, 1)) for scan in laid]).sum(dim=0)
        share = total / total.sum()
        weight = torch.where(share > 0, share.clamp_min(1e-6) ** -balance, 0.0)
        return cls(scans=laid, start=start, weight=weight, config=config)

    def descend(
        self, rows: Int[np.ndarray, "row"], steps: int, *, held: Int[np.ndarray, "held"], seed: int
    ) -> _Descent:
        """Learn from some of the scans, and look every now and then at those that are held out."""
        decoder, rng = self._begin(seed), np.random.default_rng([seed, 2])
        matrices = [one for one in decoder.parameters() if one.ndim > 1]
        rest = [one for one in decoder.parameters() if one.ndim < 2]  # noqa: PLR2004 - biases and norms
        groups = [{"params": matrices, "weight_decay": self.config.decay}, {"params": rest, "weight_decay": 0.0}]
        solver = torch.optim.AdamW(groups, lr=self.config.lr)
        curve: list[float] = []
        for step, batch in zip(range(steps + 1), self._batches(rows, rng), strict=False):
            if len(held) and step % self.config.every == 0:
                with torch.no_grad():
                    curve.append(float(self._loss(decoder, held)))
            if step < steps:
                solver.zero_grad()
                self._loss(decoder, batch).backward()
                nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
                solver.step()
        return _Descent(decoder=decoder, curve=tuple(curve))

    def _begin(self, seed: int) -> Decoder:
        config, (_, cell, kinds) = self.config, self.scans[0].counts.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            decoder = Decoder(
                dim=len(self.start.middle),
                cell=cell,
                kinds=kinds,
                width=config.width,
                heads=config.heads,
                layers=config.layers,
            )
        decoder.weight.copy_(torch.from_numpy(self.start.weight))
        decoder.bias.copy_(torch.from_numpy(self.start.bias))
        return decoder

    def _batches(self, rows: Int[np.ndarray, "row"], rng: np.random.Generator) -> Iterator[Int[np.ndarray, "batch"]]:
        """Turn after turn through the scans, in an order drawn anew."""
        size = min(self.config.batch, len(rows))
        while True:
            order = rng.permutation(rows)
            for low in range(0, len(order) - size + 1, size):
                yield order[low : low + size]

    def _loss(self, decoder: Decoder, rows: Int[np.ndarray, "row"]) -> Float[Tensor, ""]:
        """Mean over scans of the balanced cross entropy, and 1 - Dice over all their cells together."""
        scans = [self.scans[row] for row in rows]
        found = [decoder(scan.tokens, scan.loud) for scan in scans]
        entropy = torch.stack(
            [_entropy(said, scan.counts * self.weight) for said, scan in zip(found, scans, strict=True)]
        )
        overlap = dice(torch.cat(found), torch.cat([scan.counts for scan in scans]))
        return entropy.mean() + 1 - overlap


def _entropy(said: Float[Tensor, "token cell kind"], wanted: Float[Tensor, "token cell kind"]) -> Float[Tensor, ""]:
    """Cross entropy of what the cells hold, each by how much that is."""
    return -(wanted * said.log_softmax(dim=2)).sum() / wanted.sum()
