from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from voxelstem.heads.boxes import Matched
from voxelstem.report import curves, sweeps
from voxelstem.report.figures import Picture
from voxelstem.report.marks import BAND, MARKS, told
from voxelstem.report.sweeps import Judged


def judged(name: str = "run", *, subjects: int = 20, repeats: int = 1, power: float = 0.5, seed: int = 0) -> Judged:
    truth = np.arange(subjects) % 3 == 0
    rng = np.random.default_rng(seed)
    chance = power * truth[:, None] + (1 - power) * rng.random((subjects, repeats))
    return Judged(name=name, truth=truth, chance=chance)


def matched(subjects: int = 6) -> dict[str, tuple[Matched, ...]]:
    one = Matched(scores=(0.9, 0.4, 0.2), hits=(True, False, True), truths=3, scans=2)
    return {f"s{subject}": (one,) for subject in range(subjects)}


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))


def test_the_roc_picture_says_every_figure_in_words() -> None:
    contestants = [judged(), judged("scratch", repeats=3, power=0.1), judged("majority", power=0.0, seed=4)]
    picture = curves.roc_picture(contestants, about="lesion: yes")
    for one in contestants:
        trace = sweeps.roc(one)
        read = trace.line.after(np.array([0.1]))[0]
        assert f"{one.name}: AUROC {told(trace.area)}, sensitivity {read:.2f} at 10% false alarms" in picture.alt
    assert "20 held-out subjects, 7 of them positive" in picture.alt
    assert "95 % of the curves of 1,000 resamples of the subjects" in picture.caption
    assert "Shown for run and scratch only" in picture.caption
    assert "mean of theirs" in picture.caption
    assert pixels(picture).std() > 5


def test_two_contestants_both_have_their_bands() -> None:
    both = curves.roc_picture([judged(), judged("scratch", power=0.1)], about="lesion")
    assert "only" not in both.caption
    assert "resamples" in both.caption
    assert "mean of theirs" not in both.caption


def test_a_band_changes_the_picture_and_its_absence_is_explained() -> None:
    picture = curves.roc_picture([judged(subjects=2)], about="lesion")
    # A band is drawn as a pale blue that no line has.
    assert not _pale_blue(picture)
    assert "No band where there can be none (n=2, no interval)" in picture.caption
    assert "resamples" not in picture.caption
    assert _pale_blue(curves.roc_picture([judged(power=0.2)], about="lesion"))


def test_an_interval_without_width_is_not_left_to_speak_for_itself() -> None:
    perfect = curves.roc_picture([judged(power=0.9), judged("scratch", power=0.1)], about="lesion")
    assert "run: AUROC 1.00 [1.00, 1.00]" in perfect.alt
    assert "run parts these subjects without an error" in perfect.caption
    assert "scratch parts" not in perfect.caption


def _pale_blue(picture: Picture) -> bool:
    """Whether there is much of the first colour, laid over white as thinly as a band is."""
    colour = np.array([int(MARKS[0].colour[start : start + 2], 16) for start in (1, 3, 5)])
    return int((np.abs(pixels(picture) - (BAND * colour + (1 - BAND) * 255)).max(axis=2) < 3).sum()) > 500


def test_precision_and_recall_are_shown_beside_the_prevalence() -> None:
    contestants = [judged(), judged("scratch", power=0.1)]
    picture = curves.precision_recall_picture(contestants, about="lesion: yes")
    for one in contestants:
        assert f"{one.name}: average precision {told(sweeps.precision_recall(one).area)}" in picture.alt
    assert "prevalence 0.35" in picture.alt
    assert "7 positive" in picture.caption


def test_reliability_tells_each_bin_with_its_count() -> None:
    one = judged(subjects=30)
    picture = curves.reliability_picture([one, judged("scratch", repeats=2, power=0.2, subjects=30)], about="lesion")
    found = sweeps.reliability(one)
    assert f"run: calibration error {told(found.ece)}" in picture.alt
    for bin_ in found.bins:
        assert f"{bin_.mean_chance:.2f} and {bin_.came_true.estimate:.2f} (n={bin_.rows})" in picture.alt
    assert "Wilson's 95 % interval" in picture.caption
    assert "n is their mean" in picture.caption
    assert "n is their mean" not in curves.reliability_picture([one], about="lesion").caption
    assert pixels(picture).std() > 5


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_reliability_has_a_diagram_for_every_contestant(count: int) -> None:
    picture = curves.reliability_picture([judged(f"run {n}", power=0.1 * n) for n in range(count)], about="lesion")
    height, width = pixels(picture).shape[:2]
    assert height == pytest.approx(3.8 * 110 * -(-count // 2), abs=1)
    assert width == pytest.approx((3.1 * min(count, 2) + 0.1) * 110, abs=1)


def test_the_froc_picture_says_what_is_found_at_how_many_false_alarms() -> None:
    picture = curves.froc_picture({"run": matched(), "scratch": matched()}, about="lung nodules")
    assert "18 things to be found in 12 scans of 6 held-out subjects" in picture.alt
    # One of three is found without a false positive; the third at half a false positive per scan.
    assert "0.33 at 0.125, 0.67 at 1, 0.67 at 8" in picture.alt
    assert "resamples" in picture.caption


def test_a_detector_that_misses_nothing_is_told_so_in_words_of_its_own() -> None:
    sure = {f"s{n}": [Matched(scores=(0.9,), hits=(True,), truths=1)] for n in range(6)}
    caption = curves.froc_picture({"run": sure}, about="nodules").caption
    assert "run finds everything at each of these rates" in caption
    assert "parts these subjects" not in caption


def test_pictures_of_the_same_things_are_the_same_bytes() -> None:
    once, again = (curves.roc_picture([judged()], about="lesion") for _ in range(2))
    assert once.png == again.png
    assert curves.roc_picture([judged(power=0.2)], about="lesion").png != once.png


def test_names_that_look_like_formulas_do_no_harm() -> None:
    names = ["_hidden", "a$b", "$\\frac{", "<b>", "x" * 200]
    picture = curves.roc_picture([judged(name) for name in names], about="$lesion")
    assert pixels(picture).size


@pytest.mark.parametrize("draw", [curves.roc_picture, curves.precision_recall_picture, curves.reliability_picture])
def test_contestants_of_other_subjects_share_no_axes(draw) -> None:
    with pytest.raises(ValueError, match="same subjects"):
        draw([judged(), judged("scratch", subjects=21)], about="lesion")
    with pytest.raises(ValueError, match="same subjects"):
        draw([], about="lesion")
    with pytest.raises(ValueError, match="names of their own"):
        draw([judged(), judged()], about="lesion")


def test_detectors_of_other_subjects_share_no_axes() -> None:
    with pytest.raises(ValueError, match="same subjects"):
        curves.froc_picture({"run": matched(6), "scratch": matched(5)}, about="nodules")
    with pytest.raises(ValueError, match="same subjects"):
        curves.froc_picture({}, about="nodules")
