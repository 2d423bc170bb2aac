"""Checkpoints that others wrote: tensors come in, code never does."""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from voxelstem.errors import CheckpointError

MOST_BYTES = 64 * 2**30
"""Of a file that is mapped; no checkpoint that we know comes near it."""
MOST_BYTES_READ = 8 * 2**30
"""Of a file in torch's old format, which cannot be mapped and so is read into memory whole."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What weights may be written in; formats of 8 bits need scales beside them."""
_WRAPPERS = ("teacher", "model", "state_dict", "model_state_dict")
"""Entries under which training scripts keep the weights, the averaged ones first."""
_WRAPPING = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, torch.compile and the Hub's model classes put before every name."""
_MOST_NAMES = 8
"""How many names of one kind an error lists before it only counts."""
_MOST_LETTERS = 80
_LONGEST_WORDS = 400
_BUILTINS = ("builtins", "__builtin__")
_PLAIN = frozenset(
    ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "range", "set", "str", "tuple")
)
_RUNNERS = frozenset(
    (
        *(*_BUILTINS, "code", "codeop", "commands", "ctypes", "importlib", "marshal", "multiprocessing", "nt", "os"),
        *("pdb", "pickle", "pip", "posix", "pty", "pydoc", "runpy", "shutil", "socket", "subprocess", "sys", "timeit"),
        *("urllib", "webbrowser"),
    )
)
"""Modules that run programs or reach out; what names one of them was not written by a training script. Nothing of a
file is imported anyway: this list only decides whether the rest of it is believed."""
_MODULE = "left_out"
"""Said to be the module of what stands in for the objects of a file."""
_STATE_DICT = "give a file that holds only the weights (a state_dict)"
# What torch.load and the unpickler below it raise for bytes that are damaged or meant to harm; found by flipping bytes.
_UNREADABLE = (
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    EOFError,
    ImportError,
    MemoryError,
    OSError,
    SafetensorError,
    UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a training script saved."""

    tensors: dict[str, Tensor]
    """The weights, by name."""
    beside: Mapping[str, Any]
    """The file's other entries: plain values, tensors, and `LeftOut` in place of any other object."""
    left_out: tuple[str, ...] = ()
    """Names of the classes and functions whose objects were not made."""


class LeftOut:
    """Stands where a file has an object that is neither a tensor nor plain: takes anything, keeps and does nothing."""

    def __new__(cls, *_args: object) -> LeftOut:
        """Forget whatever the object was to be made of."""
        return super().__new__(cls)

    def __setstate__(self, _state: object) -> None:
        """Forget whatever the object held."""


def _plain_dict(*_factory: object) -> dict[Any, Any]:
    return {}


_STAND_INS = {
    "collections.defaultdict": _plain_dict,
    **{f"builtins.{name}": LeftOut for name in ("dict", "float", "int", "list", "str", "tuple")},
}
"""For containers of the standard library that hold no code: what is made in their place. A defaultdict becomes a dict;
the class that would make its missing values is named in the file, and is not needed."""


def read_checkpoint(path: Path, weights: Sequence[str]) -> Checkpoint:
    """Read a training script's own file: the tensors under the first of the entries `weights` that it has.

    Settings, callbacks and the like, which such files hold as Python objects, become `LeftOut`: none of their classes
    is imported and none of their functions called. A file that has none of the entries is taken for bare weights.

    Raises:
        CheckpointError: as `read_tensors`; or the file names a function that runs programs.
    """
    found, size, left_out = _read(path, lenient=True)
    if not isinstance(found, Mapping) or not any(isinstance(found.get(name), Mapping) for name in weights):
        found = {weights[0]: _unwrap(path, found)}
    name = next(name for name in weights if isinstance(found.get(name), Mapping))
    tensors = found[name]
    _check_tensors(path, tensors, size)
    return Checkpoint(
        tensors=_without_wrapping({key: tensor.detach() for key, tensor in tensors.items()}),
        beside={str(key): value for key, value in found.items() if key != name},
        left_out=left_out,
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.pt`, `.pth` or `.safetensors` file, mapped rather than copied where the format allows.

    A pickle is read by torch's restricted reader: one that names anything but tensors and plain containers is
    refused, never executed. Weights nested in {'model': ...}, {'state_dict': ...} or {'teacher': ...} are taken out,
    and a prefix that wraps every name (`module.`, `model.`) is taken off.

    Raises:
        CheckpointError: absent, too large, damaged, with code in it, or holding something else than tensors.
    """
    found, size, _ = _read(path, lenient=False)
    tensors = _unwrap(path, found)
    _check_tensors(path, tensors, size)
    return _without_wrapping({name: tensor.detach() for name, tensor in tensors.items()})


def below(tensors: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, Tensor]:
    """The entries under the first of the `prefixes` that occurs, without it; empty where none does."""
    for prefix in prefixes:
        if found := {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}:
            return found
    return {}


def fit(found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], *, what: str, hint: str = "") -> None:
    """Check that `found` has exactly the names and shapes that are `wanted`; `what` names the weights in the error.

    Raises:
        CheckpointError: it has not. Says at once what is missing, what is unknown and what has another shape.
    """
    odd = {
        "missing": [_shown(name) for name in wanted if name not in found],
        "unknown": [_shown(name) for name in found if name not in wanted],
        "of another shape": [
            f"{name} {tuple(found[name].shape)} instead of {shape}"
            for name, shape in wanted.items()
            if name in found and tuple(found[name].shape) != shape
        ],
    }
    if not any(odd.values()):
        return
    lines = [f"\n  {len(names)} {kind}: {_listed(names)}" for kind, names in odd.items() if names]
    raise CheckpointError(
        f"{what}: the file's {len(found)} tensors are not the {len(wanted)} that are needed{''.join(lines)}",
        hint=hint or "these weights belong to another architecture or size, or the file is not whole",
    )


def check_finite(files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Check that the tensors of some files, by the files' names, hold finite numbers and nothing else.

    Raises:
        CheckpointError: some do not; one is named.
    """
    odd = [
        f"{file}: {_shown(name)}"
        for file, tensors in files.items()
        for name, tensor in tensors.items()
        if not (tensor.dtype in FLOATS and bool(tensor.isfinite().all()))
    ]
    if odd:
        raise CheckpointError(
            f"{len(odd)} tensors hold something else than finite numbers, such as {odd[0]}",
            hint="the training that wrote this checkpoint went astray, or the file is damaged",
        )


def one_line(text: object) -> str:
    """What a file says of itself, made fit for a card: one line of at most 400 letters, no control characters."""
    said = "".join(letter if letter.isprintable() else " " for letter in str(text)[: 4 * _LONGEST_WORDS])
    return " ".join(said.split())[:_LONGEST_WORDS]


def _read(path: Path, *, lenient: bool) -> tuple[Any, int, tuple[str, ...]]:
    """What a file holds, its bytes, and with `lenient` the names of what was left out of it."""
    if not path.is_file():
        raise CheckpointError(f"there is no file '{path.name}'", hint="check the name, or download it first")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
    zipped = head.startswith(b"PK\x03\x04")
    _check_size(path, size, most=MOST_BYTES if zipped or _is_safetensors(path) else MOST_BYTES_READ)
    _check_start(path, head)
    try:
        if _is_safetensors(path):
            return load_file(path), size, ()
        left_out = _unknown(path) if lenient and zipped else ()
        return _unpickle(path, zipped=zipped, left_out=left_out), size, left_out
    except _UNREADABLE as error:
        raise _refusal(path, error) from error


def _unknown(path: Path) -> tuple[str, ...]:
    """The names in a file of what is neither a tensor nor plain; found without running anything of it.

    Raises:
        CheckpointError: one of them runs programs.
    """
    _check_stored(path)
    names = tuple(sorted({*get_unsafe_globals_in_checkpoint(str(path))} - {*_STAND_INS}))
    runs = [name for name in names if _runs(*name.rpartition(".")[::2])]
    if runs:
        raise CheckpointError(
            f"'{path.name}' calls {_listed([_shown(name) for name in runs])}, which no weights need and which could "
            f"run any code; nothing of it was run and nothing was read",
            hint="do not open this file with anything else, and ask its publisher for the weights as .safetensors",
        )
    return names


def _runs(module: str, name: str) -> bool:
    """Whether a name belongs to what runs programs or reaches out."""
    root = module.partition(".")[0]
    return root in _RUNNERS and not (root in _BUILTINS and name in _PLAIN)


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _check_size(path: Path, size: int, *, most: int) -> None:
    if size > most:
        raise CheckpointError(
            f"'{path.name}' has {size / 2**30:.1f} GiB, more than the {most / 2**30:g} GiB that are read",
            hint="is it a checkpoint with optimizer state? Extract the weights, as .safetensors",
        )


def _check_start(path: Path, head: bytes) -> None:
    """Say so where a download fetched something else than the weights."""
    if head.startswith(b"version https://"):
        problem, hint = "a Git LFS pointer", "fetch the file itself: git lfs pull"
    elif head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        problem, hint = "a web page", "download it again; the address gives a page, or asks for a login"
    else:
        return
    raise CheckpointError(f"'{path.name}' is {problem}, not weights", hint=hint)


def _unpickle(path: Path, *, zipped: bool, left_out: Iterable[str] = ()) -> Any:
    if zipped:
        _check_stored(path)
    # A class for each name, so that a refusal can say which one it was.
    others = {name: type(name, (LeftOut,), {"__module__": _MODULE}) for name in left_out}
    with warnings.catch_warnings(), safe_globals([(made, name) for name, made in {**_STAND_INS, **others}.items()]):
        # It warns of pickle protocols that it may not know, before it refuses them.
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _check_stored(path: Path) -> None:
    """Torch stores without compression: what is compressed could unfold to more than the memory holds."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("an entry is compressed")


def _refusal(path: Path, error: BaseException) -> CheckpointError:
    if code := re.search(rf"GLOBAL ([\w.]+)|'{_MODULE}\.([\w.]+)'", str(error)):
        named = (code[1] or code[2])[:_MOST_LETTERS]
        return CheckpointError(
            f"'{path.name}' holds Python objects besides tensors ({named}), which could run any "
            f"code; nothing of it was run and nothing was read",
            hint="ask for the weights as .safetensors, or save only the state_dict where you trust the file",
        )
    return CheckpointError(
        f"'{path.name}' is damaged, cut short or not a checkpoint ({type(error).__name__})",
        hint="download it again and compare its sha256 with the source's",
    )


def _unwrap(path: Path, found: Any) -> Mapping[Any, Any]:
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"'{path.name}' is no set of named tensors but a {type(found).__name__}", hint=_STATE_DICT
        )
    # Once for each wrapper and no more: a pickle can hold a mapping that holds itself.
    for _ in _WRAPPERS:
        inner = [found[name] for name in _WRAPPERS if isinstance(found.get(name), Mapping)]
        found = inner[0] if inner else found
    return found


def _check_tensors(path: Path, tensors: Mapping[Any, Any], size: int) -> None:
    """Only dense tensors under words, each no larger than the file: strides can promise more than is there."""
    odd = [
        f"{_shown(name)} ({_kind(name, value)})"
        for name, value in tensors.items()
        if not isinstance(name, str) or not _is_dense(value) or value.nbytes > size
    ]
    if odd or not tensors:
        raise CheckpointError(
            f"'{path.name}' is no set of named tensors: {_listed(odd) or 'it is empty'}",
            hint=_STATE_DICT,
        )


def _is_dense(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _kind(name: Any, value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    if not _is_dense(value):
        return f"{value.layout}, on {value.device}"
    return "larger than the file" if isinstance(name, str) else "not under a word"


def _without_wrapping(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in _WRAPPING:
        for prefix in _WRAPPING:
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _listed(names: list[str]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _shown(name: Any) -> str:
    """A name out of somebody's file, made fit for a terminal."""
    return ascii(str(name)[:_MOST_LETTERS])[1:-1]
