from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.views import slide

SIDES = st.integers(1, 40)


@given(size=SIDES, window=SIDES, overlap=st.floats(0, 0.9))
def test_windows_cover_every_voxel_and_stay_inside(size: int, window: int, overlap: float) -> None:
    found = slide.starts(size, window, overlap=overlap)
    assert {at for start in found for at in range(start, start + window)} >= set(range(size))
    assert found == sorted(set(found))
    assert found[-1] == max(size - window, 0)


@given(size=SIDES, window=st.integers(2, 40))
def test_neighbours_share_at_least_half_of_a_window(size: int, window: int) -> None:
    found = slide.starts(size, window, overlap=0.5)
    # Evenly spread starts are rounded: a voxel less at most.
    assert all(after - before <= window // 2 + 1 for before, after in pairwise(found))


@settings(max_examples=25)
@given(shape=st.tuples(SIDES, SIDES, SIDES), value=st.floats(-5, 5))
def test_a_network_that_says_one_thing_says_it_everywhere(shape: tuple[int, int, int], value: float) -> None:
    said = slide.slide(lambda rows: torch.full((1, 2, *rows.shape[2:]), value), torch.zeros(1, *shape), (8, 6, 8))
    assert said.shape == (2, *shape)
    assert torch.allclose(said, torch.tensor(value), atol=1e-5)


def test_a_network_that_copies_gives_the_scan_back() -> None:
    image = torch.randn(3, 19, 9, 23, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(slide.slide(lambda rows: rows, image, (8, 10, 8)), image, atol=1e-5)


def test_a_scan_smaller_than_the_window_is_padded_with_what_lies_outside() -> None:
    seen: list[torch.Tensor] = []

    def look(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows)
        return rows

    said = slide.slide(look, torch.ones(1, 3, 4, 5), (8, 4, 8), outside=-2.0)
    assert said.shape == (1, 3, 4, 5)
    (rows,) = seen
    assert rows.shape == (1, 1, 8, 4, 8)
    assert rows[0, 0, 3:].eq(-2).all()
    assert rows[0, 0, :, :, 5:].eq(-2).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(19, 9, 23), (5, 30, 8), (8, 10, 8)])
def test_rolling_along_any_axis_says_the_same_a_slab_at_a_time(axis: int, shape: tuple[int, int, int]) -> None:
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    window = (8, 10, 8)

    def look(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, rows.square(), rows.cumsum(dim=2 + axis)], dim=1)

    slabs = list(slide.roll(look, image, window, axis=axis))
    assert [slab.start for slab in slabs] == [
        sum(one.values.shape[1 + axis] for one in slabs[:n]) for n in range(len(slabs))
    ]
    assert max(slab.values.shape[1 + axis] for slab in slabs) <= window[axis]
    whole = torch.cat([slab.values for slab in slabs], dim=1 + axis)
    # The naive twin holds everything at once.
    padded = slide.pad(image, window, outside=0.0)
    total, weight = torch.zeros(3, *padded.shape[1:]), torch.zeros(padded.shape[1:])
    i, j, k = padded.shape[1:]
    for low in slide.places((i, j, k), window, overlap=0.5):
        box = tuple(slice(start, start + side) for start, side in zip(low, window, strict=True))
        total[(slice(None), *box)] += look(padded[(slice(None), *box)][None])[0] * slide.bell(window)
        weight[box] += slide.bell(window)
    twin = (total / weight)[:, : shape[0], : shape[1], : shape[2]]
    assert whole.shape == twin.shape
    assert torch.allclose(whole, twin, atol=1e-5)


@pytest.mark.parametrize(("axis", "across"), [(0, 1), (0, 2), (1, 0), (2, 1)])
@pytest.mark.parametrize("shape", [(19, 23, 21), (5, 9, 8)])
def test_a_stripe_holds_what_all_rows_hold_there(axis: int, across: int, shape: tuple[int, int, int]) -> None:
    image, seen = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1)), list[int]()

    def look(rows: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return torch.cat([rows, rows.square()], dim=1)

    whole = slide.slide(look, image, (8, 10, 8), overlap=0.3)
    everything, size = len(seen), shape[across]
    for start, stop in ((0, size // 3), (size // 3, size - 1), (size - 1, size), (0, size)):
        seen.clear()
        stripe = slide.Stripe(axis=across, start=start, stop=stop)
        slabs = list(slide.roll(look, image, (8, 10, 8), axis=axis, overlap=0.3, stripe=stripe))
        found = torch.cat([slab.values for slab in slabs], dim=1 + axis)
        assert torch.allclose(found, whole.narrow(1 + across, start, stop - start), atol=1e-6)
        assert len(seen) <= everything


def test_a_slab_holds_only_so_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.randn(1, 20, 9, 7, generator=torch.Generator().manual_seed(1))
    whole = slide.slide(lambda rows: rows, image, (8, 8, 7))
    monkeypatch.setattr(slide, "VALUES_AT_ONCE", 3 * 9 * 7)
    slabs = list(slide.roll(lambda rows: rows, image, (8, 8, 7), axis=0))
    assert max(slab.values.numel() for slab in slabs) <= 3 * 9 * 7
    assert torch.equal(torch.cat([slab.values for slab in slabs], dim=1), whole)


@pytest.mark.parametrize(("axis", "start", "stop"), [(0, 0, 2), (1, 3, 10)])
def test_stripes_along_the_slabs_or_beyond_the_scan_are_refused(axis: int, start: int, stop: int) -> None:
    stripe = slide.Stripe(axis=axis, start=start, stop=stop)
    with pytest.raises(ValueError, match="does not lie"):
        list(slide.roll(lambda rows: rows, torch.zeros(1, 9, 9, 9), (4, 4, 4), axis=0, stripe=stripe))


@pytest.mark.parametrize(("axis", "start", "stop"), [(3, 0, 1), (0, 2, 2), (0, -1, 2)])
def test_stripes_without_rows_are_none(axis: int, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="a stripe is rows"):
        slide.Stripe(axis=axis, start=start, stop=stop)


@pytest.mark.slow  # importing MONAI's inferers takes longer than all of these tests
def test_it_agrees_with_monai_where_windows_lie_at_the_same_places() -> None:
    from monai.inferers.utils import sliding_window_inference

    weight = torch.randn(2, 1, 3, 3, 3, generator=torch.Generator().manual_seed(1))

    def look(rows: torch.Tensor) -> torch.Tensor:
        return torch.conv3d(rows, weight, padding=1)

    image = torch.randn(1, 16, 24, 20, generator=torch.Generator().manual_seed(0))
    theirs = sliding_window_inference(image[None], (8, 8, 8), 1, look, overlap=0.5, mode="gaussian")
    assert torch.allclose(slide.slide(look, image, (8, 8, 8)), theirs[0], atol=1e-4)


def test_the_middle_of_a_window_counts_most_and_nothing_counts_nothing() -> None:
    weights = slide.bell((7, 9, 11))
    assert weights.max() == weights[3, 4, 5] == 1
    assert weights.min() >= slide.LEAST


@pytest.mark.parametrize(("window", "overlap"), [(0, 0.5), (4, 1.0), (4, -0.1)])
def test_windows_without_sense_are_refused(window: int, overlap: float) -> None:
    with pytest.raises(ValueError, match="overlap"):
        slide.starts(10, window, overlap=overlap)
