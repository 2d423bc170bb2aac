"""What becomes of difficult scans: our reader beside SimpleITK, dcm2niix and nibabel, as a Markdown table.

    python benchmarks/readers.py [--data SCANS] [--peers PYTHON]

`SCANS` (or the environment's VOXELSTEM_DATA) holds the folders dicom_odd, nifti_odd, ct and starter. `PYTHON` is the
interpreter of an environment with SimpleITK, nibabel and the wheel of dcm2niix (benchmarks/requirements-peers.txt);
without it only our column is filled.
A peer's cell says what it hands over: the shape and the spacing along the slices (several where it made several), or
its error. What it warns of on the side is not counted: a script that calls it would go on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from voxelstem.errors import IngestError
from voxelstem.sources import Source, iterate
from voxelstem.study import Volume

FOLDERS = ("dicom_odd", "nifti_odd", "ct", "starter")
PEERS = r"""
import json, subprocess, sys, tempfile, warnings
from pathlib import Path

warnings.simplefilter("ignore")
import nibabel
import SimpleITK

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)


def say(shape, spacing):
    return f"{'x'.join(map(str, shape))}, {spacing:.3g} mm"


def itk(path):
    try:
        if path.is_dir():
            reader = SimpleITK.ImageSeriesReader()
            found = []
            for series in reader.GetGDCMSeriesIDs(str(path)):
                reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path), series))
                image = reader.Execute()
                found.append(say(image.GetSize(), image.GetSpacing()[-1]))
            return "; ".join(found) or "nothing"
        image = SimpleITK.ReadImage(str(path))
        return say(image.GetSize(), image.GetSpacing()[-1])
    except RuntimeError:
        return "error"


def nib(path):
    try:
        image = nibabel.load(path)
        image.get_fdata()
        return say(image.shape, image.header.get_zooms()[min(2, len(image.shape) - 1)])
    except Exception as error:
        return f"error ({type(error).__name__})"


def niix(path):
    binary = Path(sys.executable).with_name("dcm2niix")
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run([binary, "-z", "n", "-o", out, path], capture_output=True)
        made = sorted(Path(out).glob("*.nii"))
        return f"exit {done.returncode}: " + ("; ".join(map(nib, made)) or "nothing")


answers = {}
for name in json.load(sys.stdin):
    path = Path(name)
    answers[name] = [itk(path), niix(path) if path.is_dir() else "", nib(path) if ".nii" in path.name else ""]
json.dump(answers, sys.stdout)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One scan: the path that the peers are given, and what we said."""

    name: str
    path: Path
    ours: str


def say(volumes: tuple[Volume, ...]) -> str:
    """Name shapes, spacings along the third axis, and what was done on the way."""
    told = [f"{'x'.join(map(str, v.shape_ijk))}, {v.spacing_mm[2]:.3g} mm {v.modality}" for v in volumes]
    return "; ".join(told)


def ours(source: Source) -> str:
    """Read a scan as `ingest` does, then as `ingest --repair` does if it was refused."""
    try:
        return f"kept: {say(source.read().volumes)}"
    except IngestError as error:
        try:
            return f"refused: {error.code}; repaired: {say(source.read(repair=True).volumes)}"
        except IngestError:
            return f"refused: {error.code}"


def rows(data: Path) -> Iterator[Row]:
    """Find all scans, DICOM folders once each."""
    for folder in FOLDERS:
        for source in iterate(data / folder):
            yield Row(name=f"{folder}/{source.relative}", path=source.path, ours=ours(source))


def ask(python: str, paths: list[Path]) -> dict[str, list[str]]:
    """What the peers make of the same paths."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(PEERS)
        script.flush()
        names = json.dumps([str(path) for path in paths])
        done = subprocess.run([python, script.name], input=names, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Print the table; a group of files that all fared alike is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("VOXELSTEM_DATA"))
    parser.add_argument("--peers", default="")
    asked = parser.parse_args()
    if asked.data is None:
        print("no scans to read: give --data, or set VOXELSTEM_DATA")
        return
    found = list(rows(asked.data))
    peers = ask(asked.peers, [row.path for row in found]) if asked.peers else {}
    print("| scan | voxelstem | SimpleITK | dcm2niix | nibabel |\n|---|---|---|---|---|")
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in found:
        cells = (row.name.partition("/")[0], row.ours, *peers.get(str(row.path), ["", "", ""]))
        lines.setdefault(cells, []).append(row.name)
    for (_, *cells), names in lines.items():
        name = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} alike"
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
