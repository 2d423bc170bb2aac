from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.fewlabelled import QUICK, SPEC, make_store, make_weights

from voxelstem import adapt, baselines, evaluate, regions
from voxelstem.adapted import SeeConfig, read_run
from voxelstem.card import Card
from voxelstem.errors import ConfigError
from voxelstem.features import embedder, look, with_intensity, with_radiomics
from voxelstem.heads.scales import measured_columns
from voxelstem.model import load, make_model
from voxelstem.store import Store


@pytest.fixture(autouse=True)
def one_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        make_store(folder)
    make_weights(folder, **{"block.depth": 2})
    return folder


def test_layers_stand_side_by_side_and_the_last_of_them_is_the_model_s_own(place: Path, tmp_path: Path) -> None:
    model, store = load(place / "weights"), Store.open(place / "store")
    key = next(iter(store)).key
    plain = embedder(model, store, tmp_path, tokens=True)(key)
    both = embedder(model, store, tmp_path, tokens=True, see=SeeConfig(layers=(1, 2)))(key)
    turned = embedder(model, store, tmp_path, tokens=True, see=SeeConfig(layers=(2, 1)))(key)
    assert plain.tokens is not None
    assert both.tokens is not None
    assert turned.tokens is not None
    dim = plain.tokens.shape[-1]
    assert both.tokens.shape == (*plain.tokens.shape[:3], 2 * dim)
    np.testing.assert_allclose(both.tokens[..., dim:], plain.tokens, atol=1e-5)
    np.testing.assert_array_equal(both.tokens[..., :dim], turned.tokens[..., dim:])
    assert np.abs(both.tokens[..., :dim] - plain.tokens).max() > 0.01
    assert both.scan.shape == (4 * dim,)  # cls and mean of each


def test_intensity_stands_beside_what_the_model_says_patch_by_patch(place: Path, tmp_path: Path) -> None:
    model, store = load(place / "weights"), Store.open(place / "store")
    key = next(iter(store)).key
    plain = embedder(model, store, tmp_path, tokens=True)(key)
    joined = embedder(model, store, tmp_path, tokens=True, see=SeeConfig(beside="intensity"))(key)
    assert plain.tokens is not None
    assert joined.tokens is not None
    assert plain.tokens_affine_ras is not None
    dim = plain.tokens.shape[-1]
    np.testing.assert_array_equal(joined.tokens[..., :dim], plain.tokens)
    np.testing.assert_array_equal(joined.scan[: len(plain.scan)], plain.scan)
    # The naive twin: the voxels whose centres fall into one patch, counted by hand.
    volume = store.volume(key)
    place_ijk = np.argwhere(np.ones(volume.shape_ijk, dtype=bool))
    to_token = np.linalg.inv(plain.tokens_affine_ras) @ volume.affine_ras
    where = np.rint(place_ijk @ to_token[:3, :3].T + to_token[:3, 3]).astype(int)
    wanted = np.array(plain.tokens.shape[:3]) // 2
    inside = (where == wanted).all(axis=1)
    hu = np.clip(volume.array[0][tuple(place_ijk[inside].T)], SPEC.low_hu, SPEC.high_hu)
    share = (hu - SPEC.low_hu) / (SPEC.high_hu - SPEC.low_hu)
    counts = np.bincount(np.minimum((share * 32).astype(int), 31), minlength=32)
    twin = np.sqrt(counts / counts.sum())
    np.testing.assert_allclose(joined.tokens[tuple(wanted)][dim:], twin, atol=0.02)
    alone = baselines.intensity(volume, SPEC, token_mm=None)
    np.testing.assert_array_equal(joined.scan[len(plain.scan) :], alone.scan)


def test_without_tokens_the_scans_vector_alone_is_joined(place: Path) -> None:
    model, store = load(place / "weights"), Store.open(place / "store")
    volume = store.volume(next(iter(store)).key)
    joined = with_intensity(model.embed(volume), volume, model.spec)
    assert joined.tokens is None
    assert joined.scan.shape == (2 * 24 + 32,)
    assert not measured_columns([joined]).any()


def test_radiomics_of_the_body_and_of_a_region_stand_beside_the_scan_in_a_store_as_out_of_it(
    place: Path, tmp_path: Path
) -> None:
    model, store = load(place / "weights"), Store.open(place / "store")
    record = next(iter(store))
    volume, labels = store.volume(record.key), store.labels(record.key)
    assert labels is not None
    liver = regions.of_class(labels, "liver")
    body = baselines.radiomics(volume, baselines.find_body(volume)).scan
    whole = embedder(model, store, tmp_path, tokens=False)(record.key).scan
    found = embedder(model, store, tmp_path, tokens=False, see=SeeConfig(beside="radiomics"))(record.key)
    np.testing.assert_array_equal(found.scan, np.concatenate([whole, body]))
    assert measured_columns([found]).tolist() == [False] * len(whole) + [True] * len(body)
    see = SeeConfig(beside="radiomics", region="liver")
    pooled = embedder(model, store, tmp_path, tokens=False, see=SeeConfig(region="liver"))(record.key).scan
    found = embedder(model, store, tmp_path, tokens=False, see=see)(record.key)
    expected = np.concatenate([pooled, body, baselines.radiomics(volume, liver).scan])
    np.testing.assert_array_equal(found.scan, expected)
    asked = look(model, volume, tokens=False, see=see, region=liver)
    np.testing.assert_allclose(asked.scan, expected, rtol=1e-5, atol=1e-5)


def test_of_a_single_voxel_radiomics_says_nothing_and_the_scan_is_named(place: Path) -> None:
    model, store = load(place / "weights"), Store.open(place / "store")
    volume = store.volume(next(iter(store)).key)
    region = np.zeros(volume.shape_ijk, dtype=np.bool_)
    region[5, 5, 5] = True
    with pytest.raises(ConfigError, match="radiomics of scan 0123 cannot be told"):
        with_radiomics(model.embed(volume), volume, region, of="of scan 0123 ")


def test_what_was_seen_through_other_layers_is_never_taken_from_the_cache(place: Path, tmp_path: Path) -> None:
    model, store = load(place / "weights"), Store.open(place / "store")
    key = next(iter(store)).key
    found = [
        embedder(model, store, tmp_path, tokens=False, see=SeeConfig(layers=layers))(key).scan.shape
        for layers in ((), (1,), (1, 2))
    ]
    assert found == [(48,), (48,), (96,)]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_sees_as_it_was_told_and_so_do_its_baselines(place: Path, tmp_path: Path) -> None:
    settings = {"see.layers": (1, 2), "see.beside": "intensity"}
    out = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / "labels.json",
        task="segment",
        mode="probe",
        out=tmp_path / "run",
        budget=2,
        settings=settings,
    )
    read = read_run(out)
    assert read.config.see == SeeConfig(layers=(1, 2), beside="intensity")
    assert read.head.arrays["weight"].shape[0] == 2 * 24 + 32
    labels = place / "labels.json"
    found = evaluate.run([out], store=place / "store", labels=labels, out=tmp_path / "report", config=QUICK)
    scores = {score.name: score.value.estimate for score in found.scores}
    assert {"run", "scratch", "intensity"} <= set(scores)
    # An untrained network that sees intensity too knows at least as much as intensity does, up to a head's luck.
    assert scores["scratch"] > scores["intensity"] - 0.1


def test_layers_that_are_not_there_are_refused(place: Path, tmp_path: Path) -> None:
    model, store = load(place / "weights"), Store.open(place / "store")
    with pytest.raises(ConfigError, match="from 1 to 2"):
        embedder(model, store, tmp_path, tokens=True, see=SeeConfig(layers=(1, 3)))
    architecture = {"name": "unet", "features": (4, 8), "depths": (1, 1), "strides": (1, 2), "block_ijk": (16, 16, 16)}
    with pytest.raises(ConfigError, match="does not show its layers"):
        make_model(Card(architecture=architecture, spec=SPEC), seed=0).through((1,))


def test_an_untrained_network_is_seen_through_the_same_layers(place: Path) -> None:
    seen = load(place / "weights").through((1, 2))
    fresh = seen.scratch(seed=4)
    assert fresh.layers == (1, 2)
    assert fresh.backbone.dim == seen.backbone.dim
    assert json.dumps(fresh.card.architecture) == json.dumps(seen.card.architecture)
