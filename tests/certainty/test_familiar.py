from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from voxelstem.certainty.familiar import NEIGHBOURS, fit_familiar
from voxelstem.certainty.strangeness import fit_classes, fit_nearest
from voxelstem.protocols import Example

LEVEL = 0.9


@dataclass(frozen=True)
class Seen:
    scan: np.ndarray
    tokens: None = None
    tokens_affine_ras: None = None


def examples(count: int, *, size: int = 4, label: str | None = None) -> list[Example]:
    rows = np.random.default_rng(0).normal(size=(count, size)) + 2.0
    return [
        Example(subject=f"s{at}", key=f"k{at}", features=Seen(scan=row), affine_ras=np.eye(4), label=label)
        for at, row in enumerate(rows)
    ]


def test_labelled_scans_are_kept_and_measured_as_if_each_had_been_unknown() -> None:
    known = examples(20)
    rows, subjects = np.stack([one.features.scan for one in known]), [one.subject for one in known]
    found = fit_familiar(known, level=LEVEL)
    assert found.known is not None
    assert found.centres is not None
    assert not found.notes
    wanted = fit_nearest(rows, subjects, neighbours=NEIGHBOURS, level=LEVEL)
    np.testing.assert_array_equal(found.known.yardstick.scores, wanted.yardstick.scores)
    np.testing.assert_array_equal(found.centres.means, fit_classes(rows, ["all"] * 20, subjects, level=LEVEL).means)


def test_scans_without_a_vector_are_left_out_and_if_none_has_one_that_is_said() -> None:
    known = examples(20)
    empty = [Example(subject="t", key="t", features=Seen(scan=np.zeros(0)), affine_ras=np.eye(4))]
    found = fit_familiar([*known, *empty], level=LEVEL)
    assert found.known is not None
    assert len(found.known.vectors) == 20
    assert fit_familiar(empty, level=LEVEL).notes == (
        "strange scans are not told apart: no labelled scan has a vector to compare with",
    )
    assert fit_familiar([], level=LEVEL).notes == ()


def test_what_could_not_be_fitted_says_why_and_leaves_the_rest() -> None:
    few = fit_familiar(examples(4), level=LEVEL)
    assert few.known is None
    assert "needs 9 known scans" in few.notes[0]
    row = examples(1)[0].features
    alike = [Example(subject=f"s{at}", key=f"k{at}", features=row, affine_ras=np.eye(4)) for at in range(12)]
    found = fit_familiar(alike, level=LEVEL)
    assert found.known is not None
    assert found.centres is None
    assert "by the means of their classes" in found.notes[0]
