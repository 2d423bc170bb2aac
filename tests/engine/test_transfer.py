from __future__ import annotations

import inspect
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.engine import transfer
from voxelstem.engine.transfer import Choice, Crops, GdsReader, MapReader, PreadReader, choose, read_crop
from voxelstem.errors import ConfigError, IngestError, StoreError
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Store, write
from voxelstem.store.tiles import ALIGNMENT, Tiles, write_all, write_tiles
from voxelstem.streaming import lay, of_store
from voxelstem.study import InputSpec, Study
from voxelstem.views.intensity import measure

MRI = InputSpec(modality="MR", normalisation="zscore")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
HERE = [PreadReader, MapReader]
"""The ways that a machine without a GPU has."""
SIZE = 100_000


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transfer") / "noise.tiles"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


ranges = st.lists(
    st.integers(0, SIZE - 1).flatmap(lambda at: st.tuples(st.just(at), st.integers(1, min(SIZE - at, 5000)))),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("way", HERE)
@given(wanted=ranges)
def test_ranges_come_in_the_order_in_which_they_were_asked_for(noise: Path, way: Any, wanted: list[tuple[int, int]]):
    whole = noise.read_bytes()
    reader = way(CPU)
    got = reader.read(noise, wanted)
    assert got.dtype == torch.uint8
    assert got.numpy().tobytes() == b"".join(whole[at : at + size] for at, size in wanted)
    assert reader.tally.bytes == sum(size for _, size in wanted)
    assert reader.tally.gb_per_s > 0


def test_memory_to_read_into_begins_at_a_page(noise: Path):
    assert PreadReader(CPU).read(noise, [(0, ALIGNMENT)]).data_ptr() % ALIGNMENT == 0


def test_ranges_that_touch_are_read_in_one_go():
    assert transfer._runs([(0, 4), (4, 4), (12, 4), (8, 4)]) == [(0, 8), (12, 4), (8, 4)]


@pytest.mark.parametrize("way", HERE)
@pytest.mark.parametrize("wanted", [[], [(-1, 4)], [(0, 0)]])
def test_ranges_that_are_none_are_refused(noise: Path, way: Any, wanted: list[tuple[int, int]]):
    with pytest.raises(ValueError, match=r"nothing to read|a range begins"):
        way(CPU).read(noise, wanted)


@pytest.mark.parametrize("way", HERE)
def test_a_file_that_ends_too_early_is_an_error_and_no_fault_of_the_process(noise: Path, tmp_path: Path, way: Any):
    for wanted in ([(SIZE - 10, 11)], [(0, 10), (SIZE + ALIGNMENT, 10)]):
        with pytest.raises(StoreError, match=r"the file 'noise' is cut off"):
            way(CPU).read(noise, wanted)
    (tmp_path / "empty.tiles").touch()
    with pytest.raises(StoreError, match="the file 'empty' "):
        way(CPU).read(tmp_path / "empty.tiles", [(0, 1)])


@pytest.mark.parametrize("way", HERE)
def test_a_missing_file_is_an_error_that_names_no_folder(tmp_path: Path, way: Any):
    with pytest.raises(StoreError, match="No such file") as caught:
        way(CPU).read(tmp_path / "gone.tiles", [(0, 1)])
    assert tmp_path.name not in str(caught.value)


@pytest.mark.parametrize("way", HERE)
def test_a_crop_by_every_way_has_the_bits_that_the_store_gives(phantoms: Store, way: Any):
    key = next(iter(phantoms)).key
    shape = phantoms.record(key).shape_ijk
    with Tiles.open(write_tiles(phantoms, key)[0]) as tiles:
        reader = way(CPU)
        for start, size in [((0, 0, 0), shape), ((3, 5, 1), (20, 9, 11)), ((1, 1, 1), (1, 1, 1))]:
            crop = read_crop(reader, tiles, start, size)
            want = phantoms.crop(key, start, size)
            assert crop.dtype == torch.float32
            assert crop.numpy().tobytes() == want.tobytes()
        with pytest.raises(StoreError, match="leaves the volume"):
            read_crop(reader, tiles, (0, 0, 0), (shape[0] + 1, 1, 1))


def test_slope_and_intercept_are_applied_as_the_store_does(tmp_path: Path):
    from voxelstem.store.reader import decode
    from voxelstem.store.tiles import pack_tiles

    stored = np.random.default_rng(1).integers(-32768, 32767, size=(2, 33, 20, 40)).astype(np.int16)
    path = tmp_path / "x.tiles"
    path.write_bytes(pack_tiles(stored, name="a" * 64, slope=0.1, intercept=-17.3))
    with Tiles.open(path) as tiles:
        crop = read_crop(PreadReader(CPU), tiles, (0, 0, 0), (33, 20, 40))
    assert crop.numpy().tobytes() == decode(stored, 0.1, -17.3).tobytes()


def test_without_a_gpu_every_better_way_says_why_it_is_not_taken(noise: Path):
    choice = choose(CPU, noise)
    assert choice.note() == {
        "reader": "preadv",
        "not gds": "gds: the device is cpu, and no GPU (set device=cuda where there is one)",
    }
    assert choice.reader.tally.bytes == 0, "the trial does not count"


def test_a_way_that_cannot_read_the_file_gives_way_to_the_next(noise: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(handle: int, buffers: Any, offset: int) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "preadv", broken)
    choice = choose(CPU, noise)
    assert choice.reader.name == "mmap"
    assert "Operation not supported" in choice.note()["not preadv"]


def test_a_way_that_reads_other_bytes_is_refused(noise: Path, monkeypatch: pytest.MonkeyPatch):
    def zeros(handle: int, buffers: Any, offset: int) -> int:
        buffers[0][:] = bytes(len(buffers[0]))
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", zeros)
    assert "other bytes" in choose(CPU, noise).note()["not preadv"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_for_a_gpu_that_is_not_there_every_way_refuses_by_name():
    with pytest.raises(ConfigError) as caught:
        choose(GPU)
    for name in ("gds", "pinned preadv", "mmap"):
        assert f"{name}: torch sees no GPU here" in caught.value.problem


def test_gds_refuses_to_become_something_else_in_silence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transfer, "GDS_DRIVER", tmp_path / "nvidia-fs")
    with pytest.raises(ConfigError, match="nvidia-fs is not loaded"):
        GdsReader(GPU)
    (tmp_path / "nvidia-fs").touch()
    assert GdsReader(GPU).name == "gds"


def test_gds_asks_torch_in_the_words_that_torch_knows(noise: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    real = torch.cuda.gds.GdsFile
    assert list(inspect.signature(real.__init__).parameters)[1:] == ["filename", "flags"]
    assert list(inspect.signature(real.load_storage).parameters)[1:] == ["storage", "offset"]

    class Standing:
        """What GdsFile does, by the processor."""

        def __init__(self, filename: str, flags: int):
            self.data = Path(filename).read_bytes()
            assert flags == os.O_RDONLY

        def load_storage(self, storage: torch.UntypedStorage, offset: int = 0) -> None:
            part = torch.frombuffer(bytearray(self.data[offset : offset + storage.nbytes()]), dtype=torch.uint8)
            torch.empty(0, dtype=torch.uint8).set_(storage).copy_(part)

    class Stream:
        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transfer, "GDS_DRIVER", tmp_path)
    monkeypatch.setattr(torch.cuda.gds, "GdsFile", Standing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    reader = GdsReader(GPU)
    reader.device = CPU
    whole = noise.read_bytes()
    got = reader.read(noise, [(ALIGNMENT, ALIGNMENT), (2 * ALIGNMENT, ALIGNMENT), (0, ALIGNMENT)])
    assert got.numpy().tobytes() == whole[ALIGNMENT : 3 * ALIGNMENT] + whole[:ALIGNMENT]
    with pytest.raises(StoreError, match="whole pages"):
        reader.read(noise, [(0, 10)])
    with pytest.raises(StoreError, match="cut off"):
        reader.read(noise, [(SIZE // ALIGNMENT * ALIGNMENT, 2 * ALIGNMENT)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_the_chosen_way_reads_the_bytes_of_the_file(noise: Path):
    choice = choose(GPU, noise)
    got = choice.reader.read(noise, [(ALIGNMENT, 2 * ALIGNMENT), (0, ALIGNMENT)])
    whole = noise.read_bytes()
    assert got.device.type == "cuda"
    assert got.cpu().numpy().tobytes() == whole[ALIGNMENT : 3 * ALIGNMENT] + whole[:ALIGNMENT]


def test_a_file_too_short_to_try_is_no_reason_to_trust_a_way(tmp_path: Path):
    (tmp_path / "short.tiles").write_bytes(b"short")
    with pytest.raises(ConfigError, match="shorter than a page"):
        choose(CPU, tmp_path / "short.tiles")


def test_tiles_travel_to_the_process_that_reads_them(phantoms: Store):
    key = next(iter(phantoms)).key
    with Tiles.open(write_tiles(phantoms, key)[0]) as tiles:
        there = pickle.loads(pickle.dumps(tiles))
        with there:
            crop = read_crop(MapReader(CPU), there, (0, 0, 0), (4, 4, 4))
    assert crop.numpy().tobytes() == phantoms.crop(key, (0, 0, 0), (4, 4, 4)).tobytes()


@pytest.mark.parametrize("source", ["blosc2", "tiles"])
def test_a_volume_is_measured_once_and_whole_from_either_source(
    brains: Store, source: str, monkeypatch: pytest.MonkeyPatch
):
    key = min(record.key for record in brains)
    write_all(brains)
    array = brains.volume(key).array
    want = measure(lambda low, high: array[:, low:high], array.shape[1])
    crops = Crops(brains, source)
    assert crops.stats(key, MRI) == want
    assert want.deviation == pytest.approx(array.std(dtype=np.float64))
    elsewhere = pickle.loads(pickle.dumps(crops))
    assert elsewhere.stats(key, MRI) == want
    monkeypatch.setattr(Crops, "read", None)
    assert crops.stats(key, MRI) == want
    assert crops.stats("0" * 64, InputSpec()) is None, "a window of HU asks nothing"


def test_few_measures_are_remembered_where_little_memory_is_allowed(brains: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "MOST_MEASURED", 2)
    crops, keys = Crops(brains, "blosc2"), sorted(record.key for record in brains)
    found = [crops.stats(key, MRI) for key in keys]
    assert len(set(found)) == len(keys)
    assert len(crops._measured) == 2
    assert [crops.stats(key, MRI) for key in keys] == found


def test_a_volume_that_cannot_be_normalised_is_named_by_its_key(tmp_path: Path):
    store = Store.create(tmp_path / "store")
    scan = phantom(PhantomConfig(seed=0, spacing_mm=(20.0, 20.0, 20.0))).volumes[0]
    flat = replace(scan, array=np.full_like(scan.array, 7), modality="MR", labels=None)
    (key,) = write(store, Study(subject="s" + "0" * 24, volumes=(flat,)))
    with pytest.raises(StoreError, match=f"'{key[:16]}': all voxels have one value"):
        Crops(store, "blosc2").stats(key, MRI)


def test_what_a_window_for_raw_values_is_given_is_asked_for_z_scores(brains: Store, tmp_path: Path):
    """As where a scan is embedded: the same code and sentence."""
    raw = brains.volume(min(record.key for record in brains))
    scored = replace(raw, array=((raw.array - raw.array.mean()) / raw.array.std()).astype(np.float32))
    store = Store.create(tmp_path / "store")
    good, bad = (write(store, Study(subject="s" + "0" * 24, volumes=(each,)))[0] for each in (raw, scored))
    window = InputSpec(modality="MR", spacing_mm=(6.0, 6.0, 8.0), low_hu=0.0, high_hu=2000.0)
    assert Crops(store, "blosc2").stats(good, window) == Crops(store, "blosc2").stats(good, MRI)
    with pytest.raises(StoreError) as trained:
        Crops(store, "blosc2").stats(bad, window)
    with pytest.raises(IngestError) as embedded:
        lay(of_store(store, bad), window)
    assert trained.value.code == embedded.value.code == "z-scored"
    assert trained.value.problem == f"volume '{bad[:16]}': {embedded.value.problem}"
    assert Crops(store, "blosc2").stats(bad, replace(window, low_hu=-3.0, high_hu=5.0)) is not None, "made for them"


def test_a_choice_without_refusals_says_only_what_it_is():
    assert Choice(reader=MapReader(CPU)).note() == {"reader": "mmap"}
