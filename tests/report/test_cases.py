from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import log_loss as sklearn_log_loss

from voxelstem.report import cases
from voxelstem.report.cases import Case, Chosen, answers_log_loss, case_picture, cases_section, choose, log_loss
from voxelstem.report.figures import Picture
from voxelstem.study import Provenance, Volume

KEY = hashlib.sha256(b"scan").hexdigest()
SHAPE = (60, 50, 40)


def scan(*, modality: str = "CT") -> Volume:
    array = np.full(SHAPE, -1000.0, np.float32)
    array[5:55, 5:45] = 40
    return Volume(
        array=array[None],
        affine_ras=np.diag([2.0, 2.0, 3.0, 1.0]),
        modality=modality,
        provenance=Provenance(source_format="nifti", sha256="0", orientation="RAS"),
    )


def mask(*box: slice) -> np.ndarray:
    there = np.zeros(SHAPE, np.int16)
    there[box] = 1
    return there


RIGHT = (slice(40, 50), slice(15, 25), slice(8, 16))
"""Index 0 counts towards the patient's right in RAS+: high indices lie on the right."""


def masked(truth: np.ndarray, predicted: np.ndarray) -> Case:
    return Case(key=KEY, figure=0.5, scan=scan(), truth=truth, predicted=predicted)


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB")).astype(int)


def painted(picture: Picture, colour: str) -> np.ndarray:
    """Where pixels have nearly this colour: rows and columns."""
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return np.argwhere(np.abs(pixels(picture) - wanted).max(axis=2) < 12)


figures = st.dictionaries(
    st.sampled_from([f"{n:016x}" for n in range(30)]),
    st.one_of(st.integers(0, 4).map(float), st.just(math.nan)),
    max_size=14,
)


@settings(deadline=None)
@given(figures, st.integers(1, 6), st.booleans())
def test_nobody_is_both_worst_and_best_and_nobody_between_is_worse_or_better(
    told: dict[str, float], count: int, less_is_better: bool
) -> None:
    found = choose(told, count, less_is_better=less_is_better)
    known = {key: figure for key, figure in told.items() if not math.isnan(figure)}
    assert not set(found.worst) & set(found.best)
    assert set(found.worst) | set(found.best) <= set(known)
    assert len(found.worst) == min(count, -(-len(known) // 2))
    assert len(found.best) == min(count, len(known) - len(found.worst))
    rest = [figure for key, figure in known.items() if key not in (*found.worst, *found.best)]
    sign = -1 if less_is_better else 1
    worst, best = ([sign * known[key] for key in keys] for keys in (found.worst, found.best))
    assert worst == sorted(worst)
    assert best == sorted(best, reverse=True)
    assert all(sign * figure >= worst[-1] and sign * figure <= best[-1] for figure in rest)


def test_equal_cases_stand_in_the_order_of_their_keys() -> None:
    told = {"d1": 0.5, "b3": 0.5, "c2": 0.5, "a9": 0.5, "e0": 0.1, "f0": 0.9}
    for turned in (told, dict(reversed(told.items()))):
        assert choose(turned, 2, less_is_better=False) == Chosen(worst=("e0", "a9"), best=("f0", "b3"))
        assert choose(turned, 2, less_is_better=True) == Chosen(worst=("f0", "a9"), best=("e0", "b3"))


def test_with_few_cases_the_worst_come_first() -> None:
    told = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4, "e": 0.5}
    assert choose(told, 3, less_is_better=False) == Chosen(worst=("a", "b", "c"), best=("e", "d"))
    assert choose({"a": 0.1}, 3, less_is_better=False) == Chosen(worst=("a",), best=())
    assert choose({"a": math.nan}, 3, less_is_better=False) == Chosen(worst=(), best=())
    with pytest.raises(ValueError, match="at least one"):
        choose(told, 0, less_is_better=False)


@given(st.integers(0, 2), st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_the_log_loss_is_scikit_learns(truth: int, weights: list[float]) -> None:
    scores = [weight / sum(weights) for weight in weights]
    assert log_loss(truth, scores) == pytest.approx(sklearn_log_loss([truth], [scores], labels=[0, 1, 2]))


def test_certain_errors_can_be_put_in_order() -> None:
    assert math.isfinite(log_loss(0, (0.0, 1.0)))
    assert log_loss(1, (0.0, 1.0)) == 0
    assert math.copysign(1, log_loss(1, (0.0, 1.0))) == 1  # minus the logarithm of 1 is -0
    for truth, scores in ((2, (0.5, 0.5)), (-1, (0.5, 0.5)), (0, (1.5, 0.0)), (0, (math.nan, 1.0))):
        with pytest.raises(ValueError, match="no probability"):
            log_loss(truth, scores)


def test_answers_are_judged_by_what_is_known() -> None:
    loss = answers_log_loss((1.0, 0.0, math.nan), (0.8, 0.4, 0.1))
    assert loss == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)
    assert math.isnan(answers_log_loss((math.nan,), (0.8,)))


def test_the_slices_run_where_half_of_what_is_asked_lies_below() -> None:
    rng = np.random.default_rng(0)
    there = rng.random(SHAPE) < 0.01
    there[30:] &= rng.random((30, *SHAPE[1:])) < 0.3
    found = cases._middle(scan(), there)
    for axis, at in enumerate(found):
        sides = np.argwhere(there)[:, axis]
        assert (sides < at).sum() < len(sides) / 2 <= (sides <= at).sum()
    # Two far pieces: between them is nothing to see.
    pieces = mask(slice(2, 5), slice(2, 5), slice(2, 5)) | mask(slice(50, 54), slice(40, 44), slice(30, 34))
    assert all(
        pieces.any(axis=tuple({0, 1, 2} - {axis}))[at] for axis, at in enumerate(cases._middle(scan(), pieces > 0))
    )


def test_without_outlines_the_slices_run_through_the_middle_of_the_scan() -> None:
    assert cases._middle(scan(), None) == (30, 25, 20)
    assert cases._middle(scan(), np.zeros(SHAPE, np.bool_)) == (30, 25, 20)


def test_what_lies_on_the_patients_right_is_shown_on_the_left() -> None:
    picture = case_picture(masked(mask(*RIGHT), np.zeros(SHAPE, np.int16)), metric="Dice", place="worst 1 of 2")
    width, height = pixels(picture).shape[1], pixels(picture).shape[0]
    spots = painted(picture, cases.TRUTH)
    axial = spots[(spots[:, 1] < width * 0.3) & (spots[:, 0] < height * 0.8)]
    black = np.argwhere((pixels(picture)[: int(height * 0.8), : int(width * 0.3)] < 90).all(axis=2))
    middle = (black[:, 1].min() + black[:, 1].max()) / 2
    assert len(axial) > 30
    assert axial[:, 1].max() < middle
    # It lies to the back, which is shown below.
    assert axial[:, 0].mean() > (black[:, 0].min() + black[:, 0].max()) / 2


def test_both_outlines_are_drawn_and_move_with_their_masks() -> None:
    truth, moved = mask(*RIGHT), np.roll(mask(*RIGHT), -3, axis=0)
    picture = case_picture(masked(truth, moved), metric="Dice", place="worst 1 of 2")
    assert len(painted(picture, cases.TRUTH)) > 50
    assert len(painted(picture, cases.PREDICTED)) > 50
    same = case_picture(masked(truth, truth), metric="Dice", place="worst 1 of 2")
    assert same.png != picture.png
    assert same.png == case_picture(masked(truth > 0, truth > 0), metric="Dice", place="worst 1 of 2").png


def test_every_structure_has_an_outline_of_its_own() -> None:
    # Two halves of one box: a line runs between them, which one common outline has not.
    whole, halves = mask(*RIGHT), mask(*RIGHT)
    halves[45:50] *= 2
    nothing = np.zeros(SHAPE, np.int16)
    lines = [
        len(painted(case_picture(masked(one, nothing), metric="Dice", place="worst 1"), cases.TRUTH))
        for one in (whole, halves)
    ]
    assert lines[1] > 1.15 * lines[0]


def test_an_outline_at_the_rim_of_the_scan_is_closed() -> None:
    full = np.ones(SHAPE, np.int16)
    picture = case_picture(masked(full, full), metric="Dice", place="best 1 of 2")
    assert "Solid outline: truth" in picture.caption


@pytest.mark.parametrize(
    ("truth", "predicted", "said"),
    [
        (mask(*RIGHT), np.zeros(SHAPE, np.int16), "Nothing was predicted."),
        (np.zeros(SHAPE, np.int16), mask(*RIGHT), "the middle of what was predicted"),
        (np.zeros(SHAPE, np.int16), np.zeros(SHAPE, np.int16), "Nothing is there, and nothing was predicted."),
    ],
)
def test_empty_masks_are_said_to_be_empty(truth: np.ndarray, predicted: np.ndarray, said: str) -> None:
    assert said in case_picture(masked(truth, predicted), metric="Dice", place="worst 1 of 2").caption


def test_probabilities_stand_beside_the_scan_with_what_is_true() -> None:
    chances = {f"class {n}": n / 20 for n in range(20)}
    case = Case(key=KEY, figure=2.0, scan=scan(), chances=chances, true_classes=("class 3",))
    picture = case_picture(case, metric="log loss", place="worst 1 of 84")
    assert "True: class 3; predicted: class 19 0.95" in picture.caption
    # The true class is shown however improbable it was, and others only as far as there is room.
    assert "class 3 0.15" in picture.alt
    assert "class 4 " not in picture.alt
    assert len(painted(picture, cases.TRUTH)) > 50
    nothing = Case(key=KEY, figure=2.0, scan=scan(), chances={"nodule": 0.9})
    assert "True: none of the classes" in case_picture(nothing, metric="log loss", place="worst 1").caption


@pytest.mark.parametrize(
    ("figure", "counted", "said"),
    [(-0.0, False, "0.000"), (1e-9, False, "0.000"), (0.00489, False, "0.00489"), (3.0, True, "3"), (0.0, True, "0")],
)
def test_a_figure_that_is_nothing_has_no_sign_and_a_count_no_decimals(figure: float, counted: bool, said: str) -> None:
    case = Case(key=KEY, figure=figure, scan=scan(), said={"true": "1"}, counted=counted)
    assert f"Best 1 of 9 by loss: {said}. Case" in case_picture(case, metric="loss", place="best 1 of 9").caption


def test_numbers_stand_beside_the_scan_in_words() -> None:
    case = Case(key=KEY, figure=18.0, scan=scan(modality="MR"), said={"true age": "63", "predicted": "81"})
    picture = case_picture(case, metric="absolute error", place="worst 2 of 84")
    assert picture.caption == f"Worst 2 of 84 by absolute error: 18. Case {KEY[:8]}. True age: 63; predicted: 81."
    assert "MR scan" in picture.alt
    assert (
        picture.png
        != case_picture(
            Case(key=KEY, figure=18.0, scan=scan(modality="MR"), said={"true age": "64", "predicted": "81"}),
            metric="absolute error",
            place="worst 2 of 84",
        ).png
    )


@pytest.mark.parametrize("key", [KEY, "s" + KEY[:24]])
def test_a_case_is_called_by_the_first_letters_of_its_key(key: str) -> None:
    picture = case_picture(Case(key=key, figure=0.1, scan=scan()), metric="Dice", place="worst 1 of 2")
    for text in (picture.alt, picture.caption):
        assert key[:8] in text
        assert key[:9] not in text


@pytest.mark.parametrize("key", ["Smith^John", "sub-01", "0123", "", "../" + KEY])
def test_what_may_be_a_name_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ValueError, match="by its key in the store") as refused:
        Case(key=key, figure=0.1, scan=scan())
    assert not key or key not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"truth": mask(*RIGHT)}, "truth and prediction"),
        ({"truth": np.zeros((2, 2, 2)), "predicted": np.zeros((2, 2, 2))}, "own grid"),
        ({"chances": {"a": 1.5}}, r"\[0, 1\]"),
        ({"chances": {"a": math.nan}}, r"\[0, 1\]"),
        ({"chances": {"a": 0.5}, "true_classes": ("b",)}, "true class"),
    ],
)
def test_cases_without_sense_are_refused(changes: Mapping[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Case(**({"key": KEY, "figure": 0.5, "scan": scan()} | dict(changes)))  # pyright: ignore[reportArgumentType]


def test_the_section_shows_the_worst_before_the_best_and_escapes_what_was_said() -> None:
    worst, best = (Picture(png=b"", alt=f"<{name}>", caption=f"<{name}>") for name in ("worst", "best"))
    html = cases_section([worst], [best], metric="<Dice>").body
    assert html.index("<h3>Worst</h3>") < html.index("&lt;worst&gt;") < html.index("<h3>Best</h3>")
    assert "<Dice>" not in html
    assert "nothing was picked by hand" in html
    assert "None: too few subjects" in cases_section([worst], [], metric="Dice").body
