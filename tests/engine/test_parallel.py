from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_together
from torch import Tensor

from voxelstem import distributed
from voxelstem.backbones.disentangled import Disentangled, DisentangledConfig
from voxelstem.backbones.encoder import Encoder, EncoderConfig
from voxelstem.backbones.heads import ProjectorConfig
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.backbones.trajectory import TrajectoryConfig
from voxelstem.backbones.unet import UNet, UNetConfig
from voxelstem.engine.optim import OptimConfig
from voxelstem.engine.parallel import ParallelConfig, Trainee
from voxelstem.errors import ConfigError
from voxelstem.objectives.anatomy import Anatomy, AnatomyConfig
from voxelstem.objectives.dino import Dino, DinoConfig
from voxelstem.objectives.disentangle import Disentangle, DisentangleConfig
from voxelstem.objectives.longitudinal import Longitudinal, LongitudinalConfig
from voxelstem.objectives.mae import Mae, MaeConfig
from voxelstem.protocols import Batch
from voxelstem.testing import make_batch as make_pairs

CPU = torch.device("cpu")
STEPS, SAMPLES = 3, 8
EQUAL = 1e-5
FACTOR = 8
DDP, FSDP = ParallelConfig(), ParallelConfig(kind="fsdp")
DINO, SINKHORN = {"centring": "softmax"}, {"centring": "sinkhorn"}
CASES = {
    "dino ddp": (DINO, DDP),
    "dino fsdp": (DINO, replace(FSDP, recompute=True)),
    "sinkhorn ddp": (SINKHORN, replace(DDP, recompute=True)),
    "mae ddp": (None, DDP),
    "mae ddp accumulate": (None, replace(DDP, accumulate=2)),
    "mae fsdp accumulate": (None, replace(FSDP, accumulate=2)),
}


def make(dino: dict[str, Any] | None) -> Any:
    """MAE, or DINO with these settings: iBOT and KoLeo on, branches left out, and a scan level that learns nothing."""
    size = EncoderConfig(dim=12, depth=2, heads=2, drop_path=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = ScanVit(ScanVitConfig(patch_ijk=(4, 4, 4), block_ijk=(8, 8, 8), block=size, scan=size))
        if dino is None:
            return Mae(MaeConfig(decoder=EncoderConfig(dim=12, depth=1, heads=2)), backbone)
        objective = Dino(
            DinoConfig(projector=ProjectorConfig(hidden=12, bottleneck=8, prototypes=16), **dino), backbone
        )
    with torch.no_grad():
        # A fresh network tells samples hardly apart, and what compares them has gradients of the order of 1000.
        for name, parameter in objective.named_parameters():
            parameter.mul_(FACTOR if name.endswith("weight") and parameter.ndim > 1 else 1)
    return objective


def make_batch(step: int) -> Batch:
    """This process's share of the whole batch of a step."""
    noise = torch.Generator().manual_seed(step)
    cells = torch.rand(SAMPLES, 2, 1, 2, 2, 2, generator=noise)
    # Patches that differ as a whole: samples that look alike are pushed apart by KoLeo with all its might.
    smooth = cells.repeat_interleave(4, 3).repeat_interleave(4, 4).repeat_interleave(4, 5)
    views = {"global": smooth, "local": smooth[:, :, :, :4, :4]}
    places = torch.rand(SAMPLES, 2, 2, 3, generator=noise) * 100
    whole = Batch(views=views, places_mm=dict.fromkeys(views, places), seed=step)
    here = distributed.here()
    return whole.part(here.rank * SAMPLES // here.count, (here.rank + 1) * SAMPLES // here.count)


def make_trainee(dino: dict[str, Any] | None, config: ParallelConfig, precision: str = "fp32") -> Trainee:
    return Trainee(make(dino), OptimConfig(lr=1e-3), config, device=CPU, precision=precision)


def take_steps(trainee: Trainee, start: int = 0) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Train; what every step said, and its gradients."""
    said: list[dict[str, float]] = []
    gradients: dict[str, Tensor] = {}
    for step in range(start, STEPS):
        output = trainee.backward(make_batch(step), progress=step / STEPS)
        for name, parameter in trainee.objective.named_parameters():
            if parameter.grad is not None:
                gradients[f"{name} of step {step}"] = whole(parameter.grad).clone()
        said.append({"loss": float(output.loss), "norm": trainee.clip(0.5)} | output.scalars)
        trainee.update()
        trainee.objective.after_step(progress=step / STEPS)
    return said, gradients


def whole(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value.detach()


def whole_state(objective: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in objective.state_dict().items()}


def held(trainee: Trainee) -> int:
    """Numbers that this process holds: weights and the optimiser's state."""
    tensors: list[Any] = [*trainee.objective.parameters()]
    tensors += [value for state in trainee.optimizer.state.values() for value in state.values() if value.ndim]
    return sum((value.to_local() if hasattr(value, "to_local") else value).numel() for value in tensors)


def train(dino: dict[str, Any] | None, config: ParallelConfig, precision: str = "fp32") -> dict[str, Any]:
    trainee = make_trainee(dino, config, precision)
    view = make_batch(0).views["global"][:1, 0]
    seen = [trainee.look(lambda: trainee.objective.backbone.encode_blocks(view)[0])]
    said, gradients = take_steps(trainee)
    seen.append(trainee.look(lambda: trainee.objective.backbone.encode_blocks(view)[0]))
    state = whole_state(trainee.objective)
    return {"said": said, "gradients": gradients, "state": state, "seen": seen, "held": held(trainee)}


def train_all(names: list[str], precision: str = "fp32") -> dict[str, Any]:
    return {name: train(*CASES[name], precision=precision) for name in names}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference; of a tensor that holds numbers above 1, as a share of its largest."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max().clamp(1)) for name in one)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes made of every case."""
    return run_together(train_all, 2, tmp_path_factory.mktemp("two"), (list(CASES),))


@pytest.fixture(scope="module")
def one() -> Callable[[str], dict[str, Any]]:
    """What one process makes of a case, with the whole batch in one piece."""
    done: dict[str, Any] = {}

    def alone(name: str) -> dict[str, Any]:
        kind = name.partition(" ")[0]
        if kind not in done:
            done[kind] = train(CASES[name][0], DDP)
        return done[kind]

    return alone


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_losses_of_one(name: str, one: Any, two: Any):
    for expected, seen in zip(one(name)["said"], two[0][name]["said"], strict=True):
        assert seen == pytest.approx(expected, abs=EQUAL, rel=EQUAL)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradients_of_one(name: str, one: Any, two: Any):
    assert len(one(name)["gradients"]) > STEPS * 20
    assert furthest(two[0][name]["gradients"], one(name)["gradients"]) <= EQUAL


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_weights_teacher_and_centres_of_one(name: str, one: Any, two: Any):
    assert furthest(two[0][name]["state"], one(name)["state"]) <= EQUAL


@pytest.mark.parametrize("name", CASES)
def test_both_processes_end_with_the_same_bits(name: str, two: Any):
    mine, theirs = two[0][name], two[1][name]
    assert mine["said"] == theirs["said"]
    assert furthest(mine["state"], theirs["state"]) == 0.0


def test_training_moved_what_is_compared(one: Any):
    done = one("dino ddp")
    start = make(DINO).state_dict()
    assert furthest(done["state"], start) > 1e-3
    assert all(float(done["state"][f"{name}_centre"].abs().max()) > 1e-3 for name in ("cls", "patch"))


def test_sharded_processes_hold_half_of_weights_and_optimiser_each(one: Any, two: Any):
    for name in ("dino fsdp", "mae fsdp accumulate"):
        both = [answer[name]["held"] for answer in two]
        assert sum(both) == one(name)["held"]
        assert max(both) < 0.55 * sum(both)
    assert [answer["mae ddp"]["held"] for answer in two] == [one("mae ddp")["held"]] * 2


@pytest.mark.parametrize("name", ["dino ddp", "dino fsdp"])
def test_a_look_between_steps_sees_the_whole_network(name: str, one: Any, two: Any):
    for expected, seen in zip(one(name)["seen"], two[0][name]["seen"], strict=True):
        assert torch.allclose(expected, seen, atol=EQUAL)


def test_micro_batches_of_one_process_give_the_step_of_the_whole_batch(one: Any):
    done = train(None, replace(DDP, accumulate=4))
    assert furthest(done["gradients"], one("mae ddp")["gradients"]) <= EQUAL
    assert done["said"][-1] == pytest.approx(one("mae ddp")["said"][-1], abs=EQUAL)


BRAINS = ("anatomy", "disentangle", "longitudinal")
ROWS = torch.arange(SAMPLES)[:, None]


def make_brain(name: str) -> Any:
    """An objective with all terms that rest on what is known of some scans only; none that compares samples."""
    edge, ours = (8, 8, 8), {"columns": 3, "mask_ratio": 0.5, "background": "ignored", "pathology_weight": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "longitudinal":
            trajectory = TrajectoryConfig(hidden=8, columns=3)
            pairs = Disentangled(DisentangledConfig(width=4, levels=2, latent=6, block_ijk=edge))
            return Longitudinal(LongitudinalConfig(identity=0.0, trajectory=trajectory), pairs)
        network = UNet(UNetConfig(features=(4, 10), depths=(1, 1), strides=(1, 2), block_ijk=edge))
        if name == "anatomy":
            return Anatomy(AnatomyConfig(mask_block=4, visible_weight=0.5, **ours), network)
        more = {"masked_weight": 1.0, "anatomy_weight": 1.0, "name_weight": 1.0}
        return Disentangle(DisentangleConfig(latent=6, **more, **ours), network)


def make_labelled() -> Batch:
    """This process's share of pairs of which little is known, and not as much in each micro-batch."""
    made = make_pairs((8, 8, 8), samples=SAMPLES)
    targets = made.targets | {
        "pathology": torch.where(ROWS == 5, 1.0, torch.nan),
        "volumes": torch.where(ROWS < 3, made.targets["volumes"].nan_to_num(0.5), torch.nan),
        "volumes_other": torch.where(ROWS < 4, made.targets["volumes"].flip(0).nan_to_num(0.5), torch.nan),
        "contrast": torch.where(ROWS < 2, torch.nan, made.targets["contrast"]),
        "copy": ((ROWS == 0) | (ROWS > 5)).float(),
        "years": torch.where(ROWS == 1, torch.nan, 0.3 * (ROWS + 1)),
    }
    views = {"global": made.views["global"][:, :1], "other": made.views["other"].clone()}
    views["other"][2, ..., :5] = 0.0
    # Doubles: gradients of biases before a norm are what rounding leaves of sums that cancel.
    whole = replace(
        made,
        views={name: view.double() for name, view in views.items()},
        targets={name: values.double() for name, values in targets.items()},
    )
    here = distributed.here()
    return whole.part(here.rank * SAMPLES // here.count, (here.rank + 1) * SAMPLES // here.count)


def one_backward(name: str, accumulate: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The loss and its terms, and gradients; counts are of the whole batch."""
    trainee = Trainee(
        make_brain(name).double(), OptimConfig(), replace(DDP, accumulate=accumulate), device=CPU, precision="fp32"
    )
    output = trainee.backward(make_labelled(), progress=0.5)
    parts = accumulate * distributed.here().count
    said = {name: value * (parts if name.startswith("known/") else 1) for name, value in output.scalars.items()}
    said.pop("loss/identity", None)  # compares samples within a micro-batch, and weighs nothing here
    gradients = {name: each.grad for name, each in trainee.objective.named_parameters() if each.grad is not None}
    return said | {"loss": float(output.loss)}, gradients


def both_ways() -> list[tuple[dict[str, float], dict[str, Tensor]]]:
    return [one_backward(name, accumulate) for name in BRAINS for accumulate in (1, 2)]


@pytest.mark.parametrize("name", BRAINS)
def test_what_is_known_of_some_samples_weighs_alike_in_micro_batches(name: str):
    said, gradients = one_backward(name, 1)
    assert 0 < min(value for term, value in said.items() if term.startswith("known/"))
    cut, others = one_backward(name, 4)
    assert cut == pytest.approx(said, rel=1e-6, abs=1e-6)
    assert furthest(others, gradients) <= 1e-6


@pytest.mark.parametrize("name", BRAINS)
def test_an_objective_counts_what_its_terms_rest_on(name: str):
    objective, batch = make_brain(name).double(), make_labelled()
    known = {term: float(count) for term, count in objective.known(batch).items()}
    scalars = objective.step(batch, progress=0.5).scalars
    assert known == {term: scalars[f"known/{term}"] for term in known}
    constant = {name.removeprefix("known/") for name in scalars if name.startswith("known/")} - known.keys()
    halves = [objective.step(batch.part(at, at + 4), progress=0.5).scalars for at in (0, 4)]
    assert all(halves[0][f"known/{term}"] == halves[1][f"known/{term}"] for term in constant), "all have as many"


@pytest.mark.slow
def test_what_is_known_of_some_samples_weighs_alike_in_processes(tmp_path: Path):
    together = run_together(both_ways, 2, tmp_path)[0]
    for (said, gradients), name in zip(together, [name for name in BRAINS for _ in (1, 2)], strict=True):
        alone, others = one_backward(name, 1)
        assert said == pytest.approx(alone, rel=1e-6, abs=1e-6)
        assert furthest(gradients, others) <= 1e-6


def test_recomputing_changes_no_gradient(one: Any):
    objective = make(DINO)
    Trainee(objective, OptimConfig(), replace(DDP, recompute=True), device=CPU, precision="fp32")
    assert all(module.recompute for module in objective.modules() if isinstance(module, Encoder))
    done = train(DINO, replace(DDP, recompute=True))
    assert furthest(done["gradients"], one("dino ddp")["gradients"]) <= 1e-7


def test_a_dropped_step_leaves_nothing():
    trainee, other = make_trainee(DINO, DDP), make_trainee(DINO, DDP)
    trainee.backward(make_batch(7), progress=0.0)
    trainee.drop()
    assert all(parameter.grad is None for parameter in trainee.objective.parameters())
    take_steps(trainee)
    take_steps(other)
    assert furthest(whole_state(trainee.objective), whole_state(other.objective)) == 0.0


def test_a_gradient_is_clipped_to_the_norm_asked_for():
    trainee = make_trainee(None, DDP)
    trainee.backward(make_batch(0), progress=0.0)
    before = trainee.clip(0.01)
    assert before > 0.02
    assert trainee.clip(0.01) == pytest.approx(0.01, rel=1e-3)


def test_a_loss_that_is_not_a_number_comes_back_as_one():
    trainee = make_trainee(None, DDP)
    batch = make_batch(0)
    batch.views["global"][0] = torch.nan
    assert not trainee.backward(batch, progress=0.0).loss.isfinite()


def test_a_share_that_micro_batches_do_not_fill_is_refused():
    with pytest.raises(ConfigError, match=r"8 samples .* 3 micro-batches"):
        make_trainee(None, replace(DDP, accumulate=3)).backward(make_batch(0), progress=0.0)


@pytest.mark.parametrize("setting", ["recompute", "compile"])
def test_a_network_without_transformer_blocks_is_refused(setting: str):
    with pytest.raises(ConfigError, match=f"parallel.{setting} is for networks made of transformer blocks"):
        Trainee(
            torch.nn.Linear(2, 2),
            OptimConfig(),
            ParallelConfig(**{setting: True}),
            device=CPU,
            precision="fp32",
        )


def test_no_compiler_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        make_trainee(None, replace(DDP, compile=True))


@pytest.mark.parametrize("wrong", [{"kind": "zero"}, {"accumulate": 0}, {"timeout_s": 0.0}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ParallelConfig(**wrong)


@pytest.mark.slow
def test_four_processes_are_as_good_as_two(tmp_path: Path, one: Any):
    four = run_together(train_all, 4, tmp_path, (list(CASES),), timeout_s=400)
    for name in CASES:
        assert furthest(four[3][name]["gradients"], one(name)["gradients"]) <= EQUAL
        assert furthest(four[3][name]["state"], one(name)["state"]) <= EQUAL


def resume_in_the_middle(kind: str) -> float:
    config = replace(DDP, kind=kind)
    through, first, second = (make_trainee(DINO, config) for _ in range(3))
    take_steps(through)
    trained = make_batch(0)
    first.backward(trained, progress=0.0)
    first.clip(0.5)
    first.update()
    first.objective.after_step(progress=0.0)
    second.objective.load_state_dict(first.objective.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    take_steps(second, start=1)
    return furthest(whole_state(through.objective), whole_state(second.objective))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_four_processes_that_resume_add_in_the_same_order(kind: str, tmp_path: Path):
    assert run_together(resume_in_the_middle, 4, tmp_path, (kind,), timeout_s=300) == [0.0] * 4


@pytest.mark.slow
def test_bf16_trains_close_to_fp32_and_keeps_whole_weights(tmp_path: Path, one: Any):
    names = ["mae ddp", "mae fsdp accumulate", "dino fsdp"]
    low = run_together(train_all, 2, tmp_path, (names, "bf16"), timeout_s=300)
    for name in names:
        expected = one(name)["said"][-1]["loss"]
        assert low[0][name]["said"][-1]["loss"] == pytest.approx(expected, rel=0.03)
        assert low[0][name]["said"][-1]["loss"] != expected
        assert torch.allclose(low[0][name]["seen"][0].float(), one(name)["seen"][0], atol=0.1)
        assert {value.dtype for value in low[0][name]["state"].values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler here")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_compiled_blocks_give_the_same_step(kind: str, tmp_path: Path, one: Any):
    config = replace(DDP, kind=kind, compile=True)
    (done, _) = run_together(train, 2, tmp_path, (DINO, config), timeout_s=500)
    assert furthest(done["gradients"], one("dino ddp")["gradients"]) <= EQUAL
