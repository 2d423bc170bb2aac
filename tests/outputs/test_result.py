from __future__ import annotations

import hashlib

import numpy as np
import pytest
from tests.clinic import WEIGHTS, findings

from voxelstem.errors import ConfigError
from voxelstem.outputs import OUTPUTS
from voxelstem.outputs.result import Mask, Result, keep, named
from voxelstem.study import LabelMap


def mask(array, affine=None, classes=None):
    made = LabelMap(array=array, classes=classes or {1: "liver"})
    return Mask(labels=made, affine_ras=np.eye(4) if affine is None else affine, weights=WEIGHTS)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: mask(np.zeros((2, 2), np.int16)), "3 axes of whole numbers"),
        (lambda: mask(np.zeros((2, 2, 2), np.float32)), "3 axes of whole numbers"),
        (lambda: mask(np.full((2, 2, 2), 2, np.int16)), "holds 2, which no class"),
        (lambda: mask(np.zeros((2, 2, 2), np.int16), np.zeros((4, 4))), "no extent"),
        (lambda: mask(np.full((2, 2, 2), 40_000, np.uint16), classes={40_000: "liver"}), "up to 32767, got 40000"),
    ],
)
def test_a_label_map_that_no_output_could_write_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("output", ["nifti", "seg"])
def test_an_output_of_label_maps_says_so_where_there_is_none(tmp_path, output):
    with pytest.raises(ConfigError, match=f"'{output}' needs a label map"):
        OUTPUTS[output](Result(findings=findings()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_uids_are_fresh_where_no_test_counts_them():
    made = Result(findings=findings())
    assert made.new_uid() != made.new_uid()


def test_a_name_is_made_of_the_content():
    assert named("seg", b"abc") == f"seg-{hashlib.sha256(b'abc').hexdigest()[:16]}"


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    assert keep(tmp_path / "new" / "a.bin", b"abc").read_bytes() == b"abc"

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        keep(tmp_path / "new" / "b.bin", b"abc")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.bin"]
