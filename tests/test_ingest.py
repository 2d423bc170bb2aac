from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from voxelstem.errors import ConfigError, IngestError, StoreError
from voxelstem.ingest import ingest, ingest_studies
from voxelstem.intake import IntakeConfig
from voxelstem.sources.phantom import PhantomConfig, phantom, phantom_files
from voxelstem.store import Store
from voxelstem.store.subjects import pseudonym, site_key

SHAPE = (16, 14, 12)
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
TOKEN = "PlantedMiller1947"


def scan(path, seed=0, *, shape=SHAPE, low=-1000):
    """A body of water with some bone, in air; or noise from `low` on, which is no CT."""
    rng = np.random.default_rng(seed)
    array = rng.normal(40, 30, size=shape).astype(np.int16)
    array[shape[0] // 2, 2:6, 2:6] = 900
    array[: shape[0] // 3] = rng.normal(-1000, 10, size=array[: shape[0] // 3].shape)
    array = array if low < 0 else rng.integers(low, 1200, size=shape).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    Nifti1Image(array, AFFINE).to_filename(path)
    return array


def mask(path, *, shape=SHAPE, affine=AFFINE):
    array = np.zeros(shape, np.uint8)
    array[4:9, 4:9, 4:9] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    Nifti1Image(array, affine).to_filename(path)
    return array


def dicom(folder, *, patient, count=5, skip=None, seed=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    series, study = generate_uid(), generate_uid()
    for number in range(count):
        if number == skip:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        name = folder / f"{patient}_{number}.dcm"
        header = FileDataset(str(name), {}, file_meta=meta, preamble=b"\0" * 128)
        header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        header.SeriesInstanceUID, header.StudyInstanceUID, header.Modality = series, study, "CT"
        header.PatientID, header.PatientName = patient, f"{patient}^Anna"
        header.StudyDescription = header.InstitutionName = header.ReferringPhysicianName = patient
        header.ImageOrientationPatient, header.PixelSpacing = [1, 0, 0, 0, 1, 0], [2, 2]
        header.ImagePositionPatient = [0, 0, 3 * number]
        header.Rows, header.Columns, header.SamplesPerPixel = 12, 10, 1
        header.PhotometricInterpretation = "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 1
        header.RescaleSlope, header.RescaleIntercept = 1, -1024
        header.PixelData = rng.integers(0, 2000, size=(12, 10)).astype(np.int16).tobytes()
        header.save_as(name, enforce_file_format=True)


@contextmanager
def quiet(title, total):
    def advance(amount=1, note=""):
        pass

    yield advance


def take(*sources, store, **rest):
    return ingest(sources, store, show=quiet, **rest)


def dump(root):
    connection = sqlite3.connect(root / "catalogue.sqlite")
    connection.row_factory = sqlite3.Row
    rows = [
        [(name, row[name]) for name in row.keys() if name != "ingested"]  # noqa: SIM118 - a Row is no dict
        for table in ("meta", "volumes", "refusals", "sources")
        for row in connection.execute(f"SELECT * FROM {table} ORDER BY 1")
    ]
    connection.close()
    return rows


def content(root):
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.b2nd")}
    return files, dump(root)


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "src", tmp_path / "store"


def test_scans_get_in_with_their_values_place_subject_and_split(paths):
    src, root = paths
    array = scan(src / "sub-1/ct.nii.gz")
    scan(src / "sub-1/later.nii.gz", seed=1)
    scan(src / "sub-2/ct.nii.gz", seed=2)
    report = take(src, store=root)
    assert (report.kept, report.refused, report.skipped, report.subjects) == (3, 0, 0, 2)
    store = Store.open(root)
    assert set(store.subjects()) == {pseudonym(name, site_key()) for name in ("sub-1", "sub-2")}
    assert any(np.array_equal(store.volume(r.key).array[0], array[::-1, ::-1]) for r in store)
    homes = {record.subject: {r.split for r in store if r.subject == record.subject} for record in store}
    assert all(len(splits) == 1 for splits in homes.values())


def test_one_bad_scan_stops_nothing_and_the_ledger_says_why(paths):
    src, root = paths
    scan(src / "good/ct.nii.gz")
    (src / "cut.nii.gz").write_bytes((src / "good/ct.nii.gz").read_bytes()[:-100])
    scan(src / "flat.nii.gz", shape=(16, 14, 1))
    dicom(src / "gap", patient="7", skip=2)
    mask(src / "mask.nii.gz")
    report = take(src, store=root)
    assert (report.kept, report.refused) == (1, 4)
    codes = {line.relative: line.code for line in report.refusals}
    assert codes == {"cut.nii.gz": "corrupt", "flat.nii.gz": "not-3d", "gap": "slice-gaps", "mask.nii.gz": "label-map"}
    ledger = Store.open(root).refusals()
    assert sorted(line.code for line in ledger) == sorted(codes.values())
    assert all(line.reason for line in ledger)


def test_a_rerun_skips_what_is_there_and_strikes_the_line_of_what_was_mended(paths):
    src, root = paths
    scan(src / "a/ct.nii.gz")
    bad = src / "b/ct.nii.gz"
    bad.parent.mkdir()
    bad.write_bytes(b"not a scan")
    assert take(src, store=root).refused == 1
    before = content(root)
    again = take(src, store=root)
    assert (again.kept, again.skipped, again.refused) == (0, 1, 1)
    assert content(root) == before
    scan(bad, seed=5)
    mended = take(src, store=root)
    assert (mended.kept, mended.skipped, mended.refused) == (1, 1, 0)
    assert Store.open(root).refusals() == ()


def test_a_scan_whose_stored_file_was_lost_is_read_again(paths):
    src, root = paths
    scan(src / "a/ct.nii.gz")
    take(src, store=root)
    before = content(root)
    next(root.rglob("*.b2nd")).unlink()
    take(src, store=root)
    assert content(root) == before


def test_a_second_copy_of_a_subjects_scan_is_no_second_scan(paths):
    src, root = paths
    scan(src / "a/ct.nii.gz")
    scan(src / "a/copy.nii.gz")
    report = take(src, store=root)
    assert (report.kept, report.skipped, report.refused, len(Store.open(root))) == (1, 1, 0, 1)


def test_the_same_scan_of_another_subject_is_refused_as_a_duplicate(paths):
    src, root = paths
    scan(src / "a/ct.nii.gz")
    scan(src / "b/ct.nii.gz")
    report = take(src, store=root)
    assert (report.kept, report.subjects, [line.code for line in report.refusals]) == (1, 1, ["duplicate"])
    assert "sub" not in report.refusals[0].source


def test_other_modalities_than_the_wanted_one_are_refused(paths):
    src, root = paths
    scan(src / "ct.nii.gz")
    scan(src / "mr.nii.gz", low=0)
    report = take(src, store=root, config=IntakeConfig(modality="CT"))
    assert [(line.relative, line.code) for line in report.refusals] == [("mr.nii.gz", "wrong-modality")]
    assert "MR" in report.refusals[0].reason
    assert take(src, store=root.with_name("both")).kept == 2


def test_a_missing_path_or_an_empty_folder_makes_no_store(paths):
    src, root = paths
    with pytest.raises(IngestError, match="there is no file or folder 'src'"):
        take(src, store=root)
    src.mkdir()
    with pytest.raises(IngestError, match="no scan was found"):
        take(src, store=root)
    assert not root.exists()


def test_masks_are_laid_on_their_scans_and_strange_ones_get_a_line(paths):
    src, root = paths
    labels = src.with_name("labels")
    for number, name in enumerate(["fits", "moved", "unnamed", "bare"]):
        scan(src / name / "ct.nii.gz", seed=number)
    dicom(src / "series", patient="9")
    array = mask(labels / "fits/ct.nii.gz")
    mask(labels / "moved/ct.nii.gz", affine=AFFINE + np.eye(4)[:, [0]] @ [[0, 0, 0, 1]])
    two = mask(labels / "unnamed/ct.nii.gz") * 3
    Nifti1Image(two, AFFINE).to_filename(labels / "unnamed/ct.nii.gz")
    mask(labels / "nobody/ct.nii.gz")
    series = np.zeros((10, 12, 5), np.uint8)
    series[2:5, 2:5, 1:3] = 1
    Nifti1Image(series, np.diag([-2.0, -2.0, 3.0, 1.0])).to_filename(labels / "series.nii.gz")
    (labels / "labels.json").write_text('{"classes": {"1": "liver"}}')
    report = take(src, store=root, labels=labels)
    codes = {(line.relative, line.code) for line in report.refusals}
    assert codes == {
        ("moved/ct.nii.gz", "label-grid"),
        ("unnamed/ct.nii.gz", "label-values"),
        ("nobody/ct.nii.gz", "label-without-scan"),
    }
    assert report.kept == 5, "a scan whose mask is refused is kept without it"
    store = Store.open(root)
    labelled = [record for record in store if record.has_labels]
    assert [dict(record.classes) for record in labelled] == [{1: "liver"}] * 2
    (fits,) = [record for record in labelled if record.shape_ijk == SHAPE]
    np.testing.assert_array_equal(store.labels(fits.key).array, array[::-1, ::-1])
    again = take(src, store=root, labels=labels)
    assert (again.kept, again.skipped, again.refused) == (0, 5, 3), "scans with a bad mask are tried again"
    mask(labels / "moved/ct.nii.gz")
    mask(labels / "unnamed/ct.nii.gz")
    mended = take(src, store=root, labels=labels)
    assert (mended.kept, mended.refused) == (2, 1)
    assert sum(record.has_labels for record in Store.open(root)) == 4
    assert [line.code for line in Store.open(root).refusals()] == ["label-without-scan"]


def test_a_partly_annotated_scan_keeps_only_the_classes_that_were_looked_for(paths):
    src, root = paths
    labels = src.with_name("labels")
    for number, name in enumerate("ab"):
        scan(src / name / "ct.nii.gz", seed=number)
        mask(labels / name / "ct.nii.gz")
    content = {"classes": {"1": "lesion", "2": "liver"}}
    (labels / "labels.json").write_text(json.dumps(content))
    assert take(src, store=root, labels=labels).kept == 2
    (labels / "labels.json").write_text(json.dumps(content | {"annotated": {"b": ["lesion"]}}))
    again = take(src, store=root, labels=labels)
    assert (again.kept, again.skipped, again.refused) == (1, 1, 0), "what was said of one scan has changed"
    assert {pseudonym("a", site_key()): {1: "lesion", 2: "liver"}, pseudonym("b", site_key()): {1: "lesion"}} == {
        record.subject: dict(record.classes) for record in Store.open(root)
    }
    (labels / "labels.json").write_text(json.dumps(content | {"annotated": {"b": ["liver"]}}))
    assert [line.code for line in take(src, store=root, labels=labels).refusals] == ["label-values"]


def test_masks_that_come_later_are_added(paths):
    src, root = paths
    scan(src / "a/ct.nii.gz")
    take(src, store=root)
    labels = src.with_name("labels")
    mask(labels / "a/ct.nii.gz")
    assert take(src, store=root, labels=labels).kept == 1
    (record,) = Store.open(root)
    assert record.classes == {1: "1"}
    assert take(src, store=root).refused == 0
    assert next(iter(Store.open(root))).has_labels


def test_reports_are_found_by_scan_and_by_subject_and_may_come_later(paths):
    src, root = paths
    scan(src / "a/ct.nii.gz")
    scan(src / "b/ct.nii.gz", seed=1)
    take(src, store=root)
    reports = src.with_name("reports.jsonl")
    rows = [
        {"scan": "a/ct.nii.gz", "report": "clear"},
        {"subject": "b", "report": "cyst"},
        {"subject": "c", "report": ""},
    ]
    reports.write_text("\n".join(json.dumps(row) for row in rows))
    report = take(src, store=root, reports=reports)
    assert (report.skipped, report.reports_unused, report.reports_empty) == (2, 0, 1)
    assert {record.report.text for record in Store.open(root)} == {"clear", "cyst"}


def test_phantoms_as_files_make_the_journey(paths):
    src, root = paths
    files = phantom_files(src, [PhantomConfig(seed=seed, spacing_mm=(9.0, 9.0, 9.0)) for seed in range(2)])
    report = take(files.scans, store=root, labels=files.labels, reports=files.reports)
    assert (report.kept, report.refused, report.subjects) == (2, 0, 2)
    wanted = {
        pseudonym(s.subject, site_key()): s
        for s in (phantom(PhantomConfig(seed=n, spacing_mm=(9.0, 9.0, 9.0))) for n in range(2))
    }
    store = Store.open(root)
    for record in store:
        study = wanted[record.subject]
        volume = store.volume(record.key)
        np.testing.assert_array_equal(volume.array, study.volumes[0].array)
        np.testing.assert_array_equal(volume.labels.array, study.volumes[0].labels.array)
        np.testing.assert_allclose(volume.affine_ras, study.volumes[0].affine_ras, atol=1e-4)
        assert record.report == study.report
        assert record.body_size_ijk < record.shape_ijk


def test_studies_in_memory_get_in_under_pseudonyms(paths):
    _, root = paths
    study = phantom(PhantomConfig(seed=3, spacing_mm=(12.0, 12.0, 12.0)))
    (key,) = ingest_studies([study], root)
    record = Store.open(root).record(key)
    assert record.subject == pseudonym(study.subject, site_key())
    assert record.labels == study.labels


def test_a_store_made_with_another_key_is_refused(paths, monkeypatch):
    src, root = paths
    scan(src / "a/ct.nii.gz")
    take(src, store=root)
    monkeypatch.setenv("VOXELSTEM_KEY", str(root.with_name("other.key")))
    with pytest.raises(StoreError, match="another site key"):
        take(src, store=root)


def test_many_workers_make_the_same_store_as_one(paths):
    src, root = paths
    for number in range(5):
        scan(src / f"{number}/ct.nii.gz", seed=number % 4)
    (src / "bad.nii.gz").write_bytes(b"bad")
    take(src, store=root)
    many = take(src, store=root.with_name("many"), workers=2)
    assert (many.kept, many.refused) == (4, 2)
    assert content(root.with_name("many")) == content(root)


def test_a_reader_that_dies_takes_only_its_own_scan_with_it(paths):
    src, root = paths
    for number, name in enumerate(["deadly", "z"]):
        scan(src / name / "ct.nii.gz", seed=number)
    # Functions travel to other processes by name, so the deadly reader must be importable there.
    code = f"""
import os, signal, sys
from voxelstem import ingest as verb
from voxelstem.intake import Intake

real = Intake.__call__

def deadly(intake, task):
    if task.source.subject == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(intake, task)

Intake.__call__ = deadly
if __name__ == "__main__":
    report = verb.ingest([{str(src)!r}], {str(root)!r}, workers=2)
    sys.stdout.write(f"{{report.kept}} {{[line.code for line in report.refusals]}}")
"""
    script = root.with_name("deadly.py")
    script.write_text(code)
    answer = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert answer.stdout == "1 ['worker-died']"


def test_workers_that_cannot_start_are_not_the_scans_fault(paths):
    src, root = paths
    scan(src / "a/ct.nii.gz")
    # A script that reaches processes by standard input cannot be read again by its workers.
    code = (
        "from voxelstem.errors import ConfigError\nfrom voxelstem.ingest import ingest\n"
        f"try:\n    ingest([{str(src)!r}], {str(root)!r}, workers=2)\n"
        "except ConfigError as error:\n    raise SystemExit(7)\n"
    )
    answer = subprocess.run([sys.executable], input=code, text=True, capture_output=True, check=False)
    assert answer.returncode == 7
    assert Store.open(root).refusals() == ()


@pytest.mark.parametrize("files", [1, 3])
def test_killed_and_run_again_it_ends_like_one_that_was_not(paths, files):
    src, root = paths
    for number in range(6):
        scan(src / f"{number}/ct.nii.gz", seed=number, shape=(48, 48, 48))
    straight = root.with_name("straight")
    take(src, store=straight)
    code = f"from voxelstem.ingest import ingest\ningest([{str(src)!r}], {str(root)!r})"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(root.rglob("*.b2nd"))) < files:
            time.sleep(0.001)
        process.kill()
    store = Store.open(root)
    for record in store:
        store.check(record.key)
    take(src, store=root)
    assert content(root) == content(straight)


def test_no_subject_or_file_name_gets_into_the_store(paths, caplog):
    src, root = paths
    scan(src / f"sub-{TOKEN}" / f"{TOKEN}.nii.gz")
    dicom(src / "pacs" / TOKEN, patient=TOKEN)
    dicom(src / "pacs" / f"{TOKEN}-gap", patient=TOKEN, skip=2)
    dicom(src / "pacs" / f"{TOKEN}-cut", patient=TOKEN)
    for path in (src / "pacs" / f"{TOKEN}-cut").iterdir():
        path.write_bytes(path.read_bytes()[:-50])
    (src / TOKEN).mkdir()
    (src / TOKEN / f"{TOKEN}.nii.gz").write_bytes(b"broken")
    (src / TOKEN / "cut.nii").write_bytes((src / f"sub-{TOKEN}" / f"{TOKEN}.nii.gz").read_bytes()[:200])
    labels = src.with_name("labels")
    mask(labels / f"sub-{TOKEN}" / f"{TOKEN}.nii.gz", shape=(3, 3, 3))
    mask(labels / TOKEN / f"{TOKEN}2.nii.gz")
    report = take(src, store=root, labels=labels)
    assert (report.kept, report.refused) == (2, 6)
    haystack = [path.read_bytes() for path in root.rglob("*") if path.is_file()]
    haystack.append("\n".join(str(path.relative_to(root)) for path in root.rglob("*")).encode())
    haystack += [
        "\n".join(f"{line.source} {line.code} {line.reason}" for line in report.refusals).encode(),
        caplog.text.encode(),
    ]
    needles = [form for name in (TOKEN, TOKEN.lower()) for form in (name.encode(), name.encode("utf-16-le"))]
    assert not [needle for needle in needles for hay in haystack if needle in hay]
    assert all(TOKEN.encode() not in zlib.compress(hay, 0) for hay in haystack)


def test_a_full_disk_ends_the_run_with_one_sentence_and_a_rerun_finishes_it(paths, monkeypatch):
    src, root = paths
    for number in range(3):
        scan(src / f"{number}/ct.nii.gz", seed=number)
    real, calls = os.replace, []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StoreError, match="the disk is full"):
            take(src, store=root)
    assert len(Store.open(root)) == 1
    assert (take(src, store=root).skipped, len(Store.open(root))) == (1, 3)


@pytest.fixture
def data():
    folder = Path(os.environ.get("VOXELSTEM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "starter").is_dir():
        pytest.skip("no folder of real scans: set VOXELSTEM_DATA")
    return folder


def test_real_scans_and_their_masks_get_in(data, paths):
    src, root = paths
    src.mkdir()
    labels = src.with_name("labels")
    labels.mkdir()
    (src / "ts.nii.gz").symlink_to(next((data / "starter").glob("ts_example_ct.nii.gz")))
    (labels / "ts.nii.gz").symlink_to(next((data / "starter").glob("ts_example_seg*.nii.gz")))
    report = take(src, data / "ct" / "crlm_1004_ge_dicom", store=root, labels=labels)
    assert (report.kept, report.refusals) == (2, ())
    store = Store.open(root)
    assert sum(record.has_labels for record in store) == 1
    assert all(record.modality == "CT" for record in store)
    assert not [note for record in store for note in record.provenance.notes if "rounding" in note]


def test_a_store_holds_scans_of_one_spacing(paths):
    src, root = paths
    scan(src / "a/ct.nii.gz")
    coarse = IntakeConfig(spacing_mm=(8.0, 8.0, 8.0), keep_native=True)
    assert take(src, store=root, config=coarse).kept == 1
    (record,) = Store.open(root)
    assert record.spacing_mm == (8.0, 8.0, 8.0)
    assert Store.open(root).native(record.key).spacing_mm == pytest.approx(tuple(np.abs(np.diag(AFFINE)[:3])))
    with pytest.raises(StoreError, match=r"at \[8.0, 8.0, 8.0\] mm"):
        take(src, store=root)
    with pytest.raises(StoreError, match="keeps every scan"):
        take(src, store=root, config=IntakeConfig(spacing_mm=(4.0, 4.0, 4.0)))
    assert take(src, store=root, config=coarse).skipped == 1


@pytest.mark.slow
def test_a_cluster_makes_the_same_store_also_when_a_node_is_killed_in_the_middle(paths):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'voxelstem[cluster]'")
    from ray.cluster_utils import Cluster as Nodes

    src, root = paths
    for number in range(24):
        scan(src / f"{number}/ct.nii.gz", seed=number, shape=(48, 48, 48))
    (src / "broken.nii.gz").write_bytes(b"broken")
    straight = root.with_name("straight")
    take(src, store=straight)
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        doomed, _ = nodes.add_node(num_cpus=1), nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()

        @contextmanager
        def kill_in_the_middle(title, total):
            def advance(amount=1, note=""):
                advance.done += amount
                if advance.done == 5:
                    nodes.remove_node(doomed, allow_graceful=False)

            advance.done = 0
            yield advance

        report = ingest([src], root, cluster=nodes.address, show=kill_in_the_middle)
    finally:
        nodes.shutdown()
    assert (report.kept, [line.code for line in report.refusals]) == (24, ["corrupt"])
    assert content(root) == content(straight)
    assert take(src, store=root).skipped == 24


def test_scans_at_one_place_in_two_folders_never_share_a_mask_or_a_report(paths):
    src, root = paths
    for folder in ("h1", "h2"):
        scan(src / folder / "a/ct.nii.gz", seed=ord(folder[1]))
    mask(src / "labels" / "a/ct.nii.gz")
    reports = src / "reports.jsonl"
    reports.write_text(json.dumps({"scan": "a/ct.nii.gz", "report": "cyst"}))
    both = (src / "h1", src / "h2")
    for wishes in ({"labels": src / "labels"}, {"reports": reports}):
        with pytest.raises(ConfigError, match="in each of several folders"):
            take(*both, store=root, **wishes)
    assert not root.exists()
    reports.write_text(json.dumps({"scan": "ct.nii.gz", "report": "cyst"}))
    report = take(*both, store=root, reports=reports)
    assert (report.kept, report.reports_unused) == (2, 1)
    assert [record.report for record in Store.open(root)] == [None, None]


def test_each_data_set_of_another_program_brings_its_own_masks(paths):
    src, root = paths
    sizes = {}
    for number, folder in enumerate(("one", "two")):
        home = src / folder
        scan(home / "imagesTr" / "case_0000.nii.gz", seed=number)
        array = np.zeros(SHAPE, np.uint8)
        array[4 : 6 + number, 4:9, 4:9] = 1
        (home / "labelsTr").mkdir()
        Nifti1Image(array, AFFINE).to_filename(home / "labelsTr" / "case.nii.gz")
        described = {"labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}}
        (home / "dataset.json").write_text(json.dumps(described))
        sizes[number] = int(array.sum())
    assert take(src / "one", src / "two", store=root).refused == 0
    store = Store.open(root)
    assert sorted(int(store.labels(record.key).array.sum()) for record in store) == sorted(sizes.values())


def bids_scan(root: Path, place: str, *, name: str | None, seed: int) -> Path:
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).gamma(2.0, 200.0, (8, 8, 8)).astype(np.int16)
    Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])).to_filename(path)
    if name is not None:
        (root / "dataset_description.json").write_text(json.dumps({"Name": name, "BIDSVersion": "1.10.0"}))
    return path


FIRST, SECOND = "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz"


@pytest.mark.parametrize("way", ["each", "both", "above"])
def test_sub_01_of_two_data_sets_is_two_people_however_they_come_in(tmp_path, way):
    for seed, name in enumerate(("A", "B")):
        bids_scan(tmp_path / "raw" / name, FIRST, name=name, seed=seed)
        bids_scan(tmp_path / "raw" / name, SECOND, name=name, seed=seed + 10)
    a, b, store = tmp_path / "raw/A", tmp_path / "raw/B", tmp_path / "store"
    for sources in {"each": [[a], [b]], "both": [[a, b]], "above": [[tmp_path / "raw"]]}[way]:
        ingest(sources, store)
    opened = Store.open(store)
    assert set(opened.subjects()) == {pseudonym(f"{name}/sub-01", site_key()) for name in "AB"}
    assert sorted(Counter(record.subject for record in opened).values()) == [2, 2]


def test_a_data_set_that_moved_or_comes_in_parts_keeps_its_people(tmp_path):
    store, root = tmp_path / "store", tmp_path / "here"
    bids_scan(root, FIRST, name="A", seed=0)
    ingest([root], store)
    root = root.rename(tmp_path / "there")
    later = bids_scan(root, SECOND, name="A", seed=1)
    derived = bids_scan(root, "derivatives/prog/sub-01/anat/sub-01_T1w.nii.gz", name=None, seed=2)
    (root / "derivatives/prog/dataset_description.json").write_text('{"Name": "prog"}')
    for number, part in enumerate((later, later.parent, root / "sub-01", derived, derived.parents[2], root)):
        ingest([part], store)
        assert Store.open(store).subjects() == (pseudonym("A/sub-01", site_key()),), number
    assert len(Store.open(store)) == 3


def test_a_data_set_under_another_name_is_refused_as_a_copy_and_makes_nobody_new(tmp_path):
    store, root = tmp_path / "store", tmp_path / "raw"
    bids_scan(root, FIRST, name="A", seed=0)
    ingest([root], store)
    bids_scan(root, FIRST, name="Z", seed=0)
    assert [refused.code for refused in ingest([root], store).refusals] == ["duplicate"]
    assert Store.open(store).subjects() == (pseudonym("A/sub-01", site_key()),)


def test_a_store_that_was_begun_without_data_sets_keeps_its_people_and_says_so(tmp_path, caplog):
    store, root = tmp_path / "store", tmp_path / "raw"
    Store.create(store)
    with sqlite3.connect(store / "catalogue.sqlite") as catalogue:
        catalogue.execute("DELETE FROM meta WHERE name = 'subjects'")
    bids_scan(root, FIRST, name="A", seed=0)
    ingest([root], store)
    bids_scan(root, SECOND, name="A", seed=1)
    assert (ingest([root], store).kept, len(Store.open(store))) == (1, 2)
    assert Store.open(store).subjects() == (pseudonym("sub-01", site_key()),)
    told = [record.getMessage() for record in caplog.records if "data sets" in record.getMessage()]
    assert len(told) == 2
    assert str(tmp_path) not in "".join(told)


def test_scans_of_no_described_data_set_are_named_as_before_and_without_a_warning(tmp_path, caplog):
    bids_scan(tmp_path / "raw", FIRST, name=None, seed=0)
    ingest([tmp_path / "raw"], tmp_path / "store")
    assert Store.open(tmp_path / "store").subjects() == (pseudonym("sub-01", site_key()),)
    assert "data sets" not in caplog.text
