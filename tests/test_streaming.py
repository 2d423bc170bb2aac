from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from voxelstem.errors import ConfigError, IngestError
from voxelstem.resampling import grid_coordinates, resampled_count
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Store, write
from voxelstem.store.encoding import body_box
from voxelstem.streaming import columns, lay, of_store, of_volume, with_spacing
from voxelstem.study import INPUT_SPECS, InputSpec, Provenance, Study, Volume
from voxelstem.views import resample
from voxelstem.views.augment import AugmentConfig
from voxelstem.views.crop import Crop, ViewKind
from voxelstem.views.intensity import limits, window
from voxelstem.views.multicrop import Region, ViewsConfig, draw_changes, draw_sample, make_views
from voxelstem.views.tile import split_blocks, tile

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
    wanted = spec.grid_spacing_mm(scan.spacing_mm, scan.shape_ijk)
    steps = [want / have for have, want in zip(scan.spacing_mm, wanted, strict=True)]
    places = [
        grid_coordinates(resampled_count(size, 1.0, step), start=0.0, step=step)
        for size, step in zip(scan.shape_ijk, steps, strict=True)
    ]
    voxels = torch.from_numpy(np.ascontiguousarray(scan.array))
    sampled = resample.sample(voxels, tuple(places), step_ijk=tuple(steps), outside=spec.low_hu)
    return tile(window(sampled, limits(None, spec)), laid.tiling, fill=0.0)


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
    at_once = tile(
        window(torch.from_numpy(np.ascontiguousarray(scan.array)), limits(None, SPEC)), laid.tiling, fill=0.0
    )
    assert torch.equal(torch.cat(list(columns(of_volume(scan), laid, SPEC))), at_once)


BRAINS: list[InputSpec] = [
    InputSpec(modality="MR", spacing_mm=(2.0, 2.0, 3.0), block_ijk=(8, 8, 4), normalisation=how)
    for how in ("zscore", "unit99")
]


def mr(shape: tuple[int, ...], spacing: tuple[float, ...], *, order: str = "C") -> Volume:
    """As `volume`, of raw intensities that are no HU; the first voxel is bright, so that there are two values."""
    scan = volume(shape, spacing, order=order)
    scan.array[...] += 1500
    scan.array[0, 0, 0, 0] = 4000
    return replace(scan, modality="MR")


@pytest.mark.parametrize("spec", BRAINS)
@given(shape=sizes.filter(lambda shape: shape != (1, 1, 1)), spacing=edges, order=st.sampled_from("CF"))
@settings(max_examples=15)
def test_a_scan_is_normalised_by_the_whole_volume_and_padded_by_its_minimum(
    spec: InputSpec, shape: tuple[int, ...], spacing: tuple[float, ...], order: str
):
    scan = mr(shape, spacing, order=order)
    laid = lay(of_volume(scan), spec)
    assert laid.limits == limits(scan.array, spec)
    least = torch.tensor(float(scan.array.min()))
    assert laid.limits.outside == least
    # The same by a window so wide that it changes nothing but the scale.
    wide = replace(spec, normalisation="window", low_hu=float(least), high_hu=float(least) + 8192)
    raw = torch.cat(list(columns(of_volume(scan), lay(of_volume(scan), wide), wide))) * 8192 + least
    found = torch.cat(list(columns(of_volume(scan), laid, spec)))
    assert torch.allclose(found, window(raw, laid.limits), atol=1e-4)


@pytest.mark.parametrize("spec", BRAINS)
def test_a_store_gives_the_limits_and_the_bits_that_memory_gives(tmp_path: Path, spec: InputSpec):
    store = Store.create(tmp_path / "store")
    scan = mr((70, 20, 18), (2.0, 2.0, 3.0), order="F")
    (key,) = write(store, Study(subject="s" + "0" * 24, volumes=(scan,)))
    from_memory = of_volume(store.volume(key))
    one, two = (lay(scan, spec) for scan in (of_store(store, key), from_memory))
    assert one.limits == two.limits
    found = [torch.cat(list(columns(scan, one, spec))) for scan in (of_store(store, key), from_memory)]
    assert torch.equal(*found)


@pytest.mark.parametrize(("value", "code"), [(np.nan, "not-finite"), (np.inf, "not-finite"), (None, "constant")])
def test_a_brain_that_cannot_be_measured_is_refused_when_it_is_laid_out(value: float | None, code: str):
    scan = mr((9, 8, 7), (2.0, 2.0, 3.0))
    if value is None:
        scan.array[...] = 7
    else:
        scan.array[0, 8, 7, 6] = value
    for spec in BRAINS:
        with pytest.raises(IngestError) as refused:
            lay(of_volume(scan), spec)
        assert refused.value.code == code


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


FIT = InputSpec(block_ijk=(16, 12, 8), low_hu=-1000.0, high_hu=200.0, resampling="fit")


def in_air(shape: tuple[int, ...], box: tuple[slice, slice, slice], spacing: tuple[float, ...], *, order: str = "C"):
    """A volume of noise above -1000 in a box, and of air at or below that around it."""
    scan = volume(shape, spacing, order=order)
    inside = np.zeros(shape, bool)
    inside[box] = True
    scan.array[0] = np.where(inside, np.abs(scan.array[0]) - 999, -1000 - np.abs(scan.array[0]) * (scan.array[0] > 0))
    return scan


def box_slices(data: st.DataObject, shape: tuple[int, ...]) -> tuple[slice, slice, slice]:
    starts = [data.draw(st.integers(0, size - 1)) for size in shape]
    i, j, k = (slice(start, data.draw(st.integers(start + 1, size))) for start, size in zip(starts, shape, strict=True))
    return i, j, k


@given(st.data(), st.tuples(*[st.integers(1, 70)] * 3), edges, st.sampled_from("CF"))
@settings(max_examples=40)
def test_what_lies_above_the_window_is_stretched_to_one_block(data: st.DataObject, shape, spacing, order: str):
    box = box_slices(data, shape)
    scan = in_air(shape, box, spacing, order=order)
    laid = lay(of_volume(scan), FIT)
    (found,) = columns(of_volume(scan), laid, FIT)
    inside = torch.from_numpy(np.ascontiguousarray(scan.array[:, *box]))
    assert torch.allclose(
        found, window(interpolate(inside[None], size=FIT.block_ijk, mode="area"), limits(None, FIT)), atol=2e-6
    )
    assert laid.share == pytest.approx(inside.numel() / scan.array.size)


@given(st.data(), st.tuples(*[st.integers(1, 20)] * 3), edges)
@settings(max_examples=20)
def test_the_stretched_block_fills_the_box_in_the_patient(data: st.DataObject, shape, spacing):
    box = box_slices(data, shape)
    scan = in_air(shape, box, spacing)
    scan.affine_ras[:3, 3] = -50.0, 20.0, 300.0
    laid = lay(of_volume(scan), FIT)
    for block_edge, box_edge in (([0, 0, 0], [s.start for s in box]), (FIT.block_ijk, [s.stop for s in box])):
        ours = laid.affine_ras @ [*(np.array(block_edge) - 0.5), 1]
        assert np.allclose(ours, scan.affine_ras @ [*(np.array(box_edge) - 0.5), 1], atol=1e-9)


FRAME = replace(SPEC, frame_ijk=(16, 8, 8))
AS_IT_IS = ViewsConfig(
    global_=ViewKind(count=1, size_ijk=(16, 8, 8)),
    augment=AugmentConfig(flip_axes=(), noise_std=0.0, gamma=0.0, shift=0.0),
    region_scale=1.0,
)


@dataclass(frozen=True)
class Ground:
    """What a store's record says of a scan."""

    shape_ijk: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    body_start_ijk: tuple[int, int, int]
    body_size_ijk: tuple[int, int, int]


@given(st.data(), sizes, edges, st.sampled_from("CF"))
@settings(max_examples=60)
def test_a_frame_shows_in_use_exactly_what_training_showed(data: st.DataObject, shape, spacing, order: str):
    scan = in_air(shape, box_slices(data, shape), spacing, order=order)
    ground = Ground(shape, scan.spacing_mm, *body_box(scan))
    views = draw_sample(AS_IT_IS, FRAME, ground, np.random.default_rng(0))
    region = Region(
        voxels=np.ascontiguousarray(scan.array),
        crop=Crop(start_ijk=(0, 0, 0), size_ijk=shape),
        spacing_mm=scan.spacing_mm,
        views=views,
        changes=draw_changes(AS_IT_IS.augment, views, np.random.default_rng(0)),
    )
    taught = make_views([region], FRAME, AS_IT_IS)["global"][0, 0]
    laid = lay(of_volume(scan), FRAME)
    assert torch.allclose(
        torch.cat(list(columns(of_volume(scan), laid, FRAME))), split_blocks(taught, (8, 8, 4)), atol=2e-6
    )


@given(st.data(), sizes, edges)
@settings(max_examples=20)
def test_a_frame_lies_about_the_middle_of_the_body_and_says_what_it_leaves_out(data: st.DataObject, shape, spacing):
    scan = in_air(shape, box_slices(data, shape), spacing)
    scan.affine_ras[:3, 3] = -50.0, 20.0, 300.0
    start, size = (np.array(edge) for edge in body_box(scan))
    laid = lay(of_volume(scan), FRAME)
    middle_ras = scan.affine_ras @ [*(start + size / 2 - 0.5), 1]
    assert np.allclose(laid.affine_ras @ [*(np.array([16, 8, 8]) / 2 - 0.5), 1], middle_ras, atol=1e-9)
    wide, body = np.array([32.0, 16.0, 24.0]), size * spacing
    assert laid.cut == pytest.approx(1 - np.prod(np.minimum(wide, body) / body))


def test_a_frame_of_a_store_is_that_of_memory_and_a_brain_s_is_about_the_volume(tmp_path: Path):
    store = Store.create(tmp_path / "store")
    (key,) = write(store, replace(phantom(PhantomConfig(seed=2, spacing_mm=(9.0, 8.0, 10.0))), subject="s" + "0" * 24))
    spec = replace(FRAME, spacing_mm=(11.0, 5.0, 10.0))
    one, two = of_store(store, key), of_volume(store.volume(key))
    assert torch.equal(*[torch.cat(list(columns(scan, lay(scan, spec), spec))) for scan in (one, two)])
    brain = mr((9, 8, 7), (2.0, 2.0, 3.0))
    laid = lay(of_volume(brain), replace(FRAME, modality="MR"))
    assert np.allclose(laid.affine_ras @ [7.5, 3.5, 3.5, 1], brain.affine_ras @ [4.0, 3.5, 3.0, 1])


def test_a_scan_of_nothing_but_air_is_stretched_whole():
    scan = volume((9, 9, 9), (2.0, 2.0, 2.0))
    scan.array[:] = -1000.0
    laid = lay(of_volume(scan), FIT)
    (block,) = columns(of_volume(scan), laid, FIT)
    assert laid.share == 1.0
    assert block.shape == (1, 1, *FIT.block_ijk)
    assert not block.any()


def test_fitting_a_box_reads_few_rows_at_a_time():
    whole_scan = volume((400, 6, 5), (1.0, 1.0, 1.0))
    seen: list[int] = []

    def slab(low: int, high: int) -> np.ndarray:
        seen.append(high - low)
        return whole_scan.array[:, low:high]

    spec = replace(FIT, block_ijk=(200, 4, 4))
    scan = replace(of_volume(whole_scan), slab=slab)
    (block,) = columns(scan, lay(scan, spec), spec)
    assert block.shape == (1, 1, 200, 4, 4)
    assert max(seen) <= 2 * 32 + 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_outside_the_box_too(bad: float):
    scan = in_air((9, 9, 9), (slice(2, 5), slice(2, 5), slice(2, 5)), (2.0, 2.0, 2.0))
    scan.array[0, 8, 8, 8] = bad
    with pytest.raises(IngestError) as caught:
        lay(of_volume(scan), FIT)
    assert caught.value.code == "not-finite"


@pytest.mark.parametrize("spacing", ["ct-stage2", "native", (1.0, 1.0, 2.0)])
def test_weights_that_fit_scans_to_a_block_take_no_spacing(spacing):
    assert with_spacing(FIT, None) is FIT
    with pytest.raises(ConfigError, match="no other can be chosen"):
        with_spacing(FIT, spacing)


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


def test_a_frame_that_no_machine_could_hold_is_refused_before_memory_is_asked_for():
    with pytest.raises(IngestError) as caught:
        lay(of_volume(volume((9, 9, 9), (4.0, 4.0, 4.0))), replace(SPEC, frame_ijk=(8_000_000, 8, 4)))
    assert caught.value.code == "too-large"


def test_a_spacing_is_named_or_measured():
    assert with_spacing(SPEC, None) is SPEC
    stage = with_spacing(SPEC, "ct-stage1")
    assert (stage.spacing_mm, stage.preset, stage.block_ijk) == ((0.5, 0.5, 1.0), "ct-stage1", SPEC.block_ijk)
    assert with_spacing(SPEC, "native").grid_spacing_mm((1.0, 2.0, 7.0), (1, 1, 1)) == (1.0, 2.0, 7.0)
    for spacing in ("ct-stage1", "native", (1.0, 1.0, 2.0)):
        assert with_spacing(FRAME, spacing).frame_ijk is None  # whose voxels were of another size
    native = INPUT_SPECS["ct-native"]
    assert with_spacing(native, (1.0, 1.0, 2.0)).grid_spacing_mm((5.0, 5.0, 5.0), (1, 1, 1)) == (1.0, 1.0, 2.0)


@pytest.mark.parametrize("spacing", ["ct-stage9", "", (1.0, 1.0), (0.0, 1.0, 1.0), (1.0, float("nan"), 1.0)])
def test_no_spacing_is_a_clear_error(spacing):
    with pytest.raises(ConfigError):
        with_spacing(SPEC, spacing)


def test_a_preset_of_another_normaliser_is_no_spacing():
    nnssl = INPUT_SPECS["mri-nnssl"]
    assert with_spacing(replace(nnssl, spacing_mm=(2.0, 2.0, 2.0)), "mri-nnssl") == nnssl
    with pytest.raises(ConfigError, match="say one of mri-nnssl, native"):
        with_spacing(nnssl, "mri-fomo25")


def test_ct_presets_are_no_spacing_for_mr():
    with pytest.raises(ConfigError, match="for MR"):
        with_spacing(replace(SPEC, modality="MR"), "ct-stage1")
