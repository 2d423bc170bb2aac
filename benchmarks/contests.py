"""The questions of the learning benchmark, who answers them, and the answers that rest on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from collection import GTV, Collection
from light_heads import Linear, Neighbours

from voxelstem.adapted import SeeConfig
from voxelstem.demo import ORGANS
from voxelstem.evaluate import Contest, Outcomes, check_leakage, intensity_features
from voxelstem.features import FeaturesOf, examples_of, with_intensity
from voxelstem.manifest import write_whole
from voxelstem.model import Model
from voxelstem.progress import progress
from voxelstem.protocols import Task
from voxelstem.store import Store
from voxelstem.streaming import of_store
from voxelstem.truth import Truth, draw

TUMOUR_DRAWS = 12
"""Draws of labelled sarcoma patients for each pretraining seed: there are few, and which ones matters."""
HEADS: tuple[Task, ...] = (Linear(), Neighbours())
Heat = tuple[Contest, Contest]
"""Where a head learns, and where it is asked; one and the same unless it is carried from one store to another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A task for a number of labelled subjects, in several rounds; a round may join heats.

    Round r is answered by the pretraining seed r modulo `repeats`.
    """

    task: str
    mode: str
    budget: int
    repeats: int
    """How many pretraining seeds there are."""
    rounds: tuple[tuple[Heat, ...], ...]

    @property
    def contest(self) -> Contest:
        return self.rounds[0][0][1]

    @property
    def subjects(self) -> set[str]:
        return {record.subject for heats in self.rounds for _, asked in heats for record in asked.tested}

    def turns(self, index: int) -> range:
        """Which rounds are those of a pretraining seed."""
        return range(index, len(self.rounds), self.repeats)

    @property
    def has_atlas(self) -> bool:
        """The atlas has nothing to do with heads, and needs its labelled scans in the same store."""
        return self.mode == "probe" and all(taught is asked for taught, asked in self.rounds[0])

    @property
    def name(self) -> str:
        return f"{self.task}, {self.mode}, {self.budget} labelled"

    def mark(self, index: int) -> str:
        """What decides the answers of a round, apart from the contestant."""
        scans = [
            [[record.key for record in taught.labelled], [record.key for record in asked.tested]]
            for taught, asked in self.rounds[index]
        ]
        what = json.dumps([self.name, repr(self.contest.task), self.contest.classes, scans])
        return f"{self.name}, round {index}, {hashlib.sha256(what.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """Gives features of a store's scans; or, without heads, answers by itself."""

    mark: str
    """Equal marks give equal answers."""
    features: Callable[[Store], FeaturesOf] | None = None
    answer: Callable[[Contest], Outcomes] | None = None

    @staticmethod
    def of(model: Model, see: SeeConfig) -> Contestant:
        """The model's tokens, or what `see` says."""
        card, seen = model.card, model.through(see.layers) if see.layers else model
        what: list[Any] = [card.sha256, sorted(card.architecture.items()), repr(card.spec)]
        what += [*([list(see.layers)] if see.layers else []), *([see.beside] if see.beside != "nothing" else [])]

        def embed(store: Store) -> FeaturesOf:
            def look(key: str) -> Any:
                found = seen.embed(of_store(store, key), tokens=True)
                return found if see.beside == "nothing" else with_intensity(found, store.volume(key), model.spec)

            return look

        return Contestant(mark=digest(what), features=embed)

    @staticmethod
    def intensity(model: Model) -> Contestant:
        """Plain intensity, on patches of the model's size."""
        what = ["intensity", repr(model.spec), model.backbone.patch_ijk]
        return Contestant(
            mark=digest(what), features=lambda store: intensity_features(store, model.spec, model.backbone.patch_ijk)
        )

    @staticmethod
    def atlas(model: Model) -> Contestant:
        spec = model.spec
        return Contestant(mark=digest(["atlas", spec.low_hu, spec.high_hu]), answer=lambda contest: contest.atlas(spec))


def answer(folder: Path, contestant: Contestant, wanted: Sequence[tuple[Question, int]]) -> dict[str, Outcomes]:
    """Answer rounds of questions, or read what was answered before; answers rest in a file for each contestant.

    Features of a scan are made once and kept while it is this contestant's turn.
    """
    path = folder / f"{contestant.mark}.json"
    known: dict[str, Outcomes] = json.loads(path.read_text()) if path.exists() else {}
    seen: dict[tuple[Path, str], Any] = {}

    def remembered(store: Store) -> FeaturesOf:
        assert contestant.features is not None
        look = contestant.features(store)

        def features(key: str) -> Any:
            if (store.path, key) not in seen:
                seen[store.path, key] = look(key)
            return seen[store.path, key]

        return features

    missing = [(question, index) for question, index in wanted if question.mark(index) not in known]
    with progress(f"ask {contestant.mark[:8]}", len(missing)) as advance:
        for question, index in missing:
            outcomes: Outcomes = {}
            for taught, asked in question.rounds[index]:
                if contestant.answer is not None:
                    outcomes |= contestant.answer(asked)
                    continue
                examples = list(
                    examples_of(taught.store, taught.labelled, taught.truth, remembered(taught.store), taught.task)
                )
                head = taught.task.fit(examples, taught.classes, mode=taught.mode, seed=index)
                outcomes |= asked.score(head, remembered(asked.store))
            known[question.mark(index)] = outcomes
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(known).encode())
            advance(1, note=question.name)
    return {question.mark(index): known[question.mark(index)] for question, index in wanted}


def questions_of(
    stores: Collection, *, budgets: Sequence[int], tumour_budgets: Sequence[int], seeds: Sequence[int]
) -> list[Question]:
    """All questions, in the order of the table."""
    repeats = len(seeds)
    phantoms = Store.open(stores.phantoms)
    organs = Truth(records=tuple(phantoms), labels={}, classes=ORGANS)
    check_leakage(phantoms, organs.of("train"), organs.of("test"))
    questions = [
        held_out_phantoms(_contest(phantoms, organs, head), budget, repeats) for head in HEADS for budget in budgets
    ]
    if stores.sarcomas is None or stores.organs is None:
        return questions
    sarcomas = Store.open(stores.sarcomas)
    tumours = Truth(records=tuple(sarcomas), labels={}, classes=(GTV,))
    questions += [
        in_folds(_contest(sarcomas, tumours, head), stores.held_out, budget, seeds)
        for head in HEADS
        for budget in tumour_budgets
    ]
    real = Store.open(stores.organs)
    two = _contest(real, Truth(records=tuple(real), labels={}, classes=ORGANS), HEADS[0])
    questions.append(from_the_other(two, repeats))
    questions.append(from_phantoms(_contest(phantoms, organs, HEADS[0]), two, max(budgets), repeats))
    return questions


def _contest(store: Store, truth: Truth, task: Task) -> Contest:
    """All test subjects; whom to learn from is drawn later."""
    mode, tested = task.modes[0], truth.of("test")
    return Contest(
        store=store, truth=truth, task=task, mode=mode, classes=truth.classes, labelled=(), tested=tested, seed=0
    )


def held_out_phantoms(contest: Contest, budget: int, repeats: int) -> Question:
    draws = [draw(contest.truth, budget, index, voxels=True) for index in range(repeats)]
    contests = [dataclasses.replace(contest, labelled=drawn) for drawn in draws]
    return Question(
        task="organs of phantoms",
        mode=contest.mode,
        budget=budget,
        repeats=repeats,
        rounds=tuple(((one, one),) for one in contests),
    )


def in_folds(contest: Contest, held_out: Sequence[Set[str]], budget: int, seeds: Sequence[int]) -> Question:
    """Each pretraining seed has a fold of patients whom it has not seen; labels are drawn among the others."""
    rounds: list[tuple[Heat, ...]] = []
    for index in range(TUMOUR_DRAWS * len(seeds)):
        apart = held_out[seeds[index % len(seeds)] % len(held_out)]
        tested = tuple(record for record in contest.tested if record.subject in apart)
        others = [record for record in contest.tested if record.subject not in apart]
        drawn = np.random.default_rng(index).permutation(len(others))[:budget].tolist()
        check_leakage(contest.store, [others[place] for place in drawn], tested)
        fold = dataclasses.replace(contest, labelled=tuple(others[place] for place in drawn), tested=tested)
        rounds.append(((fold, fold),))
    return Question(
        task="tumours of sarcoma CTs", mode=contest.mode, budget=budget, repeats=len(seeds), rounds=tuple(rounds)
    )


def from_the_other(contest: Contest, repeats: int) -> Question:
    """Learn from one scan and ask about the other, both ways."""
    folds = [
        dataclasses.replace(
            contest, labelled=tuple(one for one in contest.tested if one.subject != asked.subject), tested=(asked,)
        )
        for asked in contest.tested
    ]
    heats = tuple((fold, fold) for fold in folds)
    return Question(
        task="organs of real CTs, from the other one",
        mode=contest.mode,
        budget=1,
        repeats=repeats,
        rounds=(heats,) * repeats,
    )


def from_phantoms(taught: Contest, asked: Contest, budget: int, repeats: int) -> Question:
    draws = [draw(taught.truth, budget, index, voxels=True) for index in range(repeats)]
    rounds = tuple(((dataclasses.replace(taught, labelled=drawn), asked),) for drawn in draws)
    return Question(
        task="organs of real CTs, from phantoms", mode=asked.mode, budget=budget, repeats=repeats, rounds=rounds
    )


def digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
