"""The network that is fine-tuned: a backbone whose decoder labels voxels, or a small head over its mean patch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.backbones import BACKBONES
from voxelstem.backbones.convolution import cells_of, resize_convolutions
from voxelstem.backbones.heads import PooledHead, SkipDecoder, TokenPainter
from voxelstem.backbones.lowrank import Changed, Draws, put_beside
from voxelstem.card import Card
from voxelstem.chance import Chance
from voxelstem.config import flatten, overlay
from voxelstem.errors import ConfigError
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.model import Model


class Tuned(nn.Module):
    """Several contrasts in, logits out: of every voxel where `voxels`, else of the scan.

    A backbone that tells subject and contrast apart is asked as FOMO25's winner was: what it says of the subject is
    averaged over contrasts, and voxels are labelled by a decoder of its own, with skips.
    """

    def __init__(self, backbone: Any, *, out: int, config: FinetuneConfig, voxels: bool) -> None:
        """`out` counts classes, background included, or the numbers that are predicted."""
        super().__init__()
        self.backbone, self.out = backbone, out
        self.contrasts = config.channels
        self.late = config.fusion == "late" and config.channels > 1
        self.shared = backbone.config.latent if hasattr(backbone, "latents_of") else 0
        """Leading entries of a cls that say whose scan it is."""
        self.fusion: nn.Parameter | None = None
        self.painter: SkipDecoder | TokenPainter | None = None
        self.head: PooledHead | None = None
        if not voxels:
            count = config.channels if self.late else 1
            self.head = PooledHead(self.shared + count * (backbone.dim - self.shared), out)
            return
        if self.late:
            self.fusion = nn.Parameter(torch.zeros(config.channels))
        if self.shared:
            self.painter = SkipDecoder((*backbone.config.widths[:-1], backbone.dim), out)
        elif not hasattr(backbone, "decode"):
            self.painter = TokenPainter(backbone.dim, out)

    def forward(
        self, x: Float[Tensor, "row contrast i j k"], *, keys: Chance | None = None
    ) -> Float[Tensor, "row out"] | Float[Tensor, "row kind i j k"]:
        """Logits; `keys`, one for each row, leave features of the head out as in training."""
        each = x.flatten(0, 1)[:, None] if self.late else x
        if self.head is None:
            return self._joined(self._painted(each))
        cls, _ = self.backbone.encode_blocks(each)
        described = cls.view(x.shape[0], -1, cls.shape[-1])  # len() is a constant to those who export networks
        shared = described[..., : self.shared].mean(dim=1)
        return self.head(torch.cat([shared, described[..., self.shared :].flatten(1)], dim=1), keys)

    def _painted(self, each: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row kind i j k"]:
        if isinstance(self.painter, TokenPainter):
            i, j, k = each.shape[2:]
            _, tokens = self.backbone.encode_blocks(each)
            return self.painter(tokens, cells_of(each, self.backbone.patch_ijk), (i, j, k))
        maps = self.backbone.features(each)
        if self.painter is None:
            return self.backbone.decode(maps)
        grid = maps[-1].shape[2:]
        found = self.backbone.latents_of(torch.cat([F.adaptive_avg_pool3d(x, grid) for x in maps], dim=1))
        subject, contrast = found.subject_mean, found.contrast_mean
        if self.late:
            many = subject.unflatten(0, (-1, self.contrasts))
            subject = many.mean(dim=1, keepdim=True).expand_as(many).flatten(0, 1)
        return self.painter(torch.cat((subject, contrast), dim=1), maps[:-1])

    def _joined(self, logits: Float[Tensor, "row kind i j k"]) -> Float[Tensor, "row kind i j k"]:
        """Of contrasts that were looked at one by one, the mean under learned weights."""
        if self.fusion is None:
            return logits
        weights = self.fusion.softmax(0).view(1, -1, 1, 1, 1, 1)
        return (logits.unflatten(0, (-1, self.contrasts)) * weights).sum(dim=1)

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What is trained of the pretrained encoder, and the parameters of decoder, head and fusion."""
        encoder: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        changed = any(isinstance(module, Changed) for module in self.backbone.modules())
        for name, parameter in self.named_parameters():
            if name.startswith("backbone.decoder") or not name.startswith("backbone."):
                rest.append(parameter)
            elif not changed or ".lora_" in name:
                encoder.append(parameter)
        return encoder, rest

    def depths(self) -> dict[nn.Parameter, int]:
        """How many layers lie above each parameter of the backbone, those of its decoder included."""
        by_depth = [(depth, dict(named)) for depth, named in self.backbone.param_groups()]
        last = max(depth for depth, _ in by_depth)
        return {parameter: last - depth for depth, named in by_depth for parameter in named.values()}

    def own(self) -> dict[str, Tensor]:
        """What is not the backbone's: head and fusion."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("backbone.")}


def build(model: Model, *, out: int, config: FinetuneConfig, voxels: bool, seed: int) -> tuple[Tuned, Card]:
    """A network that begins with the model's weights where they fit, and the card of what it will become.

    What is new (the last layer of a decoder, a head) is drawn under the seed. A first layer that sees more contrasts
    than before gets the old one once for each, divided by their number: equal channels give what one gave before.

    Raises:
        ConfigError: the backbone has no decoder, or scans are fitted to a block.
    """
    card = model.card
    if card.spec.resampling == "fit":
        raise ConfigError("these weights take each scan as one block: windows cannot slide over it", hint="use a probe")
    # Windows slide over all of a scan, and voxel labels lie on the grid that covers it: no frame.
    spec = dataclasses.replace(card.spec, frame_ijk=None, block_ijk=config.patch_ijk or card.spec.block_ijk)
    changes: dict[str, Any] = {"block_ijk": spec.block_ijk} if "block_ijk" in card.architecture else {}
    if config.fusion == "early":
        _check_stem(model, config)
        changes["channels"] = config.channels
    if voxels and hasattr(model.backbone, "decode"):
        changes |= {"out_channels": out, "decoder": True}
    kind = BACKBONES[str(card.architecture["name"])]
    settings = overlay(kind.Config(), dict(card.architecture) | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Tuned(kind(settings), out=out, config=config, voxels=voxels)
    old = model.backbone.state_dict()
    if config.transfer == "encoder":
        old = {name: tensor for name, tensor in old.items() if not name.startswith("decoder")}
    net.backbone.load_state_dict(carry(old, net.backbone.state_dict()))
    if config.changes == "low_rank":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            put_beside(net.backbone, config.targets, config.low_rank, Draws())
    if config.sizes == "drawn":
        resize_convolutions(net.backbone)
    after = dataclasses.replace(
        card,
        architecture=flatten(settings),
        spec=spec if spec.block_ijk == card.spec.block_ijk else dataclasses.replace(spec, preset=""),
        parent=card.sha256,
        trained=("block",),
        sha256="",
        extras={},
    )
    return net, after


def restore(model: Model, own: Mapping[str, Tensor], *, out: int, config: FinetuneConfig, voxels: bool) -> Tuned:
    """The network that `build` made and training changed, from its backbone and from what `own` gave.

    Raises:
        RuntimeError: the tensors are another network's.
    """
    net = Tuned(model.backbone, out=out, config=config, voxels=voxels)
    net.load_state_dict({f"backbone.{name}": value for name, value in model.backbone.state_dict().items()} | dict(own))
    return net.eval().requires_grad_(requires_grad=False)


def carry(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the new network, those of the old one where they fit; a wider input repeats and divides them."""
    kept: dict[str, Tensor] = {}
    for name, fresh in new.items():
        given = old.get(name)
        if given is not None and given.shape == fresh.shape:
            kept[name] = given
        elif given is not None and _widens(given, fresh):
            times = fresh.shape[1] // given.shape[1]
            kept[name] = given.repeat(1, times, *[1] * (given.ndim - 2)) / times
        else:
            kept[name] = fresh
    return kept


def _widens(given: Tensor, fresh: Tensor) -> bool:
    """Whether two kernels differ in nothing but a whole multiple of input channels."""
    if given.ndim != fresh.ndim or given.ndim < 3:  # noqa: PLR2004 - (out, in, kernel…)
        return False
    alike = given.shape[0] == fresh.shape[0] and given.shape[2:] == fresh.shape[2:]
    return alike and fresh.shape[1] % given.shape[1] == 0


def _check_stem(model: Model, config: FinetuneConfig) -> None:
    """A convolution sees more contrasts by repeating its kernels; a patch embedding would have to be drawn anew."""
    if config.channels > 1 and isinstance(getattr(model.backbone, "embed", None), nn.Linear):
        raise ConfigError(
            f"a {model.card.architecture['name']} takes {model.backbone.config.channels} channel(s) in",
            hint="use full.fusion=late: contrasts then go through it one by one",
        )
