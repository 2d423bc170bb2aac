"""SigLIP: a whole scan and its own report agree, every other pair does not (Zhai et al. 2023; SPECTRE's second stage).

Blocks, scan level, heads and, where it learns, the text tower are trained end to end. By gradient caching (Gao et al.
2021) a batch may be as large as its embeddings: scans pass through the image model a few at a time and leave nothing
but their embedding; the loss is of the whole batch over all processes; on the way back each few are computed once
more. All draws come from keys of samples, so what is computed again is what was computed before, to the last bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from voxelstem import distributed
from voxelstem.backbones.heads import AlignHead
from voxelstem.backbones.pools import pool
from voxelstem.backbones.standard import Standard
from voxelstem.backbones.text import TowerConfig, project, tower_of
from voxelstem.chance import Chance
from voxelstem.config import flatten
from voxelstem.errors import ConfigError
from voxelstem.losses.siglip import Form, cosines, pair_figures, siglip
from voxelstem.protocols import Batch, StepOutput
from voxelstem.sentences import bare_sentences
from voxelstem.views.crop import ViewKind
from voxelstem.views.tile import split_blocks

_PAIR = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SiglipConfig:
    """The text tower, the heads, the form of the loss, and what a step keeps in memory; sizes as SPECTRE's."""

    name: str = "siglip"
    text: TowerConfig = field(default_factory=TowerConfig)
    hidden: int = 2048
    bottleneck: int = 256
    out: int = 512
    """Length of the vectors that scans and reports are compared by."""
    form: Form = "released"
    """The loss as SPECTRE was trained with, or as its paper writes it, see `losses.siglip`."""
    temperature_start: float = 2.3026
    """Logarithm of the factor by which cosines are multiplied; it is learned."""
    bias_start: float = -10.0
    """Learned too; the paper's form has none."""
    chunk: int = 1
    """Scans on one process that pass through the image model at once. Fewer than the process holds: each is computed
    twice, and the memory of a step is that of one chunk."""
    text_chunk: int = 16
    """The same for reports, where the text tower learns."""
    standardise: bool = False
    """Whether what the heads' MLPs make is standardised over the batch, see `backbones.standard`: for small batches and
    networks that begin fresh. The weights that come out have it inside their heads."""
    brief_weight: float = 0.0
    """How much a second table of pairs counts, in which a text is one or two sentences of the sample's, drawn anew each
    time. Whole reports alone never teach what a single sentence says, and questions are single sentences."""
    frozen_image: float = 0.0
    """Share of the run over which the block level does not learn: it is not recorded and has no way back, while scan
    level and heads learn to use it (SPECTRE: 10 of 100 epochs)."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a size below 1, a share outside [0, 1], or a start that is no number.
        """
        sizes = (self.hidden, self.bottleneck, self.out, self.chunk, self.text_chunk)
        if min(sizes) < 1:
            raise ValueError(f"hidden, bottleneck, out, chunk and text_chunk must be >= 1, got {sizes}")
        if not 0 <= self.brief_weight < math.inf:
            raise ValueError(f"brief_weight is at least 0, got {self.brief_weight}")
        if not 0 <= self.frozen_image <= 1:
            raise ValueError(f"frozen_image lies in [0, 1], got {self.frozen_image}")
        if not (math.isfinite(self.temperature_start) and math.isfinite(self.bias_start)):
            raise ValueError(f"starts are numbers, got {self.temperature_start} and {self.bias_start}")

    def check(self, global_: ViewKind, local: ViewKind, *, batch: int, backbone: Any) -> None:
        """Hold the other parts of a recipe against what a step needs.

        Raises:
            ValueError: not one whole scan a sample, no whole blocks, no scan level, or no other sample to tell it from.
        """
        if (global_.count, local.count) != (1, 0):
            raise ValueError(
                "siglip looks at each scan once and whole: need views.global_.count = 1 and views.local.count = 0, "
                f"got {global_.count} and {local.count}"
            )
        if any(size % block for size, block in zip(global_.size_ijk, backbone.block_ijk, strict=True)):
            raise ValueError(
                f"views.global_.size_ijk must be a multiple of block_ijk {backbone.block_ijk}, got {global_.size_ijk}"
            )
        scan = getattr(backbone, "scan", None)
        if not getattr(scan, "depth", 0):
            raise ValueError(
                "siglip compares whole scans: need a backbone with a scan level (backbone.scan.depth >= 1)"
            )
        if batch < _PAIR:
            raise ValueError(f"siglip tells samples apart: need loader.batch >= 2 in every micro-batch, got {batch}")


class Siglip(nn.Module):
    """The image model, the text tower and a head for each."""

    Config = SiglipConfig

    def __init__(
        self, config: SiglipConfig, backbone: Any, *, make_tower: Callable[[TowerConfig], Any] = tower_of
    ) -> None:
        """`backbone` satisfies `protocols.Backbone` and has a scan level; `make_tower` gives `backbones.text`'s tower.

        Raises:
            ConfigError: there is no scan level, or the text tower cannot be made.
        """
        super().__init__()
        if not backbone.has_scan_level:
            raise ConfigError(
                "siglip compares whole scans, and this backbone has no scan level", hint="set backbone.scan.depth >= 1"
            )
        self.config = config
        self.backbone = backbone
        self.tower = make_tower(config.text)
        sizes = {"hidden": config.hidden, "bottleneck": config.bottleneck, "out": config.out}
        self.image_head = AlignHead(2 * backbone.config.scan.dim, **sizes)
        self.text_head = AlignHead(self.tower.dim, **sizes)
        for head in (self.image_head, self.text_head):
            # Outputs are normalised: their common length means nothing, and SPECTRE holds all gains at 1.
            head.gain.requires_grad_(False)
            if config.standardise:
                # What is standardised does not know the bias before it: an optimiser would move it by rounding.
                head.mlp[-1].bias.requires_grad_(False)
        self.image_standard = Standard(config.bottleneck) if config.standardise else None
        self.text_standard = Standard(config.bottleneck) if config.standardise else None
        self._sums: dict[str, Tensor] = {}
        """Of what was standardised last, by side."""
        self._seed, self._seen = -1, dict[int, dict[str, Tensor]]()
        """What the statistics will follow when the step of that seed has counted, by the share's first sample."""
        biased = config.form == "released"
        # One number each, but of one axis: what is shared out among processes needs an axis to be cut along.
        self.temperature = nn.Parameter(torch.full((1,), config.temperature_start))
        self.bias = nn.Parameter(torch.full((1,), config.bias_start if biased else 0.0), requires_grad=biased)

    @property
    def learner(self) -> Any:
        """The backbone that gradients train."""
        return self.backbone

    @property
    def trains_scan_level(self) -> bool:
        """Yes: whole scans are compared."""
        return True

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        """Compare this share's scans (the first global view of each) with the reports of the whole batch.

        Raises:
            ConfigError: the batch holds no reports.
        """
        config = self.config
        if len(batch.texts) != len(batch):
            raise ConfigError(
                f"siglip needs a text for each scan, and got {len(batch.texts)} for {len(batch)}",
                hint="set views.report in the recipe, and ingest scans with their reports",
            )
        views = batch.views["global"][:, 0]
        if batch.seed != self._seed:
            self._seed, self._seen = batch.seed, {}
        text, brief = self._said(batch.texts, batch.chance)
        image = self.embed_scans(views, batch.chance, blocks_learn=progress >= config.frozen_image)
        self._seen[batch.first] = dict(self._sums)
        # Scans stay where they are, reports go everywhere: each process has its rows of the one table of all pairs,
        # and a report's gradient is what all of them say about it.
        first = distributed.here().rank * len(image)
        cosine = cosines(image, distributed.rows(text.float()))
        loss = siglip(cosine, self.temperature, self.bias, first=first, form=config.form)
        said = {"loss/siglip": loss.detach()}
        if brief is not None:
            other = cosines(image, distributed.rows(brief.float()))
            other = siglip(other, self.temperature, self.bias, first=first, form=config.form)
            said["loss/brief"] = other.detach()
            loss = (loss + config.brief_weight * other) / (1 + config.brief_weight)
        said |= {
            "temperature": self.temperature.detach().exp(),
            "bias": self.bias.detach(),
        }
        said |= pair_figures(cosine.detach(), first=first)
        numbers = torch.stack([value.reshape(()) for value in said.values()]).tolist()
        return StepOutput(loss=loss, scalars=dict(zip(said, numbers, strict=True)))

    def embed_scans(
        self, scans: Float[Tensor, "sample channel i j k"], chance: Chance, *, blocks_learn: bool = True
    ) -> Float[Tensor, "sample out"]:
        """Whole scans (windowed to [0, 1]) into the common space, not normalised, chunk by chunk.

        `chance` holds a key for each. Where the block level does not learn, no graph of it is made.
        """
        size = self.config.chunk
        parts = [(scans[at : at + size], chance.part(at, at + size)) for at in range(0, len(scans), size)]
        grid = self._grid(scans)
        if blocks_learn:
            found = in_chunks(lambda part, keys: self._look(self._describe(part, keys), grid, keys), parts)
        else:
            with torch.no_grad():
                described = [(self._describe(part, keys), grid, keys) for part, keys in parts]
            found = in_chunks(self._look, described)
        return self.image_head.turn(self._standardised("image", self.image_head.mlp(found)))

    def embed_texts(self, texts: Sequence[str], chance: Chance) -> Float[Tensor, "sample out"]:
        """Reports into the common space, not normalised, chunk by chunk; `chance` holds a key for each."""
        size, device = self.config.text_chunk, self.temperature.device
        chance = chance.purpose("text")
        parts = [(tuple(texts[at : at + size]), chance.part(at, at + size)) for at in range(0, len(texts), size)]
        if any(parameter.requires_grad for parameter in self.tower.parameters()):
            found = self.text_head.mlp(in_chunks(lambda said, keys: self.tower(said, chance=keys).to(device), parts))
        else:
            found = project(self.tower, self.text_head.mlp, texts, device=device)
        return self.text_head.turn(self._standardised("text", found))

    def _said(self, texts: Sequence[str], chance: Chance) -> tuple[Tensor, Tensor | None]:
        """The texts, and what is brief of each, standardised together: later questions are brief, reports are not."""
        if not self.config.brief_weight:
            return self.embed_texts(texts, chance), None
        drawn = chance.purpose("brief")
        keys = Chance(torch.cat([chance.keys, drawn.keys]))
        whole, brief = self.embed_texts([*texts, *map(_brief, texts, drawn.uniform(_PAIR + 1).tolist())], keys).chunk(2)
        return whole, brief

    def beside(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
        """Files of a weights folder beside the backbone's, of tensors and of text, as `aligned` reads them."""
        # What reads them takes a second to import, and only the end of a run writes them.
        from voxelstem.aligned import CHANGES, HEADS, TOWER

        heads = {
            side: head.state_dict() if standard is None else standard.within(head)
            for side, head, standard in (
                ("image", self.image_head, self.image_standard),
                ("text", self.text_head, self.text_standard),
            )
        }
        tensors = {f"{side}.{name}": value for side, state in heads.items() for name, value in state.items()}
        logit = {"logit.temperature": self.temperature.detach(), "logit.bias": self.bias.detach()}
        files = {HEADS: tensors | logit}
        changes = self.tower.state_dict()
        if changes:
            files[CHANGES] = changes
        # The folder's name, and not where a user keeps it.
        source = Path(self.config.text.source).name
        facts = flatten(self.config.text) | {"source": source, "sha256": self.tower.sha256}
        return files, {TOWER: json.dumps(facts, indent=2)}

    def after_step(self, *, progress: float) -> None:
        """The statistics follow the whole batch; there is no teacher."""
        del progress
        for side, standard in (("image", self.image_standard), ("text", self.text_standard)):
            if standard is not None and self._seen:
                standard.move(distributed.total(torch.stack([sums[side] for sums in self._seen.values()]).sum(dim=0)))
        self._seen = {}

    def _standardised(self, side: Literal["image", "text"], x: Float[Tensor, "row dim"]) -> Float[Tensor, "row dim"]:
        standard = self.image_standard if side == "image" else self.text_standard
        if standard is None:
            return x
        self._sums[side] = standard.sums(x)
        return standard(x)

    def _grid(self, scans: Tensor) -> tuple[int, int, int]:
        i, j, k = (size // block for size, block in zip(scans.shape[-3:], self.backbone.config.block_ijk, strict=True))
        return i, j, k

    def _describe(self, scans: Float[Tensor, "sample channel i j k"], keys: Chance) -> Float[Tensor, "sample n 2*dim"]:
        """Each block by itself: concat(cls, mean of its patches)."""
        # Cut here and not before: a copy of the chunk lives no longer than its activations.
        blocks = split_blocks(scans, self.backbone.config.block_ijk).transpose(0, 1)
        n = blocks.shape[1]
        return pool(*self.backbone.encode_blocks(blocks.flatten(0, 1), chance=keys.blocks(n))).unflatten(0, (-1, n))

    def _look(
        self, described: Float[Tensor, "sample n 2*dim"], grid: tuple[int, int, int], keys: Chance
    ) -> Float[Tensor, "sample 2*scan_dim"]:
        """The blocks of each scan together: concat(the scan's cls, mean of its block tokens)."""
        return pool(*self.backbone.look_at_scan(described, grid, chance=keys))


def _brief(text: str, drawn: Sequence[float]) -> str:
    """One or two sentences of a text, in their order; `drawn` in [0, 1) says how many and which."""
    said = bare_sentences(text)
    if len(said) < _PAIR:
        return text
    few, one, other = drawn
    first, second = int(one * len(said)), int(other * (len(said) - 1))
    second += second >= first
    return said[first] if few < 0.5 else " ".join(said[place] for place in sorted((first, second)))  # noqa: PLR2004 - half


def in_chunks(work: Callable[..., Tensor], parts: Sequence[tuple[Any, ...]]) -> Float[Tensor, "row dim"]:
    """Rows that `work` makes of the parts, one after another; what it computed for them is forgotten and made again.

    That of the last part is kept: its way back comes first, and until then nothing else is in memory. `work` leaves
    nothing to chance but what its arguments say. Both ways give the same rows and gradients.
    """
    rows: list[Tensor] = []
    for number, part in enumerate(parts):
        with _fresh_casts():
            if number < len(parts) - 1 and torch.is_grad_enabled():
                rows.append(checkpoint(work, *part, use_reentrant=False, preserve_rng_state=False))
            else:
                rows.append(work(*part))
    return torch.cat(rows)


@contextmanager
def _fresh_casts() -> Generator[None]:
    """Under autocast: a cast of each weight for each chunk.

    A cast that all chunks share would collect their gradients in its own precision, where small ones are lost behind
    the sum; each chunk's own is added in the weight's.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
