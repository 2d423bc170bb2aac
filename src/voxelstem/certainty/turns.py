"""Who is drawn first of labelled subjects, so that the first few show as much as few can."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from voxelstem.errors import AuditError, ConfigError
from voxelstem.study import Survival

_log = logging.getLogger(__name__)


def take_turns(order: Sequence[str], labels: Mapping[str, str]) -> list[str]:
    """Reorder subjects so that every class comes by in turn: the first n are as balanced as they can be."""
    queues = {name: [s for s in order if labels[s] == name] for name in sorted({labels[s] for s in order})}
    longest = max((len(queue) for queue in queues.values()), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues.values() if turn < len(queue)]


def show_classes(
    order: Sequence[str], labels: Mapping[str, str], classes: Sequence[str], budget: int | None, word: str
) -> list[str]:
    """Reorder subjects by `take_turns`; a class that one of them alone has is warned of, as it may be a slip.

    Raises:
        AuditError: all are of one class, or a class of the labels is nobody's here: it could not be learned.
        ConfigError: a budget below the number of classes.
    """
    order = take_turns(order, labels)
    count = Counter(labels[subject] for subject in order)
    others = f"label {word} subjects of another class too; a subject's hash decides which split it is in"
    if len(count) < 2:  # noqa: PLR2004
        raise AuditError(
            f"all {len(order)} labelled {word} subjects have the same label, '{labels[order[0]]}': "
            "nothing to tell apart",
            hint=others,
        )
    if unseen := [name for name in classes if not count[name]]:
        elsewhere = sum(label == unseen[0] for label in labels.values())
        raise AuditError(
            f"no labelled {word} subject is '{unseen[0]}', and {elsewhere} of the other splits "
            f"{'is' if elsewhere == 1 else 'are'}: it cannot be learned",
            hint="correct it if it is a slip; else label more subjects of it, or leave its rows out",
        )
    if budget is not None and budget < len(count):
        raise ConfigError(
            f"budget {budget} cannot show each of {len(count)} classes once", hint=f"use --budget {len(count)}"
        )
    for name in sorted(name for name, subjects in count.items() if subjects == 1):
        _log.warning("of %d labelled %s subjects one alone is '%s': is it a slip?", len(order), word, name)
    return order


def spread_events(order: Sequence[str], told: Mapping[str, Survival], budget: int | None, word: str) -> list[str]:
    """Reorder subjects so that the first n hold events and censored ones, in about the shares of all of them.

    Raises:
        ConfigError: one subject only.
        AuditError: nobody has an event.
    """
    if min(len(order), budget or len(order)) < 2:  # noqa: PLR2004 - a risk is in comparison to another
        raise ConfigError(
            f"one labelled {word} subject cannot show who fares better",
            hint="use --budget 2 or more" if len(order) > 1 else "label more subjects",
        )
    # An event at time 0 comes before anybody could be compared: nobody learns from it.
    came = [subject for subject in order if told[subject].event and told[subject].time > 0]
    if not came:
        censored = sum(not told[subject].event for subject in order)
        raise AuditError(
            f"{censored} of {len(order)} labelled {word} subjects are censored, and none has an event after time 0: "
            "nothing to learn from",
            hint="label subjects with an event too, and count `time` from the scan on",
        )
    found = set(came)
    others = [subject for subject in order if subject not in found]
    places = {subject: at / len(queue) for queue in (came, others) for at, subject in enumerate(queue)}
    return sorted((*came, *others), key=places.__getitem__)


def check_kinds(told: Sequence[Mapping[str, bool]], classes: Sequence[str], word: str) -> None:
    """See that of one class at least two kinds of things are said.

    Raises:
        AuditError: of every class all subjects say the same.
    """
    if not any(len({truth[name] for truth in told if name in truth}) > 1 for name in classes):
        raise AuditError(
            f"of every class all {len(told)} labelled {word} subjects say the same: nothing to tell apart",
            hint="label subjects of another kind too",
        )


def show_both(
    order: Sequence[str],
    findings: Mapping[str, Mapping[str, bool]],
    classes: Sequence[str],
    budget: int | None,
    word: str,
) -> list[str]:
    """Reorder subjects so that the first n show as much of every class as they can, there and not there.

    Raises:
        AuditError: of a class all say the same, or nobody says anything.
        ConfigError: those of the budget do not show every class both ways.
    """
    for name in classes:
        said = [findings[subject][name] for subject in order if name in findings[subject]]
        if len(set(said)) < 2:  # noqa: PLR2004 - there, and not there
            all_of_them = f"all {len(said)} labelled {word} subjects say {'yes' if any(said) else 'no'}"
            raise AuditError(
                f"of '{name}' {all_of_them if said else f'no {word} subject says anything'}: nothing to tell apart",
                hint="label others too, or leave it out: head.classes='[\"NAME\"]' names those that are asked for",
            )
    turns = _rarest_first(order, findings, classes) if budget is not None else list(order)
    drawn = [findings[subject] for subject in turns[:budget]]
    for name in classes:
        if len({told[name] for told in drawn if name in told}) < 2:  # noqa: PLR2004
            raise ConfigError(
                f"budget {budget} cannot show of each of {len(classes)} classes that it is there and that it is "
                f"not; of '{name}' it does not",
                hint="use a larger --budget, or fewer head.classes",
            )
    return turns


def _rarest_first(
    order: Sequence[str], findings: Mapping[str, Mapping[str, bool]], classes: Sequence[str]
) -> list[str]:
    """Whoever shows what was shown least until then comes next."""
    queues = {
        (name, kind): [s for s in reversed(order) if findings[s].get(name) is kind]
        for name in classes
        for kind in (True, False)
    }
    shown, turns = dict.fromkeys(queues, 0), dict[str, None]()
    while True:
        for queue in queues.values():
            while queue and queue[-1] in turns:
                queue.pop()
        if not any(queues.values()):
            return [*turns, *(subject for subject in order if subject not in turns)]
        least = min((one for one in queues if queues[one]), key=lambda one: (shown[one], len(queues[one])))
        subject = queues[least].pop()
        turns[subject] = None
        for one in findings[subject].items():
            shown[one] = shown.get(one, 0) + 1
