"""Health signs of a run: does the embedding collapse, and does it help a probe that never trains it?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from voxelstem.metrics import effective_rank
from voxelstem.protocols import Backbone
from voxelstem.store.reader import Record, Store
from voxelstem.study import InputSpec
from voxelstem.views.crop import ViewKind, apply_view, covering_crop, draw_views
from voxelstem.views.intensity import window


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSet:
    """Fixed blocks with a label for each patch: the class of most of its voxels."""

    blocks: Float[Tensor, "n channel i j k"]
    labels: Int[Tensor, "n patch"]
    held_out: Float[Tensor, " n"]
    """1 where the block belongs to a subject that the probe is tested on."""


def draw_probe_set(
    store: Store, records: list[Record], spec: InputSpec, *, patch_ijk: tuple[int, int, int], blocks: int, seed: int
) -> ProbeSet | None:
    """Draw blocks out of labelled scans, half of the subjects for fitting and half for testing.

    None where fewer than two subjects carry voxel labels.
    """
    labelled = sorted((record for record in records if record.classes), key=lambda record: record.key)
    subjects = sorted({record.subject for record in labelled})
    if len(subjects) < 2:  # noqa: PLR2004 - one to fit, one to test
        return None
    rng = np.random.default_rng([seed, 7])
    kind = ViewKind(size_ijk=spec.block_ijk)
    views, labels, held_out = [], [], []
    for index in range(blocks):
        subject = subjects[index % len(subjects)]
        choices = [record for record in labelled if record.subject == subject]
        record = choices[int(rng.integers(len(choices)))]
        extent = tuple(n * s for n, s in zip(record.shape_ijk, record.spacing_mm, strict=True))
        plan = draw_views(kind, spec, ((0.0, 0.0, 0.0), (extent[0], extent[1], extent[2])), rng)[0]
        crop = covering_crop(plan, record.spacing_mm, record.shape_ijk)
        voxels = store.crop(record.key, crop.start_ijk, crop.size_ijk)
        view = apply_view(torch.from_numpy(voxels), plan, crop, spacing_mm=record.spacing_mm, outside=spec.low_hu)
        views.append(window(view, spec))
        truth = store.label_crop(record.key, crop.start_ijk, crop.size_ijk)
        number = {
            name: index for index, name in enumerate(sorted({n for r in labelled for n in r.classes.values()}), 1)
        }
        onehot = np.stack([truth == -1, *(np.zeros_like(truth, dtype=bool) for _ in number)])
        onehot[0] = True
        for value, name in record.classes.items():
            onehot[number[name]] = truth == value
            onehot[0] &= truth != value
        share = apply_view(
            torch.from_numpy(onehot.astype(np.float32)), plan, crop, spacing_mm=record.spacing_mm, outside=0.0
        )
        pooled = torch.nn.functional.avg_pool3d(share[None], patch_ijk, patch_ijk)[0]
        labels.append(pooled.argmax(dim=0).flatten())
        held_out.append(float(subjects.index(subject) % 2))
    return ProbeSet(blocks=torch.stack(views), labels=torch.stack(labels), held_out=torch.tensor(held_out))


@torch.no_grad()
def token_rank(backbone: Backbone, blocks: Float[Tensor, "n channel i j k"]) -> float:
    """Effective rank of the patch tokens of some fixed blocks."""
    return effective_rank(_tokens(backbone, blocks).flatten(0, 1)[:2048].numpy())


@torch.no_grad()
def probe_patches(backbone: Backbone, probe: ProbeSet) -> float:
    """Balanced accuracy of ridge regression from frozen patch tokens to classes.

    Fitted on the subjects of one half, tested on the other half's. Chance is 1 / number of classes.
    """
    tokens = _tokens(backbone, probe.blocks)
    fit, test = probe.held_out == 0, probe.held_out == 1
    known = torch.unique(probe.labels[fit])
    x, y = tokens[fit].flatten(0, 1).double(), probe.labels[fit].flatten()
    mean, deviation = x.mean(dim=0), x.std(dim=0) + 1e-6
    x = torch.nn.functional.pad((x - mean) / deviation, (0, 1), value=1.0)
    weight = 1.0 / torch.bincount(y, minlength=int(known.max()) + 1).clamp_min(1)[y].double()
    target = (y[:, None] == known[None]).double()
    gram = (x * weight[:, None]).T @ x + 1e-3 * torch.eye(x.shape[1], dtype=x.dtype)
    coefficients = torch.linalg.solve(gram, (x * weight[:, None]).T @ target)
    z = torch.nn.functional.pad((tokens[test].flatten(0, 1).double() - mean) / deviation, (0, 1), value=1.0)
    guess, truth = known[(z @ coefficients).argmax(dim=1)], probe.labels[test].flatten()
    recalls = [float((guess[truth == name] == name).double().mean()) for name in torch.unique(truth)]
    return float(np.mean(recalls))


def _tokens(backbone: Backbone, blocks: Float[Tensor, "n channel i j k"]) -> Float[Tensor, "n patch dim"]:
    return backbone.encode_blocks(blocks)[1].float().cpu()
