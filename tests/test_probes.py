from __future__ import annotations

import numpy as np
import pytest

from voxelstem.probes import disentanglement, label_probe, subject_folds, subject_retrieval

CONTRASTS = ("T1w", "T2w", "FLAIR")


def latents(
    subjects: int = 20, *, leak: float = 0.0, noise: float = 0.3
) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Subject and contrast latents of every contrast of some subjects; `leak` of the contrast is in the subject's."""
    rng = np.random.default_rng(0)
    person, kind = rng.normal(size=(subjects, 8)), rng.normal(size=(len(CONTRASTS), 8))
    rows = [(s, c) for s in range(subjects) for c in range(len(CONTRASTS))]
    subject = np.stack([person[s] + leak * kind[c] + noise * rng.normal(size=8) for s, c in rows])
    contrast = np.stack([kind[c] + noise * rng.normal(size=8) for s, c in rows])
    return subject, contrast, [CONTRASTS[c] for _, c in rows], [f"s{s}" for s, _ in rows]


def test_clean_latents_are_told_clean() -> None:
    subject, contrast, contrasts, subjects = latents()
    found = disentanglement(subject, contrast, contrasts=contrasts, subjects=subjects)
    assert found.contrast_from_contrast.value.estimate > 0.95
    assert found.contrast_from_subject.value.estimate < 0.5
    assert found.contrast_from_subject.chance == pytest.approx(1 / 3)
    assert found.subject_from_subject.value.estimate > 0.85
    assert found.subject_from_contrast.value.estimate < 0.3
    assert found.subject_from_subject.chance == pytest.approx(2 / 40)
    assert set(found.scalars()) == {
        "probe/contrast_from_contrast",
        "probe/contrast_from_subject",
        "probe/subject_from_subject",
        "probe/subject_from_contrast",
    }


def test_a_leak_of_the_contrast_is_found() -> None:
    subject, _, contrasts, subjects = latents(leak=2.0)
    assert label_probe(subject, contrasts, subjects).value.estimate > 0.9


def test_retrieval_is_not_fooled_by_the_contrast() -> None:
    # What all scans of a contrast share is taken off first.
    subject, _, contrasts, subjects = latents(leak=10.0, noise=0.1)
    assert subject_retrieval(subject, subjects, contrasts).value.estimate > 0.9


def test_a_probe_never_sees_the_subjects_it_is_tested_on() -> None:
    # Labels are a property of the subject and features name the subject: only a leak could be right about them.
    rng = np.random.default_rng(1)
    names = [f"s{number}" for number in range(24) for _ in range(4)]
    labels = [("a", "b")[(number // 4) % 2] for number in range(96)]
    features = np.repeat(rng.normal(size=(24, 40)), 4, axis=0)
    assert label_probe(features, labels, names, folds=6).value.estimate < 0.75
    for held_out in subject_folds(np.asarray(names), folds=6, seed=0):
        assert not set(np.asarray(names)[held_out]) & set(np.asarray(names)[~held_out])


def test_every_subject_is_held_out_once() -> None:
    names = np.asarray(["b", "a", "c", "a", "d"])
    held_out = np.stack(subject_folds(names, folds=3, seed=0))
    assert (held_out.sum(axis=0) == 1).all()


def test_subjects_not_scans_make_the_interval() -> None:
    subject, _, contrasts, subjects = latents(subjects=12)
    assert label_probe(subject, contrasts, subjects).value.subjects == 12
    assert subject_retrieval(subject, subjects, contrasts).value.subjects == 12


def test_a_subject_with_one_contrast_asks_nothing_and_is_still_a_candidate() -> None:
    subject, _, contrasts, subjects = latents(subjects=6)
    kept = [0, 1, 2, 3, 4, 5, 6, 9]
    found = subject_retrieval(subject[kept], [subjects[n] for n in kept], [contrasts[n] for n in kept])
    assert found.chance < 0.5
    assert 0 <= found.value.estimate <= 1


def test_what_cannot_be_asked_is_refused() -> None:
    features = np.zeros((4, 2))
    with pytest.raises(ValueError, match="two kinds"):
        label_probe(features, ["a"] * 4, list("abcd"))
    with pytest.raises(ValueError, match="two folds and two subjects"):
        label_probe(features, list("abab"), ["s"] * 4)
    with pytest.raises(ValueError, match="needs a name"):
        label_probe(features, list("aba"), list("abcd"))
    with pytest.raises(ValueError, match="two contrasts"):
        subject_retrieval(features, list("abcd"), list("aabb"))
