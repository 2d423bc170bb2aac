from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from voxelstem.engine.reading import Made, Slot, SlotReader
from voxelstem.engine.transfer import Crops
from voxelstem.store import Store
from voxelstem.streaming import lay, of_store, of_volume
from voxelstem.study import InputSpec
from voxelstem.views.augment import AugmentConfig
from voxelstem.views.crop import ViewKind
from voxelstem.views.intensity import limits
from voxelstem.views.multicrop import Region, ViewsConfig, make_views

SPEC = InputSpec(spacing_mm=(6.0, 6.0, 8.0), low_hu=-200.0, high_hu=300.0, block_ijk=(8, 8, 8))
VIEWS = ViewsConfig(
    global_=ViewKind(count=2, size_ijk=(8, 8, 8), min_scale=0.8, max_scale=1.2),
    augment=AugmentConfig(noise_std=0.1, flip_axes=(1,)),
)


def reader(store: Store, *, makes: bool = True, seed: int = 0) -> SlotReader:
    return SlotReader(crops=Crops(store, "blosc2"), spec=SPEC, views=VIEWS, seed=seed, makes=makes)


def slot(store: Store, phases: tuple[int, ...] = (0, 1)) -> Slot:
    return Slot(key=min(record.key for record in store), epoch=3, place=1, phases=phases)


def made(samples: tuple[Made | Region, ...]) -> list[bytes]:
    return [sample.views["global"].tobytes() for sample in samples if isinstance(sample, Made)]


def test_a_slot_gives_a_sample_for_each_phase_whichever_others_are_wanted(phantoms: Store):
    both = reader(phantoms)(slot(phantoms))
    assert not both.fault
    assert both.voxels > 0
    second = reader(phantoms)(slot(phantoms, (1,)))
    assert len(made(both.samples)) == 2
    assert made(both.samples)[1:] == made(second.samples)
    assert made(both.samples)[0] != made(both.samples)[1]


def test_seed_epoch_and_place_each_give_other_samples(phantoms: Store):
    mine = slot(phantoms)
    others = [
        reader(phantoms)(mine),
        reader(phantoms, seed=1)(mine),
        reader(phantoms)(replace(mine, epoch=4)),
        reader(phantoms)(replace(mine, place=2)),
    ]
    assert len({made(reading.samples)[0] for reading in others}) == 4


def test_a_reader_that_makes_no_views_hands_over_boxes_of_half_the_bytes(phantoms: Store):
    whole, boxes = (reader(phantoms, makes=makes)(slot(phantoms)) for makes in (True, False))
    for sample, want in zip(boxes.samples, whole.samples, strict=True):
        assert isinstance(sample, Region)
        assert isinstance(want, Made)
        assert sample.voxels.dtype == np.int16
        views = make_views([sample], SPEC, VIEWS)
        assert torch.equal(views["global"][0], torch.from_numpy(want.views["global"]))
        assert np.array_equal(sample.places_mm["global"], want.places_mm["global"])


@pytest.mark.parametrize("normalisation", ["window", "zscore", "unit99"])
def test_training_and_embedding_bring_a_volume_to_the_same_numbers(brains: Store, normalisation: Any):
    spec = InputSpec(modality="MR", spacing_mm=SPEC.spacing_mm, normalisation=normalisation)
    for record in brains:
        taught = limits(Crops(brains, "blosc2").stats(record.key, spec), spec)
        streamed = lay(of_store(brains, record.key), spec).limits
        assert taught == streamed == lay(of_volume(brains.volume(record.key)), spec).limits


def test_a_scan_that_is_not_there_is_a_fault_and_no_error(phantoms: Store):
    reading = reader(phantoms)(replace(slot(phantoms), key="0" * 64))
    assert reading.fault
    assert reading.samples == ()
