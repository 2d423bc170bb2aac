from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from voxelstem.errors import ConfigError
from voxelstem.finetune.cases import companions, labelled, see
from voxelstem.model import Model
from voxelstem.store import Fractions, Record, Store, write
from voxelstem.study import Study


def of(store: Store, contrast: str) -> list[Record]:
    return [record for record in store if record.acquisition.contrast == contrast]


def test_a_scan_is_seen_as_embedding_sees_it_and_padded_to_a_patch(store: Store, unet: Model) -> None:
    record = of(store, "T1w")[0]
    seen = see(store, [record.key], unet.spec)
    raw = torch.from_numpy(store.volume(record.key).array)
    wanted = (raw - raw.mean()) / raw.std(correction=0)
    assert seen.shape_ijk == record.shape_ijk == (18, 20, 14)
    assert seen.image.shape == (1, 18, 20, 16)
    assert torch.allclose(seen.image[:, :, :, :14], wanted, atol=1e-3)
    assert seen.image[:, :, :, 14:].eq(seen.image.min()).all()


def test_contrasts_of_a_session_become_channels_each_in_its_own_intensities(store: Store, unet: Model) -> None:
    found = companions(store, list(store), ("T1w", "FLAIR"))
    assert len(found) == 6
    for keys in found.values():
        assert [store.record(key).acquisition.contrast for key in keys] == ["T1w", "FLAIR"]
        assert len({store.record(key).subject for key in keys}) == 1
    large = max(found, key=lambda key: int(store.record(key).labels["volume:ball"]))
    image = see(store, found[large], unet.spec).image
    assert image.shape[0] == 2
    inside = image[:, :, :, :14]
    assert inside.mean(dim=(1, 2, 3)).abs().max() < 1e-3
    assert torch.corrcoef(inside.flatten(1))[0, 1] > 0.2


def test_labels_come_to_the_grid_of_the_network(store: Store, unet: Model) -> None:
    record = of(store, "T1w")[2]
    labels = store.labels(record.key)
    assert labels is not None
    case = labelled(store, [record.key], unet.spec, ("ball",))
    assert case.truth is not None
    assert np.array_equal(case.truth.numpy()[:, :, :14], labels.array)
    assert not case.truth[:, :, 14:].any()
    assert sum(len(places) for places in case.marked) == int(labels.array.sum())
    coarse = labelled(store, [record.key], replace(unet.spec, spacing_mm=(2.0, 2.0, 2.0)), ("ball",))
    assert coarse.truth is not None
    assert coarse.seen.shape_ijk == (9, 10, 7)
    assert float(coarse.truth.sum()) * 8 == pytest.approx(float(labels.array.sum()), rel=0.3)


def test_a_session_without_one_of_the_contrasts_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="6 of 6 labelled sessions lack T2w"):
        companions(store, list(store), ("T1w", "T2w"))
    with pytest.raises(ConfigError, match="no labelled scan is DWI"):
        companions(store, list(store), ("DWI", "T1w"))


def test_two_scans_of_the_first_contrast_are_each_seen_themselves(tmp_path: Path, store: Store) -> None:
    one = store.record(of(store, "T1w")[0].key)
    both = Store.create(tmp_path / "store", fractions=Fractions(train=1.0, validation=0.0, test=0.0))
    for contrast, more in (("T1w", 0.0), ("T1w", 1.0), ("FLAIR", 2.0)):
        volume = store.volume(one.key)
        said = replace(volume.acquisition, contrast=contrast)
        changed = replace(volume, array=volume.array + more, acquisition=said, labels=None)
        write(both, Study(subject=one.subject, volumes=(changed,)))
    (flair,) = of(both, "FLAIR")
    found = companions(both, of(both, "T1w"), ("T1w", "FLAIR"))
    assert found == {record.key: (record.key, flair.key) for record in of(both, "T1w")}
    assert len(found) == 2


def test_contrasts_on_two_grids_are_refused_and_named_by_their_keys(
    tmp_path: Path, unet: Model, shifted: Study, plain: Study
) -> None:
    opened = Store.create(tmp_path / "store", fractions=Fractions(train=1.0, validation=0.0, test=0.0))
    write(opened, plain)
    write(opened, shifted)
    ((_, keys),) = companions(opened, list(opened), ("T1w", "FLAIR")).items()
    with pytest.raises(ConfigError, match=rf"scans {keys[0][:16]} and {keys[1][:16]} .* do not lie on one grid"):
        see(opened, keys, unet.spec)


def test_another_modality_is_refused(store: Store, unet: Model) -> None:
    with pytest.raises(ConfigError, match="trained on CT"):
        see(store, [next(iter(store)).key], replace(unet.spec, modality="CT", normalisation="window"))
