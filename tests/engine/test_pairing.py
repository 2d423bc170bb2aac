"""Pairs from the drawing of a partner to the batch: what `engine/pairing.py` finds, and what the loader makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from tests.engine.brains import SHAPE, filled, key_of, scan

from voxelstem.distributed import Ranks
from voxelstem.engine.cost import blank_batch
from voxelstem.engine.footprint import view_bytes
from voxelstem.engine.loader import Loader, LoaderConfig
from voxelstem.engine.pairing import find_partner
from voxelstem.engine.targets import read_facts
from voxelstem.errors import StoreError
from voxelstem.protocols import Batch
from voxelstem.store import Store
from voxelstem.store.reader import file_path
from voxelstem.study import InputSpec
from voxelstem.views.augment import AugmentConfig
from voxelstem.views.crop import ViewKind, ViewPlan
from voxelstem.views.multicrop import ViewsConfig
from voxelstem.views.pair import PairConfig

SPEC = InputSpec(modality="MR", spacing_mm=(2.0, 2.0, 2.0), low_hu=0.0, high_hu=400.0, block_ijk=(4, 4, 4))
VIEWS = ViewsConfig(
    global_=ViewKind(size_ijk=(4, 4, 4), min_scale=0.9, max_scale=1.1),
    region_scale=1.2,
    overhang=0.0,
    pair=PairConfig(same_session=0.5, any_scan=0.5),
)
PLAN = ViewPlan(start_mm=(10.0, 10.0, 10.0), extent_mm=(8.0, 8.0, 8.0), size_ijk=(4, 4, 4))


def placed(spacing: tuple[float, float, float], origin: tuple[float, float, float]) -> np.ndarray:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def turned() -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = 2.0 * np.array([[0.9397, -0.3420, 0], [0.3420, 0.9397, 0], [0, 0, 1]])
    return affine


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three contrasts of one head on three grids; one head whose second scan is turned; and one that has one scan."""
    other = placed((1.5, 2.0, 2.5), (3.0, -1.0, -4.0))
    return filled(
        tmp_path_factory.mktemp("pairing") / "store",
        [
            scan("a", "T1w", age=60.0),
            scan("a", "T2w", affine=other, age=60.0),
            scan("a", "FLAIR", affine=placed((2.0, 2.0, 2.0), (1.0, 1.0, 1.0)), age=60.0),
            scan("b", "T1w"),
            scan("b", "T2w", affine=turned()),
            scan("c", "DWI"),
        ],
    )


def loader(store: Store, *, views: ViewsConfig = VIEWS, batch: int = 3, config: LoaderConfig | None = None) -> Loader:
    keys = [record.key for record in store]
    return Loader(store, keys, SPEC, views=views, config=config or LoaderConfig(batch=batch, ahead=3), seed=7)


def content(batch: Batch) -> bytes:
    parts = [batch.views, batch.places_mm, batch.targets]
    return b"".join(part[name].numpy().tobytes() for part in parts for name in sorted(part))


def find(store: Store, key: str, *, seed: int = 0, aside: tuple[str, ...] = (), plan: ViewPlan = PLAN):
    facts = read_facts(store, [record.key for record in store], PairConfig(same_session=0.0, any_scan=1.0))
    return find_partner(facts, store, store.record(key), plan, rng=np.random.default_rng(seed), aside=aside)


def test_every_partner_is_found_and_one_that_is_put_aside_leaves_the_others_as_they_were(store: Store):
    t1, t2, flair = key_of(store, "T1w", who="a"), key_of(store, "T2w", who="a"), key_of(store, "FLAIR")
    found = {seed: find(store, t1, seed=seed).record.key for seed in range(20)}
    assert set(found.values()) == {t2, flair}
    for seed, key in found.items():
        assert find(store, t1, seed=seed, aside=(t2 if key == flair else flair,)).record.key == key
        assert find(store, t1, seed=seed, aside=(t2, flair)).record.key == t1


def test_scans_whose_axes_or_field_of_view_differ_are_refused_by_name_and_reason(store: Store):
    one, other = key_of(store, "T1w", who="b"), key_of(store, "T2w", who="b")
    found = find(store, one)
    assert (found.record.key, found.plan) == (one, PLAN)
    assert found.refused == ((other, "axes"),)
    outside = find(store, key_of(store, "T2w", who="a"), plan=replace(PLAN, start_mm=(0.0, 0.0, 32.0)))
    assert {reason for _, reason in outside.refused} == {"field of view"}


def test_both_views_show_the_same_place_in_the_world(store: Store):
    """Voxels hold a linear function of the world's millimetres, which interpolation keeps."""
    keys = [key_of(store, contrast, who="a") for contrast in ("T1w", "T2w", "FLAIR")]
    config = LoaderConfig(batch=3, samples_per_open=1)
    # Finer than any of the grids, and within all: thinning is not exact, and the outermost half voxels are repeated.
    fine = ViewKind(size_ijk=(4, 4, 4), min_scale=0.4, max_scale=0.7)
    views = replace(VIEWS, global_=fine, central_mm=(12.0,) * 3, augment=AugmentConfig(flip_axes=(0, 1, 2)))
    made = Loader(store, keys, SPEC, views=views, config=config, seed=1)
    different = 0
    for step in range(12):
        batch = made.batch(step)
        assert batch.views["other"].shape == batch.views["global"].shape == (3, 1, 1, 4, 4, 4)
        torch.testing.assert_close(batch.views["other"], batch.views["global"], atol=1e-4, rtol=0)
        # Mirrored alike; each view's place is told in its own scan's millimetres.
        signs = [batch.places_mm[name][..., 1, :].sign() for name in ("global", "other")]
        assert torch.equal(*signs)
        different += int((batch.places_mm["global"] != batch.places_mm["other"]).any())
    assert different > 6


def test_intensities_of_the_two_change_independently(store: Store):
    views = replace(VIEWS, augment=AugmentConfig(noise_std=0.2), pair=PairConfig(same_session=0.0, any_scan=1.0))
    keys = [key_of(store, "DWI"), key_of(store, "T1w", who="b"), key_of(store, "T2w", who="b")]
    batch = Loader(store, keys, SPEC, views=views, config=LoaderConfig(batch=3), seed=1).batch(0)
    assert batch.targets["copy"].all()
    assert (batch.views["other"] != batch.views["global"]).flatten(1).any(dim=1).all()


def test_targets_and_views_of_a_batch_belong_together(store: Store):
    made = loader(store, batch=6)
    batch = made.batch(0)
    names = made.names(0)
    for row, name in enumerate(names):
        (record,) = [each for each in store if each.key.startswith(name)]
        assert batch.targets["contrast"][row, 0] == VIEWS.pair.index(record.acquisition.contrast)
        if batch.targets["copy"][row]:
            assert torch.equal(batch.views["other"][row], batch.views["global"][row])
            assert torch.equal(*batch.targets["contrast"][row])
    assert {name: tuple(value.shape) for name, value in batch.targets.items()} == {
        "copy": (6, 1),
        "same_session": (6, 1),
        "years": (6, 1),
        "pathology": (6, 1),
        "contrast": (6, 2),
        "age": (6, 2),
        "subject": (6, 1),
    }
    torch.testing.assert_close(batch.part(2, 4).targets["age"], batch.targets["age"][2:4], equal_nan=True)


@pytest.mark.parametrize(
    "changes", [{"threads": 3}, {"made": "device"}, pytest.param({"workers": 1}, marks=pytest.mark.slow)]
)
def test_pairs_are_the_same_whoever_reads_them_and_whenever(store: Store, changes):
    want = [content(loader(store).batch(step)) for step in range(2, 6)]
    assert len(set(want)) == 4
    config = LoaderConfig(batch=3, ahead=3, **changes)
    assert [content(batch) for batch in loader(store, config=config).batches(2, 6)] == want


def test_ranks_share_the_same_pairs(store: Store):
    whole = loader(store, batch=6).batch(1)
    keys = [record.key for record in store]
    for rank in range(2):
        made = Loader(store, keys, SPEC, views=VIEWS, config=LoaderConfig(batch=6), seed=7, rank=rank, world=2)
        share, want = made.batch(1), whole.part(3 * rank, 3 * rank + 3)
        assert content(share) == content(want)


def test_a_recipe_without_pairs_draws_the_views_that_it_always_drew(store: Store):
    paired, plain = loader(store).batch(0), loader(store, views=replace(VIEWS, pair=None)).batch(0)
    assert torch.equal(paired.views["global"], plain.views["global"])
    assert set(plain.views) == {"global"}
    assert plain.targets == {}


def test_without_a_second_scan_the_targets_are_there_all_the_same(store: Store):
    alone = loader(store, views=replace(VIEWS, pair=PairConfig(same_session=0.0))).batch(0)
    assert set(alone.views) == {"global"}
    assert set(alone.targets) == {"contrast", "age", "pathology", "subject"}


def test_copies_and_refusals_are_told_in_the_journal(store: Store):
    made = loader(store, batch=6)
    first = made.notes()
    assert next(note["targets"] for note in first if "targets" in note)["without_partner"] == 1
    for _ in made.batches(0, 4):
        pass
    refused = [note for note in made.notes() if "unpaired" in note]
    assert {note["with"] for note in refused} >= {key_of(store, "T1w", who="b")[:16]}
    assert all("registered" in note["reason"] or "cover" in note["reason"] for note in refused)
    # One scan without any other, and two that are turned against each other.
    assert 0.5 <= made.speed()["copy_share"] < 0.8
    assert made.speed()["pairs_refused"] >= len(refused) > 0
    assert "copy_share" not in loader(store, views=replace(VIEWS, pair=None)).speed()


def counts_by_step(made: Loader, start: int, stop: int) -> list[tuple[int, int, int]]:
    return [(made.pairs.drawn, made.pairs.copies, made.pairs.refused) for _ in made.batches(start, stop)]


def alone(store: Store, stop: int, *, each: int) -> list[tuple[int, int, int]]:
    """The same counts, from loaders that were asked for one step each and so had nothing to read ahead."""
    found, total = list[tuple[int, int, int]](), (0, 0, 0)
    for step in range(stop):
        made = loader(store, config=LoaderConfig(batch=3, samples_per_open=each, ahead=1))
        (own,) = counts_by_step(made, step, step + 1)
        total = (total[0] + own[0], total[1] + own[1], total[2] + own[2])
        found.append(total)
    return found


@pytest.mark.parametrize("changes", [{}, {"ahead": 9}, {"threads": 3, "ahead": 5}], ids=str)
def test_pairs_are_counted_as_steps_use_them_however_far_is_read_ahead(store: Store, changes):
    made = loader(store, config=LoaderConfig(batch=3, samples_per_open=3, **changes))
    made.batch(0)
    assert made.pairs.drawn == 0, "a look at a batch uses none of it"
    found = counts_by_step(made, 0, 7)
    assert found == alone(store, 7, each=3)
    assert found[0][0] == 3
    assert found[-1][2] > 0


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_counts_of_pairs_go_on_after_a_resume_and_nothing_is_told_twice(store: Store, stop: int):
    config = LoaderConfig(batch=3, samples_per_open=3)
    whole = loader(store, config=config)
    counts, told = counts_by_step(whole, 0, 7), whole.notes()
    before, after = loader(store, config=config), loader(store, config=config)
    first = counts_by_step(before, 0, stop)
    after.pairs.restore([before.pairs.facts()], Ranks())
    assert first + counts_by_step(after, stop, 7) == counts
    twice = [note for made in (before, after) for note in made.notes()]
    assert [note for note in twice if "unpaired" in note] == [note for note in told if "unpaired" in note] != []
    assert after.speed()["pairs_refused"] == whole.speed()["pairs_refused"]


def damaged(store: Store, folder: Path, key: str) -> Store:
    there = folder / "store"
    copytree(store.path, there)
    broken = Store.open(there)
    path = file_path(there, "volumes", broken.record(key).key)
    path.write_bytes(path.read_bytes()[:100])
    return broken


def test_a_partner_that_cannot_be_read_is_put_aside_and_not_the_scan_it_belongs_to(store: Store, tmp_path: Path):
    bad = key_of(store, "T2w", who="a")
    broken = damaged(store, tmp_path, bad)
    config = LoaderConfig(batch=2, samples_per_open=2, ahead=2)
    keys = [key_of(store, contrast, who="a") for contrast in ("T1w", "T2w", "FLAIR")]
    made = Loader(broken, keys, SPEC, views=VIEWS, config=config, seed=7)
    batches = list(made.batches(0, 8))
    assert made.quarantined == {bad}
    notes = [note for note in made.notes() if "quarantined" in note]
    assert [note["quarantined"] for note in notes] == [bad[:16]]
    second = VIEWS.pair.index("T2w")
    assert not any((batch.targets["contrast"] == second).any() for batch in batches)
    # A run that resumes with that scan put aside, or another number of threads, gives the same bits.
    resumed = Loader(broken, keys, SPEC, views=VIEWS, config=replace(config, threads=3), seed=7)
    resumed.quarantine([bad[:16]])
    assert [content(batch) for batch in resumed.batches(4, 8)] == [content(batch) for batch in batches[4:]]


def test_a_partner_with_voxels_that_are_no_numbers_is_put_aside(store: Store, monkeypatch: pytest.MonkeyPatch):
    bad, read = key_of(store, "T2w", who="a"), Store.crop

    def crop(self, key, start_ijk, size_ijk):
        box = read(self, key, start_ijk, size_ijk)
        return np.full_like(box, np.nan) if key == bad else box

    monkeypatch.setattr(Store, "crop", crop)
    made = Loader(
        store,
        [key_of(store, "T1w", who="a"), bad],
        SPEC,
        views=VIEWS,
        config=LoaderConfig(batch=1, samples_per_open=1),
        seed=7,
    )
    batches = [made.batch(step) for step in range(4)]
    assert made.quarantined == {bad}
    assert all(batch.targets["copy"].all() and batch.views["other"].isfinite().all() for batch in batches)


def test_scans_of_one_contrast_cannot_be_trained_on_as_pairs(tmp_path: Path):
    alone = filled(tmp_path / "store", [scan("a"), scan("b")])
    with pytest.raises(StoreError, match="none of the 2 training scans has a partner"):
        loader(alone, batch=2)


def test_a_pair_is_one_view_of_each_scan():
    with pytest.raises(ValueError, match="one view of each"):
        ViewsConfig(global_=ViewKind(count=2), pair=PairConfig())


def test_estimates_know_of_the_second_view():
    assert view_bytes(VIEWS) == 2 * 4 * 4**3
    blank = blank_batch(VIEWS, 2)
    assert blank.views["other"].shape == (2, 1, 1, 4, 4, 4)
    assert blank.targets["contrast"].shape == (2, 2)


def test_the_phantoms_of_this_file_are_as_large_as_they_say(store: Store):
    assert {record.shape_ijk for record in store} == {SHAPE}
