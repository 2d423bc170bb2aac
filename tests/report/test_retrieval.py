from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from voxelstem.report.retrieval import Asked, Match, asked_of, coronal, match_of, retrieval_page, retrieval_panel
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Store, write
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.study import Report

PICTURE = np.linspace(0, 1, 12).reshape(3, 4)


def asked(text: str = "pleural effusion", **changes: object) -> Asked:
    match = Match(key="ab" * 32, score=0.4321, picture=PICTURE, caption="Effusion on the left.")
    return Asked(text=text, pool=1234, matches=(replace(match, **changes), replace(match, score=0.2)))  # pyright: ignore


def test_each_query_shows_its_pool_and_its_best_scans_in_order() -> None:
    html = retrieval_panel([asked(), asked("no effusion")]).body
    assert html.count("<figure>") == 4
    assert "Best 2 of a pool of 1,234 scans." in html
    assert html.index("1. cosine 0.432") < html.index("2. cosine 0.200") < html.index("no effusion")
    assert "<code>abababababababab</code>" in html
    assert "ab" * 9 not in html
    assert "Effusion on the left." in html


def test_the_page_needs_nothing_and_runs_nothing() -> None:
    html = retrieval_page([asked()], about={"Weights": "0123", "Prompts": "phantom v1"})
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")
    assert "Not a medical device" in html
    assert "phantom v1" in html
    assert html == retrieval_page([asked()], about={"Weights": "0123", "Prompts": "phantom v1"})


def test_words_of_a_query_or_report_are_no_markup() -> None:
    html = retrieval_panel([asked("<b>loud</b>", caption="<script>x</script>")]).body
    assert "<b>loud" not in html
    assert "<script" not in html
    assert "&lt;b&gt;loud" in html


def test_a_match_shows_the_scan_upright_in_true_proportions_with_its_own_words(tmp_path: Path) -> None:
    study = phantom(PhantomConfig(seed=3, phase="portal", lesions=0, spacing_mm=(6.0, 6.0, 12.0)))
    report = Report(findings_text="Findings " + "word " * 100, impression_text="")
    store = Store.create(tmp_path / "store")
    (key,) = write(store, replace(study, subject=pseudonym(study.subject, site_key()), report=report))
    match = match_of(store, key, 0.5)
    volume = study.volumes[0]
    across, up = (volume.shape_ijk[axis] * volume.spacing_mm[axis] for axis in (0, 2))
    assert match.picture.shape[0] / match.picture.shape[1] == round(240 * up / across) / 240
    assert 0.0 <= match.picture.min() < match.picture.max() <= 1.0
    # Lungs are dark and lie above the brighter belly.
    half = match.picture.shape[0] // 2
    assert match.picture[:half].mean() < match.picture[half:].mean()
    assert match.caption.startswith("Findings word")
    assert " … · contrast: yes, spleen: " in match.caption
    assert "lesion" not in match.caption
    assert np.array_equal(match.picture, coronal(store.volume(key)))
    found = asked_of(store, "spleen", 1, [(key, 0.5)])
    assert (found.text, found.pool, found.matches[0].key, found.matches[0].score) == ("spleen", 1, key, 0.5)
    assert "Best 1 of a pool of 1 scan." in retrieval_panel([found]).body
