"""The block level of a `ScanVit` for inference only: the same function, with less around each product.

Nothing here is approximate: fp32 results differ from the reference by rounding (about 1e-6 of the largest value).
What is saved: rotary tables are kept for each grid and touch only the rows that lie somewhere, in place; the branch
scales join the residual sum (or the weights, where those are copied anyway); the patch embedding takes the voxels
as they are. Weights are shared with the reference wherever the form allows it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.backbones.encoder import Encoder
from voxelstem.backbones.layers import Block, grid_positions, pair_order, place_code, rope_turns
from voxelstem.backbones.scan_vit import ScanVit, patchify

Kernel = Literal["fused", "plain"]
Table = Tensor | tuple[Tensor, Tensor]
"""Turns of the rows that lie somewhere: complex (token, 1, 1, half), or cosines and sines of that shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How the weights lie. The plain form shares every large tensor with the reference, the others copy some."""

    dtype: torch.dtype = torch.float32
    """Of the products; residual sum, LayerNorm and rotary angles stay fp32."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    head_multiple: int = 1
    """Head dimensions are filled up with zeros to a multiple of this: 90 -> 96 for kernels that want 8 or 16."""
    half_split: bool = False
    """Pair row d with d + half and turn with real numbers, for compilers and export formats without complex ones."""

    def moved(self, tensor: Tensor) -> Tensor:
        """The tensor in this form's number format and place; itself where it already is."""
        return tensor.detach().to(self.device, self.dtype)


class LeanBlock(nn.Module):
    """One transformer block of a `Block`'s tensors."""

    def __init__(self, block: Block, form: Form) -> None:
        """Take over the tensors; see `Form` for which are copied."""
        super().__init__()
        self.form = form
        self.heads = block.attn.heads
        dim = block.attn.qkv.in_features
        self.head_dim = dim // self.heads
        self.padded = math.ceil(self.head_dim / form.head_multiple) * form.head_multiple
        self.eps = block.norm1.eps
        self.kernel: Kernel = "fused"
        folded = form.dtype != torch.float32
        tensors = {
            "norm1": (block.norm1.weight, block.norm1.bias),
            "qkv": self._ordered(block.attn.qkv),
            "proj": _scaled(self._widened(block.attn.proj), block.scale1, folded=folded),
            "norm2": (block.norm2.weight, block.norm2.bias),
            "fc1": (block.fc1.weight, block.fc1.bias),
            "fc2": _scaled((block.fc2.weight, block.fc2.bias), block.scale2, folded=folded),
        }
        for name, (weight, bias) in tensors.items():
            # LayerNorm adds up in fp32, on the fp32 residual sum.
            keep = name.startswith("norm")
            for part, tensor in (("weight", weight), ("bias", bias)):
                moved = tensor.detach().to(form.device) if keep else form.moved(tensor)
                self.register_buffer(f"{name}_{part}", moved, persistent=False)
        for name, scale in (("scale1", block.scale1), ("scale2", block.scale2)):
            moved = None if folded else scale.detach().to(form.device)
            self.register_buffer(name, moved, persistent=False)

    def forward(self, x: Float[Tensor, "row token dim"], table: Table) -> Float[Tensor, "row token dim"]:
        """Attend, then think. `x` is fp32 and stays as it is."""
        own: Any = self  # buffers are tensors; nn.Module cannot say so
        seen = F.layer_norm(x, x.shape[-1:], own.norm1_weight, own.norm1_bias, self.eps).to(self.form.dtype)
        x = _added(x, F.linear(self.attend(seen, table), own.proj_weight, own.proj_bias), own.scale1)
        seen = F.layer_norm(x, x.shape[-1:], own.norm2_weight, own.norm2_bias, self.eps).to(self.form.dtype)
        hidden = F.gelu(F.linear(seen, own.fc1_weight, own.fc1_bias))
        return _added(x, F.linear(hidden, own.fc2_weight, own.fc2_bias), own.scale2)

    def attend(self, seen: Float[Tensor, "row token dim"], table: Table) -> Float[Tensor, "row token width"]:
        """What the heads bring together, side by side, before the output projection."""
        own: Any = self
        qkv = F.linear(seen, own.qkv_weight, own.qkv_bias).unflatten(-1, (3, self.heads, self.padded))
        if isinstance(table, tuple):
            looks = _turned(qkv[:, :, :2], *table, width=self.head_dim)
        else:
            looks = _turn(qkv[:, :, :2], table, width=self.head_dim)
        query, key = (part.transpose(1, 2) for part in looks.unbind(2))
        value = qkv[:, :, 2].transpose(1, 2)
        scale = self.head_dim**-0.5  # of the true size: the zeros add nothing to a product
        if self.kernel == "fused":
            mixed = F.scaled_dot_product_attention(query, key, value, scale=scale)
        else:
            shares = ((query * scale) @ key.transpose(-1, -2)).softmax(dim=-1, dtype=torch.float32)
            mixed = shares.to(value.dtype) @ value
        return mixed.transpose(1, 2).flatten(2)

    def _ordered(self, qkv: nn.Linear) -> tuple[Tensor, Tensor]:
        """Rows of query, key and value as the form wants them: pairs apart, heads filled up with zeros."""
        if self.padded == self.head_dim and not self.form.half_split:
            return qkv.weight, qkv.bias
        weight = qkv.weight.detach().unflatten(0, (3, self.heads, self.head_dim))
        bias = qkv.bias.detach().unflatten(0, (3, self.heads, self.head_dim))
        if self.form.half_split:
            order = torch.tensor(pair_order(self.head_dim), device=weight.device).argsort()
            weight = torch.cat([weight[:2].index_select(2, order), weight[2:]])
            bias = torch.cat([bias[:2].index_select(2, order), bias[2:]])
        more = self.padded - self.head_dim
        return F.pad(weight, (0, 0, 0, more)).flatten(0, 2), F.pad(bias, (0, more)).flatten()

    def _widened(self, proj: nn.Linear) -> tuple[Tensor, Tensor]:
        """The output projection with columns of zeros for the zeros of the heads."""
        if self.padded == self.head_dim:
            return proj.weight, proj.bias
        weight = proj.weight.detach().unflatten(1, (self.heads, self.head_dim))
        return F.pad(weight, (0, self.padded - self.head_dim)).flatten(1), proj.bias


class LeanEncoder(nn.Module):
    """The blocks of an `Encoder` with its prefix and its last LayerNorm."""

    def __init__(self, encoder: Encoder, form: Form) -> None:
        """Take over the tensors, one block at a time."""
        super().__init__()
        self.config = encoder.config
        self.form = form
        self.head_dim = encoder.config.dim // encoder.config.heads
        self.blocks = nn.ModuleList(LeanBlock(block, form) for block in encoder.blocks if isinstance(block, Block))
        for name, tensor in (
            ("prefix", encoder.prefix),
            ("norm_weight", encoder.norm.weight),
            ("norm_bias", encoder.norm.bias),
        ):
            self.register_buffer(name, tensor.detach().to(form.device), persistent=False)
        place = None if encoder.place is None else encoder.place.weight.detach().to(form.device)
        self.register_buffer("place", place, persistent=False)

    def forward(
        self, x: Float[Tensor, "row token dim"], table: Table, positions: Float[Tensor, "token 3"]
    ) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row token dim"]]:
        """The cls token and the others, fp32; `table` as made by `table` of the same positions."""
        own: Any = self
        if own.place is not None:
            x = x.float() + F.linear(place_code(positions.to(self.form.device), self.config.place_codes), own.place)
        x = torch.cat([own.prefix.expand(x.shape[0], -1, -1), x.float()], dim=1)
        for block in self.blocks:
            x = block(x, table)
        x = F.layer_norm(x, x.shape[-1:], own.norm_weight, own.norm_bias, self.config.eps)
        return x[:, 0], x[:, 1 + self.config.registers :]

    def table(self, positions: Float[Tensor, "token 3"]) -> Table:
        """Rotary turns of tokens at `positions` in (-1, 1), fp32 whatever the form's dtype is."""
        if not self.form.half_split:
            turns = rope_turns(positions, self.head_dim, base=self.config.rope_base)
            return turns[:, None, None].to(self.form.device)
        count = self.head_dim // 6
        exponent = torch.arange(count, dtype=torch.float32, device=positions.device) / count
        angles = (2 * math.pi * positions[..., None] / self.config.rope_base**exponent).flatten(-2)[:, None, None]
        return angles.cos().to(self.form.device), angles.sin().to(self.form.device)

    def set_kernel(self, kernel: Kernel) -> None:
        """`fused`: torch's scaled_dot_product_attention; `plain`: two products with a softmax between."""
        for block in self.blocks:
            if isinstance(block, LeanBlock):
                block.kernel = kernel


class LeanVit(nn.Module):
    """The block level of a `ScanVit`. Made once, of weights that no longer change."""

    def __init__(self, backbone: ScanVit, form: Form | None = None) -> None:
        """Take over the tensors of the patch embedding and the block encoder."""
        super().__init__()
        self.form = form or Form()
        self.patch_ijk = backbone.patch_ijk
        weight, bias = backbone.embed.weight.detach(), backbone.embed.bias.detach()
        if backbone.config.inputs == "centred":
            # W (2v - 1) + b = 2W v + (b - sum of W's rows)
            weight, bias = 2 * weight, bias - weight.sum(dim=1)
        self.register_buffer("embed_weight", self.form.moved(weight), persistent=False)
        self.register_buffer("embed_bias", self.form.moved(bias), persistent=False)
        self.encoder = LeanEncoder(backbone.block_encoder, self.form)
        self.config = backbone.config
        self.readout = None if backbone.readout is None else copy.deepcopy(backbone.readout).to(self.form.device)
        self.atlas = None if backbone.atlas is None else copy.deepcopy(backbone.atlas).to(self.form.device)
        self._tables: dict[tuple[int, int, int], Table] = {}

    def forward(
        self, blocks: Float[Tensor, "row channel i j k"]
    ) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row patch dim"]]:
        """Cls and patch tokens of each block (windowed to [0, 1], on the form's device), fp32."""
        own: Any = self
        self.config.check_whole(blocks.shape[-3:])
        patches = patchify(blocks.to(self.form.dtype), self.patch_ijk)
        sizes = [size // patch for size, patch in zip(blocks.shape[-3:], self.patch_ijk, strict=True)]
        table = self.table((sizes[0], sizes[1], sizes[2]))
        positions = grid_positions((sizes[0], sizes[1], sizes[2]))
        cls, tokens = self.encoder(F.linear(patches, own.embed_weight, own.embed_bias), table, positions)
        if self.readout is not None:
            cls = cls + self.readout(tokens)
        if self.atlas is not None:
            cls = cls + self.atlas(patchify(blocks.float(), self.patch_ijk))
        return cls, tokens

    def table(self, grid: tuple[int, int, int]) -> Table:
        """Rotary turns of a block's patches, made once for each grid."""
        if grid not in self._tables:
            self._tables[grid] = self.encoder.table(grid_positions(grid))
        return self._tables[grid]


class LeanScan(nn.Module):
    """The scan level of a `ScanVit`; it takes positions instead of a grid, so that a file of it serves any grid."""

    def __init__(self, backbone: ScanVit, form: Form | None = None) -> None:
        """Take over the tensors.

        Raises:
            ValueError: the architecture has no scan level.
        """
        super().__init__()
        if backbone.scan_encoder is None or backbone.scan_project is None:
            raise ValueError("this backbone has no scan level: scan.depth is 0")
        self.form = form or Form()
        self.register_buffer("project_weight", self.form.moved(backbone.scan_project.weight), persistent=False)
        self.register_buffer("project_bias", self.form.moved(backbone.scan_project.bias), persistent=False)
        self.encoder = LeanEncoder(backbone.scan_encoder, self.form)

    def forward(
        self, described: Float[Tensor, "batch n described"], positions: Float[Tensor, "n 3"]
    ) -> tuple[Float[Tensor, "batch scan_dim"], Float[Tensor, "batch n scan_dim"]]:
        """The scan's token and one for each block; `positions` as by `layers.grid_positions`."""
        own: Any = self
        x = F.linear(described.to(self.form.dtype), own.project_weight, own.project_bias)
        return self.encoder(x, self.encoder.table(positions), positions)


def _turn(looks: Tensor, turns: Tensor, *, width: int) -> Tensor:
    """Turn neighbouring pairs of (row, token, query|key, head, dim) in place; rows before the table's keep theirs."""
    placed = looks[:, looks.shape[1] - turns.shape[0] :, ..., :width]
    wide = placed.float()  # itself where it is fp32 already
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(turns)
    if wide is not placed:
        placed.copy_(wide)
    return looks


def _turned(looks: Tensor, cosine: Tensor, sine: Tensor, *, width: int) -> Tensor:
    """The same for half-split pairs, with real numbers and nothing in place."""
    prefix, half = looks.shape[1] - cosine.shape[0], width // 2
    placed = looks[:, prefix:]
    first, second = placed[..., :half].float(), placed[..., half:width].float()
    parts = [first * cosine - second * sine, second * cosine + first * sine]
    turned = torch.cat([*(part.to(looks.dtype) for part in parts), placed[..., width:]], dim=-1)
    return torch.cat([looks[:, :prefix], turned], dim=1)


def _scaled(parts: tuple[Tensor, Tensor], scale: Tensor, *, folded: bool) -> tuple[Tensor, Tensor]:
    weight, bias = parts
    if not folded:
        return weight, bias
    return weight.detach() * scale.detach()[:, None], bias.detach() * scale.detach()


def _added(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """Add x + scale * branch; without a scale it is in the branch already."""
    return x + branch if scale is None else torch.addcmul(x, branch, scale)
