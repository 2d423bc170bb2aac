from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from voxelstem import samples, sources
from voxelstem.annotations import lay_mask, read_masks
from voxelstem.errors import VoxelstemError
from voxelstem.samples import Member
from voxelstem.sources import nifti
from voxelstem.sources.anatomy import CLASSES


def packed_nifti(array):
    with tempfile.TemporaryDirectory() as name:
        nifti.write(Path(name) / "a.nii.gz", array, np.diag([2.0, 2.0, 3.0, 1.0]))
        return (Path(name) / "a.nii.gz").read_bytes()


def build(folder, content):
    """Write an archive like the one that pip brings; returns its pins."""
    path = folder / "totalsegmentator-2.18.0.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        for name, data in content.items():
            info = tarfile.TarInfo(f"totalsegmentator-2.18.0/{name}")
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    archive = replace(samples.TOTALSEGMENTATOR, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return archive


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Pins for a small archive with a scan and a mask, lying where a user without a network puts it."""
    scan = np.random.default_rng(0).integers(-200, 300, (6, 6, 6)).astype(np.int16)
    scan[0] = -1000
    mask = np.zeros((6, 6, 6), np.uint8)
    mask[1:3], mask[3], mask[4], mask[5] = 5, 12, 14, 30  # liver, two right lobes, a vertebra
    mask[1, 1, 1] = 60  # no class of ours
    content = {"ct.nii.gz": packed_nifti(scan), "seg.nii.gz": packed_nifti(mask)}
    out = tmp_path / "samples"
    (out / "archives").mkdir(parents=True)
    archive = build(out / "archives", content)

    def member(name, target, classes=None):
        digest = hashlib.sha256(content[name]).hexdigest()
        return Member(archive=archive, source=name, sha256=digest, target=target, about="x", classes=classes)

    members = (
        member("ct.nii.gz", "scans/ts_abdomen/ct.nii.gz"),
        member("seg.nii.gz", "labels/ts_abdomen/ct.nii.gz", samples.ORGANS),
    )
    monkeypatch.setattr(samples, "TOTALSEGMENTATOR", archive)
    monkeypatch.setattr(samples, "MEMBERS", members)
    return out


def leftovers(out):
    return [path for path in out.rglob("*") if "part" in path.name]


def test_masks_come_in_the_phantom_s_classes(small):
    found = samples.fetch(small)
    mask = sources.read_labels(found.labels / "ts_abdomen" / "ct.nii.gz").array
    values = {name: value for value, name in CLASSES.items()}
    assert (mask[2] == values["liver"]).all()
    assert (mask[3:5] == values["lung_right"]).all()
    assert (mask[5] == values["spine"]).all()
    assert mask[1, 1, 1] == 0
    assert json.loads((found.labels / "labels.json").read_text())["classes"] == {
        str(value): name for value, name in CLASSES.items()
    }


def test_labels_json_says_which_classes_were_looked_for(small):
    found = samples.fetch(small)
    masks = read_masks(found.labels, [found.scans])
    (source,) = sources.iterate(found.scans)
    assert set(masks.names(source.relative).values()) == set(CLASSES.values()) - {"lesion"}
    study = lay_mask(source.read(), masks.take(source.relative), masks.names(source.relative))
    assert "lesion" not in study.volumes[0].labels.classes.values()


def test_a_labels_json_of_an_earlier_version_is_renewed_without_fetching(small):
    found = samples.fetch(small)
    new = (found.labels / "labels.json").read_text()
    (found.labels / "labels.json").write_text("{}")
    (small / "archives" / "totalsegmentator-2.18.0.tar.gz").unlink()
    samples.fetch(small)
    assert (found.labels / "labels.json").read_text() == new


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VoxelstemError, match="cannot be put into 'samples'"):
        samples.fetch(tmp_path / "file" / "samples")


def test_scan_and_mask_lie_on_one_grid_at_the_same_relative_path(small):
    found = samples.fetch(small)
    (source,) = sources.iterate(found.scans)
    assert (source.relative, source.subject) == ("ts_abdomen/ct.nii.gz", "ts_abdomen")
    mask = sources.read_labels(found.labels / source.relative)
    np.testing.assert_array_equal(mask.affine_ras, source.read().volumes[0].affine_ras)
    assert "totalsegmentator 2.18.0" in (small / "SOURCES.md").read_text()
    assert not leftovers(small)


def test_a_second_fetch_touches_nothing(small):
    samples.fetch(small)
    times = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    (small / "archives" / "totalsegmentator-2.18.0.tar.gz").unlink()  # not needed any more
    times.pop(small / "archives" / "totalsegmentator-2.18.0.tar.gz")
    times.pop(small / "archives")
    samples.fetch(small)
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize("victim", ["scans/ts_abdomen/ct.nii.gz", "labels/ts_abdomen/ct.nii.gz"])
@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_what_is_gone_or_changed_is_made_again(small, victim, damage):
    samples.fetch(small)
    good = (small / victim).read_bytes()
    if damage == "gone":
        (small / victim).unlink()
    else:
        (small / victim).write_bytes(good[:-1])
    samples.fetch(small)
    assert (small / victim).read_bytes() == good


def test_another_archive_under_the_pinned_name_is_refused(small):
    (small / "archives" / "totalsegmentator-2.18.0.tar.gz").write_bytes(b"something else")
    with pytest.raises(VoxelstemError, match="not the pinned archive"):
        samples.fetch(small)
    assert not (small / "scans").exists()
    assert not leftovers(small)


def test_a_changed_member_is_refused_and_nothing_is_left(small, monkeypatch):
    wrong = replace(samples.MEMBERS[1], sha256="0" * 64)
    monkeypatch.setattr(samples, "MEMBERS", (samples.MEMBERS[0], wrong))
    with pytest.raises(VoxelstemError, match="not the pinned file"):
        samples.fetch(small)
    assert not (small / "scans").exists()
    assert not leftovers(small)


def test_without_network_the_message_says_what_to_run_where(small, monkeypatch):
    (small / "archives" / "totalsegmentator-2.18.0.tar.gz").unlink()
    # An index that does not exist, as on a machine without a network.
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(small), "PIP_EXTRA_INDEX_URL": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(VoxelstemError) as caught:
        samples.fetch(small)
    assert "totalsegmentator-2.18.0.tar.gz could not be fetched" in caught.value.problem
    assert "pip download --no-deps --no-binary :all: --no-build-isolation totalsegmentator==2.18.0" in caught.value.hint
    assert not leftovers(small)


@pytest.mark.parametrize("tools", [("pip",), ("setuptools", "wheel")])
def test_missing_build_tools_are_named_before_pip_is_run(small, monkeypatch, tools):
    (small / "archives" / "totalsegmentator-2.18.0.tar.gz").unlink()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in tools else find(name))
    with pytest.raises(VoxelstemError, match=f"this Python lacks {', '.join(tools)}") as caught:
        samples.fetch(small)
    assert f"install {' '.join(tools)} " in caught.value.hint
    assert "pip needs setuptools and wheel" in caught.value.hint
    assert "pip download" in caught.value.hint
    assert not leftovers(small)


def test_fetching_says_how_far_it_is(small, capsys):
    samples.fetch(small)
    assert "fetch samples 3/3" in capsys.readouterr().err  # one archive, two members
    samples.fetch(small)
    assert not capsys.readouterr().err


def test_what_is_there_is_compared_and_left_alone(small):
    found = samples.fetch(small)
    (small / "archives" / "totalsegmentator-2.18.0.tar.gz").unlink()  # no copy has it
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    assert samples.there(small) == found
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before


@pytest.mark.parametrize(
    "victim", ["scans/ts_abdomen/ct.nii.gz", "labels/ts_abdomen/ct.nii.gz", "labels/labels.json", "checked.json"]
)
@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_folder_that_lacks_something_is_not_there_and_stays_so(small, victim, damage):
    samples.fetch(small)
    if damage == "gone":
        (small / victim).unlink()
    else:
        (small / victim).write_bytes((small / victim).read_bytes()[:-9])
    with pytest.raises(VoxelstemError, match="not a folder that `voxelstem samples` made: 1 of 3 files") as caught:
        samples.there(small)
    assert "voxelstem samples --out" in caught.value.hint
    assert (small / victim).exists() == (damage == "changed")


def test_a_folder_of_something_else_is_refused_and_nothing_is_made(tmp_path):
    with pytest.raises(VoxelstemError, match="'none' is not a folder that"):
        samples.there(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_pins_are_complete_and_targets_unique():
    targets = [member.target for member in samples.MEMBERS]
    assert len(set(targets)) == len(targets)
    assert all(len(bytes.fromhex(member.sha256)) == 32 for member in samples.MEMBERS)
    assert all(not Path(target).is_absolute() and ".." not in target for target in targets)
    assert {member.archive for member in samples.MEMBERS} == {samples.TOTALSEGMENTATOR, samples.PYRADIOMICS}
    assert sum(target.startswith("scans/ts_upper_abdomen/ct/") for target in targets) == 20


def test_every_organ_class_is_one_of_the_phantom_s():
    assert set(samples.ORGANS) | set(samples.TUMOUR) == set(CLASSES.values())
    merged = [value for values in samples.ORGANS.values() for value in values]
    assert len(set(merged)) == len(merged)


@pytest.mark.slow
def test_the_real_packages_give_scans_with_organs_in_place(tmp_path):
    try:
        found = samples.fetch(tmp_path)
    except VoxelstemError as problem:
        if "could not be fetched" not in problem.problem:
            raise
        pytest.skip("the source packages cannot be fetched here")
    scans = {source.subject: source.read().volumes[0] for source in sources.iterate(found.scans)}
    assert set(scans) == {"ts_abdomen", "ts_upper_abdomen", "ts_chest", "lung1", "lung2"}
    assert {volume.modality for volume in scans.values()} == {"CT"}
    assert sources.read(found.mr).volumes[0].modality == "MR"
    masks = read_masks(found.labels, [found.scans])
    for source in sources.iterate(found.scans):
        if (mask := masks.take(source.relative)) is not None:
            laid = lay_mask(source.read(), mask, masks.names(source.relative)).volumes[0].labels
            assert (list(laid.classes.values()) == ["lesion"]) == source.subject.startswith("lung")
    for subject in ("ts_abdomen", "ts_upper_abdomen", "lung1", "lung2"):
        mask = sources.read_labels(found.labels / subject / "ct.nii.gz")
        volume = scans[subject]
        assert mask.array.shape == volume.shape_ijk
        np.testing.assert_allclose(mask.affine_ras, volume.affine_ras, atol=1e-3)
        if subject.startswith("ts"):
            share = {
                name: np.argwhere(mask.array == value)[:, 0].mean() / volume.shape_ijk[0]
                for value, name in CLASSES.items()
                if (mask.array == value).any()
            }
            assert share["spleen"] < 0.4
            assert share["liver"] > 0.6
            assert 30 < volume.array[0][mask.array == 3].mean() < 130
