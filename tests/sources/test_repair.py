from __future__ import annotations

import numpy as np
import pytest

from voxelstem import geometry
from voxelstem.errors import IngestError
from voxelstem.sources import raster
from voxelstem.sources.grid import Frame, place
from voxelstem.sources.repair import straighten

FILL = -1000.0
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
OBLIQUE = ((0.8, 0.6, 0.0), (-0.48, 0.64, 0.6))


def stack(heights, axes=AXIAL, *, slide=None, rows=5, columns=4):
    """Frames of pixels of 0.8 x 0.6 mm (row, column), at heights along the normal and slid by `slide` (LPS)."""
    normal = np.cross(*axes)
    slide = np.zeros((len(heights), 3)) if slide is None else np.asarray(slide)
    return [
        Frame(
            name=f"image {index + 1}",
            orientation=(*axes[0], *axes[1]),
            position_mm=tuple(np.array([-10.0, -20.0, 30.0]) + normal * height + slide[index]),
            pixel_spacing_mm=(0.8, 0.6),
            rows=rows,
            columns=columns,
        )
        for index, height in enumerate(heights)
    ]


def even(count=8, step=2.5):
    return [index * step for index in range(count)]


def scanned(frames, density):
    """What a scanner writes: the density at each voxel's true place (LPS), slice by slice."""
    column, row = np.meshgrid(np.arange(frames[0].columns), np.arange(frames[0].rows), indexing="ij")
    pictures = []
    for one in frames:
        along_row, along_column = np.array(one.orientation).reshape(2, 3)
        between_rows, between_columns = one.pixel_spacing_mm
        place_mm = (
            np.array(one.position_mm)
            + column[..., None] * between_columns * along_row
            + row[..., None] * between_rows * along_column
        )
        pictures.append(density(place_mm))
    return np.stack(pictures, axis=2).astype(np.float32)


def tilted(heights, degrees, axes):
    slide = np.outer(np.tan(np.radians(degrees)) * np.array(heights), axes[1])
    return stack(heights, axes, slide=slide, rows=60, columns=50)


def ball(centre_lps_mm, radius_mm):
    def density(place_mm):
        inside = radius_mm - np.linalg.norm(place_mm - centre_lps_mm, axis=-1)
        return FILL + 1100 * np.clip(inside + 0.5, 0, 1)  # a blurred edge, as a scanner has

    return density


@pytest.mark.parametrize("axes", [AXIAL, OBLIQUE])
@pytest.mark.parametrize("degrees", [18.5, -25.0])
def test_a_ball_scanned_with_tilt_comes_out_round_and_in_its_place(axes, degrees):
    frames = tilted(even(20, 2.0), degrees, axes)
    middle = frames[10]
    along_row, along_column = np.array(middle.orientation).reshape(2, 3)
    centre = np.array(middle.position_mm) + 14.0 * along_row + 23.0 * along_column
    array = scanned(frames, ball(centre, 9.0))
    grid = place(frames, repair=True)
    straight, affine, notes = straighten(array, grid)
    geometry.check_affine(affine)
    weight = (straight - FILL) / 1100
    index = np.stack(np.meshgrid(*map(np.arange, straight.shape), indexing="ij"), axis=-1)
    at = (index * weight[..., None]).sum(axis=(0, 1, 2)) / weight.sum()
    true = geometry.patient_to_voxel((geometry.LPS_TO_RAS[:3, :3] @ centre)[None], affine)[0]
    assert np.abs(at - true).max() < 0.5
    spread = np.sqrt((weight[..., None] * (index - at) ** 2).sum(axis=(0, 1, 2)) / weight.sum())
    np.testing.assert_allclose(
        spread * geometry.spacing_mm(affine), 9 / np.sqrt(5), rtol=0.05
    )  # of a ball, on each axis
    assert f"{abs(degrees):.1f} degrees" in notes[0]
    assert "-1000 fills" in notes[0]


def naive_straight(array, grid, affine, shape):
    """Every voxel by itself: back to mm, into the slices around it, linear in each of them and between both."""
    fill, repair = array.min(), grid.repair
    inverse = np.linalg.inv(grid.affine_ras)
    out = np.empty(shape)
    for index in np.ndindex(*shape):
        column, row, up = (inverse @ affine @ [*index, 1])[:3]
        height = up * repair.step_mm
        upper = min(int(np.searchsorted(repair.height_mm, height - 1e-6)), len(repair.height_mm) - 1)
        lower = upper if abs(repair.height_mm[upper] - height) < 1e-6 else upper - 1
        share = 0.0 if upper == lower else (height - repair.height_mm[lower]) / np.diff(repair.height_mm)[lower]
        parts = []
        for at in (lower, upper):
            slid = repair.slide_mm[at] / geometry.spacing_mm(affine)[:2]
            value = 0.0
            x, y = column - slid[0], row - slid[1]
            x, y = (round(n) if abs(n - round(n)) < 1e-6 else n for n in (x, y))
            if not (0 <= x <= array.shape[0] - 1 and 0 <= y <= array.shape[1] - 1):
                parts.append(fill)
                continue
            for i in {int(np.floor(x)), int(np.ceil(x))}:
                for j in {int(np.floor(y)), int(np.ceil(y))}:
                    value += (1 - abs(x - i)) * (1 - abs(y - j)) * array[i, j, at]
            parts.append(value)
        out[index] = (1 - share) * parts[0] + share * parts[1]
    return out


@pytest.mark.parametrize(
    ("heights", "slide"),
    [
        (even(6), (0.0, 0.31, 0.0)),
        (even(6), (-0.2, 0.17, 0.0)),
        ([0.0, 2.5, 5.0, 10.0, 12.5, 15.0], (0.0, 0.0, 0.0)),
        ([0.0, 2.0, 5.0, 6.5, 9.5, 12.5], (0.0, -0.28, 0.0)),
    ],
)
def test_straight_voxels_equal_the_naive_twin(heights, slide):
    frames = stack(heights, slide=np.outer(heights, slide))
    array = np.random.default_rng(3).normal(size=(4, 5, 6)).astype(np.float32)
    grid = place(frames, repair=True)
    straight, affine, _ = straighten(array, grid)
    np.testing.assert_allclose(straight, naive_straight(array, grid, affine, straight.shape), atol=1e-5)


def test_a_missing_slice_is_the_mean_of_its_neighbours_and_all_others_stay():
    heights = even(8)
    array = np.random.default_rng(0).normal(size=(4, 5, 7)).astype(np.float32)
    grid = place(stack(heights[:3] + heights[4:]), repair=True)
    straight, affine, notes = straighten(array, grid)
    np.testing.assert_array_equal(straight[..., [0, 1, 2, 4, 5, 6, 7]], array)
    np.testing.assert_allclose(straight[..., 3], array[..., 2:4].mean(axis=-1), atol=1e-6)
    np.testing.assert_allclose(affine, place(stack(heights)).affine_ras, atol=1e-5)
    assert "1 of 8 slices made up" in notes[0]
    assert "2.50 to 5.00 mm apart" in notes[0]


def test_nothing_measured_falls_off_the_canvas():
    slide = np.outer(even(6), (0.0, -0.8, 0.0))  # whole rows: 2 mm a slice are 2.5 rows of 0.8 mm
    slide[:, 1] = np.rint(slide[:, 1] / 0.8) * 0.8
    array = np.random.default_rng(0).uniform(1, 2, (4, 5, 6)).astype(np.float32)
    straight, affine, _ = straighten(array, grid := place(stack(even(6), slide=slide), repair=True))
    assert grid.repair is not None
    assert np.sort(straight[straight > array.min()]).tolist() == np.sort(array[array > array.min()]).tolist()
    first = (np.argwhere(straight == array[0, 0, 5])[0] @ affine[:3, :3].T + affine[:3, 3]) * [-1, -1, 1]
    np.testing.assert_allclose(first, stack(even(6), slide=slide)[5].position_mm, atol=1e-5)


def test_a_straight_stack_is_handed_back_untouched():
    array = np.zeros((4, 5, 8), np.float32)
    grid = place(stack(even()), repair=True)
    same, affine, notes = straighten(array, grid)
    assert same is array
    assert affine is grid.affine_ras
    assert notes == ()


def test_an_array_of_another_shape_is_an_error_of_the_caller():
    with pytest.raises(ValueError, match="does not fill"):
        straighten(np.zeros((5, 4, 8), np.float32), place(stack(even()), repair=True))


def test_a_canvas_beyond_the_limit_is_refused_before_it_is_reserved(monkeypatch):
    monkeypatch.setattr(raster, "MOST_BYTES", 4 * 5 * 6 * 4)
    grid = place(stack(even(6), slide=np.outer(even(6), (0, 0.9, 0))), repair=True)
    with pytest.raises(IngestError, check=lambda problem: problem.code == "too-large"):
        straighten(np.zeros((4, 5, 6), np.float32), grid)
