from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from voxelstem.backbones.layers import grid_positions
from voxelstem.card import Card
from voxelstem.errors import ConfigError
from voxelstem.geometry import voxel_to_patient
from voxelstem.model import Model, make_model
from voxelstem.report import inside
from voxelstem.report.inside import look_inside
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.study import InputSpec, Volume
from voxelstem.views.intensity import limits, window
from voxelstem.views.tile import cover, tile

SPEC = InputSpec(spacing_mm=(10.0, 10.0, 10.0), low_hu=-200.0, high_hu=300.0, block_ijk=(16, 16, 16))
ARCHITECTURE = {
    "name": "scan_vit",
    "block_ijk": (16, 16, 16),
    "block.dim": 24,
    "block.depth": 2,
    "block.heads": 2,
    "scan.dim": 24,
    "scan.heads": 2,
    "scan.depth": 1,
}


def model(*trained: str, spec: InputSpec = SPEC, depth: int = 2) -> Model:
    architecture = ARCHITECTURE | {"block.depth": depth}
    return make_model(Card(architecture=architecture, spec=spec, trained=trained, licence="cc0-1.0"), seed=0)


@pytest.fixture(scope="module")
def volume() -> Volume:
    return phantom(PhantomConfig(seed=1, spacing_mm=(10.0, 10.0, 10.0))).volumes[0]


def test_the_picture_and_the_facts_say_where_and_how(volume: Volume):
    found = look_inside(volume, model("block", "scan"), at_ijk=(20, 10, 12))
    facts = json.loads(json.dumps(found.facts))
    assert facts["at_ijk"] == [20, 10, 12]
    np.testing.assert_allclose(
        facts["at_mm"], voxel_to_patient(np.array([[20.0, 10.0, 12.0]]), volume.affine_ras)[0], atol=0.051
    )
    assert facts["value"] == volume.array[0, 20, 10, 12]
    assert (facts["coverage"], facts["fed_spacing_mm"], facts["window"]) == (1.0, [10.0, 10.0, 10.0], [-200.0, 300.0])
    assert facts["grid"] == [int(np.ceil(size / 16)) for size in volume.shape_ijk]
    assert len(facts["panels"]) == 3
    picture = np.asarray(Image.open(io.BytesIO(found.picture.png)).convert("RGB"))
    assert picture.shape[1] > picture.shape[0]
    green = (picture == np.array([0x39, 0xFF, 0x88])).all(axis=-1)
    assert green.any(), "the chosen place is marked"


def test_a_level_that_never_learnt_is_not_drawn(volume: Volume):
    facts = look_inside(volume, model("block")).facts
    assert [title for title in facts["panels"] if "scan" in title] == []
    assert len(facts["panels"]) == 2


def test_of_a_network_whose_blocks_have_no_attention_none_is_drawn(volume: Volume):
    titles = list(look_inside(volume, model("block", "scan", depth=0)).facts["panels"])
    assert len(titles) == 1
    assert "looks" not in titles[0]


def test_without_a_place_it_is_the_centre_of_the_body(volume: Volume):
    i, j, k = look_inside(volume, model("block")).facts["at_ijk"]
    body = np.argwhere(volume.array[0] > -500)
    assert np.abs(np.array([i, j, k]) - body.mean(axis=0)).max() < 3


def test_a_place_in_mm_is_the_voxel_there(volume: Volume):
    (mm,) = voxel_to_patient(np.array([[20.0, 10.0, 12.0]]), volume.affine_ras)
    x, y, z = (float(edge) + 0.3 for edge in mm)
    assert inside._place(volume, None, (x, y, z)) == (20, 10, 12)


def test_a_place_outside_the_scan_is_refused_with_what_lies_inside(volume: Volume):
    with pytest.raises(ConfigError, match="lies outside the scan") as caught:
        look_inside(volume, model("block"), at_ijk=(0, 0, 4000))
    low, high = volume.affine_ras[:3, 3], volume.affine_ras[:3] @ [*(np.array(volume.shape_ijk) - 1), 1]
    assert str(np.round(low).tolist()) in caught.value.hint
    assert str(np.round(high).tolist()) in caught.value.hint
    with pytest.raises(ConfigError, match="outside"):
        look_inside(volume, model("block"), at_mm=(1e5, 0.0, 0.0))
    with pytest.raises(ConfigError, match="twice"):
        look_inside(volume, model("block"), at_ijk=(1, 1, 1), at_mm=(0.0, 0.0, 0.0))


def test_attention_is_that_of_each_block_by_itself_where_the_slices_cut_it(volume: Volume):
    network = model("block", "scan")
    place = (20, 3, 20)
    seen = inside._watch(volume, network, place)
    tiling = cover(volume.shape_ijk, SPEC.block_ijk)
    blocks = tile(window(torch.from_numpy(volume.array), limits(None, SPEC)), tiling, fill=0.0)
    looks, patch = seen.looks, network.backbone.patch_ijk
    assert looks is not None
    for index, at in enumerate(np.ndindex(*tiling.grid)):
        slices = tuple(slice(a * 16 // p, (a + 1) * 16 // p) for a, p in zip(at, patch, strict=True))
        if at[1] == 0 or at[2] == 1:
            with torch.inference_mode():
                shares = network.backbone.cls_attention(blocks[index : index + 1])[0].mean(dim=0)
            np.testing.assert_allclose(looks[slices].ravel(), shares * len(shares), rtol=1e-4)
        else:
            assert np.isnan(looks[slices]).all()


def test_tokens_are_those_of_an_embedding(volume: Volume):
    network = model("block", "scan")
    seen, plain = inside._watch(volume, network, (20, 10, 12)), network.embed(volume, tokens=True)
    assert seen.embedding.tokens is not None
    assert plain.tokens is not None
    np.testing.assert_allclose(seen.embedding.tokens, plain.tokens, atol=1e-5)
    np.testing.assert_allclose(seen.embedding.scan, plain.scan, atol=1e-5)


def test_the_scan_s_attention_has_one_value_a_block(volume: Volume):
    network = model("block", "scan")
    seen = inside._watch(volume, network, (20, 10, 12))
    looks, backbone, grid = inside._scan_looks(seen, network), network.backbone, seen.embedding.grid
    with torch.inference_mode():
        rows = backbone.scan_project(seen.described[None])
        shares = backbone.scan_encoder.cls_attention(rows, grid_positions(grid)[None])[0].mean(dim=0)
    per_block = np.array(
        [looks[tuple(a * looks.shape[axis] // grid[axis] for axis, a in enumerate(at))] for at in np.ndindex(*grid)]
    )
    np.testing.assert_allclose(per_block, shares * len(shares), rtol=1e-5)
    assert len(np.unique(looks.round(6))) <= len(shares)


def test_similarity_is_one_at_the_place_itself_and_the_plain_cosine_elsewhere(volume: Volume):
    network, place = model("block"), (20, 10, 12)
    seen = inside._watch(volume, network, place).embedding
    _, grid = inside.figures.body_colours(seen, volume)
    panel = inside._similarity(seen, grid, volume, place)
    assert seen.tokens is not None
    a, b = (tuple(member[at] for member, at in zip(grid.members(), where, strict=True)) for where in (place, (5, 5, 5)))
    assert panel.values[a] == pytest.approx(1.0, abs=1e-5)
    one, other = seen.tokens[a], seen.tokens[b]
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert panel.values[b] == pytest.approx(cosine, abs=1e-5)
    assert panel.low < panel.high == 1.0


def test_thick_slices_are_warned_of_in_the_facts(volume: Volume):
    fine = replace(SPEC, spacing_mm=(10.0, 10.0, 4.0))
    warnings = look_inside(volume, model("block", spec=fine)).facts["warnings"]
    assert any(line.startswith("thick") and "head-foot" in line for line in warnings)


def test_the_same_scan_gives_the_same_bytes(volume: Volume):
    once, again = (look_inside(volume, model("block")).picture.png for _ in range(2))
    assert once == again


def test_another_modality_is_refused(volume: Volume):
    with pytest.raises(ConfigError, match="trained on CT"):
        look_inside(replace(volume, modality="MR"), model("block"))


def test_a_backbone_without_cls_tokens_shows_its_tokens_and_what_resembles_the_place(volume: Volume):
    spec = replace(SPEC, block_ijk=(32, 32, 16))
    small = {"name": "i3resnet", "width": 4, "depths": (1, 1, 1, 1), "block_ijk": (32, 32, 16)}
    network = make_model(Card(architecture=small, spec=spec, trained=("block",)), seed=0)
    facts = look_inside(volume, network, at_ijk=(20, 10, 12)).facts
    assert list(facts["panels"]) == ["similar to the token at +"]
