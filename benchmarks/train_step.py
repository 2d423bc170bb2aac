"""One DINO training step with equal losses: ours against the original package of SPECTRE (`spectre-fm`).

    python benchmarks/train_step.py [--repeats 5] [--batch 4] [--profile] [--quick]

A step is all of it: teacher and student forward, DINO (18 pairs of views), iBOT on the same masks and KoLeo on the cls
tokens of the global views, weighted 1 : 1 : 0.1, backward, clipping, AdamW, and the teacher's move. Both sides get the
same weights (`weights/spectre_names.py`), views and masks, and before anything is timed the script checks that they
agree on each loss and on the norm of the gradient. ViT of width 192 and depth 6, patch 16 x 16 x 8, two global views of
128 x 128 x 64 and eight local ones of 48 x 48 x 24, 8192 prototypes, no drop path, positions not moved.

The peer is made of its own classes (framework, heads, losses, EMA), as its training script puts them together. As
released it cannot take a step; what had to be patched is printed:

- its DINOLoss subtracts a module from a tensor: `Center.__rsub__` is given to it;
- its ViT with rotary positions refuses local views: `dynamic_img_size=True`;
- its KoLeo gets the backbone's cls tokens (its script gives it the logits of local views).

Sides take turns in one process; medians of clock and of processor time are printed. The peer runs at its default (fp32,
torch's own thread count, plain AdamW) and at its best of fp32 and bf16 autocast, one thread and two, plain and fused
AdamW. Run it alone on the machine, in the peers' environment (`benchmarks/requirements-peers.txt`).
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from spectre.models.vision_transformer import VisionTransformer
from spectre.ssl.frameworks import DINOv2
from spectre.ssl.losses import DINOLoss, KoLeoLoss, iBOTPatchLoss
from spectre.ssl.losses._center import Center
from spectre.utils.modeling import update_momentum
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.heads import Projector, ProjectorConfig
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.engine.device import autocast, bf16_pays
from voxelstem.engine.optim import OptimConfig, make_optimizer
from voxelstem.objectives.dino import Dino, DinoConfig
from voxelstem.protocols import Batch
from voxelstem.weights.spectre_names import to_theirs

HEADS = 2
GLOBAL, LOCAL, PATCH = (128, 128, 64), (48, 48, 24), (16, 16, 8)
PROJECTOR = ProjectorConfig(hidden=2048, bottleneck=256, prototypes=8192)
RATE, DECAY, CLIP, MOMENTUM = 1e-4, 0.04, 3.0, 0.992
TEACHER, STUDENT = 0.04, 0.1
"""Temperatures."""
GOAL = 1.6
AGREE = 1e-4
"""Relative difference that is allowed between the losses, and between the norms of the gradients."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One way to take a step."""

    name: str
    whose: str
    precision: str = "fp32"
    threads: int = 2
    fused: bool = False


@dataclass(kw_only=True, slots=True)
class Taken:
    """What one step said, and what it cost."""

    terms: dict[str, float]
    norm: float
    clock: float = 0.0
    processor: float = 0.0


@dataclass(kw_only=True, slots=True)
class Turns:
    """What came of a side's turns."""

    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def architecture() -> ScanVitConfig:
    return ScanVitConfig(
        patch_ijk=PATCH,
        block_ijk=GLOBAL,
        block=EncoderConfig(dim=192, depth=6, heads=HEADS, rope_base=1000.0),
        scan=EncoderConfig(dim=192, depth=0, heads=HEADS),
        inputs="unit",
    )


def make_batch(samples: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    views = {
        "global": torch.rand(samples, 2, 1, *GLOBAL, generator=generator),
        "local": torch.rand(samples, 8, 1, *LOCAL, generator=generator),
    }
    places = {name: torch.zeros(samples, view.shape[1], 2, 3) for name, view in views.items()}
    return Batch(views=views, places_mm=places, seed=1)


# ----------------------------------------------------------------------------------------------------------------- ours


class Ours:
    """Our objective with our optimiser."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = DinoConfig(
            projector=PROJECTOR,
            separate_heads=True,
            teacher_temperature_start=TEACHER,
            teacher_temperature_end=TEACHER,
            student_temperature=STUDENT,
            momentum_start=MOMENTUM,
            momentum_end=MOMENTUM,
        )
        self.objective = Dino(config, ScanVit(architecture()))
        optim = OptimConfig(lr=RATE, weight_decay=DECAY, clip_norm=CLIP)
        self.optimizer = make_optimizer(self.objective, self.objective.learner.param_groups(), optim)

    def step(self, batch: Batch, precision: str) -> tuple[dict[str, float], float]:
        with autocast(CPU, precision):
            output = self.objective.step(batch, progress=0.0)
        output.loss.backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(trained, CLIP))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_step(progress=0.0)
        terms = {name: output.scalars[f"loss/{name}"] for name in ("dino", "ibot", "koleo")}
        return terms | {"total": float(output.loss.detach())}, norm

    def masks(self, batch: Batch) -> Tensor:
        """The patches that a step on this batch hides, (view, patch): taken where the student is asked."""
        seen: list[Tensor] = []
        backbone = self.objective.learner
        real = backbone.encode

        def encode(*args: Any, masked: Tensor | None = None, **settings: Any) -> Any:
            if masked is not None:
                seen.append(masked[:, 0])
            return real(*args, masked=masked, **settings)

        backbone.encode = encode
        with torch.no_grad():
            self.objective.step(batch, progress=0.0)
        del backbone.encode
        return seen[0]


# ----------------------------------------------------------------------------------------------------------------- peer

# Patch 1: `tensor - center` meets a module; a right-hand minus is all that is missing.
Center.__rsub__ = lambda self, value: value - self.value


class Peer:
    """The peer's classes, put together as its script does, with our weights."""

    def __init__(self, ours: Ours, masks: Tensor, *, fused: bool) -> None:
        vit = VisionTransformer(
            img_size=GLOBAL,
            patch_size=PATCH,
            embed_dim=192,
            depth=6,
            num_heads=HEADS,
            num_classes=0,
            global_pool="",
            pos_embed="rope",
            rope_kwargs={"base": 1000.0},
            init_values=1.0,
            norm_layer=nn.LayerNorm,
            dynamic_img_size=True,  # patch 2
        )
        self.model = DINOv2(
            vit,
            192,
            PROJECTOR.hidden,
            PROJECTOR.bottleneck,
            PROJECTOR.prototypes,
            ibot_seperate_head=True,
            student_drop_path_rate=0.0,
        )
        self._take_weights(ours.objective)
        self.masks = torch.cat([torch.zeros(len(masks), 1, dtype=torch.bool), masks], dim=1)
        self.grids = masks.view(len(masks), *(size // patch for size, patch in zip(GLOBAL, PATCH, strict=True)))
        self.dino = DINOLoss(PROJECTOR.prototypes, TEACHER, TEACHER, student_temp=STUDENT)
        self.ibot = iBOTPatchLoss(PROJECTOR.prototypes, TEACHER, student_temp=STUDENT)
        self.koleo = KoLeoLoss()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=RATE, weight_decay=DECAY, betas=(0.9, 0.95), fused=fused or None
        )
        self.seen: list[Tensor] = []
        # Patch 3: what enters the student's head first are the cls tokens of the global views.
        self.model.head_student_dino.register_forward_pre_hook(lambda _, given: self.seen.append(given[0]))

    def _take_weights(self, objective: Dino) -> None:
        backbone, _ = to_theirs(objective.learner.state_dict(), architecture())
        for side in (self.model.backbone_student, self.model.backbone_teacher):
            side.vit.load_state_dict(backbone)
            side.mask_token.data.copy_(objective.learner.mask_token.data.view(1, 1, -1))
        heads = {"dino": objective.student.cls_head, "ibot": objective.student.patch_head}
        for name, head in heads.items():
            for side in ("student", "teacher"):
                getattr(self.model, f"head_{side}_{name}").load_state_dict(head_to_theirs(head))

    def step(self, batch: Batch, precision: str) -> tuple[dict[str, float], float]:
        globals_, locals_ = (batch.views[name].transpose(0, 1).flatten(0, 1) for name in ("global", "local"))
        samples = len(batch)
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            teacher, teacher_masked, student, student_masked = self.model(globals_, locals_, self.masks)
            cls = self.seen[0].split(samples)
            terms = {
                "dino": self.dino(list(teacher.split(samples)), list(student.split(samples)), teacher_temp=TEACHER),
                "ibot": self.ibot(teacher_masked, student_masked, self.grids, teacher_temp=TEACHER),
                "koleo": sum(self.koleo(view) for view in cls),
            }
            loss = terms["dino"] + terms["ibot"] + 0.1 * terms["koleo"]
        self.seen.clear()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.trained, CLIP))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for part in ("backbone", "head"):
            for head in ("",) if part == "backbone" else ("_dino", "_ibot"):
                update_momentum(
                    getattr(self.model, f"{part}_student{head}"), getattr(self.model, f"{part}_teacher{head}"), MOMENTUM
                )
        return {name: float(term.detach()) for name, term in terms.items()} | {"total": float(loss.detach())}, norm


def head_to_theirs(head: Projector) -> dict[str, Tensor]:
    state = head.state_dict()
    theirs = {f"layers.{name[4:]}": value for name, value in state.items() if name.startswith("mlp.")}
    prototypes = state["prototypes"]
    return theirs | {"last_layer.weight_v": prototypes, "last_layer.weight_g": torch.ones(len(prototypes), 1)}


# ---------------------------------------------------------------------------------------------------------------- turns


def turn(side: Side, step: Callable[[Batch, str], tuple[dict[str, float], float]], batch: Batch) -> Taken:
    torch.set_num_threads(side.threads)
    spent, began = time.process_time(), time.perf_counter()
    terms, norm = step(batch, side.precision)
    clock = time.perf_counter() - began
    return Taken(terms=terms, norm=norm, clock=clock, processor=time.process_time() - spent)


def check(ours: Taken, theirs: Taken) -> None:
    """Say what both make of the same weights, views and masks.

    Raises:
        SystemExit: they do not agree, so there is nothing to compare.
    """
    print(f"\n{'the same weights, views and masks':36} {'ours':>12} {'peer':>12} {'difference':>12}")
    pairs = {f"loss {name}": (ours.terms[name], theirs.terms[name]) for name in theirs.terms}
    pairs["norm of the gradient"] = (ours.norm, theirs.norm)
    apart = []
    for name, (mine, other) in pairs.items():
        print(f"{name:36} {mine:12.6f} {other:12.6f} {mine - other:12.1e}")
        if abs(mine - other) > AGREE * max(abs(other), 1e-3):
            apart.append(name)
    if apart:
        raise SystemExit(f"they do not agree on {', '.join(apart)}: these steps are not the same")


def sides(threads: int, *, quick: bool) -> list[Side]:
    """Ours first, then the peer's default, then what may be its best."""
    fast = "bf16" if bf16_pays(CPU) else "fp32"
    ours = [Side(name="ours, fp32", whose="ours", threads=threads)]
    if fast == "bf16":
        ours.append(Side(name="ours, bf16 autocast", whose="ours", precision="bf16", threads=threads))
    peer = [Side(name="peer, its default (fp32)", whose="peer", threads=threads)]
    if quick:
        return ours + peer
    for precision in ("fp32", "bf16") if fast == "bf16" else ("fp32",):
        for count in sorted({1, threads}):
            for fused in (False, True):
                if (precision, count, fused) != ("fp32", threads, False):
                    name = f"peer, {precision}, {count} thread{'s' * (count > 1)}{', fused AdamW' * fused}"
                    peer.append(Side(name=name, whose="peer", precision=precision, threads=count, fused=fused))
    return ours + peer


def compare(everyone: list[Side], steps: dict[str, Any], batch: Batch, repeats: int) -> None:
    """Let the sides take turns and print the medians."""
    turns = {side.name: Turns() for side in everyone}
    for repeat in range(repeats + 1):
        for side in everyone:
            taken = turn(side, steps[side.name], batch)
            if repeat:  # the first round warms up
                turns[side.name].clock.append(taken.clock)
                turns[side.name].processor.append(taken.processor)
    median = {name: statistics.median(found.clock) for name, found in turns.items()}
    ours = min((side.name for side in everyone if side.whose == "ours"), key=median.__getitem__)
    best = min((side.name for side in everyone if side.whose == "peer"), key=median.__getitem__)
    core = {name: statistics.median(found.processor) for name, found in turns.items()}
    print(
        f"\n{f'median of {repeats} turns':36} {'ms':>8} {'least':>8} {'core ms':>8} {'ours is':>9} {'by core ms':>11}"
    )
    for side in everyone:
        name = side.name
        print(
            f"{name:36} {1e3 * median[name]:8.0f} {1e3 * min(turns[name].clock):8.0f} {1e3 * core[name]:8.0f} "
            f"{median[name] / median[ours]:8.2f}x {core[name] / core[ours]:10.2f}x"
        )
    default = next(side.name for side in everyone if side.whose == "peer")
    for name, against in (("default", default), ("best", best)):
        ratio = median[against] / median[ours]
        print(f"{ours} against the peer's {name} ({against}): {ratio:.2f}x (goal {GOAL:g}x: ", end="")
        print("met)" if ratio >= GOAL else "MISSED)")


def show_floor(step: Callable[[Batch, str], Any], batch: Batch, threads: int) -> None:
    """Say how much of our step is arithmetic that no implementation can leave out."""
    torch.set_num_threads(threads)
    with FlopCounterMode(display=False) as counter:
        step(batch, "fp32")
    # The counter does not know the processor's attention: two products forward, five backward (one is computed again).
    tokens = math.prod(size // patch for size, patch in zip(GLOBAL, PATCH, strict=True)) + 1
    attention = 6 * 2 * len(batch) * 2 * tokens**2 * 192 * (2 + 2 + 5)
    one, other = torch.rand(4096, 768), torch.rand(768, 768)
    spent: list[float] = []
    for _ in range(20):
        began = time.perf_counter()
        torch.mm(one, other)
        spent.append(time.perf_counter() - began)
    rate = 2 * 4096 * 768 * 768 / min(spent)
    total = counter.get_total_flops() + attention
    print(
        f"\nour step is {total / 1e9:.0f} GFLOP; at the {rate / 1e9:.0f} GFLOP/s of a large fp32 product that is ",
        end="",
    )
    print(f"{1e3 * total / rate:.0f} ms, and no fp32 step on {threads} threads can be faster")


def show_profile(step: Callable[[Batch, str], Any], batch: Batch) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        step(batch, "fp32")
    print(found.key_averages(group_by_input_shape=True).table(sort_by="self_cpu_time_total", row_limit=30))
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))


def main() -> None:
    """Check that both sides do the same, then time them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--profile", choices=("ours", "peer"), help="say where the time of one step goes, and stop")
    parser.add_argument("--quick", action="store_true", help="only the peer's default")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"{platform.machine()}, bf16 in hardware: {bf16_pays(CPU)}, torch {torch.__version__}, batch {asked.batch}")
    print(f"spectre-fm {version('spectre-fm')}, patched: Center.__rsub__, dynamic_img_size=True, KoLeo on cls tokens")
    batch, ours = make_batch(asked.batch), Ours()
    masks = ours.masks(batch)
    hidden = int(masks.any(dim=1).sum())
    print(f"{int(masks.sum())} patches of {masks.numel()} hidden, in {hidden} of {len(masks)} global views")
    fused, plain = (Peer(ours, masks, fused=choice) for choice in (True, False))
    first = Side(name="", whose="", threads=asked.threads)
    check(turn(first, ours.step, batch), turn(first, plain.step, batch))
    if asked.profile:
        show_profile((ours if asked.profile == "ours" else plain).step, batch)
        return
    everyone = sides(asked.threads, quick=asked.quick)
    steps = {side.name: (ours if side.whose == "ours" else fused if side.fused else plain).step for side in everyone}
    compare(everyone, steps, batch, asked.repeats)
    show_floor(ours.step, batch, asked.threads)


if __name__ == "__main__":
    main()
