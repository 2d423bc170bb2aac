from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from voxelstem.embedding import Embedding, Facts, Feeding, judge, pack, read
from voxelstem.errors import ConfigError
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.study import InputSpec

FACTS = Facts(
    seen_mm=(10.0, 20.5, 30.0),
    spacing_mm=(0.75, 0.75, 1.5),
    hu="fits",
    effective_rank=None,
    compute="lean",
    precision="bf16",
    relative_error=0.003,
    warnings=("thick: one", "small: two"),
)
SAID = Embedding(
    scan=np.arange(4, dtype=np.float32),
    blocks=np.ones((2, 4), np.float32),
    grid=(1, 1, 2),
    coverage=0.5,
    tokens=np.zeros((1, 1, 2, 3), np.float32),
    tokens_affine_ras=np.eye(4),
    facts=FACTS,
)


@pytest.mark.parametrize("said", [SAID, replace(SAID, tokens=None, tokens_affine_ras=None), replace(SAID, facts=None)])
def test_an_embedding_comes_back_as_it_was_packed(tmp_path: Path, said: Embedding):
    (tmp_path / "x.npz").write_bytes(pack(said))
    back = read(tmp_path / "x.npz")
    assert back is not None
    assert (back.grid, back.coverage, back.facts) == (said.grid, said.coverage, said.facts)
    for name in ("scan", "blocks", "tokens", "tokens_affine_ras"):
        assert np.array_equal(getattr(back, name), getattr(said, name)), name
    assert pack(back) == pack(said)


def test_facts_of_another_form_make_the_file_none(tmp_path: Path):
    packed = dict(np.load(_file(tmp_path, pack(SAID))))
    for text in ("{}", "[]", "no json", '{"hu": 1}'):
        np.savez(tmp_path / "y.npz", **{**packed, "facts": np.array(text)})
        assert read(tmp_path / "y.npz") is None


def _file(folder: Path, data: bytes) -> Path:
    (folder / "x.npz").write_bytes(data)
    return folder / "x.npz"


def test_hounsfield_units_are_judged_of_a_ct_only():
    body = phantom(PhantomConfig(seed=1, spacing_mm=(8.0, 8.0, 8.0))).volumes[0]
    assert judge(body) == "fits"
    assert judge(replace(body, array=body.array + 1024)) == "no-rescale"
    assert judge(replace(body, modality="MR")) == "not-judged"
    assert judge(replace(body, array=body.array[:, :4, :4, :4], labels=None)) == "not-judged"


def test_a_pool_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="pool must be one of cls-mean, cls, mean"):
        Feeding(spec=InputSpec(), pool="max")  # pyright: ignore[reportArgumentType]
