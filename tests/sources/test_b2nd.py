from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest

from voxelstem.errors import IngestError
from voxelstem.sources import b2nd, raster, read, read_labels
from voxelstem.sources.b2nd import pack

AFFINE = np.array([[1.0, 0, 0, -30], [0, 1.5, 0, 4], [0, 0, 2.0, 5], [0, 0, 0, 1]])
SHAPE = (20, 17, 9)


def ct() -> np.ndarray:
    """Air and water, so that it is taken for a CT."""
    array = np.full((1, *SHAPE), -1000.0, np.float32)
    array[0, 4:16, 4:13, 2:7] = np.random.default_rng(0).integers(0, 80, (12, 9, 5))
    return array


def mr() -> np.ndarray:
    return np.random.default_rng(1).normal(0, 1, (1, *SHAPE)).astype(np.float32)


def save(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def foreign(path: Path, array: np.ndarray, place: Any = None) -> Path:
    """A file as nnU-Net writes it, (channel, z, y, x) and nothing else, with a .json beside it."""
    blosc2.asarray(np.ascontiguousarray(array), urlpath=str(path), mode="w")
    if place is not None:
        path.with_suffix(".json").write_text(place if isinstance(place, str) else json.dumps(place))
    return path


def code(path: Path) -> str:
    with pytest.raises(IngestError) as refused:
        b2nd.read(path, subject="s")
    return refused.value.code


@pytest.mark.parametrize(("array", "modality"), [(ct(), "CT"), (mr(), "MR")], ids=["CT", "MR"])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path, array: np.ndarray, modality: str) -> None:
    path = save(tmp_path / "x.b2nd", pack(array, AFFINE, modality))
    volume = read(path).volumes[0]
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_array_equal(volume.affine_ras, AFFINE)
    assert (volume.modality, volume.provenance.source_format) == (modality, "b2nd")


def test_the_axes_run_as_nnunet_has_them(tmp_path: Path) -> None:
    path = save(tmp_path / "x.b2nd", pack(ct(), AFFINE, "CT"))
    stored: Any = blosc2.open(str(path))
    assert stored.shape == (1, 9, 17, 20)
    np.testing.assert_array_equal(stored[0], ct()[0].transpose(2, 1, 0))


def test_equal_voxels_give_equal_bytes() -> None:
    assert pack(mr(), AFFINE, "MR") == pack(mr().copy(order="F"), AFFINE, "MR")


def test_masks_are_read_and_what_nnunet_marks_as_outside_is_background(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(-1, 3, (1, *SHAPE)).astype(np.int8)
    grid = read_labels(save(tmp_path / "x_seg.b2nd", pack(labels, AFFINE, "CT")))
    np.testing.assert_array_equal(grid.array, np.maximum(labels[0], 0))
    np.testing.assert_array_equal(grid.affine_ras, AFFINE)


def test_a_foreign_file_is_placed_by_the_json_beside_it(tmp_path: Path) -> None:
    array = mr().transpose(0, 3, 2, 1)
    path = foreign(tmp_path / "x.b2nd", array, {"affine_ras": AFFINE.tolist(), "modality": "MR"})
    volume = read(path).volumes[0]
    np.testing.assert_array_equal(volume.array, mr())
    np.testing.assert_array_equal(volume.affine_ras, AFFINE)
    assert "may be normalised" in volume.provenance.notes[0]


def test_a_foreign_file_without_a_place_is_refused_and_its_pickle_stays_shut(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = foreign(tmp_path / "x.b2nd", mr())
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Trap()))
    assert code(path) == "bad-affine"
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "place",
    [
        "",
        "[",
        "[" * 100_000,
        "{}",
        "[1]",
        '"x"',
        {"affine_ras": AFFINE.tolist()},
        {"affine_ras": AFFINE.tolist(), "modality": "PT"},
        {"affine_ras": AFFINE[:3].tolist(), "modality": "MR"},
        {"affine_ras": (AFFINE + np.eye(4, k=1)).tolist(), "modality": "MR"},
        {"affine_ras": [["x"] * 4] * 4, "modality": "MR"},
        {"affine_ras": [[float("nan")] * 4] * 4, "modality": "MR"},
        " " * (2**20 + 1),
    ],
)
def test_a_place_that_is_none_is_refused(tmp_path: Path, place: Any) -> None:
    assert code(foreign(tmp_path / "x.b2nd", mr().transpose(0, 3, 2, 1), place)) == "bad-affine"


def test_a_ct_that_was_normalised_is_refused(tmp_path: Path) -> None:
    normalised = (ct() - ct().mean()) / ct().std()
    path = foreign(
        tmp_path / "x.b2nd", normalised.transpose(0, 3, 2, 1), {"affine_ras": AFFINE.tolist(), "modality": "CT"}
    )
    assert code(path) == "not-hu"


def test_a_ct_that_is_called_an_mr_is_refused(tmp_path: Path) -> None:
    assert code(save(tmp_path / "x.b2nd", pack(ct(), AFFINE, "MR"))) == "wrong-modality"


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (np.zeros((9, 17, 20), np.float32), "not-3d"),
        (np.zeros((2, 9, 17, 20), np.float32), "not-3d"),
        (np.zeros((1, 1, 17, 20), np.float32), "not-3d"),
        (np.zeros((1, 9, 17, 20), np.complex64), "unsupported-dtype"),
        (np.zeros((1, 9, 17, 20), bool), "unsupported-dtype"),
        (np.zeros((1, 9, 17, 20), np.float32), "constant"),
        (np.full((1, 9, 17, 20), np.nan, np.float32), "not-finite"),
    ],
)
def test_what_is_no_scan_is_refused(tmp_path: Path, array: np.ndarray, wanted: str) -> None:
    assert code(foreign(tmp_path / "x.b2nd", array, {"affine_ras": AFFINE.tolist(), "modality": "MR"})) == wanted


def test_a_declared_size_is_capped_before_a_voxel_is_unpacked(tmp_path: Path) -> None:
    blosc2.zeros((1, 2000, 2000, 2000), np.float32, urlpath=str(tmp_path / "bomb.b2nd"), mode="w")
    assert (tmp_path / "bomb.b2nd").stat().st_size < 10_000
    assert code(tmp_path / "bomb.b2nd") == "too-large"


def test_an_expression_that_blosc2_would_run_is_refused(tmp_path: Path) -> None:
    operand = blosc2.asarray(mr(), urlpath=str(tmp_path / "a.b2nd"), mode="w")
    (operand + 1).save(urlpath=str(tmp_path / "lazy.b2nd"))
    assert code(tmp_path / "lazy.b2nd") == "corrupt"


def test_changed_voxels_of_our_own_files_are_found(tmp_path: Path) -> None:
    path = save(tmp_path / "x.b2nd", pack(mr(), AFFINE, "MR"))
    opened: Any = blosc2.open(str(path), mode="a")
    opened[0, 3, 3, 3] = opened[0, 3, 3, 3] + 1
    with pytest.raises(IngestError, match="not those that were written"):
        b2nd.read(path, subject="s")


def test_a_changed_place_of_our_own_files_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.b2nd"
    data = pack(mr(), AFFINE, "MR")
    assert data.count(b"-30.0") == 1
    with pytest.raises(IngestError, match="not those that were written"):
        b2nd.read(save(path, data.replace(b"-30.0", b"-20.0")), subject="s")


_FUZZ = """
import sys
from pathlib import Path
import numpy as np
from voxelstem.errors import IngestError
from voxelstem.sources import b2nd
path = Path(sys.argv[1])
content = path.read_bytes()
whole = b2nd.read(path, subject="s").volumes[0]
rng, found = np.random.default_rng(3), 0
for number in range(300):
    data = bytearray(content)
    if number % 10 == 9:
        del data[int(rng.integers(0, len(data))):]
    else:
        data[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
    path.write_bytes(data)
    try:
        volume = b2nd.read(path, subject="s").volumes[0]
        assert np.array_equal(volume.array, whole.array) and np.array_equal(volume.affine_ras, whole.affine_ras)
    except IngestError:
        found += 1
print(found)
"""


def test_a_flip_or_cut_anywhere_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "x.b2nd", pack(mr(), AFFINE, "MR"))
    # In a process of its own: a decoder in C that is led astray may take the process with it.
    done = subprocess.run([sys.executable, "-c", _FUZZ, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 200


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    assert code(tmp_path / "x.b2nd") == "missing"
    assert code(save(tmp_path / "y.b2nd", b"")) == "corrupt"
    assert raster.MOST_BYTES < 2000**3 * 4
