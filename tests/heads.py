"""Phantom heads with voxel labels, and what their labels say at a view, one voxel after another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from voxelstem.sources.brain import BrainConfig, brain
from voxelstem.study import InputSpec
from voxelstem.views.augment import AugmentConfig
from voxelstem.views.crop import ViewKind
from voxelstem.views.multicrop import ViewsConfig

EDGE = 8.0
SPEC = InputSpec(modality="MR", spacing_mm=(EDGE,) * 3, low_hu=0.0, high_hu=1000.0, block_ijk=(8, 8, 8))
WHOLE = ViewKind(size_ijk=(8, 8, 8), count=2)
VIEWS = ViewsConfig(global_=WHOLE, local=replace(WHOLE, count=0), augment=AugmentConfig(flip_axes=(0, 2)))


def drawn(seed, **settings):
    return brain(BrainConfig(seed=seed, shape_ijk=(16, 20, 16), spacing_mm=(EDGE,) * 3, **settings))


def naive(labels, place, size, edge):
    """One voxel after another: the value in whose cell its middle lies."""
    found = np.zeros(size, np.int16)
    for at in np.ndindex(*size):
        middle = [place[0][axis] + (at[axis] + 0.5) * place[1][axis] / size[axis] for axis in range(3)]
        index = [int(np.floor(middle[axis] / edge)) for axis in range(3)]
        if all(0 <= index[axis] < labels.shape[axis] for axis in range(3)):
            found[at] = labels[tuple(index)]
    return found
