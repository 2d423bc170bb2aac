from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from voxelstem.answers import Answer
from voxelstem.errors import ConfigError
from voxelstem.protocols import Example, Head
from voxelstem.tasks.zeroshot import (
    USUAL_TEMPERATURE,
    Zeroshot,
    ensemble,
)

DIM = 16
SIDE = ("effusion_left", "effusion_right")


@dataclass(frozen=True)
class Seen:
    scan: np.ndarray
    tokens: None = None
    tokens_affine_ras: None = None


@dataclass(frozen=True)
class Words:
    """A space in which a sentence points where its meaning does: what is asked, and whether it is denied."""

    temperature: float | None = 2.0
    bias: float | None = -1.0

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.vector(text) for text in texts])

    def vector(self, text: str) -> np.ndarray:
        topic = np.zeros(DIM)
        topic[0 if "left" in text else 1 if "right" in text else 2] = 1.0
        if " no " in f" {text.lower()} ":
            topic[:3] *= -1.0
        topic[3:] = np.random.default_rng(len(text)).normal(size=DIM - 3) * 0.05
        return (topic / np.linalg.norm(topic)).astype(np.float32)


def patient(number: int, *, left: bool, right: bool, noise: float = 0.3) -> Example:
    vector = np.random.default_rng(number).normal(size=DIM) * noise
    vector[0] += 1.0 if left else -1.0
    vector[1] += 1.0 if right else -1.0
    return Example(
        subject=f"s{number}",
        key=f"k{number}",
        features=Seen((vector / np.linalg.norm(vector)).astype(np.float32)),
        affine_ras=np.eye(4),
        findings={"effusion_left": left, "effusion_right": right},
    )


def patients(count: int, *, first: int = 0, noise: float = 0.3) -> list[Example]:
    return [patient(first + n, left=n % 2 == 0, right=n % 3 == 0, noise=noise) for n in range(count)]


def asked(mode: str = "prompts", examples: Sequence[Example] = (), task: Zeroshot | None = None) -> Head:
    task = task or Zeroshot(prompts="phantom")
    return task.fit(examples, SIDE, mode=mode, seed=0, space=Words())


def test_words_alone_tell_sides_and_negations_apart() -> None:
    task, head = Zeroshot(prompts="phantom"), asked()
    outcomes = [task.outcome(head, example) for example in patients(60)]
    for metric in ("auroc", "balanced_accuracy", "f1"):
        assert task.statistic(metric)(outcomes) > 0.95
    swapped = replace(patient(1, left=True, right=False), findings={"effusion_left": False, "effusion_right": True})
    assert task.outcome(head, swapped).scores[0] > 0.5 > task.outcome(head, swapped).scores[1]


def test_a_head_says_which_prompts_it_rests_on() -> None:
    from voxelstem.prompts import read_prompts

    facts, said = asked().facts, read_prompts("phantom")
    assert (facts["prompts"], facts["prompts_version"], facts["prompts_sha256"]) == ("phantom", 1.0, said.sha256)
    assert facts["prompts_said"] == 12.0


def test_the_probability_is_the_formula_of_two_ensembles() -> None:
    head, scan = asked(), patient(5, left=True, right=False).features.scan.astype(float)
    words = Words()
    said = Zeroshot(prompts="phantom").ask(["effusion_left"])[1]["effusion_left"]

    def middle(texts: Sequence[str]) -> np.ndarray:
        total = sum(words.vector(text).astype(float) / np.linalg.norm(words.vector(text)) for text in texts)
        return total / np.linalg.norm(total)

    yes, no = (math.exp(math.exp(2.0) * float(middle(texts) @ scan)) for texts in (said.positive, said.negative))
    assert Zeroshot(prompts="phantom").predict(head, scan)[0] == pytest.approx(yes / (yes + no), abs=1e-6)


def test_against_the_bias_the_probability_is_the_one_of_the_loss() -> None:
    task = Zeroshot(prompts="phantom", against="bias")
    head, scan = asked(task=task), patient(5, left=True, right=False).features.scan.astype(float)
    cosine = float(head.arrays["positive"][1] @ scan)
    assert task.predict(head, scan)[1] == pytest.approx(expit(math.exp(2.0) * cosine - 1.0))
    with pytest.raises(ConfigError, match=r"head\.against=negative"):
        task.fit((), SIDE, mode="prompts", seed=0, space=Words(bias=None))


def test_weights_without_a_temperature_get_the_usual_one() -> None:
    head = Zeroshot(prompts="phantom").fit((), SIDE, mode="prompts", seed=0, space=Words(temperature=None, bias=None))
    assert head.facts["temperature"] == USUAL_TEMPERATURE


def test_one_of_several_is_a_softmax_over_their_positive_prompts() -> None:
    task = Zeroshot(prompts="phantom", answers="one")
    head = task.fit((), SIDE, mode="prompts", seed=0, space=Words())
    examples = [
        replace(patient(n, left=n % 2 == 0, right=n % 2 == 1), findings=None, label=SIDE[n % 2]) for n in range(40)
    ]
    outcomes = [task.outcome(head, example) for example in examples]
    assert all(sum(outcome.scores) == pytest.approx(1.0) for outcome in outcomes)
    assert task.statistic("auroc")(outcomes) > 0.95
    assert task.statistic("balanced_accuracy")(outcomes) > 0.95
    calibrated = task.calibrate(head, examples[:20])
    assert task.statistic("ece")([task.outcome(calibrated, one) for one in examples[20:]]) < task.statistic("ece")(
        outcomes
    )


def test_calibration_keeps_the_order_and_mends_threshold_and_probability() -> None:
    """A space that leans: all scans look ill, so that 0.5 is no threshold."""
    task = Zeroshot(prompts="phantom")

    def lean(example: Example) -> Example:
        scan = example.features.scan.astype(float)
        scan[:2] = 0.2 * scan[:2] + 0.5
        return replace(example, features=Seen(scan / np.linalg.norm(scan)))

    held = [lean(example) for example in patients(120, first=1000, noise=0.4)]
    plain, calibrated = asked(), asked("calibrated", [lean(example) for example in patients(40, noise=0.4)])
    before, after = ([task.outcome(head, example) for example in held] for head in (plain, calibrated))
    assert task.statistic("auroc")(after) == pytest.approx(task.statistic("auroc")(before), abs=1e-12)
    assert task.statistic("balanced_accuracy")(before) == 0.5
    assert task.statistic("balanced_accuracy")(after) > 0.6
    assert task.statistic("ece")(after) < 0.5 * task.statistic("ece")(before)
    assert calibrated.facts["uncalibrated"] == 0.0


def test_calibrating_twice_is_calibrating_once() -> None:
    task, examples = Zeroshot(prompts="phantom"), patients(20)
    once = asked("calibrated", examples)
    again = task.calibrate(once, examples)
    for name, array in once.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


def test_a_class_of_one_kind_stays_uncalibrated_and_is_counted() -> None:
    examples = [patient(n, left=n % 2 == 0, right=False) for n in range(12)]
    head = asked("calibrated", examples)
    assert head.facts["uncalibrated"] == 1.0
    assert (head.arrays["scale"][1], head.arrays["shift"][1], head.arrays["threshold"][1]) == (1.0, 0.0, 0.5)
    assert head.arrays["shift"][0] != 0.0


def test_a_subject_with_many_scans_counts_once() -> None:
    examples = patients(20)
    head = asked("calibrated", examples)
    doubled = asked("calibrated", [*examples, *([examples[0]] * 9)])
    for name, array in head.arrays.items():
        np.testing.assert_allclose(doubled.arrays[name], array, atol=1e-9)


def test_what_nobody_knows_counts_nowhere() -> None:
    task, head = Zeroshot(prompts="phantom"), asked()
    full = [task.outcome(head, example) for example in patients(30)]
    unknown = replace(full[0], truth=(math.nan, full[0].truth[1]), scores=(0.0, full[0].scores[1]))
    assert ("effusion_left" in unknown, "effusion_right" in unknown, "spleen" in unknown) == (False, True, False)
    for metric in task.metrics:
        assert task.statistic(f"{metric}:effusion_left")([unknown, *full[1:]]) == pytest.approx(
            task.statistic(f"{metric}:effusion_left")(full[1:])
        )
        assert task.statistic(metric)(full) == pytest.approx(
            np.mean([task.statistic(f"{metric}:{name}")(full) for name in SIDE])
        )


def test_scans_of_a_subject_are_averaged() -> None:
    one = Answer(classes=("a",), truth=(1.0,), scores=(0.2,), thresholds=(0.5,))
    joined = Zeroshot().combine([one, replace(one, scores=(0.9,))])
    assert (joined.truth, joined.scores) == ((1.0,), pytest.approx((0.55,)))


vectors = st.lists(
    st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda row: np.linalg.norm(row) > 0.1),
    min_size=1,
    max_size=6,
)


@given(rows=vectors, random=st.randoms(use_true_random=False))
def test_the_order_of_prompts_means_nothing(rows: list[list[float]], random: object) -> None:
    turned = list(rows)
    random.shuffle(turned)  # pyright: ignore[reportAttributeAccessIssue]
    units = [np.array(row) / np.linalg.norm(row) for row in rows]
    if np.linalg.norm(np.mean(units, axis=0)) < 1e-6:
        return  # opposite prompts cancel: there is no direction to compare
    one, other = (ensemble([np.array(row) for row in some]) for some in (rows, turned))
    np.testing.assert_allclose(one, other, atol=1e-9)
    assert np.linalg.norm(one) == pytest.approx(1.0)


@given(factor=st.floats(0.01, 100.0))
def test_the_length_of_a_prompts_vector_means_nothing(factor: float) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 5))
    np.testing.assert_allclose(ensemble(list(rows * [[factor], [1.0], [1.0]])), ensemble(list(rows)), atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({"prompts": "phantm"}, (), "did you mean 'phantom'"),
        ({"prompts": "phantom"}, ("efusion left",), "did you mean 'effusion_left'"),
        ({"prompts": "phantom", "answers": "one"}, ("contrast",), "one of one class"),
    ],
)
def test_wrong_questions_are_one_clear_sentence(
    changes: dict[str, object], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Zeroshot(**changes).ask(names)  # pyright: ignore[reportArgumentType]


def test_a_class_without_negatives_is_asked_against_the_bias_only(tmp_path: Path) -> None:
    path = tmp_path / "bare.toml"
    path.write_text('name="bare"\nversion=1\nlanguage="en"\nabout="x"\n[a]\npositive=["A."]\n[b]\npositive=["B."]\n')
    with pytest.raises(ConfigError, match=r"\[a\] of bare has no negative prompts"):
        Zeroshot(prompts=str(path)).ask()
    assert list(Zeroshot(prompts=str(path), against="bias").ask()[1]) == ["a", "b"]
    assert list(Zeroshot(prompts=str(path), answers="one").ask()[1]) == ["a", "b"]


def test_without_words_nothing_is_fitted() -> None:
    with pytest.raises(ValueError, match="a space"):
        Zeroshot().fit((), (), mode="prompts", seed=0)
    with pytest.raises(ValueError, match="no mode 'probe'"):
        Zeroshot().fit((), (), mode="probe", seed=0, space=Words())
    with pytest.raises(ValueError, match="at least 2"):
        Zeroshot(bins=1)


@pytest.mark.parametrize("answers", ["each", "one"])
@pytest.mark.parametrize("metric", Zeroshot.metrics)
def test_a_bootstrap_is_that_of_the_same_statistic_draw_by_draw(metric: str, answers: str) -> None:
    from voxelstem import metrics

    task = Zeroshot(prompts="phantom", answers=answers)  # pyright: ignore[reportArgumentType]
    head = task.fit((), SIDE, mode="prompts", seed=0, space=Words())
    outcomes = [task.outcome(head, patient(n, left=n % 2 == 0, right=n % 2 == 1, noise=2.0)) for n in range(15)]
    repeats = {str(n): (one, replace(one, scores=one.scores[::-1])) for n, one in enumerate(outcomes)}
    quick, slow = metrics.averaged(task.statistic(metric)), task.statistic(metric)

    def by_draw(sample: Sequence[Sequence[Answer]]) -> float:
        return metrics.mean([slow([held[0] for held in sample]), slow([held[1] for held in sample])])

    one, other = (metrics.bootstrap_interval(repeats, some, draws=100) for some in (quick, by_draw))
    assert (one.estimate, one.low, one.high) == pytest.approx((other.estimate, other.low, other.high))
