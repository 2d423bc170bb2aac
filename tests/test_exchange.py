from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voxelstem.annotations import lay_mask, read_masks
from voxelstem.errors import ConfigError, StoreError
from voxelstem.exchange import Exported, Found, case, export_b2nd, export_nifti, export_nnunet, find
from voxelstem.sources import b2nd, iterate, nifti
from voxelstem.store import Store, Writer
from voxelstem.store.encoding import encode_study
from voxelstem.store.subjects import pseudonym
from voxelstem.study import LabelMap, Provenance, Study, Volume

SHAPE = (20, 17, 9)
PEOPLE = [pseudonym(f"person {number}", bytes(32)) for number in range(12)]
CLASSES = {1: "liver", 2: "spleen"}


def volume(seed: int, modality: str = "CT", labelled: bool = True, classes: dict[int, str] | None = None) -> Volume:
    rng = np.random.default_rng(seed)
    array = np.full((1, *SHAPE), -1000.0, np.float32)
    array[0, 4:16, 4:13, 2:7] = rng.integers(0, 80, (12, 9, 5))
    if modality == "MR":
        array = rng.gamma(2, 100, (1, *SHAPE)).astype(np.float32)
    names = classes or CLASSES
    labels = rng.choice([0, *names], SHAPE).astype(np.int16)
    turned = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turned * [1.0, 1.5, 2.0]
    affine[:3, 3] = [seed, -20.5, 100.25]
    return Volume(
        array=array,
        affine_ras=affine,
        modality=modality,
        provenance=Provenance(source_format="phantom", sha256="0" * 64, orientation="RAS"),
        labels=LabelMap(array=labels, classes=names) if labelled else None,
    )


def filled(path: Path, *volumes: Volume) -> Store:
    """A store whose volumes go in pairs to the people in order."""
    Store.create(path)
    with Writer(path) as writer:
        for number, one in enumerate(volumes):
            writer.add(encode_study(Study(subject=PEOPLE[number // 2], volumes=(one,))))
    return Store.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """For reading only."""
    return filled(tmp_path_factory.mktemp("exchange") / "store", *(volume(seed) for seed in range(24)))


def names(labels: LabelMap | None) -> np.ndarray:
    assert labels is not None
    return np.array(["", *(labels.classes.get(value, "") for value in range(1, int(labels.array.max()) + 1))])[
        labels.array
    ]


def check_same(store: Store, found: Found) -> None:
    """Everything of the store comes back: voxels, places, named labels, and who belongs to whom."""
    originals = {store.volume(record.key).array.tobytes(): record for record in store}
    people: dict[str, str] = {}
    for source in found.sources:
        study = source.read()
        mask = found.masks.take(source.relative)
        if mask is not None:
            study = lay_mask(study, mask, found.masks.names(source.relative))
        (one,) = study.volumes
        record = originals.pop(one.array.tobytes())
        original = store.volume(record.key)
        np.testing.assert_allclose(one.affine_ras, original.affine_ras, atol=1e-4)
        assert one.modality == original.modality
        assert people.setdefault(study.subject, record.subject) == record.subject
        assert (one.labels is None) == (original.labels is None)
        if original.labels is not None:
            np.testing.assert_array_equal(names(one.labels), names(original.labels))
    assert not originals
    assert len(people) == len(set(people.values()))
    assert not found.masks.unused()


def out_and_in(store: Store, out: Path, export: Callable[[Store, Path], Exported]) -> Found:
    assert export(store, out) == Exported(kept=len(store), left_out=0)
    found = find(out)
    assert found is not None
    return found


def test_an_nnunet_dataset_comes_back_as_it_was(store: Store, tmp_path: Path) -> None:
    check_same(store, out_and_in(store, tmp_path / "Dataset001_Test", export_nnunet))


def test_nnunet_s_b2nd_folder_comes_back_as_it_was(store: Store, tmp_path: Path) -> None:
    check_same(store, out_and_in(store, tmp_path / "out", export_b2nd))


def test_nnssl_s_b2nd_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", *(volume(seed, "MR", labelled=False) for seed in range(5)))
    out = tmp_path / "out"
    check_same(store, out_and_in(store, out, lambda store, out: export_b2nd(store, out, layout="nnssl")))


def test_plain_nifti_comes_back_through_the_usual_door(tmp_path: Path) -> None:
    store = filled(
        tmp_path / "store",
        volume(0),
        volume(1, classes={7: "spleen", 3: "kidney"}),
        volume(2, labelled=False),
        volume(3, "MR", labelled=False),
    )
    out = tmp_path / "out"
    assert export_nifti(store, out) == Exported(kept=4, left_out=0)
    masks = read_masks(out / "labels", [out / "scans"])
    check_same(store, Found(sources=tuple(iterate(out / "scans")), masks=masks))


def test_who_was_looked_for_what_comes_back_too(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", volume(0), volume(1, classes={7: "spleen", 3: "kidney"}))
    export_nifti(store, tmp_path / "out")
    masks = read_masks(tmp_path / "out" / "labels")
    looked = {frozenset(masks.names(source.relative).values()) for source in iterate(tmp_path / "out" / "scans")}
    assert looked == {frozenset({"liver", "spleen"}), frozenset({"spleen", "kidney"})}


def test_held_out_subjects_never_become_nnunet_s_training_cases(store: Store, tmp_path: Path) -> None:
    export_nnunet(store, tmp_path / "out")
    sides = {
        split: {case(record) for record in store if record.split == split} for split in ("train", "validation", "test")
    }
    assert all(sides.values()), "the people above must fall into all three splits"
    for half, parts in (("Tr", ("train", "validation")), ("Ts", ("test",))):
        wanted = set().union(*(sides[split] for split in parts))
        assert {path.name for path in (tmp_path / "out" / f"images{half}").iterdir()} == {
            f"{name}_0000.nii.gz" for name in wanted
        }
        assert {path.name for path in (tmp_path / "out" / f"labels{half}").iterdir()} == {
            f"{name}.nii.gz" for name in wanted
        }
    (fold,) = json.loads((tmp_path / "out" / "splits_final.json").read_text())
    assert {side: set(fold[side]) for side in fold} == {"train": sides["train"], "val": sides["validation"]}
    described = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert described == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "numTraining": len(sides["train"]) + len(sides["validation"]),
        "file_ending": ".nii.gz",
    }


def test_nnunet_gets_only_volumes_in_which_every_class_was_looked_for(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", volume(0), volume(1, classes={1: "liver"}), volume(2, labelled=False), volume(3))
    assert export_nnunet(store, tmp_path / "out") == Exported(kept=2, left_out=2)


def test_nnunet_does_not_get_ct_and_mr_together(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", volume(0), volume(1, "MR"))
    with pytest.raises(ConfigError, match="CT and MR"):
        export_nnunet(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_store_without_labels_is_no_dataset_for_nnunet(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", volume(0, labelled=False))
    with pytest.raises(ConfigError, match="0 have voxel labels"):
        export_nnunet(store, tmp_path / "out")


def test_several_channels_are_left_out_and_counted(tmp_path: Path) -> None:
    two = replace(volume(0, "MR"), array=np.random.default_rng(0).random((2, *SHAPE)).astype(np.float32))
    store = filled(tmp_path / "store", two, volume(1))
    assert export_nifti(store, tmp_path / "out") == Exported(kept=1, left_out=1)


def test_nnssl_finds_every_image_below_its_subject(store: Store, tmp_path: Path) -> None:
    for export, ending, root in (
        (export_nifti, ".nii.gz", "$nnssl_raw"),
        (lambda store, out: export_b2nd(store, out, layout="nnssl"), ".b2nd", "$nnssl_preprocessed"),
    ):
        out = tmp_path / f"collection{ending}"
        export(store, out)
        said = json.loads((out / "pretrain_data.json").read_text())
        people = said["datasets"]["0"]["subjects"]
        assert set(people) == {f"sub-{record.subject}" for record in store}
        images = [
            (person, image)
            for person, known in people.items()
            for session in known["sessions"].values()
            for image in session["images"]
        ]
        assert len(images) == len(store)
        for person, image in images:
            start, folder, *place = image["image_path"].split("/")
            assert (start, folder) == (root, out.name)
            assert (out / "/".join(place)).is_file()
            assert person in image["image_path"]
        if ending == ".b2nd":
            # nnssl looks at <collection>/<dataset>/<subject>/<session>/<image>, whatever the path says.
            assert all(image["image_path"].split("/")[2:4] == [out.name, "0"] for _, image in images)


def test_what_belongs_into_the_pickle_says_where_classes_are(store: Store, tmp_path: Path) -> None:
    export_b2nd(store, tmp_path / "out")
    record = next(iter(store))
    said = json.loads((tmp_path / "out" / "properties" / f"{case(record)}.json").read_text())
    labels = store.label_crop(record.key, (0, 0, 0), SHAPE)
    assert said["spacing"] == pytest.approx([2.0, 1.5, 1.0])
    assert said["shape_after_cropping_and_before_resampling"] == [9, 17, 20]
    for value in (1, 2):
        places = np.array(said["class_locations"][str(value)])
        assert (places[:, 0] == 0).all()
        assert len(places) == (labels == value).sum()
        assert (labels.transpose(2, 1, 0)[tuple(places[:, 1:].T)] == value).all()
    direction = np.array(said["sitk_stuff"]["direction"]).reshape(3, 3)
    np.testing.assert_allclose(direction, [[-0.8, 0.6, 0], [-0.6, -0.8, 0], [0, 0, 1]], atol=1e-9)


def test_no_pickle_is_written(store: Store, tmp_path: Path) -> None:
    export_b2nd(store, tmp_path / "out")
    assert {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()} == {".b2nd", ".json"}


def test_names_are_pseudonyms_and_digests(store: Store, tmp_path: Path) -> None:
    for export in (export_nifti, export_nnunet, export_b2nd):
        out = tmp_path / export.__name__
        export(store, out)
        for path in out.rglob("*.nii.gz"):
            name = path.relative_to(out).as_posix()
            assert any(record.subject in name and record.key[:24] in name for record in store)


def test_the_same_store_gives_the_same_bytes_and_an_export_can_be_run_again(store: Store, tmp_path: Path) -> None:
    for name in ("once", "again"):
        export_nnunet(store, tmp_path / name)
    export_nnunet(store, tmp_path / "again")
    once, again = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in ("once", "again")
    )
    assert once == again


def test_a_folder_with_something_else_is_left_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for export in (export_nifti, export_nnunet, export_b2nd):
        with pytest.raises(ConfigError, match="other files"):
            export(store, tmp_path / "mine")
        with pytest.raises(ConfigError, match="other files"):
            export(store, tmp_path / "mine" / "thesis.txt")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


@pytest.mark.parametrize("change", ["volumes", "classes", "format", "damage"])
def test_another_export_is_not_mixed_with_an_earlier_one(tmp_path: Path, change: str) -> None:
    out, volumes = tmp_path / "out", [volume(seed) for seed in range(3)]
    export_nnunet(filled(tmp_path / "one", *volumes), out)
    if change == "volumes":
        volumes.pop()
    if change == "classes":
        # A new first name in the alphabet: what was 1 becomes 2.
        volumes = [volume(seed, classes={**CLASSES, 3: "aorta"}) for seed in range(3)]
    if change == "damage":
        (out / "export.json").write_text("{")
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    with pytest.raises(ConfigError, match="other volumes" if change != "damage" else "JSON"):
        (export_b2nd if change == "format" else export_nnunet)(filled(tmp_path / "two", *volumes), out)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_an_export_that_was_killed_is_completed_by_the_same_command(store: Store, tmp_path: Path) -> None:
    export_nnunet(store, tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for path in list(whole)[::2]:
        if path.name != "export.json":
            path.unlink()
    export_nnunet(store, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == whole


def test_a_folder_that_cannot_be_written_is_said_so(store: Store) -> None:
    for export in (export_nifti, export_nnunet, export_b2nd):
        with pytest.raises(StoreError, match="cannot be written"):
            export(store, Path("/proc/nowhere"))


def make_raw(root: Path, ending: str = ".nii.gz", **described: Any) -> Path:
    """Somebody's dataset: two cases, the first of two channels."""
    one = volume(0)
    for name in (
        "imagesTr/BRATS_001_0000",
        "imagesTr/BRATS_001_0001",
        "imagesTr/sub-7_ses-2_0000",
        "labelsTr/BRATS_001",
    ):
        array = one.labels.array if name.startswith("labels") and one.labels else one.array[0]
        nifti.write(root / f"{name}.nii.gz", array, one.affine_ras)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "file_ending": ending,
    }
    (root / "dataset.json").write_text(json.dumps(content | described))
    return root


def test_the_channels_of_a_foreign_case_are_scans_of_one_subject_and_share_its_mask(tmp_path: Path) -> None:
    found = find(make_raw(tmp_path / "Dataset007_X"))
    assert found is not None
    assert [(source.relative, source.subject) for source in found.sources] == [
        ("imagesTr/BRATS_001_0000.nii.gz", "BRATS_001"),
        ("imagesTr/BRATS_001_0001.nii.gz", "BRATS_001"),
        ("imagesTr/sub-7_ses-2_0000.nii.gz", "sub-7"),
    ]
    masks = [found.masks.take(source.relative) for source in found.sources]
    assert masks[0] == masks[1] == (tmp_path / "Dataset007_X" / "labelsTr" / "BRATS_001.nii.gz").resolve()
    assert masks[2] is None
    assert found.masks.names("imagesTr/BRATS_001_0000.nii.gz") == {1: "liver", 2: "spleen"}


@pytest.mark.parametrize(
    ("described", "word"),
    [
        ({"labels": {"background": 0, "tumour": [1, 2]}}, "whole number"),
        ({"labels": {"background": 0, "tumour": -1}}, "whole number"),
        ({"labels": ["tumour"]}, "whole number"),
        ({"ending": ".png"}, "file_ending"),
        ({"ending": "/../../*"}, "file_ending"),
    ],
)
def test_a_description_that_cannot_be_followed_is_refused(tmp_path: Path, described: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        find(make_raw(tmp_path, **described))


@pytest.mark.parametrize("text", ["", "[1]", "[" * 100_000, "\udcff"])
def test_a_description_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "dataset.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match="JSON"):
        find(tmp_path)


def test_other_folders_are_nobody_s_layout(tmp_path: Path, store: Store) -> None:
    assert find(tmp_path / "absent") is None
    (tmp_path / "plain").mkdir()
    assert find(tmp_path / "plain") is None
    with pytest.raises(ConfigError, match="store already"):
        find(store.path)


def put_b2nd(path: Path) -> None:
    one = volume(0, "MR", labelled=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b2nd.pack(one.array, one.affine_ras, one.modality))


def test_one_b2nd_file_hides_no_other_scan(tmp_path: Path) -> None:
    one = volume(0)
    nifti.write(tmp_path / "src" / "case1" / "ct.nii.gz", one.array[0], one.affine_ras)
    put_b2nd(tmp_path / "src" / "case2" / "mr.b2nd")
    assert find(tmp_path / "src") is None
    assert {source.kind for source in iterate(tmp_path / "src")} == {"nifti", "b2nd"}


@pytest.mark.parametrize("mark", ["dataset.json", "pretrain_data.json", "pretrain_data__onemmiso.json", "export.json"])
def test_a_b2nd_folder_is_known_by_what_lies_in_it_or_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    put_b2nd(tmp_path / "set" / "plans" / "sub-1" / "mr.b2nd")
    assert find(tmp_path / "set") is None
    (tmp_path / "set" / mark).write_text("{}")
    monkeypatch.chdir(tmp_path / "set" / "plans")
    for folder in (tmp_path / "set", tmp_path / "set" / "plans", Path(".")):
        found = find(folder)
        assert found is not None
        assert [(source.kind, source.subject) for source in found.sources] == [("b2nd", "sub-1")]
    assert find(tmp_path) is None
    assert find(tmp_path / "set" / "plans" / "sub-1") is None
