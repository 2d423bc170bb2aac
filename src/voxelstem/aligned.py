"""Weights that were aligned with reports: scans and texts come out as vectors of one space, compared by cosine.

Beside the backbone such a weights folder holds `heads.safetensors` (two `AlignHead`s, and where they were trained here
the temperature and bias of the sigmoid loss), and a text tower: `text/tower.json` says which packaged or local tower it
is and what its files' digest was, `text/changes.safetensors` what training changed of it. SPECTRE's folders hold the
whole tower instead and need a tokenizer's folder beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from voxelstem.backbones.heads import AlignHead
from voxelstem.backbones.qwen3 import TEXT_TENSORS, spectre_tower
from voxelstem.backbones.text import TextTower, TowerConfig, check_texts, project, tower_of
from voxelstem.card import Card, read_tensors, read_text
from voxelstem.config import overlay
from voxelstem.embedding import Computing, Embedding
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.model import Model, load
from voxelstem.streaming import Scan
from voxelstem.study import Study, Volume

HEADS = "heads.safetensors"
"""The file of both alignment heads inside the weights folder: names start with `image.`, `text.` and `logit.`."""
TOWER, CHANGES = "text/tower.json", "text/changes.safetensors"
"""Which text tower it is, and what training changed of it."""
CPU = torch.device("cpu")
_BELONG = "copy the whole weights folder again: heads, backbone and text tower belong together"


@dataclass(frozen=True, kw_only=True, slots=True)
class Aligned:
    """A model, a text tower, and the heads that bring both into one space."""

    model: Model
    tower: TextTower
    image_head: AlignHead
    text_head: AlignHead
    temperature: float | None
    """Logarithm of what cosines are multiplied by; None where the weights came without it."""
    bias: float | None
    sha256: str
    """Of everything that decides the vectors: backbone, heads and tower. Vectors of two digests are not comparable."""

    @property
    def out(self) -> int:
        """Length of the vectors."""
        return self.image_head.direction.shape[0]

    @torch.inference_mode()
    def embed_scan(
        self, scan: Study | Volume | Scan | Embedding, *, computing: Computing | None = None
    ) -> Float[np.ndarray, " out"]:
        """The unit vector of a scan, float32: a `Model.embed` of it (or one made before), projected.

        Args:
            scan: A study of one volume, a volume, a streamed scan, or an embedding with pool `cls-mean`.
            computing: The way through the network, see `Model.computing`; fp32 without.

        Raises:
            ConfigError: an embedding of another length, or as `Model.embed`.
            IngestError: as `Model.embed`.
        """
        found = scan if isinstance(scan, Embedding) else self.model.embed(scan, computing=computing)
        row = torch.from_numpy(np.asarray(found.scan, np.float32))
        wanted = head_dim(self.image_head)
        if row.shape != (wanted,):
            raise ConfigError(
                f"the embedding has {tuple(row.shape)} numbers, the image head of these weights takes {wanted}",
                hint="embed with these weights and pool cls-mean (cls and mean side by side)",
            )
        return F.normalize(self.image_head(row), dim=-1).numpy()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "text out"]:
        """The unit vectors of texts, float32; a row for each.

        Raises:
            ConfigError: a text is empty or holds half a character; the message gives its number, never its words.
        """
        check_texts(texts)
        # One by one: a text's vector then has the same bits whatever stood beside it.
        rows = [project(self.tower, self.text_head, [text], device=CPU)[0] for text in texts]
        return F.normalize(torch.stack(rows), dim=-1).numpy() if rows else np.zeros((0, self.out), np.float32)

    def probability(
        self, scan: Float[np.ndarray, "*rows out"], text: Float[np.ndarray, "*rows out"]
    ) -> Float[np.ndarray, "*rows"]:
        """sigmoid(exp(temperature) * cosine + bias) of unit vectors: what the loss of Zhai et al. 2023 (SigLIP) learns.

        It is the chance of being a pair within a batch of training, not of a finding: calibrate before use.

        Raises:
            CheckpointError: the weights came without temperature and bias.
        """
        if self.temperature is None or self.bias is None:
            raise CheckpointError(
                "these weights came without the loss's temperature and bias, so a cosine has no probability",
                hint="compare cosines, or calibrate on labelled scans",
            )
        logit = np.exp(self.temperature) * (np.asarray(scan) * np.asarray(text)).sum(axis=-1) + self.bias
        # By tanh: no exp of a large number.
        return 0.5 * (1 + np.tanh(0.5 * logit))


def is_aligned(card: Card) -> bool:
    """Whether a weights folder came with alignment heads."""
    return HEADS in card.extras


def head_dim(head: AlignHead) -> int:
    """Length of the vectors that a head takes."""
    first = head.mlp[0]
    assert isinstance(first, torch.nn.Linear)
    return first.in_features


def read_aligned(folder: Path, *, tokenizer: Path | None = None) -> Aligned:
    """Read a weights folder that holds heads and a text tower, check that all belong together.

    Args:
        folder: Weights folder, trained here or imported.
        tokenizer: Folder of the tokenizer, for weights whose tower came without one (SPECTRE's); for others the
            Hugging Face folder of the tower, where it lies elsewhere on this machine than on the one that trained.

    Raises:
        CheckpointError: no heads, heads of other sizes than backbone or tower, a tower of other files, or damage.
        ConfigError: the tower, its tokenizer or its packages are not on this machine.
    """
    folder = Path(folder)
    model = load(folder)
    card = model.card
    if not is_aligned(card):
        raise CheckpointError(
            f"{folder.name} was not aligned with reports: it has no {HEADS}",
            hint="give weights that `voxelstem pretrain ct.align` wrote, or an import with --image-head and --text",
        )
    tensors = read_tensors(folder, card, HEADS)
    image, text = (_head(tensors, side) for side in ("image", "text"))
    if image.direction.shape[0] != text.direction.shape[0]:
        raise CheckpointError(
            f"the image head gives {image.direction.shape[0]} numbers and the text head {text.direction.shape[0]}: "
            "they are heads of different weights",
            hint=_BELONG,
        )
    _fits(head_dim(image), _scan_dim(model), "image head", "backbone")
    tower = _tower(folder, card, tokenizer)
    _fits(head_dim(text), tower.dim, "text head", "text tower")
    temperature, bias = (_number(tensors, f"logit.{name}") for name in ("temperature", "bias"))
    return Aligned(
        model=model,
        tower=tower,
        image_head=image,
        text_head=text,
        temperature=temperature,
        bias=bias,
        sha256=space_digest(card),
    )


def space_digest(card: Card) -> str:
    """SHA-256 over the digests of everything that decides where scans and texts come to lie."""
    facts: list[Any] = [card.sha256, sorted(card.extras.items())]
    # How scans are fed decides as much as the tensors do.
    facts += [sorted(card.architecture.items()), card.spec.mark, card.trained]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def _head(tensors: Mapping[str, Tensor], side: str) -> AlignHead:
    """One of the heads; its sizes are told from the tensors' shapes."""
    state = {name.removeprefix(f"{side}."): tensor for name, tensor in tensors.items() if name.startswith(f"{side}.")}
    if not state:
        raise CheckpointError(f"{HEADS} holds no {side} head", hint="import or train both heads")
    try:
        (hidden, dim), (out, bottleneck) = state["mlp.0.weight"].shape, state["direction"].shape
        with torch.device("meta"):
            head = AlignHead(dim, hidden=hidden, bottleneck=bottleneck, out=out)
        # What is mapped from a file stays mapped.
        head.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the {side} head in {HEADS} has other tensors than a head", hint=_BELONG) from error
    return head.eval().requires_grad_(False)


def _number(tensors: Mapping[str, Tensor], name: str) -> float | None:
    return float(tensors[name].reshape(-1)[0]) if name in tensors and tensors[name].numel() == 1 else None


@torch.inference_mode()
def _scan_dim(model: Model) -> int:
    """Length of `Embedding.scan`: asked of the network, because each kind names its sizes in its own way."""
    described = 2 * model.backbone.dim
    if not model.use_scan_level:
        return described
    whole, rows = model.backbone.look_at_scan(torch.zeros(1, 1, described), (1, 1, 1))
    return whole.shape[-1] + rows.shape[-1]


def _fits(takes: int, gives: int, head: str, what: str) -> None:
    if takes != gives:
        raise CheckpointError(
            f"the {head} takes {takes} numbers, the {what} gives {gives}: they are of different weights", hint=_BELONG
        )


def _tower(folder: Path, card: Card, tokenizer: Path | None) -> TextTower:
    """The tower that the folder names or holds, with what training changed of it."""
    if TOWER not in card.extras and TEXT_TENSORS in card.extras:
        if tokenizer is None:
            raise ConfigError(
                f"{folder.name} holds SPECTRE's text tower, whose tokenizer is not part of the weights",
                hint="give --tokenizer a folder with that of Qwen3-Embedding-0.6B",
            )
        return spectre_tower(folder, card, tokenizer).eval().requires_grad_(False)
    if TOWER not in card.extras:
        raise CheckpointError(
            f"{folder.name} has heads but no text tower ({TOWER})", hint="copy the whole folder, or import with --text"
        )
    try:
        facts: dict[str, Any] = json.loads(read_text(folder, card, TOWER))
        wanted = str(facts.pop("sha256"))
        config = overlay(TowerConfig(), facts)
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{folder.name}/{TOWER} does not describe a text tower", hint=_BELONG) from error
    tower = tower_of(config if tokenizer is None else dataclasses.replace(config, source=str(tokenizer)))
    if tower.sha256 != wanted:
        raise CheckpointError(
            f"the text tower on this machine (sha256 {tower.sha256[:16]}) is not the one that these weights were "
            f"aligned with ({wanted[:16]})",
            hint="install the version of the tower that they were trained with",
        )
    try:
        tower.load_state_dict(read_tensors(folder, card, CHANGES) if CHANGES in card.extras else {})
    except RuntimeError as error:
        raise CheckpointError(f"{CHANGES} holds other tensors than {TOWER} says are trained", hint=_BELONG) from error
    return tower.eval().requires_grad_(False)
