from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_together
from torch import nn

from voxelstem.engine.checkpoint import Checkpoints, checkpoints, resume
from voxelstem.engine.optim import OptimConfig
from voxelstem.engine.parallel import ParallelConfig, Trainee
from voxelstem.engine.state import objective_state, optimizer_state, put_optimizer_state, room_for, whole
from voxelstem.errors import CheckpointError


def small(*, swap: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two layers, of which one is trained; `swap` numbers their parameters the other way round."""
    objective = nn.ModuleDict({"one": nn.Linear(2, 2), "other": nn.Linear(2, 3)})
    parameters = [*objective["one"].parameters(), *objective["other"].parameters()]
    return objective, torch.optim.AdamW(parameters[::-1] if swap else parameters)


def test_names_are_the_objectives_whatever_the_optimisers_order():
    objective, optimizer = small()
    objective["other"](torch.ones(2)).sum().backward()
    optimizer.step()
    before = optimizer_state(objective, optimizer)
    entries = ("step", "exp_avg", "exp_avg_sq")
    assert set(before) == {f"other.{which}.{entry}" for which in ("weight", "bias") for entry in entries}
    again, swapped = small(swap=True)
    again.load_state_dict(objective_state(objective))
    put_optimizer_state(again, swapped, before)
    after = optimizer_state(again, swapped)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_room_is_shaped_like_the_parameters():
    objective, optimizer = small()
    kinds = {"one.weight.exp_avg": torch.float32, "one.weight.step": torch.float32}
    room = room_for(objective, optimizer, kinds)
    assert {name: tuple(value.shape) for name, value in room.items()} == {
        "one.weight.exp_avg": (2, 2),
        "one.weight.step": (),
    }
    with pytest.raises(KeyError):
        room_for(objective, optimizer, {"nobody.step": torch.float32})


def test_alone_the_whole_is_what_is_there():
    objective, _ = small()
    state = objective_state(objective)
    assert all(torch.equal(value, state[name]) for name, value in whole(state).items())
    assert whole(state).keys() == state.keys()


def trainee(kind: Any, seed: int) -> Trainee:
    from tests.engine.conftest import Make

    config = ParallelConfig(kind=kind)
    objective = Make().objective(seed)
    return Trainee(objective, OptimConfig(lr=1e-2), config, device=torch.device("cpu"), precision="fp32")


def step(trained: Trainee, number: int) -> None:
    from tests.engine.conftest import Make

    from voxelstem import distributed

    here, batch = distributed.here(), Make().batch(number)
    share = len(batch) // here.count
    trained.backward(batch.part(here.rank * share, (here.rank + 1) * share), progress=0.5)
    trained.update()


def everything(trained: Trainee) -> dict[str, torch.Tensor]:
    state = whole(objective_state(trained.objective)) | whole(optimizer_state(trained.objective, trained.optimizer))
    return {name: value.clone() for name, value in state.items()}


def first(folder: Path, kind: Any) -> list[dict[str, torch.Tensor]]:
    """Two steps, a checkpoint, and a third step that a resumed run must repeat."""
    trained = trainee(kind, 0)
    step(trained, 0)
    step(trained, 1)
    with Checkpoints(folder, keep=2) as written:
        written.save(2, trained.objective, trained.optimizer, {"from": kind})
        before = everything(trained)
        step(trained, 2)  # while it is being written
    return [before, everything(trained)]


def again(folder: Path, kind: Any, number: int) -> list[dict[str, torch.Tensor]]:
    """Resume, write the same once more, and take the third step."""
    trained = trainee(kind, 1)
    assert resume(folder, trained.objective, trained.optimizer).step == number
    found = everything(trained)
    with Checkpoints(folder, keep=2) as written:
        written.save(number + 1, trained.objective, trained.optimizer)
        step(trained, 2)
    return [found, everything(trained)]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_from_two_processes_to_one_to_two_every_bit_is_kept(tmp_path: Path, kind: str):
    folder = tmp_path / "checkpoints"
    (before, after), (nothing, _) = run_together(first, 2, tmp_path, (folder, kind))
    assert before
    assert nothing == {}
    # On as many processes the next step is the same to the last bit.
    (found, repeated), _ = run_together(again, 2, tmp_path, (folder, kind, 2))
    assert same(found, before)
    assert same(repeated, after)
    alone, _ = again(folder, kind, 3)
    assert same(alone, before)
    (back, repeated), _ = run_together(again, 2, tmp_path, (folder, kind, 4))
    assert same(back, before)
    assert same(repeated, after)


def with_a_damaged_newest(folder: Path) -> list[Any]:
    trained = trainee("ddp", 0)
    step(trained, 0)
    with Checkpoints(folder, keep=2) as written:
        for number in (1, 2):
            written.save(number, trained.objective, trained.optimizer, {"number": number})
    with (folder / "step-00000002" / "__1_0.distcp").open("ab") as file:
        file.write(b"!")
    found = resume(folder, trained.objective, trained.optimizer)
    return [found.step, found.facts]


def test_all_processes_pass_over_a_damaged_newest_one(tmp_path: Path):
    assert run_together(with_a_damaged_newest, 2, tmp_path, (tmp_path / "run",)) == [[1, {"number": 1}]] * 2


def with_one_disk_full(folder: Path) -> list[str]:
    import resource

    from voxelstem import distributed

    trained = trainee("fsdp", 0)
    step(trained, 0)
    with Checkpoints(folder, keep=2) as written:
        written.save(1, trained.objective, trained.optimizer)
    try:
        with Checkpoints(folder, keep=2) as written:
            if distributed.here().rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            written.save(2, trained.objective, trained.optimizer)
    except CheckpointError as error:
        problem = error.problem
    else:
        problem = "none"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return [problem, *(path.name for path in checkpoints(folder))]


def test_when_the_disk_of_one_is_full_all_hear_of_it_and_nothing_is_committed(tmp_path: Path):
    one, other = run_together(with_one_disk_full, 2, tmp_path, (tmp_path / "run",))
    assert one == other
    assert "step-00000002" in one[0]
    assert "File too large" in one[0]
    assert one[1:] == ["step-00000001"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000001"]
