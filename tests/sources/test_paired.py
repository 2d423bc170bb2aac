from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from voxelstem import geometry, sources
from voxelstem.ingest import ingest, ingest_studies
from voxelstem.sources.lobes import LUNG_PLACES
from voxelstem.sources.paired import (
    FACTS,
    NAMES,
    PairedConfig,
    facts,
    paired,
    paired_files,
    paired_report,
    subject,
)
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Store

VALUE = {name: value for value, name in NAMES.items()}
EMPTY = {"effusion": "none", "lung": "none", "liver": "none"}


@pytest.fixture(scope="module")
def many():
    return [facts(PairedConfig(seed=seed)) for seed in range(120)]


def where(study, name):
    """Voxels of a class, in millimetres of the patient."""
    volume = study.volumes[0]
    return geometry.voxel_to_patient(np.argwhere(volume.labels.array == VALUE[name]).astype(float), volume.affine_ras)


def middle_mm(study):
    """Left-right middle of the patient: the spine's."""
    return where(study, "spine")[:, 0].mean()


def hu(study, name):
    volume = study.volumes[0]
    return volume.array[0][volume.labels.array == VALUE[name]]


def texts(study):
    """Whole findings: every second rewrite is brief."""
    said = study.report
    return [said.findings_text, *said.findings_rewrites[::2]]


def impressions(study):
    return [study.report.impression_text, *study.report.impression_rewrites[::2]]


@pytest.mark.parametrize("side", ["none", "left", "right", "both"])
def test_fluid_lies_on_the_said_side_at_the_back_and_as_dense_as_water(side):
    study = paired(PairedConfig(seed=3, **EMPTY | {"effusion": side}))
    middle = middle_mm(study)
    for one, sign in (("left", -1), ("right", 1)):
        fluid, lung = where(study, f"effusion_{one}"), where(study, f"lung_{one}")
        assert bool(len(fluid)) == (side in (one, "both"))
        if not len(fluid):
            continue
        assert (sign * (fluid[:, 0] - middle) > 0).all()
        assert 0.02 < len(fluid) / (len(fluid) + len(lung)) < 0.085
        assert fluid[:, 1].mean() < lung[:, 1].mean() - 20
        assert fluid[:, 2].mean() < lung[:, 2].mean() - 20
        assert -30 < np.median(hu(study, f"effusion_{one}")) < 30
    words = {"both": r"bilateral|both|left and a right", "none": r""}.get(side, side)
    about = re.compile(rf"(effusion|fluid|pleura)[^.]*({words})|({words})[^.]*(effusion|fluid|pleura)")
    assert all(about.search(text.lower()) for text in texts(study) if side != "none")
    assert study.labels["effusion"] == side


@pytest.mark.parametrize(
    ("kidneys", "spleen"), [("both", "normal"), ("left absent", "enlarged"), ("right absent", "absent")]
)
def test_a_removed_organ_has_no_voxels_and_the_others_have(kidneys, spleen):
    study = paired(PairedConfig(seed=5, kidneys=kidneys, spleen=spleen))
    assert bool(len(where(study, "kidney_left"))) == (kidneys != "left absent")
    assert bool(len(where(study, "kidney_right"))) == (kidneys != "right absent")
    assert bool(len(where(study, "spleen"))) == (spleen != "absent")
    gone = kidneys.removesuffix(" absent")
    for text in (text.lower() for text in [*texts(study), *impressions(study)]):
        if kidneys != "both":
            assert re.search(rf"{gone} (kidney|nephrectomy|absent)|kidney on the {gone}|on the {gone}", text)
        if spleen == "absent":
            assert re.search(r"spleen[^.]* (absent|removed|missing|not seen)|no spleen|splenectomy|absent spleen", text)
        if spleen == "enlarged":
            assert re.search(r"(?<!no )splenomegaly|(?<!not )enlarged", text)


def test_an_enlarged_spleen_takes_more_room_and_its_length_is_said():
    sizes = {}
    for spleen in ("normal", "enlarged"):
        study = paired(PairedConfig(seed=6, spleen=spleen))
        extent = where(study, "spleen")
        sizes[spleen] = len(extent)
        told = int(study.labels["spleen_mm"])
        assert np.ptp(extent[:, 2]) <= told + 6
    assert sizes["enlarged"] > 1.3 * sizes["normal"]


@pytest.mark.parametrize("place", LUNG_PLACES)
def test_a_nodule_lies_on_the_said_side_at_the_said_height_with_the_said_size(place):
    side, _, lobe = place.partition(" ")
    study = paired(PairedConfig(seed=8, **EMPTY | {"lung": place}, spacing_mm=(3.0, 3.0, 3.0)))
    told = facts(PairedConfig(seed=8, **EMPTY | {"lung": place})).lung[0]
    spot, lung = where(study, "lesion"), where(study, f"lung_{side}")
    assert (told.side, told.lobe) == (side, lobe)
    assert (spot[:, 0].mean() - middle_mm(study)) * (1 if side == "right" else -1) > 20
    share = (spot[:, 2].mean() - lung[:, 2].min()) / np.ptp(lung[:, 2])
    low, high = {"upper": (0.5, 1.0), "middle": (0.35, 0.75), "lower": (0.0, 0.6)}[lobe]
    assert low < share < high
    assert len(spot) * 27.0 == pytest.approx(np.pi / 6 * told.size_mm**3, rel=0.15)
    assert (np.median(hu(study, "lesion")) > 200) == (told.density == "calcified")
    for text in texts(study):
        assert re.search(rf"\b{side}\b.*\b{lobe} lobe|\b{lobe} lobe of the {side}", text.lower(), re.DOTALL)
        assert re.search(rf"{told.size_mm} mm|{told.size_mm / 10:.1f} cm", text)


@pytest.mark.parametrize("place", ["left", "right"])
def test_a_lesion_of_the_liver_lies_in_the_said_lobe_with_the_said_density(place):
    seen = set()
    for seed in range(12):
        config = PairedConfig(seed=seed, **EMPTY | {"liver": place})
        told = facts(config)
        if not told.liver or told.liver[0].density in seen:
            continue
        seen.add(told.liver[0].density)
        study = paired(config)
        gap = np.median(hu(study, "lesion")) - np.median(hu(study, "liver"))
        assert {"hypodense": -105 < gap < -50, "hyperdense": 50 < gap < 120, "calcified": gap > 200}[
            told.liver[0].density
        ]
        across = where(study, "lesion")[:, 0].mean() - where(study, "liver")[:, 0].mean()
        assert (across < 0) == (place == "left")
        assert all(re.search(rf"{place} (hepatic |liver )?lobe", text.lower()) for text in texts(study))
    assert seen == {"hypodense", "hyperdense", "calcified"}


def test_without_findings_nothing_is_there_and_the_report_says_so_or_nothing():
    config = PairedConfig(seed=2, **EMPTY, kidneys="both", spleen="normal")
    study = paired(config)
    assert not len(where(study, "lesion"))
    for text in texts(study):
        sides = re.findall(r"\b(left|right)\b", text.lower())
        assert len(sides) % 2 == 0  # "neither left nor right", "left and right kidney"
        for word in ("effusion", "nodule", "splenomegaly"):
            for sentence in re.split(r"[.\n]", text.lower()):
                if word in sentence:
                    assert re.search(r"\bno\b|none|without|absent|free|neither", sentence), sentence


def test_words_of_every_fact_agree_with_it_over_many_phantoms(many):
    counts = dict.fromkeys(("effusion", "kidney", "lung", "liver"), 0)
    for seed in range(60):
        told, report = many[seed], paired_report(PairedConfig(seed=seed))
        for text in (report.impression_text, *report.impression_rewrites):
            items = [item.lower() for item in re.split(r"[.;]\s|\.$", re.sub(r"\b\d\. ", "", text))]
            for item in filter(None, items):
                topic, side = _topic(item), set(re.findall(r"\b(left|right)\b", item))
                if topic and side:
                    counts[topic] += 1
                    expected = {"effusion": told.effusion, "kidney": told.kidneys.split()[0]}.get(topic)
                    spot = {"lung": told.lung, "liver": told.liver}.get(topic)
                    assert side == {expected if spot is None else spot[0].side}, item
    assert min(counts.values()) > 30


def _topic(item):
    for topic, words in {
        "effusion": ("effusion", "pleural"),
        "kidney": ("kidney", "nephrectomy"),
        "liver": ("liver", "hepatic"),
        "lung": ("nodule",),
    }.items():
        if any(word in item for word in words):
            return topic
    return None


def test_facts_are_balanced_enough_to_be_learned(many):
    drawn = [told.values() for told in many]
    assert set(drawn[0]) == set(FACTS)
    for name in ("contrast", "effusion", "kidneys", "spleen", "lung_side", "lung_lobe", "lung_density", "liver_lobe"):
        shares = {
            value: sum(one[name] == value for one in drawn) / len(drawn) for value in {one[name] for one in drawn}
        }
        assert min(shares.values()) > 0.05, (name, shares)
        assert max(shares.values()) < 0.75, (name, shares)


def test_the_same_config_gives_the_same_bytes_and_words():
    config = PairedConfig(seed=11, spacing_mm=(6.0, 6.0, 6.0))
    one, other = paired(config), paired(config)
    assert one.volumes[0].array.tobytes() == other.volumes[0].array.tobytes()
    assert one.report == other.report
    assert paired(replace(config, seed=12)).report != one.report


def test_settling_one_fact_leaves_the_patient_and_the_other_facts_alone():
    free = PairedConfig(seed=4)
    told = facts(free).values()
    for effusion in ("none", "left", "right", "both"):
        settled = facts(replace(free, effusion=effusion)).values()
        differ = {name for name in FACTS if settled[name] != told[name]}
        assert differ <= {"effusion", "effusion_amount", "lung_mm"}
        assert settled["effusion"] == effusion


def test_plain_phantoms_have_neither_fluid_nor_missing_organs():
    labels = phantom(PhantomConfig(seed=0, spacing_mm=(6.0, 6.0, 8.0))).volumes[0].labels
    assert set(labels.classes) == set(range(1, 10))
    assert {4, 5, 6} <= set(np.unique(labels.array))
    assert labels.array.max() < 10


def test_a_phantom_at_4_mm_is_small():
    for seed in range(3):
        assert paired(PairedConfig(seed=seed)).volumes[0].array.size < 700_000


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"lung": "left middle"},
        {"liver": "caudate"},
        {"spacing_mm": (4.0, 0.0, 4.0)},
        {"orientation": "XYZ"},
        {"noise_hu": -1.0},
        {"rewrites": -1},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PairedConfig(**{"seed": 0} | wrong)


def test_written_files_are_ingested_with_reports_and_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path / "key"))
    configs = [
        PairedConfig(seed=seed, spacing_mm=(8.0, 8.0, 8.0), orientation="random", effusion="left") for seed in (0, 1)
    ]
    files = paired_files(tmp_path / "files", configs)
    assert [one.subject for one in sources.iterate(files.scans)] == [subject(0), subject(1)]
    with files.tables["effusion"].open(newline="") as handle:
        assert [row["label"] for row in csv.DictReader(handle)] == ["left", "left"]
    assert json.loads((files.labels / "labels.json").read_text())["classes"]["10"] == "effusion_left"
    done = ingest([files.scans], tmp_path / "store", labels=files.labels, reports=files.reports)
    assert (done.kept, done.refused, done.reports_unused) == (2, 0, 0)
    store = Store.open(tmp_path / "store")
    written = {paired(config).report.findings_text for config in configs}
    assert {store.record(key).report.findings_text for key in store.select().key} == written


def test_studies_go_straight_into_a_store_with_facts_and_report(tmp_path, monkeypatch):
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path / "key"))
    config = PairedConfig(seed=7, spacing_mm=(8.0, 8.0, 8.0))
    (key,) = ingest_studies([paired(config)], tmp_path / "store")
    record = Store.open(tmp_path / "store").record(key)
    assert dict(record.labels) == facts(config).values()
    assert record.report == paired_report(config)
