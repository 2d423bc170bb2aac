from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from voxelstem.metrics import Interval, Score
from voxelstem.report import figures
from voxelstem.study import LabelMap, Provenance, Volume
from voxelstem.views import cells

AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])


@dataclass(frozen=True)
class Seen:
    tokens: np.ndarray
    tokens_affine_ras: np.ndarray
    scan: np.ndarray


def scan(*, modality: str = "CT") -> Volume:
    array = np.full((40, 30, 16), -1000.0, dtype=np.float32)
    array[5:35, 5:25, :] = 40
    array[8:16, 8:16, 4:10] = 150
    return Volume(
        array=array[None],
        affine_ras=AFFINE,
        modality=modality,
        provenance=Provenance(source_format="nifti", sha256="0", orientation="RAS"),
    )


def tokens(seed: int = 0) -> Seen:
    affine, size = cells.cover(AFFINE, (40, 30, 16), (10.0, 10.0, 10.0))
    rng = np.random.default_rng(seed)
    return Seen(rng.normal(size=(*size, 12)).astype(np.float32), affine, rng.normal(size=12).astype(np.float32))


def pixels(picture: figures.Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))


def test_the_patients_right_is_on_the_left_and_the_front_on_top() -> None:
    array = np.zeros((4, 5, 6))
    array[3, 4, 2] = 1  # far right, far front
    axial = figures.show_slice(array, "axial", 2)
    assert axial.shape == (5, 4)
    assert axial[0, 0] == 1
    array = np.zeros((4, 5, 6))
    array[0, 1, 5] = 1  # far left, at the top of the head
    coronal = figures.show_slice(array, "coronal", 1)
    assert coronal.shape == (6, 4)
    assert coronal[0, 3] == 1


def test_colours_turn_with_the_slice() -> None:
    array = np.random.default_rng(0).random((4, 5, 6, 3))
    turned = figures.show_slice(array, "axial", 0)
    np.testing.assert_array_equal(turned[..., 1], figures.show_slice(array[..., 1], "axial", 0))


def test_training_curves_tell_where_each_line_began_and_ended() -> None:
    records = [
        {"step": float(step), "loss": 3.0 - step / 100} | ({"effective_rank": 20.0 + step} if step % 50 == 0 else {})
        for step in range(0, 200, 10)
    ]
    picture = figures.training_curves(records)
    assert "loss from 3 to 1.1" in picture.alt
    assert "effective_rank from 20 to 170" in picture.alt
    assert "teacher_entropy" not in picture.alt
    assert pixels(picture).std() > 5


def test_training_curves_draw_every_health_sign_and_leave_out_what_is_none() -> None:
    signs = ("grad_norm", "lr", "gram_drift", "spread/cls", "entropy/patch", "effective_rank/cls", "probe/patch_knn")
    records = [{"step": float(step), "kwh": 0.1, **dict.fromkeys(signs, 0.5 + step)} for step in range(3)]
    picture = figures.training_curves(records)
    assert all(f"{name} from 0.5 to 2.5" in picture.alt for name in signs)
    assert "kwh" not in picture.alt
    # Zeros have no place on a logarithmic axis, and must not cost the picture.
    assert pixels(figures.training_curves([{"step": 0.0, "grad_norm": 0.0}])).size


def test_a_run_without_any_record_still_makes_a_picture() -> None:
    assert pixels(figures.training_curves([])).size


def test_pictures_of_the_same_things_are_the_same_bytes() -> None:
    once, again = (figures.token_pca(scan(), {"a": tokens()}, low=-160.0, high=240.0) for _ in range(2))
    assert once.png == again.png
    assert figures.token_pca(scan(), {"a": tokens(1)}, low=-160.0, high=240.0).png != once.png


def test_tokens_colour_the_body_and_leave_air_black() -> None:
    colours = figures.show_tokens(*figures.body_colours(tokens(), scan()), "axial", 8)
    assert colours.shape == (30, 40, 3)
    assert colours[0, 0].max() == 0
    inside = colours[10:20, 10:30]
    assert inside.std() > 0.1
    assert inside.min() >= 0
    assert inside.max() <= 1


def test_a_token_picture_without_tokens_is_refused() -> None:
    seen = tokens()
    bare = Seen(None, seen.tokens_affine_ras, seen.scan)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="needs tokens"):
        figures.token_pca(scan(), {"a": bare}, low=0.0, high=1.0)


def test_neighbours_are_ranked_by_cosine_without_the_common_mean_and_never_the_query_itself() -> None:
    rows = np.array([[2.0, 0.0], [1.0, 1.0], [-1.0, 1.5], [-2.0, -2.5]]) + 100.0
    picture = figures.neighbours([scan()] * 4, rows, ["a", "b", "c", "d"], queries=[0, 2], count=2)
    assert "a: b (cosine 0.71), c (cosine -0.55)" in picture.alt
    assert "c: b (cosine 0.20), d (cosine -0.30)" in picture.alt


def test_the_segmentation_shows_dice_in_words_too() -> None:
    array = np.zeros((40, 30, 16), np.int16)
    array[8:16, 8:16, 4:10] = 1
    truth = LabelMap(array=array, classes={1: "liver", 2: "spleen"})
    guess = LabelMap(array=np.roll(array, 2, axis=0), classes={1: "liver", 2: "spleen"})
    shown = figures.segmentation(scan(), truth, guess, {"liver": 0.75}, low=-160.0, high=240.0)
    assert "liver 0.75" in shown.alt
    plain = figures.segmentation(scan(), truth, truth, {"liver": 0.75}, low=-160.0, high=240.0)
    assert shown.png != plain.png


def test_mri_is_shown_in_its_own_range() -> None:
    picture = figures.neighbours([scan(modality="MR")] * 2, np.eye(2), ["a", "b"], queries=[0])
    assert pixels(picture).std() > 5


def test_the_comparison_says_every_figure_in_its_text() -> None:
    scores = [
        Score(
            name=name,
            task="segment",
            mode="probe",
            metric="dice",
            budget=2,
            labelled=2,
            repeats=1,
            value=Interval(
                estimate=value, low=low, high=None if low is None else 0.9, subjects=5, note="n=2, no interval"
            ),
        )
        for name, value, low in (("pretrained", 0.61, 0.5), ("scratch", 0.52, None))
    ]
    picture = figures.comparison(scores, "dice")
    assert "pretrained with 2 labelled: 0.610 [0.500, 0.900]" in picture.alt
    assert "scratch with 2 labelled: 0.520 (n=2, no interval)" in picture.alt
