from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.spaces import OUT, PLANTED, aligned_weights, reported_store

from voxelstem import embed
from voxelstem.aligned import read_aligned
from voxelstem.errors import CheckpointError, ConfigError, StoreError
from voxelstem.index import Index
from voxelstem.indexer import build, weights_of
from voxelstem.recall import text_of
from voxelstem.store import Store, write
from voxelstem.streaming import of_store
from voxelstem.study import Report, Study, Volume


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return aligned_weights(tmp_path_factory.mktemp("weights") / "weights")


def read_all(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_store_is_indexed_scan_by_scan_with_its_reports(tmp_path: Path, weights: Path):
    store = reported_store(tmp_path / "store")
    built = build(tmp_path / "index", [store.path], weights=weights)
    assert (built.added, built.there, built.reports, built.scans, built.refusals) == (4, 0, 4, 4, ())
    index, aligned = Index.open(tmp_path / "index"), read_aligned(weights)
    assert set(index.keys()) == {record.key for record in store}
    assert index.facts.space == aligned.sha256
    for record in store:
        row = index.row(record.key)
        assert row is not None
        np.testing.assert_allclose(index.vector(row), aligned.embed_scan(of_store(store, record.key)), atol=5e-4)
        assert record.report is not None
        said = aligned.embed_texts([text_of(record.report, "full")])[0]
        first = index.best(said, 1, among="reports")[0]
        assert (first.key, first.score) == (record.key, pytest.approx(1, abs=1e-3))
        same = {other.key for other in store if other.subject == record.subject}
        assert {key for key, mine in zip(index.keys(), index.of_same_subject(row), strict=True) if mine} == same


def test_run_again_it_adds_only_what_is_missing(tmp_path: Path, weights: Path):
    store = reported_store(tmp_path / "store", scans=2)
    build(tmp_path / "index", [store.path], weights=weights)
    before = read_all(tmp_path / "index")
    again = build(tmp_path / "index", [store.path])
    assert (again.added, again.there, again.reports) == (0, 2, 0)
    assert read_all(tmp_path / "index") == before
    other = reported_store(tmp_path / "other", scans=3, spacing_mm=25.0)
    grown = build(tmp_path / "index", [store.path, other.path])
    assert (grown.added, grown.there, grown.reports, grown.scans) == (3, 2, 3, 5)


def test_embeddings_made_before_give_the_same_index_and_reports_can_follow(tmp_path: Path, weights: Path):
    store = reported_store(tmp_path / "store", scans=3)
    embed.run([store.path], weights=weights, out=tmp_path / "embeddings")
    first = build(tmp_path / "one", [tmp_path / "embeddings"], weights=weights)
    assert (first.added, first.reports) == (3, 0)
    second = build(tmp_path / "one", [store.path])
    assert (second.added, second.there, second.reports) == (0, 3, 3)
    build(tmp_path / "two", [store.path], weights=weights)
    one, two = Index.open(tmp_path / "one"), Index.open(tmp_path / "two")
    for key in one.keys():  # noqa: SIM118 - an index is no mapping
        rows = one.row(key), two.row(key)
        assert None not in rows
        np.testing.assert_allclose(one.vector(rows[0] or 0), two.vector(rows[1] or 0), atol=1e-3)


def test_embeddings_made_in_another_way_are_refused(tmp_path: Path, weights: Path):
    store = reported_store(tmp_path / "store", scans=1)
    how = embed.EmbedConfig(pool="cls", spacing=(12.0, 12.0, 12.0))
    embed.run([store.path], weights=weights, out=tmp_path / "embeddings", how=how)
    with pytest.raises(ConfigError, match="with other settings: pool, spacing_mm"):
        build(tmp_path / "index", [tmp_path / "embeddings"], weights=weights)
    # The same tensors, fed with another window.
    shutil.copytree(weights, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["spec"]["high_hu"] = 900.0
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    embed.run([store.path], weights=tmp_path / "other", out=tmp_path / "window")
    with pytest.raises(ConfigError, match="with other settings: window_hu"):
        build(tmp_path / "index", [tmp_path / "window"], weights=weights)
    assert len(Index.open(tmp_path / "index")) == 0


def test_no_word_of_a_report_and_no_place_gets_into_the_index(tmp_path: Path, weights: Path, capfd, caplog):
    home = tmp_path / "Ward7Secret"
    store = reported_store(home / "store", scans=2)
    build(tmp_path / "index", [store.path], weights=weights)
    written = read_all(tmp_path / "index") + "".join(str(path) for path in (tmp_path / "index").rglob("*")).encode()
    out, err = capfd.readouterr()
    said = (out + err + caplog.text).encode() + written.replace(str(tmp_path).encode(), b"")
    for planted in (PLANTED, "nodule of", "Follow up", "Ward7Secret"):
        assert planted.encode() not in said


def test_a_scan_of_another_modality_or_without_voxels_is_a_refusal_and_the_others_get_in(tmp_path: Path, weights: Path):
    store = reported_store(tmp_path / "store", scans=3)
    first = next(iter(store))
    volume = store.volume(first.key)
    other = Volume(array=volume.array + 1, affine_ras=volume.affine_ras, modality="MR", provenance=volume.provenance)
    write(store, Study(subject=first.subject, volumes=(replace(other, labels=None),)))
    (damaged,) = (store.path / "volumes").rglob(f"{first.key}*")
    damaged.write_bytes(damaged.read_bytes()[:40])
    built = build(tmp_path / "index", [store.path], weights=weights)
    assert built.added == 2
    assert sorted(line.code for line in built.refusals) == ["damaged", "wrong-modality"]
    assert any(first.key[:16] in line.relative for line in built.refusals)


def test_an_index_grows_by_the_weights_that_made_it_only(tmp_path: Path, weights: Path):
    store = reported_store(tmp_path / "store", scans=1)
    build(tmp_path / "index", [store.path], weights=weights)
    with pytest.raises(ConfigError, match="made by other weights"):
        build(tmp_path / "index", [store.path], weights=aligned_weights(tmp_path / "w", seed=4))
    assert weights_of(tmp_path / "index", None) == tmp_path / "index" / "weights"
    shutil.rmtree(tmp_path / "index" / "weights")
    with pytest.raises(ConfigError, match="came without its weights"):
        build(tmp_path / "index", [store.path])
    with pytest.raises(StoreError, match="there is no index"):
        build(tmp_path / "nothing", [store.path])


def test_what_is_neither_a_store_nor_embeddings_is_refused(tmp_path: Path, weights: Path):
    with pytest.raises(ConfigError, match="neither a store nor"):
        build(tmp_path / "index", [tmp_path], weights=weights)


def test_weights_without_heads_make_no_index(tmp_path: Path, weights: Path):
    with pytest.raises(CheckpointError):
        build(tmp_path / "index", [], weights=tmp_path / "nothing")
    assert not (tmp_path / "index").exists()
    assert OUT == read_aligned(weights).out
    assert Store.create(tmp_path / "empty").path.is_dir()
    assert build(tmp_path / "index", [tmp_path / "empty"], weights=weights).scans == 0


def test_reports_that_say_nothing_are_counted_and_the_others_get_in(tmp_path: Path, weights: Path):
    source, store = reported_store(tmp_path / "source", scans=3), Store.create(tmp_path / "store")
    said = (
        Report(findings_text="Half \ud800 a letter."),
        Report(technique_text="Native."),
        Report(findings_text="Clear."),
    )
    for record, report in zip(source, said, strict=True):
        volume = replace(source.volume(record.key), acquisition=record.acquisition)
        write(store, Study(subject=record.subject, volumes=(volume,), report=report))
    store.refresh()
    built = build(tmp_path / "index", [store.path], weights=weights)
    assert (built.added, built.reports, built.silent) == (3, 1, 2)


def test_a_wrong_source_is_said_before_anything_is_made(tmp_path: Path, weights: Path):
    store = reported_store(tmp_path / "store", scans=1)
    with pytest.raises(ConfigError, match="neither a store nor"):
        build(tmp_path / "index", [store.path, tmp_path / "nothing"], weights=weights)
    assert not (tmp_path / "index").exists()


def test_weights_that_are_links_are_kept_as_what_they_lead_to(tmp_path: Path, weights: Path):
    # As a cache of downloads keeps them: relative links into a folder of files named by their digest.
    linked = tmp_path / "cache" / "weights"
    for path in [path for path in weights.rglob("*") if path.is_file()]:
        (tmp_path / "cache" / "blobs").mkdir(parents=True, exist_ok=True)
        blob = tmp_path / "cache" / "blobs" / path.name
        shutil.copy(path, blob)
        link = linked / path.relative_to(weights)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(os.path.relpath(blob, link.parent)))
    build(tmp_path / "index", [], weights=linked)
    kept = [path for path in (tmp_path / "index" / "weights").rglob("*") if not path.is_dir()]
    assert len(kept) == len([path for path in linked.rglob("*") if path.is_file()])
    assert not any(path.is_symlink() for path in kept)
    assert read_aligned(tmp_path / "index" / "weights").sha256 == read_aligned(weights).sha256
