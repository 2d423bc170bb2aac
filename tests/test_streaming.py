from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.errors import ConfigError, IngestError
from voxelstem.resampling import grid_coordinates, resampled_count
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Store, write
from voxelstem.streaming import ahead, columns, lay, of_store, of_volume, with_spacing
from voxelstem.study import INPUT_SPECS, InputSpec, Provenance, Volume
from voxelstem.views import resample
from voxelstem.views.intensity import window
from voxelstem.views.tile import tile

SPEC = InputSpec(spacing_mm=(2.0, 2.0, 3.0), block_ijk=(8, 8, 4))
sizes = st.tuples(st.integers(1, 21), st.integers(1, 21), st.integers(1, 13))
edges = st.tuples(*[st.sampled_from((0.7, 2.0, 3.0, 5.5))] * 3)


def volume(shape: tuple[int, ...], spacing: tuple[float, ...], *, order: str = "C") -> Volume:
    array = np.random.default_rng(0).uniform(-1500, 1500, shape).astype(np.float32)
    return Volume(
        array=np.asarray(array, order=order)[None],  # pyright: ignore[reportArgumentType, reportCallIssue]
        affine_ras=np.diag([*spacing, 1.0]),
        modality="CT",
        provenance=Provenance(source_format="phantom", sha256="", orientation="RAS"),
    )


def whole(scan: Volume, spec: InputSpec, *, like_spectre: bool) -> torch.Tensor:
    """The same at once: the whole scan resampled, windowed and tiled."""
    laid = lay(of_volume(scan), spec, like_spectre=like_spectre)
    wanted = spec.grid_spacing_mm(scan.spacing_mm)
    steps = [want / have for have, want in zip(scan.spacing_mm, wanted, strict=True)]
    places = [
        grid_coordinates(resampled_count(size, 1.0, step), start=0.0, step=step)
        for size, step in zip(scan.shape_ijk, steps, strict=True)
    ]
    voxels = torch.from_numpy(np.ascontiguousarray(scan.array))
    sampled = resample.sample(voxels, tuple(places), step_ijk=tuple(steps), outside=spec.low_hu)
    return tile(window(sampled, spec), laid.tiling, fill=0.0)


@given(sizes, edges, st.booleans(), st.sampled_from("CF"))
@settings(max_examples=60)
def test_a_scan_in_columns_is_the_scan_at_once(shape, spacing, like_spectre: bool, order: str):
    scan = volume(shape, spacing, order=order)
    laid = lay(of_volume(scan), SPEC, like_spectre=like_spectre)
    found = torch.cat(list(columns(of_volume(scan), laid, SPEC)))
    assert torch.allclose(found, whole(scan, SPEC, like_spectre=like_spectre), atol=2e-6)


def test_a_scan_that_has_the_spacing_is_copied_bit_for_bit():
    scan = volume((19, 9, 10), (2.0, 2.0, 3.0), order="F")
    laid = lay(of_volume(scan), SPEC)
    assert laid.matrices == (None, None, None)
    at_once = tile(window(torch.from_numpy(np.ascontiguousarray(scan.array)), SPEC), laid.tiling, fill=0.0)
    assert torch.equal(torch.cat(list(columns(of_volume(scan), laid, SPEC))), at_once)


def test_a_volume_of_a_store_streams_as_it_does_from_memory(tmp_path: Path):
    store = Store.create(tmp_path / "store")
    (key,) = write(store, replace(phantom(PhantomConfig(seed=2, spacing_mm=(9.0, 8.0, 10.0))), subject="s" + "0" * 24))
    spec = replace(SPEC, spacing_mm=(11.0, 5.0, 10.0))
    one, two = of_store(store, key), of_volume(store.volume(key))
    assert (one.shape_ijk, one.spacing_mm, one.channels) == (two.shape_ijk, two.spacing_mm, two.channels)
    found = [torch.cat(list(columns(scan, lay(scan, spec), spec))) for scan in (one, two)]
    assert torch.equal(*found)


def test_the_resampled_scan_never_stands_in_memory():
    scan = of_volume(volume((64, 40, 40), (4.0, 4.0, 4.0)))
    spec = InputSpec(spacing_mm=(1.0, 1.0, 1.0), block_ijk=(16, 16, 16))
    laid = lay(scan, spec)
    at_once = 4 * int(np.prod(laid.tiling.shape_ijk))
    tracemalloc.start()
    try:
        for _ in columns(scan, laid, spec):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < at_once / 8  # numpy's memory: slabs and columns


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spacing", [(2.0, 2.0, 3.0), (3.0, 2.0, 2.0)])
def test_values_that_are_not_finite_are_refused(bad: float, spacing: tuple[float, ...]):
    scan = volume((9, 9, 9), spacing)
    scan.array[0, 8, 3, 5] = bad
    with pytest.raises(IngestError) as caught:
        list(columns(of_volume(scan), lay(of_volume(scan), SPEC), SPEC))
    assert caught.value.code == "not-finite"


@pytest.mark.parametrize("spacing", [(1e-4, 1.0, 1.0), (1.0, 1.0, 400.0)])
def test_impossible_spacings_are_refused(spacing: tuple[float, ...]):
    with pytest.raises(IngestError, match="no scanner does so") as caught:
        lay(of_volume(volume((4, 4, 4), spacing)), SPEC)
    assert caught.value.code == "impossible-spacing"


def test_a_scan_longer_than_any_and_one_of_too_many_blocks_are_refused():
    with pytest.raises(IngestError) as caught:
        lay(of_volume(volume((300, 1, 1), (100.0, 1.0, 1.0))), SPEC)
    assert caught.value.code == "impossible-spacing"
    with pytest.raises(IngestError) as caught:
        lay(of_volume(volume((90, 90, 90), (4.0, 4.0, 4.0))), replace(SPEC, spacing_mm=(0.5, 0.5, 0.5)))
    assert caught.value.code == "too-large"


def test_a_spacing_is_named_or_measured():
    assert with_spacing(SPEC, None) is SPEC
    stage = with_spacing(SPEC, "ct-stage1")
    assert (stage.spacing_mm, stage.preset, stage.block_ijk) == ((0.5, 0.5, 1.0), "ct-stage1", SPEC.block_ijk)
    assert with_spacing(SPEC, "native").grid_spacing_mm((1.0, 2.0, 7.0)) == (1.0, 2.0, 7.0)
    native = INPUT_SPECS["ct-native"]
    assert with_spacing(native, (1.0, 1.0, 2.0)).grid_spacing_mm((5.0, 5.0, 5.0)) == (1.0, 1.0, 2.0)


@pytest.mark.parametrize("spacing", ["ct-stage9", "", (1.0, 1.0), (0.0, 1.0, 1.0), (1.0, float("nan"), 1.0)])
def test_no_spacing_is_a_clear_error(spacing):
    with pytest.raises(ConfigError):
        with_spacing(SPEC, spacing)


def test_ct_presets_are_no_spacing_for_mr():
    with pytest.raises(ConfigError, match="for MR"):
        with_spacing(replace(SPEC, modality="MR"), "ct-stage1")


def test_items_are_made_in_another_thread_and_never_too_far_ahead():
    made: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            assert threading.current_thread() is not threading.main_thread()
            made.append(item)
            yield item

    for item in ahead(items(), 2):
        assert len(made) <= item + 1 + 2 + 2  # in use, in line, being made and being put
    assert made == list(range(20))


def test_what_a_maker_raises_comes_in_its_turn():
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    found = ahead(items(), 4)
    assert next(found) == 1
    with pytest.raises(KeyError, match="two"):
        next(found)


def test_who_stops_early_leaves_no_thread_behind():
    found = ahead(iter(range(1000)), 1)
    assert next(found) == 0
    found.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
