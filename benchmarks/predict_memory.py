"""How much memory a prediction holds: a scan of 512 x 512 x 800 voxels and a hundred classes, within 4 GiB.

    python benchmarks/predict_memory.py [--out DIR] [--shape 512 512 800] [--classes 104] [--max-ram 4]
        [--head probe attention unet vit wide] [--scan body noise] [--way nifti seg]

Writes scans of that size (`body`: a phantom, end to end, at the full resolution; `noise`: labels become specks, the
worst that can be measured piece by piece), each as NIfTI and as a DICOM series. Makes runs whose heads have that many
classes (their weights are drawn: what is measured is memory, not skill), and lets `voxelstem predict` mark every voxel
in a process of its own. Printed are the process's largest resident memory as the kernel counted it (VmHWM), its seconds
on the wall, and those of its processors. All logits at full resolution would take classes x voxels x 4 bytes, which is
printed beside.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from voxelstem.adapted import Made, resolve, write_run
from voxelstem.artefact import seal
from voxelstem.backbones.sizes import sized
from voxelstem.card import Card, write_weights
from voxelstem.certainty.assurance import Assurance
from voxelstem.certainty.strangeness import NearestKnown, fit_nearest
from voxelstem.config import flatten
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.network import build
from voxelstem.finetune.tune import OWN
from voxelstem.heads import queries
from voxelstem.model import make_model
from voxelstem.protocols import Head
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.study import INPUT_SPECS, InputSpec

GIB = 1 << 30
Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]
Arrays = dict[str, np.ndarray]
VIT = {"name": "scan_vit", "patch_ijk": (4, 4, 4), "block_ijk": (32, 32, 32), "block.dim": 96, "block.depth": 2,
       "block.heads": 4, "scan.depth": 0}  # fmt: skip
UNET = {"name": "unet", "features": (8, 16), "depths": (1, 1), "strides": (1, 2), "block_ijk": (64, 64, 64)}
COARSE = InputSpec(spacing_mm=(3.0, 3.0, 3.0), low_hu=-200.0, high_hu=300.0, block_ijk=(32, 32, 32))
FINE = InputSpec(spacing_mm=(1.5, 1.5, 1.5), low_hu=-200.0, high_hu=300.0, block_ijk=(64, 64, 64))
WIDE = {"wide": "spectre-small", "large": "spectre-large"}
"""Frozen networks as large as they come, at 0.75 x 0.75 x 1.5 mm in blocks of 128 x 128 x 64."""
LOOK_SECONDS = 0.1


def body(shape: Triple, spacing_mm: Spacing) -> np.ndarray:
    """A phantom from the loin to the neck, and the same upside down above it, until the scan is full; air around it."""
    volume = phantom(PhantomConfig(seed=7, spacing_mm=spacing_mm, noise_hu=12.0)).volumes[0]
    whole = np.full(shape, -1000, dtype=np.int16)
    drawn = volume.array[0].astype(np.int16)
    place: list[tuple[slice, slice]] = []
    for have, want in zip(drawn.shape[:2], shape[:2], strict=True):
        count = min(have, want)
        place.append(
            (slice((want - count) // 2, (want - count) // 2 + count), slice((have - count) // 2, (have + count) // 2))
        )
    for start in range(0, shape[2], drawn.shape[2]):
        count, turn = min(drawn.shape[2], shape[2] - start), -1 if start // drawn.shape[2] % 2 else 1
        part = drawn[:, :, ::turn][place[0][1], place[1][1], :count]
        whole[place[0][0], place[1][0], start : start + count] = part
    return whole


def noise(shape: Triple, spacing_mm: Spacing) -> np.ndarray:
    """A cylinder of noisy soft tissue in air."""
    del spacing_mm
    rng = np.random.default_rng(0)
    array = np.full(shape, -1000, dtype=np.int16)
    i, j = np.ogrid[: shape[0], : shape[1]]
    inside = ((i / shape[0] - 0.5) ** 2 + (j / shape[1] - 0.5) ** 2) < 0.16
    for plane in range(shape[2]):
        array[:, :, plane][inside] = rng.normal(40, 120, int(inside.sum())).astype(np.int16)
    return array


SCANS: Mapping[str, Callable[[Triple, Spacing], np.ndarray]] = {"body": body, "noise": noise}


def write_series(folder: Path, array: np.ndarray, spacing_mm: Spacing) -> None:
    """A CT series in DICOM of the same voxels: one file a slice; DICOM counts to the left and to the back."""
    folder.mkdir()
    study, series, frame = (generate_uid() for _ in range(3))
    for index in range(array.shape[2]):
        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = CTImageStorage
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
        one.PatientID, one.PatientName, one.Modality = "phantom", "", "CT"
        one.ImageType, one.PositionReferenceIndicator = ["ORIGINAL", "PRIMARY", "AXIAL"], ""
        one.SeriesNumber, one.InstanceNumber = 1, index + 1
        one.Rows, one.Columns = array.shape[1], array.shape[0]
        one.PixelSpacing, one.SliceThickness = [spacing_mm[1], spacing_mm[0]], spacing_mm[2]
        one.ImageOrientationPatient, one.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, index * spacing_mm[2]]
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.RescaleSlope, one.RescaleIntercept, one.RescaleType = 1, 0, "HU"
        one.PixelData = np.ascontiguousarray(array[::-1, ::-1, index].T).tobytes()
        one.save_as(folder / f"{index:04d}.dcm", enforce_file_format=True)


def _linear(dim: int, count: int, sub: int = 2) -> Arrays:
    rng, out = np.random.default_rng(0), sub**3 * (count + 1)
    weight = rng.normal(size=(dim, out)).astype(np.float32)
    return {"middle": np.zeros(dim, np.float32), "scale": np.ones(dim, np.float32), "weight": weight,
            "bias": np.zeros(out, np.float32)}  # fmt: skip


def known(dim: int) -> NearestKnown:
    """Vectors of twenty scans, so that a prediction also says how strange its scan is (cls and mean patch)."""
    rows = np.random.default_rng(0).normal(size=(20, dim))
    return fit_nearest(rows, [str(row) for row in range(20)], neighbours=5, level=0.9)


def token_run(folder: Path, classes: tuple[str, ...], name: str) -> None:
    """A head on frozen tokens: linear (`probe`) or queries (`attention`) on 12 mm at 3 mm, linear on wide networks."""
    spec = INPUT_SPECS["ct-stage2"] if name in WIDE else COARSE
    architecture = {"name": "scan_vit"} | dict(flatten(sized(WIDE[name]))) if name in WIDE else VIT
    model = make_model(Card(architecture=architecture, spec=spec), seed=0)
    card = write_weights(folder / "weights", model.backbone.state_dict(), model.card)
    arrays = _linear(model.backbone.dim, len(classes))
    facts: dict[str, float | str] = {"sub": 2.0}
    mode = "attention" if name == "attention" else "probe"
    if mode == "attention":
        set_ = queries.QueryConfig()
        decoder = queries.Decoder(dim=model.backbone.dim, cell=8, kinds=len(classes) + 1, width=set_.width,
                                  heads=set_.heads, layers=set_.layers)  # fmt: skip
        drawn = {key: tensor.numpy() for key, tensor in decoder.state_dict().items()}
        arrays, facts = drawn | arrays, facts | {"heads": float(set_.heads)}
    head = Head(mode=mode, classes=classes, arrays=arrays, facts=facts)
    config = resolve("segment", mode, budget=None, settings={})
    sure = Assurance(known=known(2 * model.backbone.dim))
    write_run(folder, config, Made(head=head, records=(), assurance=sure), card)


def tuned_run(folder: Path, classes: tuple[str, ...], name: str) -> None:
    """A tuned network: a U-Net that labels voxels of 1.5 mm, or a ViT that paints them at 3 mm."""
    architecture, spec = (UNET, FINE) if name == "unet" else (VIT, COARSE)
    model = make_model(Card(architecture=architecture, spec=spec), seed=0)
    config = resolve("segment", "full", budget=None, settings={"full.overlap": 0.25})
    net, card = build(model, out=len(classes) + 1, config=config.full or FinetuneConfig(), voxels=True, seed=0)
    card = write_weights(folder / "weights", dict(net.backbone.state_dict()), card)
    count = len(classes) + 1
    arrays = {"middle": np.zeros(count), "scale": np.ones(count), "weight": np.eye(count), "bias": np.zeros(count)}
    arrays |= {OWN + key: tensor.numpy() for key, tensor in net.own().items()}
    head = Head(mode="full", classes=classes, arrays=arrays, facts={"sub": 1.0})
    sure = Assurance(inside=known(2 * net.backbone.dim))
    write_run(folder, config, Made(head=head, records=(), assurance=sure), card)


RUNS: Mapping[str, Callable[[Path, tuple[str, ...], str], None]] = {
    "probe": token_run,
    "attention": token_run,
    "unet": tuned_run,
    "vit": tuned_run,
    "wide": token_run,
    "large": token_run,
}
FORMATS = {"nifti": "json,nifti", "seg": "json,nifti,seg"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One prediction."""

    peak_gib: float
    seconds: float
    processor_seconds: float
    exit_code: int
    rss_gib: tuple[float, ...] = field(default=())
    """Resident memory every so often, in order: which part of the work holds the most."""


def measure(path: Path, run: Path, out: Path, formats: str, max_ram: float) -> Measured:
    """Predict in a process of its own and watch its memory."""
    words = [sys.executable, "-m", "voxelstem", "predict", str(path), "--weights", str(run), "--out", str(out)]
    began, peak, seen = time.monotonic(), 0.0, list[float]()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([*words, "--format", formats, "--max-ram", str(max_ram)])
    # The kernel's own mark of the child: `ru_maxrss` would begin with what this process held when it forked.
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        held = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmHWM", "VmRSS"))}
        peak = max(peak, held.get("VmHWM", 0) / (1 << 20))
        seen.append(round(held.get("VmRSS", 0) / (1 << 20), 3))
        time.sleep(LOOK_SECONDS)
    every, after = max(1, len(seen) // 100), resource.getrusage(resource.RUSAGE_CHILDREN)
    return Measured(
        peak_gib=peak,
        seconds=time.monotonic() - began,
        processor_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        exit_code=process.returncode,
        rss_gib=tuple(seen[::every]),
    )


def scans(asked: argparse.Namespace) -> dict[tuple[str, str], Path]:
    """Write the scans that are not there yet; each where it lies, by name and way."""
    shape, found = tuple(asked.shape), {}
    for name in asked.scan:
        stem = f"{name}-{'x'.join(map(str, shape))}"
        found[name, "nifti"], found[name, "seg"] = asked.out / f"{stem}.nii.gz", asked.out / stem
        if all(found[name, way].exists() for way in asked.way):
            continue
        array = SCANS[name](shape, tuple(asked.spacing))
        if not found[name, "nifti"].exists():
            nib.Nifti1Image(array, np.diag([*asked.spacing, 1.0])).to_filename(found[name, "nifti"])
        if "seg" in asked.way and not found[name, "seg"].exists():
            write_series(found[name, "seg"], array, tuple(asked.spacing))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/predict_memory"))
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 800])
    parser.add_argument("--spacing", type=float, nargs=3, default=[0.75, 0.75, 1.0])
    parser.add_argument("--classes", type=int, default=104)
    parser.add_argument("--max-ram", type=float, default=4.0)
    parser.add_argument("--head", nargs="+", choices=list(RUNS), default=["probe", "attention", "unet", "vit", "wide"])
    parser.add_argument("--scan", nargs="+", choices=list(SCANS), default=list(SCANS))
    parser.add_argument("--way", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    paths = scans(asked)
    classes = tuple(f"structure {number}" for number in range(1, asked.classes + 1))
    whole = (asked.classes + 1) * math.prod(asked.shape) * 4 / GIB
    print(f"{asked.shape} voxels, {asked.classes} classes: all logits would be {whole:.0f} GiB")
    print("| head | scan | formats | peak GiB (limit) | seconds | of a processor | exit code |")
    print("|---|---|---|---:|---:|---:|---:|")
    for name in asked.head:
        folder = asked.out / f"{name}-{asked.classes}"
        if not folder.exists():
            RUNS[name](folder, classes, name)
            seal(folder)
        for (scan, way), path in paths.items():
            if way not in asked.way:
                continue
            case = f"{name}-{scan}-{way}"
            found = measure(path, folder, asked.out / f"found-{case}", FORMATS[way], asked.max_ram)
            row = f"{found.peak_gib:.2f} ({asked.max_ram:g}) | {found.seconds:.0f} | {found.processor_seconds:.0f} "
            row += f"| {found.exit_code} |"
            print(f"| {name} | {scan} | {FORMATS[way]} | {row}", flush=True)
            facts = {"head": name, "scan": scan, "formats": FORMATS[way], "shape": asked.shape}
            facts |= {"classes": asked.classes, "peak_gib": found.peak_gib, "seconds": found.seconds}
            facts |= {
                "processor_seconds": found.processor_seconds,
                "exit_code": found.exit_code,
                "rss_gib": found.rss_gib,
            }
            (asked.out / f"{case}.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
