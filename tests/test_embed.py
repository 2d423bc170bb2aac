from __future__ import annotations

import csv
import json
import os
import resource
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from voxelstem import embed
from voxelstem.card import Card, write_weights
from voxelstem.embed import EmbedConfig
from voxelstem.embedding import pack, read
from voxelstem.errors import ConfigError, IngestError, StoreError
from voxelstem.model import Model, make_model
from voxelstem.sources import Source, nifti
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Store, write
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.study import InputSpec, Study

SPEC = InputSpec(spacing_mm=(10.0, 10.0, 10.0), low_hu=-200.0, high_hu=300.0, block_ijk=(16, 16, 16))
ARCHITECTURE = {
    "name": "scan_vit",
    "block_ijk": (16, 16, 16),
    "block.dim": 24,
    "block.depth": 1,
    "block.heads": 2,
    "scan.depth": 0,
}
TOKENS = ("PlantedMiller1947", "Ward7Secret")


def model(seed: int = 0) -> Model:
    return make_model(Card(architecture=ARCHITECTURE, spec=SPEC, trained=("block",)), seed=seed)


def weights(folder: Path, seed: int = 0) -> Path:
    source = model(seed)
    write_weights(folder / f"weights{seed}", source.backbone.state_dict(), source.card)
    return folder / f"weights{seed}"


def scan(path: Path, seed: int) -> None:
    volume = phantom(PhantomConfig(seed=seed, spacing_mm=(10.0, 10.0, 10.0))).volumes[0]
    nifti.write(path, volume.array[0].astype(np.int16), volume.affine_ras)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Two scans that can be read and one that cannot, whose names must not spread."""
    folder = tmp_path / TOKENS[1]
    scan(folder / TOKENS[0] / "one.nii.gz", 1)
    scan(folder / "other" / f"{TOKENS[0]}.nii.gz", 2)
    whole = (folder / "other" / f"{TOKENS[0]}.nii.gz").read_bytes()
    (folder / "bad").mkdir()
    (folder / "bad" / f"{TOKENS[0]}.nii.gz").write_bytes(whole[: len(whole) // 2])
    return folder


def manifest(out: Path) -> list[dict[str, str]]:
    with (out / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_bad_scan_is_refused_and_the_others_go_on(scans: Path, tmp_path: Path):
    report = embed.run([scans], weights=weights(tmp_path), out=tmp_path / "out")
    assert (report.kept, report.skipped, report.refused) == (2, 0, 1)
    assert report.refusals[0].relative == f"bad/{TOKENS[0]}.nii.gz"
    rows = manifest(tmp_path / "out")
    assert sorted(row["code"] for row in rows) == ["", "", report.refusals[0].code]
    kept = [row for row in rows if not row["code"]]
    assert {path.stem for path in (tmp_path / "out").glob("*.npz")} == {row["key"] for row in kept}
    assert all(row["modality"] == "CT" and row["coverage"] == "1.0000" for row in kept)
    assert {row["subject"] for row in kept} == {pseudonym(name, site_key()) for name in (TOKENS[0], "other")}


@pytest.mark.parametrize(
    ("fault", "code", "reason"),
    [
        (ValueError("an odd number"), "unreadable", "an odd number"),
        (MemoryError(), "too-large", "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "too-large", "not enough memory"),
        (OSError(5, "Input/output error"), "unreadable", "cannot be read: Input/output error"),
    ],
)
def test_whatever_ends_a_reader_ends_only_its_own_scan(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, code: str, reason: str
):
    read = Source.read

    def fail_once(source: Source) -> Study:
        if source.relative.startswith("bad"):
            raise fault
        return read(source)

    monkeypatch.setattr(Source, "read", fail_once)
    report = embed.run([scans], weights=weights(tmp_path), out=tmp_path / "out")
    assert (report.kept, report.refused, report.refusals[0].code) == (2, 1, code)
    assert reason in report.refusals[0].reason
    assert sorted(row["code"] for row in manifest(tmp_path / "out")) == ["", "", code]


@pytest.mark.parametrize("damaged", [b"", b'{"weights": ', b"\xff\xfe"])
def test_a_folder_whose_mark_is_damaged_is_refused(scans: Path, tmp_path: Path, damaged: bytes):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "embed.json").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"embed\.json in 'out' is damaged") as caught:
        embed.run([scans / "other"], weights=weights(tmp_path), out=tmp_path / "out")
    assert "--out" in caught.value.hint
    assert (tmp_path / "out" / "embed.json").read_bytes() == damaged


def test_a_file_holds_what_the_model_says(scans: Path, tmp_path: Path):
    import voxelstem as vs

    embed.run([scans / "other"], weights=weights(tmp_path), out=tmp_path / "out", how=EmbedConfig(tokens=True))
    said = model().embed(vs.read(scans / "other" / f"{TOKENS[0]}.nii.gz"), tokens=True)
    with np.load(next((tmp_path / "out").glob("*.npz"))) as arrays:
        assert set(arrays) == {"scan", "blocks", "grid", "coverage", "facts", "tokens", "tokens_affine_ras"}
        assert np.allclose(arrays["scan"], said.scan, atol=1e-5)
        assert np.allclose(arrays["tokens"], said.tokens, atol=1e-5)
        assert tuple(arrays["grid"]) == said.grid


def test_run_again_it_skips_what_is_done_and_heals_what_is_damaged(scans: Path, tmp_path: Path):
    where = {"weights": weights(tmp_path), "out": tmp_path / "out"}
    embed.run([scans], **where)
    first, second = sorted((tmp_path / "out").glob("*.npz"))
    before, table = {path: path.read_bytes() for path in (first, second)}, manifest(tmp_path / "out")
    stamp = first.stat().st_mtime_ns
    second.write_bytes(before[second][:-200])
    report = embed.run([scans], **where)
    assert (report.kept, report.skipped, report.refused) == (2, 1, 1)
    assert first.stat().st_mtime_ns == stamp
    assert {path: path.read_bytes() for path in (first, second)} == before
    assert manifest(tmp_path / "out") == table


def test_fomo_s_probes_find_one_vector_a_case_under_the_name_of_its_file(scans: Path, tmp_path: Path):
    out, how = tmp_path / "out", EmbedConfig(layout="fomo")
    embed.run([scans], weights=weights(tmp_path), out=out, how=how)
    given = {path.stem: np.load(path) for path in out.glob("*.npy")}
    kept = {path.stem: np.load(path)["scan"] for path in out.glob("*.npz")}
    assert given.keys() == {f"{TOKENS[0]}_one", f"other_{TOKENS[0]}"}
    assert sorted(row.tolist() for row in given.values()) == sorted(row.tolist() for row in kept.values())
    assert all(row.dtype == np.float32 and row.ndim == 1 for row in given.values())
    for path in out.glob("*.npy"):
        path.unlink()
    embed.run([scans], weights=tmp_path / "weights0", out=out, how=how)  # what is embedded is not embedded again
    assert {path.stem for path in out.glob("*.npy")} == given.keys()


def test_subject_and_contrast_are_written_apart_where_the_network_tells_them_apart(tmp_path: Path):
    architecture = {"name": "disentangled", "width": 2, "levels": 2, "latent": 3, "block_ijk": (8, 8, 8)}
    spec = InputSpec(spacing_mm=(6.0, 6.0, 6.0), block_ijk=(8, 8, 8))
    made = make_model(Card(architecture=architecture, spec=spec), seed=0)
    write_weights(tmp_path / "weights", made.backbone.state_dict(), made.card)
    (tmp_path / "scans").mkdir()
    scan(tmp_path / "scans" / "case7.nii.gz", 1)
    out = tmp_path / "out"
    embed.run([tmp_path / "scans"], weights=tmp_path / "weights", out=out, how=EmbedConfig(layout="fomo", pool="cls"))
    whole, subject, contrast = (np.load(out / part / "case7.npy") for part in ("", "subject", "contrast"))
    assert np.array_equal(whole, np.concatenate([subject, contrast]))
    assert subject.shape == contrast.shape == (3,)


def test_tokens_asked_for_later_are_added(scans: Path, tmp_path: Path):
    where = {"weights": weights(tmp_path), "out": tmp_path / "out"}
    embed.run([scans / "other"], **where)
    assert embed.run([scans / "other"], **where, how=EmbedConfig(tokens=True)).skipped == 0
    assert embed.run([scans / "other"], **where, how=EmbedConfig(tokens=True)).skipped == 1
    assert embed.run([scans / "other"], **where).skipped == 1


def test_no_name_of_a_person_or_a_file_is_in_any_byte_written(scans: Path, tmp_path: Path):
    embed.run([scans], weights=weights(tmp_path), out=tmp_path / "out", how=EmbedConfig(tokens=True))
    for path in (tmp_path / "out").rglob("*"):
        data = path.name.encode() + path.read_bytes()
        for token in TOKENS:
            for spelt in (
                token.encode(),
                token.encode("utf-16-le"),
                token.lower().encode(),
                zlib.compress(token.encode()),
            ):
                assert spelt not in data, path.name


def test_other_weights_or_another_precision_need_another_folder(scans: Path, tmp_path: Path):
    embed.run([scans / "other"], weights=weights(tmp_path), out=tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match="other settings: weights"):
        embed.run([scans / "other"], weights=weights(tmp_path, seed=1), out=tmp_path / "out")
    with pytest.raises(ConfigError, match="other settings: precision"):
        embed.run(
            [scans / "other"], weights=tmp_path / "weights0", out=tmp_path / "out", how=EmbedConfig(precision="bf16")
        )
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_source_that_is_not_there_is_a_clear_error(tmp_path: Path):
    with pytest.raises(IngestError):
        embed.run([tmp_path / "nowhere"], weights=weights(tmp_path), out=tmp_path / "out")


def test_a_full_disk_is_a_clear_error_and_leaves_no_half_file(scans: Path, tmp_path: Path):
    where = weights(tmp_path)
    site_key()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(StoreError, match="'out' cannot be written: File too large"):
            embed.run([scans / "other"], weights=where, out=tmp_path / "out", how=EmbedConfig(tokens=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["embed.json"]


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Store, str]:
    store = Store.create(tmp_path / "store")
    study = phantom(PhantomConfig(seed=1, spacing_mm=(10.0, 10.0, 10.0)))
    return store, write(store, replace(study, subject=pseudonym(study.subject, site_key())))[0]


def test_a_cached_embedding_reads_back_equal_and_is_not_made_twice(stored: tuple[Store, str], tmp_path: Path):
    (store, key), cache = stored, tmp_path / "cache"
    first = embed.embed_volume_cached(model(), store, key, cache, tokens=True)
    path = next(cache.iterdir())
    stamp = path.stat().st_mtime_ns
    second = embed.embed_volume_cached(model(), store, key, cache, tokens=True)
    assert path.stat().st_mtime_ns == stamp
    for name in ("scan", "blocks", "tokens", "tokens_affine_ras"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert (first.grid, first.coverage) == (second.grid, second.coverage)


def test_a_damaged_cached_file_is_made_again(stored: tuple[Store, str], tmp_path: Path):
    (store, key), cache = stored, tmp_path / "cache"
    first = embed.embed_volume_cached(model(), store, key, cache, tokens=False)
    path = next(cache.iterdir())
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-30], whole[:300] + b"\xff" + whole[301:], b"\x93NUMPY garbage"):
        path.write_bytes(damaged)
        again = embed.embed_volume_cached(model(), store, key, cache, tokens=False)
        assert np.array_equal(again.scan, first.scan)
        assert path.read_bytes() == whole


def test_no_flipped_bit_of_a_cached_file_changes_an_embedding_unseen(tmp_path: Path):
    said = model().embed(phantom(PhantomConfig(seed=1, spacing_mm=(30.0, 30.0, 30.0))))
    whole, path = pack(said), tmp_path / "x.npz"
    for at in range(0, len(whole), 11):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        back = read(path)
        assert back is None or (np.array_equal(back.scan, said.scan) and np.array_equal(back.blocks, said.blocks)), at


def test_other_weights_have_other_cached_files(stored: tuple[Store, str], tmp_path: Path):
    (store, key), cache = stored, tmp_path / "cache"
    models = [model().scratch(seed=seed) for seed in (0, 1)]
    one, two = (embed.embed_volume_cached(each, store, key, cache, tokens=False) for each in models)
    assert not np.array_equal(one.scan, two.scan)
    embed.embed_volume_cached(models[0], store, key, cache, tokens=True)
    assert len(list(cache.iterdir())) == 3


def test_what_lies_unchanged_is_not_read_again(scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    where = {"weights": weights(tmp_path), "out": tmp_path / "out"}
    embed.run([scans / "other"], **where)
    before, reads = manifest(tmp_path / "out"), []
    read_it = Source.read
    monkeypatch.setattr(Source, "read", lambda source: reads.append(1) or read_it(source))
    assert embed.run([scans / "other"], **where).skipped == 1
    assert (reads, manifest(tmp_path / "out")) == ([], before)
    scan(scans / "other" / f"{TOKENS[0]}.nii.gz", 5)
    report = embed.run([scans / "other"], **where)
    assert (report.kept, report.skipped, len(reads)) == (1, 0, 1)
    assert manifest(tmp_path / "out")[0]["key"] != before[0]["key"]


def test_scans_of_one_name_in_two_folders_keep_their_rows(tmp_path: Path):
    for site, seed in (("a", 1), ("b", 2)):
        scan(tmp_path / site / "case1" / "ct.nii.gz", seed)
    embed.run([tmp_path / "a", tmp_path / "b"], weights=weights(tmp_path), out=tmp_path / "out")
    rows = manifest(tmp_path / "out")
    assert len(rows) == len({row["source"] for row in rows}) == 2


def test_the_manifest_says_what_was_seen_and_how(scans: Path, tmp_path: Path):
    embed.run([scans / "other"], weights=weights(tmp_path), out=tmp_path / "out", how=EmbedConfig(spacing="native"))
    (row,) = manifest(tmp_path / "out")
    assert row["spacing_mm"] == "10x10x10"
    assert row["grid"].count("x") == row["seen_mm"].count("x") == 2
    assert (row["precision"], row["hu"], row["weights"]) == ("fp32", "fits", model_digest(tmp_path))
    assert float(row["relative_error"]) <= 1e-5
    assert 1 <= float(row["effective_rank"])
    mark = json.loads((tmp_path / "out" / "embed.json").read_text())
    assert (mark["spacing_mm"], mark["compute"]) == ("native", row["compute"])


def model_digest(folder: Path) -> str:
    return json.loads((folder / "weights0" / "config.json").read_text())["sha256"]


def test_a_spacing_of_your_own_is_fed_warned_of_and_remembered(scans: Path, tmp_path: Path):
    where = {"weights": weights(tmp_path), "out": tmp_path / "out"}
    report = embed.run([scans], **where, how=EmbedConfig(spacing=(20.0, 20.0, 20.0)))
    first = "spacing: fed at 20 x 20 x 20 mm, the weights saw 10 x 10 x 10 mm (and 1 more such scans)"
    assert report.warnings[0] == first
    assert len({warning.partition(":")[0] for warning in report.warnings}) == len(report.warnings)
    with pytest.raises(ConfigError, match="other settings: spacing_mm"):
        embed.run([scans], **where)


def test_a_store_gives_its_volumes_and_they_are_the_same_as_from_the_file(stored: tuple[Store, str], tmp_path: Path):
    store, key = stored
    where = {"weights": weights(tmp_path), "out": tmp_path / "out"}
    assert embed.run([store.path], **where).kept == 1
    (row,) = manifest(tmp_path / "out")
    assert (row["key"], row["subject"]) == (key, store.record(key).subject)
    said = read(tmp_path / "out" / f"{key}.npz")
    assert said is not None
    assert np.allclose(said.scan, model().embed(store.volume(key)).scan, atol=1e-5)
    assert embed.run([store.path], **where).skipped == 1


def test_a_damaged_volume_of_a_store_is_refused_and_the_others_go_on(stored: tuple[Store, str], tmp_path: Path):
    store, _ = stored
    (key,) = write(
        store, replace(phantom(PhantomConfig(seed=4, spacing_mm=(10.0, 10.0, 10.0))), subject="s" + "1" * 24)
    )
    file = next((store.path / "volumes").rglob(f"{key}.b2nd"))
    file.write_bytes(file.read_bytes()[:-50])
    report = embed.run([store.path], weights=weights(tmp_path), out=tmp_path / "out")
    assert (report.kept, report.refused, report.refusals[0].code) == (1, 1, "damaged")


RANK = """
import sys
from pathlib import Path
from voxelstem import embed
embed.run([Path(sys.argv[1])], weights=sys.argv[2], out=Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_two_processes_under_torchrun_write_what_one_would(scans: Path, tmp_path: Path):
    where = weights(tmp_path)
    scan(scans / "third" / "ct.nii.gz", 7)
    embed.run([scans], weights=where, out=tmp_path / "alone")
    site_key()
    # The second begins first: it must wait until the first has claimed the folder.
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(scans), str(where), str(tmp_path / "many")],
            env=os.environ | {"RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        )
        for rank in ("1", "0")
    ]
    assert [process.wait(timeout=240) for process in started] == [0, 0]
    # Which way was measured to be the fastest is chance.
    for row, other in zip(manifest(tmp_path / "many"), manifest(tmp_path / "alone"), strict=True):
        for name in ("compute", "relative_error"):
            row.pop(name), other.pop(name)
        assert row == other
    for path in (tmp_path / "alone").glob("*.npz"):
        one, two = read(path), read(tmp_path / "many" / path.name)
        assert one is not None
        assert two is not None
        assert np.allclose(one.scan, two.scan, atol=1e-5)


@pytest.mark.slow
def test_a_cluster_embeds_as_one_process_does(scans: Path, tmp_path: Path):
    pytest.importorskip("ray")
    where = weights(tmp_path)
    embed.run([scans], weights=where, out=tmp_path / "alone")
    report = embed.run([scans], weights=where, out=tmp_path / "many", how=EmbedConfig(cluster="local"))
    assert (report.kept, report.refused) == (2, 1)
    for row, other in zip(manifest(tmp_path / "many"), manifest(tmp_path / "alone"), strict=True):
        assert (row["source"], row["key"], row["code"]) == (other["source"], other["key"], other["code"])


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (Card(architecture=ARCHITECTURE | {"block.eps": 1e-3}, spec=SPEC, trained=("block",)), "architecture"),
        (Card(architecture=ARCHITECTURE, spec=replace(SPEC, low_hu=-1000.0), trained=("block",)), "window_hu"),
        (Card(architecture=ARCHITECTURE, spec=replace(SPEC, block_ijk=(8, 8, 8)), trained=("block",)), "block_ijk"),
    ],
)
def test_the_same_tensors_under_another_card_are_other_weights(scans: Path, tmp_path: Path, card: Card, said: str):
    first = weights(tmp_path)
    write_weights(tmp_path / "other", model().backbone.state_dict(), card)
    embed.run([scans / "other"], weights=first, out=tmp_path / "out")
    with pytest.raises(ConfigError, match=f"other settings: {said}\n"):
        embed.run([scans / "other"], weights=tmp_path / "other", out=tmp_path / "out")
