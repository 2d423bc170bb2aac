"""Six subjects with two contrasts of one ball each, and a small network that never saw them."""

from __future__ import annotations

import numpy as np
import pytest

from voxelstem.card import Card
from voxelstem.model import Model, make_model
from voxelstem.store import Fractions, Store, write
from voxelstem.store.subjects import pseudonym
from voxelstem.study import Acquisition, InputSpec, LabelMap, Provenance, Study, Volume

SHAPE = (18, 20, 14)
SPEC = InputSpec(modality="MR", spacing_mm=(1.0, 1.0, 1.0), block_ijk=(16, 16, 16), normalisation="zscore")
UNET = {"name": "unet", "features": (4, 8), "depths": (1, 1), "strides": (1, 2), "block_ijk": (16, 16, 16)}
DISENTANGLED = {"name": "disentangled", "width": 2, "levels": 3, "latent": 4, "block_ijk": (16, 16, 16)}


def ball(seed: int, contrast: str, *, shift_mm: float = 0.0) -> Study:
    """A ball as large as the seed says, brighter on one contrast than on the other."""
    rng = np.random.default_rng(seed)
    middle, radius = rng.uniform(6, 10, 3), 2.5 + 0.4 * seed
    apart = np.sqrt(
        sum((np.arange(size).reshape(-1, *[1] * (2 - axis)) - middle[axis]) ** 2 for axis, size in enumerate(SHAPE))
    )
    inside = apart < radius
    sign = 1.0 if contrast == "T1w" else 0.5
    noise = np.random.default_rng([seed, len(contrast)]).normal(0, 8, SHAPE)
    affine = np.eye(4)
    affine[0, 3] = shift_mm
    volume = Volume(
        array=(100 + sign * 60 * inside + noise).astype(np.float32)[None],
        affine_ras=affine,
        modality="MR",
        provenance=Provenance(source_format="phantom", sha256=f"{seed}{contrast}", orientation="RAS"),
        acquisition=Acquisition(contrast=contrast, session="1"),
        labels=LabelMap(array=inside.astype(np.int16), classes={1: "ball"}) if contrast == "T1w" else None,
    )
    return Study(
        subject=pseudonym(f"ball{seed}", bytes(32)), volumes=(volume,), labels={"volume:ball": str(int(inside.sum()))}
    )


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    opened = Store.create(
        tmp_path_factory.mktemp("balls") / "store", fractions=Fractions(train=1.0, validation=0.0, test=0.0)
    )
    for seed in range(6):
        for contrast in ("T1w", "FLAIR"):
            write(opened, ball(seed, contrast))
    return opened


@pytest.fixture(scope="session")
def unet() -> Model:
    return make_model(Card(architecture=UNET, spec=SPEC, sha256="a" * 64), seed=0)


@pytest.fixture(scope="session")
def disentangled() -> Model:
    return make_model(Card(architecture=DISENTANGLED, spec=SPEC, sha256="b" * 64), seed=0)


@pytest.fixture(scope="session")
def plain() -> Study:
    return ball(9, "T1w")


@pytest.fixture(scope="session")
def shifted() -> Study:
    """Of the same session, a voxel further right."""
    return ball(9, "FLAIR", shift_mm=1.0)
