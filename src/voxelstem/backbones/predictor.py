"""From the tokens that were seen to those that were not: MAE's decoder and JEPA's predictor."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from voxelstem.backbones.encoder import Encoder, EncoderConfig, init_linear


class Predictor(nn.Module):
    """A narrow transformer over visible tokens and mask tokens, each at its place; then one linear layer.

    He et al. 2021 (section 3, the decoder) and Assran et al. 2023 (I-JEPA, section 3, the predictor). Places enter by
    rotary positions in every block, so nothing that a block would have to learn stands for them.
    """

    def __init__(self, dim: int, out: int, config: EncoderConfig, *, context_dim: int = 0) -> None:
        """`dim` numbers in a visible token, `out` in an answer, `context_dim` in what is said about a whole row.

        Raises:
            ValueError: no block, so mask tokens would never look at anything nor know where they are.
        """
        super().__init__()
        if not config.depth:
            raise ValueError("a predictor needs depth >= 1: without a block mask tokens see nothing, got depth=0")
        self.narrow = nn.Linear(dim, config.dim)
        self.context = nn.Linear(context_dim, config.dim) if context_dim else None
        self.mask_token = nn.Parameter(torch.zeros(config.dim))
        self.encoder = Encoder(config)
        self.answer = nn.Linear(config.dim, out)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for layer in (self.narrow, self.context, self.answer):
            if layer is not None:
                init_linear(layer)

    def forward(
        self,
        visible: Float[Tensor, "row kept dim"],
        visible_at: Float[Tensor, "row kept 3"],
        hidden_at: Float[Tensor, "row hidden 3"],
        context: Float[Tensor, "row context_dim"] | None = None,
    ) -> Float[Tensor, "row hidden out"]:
        """What stands at the hidden places, positions in (-1, 1). `context` is told to every token of its row."""
        seen = self.narrow(visible)
        masks = self.mask_token.expand(*hidden_at.shape[:2], -1).to(seen.dtype)
        x = torch.cat([seen, masks], dim=1)
        if self.context is not None and context is not None:
            x = x + self.context(context)[:, None]
        _, tokens = self.encoder(x, torch.cat([visible_at, hidden_at], dim=1))
        return self.answer(tokens[:, visible_at.shape[1] :])


def take(rows: Float[Tensor, "row patch dim"], index: Tensor) -> Float[Tensor, "row chosen dim"]:
    """Pick other patches in every row; `index` is (row, chosen)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
