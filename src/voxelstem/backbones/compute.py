"""Chooses by measurement how a backbone is computed here: as it is, lean, compiled, or by OpenVINO.

Every way must first show that it gives the reference's numbers; the fastest of those that do is taken.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from voxelstem.backbones.lean import Form, Kernel, LeanVit
from voxelstem.backbones.scan_vit import ScanVit
from voxelstem.errors import ConfigError
from voxelstem.table import closest

Precision = Literal["fp32", "bf16"]
Way = Literal["reference", "lean", "compiled", "openvino"]
Tokens = tuple[Tensor, Tensor]
Encode = Callable[[Tensor], Tokens]

MOST_ERROR = {"fp32": 1e-5, "bf16": 1e-2}
"""Of max|a - b| / max|b|, b being the reference in fp32."""
ROOM = 1 << 30
"""Bytes that a process may take beside 1.5 times its weights. OpenVINO keeps copies of its own, so large weights are
given to it only when it is named."""
WORTH: Mapping[Way, float] = {"reference": 0.75, "lean": 1.0, "compiled": 0.9, "openvino": 0.9}
"""Part of lean's time that a way may take to be chosen. The reference does the same work with more around it: where it
seems faster, the machine was busy with something else. The others keep copies of the weights."""
BEGIN_SECONDS = 5.0
"""About what OpenVINO takes to build its network, longer for deeper ones."""
_SHORT, _REPEATS = 0.5, 2
MOST_ABREAST = 8
"""Blocks that are computed side by side: as many as a pass has."""
"""Seconds above which one measurement is enough, and how many are made below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """One way and what came of it."""

    name: Way
    seconds_per_block: float | None = None
    relative_error: float | None = None
    """max|a - b| / max|b| over cls and patch tokens of one block, against the reference in fp32."""
    note: str = ""
    """Why it was not measured or not allowed; empty otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """A backbone's block level in the form that was chosen for this machine."""

    encode: Encode
    name: Way
    precision: Precision
    """In which it really computes: OpenVINO answers in fp32 where the processor has no bf16."""
    seconds_per_block: float
    relative_error: float
    tried: tuple[Tried, ...]

    @torch.inference_mode()
    def encode_blocks(
        self, blocks: Float[Tensor, "row channel i j k"]
    ) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row patch dim"]]:
        """Cls and patch tokens of each block (windowed to [0, 1]), fp32, on the blocks' device."""
        cls, patches = self.encode(blocks)
        return cls.to(blocks.device, torch.float32), patches.to(blocks.device, torch.float32)


@torch.inference_mode()
def choose(
    backbone: nn.Module,
    *,
    precision: Precision = "fp32",
    block_ijk: tuple[int, int, int],
    compile: bool = False,  # noqa: A002  the word of the command line
    only: Way | Literal["auto"] = "auto",
    blocks_ahead: int = 0,
    device: str | torch.device = "cpu",
) -> Compute:
    """Measure the ways to compute one block of `block_ijk` voxels and take the fastest exact one.

    `backbone` is in evaluation mode, on the device. `compile` adds `compiled` to the ways; `only` names a single one.
    `blocks_ahead` is about how many blocks are waiting: OpenVINO takes seconds to begin, so it is only tried where
    they can be won back, or where it is named. bf16 is tried wherever it is asked for: on a processor without it the
    result is right and late.

    Raises:
        ConfigError: no such way, precision or device; a way that this machine or backbone does not offer; or none
            that keeps the error bound of the precision.
    """
    where = _check(precision, only, device)
    trial = _Trial(
        backbone=backbone,
        precision=precision,
        device=where,
        block=_sample(backbone, block_ijk).to(where),
        blocks_ahead=blocks_ahead,
    )
    tried: list[Tried] = []
    made: dict[Way, _Made] = {}
    for name in _ways(backbone, compile=compile, only=only):
        reason = _missing(name, trial, named=name in {only, "compiled"})
        if reason:
            tried.append(Tried(name=name, note=reason))
            continue
        made[name] = _make(name, trial)
        tried.append(trial.judge(name, made[name]))
    return _fastest(made, tried, precision)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    """A way made ready, and the precision it really computes in."""

    encode: Encode
    precision: Precision


@dataclass(kw_only=True)
class _Trial:
    """What the ways are measured on."""

    backbone: nn.Module
    precision: Precision
    device: torch.device
    block: Tensor
    blocks_ahead: int
    wanted: Tokens = field(init=False)
    """Of the reference in fp32."""
    reference_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        found, first = self._timed(lambda blocks: _encode(self.backbone, blocks))
        self.reference_seconds = min(first, self._timed(lambda blocks: _encode(self.backbone, blocks))[1])
        self.wanted = found[0], found[1]

    def judge(self, name: Way, made: _Made) -> Tried:
        """Run it once for its error, and again for its time unless that was long enough to be sure."""
        if name == "reference" and self.precision == "fp32":
            return Tried(name=name, seconds_per_block=self.reference_seconds, relative_error=0.0)
        found, first = self._timed(made.encode)
        error = relative_error(found, self.wanted)
        if error > MOST_ERROR[self.precision]:
            return Tried(name=name, relative_error=error, note=f"errs by more than {MOST_ERROR[self.precision]:g}")
        seconds = [first] if first >= _SHORT else [self._timed(made.encode)[1] for _ in range(_REPEATS)]
        return Tried(name=name, seconds_per_block=min(seconds), relative_error=error)

    def _timed(self, encode: Encode) -> tuple[Tokens, float]:
        begin = time.perf_counter()
        found = encode(self.block)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return found, time.perf_counter() - begin


def relative_error(found: Tokens, wanted: Tokens) -> float:
    """max|a - b| / max|b|, the larger of both tensors'; infinite where something is not a number."""
    largest = [float(part.abs().max()) for part in wanted]
    apart = [float((one.float() - other.float()).abs().max()) for one, other in zip(found, wanted, strict=True)]
    # A comparison with what is not a number is never true, so max() would pass over it.
    if not all(largest) or not all(map(math.isfinite, [*apart, *largest])):
        return math.inf
    return max(error / most for error, most in zip(apart, largest, strict=True))


def _check(precision: str, only: str, device: str | torch.device) -> torch.device:
    if precision not in MOST_ERROR:
        raise ConfigError(f"there is no precision '{precision}'", hint=closest(precision, list(MOST_ERROR)))
    if only not in (known := ["auto", *get_args(Way)]):
        raise ConfigError(f"there is no way '{only}' to compute a backbone", hint=closest(only, known))
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, and torch sees no GPU here", hint="choose device cpu")
    return where


def _sample(backbone: nn.Module, block_ijk: tuple[int, int, int]) -> Tensor:
    """One block of noise about slow waves: neither constant nor without likeness between neighbours."""
    config: Any = getattr(backbone, "config", None)
    draw = torch.Generator().manual_seed(0)
    axes = [torch.linspace(0, 6, size).sin() for size in block_ijk]
    waves = axes[0][:, None, None] * axes[1][:, None] * axes[2] * 0.3 + 0.5
    noise = torch.rand(getattr(config, "channels", 1), *block_ijk, generator=draw)
    return (waves + 0.2 * (noise - 0.5))[None]


def _encode(backbone: Any, blocks: Tensor) -> Tokens:
    cls, patches = backbone.encode_blocks(blocks)
    return cls, patches


def _ways(backbone: nn.Module, *, compile: bool, only: str) -> list[Way]:  # noqa: A002
    if only != "auto":
        return [way for way in get_args(Way) if way == only]
    lean = isinstance(backbone, ScanVit)
    wanted = {"reference": True, "lean": lean, "compiled": compile, "openvino": lean}
    return [way for way in get_args(Way) if wanted[way]]


def _missing(name: Way, trial: _Trial, *, named: bool) -> str:
    """Why this way cannot be gone here; empty if it can. Someone who named it gets an error instead."""
    backbone, device = trial.backbone, trial.device
    reason, hint = "", ""
    if name in ("lean", "openvino") and not isinstance(backbone, ScanVit):
        reason, hint = f"a {type(backbone).__name__} has no {name} form", "leave the choice to `auto`"
    elif name == "openvino" and device.type != "cpu":
        reason, hint = "openvino computes on the processor only", "choose device cpu"
    elif name == "openvino" and importlib.util.find_spec("openvino") is None:
        reason, hint = "openvino is not installed", "pip install 'voxelstem[cpu]'"
    elif name == "openvino" and not named:
        return _not_worth(trial)
    elif name == "compiled" and device.type == "cpu" and not _has_compiler():
        reason, hint = "torch.compile needs a C++ compiler, and there is none", "install g++, or leave compile out"
    if reason and named:
        raise ConfigError(reason, hint=hint)
    return reason


def _not_worth(trial: _Trial) -> str:
    """Why OpenVINO is not tried unasked."""
    size = sum(parameter.nbytes for parameter in trial.backbone.parameters())
    if 2 * size > ROOM:
        return f"it would keep copies of {size / 1e9:.1f} GB of weights"
    if trial.blocks_ahead * trial.reference_seconds * (1 - WORTH["openvino"]) < BEGIN_SECONDS:
        return f"{trial.blocks_ahead} blocks would not win back the seconds it takes to begin"
    return ""


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name)


def _make(name: Way, trial: _Trial) -> _Made:
    backbone, precision, device = trial.backbone, trial.precision, trial.device
    if name == "openvino":
        return _openvino(backbone, trial)
    if name == "reference" or not isinstance(backbone, ScanVit):

        def reference(blocks: Tensor) -> Tokens:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                return _encode(backbone, blocks.to(device))

        return _Made(encode=torch.compile(reference) if name == "compiled" else reference, precision=precision)
    # Kernels of bf16 and of GPUs want head dimensions of a multiple of 8; fp32 on a CPU is faster without.
    wants_eight = precision == "bf16" or device.type == "cuda"
    form = Form(
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        device=device,
        head_multiple=8 if wants_eight else 1,
        half_split=name == "compiled",
    )
    lean = LeanVit(backbone, form).eval()
    if name == "compiled":
        quick = torch.compile(lean)
        return _Made(encode=lambda blocks: quick(blocks.to(device)), precision=precision)
    _settle_kernel(lean, trial)
    if device.type == "cpu":
        return _Made(encode=_Abreast(lean), precision=precision)
    return _Made(encode=lambda blocks: lean(blocks.to(device)), precision=precision)


class _Abreast:
    """Computes the blocks of a pass side by side, each by threads of its own.

    By all threads together, one block after the other, each product ends with all threads waiting for the last: a tenth
    to a sixth slower on two cores, and far more where something else is running.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.threads = torch.get_num_threads()
        self.abreast = min(self.threads, MOST_ABREAST)
        self.pool: ThreadPoolExecutor | None = None

    def __call__(self, blocks: Tensor) -> Tokens:
        if self.abreast == 1 or len(blocks) == 1:
            return self.network(blocks)
        if self.pool is None:
            self.pool = self._begun()
        parts = list(self.pool.map(self._one, blocks.split(1)))
        return torch.cat([cls for cls, _ in parts]), torch.cat([patches for _, patches in parts])

    @torch.inference_mode()
    def _one(self, block: Tensor) -> Tokens:
        return self.network(block)

    def _begun(self) -> ThreadPoolExecutor:
        """Threads that have their number of helpers. Torch keeps it for each thread, and the last set for new ones."""
        there = threading.Barrier(self.abreast)

        def begin(_: int) -> None:
            torch.set_num_threads(self.threads // self.abreast)
            there.wait()

        pool = ThreadPoolExecutor(self.abreast, thread_name_prefix="block")
        list(pool.map(begin, range(self.abreast)))
        torch.set_num_threads(self.threads)
        return pool


def _settle_kernel(lean: LeanVit, trial: _Trial) -> None:
    """Take the faster attention for blocks of this size, measured on one layer."""
    sizes = [size // patch for size, patch in zip(trial.block.shape[-3:], lean.patch_ijk, strict=True)]
    table = lean.table((sizes[0], sizes[1], sizes[2]))
    config = lean.encoder.config
    first: Any = next(iter(lean.encoder.blocks), None)
    if first is None:
        return
    tokens = 1 + config.registers + sizes[0] * sizes[1] * sizes[2]
    seen = torch.randn(1, tokens, config.dim, generator=torch.Generator().manual_seed(0))
    seen = seen.to(lean.form.device, lean.form.dtype)
    kernels: tuple[Kernel, ...] = get_args(Kernel)
    spent = dict.fromkeys(kernels, math.inf)
    for _ in range(_REPEATS):
        for kernel in kernels:
            first.kernel = kernel
            begin = time.perf_counter()
            first.attend(seen, table)
            if trial.device.type == "cuda":
                torch.cuda.synchronize(trial.device)
            spent[kernel] = min(spent[kernel], time.perf_counter() - begin)
    # The fused one needs less memory: the other must be worth it.
    lean.encoder.set_kernel("plain" if spent["plain"] < WORTH["compiled"] * spent["fused"] else "fused")


def _openvino(backbone: Any, trial: _Trial) -> _Made:
    import openvino

    lean = LeanVit(backbone, Form(half_split=True)).eval()
    network = openvino_network(lean, trial.block)
    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if trial.precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled: Any = openvino.Core().compile_model(network, "CPU", hints)
    # Without bf16 in the processor it computes in fp32, and says so.
    real = compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16

    def encode(blocks: Tensor, _owner: nn.Module = lean) -> Tokens:
        found = compiled([blocks.float().contiguous().numpy()])
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    return _Made(encode=encode, precision="bf16" if real else "fp32")


def openvino_network(module: nn.Module, *example: Tensor) -> Any:
    """The module as an `openvino.Model`; the first axis of the first input may have any length, as may its outputs'.

    Its constants may be the module's own memory, so that must live as long. OpenVINO must be installed.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    # An example of one row would be taken for the only possible length.
    many = (torch.cat([example[0], example[0]]), *example[1:])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's tracer, about sizes that do not change here
        traced: Any = torch.jit.trace(module, many, check_trace=False)
    # By hand, since openvino.convert_model tells its makers over the network about every model that it sees.
    front: Any = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced)  # must live until the end
    return front.convert(front.load(decoder))


def _fastest(made: dict[Way, _Made], tried: list[Tried], precision: Precision) -> Compute:
    measured = {entry.name: entry for entry in tried if entry.seconds_per_block is not None}
    if not measured:
        said = "; ".join(f"{entry.name} {entry.note} ({entry.relative_error:.1e})" for entry in tried)
        raise ConfigError(f"no {precision} computation of these weights is exact enough: {said}", hint="choose fp32")

    def cost(entry: Tried) -> float:
        assert entry.seconds_per_block is not None
        return entry.seconds_per_block / WORTH[entry.name]

    best = min(measured.values(), key=cost)
    assert best.seconds_per_block is not None
    assert best.relative_error is not None
    return Compute(
        encode=made[best.name].encode,
        name=best.name,
        precision=made[best.name].precision,
        seconds_per_block=best.seconds_per_block,
        relative_error=best.relative_error,
        tried=tuple(tried),
    )
