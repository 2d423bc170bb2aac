"""Real brains in several contrasts, which the source tree does not hold: skipped where their folder is absent."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from voxelstem.ingest import ingest
from voxelstem.store import Store
from voxelstem.views.crop import ViewPlan
from voxelstem.views.pair import carry_over

DATA = Path(os.environ.get("VOXELSTEM_DATA", Path(__file__).parents[2] / "shared" / "data")) / "starter"
PEOPLE = {
    "oms07": {"T1": "T1w", "T2": "T2w", "FLAIR": "FLAIR", "T1POST": "ce-gad_T1w"},
    "stroke": {"T1": "T1w", "T2": "T2w", "FLAIR": "FLAIR"},
}
MASKS = {"oms07": "GOLD", "stroke": "lesion"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((DATA / f"{who}_{one}.nii.gz").is_file() for who, looks in PEOPLE.items() for one in looks),
        reason="the folder of real scans is absent (VOXELSTEM_DATA)",
    ),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """They lie flat under names of their own; BIDS names say whose they are and in which contrast."""
    folder = tmp_path_factory.mktemp("brains")
    for who, looks in PEOPLE.items():
        for mine, theirs in looks.items():
            link(DATA / f"{who}_{mine}.nii.gz", folder / "scans" / place(who, theirs))
        link(DATA / f"{who}_{MASKS[who]}.nii.gz", folder / "labels" / place(who, "FLAIR"))
    (folder / "labels" / "labels.json").write_text('{"classes": {"1": "lesion", "2": "around", "3": "further"}}')
    report = ingest([folder / "scans"], folder / "store", labels=folder / "labels")
    assert (report.kept, report.refusals) == (7, ())
    return Store.open(folder / "store")


def link(real, name):
    name.parent.mkdir(parents=True, exist_ok=True)
    name.symlink_to(real)


def place(who, contrast):
    return f"sub-{who}/ses-1/anat/sub-{who}_ses-1_{contrast}.nii.gz"


def test_they_get_in_as_mr_with_their_contrasts_and_their_lesions(store):
    found = {}
    for record in store:
        assert record.modality == "MR"
        found.setdefault(record.study, []).append(record)
    assert sorted(map(len, found.values())) == [3, 4]
    for records in found.values():
        assert len({record.subject for record in records}) == 1
        assert {"T1w", "T2w", "FLAIR"} <= {record.acquisition.contrast for record in records}
        (marked,) = [record for record in records if record.has_labels]
        assert marked.acquisition.contrast == "FLAIR"
        labels = store.labels(marked.key).array
        assert 0 < (labels == 1).mean() < 0.1
        # Lesions of these patients are bright in this contrast: the mask lies where it should.
        array = store.volume(marked.key).array[0]
        brain = array[array > np.percentile(array[array > array.min()], 30)]
        assert np.median(array[labels == 1]) > np.median(brain)


def test_contrasts_of_a_session_lie_on_one_grid_and_can_be_paired(store):
    sessions = {}
    for record in store:
        sessions.setdefault(record.study, []).append(record)
    for records in sessions.values():
        for a, b in itertools.permutations(records, 2):
            plan = ViewPlan(start_mm=(30.0, 30.0, 30.0), extent_mm=(64.0, 64.0, 64.0), size_ijk=(32, 32, 32))
            found = carry_over(plan, a, b, least_overlap=0.95, tolerance_mm=0.5)
            assert isinstance(found, ViewPlan)
            assert np.allclose(found.start_mm, plan.start_mm, atol=0.01)
            assert np.abs(a.affine_ras - b.affine_ras).max() < 1e-3
