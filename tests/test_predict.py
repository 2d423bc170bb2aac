from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tests import clinic
from tests.fewlabelled import make_store, make_weights

from voxelstem import adapt, evaluate
from voxelstem.adapted import read_run
from voxelstem.cli import run as command
from voxelstem.errors import ConfigError, IngestError
from voxelstem.features import look
from voxelstem.findings import of_json, to_json
from voxelstem.model import load
from voxelstem.predict import PredictConfig, Predictor, at_most, run
from voxelstem.regions import of_box
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.study import Study
from voxelstem.tasks.segment import Segment, compare


@pytest.fixture(autouse=True)
def one_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        make_store(folder, count=24)
        make_weights(folder)
        (folder / "liver.json").write_text(json.dumps({"classes": {"1": "liver"}}))
        for task, labels, settings in (
            ("segment", "labels.json", {"see.beside": "intensity"}),
            ("classify", "contrast.csv", {"title": "contrast"}),
            ("detect", "liver.json", {"see.beside": "intensity", "head.background": 2000}),
        ):
            adapt.run(
                weights=folder / "weights",
                store=folder / "store",
                labels=folder / labels,
                task=task,
                mode="probe",
                out=folder / task,
                settings=settings,
            )
    return folder


def stranger(seed: int = 501) -> Study:
    return phantom(PhantomConfig(seed=seed, spacing_mm=(7.0, 7.0, 8.0), phase="portal" if seed % 2 else "none"))


def as_file(study: Study, folder: Path) -> Path:
    path = folder / "Jane_Roe" / "scan.nii.gz"
    path.parent.mkdir(parents=True)
    volume = study.volumes[0]
    nib.Nifti1Image(volume.array[0].astype(np.int16), volume.affine_ras).to_filename(path)
    return path


def test_organs_are_marked_where_they_are_and_measured_in_the_patient(place: Path, tmp_path: Path) -> None:
    study = stranger()
    found = run([as_file(study, tmp_path)], weights=place / "segment", out=tmp_path / "found")
    assert not found.refusals
    (one,) = found.findings
    volume, head = study.volumes[0], read_run(place / "segment").head
    assert volume.labels is not None
    (masks,) = [path for path in found.files if path.name.endswith(".nii.gz")]
    image = nib.load(masks)
    np.testing.assert_allclose(image.affine, volume.affine_ras, atol=1e-4)
    array = np.asarray(image.dataobj)
    dice = compare(array, volume.labels, head.classes)
    assert np.mean(list(dice.values())) > 0.3
    whole = {finding.name: finding for finding in one.findings if finding.part == 0}
    voxel_mm3 = abs(np.linalg.det(volume.affine_ras[:3, :3]))
    for number, name in enumerate(head.classes, start=1):
        place_ = whole[name].place
        assert place_ is not None
        assert place_.volume_mm3 == pytest.approx((array == number).sum() * voxel_mm3)
        size = whole[name].quantity
        assert size is not None
        assert size.low is not None
        assert size.high is not None
        assert size.unit == "mL"
        assert size.value == pytest.approx(place_.volume_mm3 / 1000)
        assert size.low < size.value < size.high
        middle = np.argwhere(array == number).mean(axis=0)
        np.testing.assert_allclose(
            place_.centre_ras_mm, volume.affine_ras[:3, :3] @ middle + volume.affine_ras[:3, 3], atol=1e-3
        )
    (told,) = [path for path in found.files if path.name.endswith(".json") and "findings" in path.read_text()[:60]]
    assert of_json(told.read_text()) == one


def test_marks_of_few_rows_at_a_time_are_those_of_the_head_at_once(place: Path) -> None:
    volume, adapted = stranger().volumes[0], read_run(place / "segment")
    said = look(load(adapted.weights), volume, tokens=True, see=adapted.config.see)
    whole = adapted.task.predict(adapted.head, said, volume.affine_ras, volume.shape_ijk)  # pyright: ignore[reportAttributeAccessIssue]
    marks = adapted.task.mark(adapted.head, said, volume.affine_ras, volume.shape_ijk)  # pyright: ignore[reportAttributeAccessIssue]
    assert (marks != whole.array).mean() < 1e-3


def test_a_class_comes_with_how_sure_it_is_and_whether_the_scan_is_strange(place: Path) -> None:
    predictor = Predictor(place / "classify")
    right = 0
    for seed in range(501, 507):
        (finding,) = predictor.predict(stranger(seed)).findings.findings
        assert finding.name == "contrast"
        assert finding.certainty is not None
        assert finding.certainty.calibration == "temperature"
        assert finding.certainty.interval == "venn_abers"
        assert finding.certainty.conformal is not None
        assert finding.novelty is not None
        right += finding.answer == ("yes" if seed % 2 else "no")
    assert right >= 5
    (finding,) = predictor.predict(noise_of(stranger())).findings.findings
    assert finding.novelty is not None
    assert finding.novelty.flagged


def noise_of(study: Study) -> Study:
    odd = np.random.default_rng(0).normal(0, 400, study.volumes[0].array.shape).astype(np.float32)
    return replace(study, volumes=(replace(study.volumes[0], array=odd),))


def check_strange(predictor: Predictor) -> None:
    """Noise and the lowest quarter of a body are flagged, labelled scans and most new ones are not."""
    known = set(predictor.adapted.subjects)
    learned = [body for body in map(stranger, range(8)) if pseudonym(body.subject, site_key()) in known]
    assert len(learned) > 2
    (volume,) = (study := stranger()).volumes
    low = volume.array[..., : volume.shape_ijk[2] // 4].copy()
    part = replace(study, volumes=(replace(volume, array=low, labels=None),))
    sides = (learned, [stranger(seed) for seed in range(501, 513)], [noise_of(study), part])
    told = [[predictor.predict(one).findings for one in side] for side in sides]
    own, usual, odd = [[found.novelty for found in side if found.novelty is not None] for side in told]
    assert [len(side) for side in (own, usual, odd)] == [len(side) for side in sides]
    assert not any(one.flagged for one in own)
    assert sum(one.flagged for one in usual) < len(usual) / 2
    assert all(one.flagged for one in odd)
    assert min(one.score for one in odd) > np.median([one.score for one in usual])
    for found in (*told[1], *told[2]):
        assert {one.novelty for one in found.findings} <= {found.novelty}
        assert "novelty" not in {one.what for one in found.unsaid}
        assert of_json(to_json(found)) == found


def test_marks_come_with_how_strange_the_scan_is_as_every_other_finding_does(place: Path) -> None:
    check_strange(Predictor(place / "segment"))


@pytest.mark.parametrize(("task", "labels"), [("segment", "liver.json"), ("classify", "contrast.csv")])
def test_a_network_that_was_trained_knows_a_strange_scan_too(
    place: Path, tmp_path: Path, task: str, labels: str
) -> None:
    out = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / labels,
        task=task,
        mode="full",
        out=tmp_path / "run",
        settings={"full.steps": 2},
    )
    predictor = Predictor(out)
    assert predictor.adapted.assurance.inside is not None
    check_strange(predictor)
    unsaid = predictor.predict(stranger()).findings.unsaid
    assert any("scans that the network was trained on" in one.why for one in unsaid)
    card = (out / "README.md").read_text()
    assert "every fold would have to train the network anew" in card


def test_where_nothing_is_found_the_scan_is_told_to_be_strange_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(place / "segment")
    monkeypatch.setattr(Segment, "mark", lambda *_: np.zeros(stranger().volumes[0].shape_ijk, dtype=np.int16))
    found = predictor.predict(noise_of(stranger())).findings
    assert not found.findings
    assert found.novelty is not None
    assert found.novelty.flagged


@pytest.mark.parametrize("mode", ["probe", "full"])
def test_a_run_that_knows_no_scans_says_that_strangeness_is_not_known(place: Path, tmp_path: Path, mode: str) -> None:
    """So are runs that were made before tuned networks kept any."""
    out = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / "contrast.csv",
        task="classify",
        mode=mode,
        out=tmp_path / "run",
        budget=4,
        settings={"full.steps": 1} if mode == "full" else {"folds": 0},
    )
    found = Predictor(out).predict(stranger()).findings
    assert found.novelty is None
    assert [one.novelty for one in found.findings] == [None]
    (why,) = [one.why for one in found.unsaid if one.what == "novelty"]
    assert why == "not known whether the scan is strange: the run holds no labelled scans to compare with"
    assert any("strange scans are not told apart: " in one.why for one in found.unsaid)


def test_nothing_that_is_written_names_the_patient(place: Path, tmp_path: Path) -> None:
    found = run([as_file(stranger(), tmp_path)], weights=place / "segment", out=tmp_path / "found")
    for path in found.files:
        assert "Jane" not in str(path.relative_to(tmp_path / "found"))
        assert b"Jane" not in path.read_bytes()
        assert b"phantom-" not in path.read_bytes()


def test_a_dicom_series_gets_its_segmentation_and_report_back(place: Path, tmp_path: Path) -> None:
    study = stranger()
    volume = study.volumes[0]
    assert volume.labels is not None
    folder = tmp_path / "series"
    folder.mkdir()
    clinic.save(folder, clinic.series())
    config = PredictConfig(formats=("json", "seg", "sr"))
    found = run([folder], weights=place / "segment", out=tmp_path / "found", how=config)
    assert not found.refusals
    names = {written.output: written for written in found.written}
    assert set(names) == {"json", "seg", "sr"}
    assert names["sr"].dataset is not None
    assert names["sr"].dataset.VerificationFlag == "UNVERIFIED"
    for name in ("seg", "sr"):
        assert clinic.complaints(names[name].files[0]) == []


def test_a_class_and_boxes_go_back_to_a_dicom_series_without_a_complaint(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "series"
    folder.mkdir()
    clinic.save(folder, clinic.series())
    for task in ("classify", "detect"):
        config = PredictConfig(formats=("json", "sr"))
        found = run([folder], weights=place / task, out=tmp_path / task, how=config)
        assert not found.refusals
        (one,) = found.findings
        assert one.findings
        assert {finding.certainty.interval for finding in one.findings if finding.certainty} == {"venn_abers"}
        (report,) = [written for written in found.written if written.output == "sr"]
        assert clinic.complaints(report.files[0]) == []


def test_one_bad_scan_never_stops_the_others(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = as_file(stranger(), tmp_path)
    bad = tmp_path / "Jane_Roe" / "other.nii.gz"
    bad.write_bytes(b"no scan")
    code = command(
        [
            "predict",
            str(good.parent),
            "--weights",
            str(place / "classify"),
            "--out",
            str(tmp_path / "f"),
            "--format",
            "json",
            "--json",
        ]
    )
    told = json.loads(capsys.readouterr().out)
    assert code == 3
    assert told["findings"] == [1]
    assert len(told["refused"]) == 1


def test_formats_that_do_not_go_with_the_task_are_refused_before_anything_is_read(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="labels no voxels"):
        run([tmp_path / "nowhere"], weights=place / "classify", out=tmp_path, how=PredictConfig(formats=("nifti",)))
    with pytest.raises(ConfigError, match="no output 'dicomseg'"):
        PredictConfig(formats=("dicomseg",))
    config = PredictConfig(formats=("seg",))
    scan = as_file(stranger(), tmp_path)
    (refused,) = run([scan], weights=place / "segment", out=tmp_path / "f", how=config).refusals
    assert refused.code == "does-not-fit"
    assert "goes back to a DICOM series" in refused.reason
    with pytest.raises(ValueError, match="negative"):
        PredictConfig(max_ram_gib=-1)


def test_more_memory_than_allowed_is_refused_and_the_limit_is_lifted_again() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryError), at_most(1.0):
        np.ones(1 << 30, dtype=np.float64)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_scan_that_surely_needs_more_is_refused_before_the_network_sees_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = stranger()
    scan, need = as_file(study, tmp_path), 4.0 * study.volumes[0].array.size
    config = PredictConfig(max_ram_gib=64.0)
    with monkeypatch.context() as less:
        less.setattr("voxelstem.room.left_bytes", lambda: need - 1)
        less.setattr(Predictor, "predict", lambda *_, **__: pytest.fail("the network was asked"))
        (refused,) = run([scan], weights=place / "segment", out=tmp_path / "found", how=config).refusals
    assert refused.code == "out-of-memory"
    assert "64 GiB that --max-ram allows" in refused.reason
    monkeypatch.setattr("voxelstem.room.left_bytes", lambda: need)
    assert not run([scan], weights=place / "segment", out=tmp_path / "found", how=config).refusals


def test_a_machine_without_memory_is_said_and_not_taken_for_a_limit_that_nobody_set(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 10 bytes.")

    monkeypatch.setattr(Predictor, "predict", starved)
    (refused,) = run([as_file(stranger(), tmp_path)], weights=place / "segment", out=tmp_path / "found").refusals
    assert (refused.code, refused.reason) == ("out-of-memory", "it needs more than the memory there is here")


def test_one_output_that_is_refused_takes_none_of_the_others_back(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "series"
    folder.mkdir()
    clinic.save(folder, clinic.series())
    monkeypatch.setattr("voxelstem.outputs.seg.left_bytes", lambda: 0.0)
    config = PredictConfig(formats=("json", "nifti", "seg"))
    found = run([folder], weights=place / "segment", out=tmp_path / "found", how=config)
    (refused,) = found.refusals
    assert refused.code == "does-not-fit"
    assert "frames" in refused.reason
    assert [one.output for one in found.written] == ["json", "nifti"]
    assert len(found.findings) == 1
    assert sorted(found.files) == sorted(path for path in (tmp_path / "found").rglob("*") if path.is_file())


def test_another_modality_is_refused(place: Path) -> None:
    study = stranger()
    other = replace(study, volumes=(replace(study.volumes[0], modality="MR"),))
    with pytest.raises(IngestError, match="trained on CT"):
        Predictor(place / "classify").predict(other)


def test_boxes_of_a_detection_are_findings_in_millimetres(place: Path, tmp_path: Path) -> None:
    out = place / "detect"
    report = evaluate.run([out], store=place / "store", labels=place / "liver.json", out=tmp_path / "report")
    names = {score.name for score in report.scores if score.metric == "froc"}
    assert {"detect", "scratch", "intensity", "atlas"} <= names
    study = stranger()
    found = Predictor(out).predict(study).findings.findings
    assert found
    sure = [one.certainty for one in found if one.certainty is not None]
    assert len(sure) == len(found)
    assert {one.calibration for one in sure} == {"platt"}
    # The head's own order stays, though its scores are far from shares: nearly all of these boxes find nothing.
    assert [one.probability for one in sure] == sorted((one.probability for one in sure), reverse=True)
    assert sum(one.probability for one in sure) < 4
    best = max(found, key=lambda one: one.certainty.probability if one.certainty else 0.0)
    volume = study.volumes[0]
    assert volume.labels is not None
    assert best.place is not None
    assert best.place.low_ras_mm is not None
    assert best.place.high_ras_mm is not None
    number = next(value for value, name in volume.labels.classes.items() if name == "liver")
    middle = np.argwhere(volume.labels.array == number).mean(axis=0)
    centre = volume.affine_ras[:3, :3] @ middle + volume.affine_ras[:3, 3]
    told = (np.array(best.place.low_ras_mm) + np.array(best.place.high_ras_mm)) / 2
    assert np.linalg.norm(told - centre) < 60


def test_a_box_that_was_not_calibrated_has_a_score_and_no_probability(place: Path, tmp_path: Path) -> None:
    out = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / "liver.json",
        task="detect",
        mode="probe",
        out=tmp_path / "run",
        settings={"folds": 0, "head.background": 200, "head.rounds": 1},
    )
    found = Predictor(out).predict(stranger()).findings
    sure = [one.certainty for one in found.findings]
    assert sure
    assert all(one is not None and one.probability is None and one.calibration == "none" for one in sure)
    scores = [one.score for one in sure if one is not None and one.score is not None]
    assert scores == sorted(scores, reverse=True)
    assert [one.why for one in found.unsaid] == [
        "not calibrated: folds=0",
        "the scores of 'liver' are not calibrated",
    ]
    assert of_json(to_json(found)) == found


@pytest.mark.parametrize("beside", [pytest.param("intensity", marks=pytest.mark.slow), "radiomics"])
def test_a_lesion_is_asked_about_in_its_region_and_only_there(place: Path, tmp_path: Path, beside: str) -> None:
    out = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / "contrast.csv",
        task="classify",
        mode="probe",
        out=tmp_path / "liver",
        settings={"see.region": "liver", "see.beside": beside},
    )
    report = evaluate.run([out], store=place / "store", labels=place / "contrast.csv", out=tmp_path / "report")
    by_name = {score.name: score.value.estimate for score in report.scores if score.metric == "auroc"}
    assert by_name["liver"] > 0.9
    assert "radiomics" in by_name
    study = stranger()
    volume = study.volumes[0]
    assert volume.labels is not None
    number = next(value for value, name in volume.labels.classes.items() if name == "liver")
    region = volume.labels.array == number
    predictor = Predictor(out)
    (finding,) = predictor.predict(study, region=region).findings.findings
    assert finding.answer == "yes"
    with pytest.raises(ConfigError, match="looks at a region"):
        predictor.predict(study)
    mask = tmp_path / "mask.nii.gz"
    nib.Nifti1Image(region.astype(np.uint8), volume.affine_ras).to_filename(mask)
    config = PredictConfig(formats=("json",), region=mask)
    scan = as_file(study, tmp_path)
    assert not run([scan], weights=out, out=tmp_path / "f", how=config).refusals
    corners = np.argwhere(region)
    ends = [volume.affine_ras @ np.array([*corner, 1.0]) for corner in (corners.min(axis=0), corners.max(axis=0))]
    (low_r, low_a, low_s), (high_r, high_a, high_s) = (pick(ends, axis=0)[:3].tolist() for pick in (np.min, np.max))
    low, high = (low_r, low_a, low_s), (high_r, high_a, high_s)
    boxed = run([scan], weights=out, out=tmp_path / "box", how=PredictConfig(box_ras_mm=(low, high)))
    laid = of_box(volume.affine_ras, volume.shape_ijk, low_ras_mm=low, high_ras_mm=high)
    inside = predictor.predict(study, region=laid)
    assert [one.answer for one in boxed.findings[0].findings] == [one.answer for one in inside.findings.findings]
    nowhere = PredictConfig(box_ras_mm=((9e3, 9e3, 9e3), (9e3, 9e3, 9e3)))
    (refused,) = run([scan], weights=out, out=tmp_path / "far", how=nowhere).refusals
    assert "the box does not fit the scan" in refused.reason
    with pytest.raises(ValueError, match="not both"):
        PredictConfig(region=mask, box_ras_mm=(low, high))


def test_without_a_wish_a_scan_level_run_writes_json_and_a_mask_that_is_not_asked_for_is_refused(
    place: Path, tmp_path: Path
) -> None:
    scan = as_file(stranger(), tmp_path)
    found = run([scan], weights=place / "classify", out=tmp_path / "f")
    assert [written.output for written in found.written] == ["json"]
    with pytest.raises(ConfigError, match="looks at no region"):
        run([scan], weights=place / "classify", out=tmp_path / "f", how=PredictConfig(region=scan))


def test_what_the_network_saw_of_a_scan_is_told(place: Path) -> None:
    volume = stranger().volumes[0]
    (looked,) = Predictor(place / "classify").predict(stranger()).findings.looked
    assert looked.coverage == pytest.approx(load(place / "weights").embed(volume).coverage)
