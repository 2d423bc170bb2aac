"""`load`: a weights folder -> Model. The card's InputSpec is obeyed here, whoever calls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from voxelstem.backbones import BACKBONES
from voxelstem.backbones.compute import Precision, choose
from voxelstem.backbones.compute import Way as Named
from voxelstem.backbones.layered import Layered
from voxelstem.backbones.pools import Pool
from voxelstem.card import Card, read_card, read_tensors
from voxelstem.config import overlay
from voxelstem.embedding import UNJUDGED, Computing, Embedding, Feeding, Underway, judge
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.packing import Packer
from voxelstem.streaming import Scan, lay, of_volume
from voxelstem.study import InputSpec, Study, Volume

Only = Literal[Named, "auto"]
MOST_VOXELS = 1 << 28
"""Of one block: a GiB in floats, thirty times the largest that any of the known weights take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The backbone as it is written, in fp32."""

    backbone: Any
    name: str = "reference"
    precision: str = "fp32"
    relative_error: float = 0.0

    def encode_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Cls and patch tokens of each block."""
        return self.backbone.encode_blocks(blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A backbone in evaluation mode with the card that says how to feed it."""

    backbone: Any
    card: Card
    use_scan_level: bool
    """Whether a scan's embedding comes from the scan level: where that was trained, and in the `scratch` of such."""
    blocks_per_pass: int = 8
    layers: tuple[int, ...] = ()
    """Of the first level, whose tokens are seen side by side; the backbone is then `Layered`. Empty: the last one's."""

    @property
    def spec(self) -> InputSpec:
        """What the model was trained to see."""
        return self.card.spec

    def scratch(self, *, seed: int) -> Model:
        """The same architecture, spec and measured statistics, untrained: the baseline that keeps everyone honest."""
        untrained = make_model(dataclasses.replace(self.card, trained=(), sha256=f"scratch-{seed}"), seed=seed)
        # What was measured is not learned: without it the network that is compared would be another.
        take = getattr(untrained.backbone, "take_measured", None)
        if take is not None:
            take(self.backbone)
        # By the same way through the network, or the comparison would be one of two poolings as well.
        untrained = dataclasses.replace(untrained, use_scan_level=self.use_scan_level)
        return untrained.through(self.layers) if self.layers else untrained

    def covers(self, volume: Volume) -> float:
        """Share of a volume that this model sees, without looking at it.

        Raises:
            ConfigError, IngestError: as `begin`.
        """
        return self.begin(volume, Feeding(spec=self.spec), hu=UNJUDGED).coverage

    def with_weights(self, card: Card, tensors: Mapping[str, Tensor]) -> Model:
        """A model of a card's architecture with these weights, fed as this one is."""
        fresh = make_model(card, seed=0)
        fresh.backbone.load_state_dict(dict(tensors))
        return dataclasses.replace(fresh, card=card, blocks_per_pass=self.blocks_per_pass)

    def through(self, layers: Sequence[int]) -> Model:
        """The same model, seen through several layers of its first level at once; a second level is not asked.

        Raises:
            ConfigError: the backbone does not have these layers, or shows none.
        """
        seen = Layered(self.backbone, layers)
        return dataclasses.replace(self, backbone=seen, use_scan_level=False, layers=seen.layers)

    @torch.inference_mode()
    def embed(
        self,
        scan: Study | Volume | Scan,
        *,
        precision: Precision = "fp32",
        tokens: bool = False,
        like_spectre: bool = False,
        spec: InputSpec | None = None,
        pool: Pool = "cls-mean",
        computing: Computing | None = None,
    ) -> Embedding:
        """Embed a whole scan: resample, window, tile, encode. Only a box to `fit`, or a frame, leaves some of it out.

        Args:
            scan: A volume, a study of one, or a `streaming.Scan` that is read as it goes.
            precision: `fp32` is the reference; `bf16` the fastest way that there is, its error is in the facts.
            tokens: Keep the patch tokens too.
            like_spectre: Whole blocks about the middle, as `spectre-fm` takes them; padding is averaged like scan.
            spec: Feed it in another way than the card says; the facts warn of it.
            pool: Keep cls, the mean, or both.
            computing: What `computing` chose before; `precision` is then its own.

        Raises:
            ConfigError: wrong modality or precision, a study of several volumes, or no such way of feeding.
            IngestError: the scan is refused: `not-finite`, `impossible-spacing`, `too-large`, `constant`, `z-scored`.
        """
        feeding = Feeding(spec=spec or self.spec, like_spectre=like_spectre, tokens=tokens, pool=pool)
        computing = computing or self.computing(precision)
        underway = self.begin(scan, feeding)
        packer = Packer(computing.encode_blocks, per_pass=self.blocks_per_pass)
        for start, blocks in underway.blocks():
            packer.put(underway, start, blocks)
        packer.flush()
        return underway.finish(computing)

    def computing(
        self,
        precision: Precision = "fp32",
        *,
        compile: bool = False,  # noqa: A002
        only: Only | None = None,
        blocks_ahead: int = 0,
    ) -> Computing:
        """A way through the network: the reference for fp32, unless a faster one is asked for.

        Args:
            precision: `fp32` or `bf16`.
            compile: Let torch compile it.
            only: `auto` for the fastest by measurement on one block, or the name of one; see `backbones.compute`.
            blocks_ahead: About how many blocks are waiting.

        Raises:
            ConfigError: no such precision or way.
        """
        if precision not in get_args(Precision):
            raise ConfigError(f"precision must be fp32 or bf16, got '{precision}'")
        if precision == "fp32" and not compile and only in (None, "reference"):
            return Reference(backbone=self.backbone)
        return choose(
            self.backbone,
            precision=precision,
            block_ijk=self.spec.block_ijk,
            compile=compile,
            only=only or "auto",
            blocks_ahead=blocks_ahead,
        )

    def begin(self, scan: Study | Volume | Scan, feeding: Feeding, *, hu: str | None = None) -> Underway:
        """Check a scan and lay it out; its blocks can go through the network together with those of others.

        Args:
            scan: As for `embed`.
            feeding: How it is fed.
            hu: What is known of its values, where a door before has checked them (`Facts.hu`).

        Raises:
            ConfigError: wrong modality, or a study of several volumes.
            IngestError: `impossible-spacing` or `too-large`; of other than CT, which is read for it, also `not-finite`,
                `constant` and `z-scored` (`views.intensity.limits`).
        """
        if isinstance(scan, Study):
            if len(scan.volumes) != 1:
                raise ConfigError(f"the study has {len(scan.volumes)} volumes", hint="embed each of study.volumes")
            scan = scan.volumes[0]
        if hu is None:
            hu = judge(scan) if isinstance(scan, Volume) else UNJUDGED
        streamed = of_volume(scan) if isinstance(scan, Volume) else scan
        self._check(streamed)
        laid = lay(streamed, feeding.spec, like_spectre=feeding.like_spectre)
        return Underway(streamed, laid, self, feeding, hu=hu)

    def _check(self, scan: Scan) -> None:
        if scan.modality != self.spec.modality:
            raise ConfigError(
                f"these weights were trained on {self.spec.modality}, the scan is {scan.modality}",
                hint=f"choose weights for {scan.modality}, or a {self.spec.modality} scan",
            )
        channels = self.backbone.config.channels
        if scan.channels != channels:
            raise ConfigError(
                f"these weights take {channels} channel(s), the scan has {scan.channels}",
                hint="embed each channel by itself, or choose other weights",
            )


def make_model(card: Card, *, seed: int) -> Model:
    """An untrained model of the card's architecture; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = _build(card)
    return _model(card, backbone)


def _model(card: Card, backbone: Any) -> Model:
    use = "scan" in card.trained and backbone.has_scan_level
    return Model(backbone=backbone.eval().requires_grad_(False), card=card, use_scan_level=use)


def load(path: str | Path) -> Model:
    """Load the weights folder `path` and check its digest.

    Raises:
        CheckpointError: no weights there, they are damaged, or config.json describes other ones.
    """
    folder = Path(path)
    card = read_card(folder)
    tensors = read_tensors(folder, card)
    # First without memory: a config.json must not make us allocate more than the file beside it holds.
    backbone = _outline(folder, card, tensors=len(tensors))
    form = backbone.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in form.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise CheckpointError(
            f"{folder.name}/model.safetensors does not fit the architecture in its config.json: {len(odd)} tensors "
            f"differ, such as {odd[0]} (wanted {wanted.get(odd[0])}, found {found.get(odd[0])})",
            hint="copy the whole folder again: the two files belong together",
        )
    # The file's tensors become the network's: weights of 1.4 GB are neither drawn nor held twice.
    backbone.load_state_dict({name: tensor.to(form[name].dtype) for name, tensor in tensors.items()}, assign=True)
    return _model(card, backbone)


def _outline(folder: Path, card: Card, *, tensors: int) -> Any:
    """The network that config.json describes, without memory for its tensors.

    Raises:
        CheckpointError: it has more layers than the file has tensors, no machine could hold it, or scans would be fed
            in blocks that it cannot take.
    """
    said = [value for name, value in card.architecture.items() if name.endswith(("depth", "depths"))]
    counts = [count for value in said for count in (value if isinstance(value, tuple) else (value,))]
    layers, block_ijk = sum(count for count in counts if isinstance(count, int)), card.spec.block_ijk
    try:
        if layers > tensors:
            raise ValueError(f"{layers} layers, and the file beside it {tensors} tensors")
        with torch.device("meta"):
            backbone = _build(card)
        if math.prod(block_ijk) > MOST_VOXELS:
            raise ValueError(f"blocks of {block_ijk} voxels")
        if any(block % patch for block, patch in zip(block_ijk, backbone.patch_ijk, strict=True)):
            raise ValueError(f"blocks of {block_ijk} voxels, which patches of {backbone.patch_ijk} do not fill")
    except (ValueError, TypeError, RuntimeError) as error:  # the last two: sizes beyond 64 bits
        why = str(error) if isinstance(error, ValueError) else "sizes beyond every memory"
        raise CheckpointError(
            f"{folder.name}/config.json describes no network that can be: it says {why}",
            hint="copy the whole folder again: the two files belong together",
        ) from error
    return backbone


def _build(card: Card) -> Any:
    kind = BACKBONES[str(card.architecture["name"])]
    return kind(overlay(kind.Config(), card.architecture))
