"""How sure a tuned network may be: calibrated on subjects held out of its training, if there are any, and strangeness.

To cross-fit it, every fold would have to train the network anew. Those who were held out to say when training should
stop were seen by no step of it; that they chose the step flatters what is measured on them a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from voxelstem.certainty.assurance import LEVEL, Assurance, assure, groups_each
from voxelstem.certainty.familiar import fit_familiar
from voxelstem.finetune.tune import Asked, Speaker, hold_out
from voxelstem.progress import progress
from voxelstem.protocols import Example, Features, Head, Task
from voxelstem.store import Record
from voxelstem.truth import Truth

ANEW = "every fold would have to train the network anew"
ON_ITS_OWN = "whether a scan is strange is told by scans that the network was trained on: of others it may flag more"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inside:
    """The vector from inside the network, in the form of features."""

    scan: Float[np.ndarray, " dim"]
    tokens: None = None
    tokens_affine_ras: None = None


def assure_tuned(
    speaker: Speaker, task: Task, head: Head, truth: Truth, records: Sequence[Record], *, seed: int
) -> Assurance:
    """Ask the network, as it will be delivered, about its labelled scans.

    Args:
        speaker: The network.
        task: What is asked.
        head: What stands above the network.
        truth: What is known of the subjects.
        records: The scans that it was trained on, those included that were held out of it.
        seed: That of the training: it says who was held out.
    """
    asked, share = speaker.asked, speaker.config.held
    apart = hold_out([record.subject for record in records], asked, share, seed) if share else frozenset[str]()
    held = [] if asked.voxels or asked.times is not None else [one for one in records if one.subject in apart]
    outcomes = _outcomes(speaker, task, head, truth, held)
    inside: list[Example] = []
    with progress(f"{asked.task}: what is familiar", len(records)) as advance:
        for record in records:
            inside.append(_example(record, truth, Inside(scan=speaker.inside(record.key))))
            advance(1)
    groups = groups_each((record.subject, record.acquisition) for record in held)
    sure = assure(outcomes, (), groups=groups, notes=() if outcomes else (_why_not(asked),))
    familiar = fit_familiar(inside, level=LEVEL)
    more = [f"calibrated on {sure.subjects} subjects who also said when training was to stop"] if sure.subjects else []
    more += [ON_ITS_OWN] if familiar.known is not None else []
    return replace(sure, inside=familiar.known, notes=(*sure.notes, *familiar.notes, *more))


def _why_not(asked: Asked) -> str:
    """Why nothing is fitted to answers."""
    if asked.times is not None:
        return "survival curves are not calibrated"
    if asked.voxels:
        return f"volumes without intervals: {ANEW}"
    return f"not calibrated: {ANEW}, and full.held=0 holds nobody out"


def _outcomes(speaker: Speaker, task: Task, head: Head, truth: Truth, held: Sequence[Record]) -> dict[str, Any]:
    """What the network says of each subject that no step of its training saw."""
    found: dict[str, list[Any]] = {}
    for record in held:
        outcome = task.outcome(head, _example(record, truth, speaker(record.key)))
        found.setdefault(record.subject, []).append(outcome)
    return {subject: task.combine(outcomes) for subject, outcomes in found.items()}


def _example(record: Record, truth: Truth, features: Features) -> Example:
    return Example(
        subject=record.subject,
        key=record.key,
        features=features,
        affine_ras=record.affine_ras,
        label=truth.labels.get(record.subject),
        value=truth.values.get(record.subject),
        findings=truth.findings.get(record.subject),
    )
