from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from scipy.fft import dctn

from voxelstem.resampling import resample
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store.thumbnails import (
    CROPS,
    DIMENSIONS,
    LEAN,
    MAX_BYTES,
    SIZE_TURN,
    WAVES,
    WHOLE,
    album,
    embed,
    is_thumbnail,
    thumbnail,
    unpack,
)
from voxelstem.study import Volume


def patient(seed: int) -> Volume:
    return phantom(PhantomConfig(seed=seed, spacing_mm=(4.0, 4.0, 5.0))).volumes[0]


def draw(volume: Volume) -> bytes:
    return thumbnail(volume.array, volume.affine_ras, volume.modality)


@pytest.fixture(scope="module")
def volume() -> Volume:
    return patient(0)


def alike(one: bytes, two: bytes) -> float:
    """The best product over all crops of one of them."""
    whole = embed([one, two])
    cuts = np.concatenate([embed([one], cut) for cut in CROPS]), np.concatenate([embed([two], cut) for cut in CROPS])
    return max(float(whole[0] @ whole[1]), float((cuts[0] @ whole[1]).max()), float((cuts[1] @ whole[0]).max()))


def test_a_thumbnail_has_at_most_a_kibibyte_and_equal_volumes_have_equal_bytes(volume):
    data = draw(volume)
    assert len(data) <= MAX_BYTES
    assert data == draw(patient(0))
    assert data != draw(patient(1))


@given(st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=4), st.integers(1, 30))
def test_modality_and_size_of_the_body_come_back(modality, size):
    array = np.full((1, 40, 32, size), -1000.0, np.float32)
    array[:, 10:30, 4:28] = 50.0
    one = unpack(thumbnail(array, np.diag([2.0, 3.0, 0.5, 1.0]), modality))
    assert one.modality == modality
    found = np.subtract(one.extent_mm, (40.0, 72.0, 0.5 * size))
    assert (np.abs(found) <= (4.0, 6.0, 0.0)).all()  # up to a voxel of air on each side


def test_the_body_is_found_in_air_that_is_not_drawn():
    rng = np.random.default_rng(0)
    body = rng.normal(1000, 30, (1, 20, 20, 20)).astype(np.float32)
    padded = np.pad(body, ((0, 0), (6, 3), (7, 9), (4, 4)))
    for modality, low, noise in (("CT", -1000.0, 30.0), ("MR", 0.0, 80.0)):
        seen = padded + low + rng.normal(0, noise, padded.shape).astype(np.float32)
        assert unpack(thumbnail(seen, np.eye(4), modality)).extent_mm == pytest.approx((20, 20, 20), abs=2)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 2), (1, 700, 2, 5)])
def test_any_shape_and_a_volume_of_one_value_have_a_thumbnail(shape):
    for array in (np.zeros(shape, np.float32), np.random.default_rng(0).normal(size=shape).astype(np.float32)):
        data = thumbnail(array, np.eye(4), "MR")
        assert np.isfinite(unpack(data).extent_mm).all()
        assert np.linalg.norm(embed([data])) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("modality", ["", "LONGER", "Ü"])
def test_a_modality_that_is_no_short_word_is_refused(modality):
    with pytest.raises(ValueError, match="modality is a word"):
        thumbnail(np.zeros((1, 4, 4, 4), np.float32), np.eye(4), modality)


def test_other_bytes_are_refused(volume):
    data = draw(volume)
    for wrong in (b"", data[:-1], data + b"\0", b"xx" + data[2:]):
        assert not is_thumbnail(wrong)
        with pytest.raises(ValueError, match="no thumbnail"):
            unpack(wrong)


def test_embeddings_are_the_cosine_transform_of_the_picture_beside_the_size_of_the_box(volume):
    one = unpack(draw(volume))
    waves = dctn(one.picture.astype(float), norm="ortho")
    numbers = [(i, j, k) for i, j, k in np.ndindex((WAVES + 1,) * 3) if 0 < i + j + k <= WAVES]
    picture = np.array([waves[number] * np.linalg.norm(number) ** LEAN for number in numbers])
    turn = SIZE_TURN * np.log(one.extent_mm)
    naive = np.concatenate([picture / np.linalg.norm(picture) * 0.5**0.5, np.cos(turn) / 6**0.5, np.sin(turn) / 6**0.5])
    (vector,) = embed([draw(volume)])
    assert vector.shape == (DIMENSIONS,)
    assert vector.dtype == np.float32
    assert vector == pytest.approx(naive, abs=2e-5)


def test_many_thumbnails_embed_as_each_alone():
    data = [draw(patient(seed)) for seed in range(3)] * 2000
    together = embed(album(data), CROPS[5])
    assert together[4097] == pytest.approx(embed([data[4097]], CROPS[5])[0], abs=1e-6)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1.0, abs=1e-5)


def test_spacing_noise_kernel_offset_and_rounding_hardly_change_a_thumbnail(volume):
    rng = np.random.default_rng(0)
    array, affine = volume.array, volume.affine_ras
    finer, finer_affine = resample(array, affine, (2.5, 2.5, 4.0))
    coarse, coarse_affine = resample(array, affine, (6.0, 6.0, 7.0))
    changes = {
        "finer": thumbnail(finer, finer_affine, "CT"),
        "coarser": thumbnail(coarse, coarse_affine, "CT"),
        "noise": thumbnail(array + rng.normal(0, 30, array.shape), affine, "CT"),
        "kernel": thumbnail(ndimage.gaussian_filter(array, [0, 1, 1, 1]), affine, "CT"),
        "offset": thumbnail(array + 30, affine, "CT"),
        "rounded": thumbnail(np.rint(array / 10) * 10, affine, "CT"),
    }
    whole = embed([draw(volume), *changes.values()])
    products = dict(zip(changes, (whole[1:] @ whole[0]).tolist(), strict=True))
    assert min(products.values()) > 0.97, products


@pytest.mark.parametrize("kept", [(0.7, 1, 1), (1, 0.65, 1), (1, 1, 0.75), (0.87, 0.87, 0.87)])
def test_a_crop_is_alike_as_a_crop_though_not_as_a_whole(volume, kept):
    sizes = [round(n * share) for n, share in zip(volume.shape_ijk, kept, strict=True)]
    crop = volume.array[:, -sizes[0] :, : sizes[1], -sizes[2] :]
    one, two = draw(volume), thumbnail(crop, volume.affine_ras, "CT")
    assert alike(one, two) > 0.9


def test_strangers_are_less_alike_than_copies(volume):
    strangers = [alike(draw(volume), draw(patient(seed))) for seed in range(1, 6)]
    noisy = volume.array + np.random.default_rng(0).normal(0, 30, volume.array.shape)
    assert alike(draw(volume), thumbnail(noisy, volume.affine_ras, "CT")) > max(strangers)


def test_every_crop_keeps_at_least_six_tenths_inside_the_box():
    assert WHOLE not in CROPS
    for low, high in CROPS:
        assert min(low) >= 0
        assert max(high) <= 1 + 1e-9
        assert np.prod(np.subtract(high, low)) > 0.6
