from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import re
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from voxelstem.errors import CheckpointError
from voxelstem.weights import foreign
from voxelstem.weights.foreign import LeftOut, below, fit, one_line, read_checkpoint, read_tensors

TENSORS = {"norm.weight": torch.arange(6.0).reshape(2, 3), "norm.bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}


def saved(path: Path, content: Any, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def same(found: dict[str, Tensor], wanted: dict[str, Tensor] = TENSORS) -> bool:
    return list(found) == list(wanted) and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


class Planted:
    """Asks the unpickler to make a file, as a harmful checkpoint would ask for worse."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


# --- what is read


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_torch_files_give_the_same_bits_in_their_order(tmp_path: Path, suffix: str, zipped: bool):
    assert same(read_tensors(saved(tmp_path / f"w{suffix}", TENSORS, zipped=zipped)))


def test_safetensors_give_the_same_bits(tmp_path: Path):
    save_file(TENSORS, tmp_path / "w.safetensors")
    found = read_tensors(tmp_path / "w.safetensors")
    assert same({name: found[name] for name in TENSORS})


def test_a_zipped_file_is_mapped_not_copied(tmp_path: Path):
    path, maps = saved(tmp_path / "w.pt", {"a": torch.zeros(1000)}), Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what is mapped")
    found = read_tensors(path)
    assert str(path) in maps.read_text()
    assert found["a"].sum() == 0


@pytest.mark.parametrize(
    "wrapped",
    [
        {"model": TENSORS, "optimizer": {"state": {}}, "epoch": 3},
        {"state_dict": OrderedDict(TENSORS)},
        {"model": {"state_dict": TENSORS}},
        {"student": {"other": torch.zeros(1)}, "teacher": TENSORS},
        {"teacher": {f"module.{name}": tensor for name, tensor in TENSORS.items()}},
        {f"module._orig_mod.{name}": tensor for name, tensor in TENSORS.items()},
        {f"model.{name}": tensor for name, tensor in TENSORS.items()},
        {"model": {f"model.module.{name}": tensor for name, tensor in TENSORS.items()}},
    ],
)
def test_weights_are_found_under_their_wrappers(tmp_path: Path, wrapped: Any):
    assert same(read_tensors(saved(tmp_path / "w.pt", wrapped)))


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path):
    some = {"model.a": torch.zeros(1), "b": torch.ones(1)}
    assert same(read_tensors(saved(tmp_path / "w.pt", some)), some)


def test_parameters_come_back_as_plain_tensors(tmp_path: Path):
    found = read_tensors(saved(tmp_path / "w.pt", {"a": nn.Parameter(torch.ones(2))}))
    assert not found["a"].requires_grad


def test_the_first_prefix_that_occurs_is_taken_off():
    tensors = {"teacher.a": torch.zeros(1), "student.a": torch.ones(1), "head": torch.ones(1)}
    assert below(tensors, ["average.", "teacher.", "student."]) == {"a": tensors["teacher.a"]}
    assert below(tensors, ["none."]) == {}


# --- what is refused


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["beside", "inside", "alone"])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, place: str, zipped: bool):
    mark = tmp_path / "was-run"
    content = {"beside": {"model": TENSORS, "args": Planted(mark)}, "inside": {"a": Planted(mark)}}
    path = saved(tmp_path / "w.pt", content.get(place, Planted(mark)), zipped=zipped)
    with pytest.raises(CheckpointError, match=r"'w\.pt' holds Python objects besides tensors \(posix\.system\)"):
        read_tensors(path)
    assert not mark.exists()
    # The trap is a real one: the unrestricted reader runs it.
    torch.load(path, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_bare_pickle_with_code_is_refused_and_never_run(tmp_path: Path, protocol: int):
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": Planted(tmp_path / "was-run")}, protocol=protocol))
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / "w.pt")
    assert not (tmp_path / "was-run").exists()


def test_harmless_python_objects_are_refused_by_name_too(tmp_path: Path):
    content = {"model": TENSORS, "args": argparse.Namespace(lr=1)}
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace.*\n.*save only the state_dict"):
        read_tensors(saved(tmp_path / "w.pt", content))


def test_a_missing_file_is_refused_without_naming_its_folder(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"there is no file 'w\.pt'") as error:
        read_tensors(tmp_path / "w.pt")
    assert tmp_path.name not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 0.9, 0.99])
def test_truncated_torch_files_are_refused(tmp_path: Path, keep: float, zipped: bool):
    path = saved(tmp_path / "w.pt", {"a": torch.rand(500), "b": torch.rand(500)}, zipped=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="damaged, cut short or not a checkpoint"):
        read_tensors(path)


@pytest.mark.parametrize("keep", [0, 7, 8, 30, -1])
def test_truncated_safetensors_are_refused(tmp_path: Path, keep: int):
    path = tmp_path / "w.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged, cut short"):
        read_tensors(path)


def lying(header: Any, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        lying({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        lying({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        lying({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}),
        lying({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        lying({"a": {"dtype": "what", "shape": [2], "data_offsets": [0, 8]}}),
        lying({"a": [1.0, 2.0]}),
        lying({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        lying({}, b""),
        lying(b"[" * 100_000),
        (2**63 - 1).to_bytes(8, "little") + b"{}",
        b"\xff" * 8 + b"{}",
        b"PK\x03\x04",
    ],
)
def test_safetensors_whose_header_lies_are_refused(tmp_path: Path, data: bytes):
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        read_tensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"a": torch.zeros(1), "epoch": 3}, r": epoch \(int\)"),
        ({"a": [torch.zeros(1)]}, r": a \(list\)"),
        ({1: torch.zeros(1)}, r": 1 \(not under a word\)"),
        ({"a": torch.eye(3).to_sparse()}, r": a \(torch\.sparse_coo"),
        ({"a": torch.zeros(3, device="meta")}, ": a .* on meta"),
        ({"a": torch.zeros(1).expand(10**12)}, r": a \(larger than the file\)"),
        (torch.zeros(3), " but a Tensor"),
        ([torch.zeros(3)], " but a list"),
        ({}, ": it is empty"),
        ({"model": {}}, ": it is empty"),
    ],
)
def test_whatever_is_not_a_set_of_named_tensors_is_refused(tmp_path: Path, content: Any, what: str):
    with pytest.raises(CheckpointError, match=f"is no set of named tensors{what}"):
        read_tensors(saved(tmp_path / "w.pt", content))


def test_a_mapping_that_holds_itself_ends(tmp_path: Path):
    content: dict[str, Any] = {}
    content["model"] = content
    with pytest.raises(CheckpointError, match="is no set of named tensors"):
        read_tensors(saved(tmp_path / "w.pt", content))


def test_a_compressed_archive_is_refused_before_it_unfolds(tmp_path: Path):
    plain = io.BytesIO()
    torch.save(TENSORS, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(tmp_path / "w.pt")


@pytest.mark.parametrize(("zipped", "limit"), [(True, "MOST_BYTES"), (False, "MOST_BYTES_READ")])
def test_files_larger_than_what_is_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, limit: str
):
    path = saved(tmp_path / "w.pt", TENSORS, zipped=zipped)
    monkeypatch.setattr(foreign, limit, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="more than the"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"<HTML>", "a web page"),
    ],
)
def test_what_a_download_brought_instead_of_weights_is_named(tmp_path: Path, data: bytes, what: str):
    (tmp_path / "w.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"is {what}, not weights"):
        read_tensors(tmp_path / "w.pt")


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 2**32 - 1), zipped=st.booleans())
def test_flipped_bytes_are_refused_or_read_but_never_crash(tmp_path_factory: Any, seed: int, zipped: bool):
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(12.0), "b": torch.arange(5)}, buffer, _use_new_zipfile_serialization=zipped)
    data, rng = bytearray(buffer.getvalue()), random.Random(seed)
    for _ in range(rng.choice((1, 2, 8))):
        data[rng.randrange(min(len(data), 1200))] = rng.randrange(256)
    path = tmp_path_factory.mktemp("flipped") / "w.pt"
    path.write_bytes(data)
    try:
        found = read_tensors(path)
    except CheckpointError:
        return
    assert all(np.isfinite(tensor.shape).all() and tensor.clone().nbytes <= len(data) for tensor in found.values())


# --- fit


def test_what_fits_passes():
    fit(TENSORS, {"norm.bias": (2,), "norm.weight": (2, 3)}, what="norm")


def test_everything_that_does_not_fit_is_said_at_once():
    found = {"a": torch.zeros(2, 3), "b": torch.zeros(1), "x": torch.zeros(1), "y": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        fit(found, {"a": (3, 2), "b": (1,), "c": (1,)}, what="backbone")
    assert error.value.problem == (
        "backbone: the file's 4 tensors are not the 3 that are needed"
        "\n  1 missing: c\n  2 unknown: x, y\n  1 of another shape: a (2, 3) instead of (3, 2)"
    )
    assert error.value.hint


def test_long_lists_are_counted_and_cut():
    with pytest.raises(CheckpointError, match=r"100 missing: .* and 92 more\n  50 unknown: .* and 42 more\n") as error:
        fit(
            {f"x{at}": torch.zeros(1) for at in range(50)},
            {f"layer.{at}.{'w' * 300}": (1,) for at in range(100)},
            what="w",
            hint="",
        )
    assert len(error.value.problem) < 2000


def test_a_hint_of_the_caller_s_own_is_kept():
    with pytest.raises(CheckpointError) as error:
        fit({}, {"a": (1,)}, what="w", hint="look elsewhere")
    assert error.value.hint == "look elsewhere"


def test_names_out_of_the_file_cannot_steer_the_terminal():
    with pytest.raises(CheckpointError) as error:
        fit({"\x1b[2J\nhidden": torch.zeros(1)}, {}, what="w")
    assert "\x1b" not in error.value.problem
    assert error.value.problem.count("\n") == 1


# --- training scripts' own files


def test_a_training_s_file_gives_its_weights_and_what_lies_beside(tmp_path: Path):
    path = saved(tmp_path / "w.ckpt", {"weights": TENSORS, "epoch": 3, "plan": {"spacing": [1, 1, 1]}})
    found = read_checkpoint(path, ("absent", "weights"))
    assert same(found.tensors)
    assert found.beside == {"epoch": 3, "plan": {"spacing": [1, 1, 1]}}
    assert found.left_out == ()


def test_bare_and_nested_weights_are_taken_for_the_weights(tmp_path: Path):
    for number, content in enumerate((TENSORS, {"model": TENSORS})):
        assert same(read_checkpoint(saved(tmp_path / f"{number}.pt", content), ("weights",)).tensors)


def test_python_objects_beside_the_weights_are_named_and_never_made(tmp_path: Path):
    content = {"weights": TENSORS, "settings": argparse.Namespace(lr=np.float64(0.1)), "path": Path("secret")}
    found = read_checkpoint(saved(tmp_path / "w.ckpt", content), ("weights",))
    assert same(found.tensors)
    assert "argparse.Namespace" in found.left_out
    assert isinstance(found.beside["settings"], LeftOut)
    assert isinstance(found.beside["path"], LeftOut)


class Settings(dict[str, Any]):
    """A mapping of somebody's own, as training scripts keep their settings in."""


class Names(list[str]):
    """A list of somebody's own."""


class Weights(OrderedDict[str, Tensor]):
    """Weights in a container of somebody's own."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("factory", [None, dict, float, int, list, set, str, tuple, OrderedDict], ids=str)
def test_containers_of_the_standard_library_are_read_wherever_they_stand(tmp_path: Path, factory: Any, zipped: bool):
    settings = {"weights": defaultdict(factory, TENSORS), "plan": defaultdict(factory, a=[1]), "n": Counter("aab")}
    path = saved(tmp_path / "w.ckpt", settings, zipped=zipped)
    found = read_checkpoint(path, ("weights",))
    assert same(found.tensors)
    assert found.beside == {"plan": {"a": [1]}, "n": {"a": 2, "b": 1}}
    assert found.left_out == ()
    assert type(found.beside["plan"]) is dict, "asking it for what it lacks makes nothing"
    assert same(read_tensors(saved(tmp_path / "w.pt", defaultdict(factory, model=TENSORS), zipped=zipped)))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        {"weights": TENSORS, "args": argparse.Namespace(), "odd": Settings(lr=1)},
        {"weights": TENSORS, "odd": Names(["a", "b"])},
        {"weights": TENSORS, "odd": Names(["a"])},
        {"weights": Weights(TENSORS)},
        Settings(weights=TENSORS),
    ],
    ids=["mapping", "list", "list-of-one", "weights", "whole"],
)
def test_a_container_of_somebody_s_own_class_is_refused_by_its_name(tmp_path: Path, content: Any, zipped: bool):
    path = saved(tmp_path / "w.ckpt", content, zipped=zipped)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, ("weights",))
    named = "Namespace" if "args" in content and not zipped else r"test_foreign\.(Settings|Names|Weights)"
    assert re.search(rf"Python objects besides tensors \([\w.]*{named}\), which could run any code", str(caught.value))
    assert "save only the state_dict" in str(caught.value)


def test_python_objects_among_the_weights_are_refused(tmp_path: Path):
    path = saved(tmp_path / "w.ckpt", {"weights": TENSORS | {"odd": argparse.Namespace()}})
    with pytest.raises(CheckpointError, match="odd"):
        read_checkpoint(path, ("weights",))


@pytest.mark.parametrize("call", [os.system, eval, exec, __import__, getattr])
def test_what_could_run_a_program_is_refused_by_name(tmp_path: Path, call: Any):
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return call, ("1",)

    path = saved(tmp_path / "w.ckpt", {"weights": TENSORS, "x": Harmful()})
    with pytest.raises(CheckpointError, match=call.__name__) as caught:
        read_checkpoint(path, ("weights",))
    assert "nothing of it was run" in str(caught.value)


def test_words_of_a_file_become_one_short_line():
    assert one_line("a\n\tb\x1b[31m  c") == "a b [31m c"
    assert len(one_line("x " * 9000)) <= 400
