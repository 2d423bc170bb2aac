from __future__ import annotations

from dataclasses import replace

import pytest

from voxelstem.engine.loader import Loader, LoaderConfig
from voxelstem.engine.scans import choose, trainable
from voxelstem.errors import StoreError
from voxelstem.ingest import ingest_studies
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Fractions, Store
from voxelstem.study import InputSpec, Report
from voxelstem.views.augment import AugmentConfig
from voxelstem.views.crop import ViewKind
from voxelstem.views.multicrop import ViewsConfig
from voxelstem.views.report import ReportConfig

SPEC = InputSpec(spacing_mm=(12.0, 12.0, 12.0), block_ijk=(8, 8, 8))
VIEWS = ViewsConfig(
    global_=ViewKind(count=1, size_ijk=(32, 24, 32)), region_scale=1.05, overhang=0.0, report=ReportConfig()
)
SIDED = Report(findings_text="Fluid on the left. The right lung is clear.", language="en")
REPORTS = (
    SIDED,
    Report(findings_text="Nodule in the right upper lobe. No effusion on the left.", language="en"),
    None,
    Report(),
    Report(rest_text="Findings:"),
    Report(findings_text="Kein Erguss. Die Leber ist unauffällig.", language="de"),
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, settled_key: None) -> Store:
    """Phantoms with good reports, without one, with empty ones, and with one in German; all to train on."""
    root = tmp_path_factory.mktemp("mixed") / "store"
    studies = [phantom(PhantomConfig(seed=seed, spacing_mm=(8.0, 8.0, 8.0))) for seed in range(len(REPORTS))]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        Store.create(root, fractions=Fractions(train=1.0, validation=0.0, test=0.0))
        ingest_studies((replace(study, report=report) for study, report in zip(studies, REPORTS, strict=True)), root)
    return Store.open(root)


def test_a_recipe_without_reports_takes_every_training_scan(mixed: Store):
    chosen = choose(mixed, SPEC, replace(VIEWS, report=None))
    assert list(chosen.scans.key) == list(trainable(mixed, SPEC).key)
    assert len(chosen.scans) == len(REPORTS)
    assert not chosen.left_out


def test_scans_whose_report_says_nothing_are_left_out_and_counted_by_reason(mixed: Store):
    chosen = choose(mixed, SPEC, VIEWS)
    assert chosen.left_out["no-report"] == 1
    assert chosen.left_out["language"] == 1
    assert sum(chosen.left_out.values()) == 4
    said = [mixed.record(key).report for key in chosen.scans.key]
    assert sorted(report.findings_text for report in said if report) == sorted(
        report.findings_text for report in REPORTS[:2] if report
    )


def test_no_report_to_learn_from_is_an_error_that_says_why(mixed: Store):
    with pytest.raises(StoreError, match="3 language"):
        choose(mixed, SPEC, replace(VIEWS, report=ReportConfig(languages=("nl",))))


def test_no_scan_of_the_modality_is_an_error(mixed: Store):
    with pytest.raises(StoreError, match="no MR scan"):
        trainable(mixed, replace(SPEC, modality="MR"))


def texts(mixed: Store, views: ViewsConfig, *, steps: int = 8, workers: int = 0) -> list[tuple[str, bool]]:
    """The text of every sample, and whether its view was mirrored from left to right."""
    keys = list(choose(mixed, SPEC, views).scans.key)
    config = LoaderConfig(batch=2, samples_per_open=1, workers=workers)
    loader = Loader(mixed, keys, SPEC, views=views, config=config, seed=3)
    batches = list(loader.batches(0, steps))
    flipped = [bool(place[0, 1, 0] < 0) for batch in batches for place in batch.places_mm["global"]]
    return list(zip([text for batch in batches for text in batch.texts], flipped, strict=True))


def test_words_change_sides_when_the_view_does_and_only_then(mixed: Store):
    found = texts(mixed, replace(VIEWS, augment=AugmentConfig(flip_axes=(0, 1))))
    assert {flipped for _, flipped in found} == {True, False}
    for text, flipped in found:
        assert ("Fluid on the right" in text or "left upper lobe" in text) == flipped
        assert ("Fluid on the left" in text or "right upper lobe" in text) != flipped


def test_texts_are_drawn_anew_for_each_sample_and_the_same_again_for_the_same_step(mixed: Store):
    config = ReportConfig(findings=replace(ReportConfig().findings, shuffle=True, sentence_drop_p=0.5))
    found = texts(mixed, replace(VIEWS, report=config), steps=12)
    assert len({text for text, _ in found}) > 2
    assert found == texts(mixed, replace(VIEWS, report=config), steps=12)
    assert found[:4] == texts(mixed, replace(VIEWS, report=config), steps=2, workers=1)


def test_a_batch_without_reports_has_no_texts(mixed: Store):
    views = replace(VIEWS, report=None)
    loader = Loader(mixed, list(trainable(mixed, SPEC).key), SPEC, views=views, config=LoaderConfig(batch=2), seed=0)
    assert loader.batch(0).texts == ()


def test_a_report_speaks_of_one_view():
    with pytest.raises(ValueError, match="one view"):
        ViewsConfig(global_=ViewKind(count=2), report=ReportConfig())
    with pytest.raises(ValueError, match="one view"):
        ViewsConfig(local=ViewKind(count=1), report=ReportConfig())
