"""What lets others go on: the whole training (student, teacher, heads, centres, optimiser) beside the weights.

Weights alone embed scans. To continue a pretraining where it stopped, on scans of another hospital, its heads and its
teacher are needed too, or the first thousand steps unlearn what was learnt while new heads find their place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from voxelstem.card import Card, read_card, read_tensors, read_text
from voxelstem.config import flatten, without_places
from voxelstem.engine.folder import differences
from voxelstem.engine.state import objective_state, optimizer_state, put_optimizer_state, whole
from voxelstem.errors import CheckpointError

OBJECTIVE, OPTIMIZER = "training/objective.safetensors", "training/optimizer.safetensors"
ABOUT = "training/training.json"
_SHOWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Files beside the weights, by their names inside the folder: what `write_weights` takes, and digests, as is."""

    extras: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """What a training took over from weights."""

    taken: Literal["full", "backbone"]
    """`full`: student, teacher, heads and centres go on. `backbone`: the network in all its copies, the rest is new."""
    reason: str = ""
    """Why no more than the backbone; empty for `full`."""
    left_out: list[str] = field(default_factory=list)
    """Parts of the objective that were not in the weights and start anew, and parts of the weights with no place."""
    optimizer: bool = False
    """Whether the optimiser goes on with its moments."""


def gather_training(
    objective: nn.Module, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any] | None = None
) -> Training:
    """Put the whole training together on process 0, for `card.write_weights`; empty on the others.

    All processes call this together. `facts` (steps, recipe) are small and made of what JSON knows; the objective's
    settings are added. Tensors only, never a pickle.
    """
    state = whole(objective_state(objective))
    moments = whole(optimizer_state(objective, optimizer))
    if not state:
        return Training()
    config: Any = objective.config
    about = dict(facts or {}) | {"objective": without_places(flatten(config))}
    if tower := _tower(objective):
        about["tower"] = tower
    return Training(extras={OBJECTIVE: state, OPTIMIZER: moments}, texts={ABOUT: json.dumps(about, indent=1) + "\n"})


def begin_from(weights: Path, objective: Any, *, optimizer: torch.optim.Optimizer | None = None) -> Begun:
    """Set `objective`, fresh and not yet shared out, to what a weights folder holds.

    Where the folder holds the training of an objective of this kind and of these shapes, all of it is taken over;
    otherwise its backbone is, in every copy that the objective has (a teacher equals its student then, as at every
    beginning). With `optimizer`, its moments are taken over too: good for the same data, while for other data and
    another learning rate fresh ones are the usual choice.

    Raises:
        CheckpointError: the folder is damaged, or its network is another than the recipe's; all that differs is listed.
    """
    card = read_card(weights)
    backbone = read_tensors(weights, card)
    _check(card, backbone, objective.learner)
    reason = _why_not_all(weights, card, objective)
    if reason:
        return Begun(taken="backbone", reason=reason, left_out=_set_backbones(objective, backbone))
    # Strict by what was just compared: the same names and shapes.
    objective.load_state_dict(read_tensors(weights, card, OBJECTIVE))
    if optimizer is not None:
        put_optimizer_state(objective, optimizer, read_tensors(weights, card, OPTIMIZER))
    return Begun(taken="full", optimizer=optimizer is not None)


def differing(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> list[str]:
    """Tensors that one side lacks or has in another shape, each as `name: there -> here`."""

    def shape(tensors: Mapping[str, Tensor], name: str) -> str:
        return "x".join(map(str, tensors[name].shape)) or "one number" if name in tensors else "none"

    pairs = ((name, shape(there, name), shape(here, name)) for name in sorted(there.keys() | here.keys()))
    return [f"{name}: {before} -> {now}" for name, before, now in pairs if before != now]


def _why_not_all(weights: Path, card: Card, objective: Any) -> str:
    """Why the training beside the weights cannot be taken over; an empty word where it can."""
    if OBJECTIVE not in card.extras or ABOUT not in card.extras:
        return "these weights came without their training"
    try:
        about = json.loads(read_text(weights, card, ABOUT))
        trained, tower = about["objective"]["name"], about.get("tower", "")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{weights.name}/{ABOUT} cannot be read", hint="copy the folder again") from error
    if trained != objective.config.name:
        return f"they were trained by {trained}, this is {objective.config.name}"
    # What a head learned of one tower's vectors means nothing for another's, though shapes may be the same.
    if tower and tower != _tower(objective):
        return "their text tower was another"
    different = differing(read_tensors(weights, card, OBJECTIVE), objective_state(objective))
    return f"the objective has other shapes: {_listed(different)}" if different else ""


def _tower(objective: Any) -> str:
    """Digest of the frozen text tower that the objective learns beside, where it has one; no tensor of it is here."""
    return getattr(getattr(objective, "tower", None), "sha256", "")


def _check(card: Card, tensors: Mapping[str, Tensor], learner: Any) -> None:
    """Refuse another network. A part (a level) that only one side has is no hindrance."""
    here = objective_state(learner)
    lacking = _parts(tensors) ^ _parts(here)
    there = {name: value for name, value in tensors.items() if _part(name) not in lacking}
    different = differing(there, {name: value for name, value in here.items() if _part(name) not in lacking})
    kind, wanted = card.architecture["name"], learner.config.name
    if kind != wanted:
        raise CheckpointError(
            f"these weights are of a {kind}, and the recipe trains a {wanted}", hint="choose another recipe or weights"
        )
    if different:
        said = {name: "none" if value is None else value for name, value in card.architecture.items()}
        now = {name: value for name, value in flatten(learner.config).items() if name in said}
        settings = differences(json.loads(json.dumps(said)), now)
        raise CheckpointError(
            f"these weights are of another network than the recipe's: {_listed(different, most=len(different))}",
            hint=f"set the recipe's backbone as the card says ({'; '.join(settings)}; each as card -> recipe), "
            "or choose other weights",
        )


def _set_backbones(objective: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """Give every copy of the backbone these tensors; return the parts of the objective and the weights left out."""
    kind, shapes = type(objective.learner), _shapes(objective.learner)
    copies = [module for module in objective.modules() if isinstance(module, kind) and _shapes(module) == shapes]
    taken: set[int] = set()
    for copy in copies:
        here = objective_state(copy)
        fitting = {name: value for name, value in tensors.items() if name in here}
        copy.load_state_dict({**here, **fitting})
        taken |= {here[name].data_ptr() for name in fitting}
    new = {name for name, value in objective_state(objective).items() if value.data_ptr() not in taken}
    unused = _parts(tensors) - _parts(objective_state(objective.learner))
    return sorted({".".join(name.split(".")[:2]) for name in new} | {f"{part} (of the weights)" for part in unused})


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in objective_state(module).items()}


def _part(name: str) -> str:
    return name.partition(".")[0]


def _parts(names: Mapping[str, Tensor]) -> set[str]:
    return {_part(name) for name in names}


def _listed(lines: list[str], *, most: int = _SHOWN) -> str:
    more = f" and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more
