"""A label map as NIfTI-1, on the grid of the volume, and the names of its classes in JSON beside it."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Image

from voxelstem.findings import NOTICE, SOFTWARE, STATUS
from voxelstem.outputs.result import Mask, Result, Written, keep, named
from voxelstem.pieces import present

SCHEMA = "voxelstem.labels/1"
MOST_SHORT = np.iinfo(np.uint8).max


def write(result: Result, folder: Path, *, before: Sequence[Written] = ()) -> Written:  # noqa: ARG001 - all have it
    """Write the label map to `labels-<digest>.nii.gz` and its class names to `labels-<digest>.json`.

    The same label map gives the same bytes. Its affine is RAS+ in millimetres and stands in the sform and in the
    qform, both as scanner coordinates (code 1).

    Args:
        result: What was found; it must hold a label map.
        folder: Where to; made where it is absent.
        before: What other outputs wrote of the same result.

    Raises:
        ConfigError: there is no label map.
    """
    mask = result.need_mask("nifti")
    packed = encode(mask, version=result.findings.version)
    stem = named("labels", packed)
    image = keep(folder / f"{stem}.nii.gz", packed)
    names = {
        "schema": SCHEMA,
        "mask": image.name,
        "sha256": hashlib.sha256(packed).hexdigest(),
        "classes": {str(value): name for value, name in sorted(mask.labels.classes.items())},
        "weights": asdict(mask.weights),
        "software": SOFTWARE,
        "version": result.findings.version,
        "status": STATUS,
        "notice": NOTICE,
    }
    beside = keep(folder / f"{stem}.json", f"{json.dumps(names, ensure_ascii=False, indent=1)}\n".encode())
    seen = present(mask.labels.array)
    absent = tuple(name for value, name in sorted(mask.labels.classes.items()) if value not in seen)
    return Written(output="nifti", files=(image, beside), left_out=absent)


def encode(mask: Mask, *, version: str) -> bytes:
    """A label map as the bytes of a `.nii.gz`: one byte a voxel where its classes fit, otherwise two."""
    most = max([int(mask.labels.array.max(initial=0)), *mask.labels.classes])
    kind = np.uint8 if most <= MOST_SHORT else np.int16
    image = Nifti1Image(mask.labels.array.astype(kind), mask.affine_ras)
    image.header.set_xyzt_units("mm")
    image.header.set_intent("label")
    image.header["descrip"] = f"{SOFTWARE} {version}: {STATUS}; not a medical device"[:79].encode("ascii", "replace")
    image.set_qform(mask.affine_ras, code=1)
    image.set_sform(mask.affine_ras, code=1)
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)  # no clock: the same mask, the same bytes
