"""Text towers: reports and prompts become vectors, by a network that others trained on text.

A frozen tower computes each text once. Where it trains, low-rank changes (or all of it) are this module's parameters;
the base itself is kept out of the module's state, so that checkpoints hold what was learned and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from voxelstem.backbones.lowrank import Draws, LowRankConfig, put_beside
from voxelstem.backbones.pretrained import MINILM, Pretrained, read_pretrained
from voxelstem.chance import Chance
from voxelstem.errors import ConfigError
from voxelstem.sentences import bare_sentences

_log = logging.getLogger(__name__)

Pooling = Literal["mean", "last", "cls"]
KEPT_BYTES = 256 * 2**20
"""Of vectors that a frozen tower keeps in memory; the ones asked for longest ago go first."""
_ROWS = 32
"""Texts that pass through together where no gradient is wanted, on a GPU. On a CPU it is one: that is as fast, and a
text's vector then has the same bits whatever stood beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """Which network reads the texts, how its states become one vector, and what of it learns."""

    source: str = MINILM
    """`minilm`, or the path of a Hugging Face folder."""
    pooling: Pooling = "mean"
    """Over the states of a text's tokens: their mean, or that of the last or the first one."""
    trains: Literal["nothing", "lowrank", "all"] = "nothing"
    rank: int = 16
    """These three size the low-rank changes, see `LowRankConfig`."""
    alpha: float = 64.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("query", "key", "value", "attention.output.dense")
    """Linear layers that get a change: ends of their names. For Qwen3: q_proj, k_proj, v_proj, o_proj."""
    max_tokens: int = 512
    """What a text has beyond is not read."""
    prefix: str = ""
    """Put before every text, for networks that were trained with an instruction."""
    each: Literal["text", "sentence"] = "text"
    """What is read at once. By `sentence`, each is read and projected by itself, and a text is the mean of them all:
    no text is too long, a tower that does not learn reads each sentence once, and a prompt is as long as what was
    learned from. What one sentence says of another ("the larger one") is lost."""
    recompute: bool = True
    """Whether activations of a layer that trains are computed once more for the gradient instead of kept."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: sizes of the changes out of range, sentences for a tower that learns, no source, or fewer than 2
                tokens.
        """
        LowRankConfig(rank=self.rank, alpha=self.alpha, dropout=self.dropout)
        if self.each == "sentence" and self.trains != "nothing":
            raise ValueError("each=sentence is for a tower that does not learn (trains=nothing)")
        if not self.source or self.max_tokens < 2:  # noqa: PLR2004 - a word and the token that ends it
            raise ValueError(f"need a source and max_tokens >= 2, got {self.source!r} and {self.max_tokens}")


class _Memory(OrderedDict[bytes, Tensor]):
    """Vectors by the hash of their text."""


_memories: WeakValueDictionary[tuple[Any, ...], _Memory] = WeakValueDictionary()


def tower_of(config: TowerConfig) -> TextTower:
    """Read the tower that the settings name.

    Raises:
        ConfigError: a package, the folder or its tokenizer is missing, its weights are pickled or damaged, more tokens
            than it can read, or targets that it does not have.
    """
    return TextTower(config)


class TextTower(nn.Module):
    """Texts to vectors."""

    def __init__(self, config: TowerConfig, pretrained: Pretrained | None = None) -> None:
        """Read the base, or take one that was read already.

        Raises:
            ConfigError: see `tower_of`.
        """
        super().__init__()
        base = read_pretrained(config.source) if pretrained is None else pretrained
        self.config = config
        self.sha256 = base.sha256
        """Of the base's files."""
        self.dim: int = base.network.config.hidden_size
        """Length of the vectors."""
        self.truncated = 0
        """How many texts were cut at `max_tokens` so far; one read anew counts anew, one remembered does not."""
        _check_pair(config, base)
        self._tokenizer = base.tokenizer
        self._draws = Draws()
        network: Any = base.network
        # In a tuple, so that it is no part of this module's state.
        self._held: tuple[Any] = (network,)
        self._shares = pretrained is None and config.trains == "nothing"
        self._vectors = self._memory()
        if config.trains == "lowrank":
            sizes = LowRankConfig(rank=config.rank, alpha=config.alpha, dropout=config.dropout)
            self.changes = put_beside(network, config.targets, sizes, self._draws)
        else:
            network.requires_grad_(config.trains == "all")
        if config.trains == "all":
            self.base = network
        if config.trains != "nothing" and config.recompute and network.supports_gradient_checkpointing:
            again = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": self._draws.contexts}
            network.activation_checkpointing_enable(again)
        self.train(self.training)

    def forward(self, texts: Sequence[str], *, chance: Chance | None = None) -> Float[Tensor, "text dim"]:
        """A vector for each text, fp32, not normalised; on the device that the tower was moved to.

        Differentiable where the tower trains. `chance` holds a key for each text: dropout in training is drawn from it,
        and without it nothing is dropped.

        Raises:
            ConfigError: a text is empty or holds half a character; its number is said, never its words.
            ValueError: one text instead of several, or keys that are not as many as the texts.
        """
        check_texts(texts, chance)
        if not texts:
            return torch.zeros(0, self.dim, device=self._device)
        if self.config.trains == "nothing":
            return self._remembered(texts)
        if torch.is_grad_enabled():
            return self._encoded(texts, chance)
        parts = [
            self._encoded(texts[at : at + _ROWS], None if chance is None else chance.part(at, at + _ROWS))
            for at in range(0, len(texts), _ROWS)
        ]
        return torch.cat(parts)

    def tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, those beyond `max_tokens` included."""
        return [len(ids) for ids in self._ids(texts)]

    def train(self, mode: bool = True) -> TextTower:
        """Dropout of the changes in training, none in evaluation; the base itself never drops anything."""
        super().train(mode)
        self._held[0].train(mode and self.config.trains != "nothing")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TextTower:
        """Take the base along wherever this module is moved."""
        super()._apply(fn, recurse)
        if self.config.trains != "all":
            self._held[0]._apply(fn, recurse)
        self._vectors = self._memory()
        return self

    def _memory(self) -> _Memory:
        """What towers that give the same vectors, to the last bit, remember together while one of them lives."""
        config, parameter = self.config, next(self._held[0].parameters())
        if not self._shares:
            return _Memory()
        same = (self.sha256, config.pooling, config.max_tokens, config.prefix, parameter.device, parameter.dtype)
        return _memories.setdefault(same, _Memory())

    @property
    def _device(self) -> torch.device:
        return next(self._held[0].parameters()).device

    def _remembered(self, texts: Sequence[str]) -> Tensor:
        """Vectors by the hash of their text. Neither words nor anything that leads back to them is kept."""
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        found = {key: self._vectors[key] for key in keys if key in self._vectors}
        fresh = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        rows = 1 if self._device.type == "cpu" else _ROWS
        # Ordinary tensors whatever is around: what is kept may take part in a later gradient.
        with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            for part in _parts(list(fresh.items()), rows):
                vectors = self._encoded([text for _, text in part], None).cpu()
                # Cloned: a row of a larger tensor would keep all of it.
                found |= {key: vector.clone() for (key, _), vector in zip(part, vectors, strict=True)}
        for key in found:
            self._vectors[key] = found[key]
            self._vectors.move_to_end(key)
        while len(self._vectors) * 4 * self.dim > KEPT_BYTES:
            self._vectors.popitem(last=False)
        return torch.stack([found[key] for key in keys]).to(self._device)

    def _encoded(self, texts: Sequence[str], chance: Chance | None) -> Tensor:
        ids = [torch.tensor(row) for row in self._cut(texts)]
        # Always at the end, so that a token's place and its dropout do not depend on the texts beside it.
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self._tokenizer.pad_token_id or 0)
        sizes = torch.tensor([len(row) for row in ids])
        present = (torch.arange(padded.shape[1]) < sizes[:, None]).to(self._device)
        with self._draws.of(chance if self.training else None):
            states = self._held[0](input_ids=padded.to(self._device), attention_mask=present.long())
        return pool_states(states.last_hidden_state.float(), present, self.config.pooling)

    def _cut(self, texts: Sequence[str]) -> list[list[int]]:
        """Token numbers of each text, at most `max_tokens`, the ones that begin and end a text included."""
        ids, most = self._ids(texts), self.config.max_tokens
        for row in [row for row, numbers in enumerate(ids) if len(numbers) > most]:
            if not self.truncated:
                _log.warning("a text has %d tokens, of which %d are read", len(ids[row]), most)
            self.truncated += 1
            text = self.config.prefix + texts[row]
            ids[row] = self._tokenizer(text, truncation=True, max_length=most)["input_ids"]
        return ids

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        # verbose: `transformers` would warn of texts that are about to be cut.
        return self._tokenizer([self.config.prefix + text for text in texts], verbose=False)["input_ids"]


def project(
    tower: TextTower, head: Callable[[Tensor], Tensor], texts: Sequence[str], *, device: torch.device
) -> Float[Tensor, "text out"]:
    """Texts by way of a tower and a head that lies on `device`, not normalised; see `TowerConfig.each`.

    Raises:
        ConfigError: as `TextTower.forward`.
    """
    if tower.config.each == "text" or not texts:
        return head(tower(texts).to(device))
    check_texts(texts)
    parts = [bare_sentences(text) for text in texts]
    said = head(tower([part for each in parts for part in each]).to(device))
    return torch.stack([rows.mean(dim=0) for rows in said.split([len(each) for each in parts])])


def pool_states(
    states: Float[Tensor, "text token dim"], present: Bool[Tensor, "text token"], pooling: Pooling
) -> Float[Tensor, "text dim"]:
    """One vector for each text from the states of its tokens, those that are `present`.

    Tokens that fill a row up may stand at either end: `last` is the last one present, `cls` the first.

    >>> states = torch.arange(6.0).view(1, 3, 2)
    >>> pool_states(states, torch.tensor([[True, True, False]]), "last")
    tensor([[2., 3.]])
    """
    weight = present.to(states.dtype)[..., None]
    if pooling == "mean":
        return (states * weight).sum(dim=1) / weight.sum(dim=1)
    order = torch.arange(present.shape[1], device=present.device)
    at = (present * (order + 1 if pooling == "last" else len(order) - order)).argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), at]


def _parts(items: list[tuple[bytes, str]], size: int) -> Iterator[list[tuple[bytes, str]]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]


def check_texts(texts: Sequence[str], chance: Chance | None = None) -> None:
    """Refuse what has no vector.

    Raises:
        ConfigError: a text is empty or holds half a character; its number is said, never its words.
        ValueError: one text instead of several, or keys that are not as many as the texts.
    """
    if isinstance(texts, str):
        raise ValueError("give a list of texts: a single one would be taken for its letters")
    if chance is not None and len(chance) != len(texts):
        raise ValueError(f"{len(texts)} texts need as many keys, got {len(chance)}")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise ConfigError(
                f"text {number} of {len(texts)} is empty", hint="leave samples without words out before they get here"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ConfigError(
                f"text {number} of {len(texts)} holds halves of characters",
                hint="read its file with the right encoding",
            )


def _check_pair(config: TowerConfig, base: Pretrained) -> None:
    sizes = base.network.config
    most = min(base.tokenizer.model_max_length, getattr(sizes, "max_position_embeddings", config.max_tokens))
    if config.max_tokens > most:
        raise ConfigError(
            f"max_tokens is {config.max_tokens}, and this text tower reads at most {most}", hint=f"set it to {most}"
        )
    if len(base.tokenizer) > sizes.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(base.tokenizer)} tokens and the network {sizes.vocab_size}: not of one model",
            hint="take the tokenizer that came with the network",
        )
    ends = {base.tokenizer(word)["input_ids"][-1] for word in ("lung", "of")}
    if config.pooling == "last" and len(ends) > 1:
        raise ConfigError(
            "this tokenizer ends a text with no token of its own, and the state of that token is to be the vector",
            hint="newer files of Qwen3-Embedding have it; or choose another pooling",
        )
