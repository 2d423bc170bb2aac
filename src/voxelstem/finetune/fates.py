"""Fine-tuning on times until an event: who is compared with whom, by what loss, and the head above what was learned.

A network sees few scans at a time, and Cox's partial likelihood compares all. So each batch is one event and others
drawn from those who were still watched (`risks.cox_of_sets`); hazards by interval need no company.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

from voxelstem.errors import AuditError, ConfigError
from voxelstem.finetune.cases import Case
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.loop import Pick, in_turns
from voxelstem.heads.risks import Loss, cox_of_sets, hazards_of
from voxelstem.heads.survival import Watched
from voxelstem.protocols import Head
from voxelstem.study import Survival
from voxelstem.tasks.survive import Survive


def check(task: Survive, config: FinetuneConfig) -> None:
    """See that a network can be trained by these settings, before any scan is read.

    Raises:
        ConfigError: weights of their own for each interval, which a network with one risk has not; or batches of one
            scan, in which nobody can be compared.
    """
    if task.kind == "hazard" and task.by_interval:
        raise ConfigError(
            "a network that is trained gives one risk for all intervals, and head.by_interval asks for one in each",
            hint="leave head.by_interval out, or use --mode probe or attention",
        )
    if task.kind == "cox" and config.batch < 2:  # noqa: PLR2004 - a case and somebody beside it
        raise ConfigError(
            "cox compares scans of a batch, and full.batch=1 holds one", hint="set full.batch=2, or head.kind=hazard"
        )


def risk_sets(cases: Sequence[Case]) -> Callable[[int, np.random.Generator], Iterator[Case]]:
    """Draw an event, then others whose watch had not ended before it; if they are few, some of them again.

    Raises:
        AuditError: no event has anybody else who was still watched then.
    """
    told = [_told(case) for case in cases]
    time = np.array([one.time for one in told])
    subject = np.array([case.subject for case in cases])
    rivals = {
        at: np.flatnonzero((time >= one.time) & (subject != subject[at]))
        for at, one in enumerate(told)
        if one.event and one.time > 0
    }
    rivals = {at: others for at, others in rivals.items() if len(others)}
    if not rivals:
        raise AuditError(
            f"of {len(cases)} scans no event comes while another subject is still watched: nothing to compare",
            hint="label more subjects, leave full.held at 0, or set head.kind=hazard",
        )
    events = list(rivals)

    def pick(count: int, rng: np.random.Generator) -> Iterator[Case]:
        at = events[int(rng.integers(len(events)))]
        yield cases[at]
        others = rivals[at]
        for place in rng.choice(others, count - 1, replace=len(others) < count - 1):
            yield cases[int(place)]

    return pick


def way_of(task: Survive, cases: Sequence[Case]) -> tuple[Pick, Loss]:
    """How batches of these cases are drawn, and the loss of what a network says of one."""
    if task.kind == "cox":
        return risk_sets, cox_of_sets
    return in_turns, hazards_of(_watched(cases)[1], task.intervals)


def head_of(task: Survive, cases: Sequence[Case], said: Sequence[float], *, mode: str) -> Head:
    """The head above a trained network: the curves that its risks of the labelled subjects mean.

    A subject's scans are averaged. These are subjects that the network was trained on: it tells them apart better than
    others, so curves spread too far, the more so the longer it learned from few.

    Raises:
        AuditError: hardly anybody was watched beyond time 0.
    """
    subjects, watched = _watched(cases)
    risks: dict[str, list[float]] = {}
    for case, risk in zip(cases, said, strict=True):
        risks.setdefault(case.subject, []).append(risk)
    mean: Float[np.ndarray, "subject"] = np.array([np.mean(risks[name]) for name in subjects])
    return task.above(mean, watched, mode=mode)


def _watched(cases: Sequence[Case]) -> tuple[list[str], Watched]:
    told = {case.subject: _told(case) for case in cases}
    return list(told), Watched.of(told.values())


def _told(case: Case) -> Survival:
    if not isinstance(case.target, Survival):
        raise ValueError("survival needs a time to compare with")
    return case.target
