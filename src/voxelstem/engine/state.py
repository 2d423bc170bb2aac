"""The whole state of a training as named tensors: what is written, gathered and put back, however it is shared out.

Names are those of the objective's parameters and buffers, so they depend neither on how many processes hold it nor on
how the optimiser groups or numbers its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from voxelstem import distributed

OBJECTIVE, OPTIMIZER = "objective.", "optimizer."


def objective_state(objective: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; the tensors are the live ones, no copies."""
    state: dict[str, Tensor] = objective.state_dict()
    return state


def optimizer_state(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimiser remembers of each parameter, as `parameter.entry`; a parameter not yet updated has nothing."""
    return {
        f"{name}.{entry}": value
        for name, parameter in _trained(objective, optimizer)
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def room_for(
    objective: nn.Module, optimizer: torch.optim.Optimizer, kinds: Mapping[str, torch.dtype]
) -> dict[str, Any]:
    """Tensors into which an optimiser's state can be read: those of `kinds`, shared out as their parameters are.

    `kinds` names entries as `optimizer_state` does. What is as large as its parameter lies where that lies; counters
    of steps are single numbers on the CPU.

    Raises:
        KeyError: an entry is of a parameter that the optimiser does not train.
    """
    parameters = dict(_trained(objective, optimizer))
    room: dict[str, Tensor] = {}
    for name, dtype in kinds.items():
        parameter, _, entry = name.rpartition(".")
        like = parameters[parameter].detach()
        room[name] = torch.zeros((), dtype=dtype) if entry == "step" else torch.zeros_like(like, dtype=dtype)
    return room


def put_optimizer_state(objective: nn.Module, optimizer: torch.optim.Optimizer, values: Mapping[str, Tensor]) -> None:
    """Give the optimiser what it remembered; the settings of its groups stay as they are."""
    numbers = {name: number for number, (name, _) in enumerate(_trained(objective, optimizer))}
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in values.items():
        parameter, _, entry = name.rpartition(".")
        entries.setdefault(numbers[parameter], {})[entry] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of process 0, an empty dict on the others. All processes call this together.

    One tensor is put together at a time: no GPU ever holds a second copy of the state.
    """
    keeps = distributed.here().rank == 0
    kept: dict[str, Tensor] = {}
    for name, value in tensors.items():
        full = value.detach()
        if isinstance(full, DTensor):
            full = full.full_tensor()
        if keeps:
            kept[name] = full.cpu()
    return kept


def _trained(objective: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """The optimiser's parameters with their names, in the order in which it numbers them."""
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], parameter
