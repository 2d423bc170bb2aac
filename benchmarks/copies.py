"""Copies of scans found again: precision and recall on made copies of real scans and phantoms.

    python benchmarks/copies.py [--data DIR] [--quick] [--scale 250000]

One store holds scans, another what a careless hand makes of them under other patients' ids: exported again in another
orientation, resampled (x0.5 to x2), cropped (20-40 % off), noisy, smoothed, offset, rounded to int16 and uint8, and all
of it together. A pair counts as found when `find_copies` names it. Hard negatives stand among the scans: two contrast
phases of one phantom, T1 before and after contrast, and other sequences of one brain. `--scale` times the search for
candidates among as many made-up thumbnails and says how much of an exhaustive search it finds.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path

import numpy as np
from scipy import ndimage

from voxelstem import geometry, read
from voxelstem.resampling import resample
from voxelstem.sources.phantom import ORIENTATIONS, PhantomConfig, phantom, turn_from_ras
from voxelstem.store import Store, Writer
from voxelstem.store.copies import find_copies
from voxelstem.store.encoding import encode_study
from voxelstem.store.nearest import Best, Nearest
from voxelstem.store.subjects import pseudonym
from voxelstem.store.thumbnails import CROPS, WHOLE, Album, embed, thumbnail, unpack
from voxelstem.study import Provenance, Study, Volume

KEY = bytes(range(32))
GOAL = 0.95
HIPPOCAMPI = 24
SAME = {"sts/STS_005/CT": "starter/sts_005_ct", "sts/STS_018/CT": "starter/sts_018_ct"}
SAME |= {"ct/crlm_1004_ge_dicom": "starter/crlm_1004"}
"""Known real pairs: resampled by whoever published them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """One acquisition: `name` is its own, `origin` is shared with its real copies."""

    name: str
    origin: str
    volume: Volume


def real_scans(data: Path, hippocampi: int) -> Iterator[Scan]:
    """Read the CT and MR scans of a folder laid out like the project's sample data."""
    paths = [path for path in sorted((data / "starter").glob("*.nii.gz")) if not _is_mask(path)]
    paths += [data / "ct" / name for name in ("3DCT_lung.mha", "crlm_1004_ge_dicom", "ts_aorta_full.nii.gz")]
    paths += [data / "ct" / "ts_dicom_j2k", *sorted((data / "sts").rglob("*_image.nii.gz"))]
    paths += sorted((data / "hippocampus" / "images").glob("*.nii.gz"))[:hippocampi]
    for path in paths:
        name = path.relative_to(data).as_posix().split(".")[0].removesuffix("_image").removesuffix("_T1_T1")
        yield Scan(name=name, origin=SAME.get(name, name), volume=read(path).volumes[0])


def _is_mask(path: Path) -> bool:
    return any(word in path.name for word in ("gtv", "GOLD", "lesion", "seg"))


def phantoms(count: int) -> Iterator[Scan]:
    """Two contrast phases of each invented patient: never copies of one another."""
    for seed in range(count):
        for phase in ("none", "portal"):
            spacing = (2.5, 2.5, 3.5) if seed % 2 else (2.0, 2.0, 5.0)
            volume = phantom(PhantomConfig(seed=seed, phase=phase, spacing_mm=spacing)).volumes[0]
            name = f"phantom/{seed}/{phase}"
            yield Scan(name=name, origin=name, volume=changed(volume, labels=None))


def exported(volume: Volume, rng: np.random.Generator) -> Volume:
    """Store in another orientation and at another place; no voxel changes."""
    array, affine = turn_from_ras(volume.array[0], volume.affine_ras, str(rng.choice(ORIENTATIONS)))
    affine[:3, 3] += rng.uniform(-50, 50, 3)
    array, affine = geometry.to_ras(array[None], affine)
    return changed(volume, array=array, affine_ras=affine)


def resampled(volume: Volume, rng: np.random.Generator) -> Volume:
    """Another spacing, half to double; thick slices stay thick, as nobody makes a scan of five slices of it."""
    factors = 2 ** rng.uniform(-1, 1, 3)
    factors = np.where(np.array(volume.shape_ijk) / factors < 12, 1.0, factors)
    # A volume of fewer than eight million voxels: the machine that runs this is small.
    factors *= max(1.0, (np.prod(np.array(volume.shape_ijk) / factors) / 8e6) ** (1 / 3))
    i, j, k = (float(edge) for edge in np.array(volume.spacing_mm) * factors)
    array, affine = resample(volume.array, volume.affine_ras, (i, j, k))
    return changed(volume, array=array, affine_ras=affine)


def cropped(volume: Volume, rng: np.random.Generator) -> Volume:
    """Take 20 to 40 % off: from one axis, or from all of them together."""
    kept = rng.uniform(0.6, 0.8)
    shares = np.full(3, kept ** (1 / 3))
    if rng.random() < 0.5:
        shares = np.ones(3)
        shares[rng.integers(3)] = kept
    sizes = [max(1, round(n * share)) for n, share in zip(volume.shape_ijk, shares, strict=True)]
    starts = [int(rng.integers(0, n - size + 1)) for n, size in zip(volume.shape_ijk, sizes, strict=True)]
    box = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    affine = volume.affine_ras.copy()
    affine[:3, 3] += affine[:3, :3] @ starts
    return changed(volume, array=np.ascontiguousarray(volume.array[(slice(None), *box)]), affine_ras=affine)


def noisy(volume: Volume, rng: np.random.Generator) -> Volume:
    noise = rng.normal(0, rng.uniform(0.02, 0.08) * _scale(volume), volume.array.shape)
    return changed(volume, array=(volume.array + noise).astype(np.float32))


def smoothed(volume: Volume, rng: np.random.Generator) -> Volume:
    """A softer kernel: up to one voxel of the finest axis."""
    width = rng.uniform(0.5, 1.0) * min(volume.spacing_mm) / np.array([1e9, *volume.spacing_mm])
    return changed(volume, array=ndimage.gaussian_filter(volume.array, width))


def shifted(volume: Volume, rng: np.random.Generator) -> Volume:
    """Another offset; where values have no unit, another gain too."""
    gain = 1.0 if volume.modality == "CT" else rng.uniform(0.5, 2.0)
    offset = rng.uniform(10, 40) if volume.modality == "CT" else rng.uniform(0, 0.1) * _scale(volume)
    return changed(volume, array=(volume.array * gain + offset).astype(np.float32))


def rounded(volume: Volume, levels: int) -> Volume:
    """Lossy storage: as many steps between the least and the greatest value (CT: from -1000 to 1500 HU)."""
    low, high = (-1000.0, 1500.0) if volume.modality == "CT" else (float(volume.array.min()), float(volume.array.max()))
    step = (high - low) / (levels - 1)
    array = np.rint((np.clip(volume.array, low, high) - low) / step) * step + low
    return changed(volume, array=array.astype(np.float32))


def everything(volume: Volume, rng: np.random.Generator) -> Volume:
    for make in (cropped, resampled, smoothed, noisy, shifted):
        volume = make(volume, rng)
    return rounded(volume, 4096)


MAKERS: dict[str, Callable[[Volume, np.random.Generator], Volume]] = {
    "export": exported,
    "resample": resampled,
    "crop": cropped,
    "noise": noisy,
    "smooth": smoothed,
    "offset": shifted,
    "int16": lambda volume, _: rounded(volume, 4096),
    "uint8": lambda volume, _: rounded(volume, 256),
    "everything": everything,
}


def _scale(volume: Volume) -> float:
    return 400.0 if volume.modality == "CT" else float(np.percentile(volume.array, 99) - np.percentile(volume.array, 1))


def fill(root: Path, scans: Iterator[Scan]) -> tuple[Store, dict[str, Scan]]:
    """Write scans, each under a patient of its own, and say which key is which scan."""
    store, known = Store.create(root), {}
    with Writer(root) as writer:
        for scan in scans:
            plain = changed(
                scan.volume, provenance=Provenance(source_format="nifti", sha256="0" * 64, orientation="RAS")
            )
            # Rounding may change nothing: two equal copies of one scan are one, under one patient.
            encoded = encode_study(
                Study(subject=pseudonym(scan.name.partition("|")[0] + str(root), KEY), volumes=(plain,))
            )
            data = thumbnail(plain.array, plain.affine_ras, plain.modality)
            encoded = changed(encoded, volumes=(changed(encoded.volumes[0], thumbnail=data),))
            (key,) = writer.add(encoded)
            known.setdefault(key, changed(scan, volume=None))  # type: ignore[arg-type]  # voxels stay on disk
    store.refresh()
    return store, known


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was found of what there is."""

    found: Counter[str]
    there: Counter[str]
    wrong: list[tuple[str, str, float]]
    right: int

    @property
    def recall(self) -> float:
        return self.found.total() / self.there.total()

    @property
    def precision(self) -> float:
        return self.right / max(1, self.right + len(self.wrong))


def measure(folder: Path, scans: Callable[[], Iterator[Scan]], *, makers: tuple[str, ...] = tuple(MAKERS)) -> Outcome:
    """Make the two stores and find copies within the first and between the two."""

    def made() -> Iterator[Scan]:
        for number, scan in enumerate(scans()):
            for kind in makers:
                rng = np.random.default_rng([number, list(MAKERS).index(kind)])
                yield Scan(name=f"{scan.name}|{kind}", origin=scan.origin, volume=MAKERS[kind](scan.volume, rng))

    first, originals = fill(folder / "scans", scans())
    second, copies = fill(folder / "copies", made())
    there = Counter(scan.name.partition("|")[2] for scan in copies.values())
    alike = Counter(scan.origin for scan in originals.values())
    there["published twice"] = sum(count - 1 for count in alike.values())
    there["export, exact"] = there["export"]
    found, wrong, right = Counter[str](), list[tuple[str, str, float]](), 0
    pairs = [(originals[c.key_a], originals[c.key_b], c) for c in find_copies(first)]
    pairs += [(originals[c.key_a], copies[c.key_b], c) for c in find_copies(first, second)]
    for one, other, copy in pairs:
        if one.origin != other.origin:
            wrong.append((one.name, other.name, copy.correlation))
            continue
        right += 1
        origin, _, kind = other.name.partition("|")
        if not kind:
            found["published twice"] += 1
        elif origin == one.name:
            found[kind] += 1
            found["export, exact"] += kind == "export" and copy.kind == "exact"
    return Outcome(found=found, there=+there, wrong=wrong, right=right)


def scale(count: int, examples: list[bytes]) -> None:
    """Time the search for candidates among thumbnails mixed from real ones, and compare with an exhaustive search."""
    rng = np.random.default_rng(0)
    real = [one for one in map(unpack, examples) if one.modality == "CT"]
    pictures = np.stack([one.picture.ravel() for one in real])
    extents = np.log([one.extent_mm for one in real])
    one, two = rng.integers(0, len(real), (2, count))
    share = rng.uniform(0.1, 0.9, (count, 1)).astype(np.float32)
    mixed = np.empty((count, pictures.shape[1]), np.uint8)
    for at in range(0, count, 4096):
        part = slice(at, at + 4096)
        many = pictures[one[part]] * share[part] + pictures[two[part]] * (1 - share[part])
        mixed[part] = np.clip(many + rng.normal(0, 12, many.shape), 0, 255)
    size = np.exp(extents[one] * share + extents[two] * (1 - share) + rng.normal(0, 0.05, (count, 3)))
    album = Album(modality=np.full(count, "CT"), extent_mm=size.astype(np.float32), pictures=mixed)
    start = time.perf_counter()
    vectors = embed(album)
    index = Nearest(vectors)
    best, back = (Best.empty(count, most=8, floor=0.9) for _ in range(2))
    for number, cut in enumerate((WHOLE, *CROPS), start=1):
        index.search(embed(album, cut), best, back, among_themselves=True)
        print(f"  {number} of {1 + len(CROPS)} crops: {time.perf_counter() - start:.0f} s", flush=True)
    seconds = time.perf_counter() - start
    asked = rng.integers(0, count, 500)
    few = embed(album.take(asked), CROPS[0])
    near = Best.empty(len(asked), most=8, floor=0.9)
    index.search(few, near, Best.empty(count, most=1, floor=1.0), among_themselves=False)
    scores = few @ vectors.T
    best8 = [{int(at) for at in np.argsort(-row)[:8] if row[at] >= 0.9} for row in scores]
    hit = sum(len(wanted & set(got.tolist())) for wanted, got in zip(best8, near.ids, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"candidates among {count} scans: {seconds:.0f} s, peak memory {peak:.2f} GiB, "
        f"{hit / max(1, sum(map(len, best8))):.1%} of an exhaustive search"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = os.environ.get("VOXELSTEM_DATA", "../shared/data")
    parser.add_argument("--data", type=Path, default=Path(folder))
    parser.add_argument("--quick", action="store_true", help="phantoms and a few real scans")
    parser.add_argument("--scale", type=int, default=0, help="also time candidates among so many thumbnails")
    asked = parser.parse_args()
    if not asked.data.is_dir():
        print(f"no real scans in '{asked.data.name}': phantoms only")

    def scans() -> Iterator[Scan]:
        yield from phantoms(3 if asked.quick else 8)
        if asked.data.is_dir():
            for number, scan in enumerate(real_scans(asked.data, 0 if asked.quick else HIPPOCAMPI)):
                if not asked.quick or number % 4 == 0:
                    yield scan

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        outcome = measure(Path(place), scans)
        for kind, count in outcome.there.items():
            print(f"{kind:16} {outcome.found[kind]:4} of {count:4}  recall {outcome.found[kind] / count:.3f}")
        for one, other, correlation in outcome.wrong:
            print(f"wrong: {one} = {other} ({correlation:.3f})")
        drawn = [data for _, data in Store.open(Path(place) / "scans").thumbnails()]
    print(
        f"recall {outcome.recall:.4f} (goal {GOAL}), precision {outcome.precision:.4f} (goal {GOAL}), "
        f"{time.perf_counter() - start:.0f} s"
    )
    if asked.scale:
        scale(asked.scale, drawn)


if __name__ == "__main__":
    main()
