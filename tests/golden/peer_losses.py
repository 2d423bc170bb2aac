"""Ask `lightly` and `spectre-fm` for their losses and keep the answers in `losses.npz`.

    python tests/golden/peer_losses.py                  # in the peers' environment

spectre-fm 0.2.1's DINOLoss takes a module from a tensor and raises TypeError at the first step; the one line that
lets it run stands in `mended`. All else is asked as it was released.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.loss.swav_loss import sinkhorn
from spectre.ssl import losses as spectre
from spectre.ssl.losses._center import Center

sys.path.insert(0, str(Path(__file__).parent))

import losses as cases


def mended() -> type:
    """spectre-fm's DINOLoss, with a centre that can be taken from logits."""
    Center.__rsub__ = lambda self, other: other - self.value
    return spectre.DINOLoss


def dino(kind: type) -> dict[str, Any]:
    """Losses and the student's gradients of some steps, and the centre after them."""
    settings = {"student_temp": cases.STUDENT_TEMPERATURE, "center_momentum": cases.CENTRE_MOMENTUM}
    loss, answers = kind(output_dim=cases.PROTOTYPES, **settings), {}
    for step, temperature in enumerate(cases.TEMPERATURES):
        teacher, student = cases.seen(step)
        student.requires_grad_()
        value = loss(list(teacher), list(student), teacher_temp=temperature)
        value.backward()
        answers |= {f"loss/{step}": value, f"gradient/{step}": student.grad}
    centre = getattr(loss.center, "value", loss.center)
    return answers | {"centre": centre.flatten()}


def ibot(kind: type, grid: tuple[int, ...]) -> dict[str, Any]:
    """The same for hidden patches; lightly knows images only, so it is told of a flat grid."""
    settings = {"student_temp": cases.STUDENT_TEMPERATURE, "center_momentum": cases.CENTRE_MOMENTUM}
    loss, answers = kind(output_dim=cases.PROTOTYPES, **settings), {}
    masked = cases.masks().unflatten(1, grid)
    for step, temperature in enumerate(cases.TEMPERATURES):
        teacher, student = cases.behind(step)
        student.requires_grad_()
        value = loss(teacher, student, masked, teacher_temp=temperature)
        value.backward()
        answers |= {f"loss/{step}": value, f"gradient/{step}": student.grad}
    return answers | {"centre": loss.center.value.flatten()}


def koleo(kind: type) -> dict[str, Any]:
    """Loss and gradient."""
    rows = cases.embeddings().requires_grad_()
    value = kind()(rows)
    value.backward()
    return {"loss": value, "gradient": rows.grad}


def gram() -> dict[str, Any]:
    """Every way with negatives, for each view and for the whole batch."""
    ways = {"keep": (False, False), "drop": (True, False), "drop_teacher": (False, True)}
    answers = {}
    for way, (both, teacher_only) in ways.items():
        for level in ("view", "batch"):
            student, teacher = cases.patches()
            student.requires_grad_()
            loss = spectre.GramLoss(remove_neg=both, remove_only_teacher_neg=teacher_only)
            value = loss(student, teacher, img_level=level == "view")
            value.backward()
            answers |= {f"{way}/{level}/loss": value, f"{way}/{level}/gradient": student.grad}
    return answers


def balanced() -> dict[str, Any]:
    """SwaV's Sinkhorn, which DINOv2 took over."""
    logits = cases.behind(0)[0]
    return {f"{t}/{rounds}": sinkhorn(logits, iterations=rounds, epsilon=t) for t, rounds in cases.SINKHORN}


def siglip() -> dict[str, Any]:
    """Loss and all gradients, at several temperatures and biases."""
    answers = {}
    for at, (temperature, bias) in enumerate(cases.SIGLIP):
        image, text = (side.requires_grad_() for side in cases.pairs())
        loss = spectre.SigLIPLoss(init_t=temperature, init_b=bias)
        value = loss(image, text)
        value.backward()
        gradients = {"image": image.grad, "text": text.grad, "temperature": loss.t.grad, "bias": loss.b.grad}
        answers |= {f"{at}/loss": value} | {f"{at}/{name}": gradient for name, gradient in gradients.items()}
    return answers


def main() -> None:
    """Ask all of them."""
    i, j, k = cases.GRID
    asked = {
        "lightly/dino": dino(DINOLoss),
        "spectre/dino": dino(mended()),
        "lightly/ibot": ibot(IBOTPatchLoss, (i, j * k)),
        "spectre/ibot": ibot(spectre.iBOTPatchLoss, (i, j, k)),
        "lightly/koleo": koleo(KoLeoLoss),
        "spectre/koleo": koleo(spectre.KoLeoLoss),
        "spectre/gram": gram(),
        "spectre/siglip": siglip(),
        "lightly/sinkhorn": balanced(),
    }
    arrays = {
        f"{who}/{name}": torch.as_tensor(answer).detach().numpy()
        for who, answers in asked.items()
        for name, answer in answers.items()
    }
    versions = {f"version/{name}": np.array(version(name)) for name in ("lightly", "spectre-fm", "torch")}
    np.savez_compressed(cases.ANSWERS, **arrays, **versions)


if __name__ == "__main__":
    main()
