"""Sigmoid loss for pairs: every scan with every report, a pair or not (Zhai et al. 2023, SigLIP)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Form = Literal["released", "paper"]


def cosines(image: Float[Tensor, "row dim"], text: Float[Tensor, "all dim"]) -> Float[Tensor, "row all"]:
    """Of every image with every text; neither need be normalised."""
    # A lower precision here would lose what decides about the first among many.
    with torch.autocast(image.device.type, enabled=False):
        return F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T


def own_pairs(rows: int, columns: int, *, first: int = 0, device: torch.device) -> Bool[Tensor, "row all"]:
    """True where text number `first` + row stands: the one that belongs to the image of this row."""
    return torch.arange(columns, device=device) == first + torch.arange(rows, device=device)[:, None]


def siglip(
    cosine: Float[Tensor, "row all"],
    temperature: Float[Tensor, " 1"],
    bias: Float[Tensor, " 1"],
    *,
    first: int = 0,
    form: Form = "released",
) -> Float[Tensor, ""]:
    """Mean over the images of minus log sigmoid(logit) for their own text and of minus log sigmoid(-logit) for others.

    The logit is exp(temperature) * cosine + bias. `released`: the others are summed, as SPECTRE was trained. `paper`
    (arXiv 2511.17209, equation 19): the others are averaged, and there is no bias. That equation's average over both
    directions changes nothing: row by row or column by column, the same terms are added up.

    Rows are a share of the whole batch, whose texts stand in the columns; image 0 belongs to text number `first`. The
    mean over shares of one size is the loss of the whole batch.
    """
    own = own_pairs(*cosine.shape, first=first, device=cosine.device)
    logits = temperature.float().exp() * cosine
    logits = logits + bias.float() if form == "released" else logits
    # Minus the logit where the answer is no: one pass for both.
    terms = F.logsigmoid(torch.where(own, logits, -logits))
    if form == "paper":
        terms = torch.where(own, terms, terms / max(cosine.shape[1] - 1, 1))
    return -terms.sum(dim=1).mean()


@torch.no_grad()
def pair_figures(cosine: Float[Tensor, "row all"], *, first: int = 0) -> dict[str, Float[Tensor, ""]]:
    """How alike pairs and others are, and how often an image's own text is the first of all; rows as in `siglip`.

    Texts that are equally near share the first place: where all embeddings are the same, `top1` is chance.
    """
    own = own_pairs(*cosine.shape, first=first, device=cosine.device)
    best = cosine == cosine.amax(dim=1, keepdim=True)
    return {
        "cosine/pairs": cosine[own].mean(),
        "cosine/others": cosine[~own].sum() / max(own.numel() - len(own), 1),
        "top1": ((best & own).sum(dim=1) / best.sum(dim=1)).mean(),
    }
