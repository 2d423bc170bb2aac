"""Is it disentangled? Linear probes and retrieval on frozen latents; subjects are never in both halves of a split.

What a linear probe does not find may still be there for another reader: a probe at chance is a good sign, no proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from voxelstem.metrics import Interval, bootstrap_interval, mean

FOLDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """How well something can be read from latents, and how well a guess would do."""

    value: Interval
    chance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Disentanglement:
    """What can be read from which half of the latents."""

    contrast_from_contrast: Probe
    """Should be near 1."""
    contrast_from_subject: Probe
    """Should be near chance."""
    subject_from_subject: Probe
    """Another contrast of the same subject is the nearest: should be near 1."""
    subject_from_contrast: Probe
    """Should be near chance."""

    def scalars(self) -> dict[str, float]:
        """The figures by name, as a journal takes them."""
        names = ("contrast_from_contrast", "contrast_from_subject", "subject_from_subject", "subject_from_contrast")
        return {f"probe/{name}": getattr(self, name).value.estimate for name in names}


def disentanglement(
    subject: Float[np.ndarray, "scan dim"],
    contrast: Float[np.ndarray, "scan dim"],
    *,
    contrasts: Sequence[str],
    subjects: Sequence[str],
    seed: int = 0,
) -> Disentanglement:
    """Probe both halves of the latents of some scans for both things.

    Args:
        subject: What a network holds to be the subject's (spatial latents: averaged over their cells).
        contrast: What it holds to be the contrast's.
        contrasts: Of each scan.
        subjects: Of each scan; several contrasts of each are needed.
        seed: Of the folds and of the intervals.

    Raises:
        ValueError: as `label_probe` and `subject_retrieval`.
    """
    return Disentanglement(
        contrast_from_contrast=label_probe(contrast, contrasts, subjects, seed=seed),
        contrast_from_subject=label_probe(subject, contrasts, subjects, seed=seed),
        subject_from_subject=subject_retrieval(subject, subjects, contrasts, seed=seed),
        subject_from_contrast=subject_retrieval(contrast, subjects, contrasts, seed=seed),
    )


def label_probe(
    features: Float[np.ndarray, "scan dim"],
    labels: Sequence[str],
    subjects: Sequence[str],
    *,
    folds: int = FOLDS,
    seed: int = 0,
) -> Probe:
    """Accuracy of a linear probe on subjects that it was not fitted on; the interval resamples subjects.

    Logistic regression on standardised features, in `folds` parts of the subjects (fewer where there are fewer).
    Chance is the share of the most frequent label.

    Raises:
        ValueError: not one label and one subject for each scan, one kind of label only, or one subject only.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels_, subjects_ = _named(features, labels), _named(features, subjects)
    _, counts = np.unique(labels_, return_counts=True)
    if len(counts) < 2:  # noqa: PLR2004 - one kind cannot be told from another
        raise ValueError("a probe needs scans of two kinds at least, there is one")
    right = np.full(len(labels_), np.nan)
    for held_out in subject_folds(subjects_, folds=folds, seed=seed):
        if len(np.unique(labels_[~held_out])) > 1:
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
            probe.fit(features[~held_out], labels_[~held_out])
            right[held_out] = probe.predict(features[held_out]) == labels_[held_out]
    return Probe(value=_by_subject(right, subjects_, seed), chance=float(counts.max() / counts.sum()))


def subject_retrieval(
    features: Float[np.ndarray, "scan dim"], subjects: Sequence[str], contrasts: Sequence[str], *, seed: int = 0
) -> Probe:
    """How often the nearest scan of *another contrast* shows the same subject; the interval resamples subjects.

    Nearest by cosine, after the mean over each contrast's scans is taken off: brains lie in nearly one direction,
    and so do the scans of a contrast. Scans of subjects with no other contrast ask nothing. Chance is the mean share of
    candidates that are right.

    Raises:
        ValueError: not one subject and one contrast for each scan, or no subject with two contrasts.
    """
    subjects_, contrasts_ = _named(features, subjects), _named(features, contrasts)
    centred = features.astype(np.float64)
    for name in np.unique(contrasts_):
        of = contrasts_ == name
        centred[of] -= centred[of].mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    other = contrasts_[:, None] != contrasts_[None, :]
    same = (subjects_[:, None] == subjects_[None, :]) & other
    asks = same.any(axis=1)
    if not asks.any():
        raise ValueError("retrieval needs a subject with scans of two contrasts")
    nearest = np.where(other, unit @ unit.T, -np.inf).argmax(axis=1)
    right = np.where(asks, same[np.arange(len(same)), nearest], np.nan)
    chance = float((same.sum(axis=1) / np.maximum(other.sum(axis=1), 1))[asks].mean())
    return Probe(value=_by_subject(right, subjects_, seed), chance=chance)


def subject_folds(subjects: Shaped[np.ndarray, "scan"], *, folds: int, seed: int) -> list[Bool[np.ndarray, "scan"]]:
    """Which scans are held out in each round: all scans of a subject together, every subject once.

    Raises:
        ValueError: one subject only, or fewer than two folds.
    """
    names = np.unique(subjects)
    count = min(folds, len(names))
    if count < 2:  # noqa: PLR2004 - one to fit, one to test
        raise ValueError(f"a probe needs two folds and two subjects at least, got {folds} and {len(names)}")
    place: Int[np.ndarray, "subject"] = np.random.default_rng([seed, 11]).permutation(len(names)) % count
    of = place[np.searchsorted(names, subjects)]
    return [of == fold for fold in range(count)]


def _named(features: Float[np.ndarray, "scan dim"], names: Sequence[str]) -> Shaped[np.ndarray, "scan"]:
    if len(features) != len(names):
        raise ValueError(f"every scan needs a name, got {len(names)} for {len(features)} scans")
    return np.asarray(names)


def _by_subject(right: Float[np.ndarray, "scan"], subjects: Shaped[np.ndarray, "scan"], seed: int) -> Interval:
    shares = {str(name): mean(right[subjects == name].tolist()) for name in np.unique(subjects)}
    return bootstrap_interval(shares, seed=seed)
