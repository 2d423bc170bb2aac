"""Do intervals of volumes hold? Every structure of the test scans, as `predict` would state its volume and as drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from voxelstem.certainty.assurance import Assurance
from voxelstem.certainty.thresholds import coverage
from voxelstem.certainty.volumes import Marker, Sized, Sizes
from voxelstem.features import FeaturesOf, examples_of
from voxelstem.findings import MM3_PER_ML
from voxelstem.judging.contest import Contest, counted
from voxelstem.metrics import FEWEST_SUBJECTS
from voxelstem.progress import progress
from voxelstem.protocols import Head
from voxelstem.report.evidence import VolumesHeld

SizesOf = Mapping[str, Sequence[Sizes]]
"""Subject to the structures of each of its scans."""


def sizes_of(name: str, contest: Contest, head: Head, features: FeaturesOf) -> dict[str, tuple[Sizes, ...]]:
    """Mark every test scan as `predict` does, and measure its structures as marked and as drawn.

    Args:
        name: What the run is called.
        contest: Whose task labels voxels.
        head: The run's.
        features: What it sees of scans.
    """
    sized, found = Sized(task=cast(Marker, contest.task)), dict[str, tuple[Sizes, ...]]()
    with progress(f"evaluate: {name}, volumes", len(contest.tested)) as advance:
        looked = counted(features, advance)
        for example in examples_of(contest.store, contest.tested, contest.truth, looked, contest.task):
            found[example.subject] = (*found.get(example.subject, ()), sized.outcome(head, example))
    return found


def volumes_held(sure: Assurance, sizes: SizesOf) -> VolumesHeld | None:
    """How often the stated interval of a volume holds the true one, for each structure and over all.

    A finding has the volume of one scan, so every scan counts by itself, and a subject by its share of them. Structures
    of fewer than three subjects are left out of `by_structure`; None where fewer than three have any interval.
    """
    many = subjects_of_each(sure, sizes)
    subjects, structures, held = list[str](), list[str](), list[bool]()
    missed = 0
    for subject, scan in ((subject, scan) for subject, scans in sorted(sizes.items()) for scan in scans):
        for name, true_mm3 in scan.true_mm3.items():
            size = sure.volume(name, scan.predicted_mm3[name] / MM3_PER_ML)
            if size is not None and size.low is not None and size.high is not None:
                subjects.append(subject)
                structures.append(name)
                held.append(size.low <= true_mm3 / MM3_PER_ML <= size.high)
            missed += name in many and true_mm3 > 0 and not scan.predicted_mm3[name]
    if sure.volumes is None or len(set(subjects)) < FEWEST_SUBJECTS:
        return None
    found = coverage(np.array(held, dtype=np.bool_), subjects, groups=structures)
    return VolumesHeld(
        level=sure.volumes.thresholds.level,
        overall=found.overall,
        by_structure={name: share for name, share in found.by_group.items() if many[name] >= FEWEST_SUBJECTS},
        volumes=len(held),
        missed=missed,
    )


def subjects_of_each(sure: Assurance, sizes: SizesOf) -> dict[str, int]:
    """Of each structure whose volume has intervals, in how many test subjects it is found and so gets one."""
    if sure.volumes is None:
        return {}
    told = sure.volumes.thresholds
    found = {
        subject: {name for scan in scans for name, mm3 in scan.predicted_mm3.items() if mm3 > 0}
        for subject, scans in sizes.items()
    }
    return {name: sum(name in own for own in found.values()) for name in told.groups if name not in told.lacking}
