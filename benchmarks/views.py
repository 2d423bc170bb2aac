"""One training sample of SPECTRE's stage 1 (2 global and 8 local views): our store against its own DINOTransform.

    python benchmarks/views.py [--repeats 5] [--samples 48] [--small]

The scan is made here (512 x 512 x 300 at 0.75 x 0.75 x 1 mm, a smooth body in air with noise), so nobody's data is
needed. A sample is one base crop of 128 mm along each axis and its ten views. Both sides are told the same recipe:
extents, flips, smoothing, sharpening, gamma, noise, moved windows, each with its chance.

- ours, a sample: what a loader's worker does, from the store's file: draw, decode the box, window, resample, change.
- peer, default: DINOTransform from the `.nii.gz`, with 12 base crops a scan as its configuration has it.
- peer, cached: all that is the same each time (reading, spacing, centre crop) lies in memory already; only base crops
  and their views are made. Its best: a training that could hold all scans in memory at 0.5 x 0.5 x 1 mm.

Sides take turns, with one thread and with two; medians are printed. Then it is checked that both make the same kind of
views: single changes agree with MONAI's, and extents and intensities are alike over many samples. Last, what share of
the time the `tiny` recipe waits for data with one worker.

Run it in the peers' environment (`benchmarks/requirements-peers.txt`); elsewhere the peer is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import nibabel
import numpy as np
import torch
from crops import machine, scan
from torch import Tensor

from voxelstem.backbones.scan_vit import ScanVit
from voxelstem.engine.loader import Loader, LoaderConfig
from voxelstem.engine.reading import Made, Slot, SlotReader
from voxelstem.engine.transfer import Crops
from voxelstem.objectives.mae import Mae
from voxelstem.recipes import named, tiny
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Store, write
from voxelstem.store.reader import Record
from voxelstem.store.subjects import pseudonym
from voxelstem.study import Provenance, Study, Volume
from voxelstem.views.augment import AugmentConfig, AugmentPlan, apply_augment
from voxelstem.views.multicrop import ViewsConfig, draw_sample

SPACING_MM = (0.75, 0.75, 1.0)
BASE_VOXELS, BASE_MM = (256, 256, 128), 128.0
A_SCAN = 12
"""Base crops that the peer makes of a scan it has read; ours takes as many from one opening."""
GOAL = 20.0
WAIT_GOAL = 0.05
STEPS = 60
"""Of the tiny recipe."""
RECIPE = named("ct.spectre_stage1")
SPEC, VIEWS = RECIPE.spec, RECIPE.views
SHARES = {"global": (0.5, 1.0), "local": (0.1875, 0.5)}
"""Of the base crop's edge, that a view's edge is drawn from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One way to make samples: `make(seed)` gives some, as lists of global and of local views."""

    name: str
    make: Callable[[int], list[dict[str, list[Tensor]]]]
    goal: float = 0.0
    slow: bool = False
    """Whether one turn takes so long that it gets few."""


def our_side(store: Store, record: Record, config: ViewsConfig) -> Side:
    """What a worker does with one opening of a scan."""

    def make(seed: int) -> list[dict[str, list[Tensor]]]:
        reader = SlotReader(crops=Crops(store, "blosc2"), spec=SPEC, views=config, seed=seed)
        reading = reader(Slot(key=record.key, epoch=0, place=0, phases=tuple(range(A_SCAN))))
        made = [sample.views for sample in reading.samples if isinstance(sample, Made)]
        return [{name: list(torch.from_numpy(views)) for name, views in sample.items()} for sample in made]

    return Side(name="ours, from the store", make=make)


def peer_sides(path: Path) -> tuple[list[Side], Any, Any]:
    """The peer from the file and from memory, its view maker, and the scan as it lies in memory."""
    from spectre.ssl.transforms import DINOTransform

    whole = DINOTransform(num_base_patches=A_SCAN)
    steps = list(whole.transforms)
    (cut,) = (at for at, step in enumerate(steps) if type(step).__name__ == "RandSpatialCropSamplesd")
    cached: Any = {"image": str(path)}
    for step in steps[:cut]:
        cached = step(cached)

    def named(items: list[dict[str, Any]]) -> list[dict[str, list[Tensor]]]:
        return [{kind: item[f"image_{kind}_views"] for kind in SHARES} for item in items]

    def from_file(seed: int) -> list[dict[str, list[Tensor]]]:
        # The same object as below: who went last must not say how many crops a scan gives here.
        steps[cut].cropper.num_samples = A_SCAN
        whole.set_random_state(seed=seed)
        return named(whole({"image": str(path)}))

    def from_memory(seed: int) -> list[dict[str, list[Tensor]]]:
        crop, views = steps[cut : cut + 2]
        crop.set_random_state(seed=seed)
        views.set_random_state(seed=seed)
        crop.cropper.num_samples = 1
        return named(views(crop(dict(cached))))

    sides = [
        Side(name=f"peer, from the file ({A_SCAN} a scan)", make=from_file, goal=GOAL, slow=True),
        Side(name="peer, scan cached in memory", make=from_memory),
    ]
    return sides, steps[cut + 1], cached["image"]


def race(sides: list[Side], repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds of the processor and of the clock for each sample, by side: medians of turns taken one after another."""
    seconds: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    for side in sides:
        if not side.slow:
            side.make(0)
    for turn in range(repeats):
        for side in sides:
            if side.slow and turn >= max(1, repeats // 3):
                continue
            work, clock = time.process_time(), time.perf_counter()
            count = len(side.make(turn + 1))
            seconds[side.name].append(((time.process_time() - work) / count, (time.perf_counter() - clock) / count))
    return {
        name: (statistics.median(work for work, _ in times), statistics.median(clock for _, clock in times))
        for name, times in seconds.items()
    }


def compare_speed(sides: list[Side], repeats: int) -> None:
    """Print times of a sample with one thread and with two; the verdict goes by the processor's time of one thread."""
    taken: dict[int, dict[str, tuple[float, float]]] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        taken[threads] = race(sides, repeats)
    torch.set_num_threads(1)
    own, own_clock = taken[1][sides[0].name]
    for side in sides:
        (one, clock), (_, two) = (taken[threads][side.name] for threads in (1, 2))
        print(
            f"{side.name:36} {1e3 * one:7.0f} ms of a core ({1e3 * clock:.0f} by the clock, {1e3 * two:.0f} with two)"
        )
        if side is not sides[0]:
            goal = f"; goal {side.goal:.0f}x: {'met' if one / own >= side.goal else 'MISSED'}" if side.goal else ""
            print(f"    ours is {one / own:.1f}x as fast (one thread against its two: {two / own_clock:.1f}x){goal}")


def compare_changes() -> None:
    """Each change of a view by its numbers, ours and MONAI's."""
    from monai.transforms import AdjustContrast, GaussianSharpen, GaussianSmooth

    view = torch.rand(1, 64, 64, 32, generator=torch.Generator().manual_seed(0))
    first, second = (1.8, 2.2, 0.9), (0.6, 0.8, 0.4)
    pairs = {
        "smooth": (AugmentPlan(blur_sigma=first), GaussianSmooth(first)),
        "sharpen": (
            AugmentPlan(blur_sigma=first, sharpen_sigma=second, sharpen_amount=20.0),
            GaussianSharpen(first, second, 20.0),
        ),
        "gamma": (AugmentPlan(gamma=0.93), AdjustContrast(0.93)),
    }
    for name, (plan, theirs) in pairs.items():
        ours = apply_augment(view.clone()[None], [plan], VIEWS.augment)[0]
        gap = float((ours - torch.as_tensor(theirs(view.clone()))).abs().max())
        print(f"{name}: the same numbers as MONAI's within {gap:.1e} ({'ok' if gap < 5e-3 else 'DIFFERS'})")


def compare_extents(record: Record, maker: Any, samples: int) -> None:
    """Edges of views in millimetres, as shares of the base crop's, along all axes."""
    rng = np.random.default_rng(0)
    ours: dict[str, list[np.ndarray]] = {name: [] for name in SHARES}
    theirs: dict[str, list[np.ndarray]] = {name: [] for name in SHARES}
    base = torch.zeros(1, *BASE_VOXELS)
    maker.set_random_state(seed=0)
    for _ in range(8 * samples):
        for name, plans in draw_sample(VIEWS, SPEC, record, rng).items():
            ours[name] += [np.array(plan.extent_mm) / BASE_MM for plan in plans]
        maker.randomize()
        for name, cropper in (("global", maker.cropper_global), ("local", maker.cropper_local)):
            theirs[name] += [np.divide(crop.shape[1:], BASE_VOXELS) for crop in cropper(base)]
    for name, (low, high) in SHARES.items():
        (mine, spread), (other, wide) = ((np.mean(all_), np.std(all_)) for all_ in (ours[name], theirs[name]))
        ends = [np.min(ours[name]), np.max(ours[name]), np.min(theirs[name]), np.max(theirs[name])]
        good = (
            abs(mine - other) < 0.02 and abs(spread - wide) < 0.01 and low - 0.01 < min(ends) < max(ends) < high + 0.01
        )
        print(
            f"{name} edges: mean {mine:.3f} and {other:.3f} of the base crop's, deviation {spread:.3f} and {wide:.3f}, "
            f"from {ends[0]:.3f} to {ends[1]:.3f} and from {ends[2]:.3f} to {ends[3]:.3f} "
            f"({'ok' if good else 'DIFFERS'})"
        )


def compare_intensities(ours: Side, theirs: Side, samples: int, *, what: str) -> None:
    """Means and deviations of views over many samples; alike if they differ by less than chance explains."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for who, side in (("ours", ours), ("theirs", theirs)):
        made: list[dict[str, list[Tensor]]] = []
        while len(made) < samples:
            made += side.make(1000 + len(made))
        for kind in SHARES:
            # Views of one sample see the same place: the sample, and not the view, is what is drawn independently.
            rows = [
                np.mean([[float(v.mean()), float(v.std())] for v in sample[kind]], axis=0) for sample in made[:samples]
            ]
            found.setdefault(kind, {})[who] = np.array(rows)
    for kind, rows in found.items():
        (mean, std), (other_mean, other_std) = (rows[who].mean(axis=0) for who in ("ours", "theirs"))
        error = np.sqrt(sum(rows[who].var(axis=0, ddof=1) / samples for who in rows))
        gaps = np.abs(rows["ours"].mean(axis=0) - rows["theirs"].mean(axis=0))
        good = (gaps < 3 * error + 0.01).all()
        print(
            f"{what}, {kind}: mean {mean:.3f} and {other_mean:.3f} (standard error {error[0]:.3f}), "
            f"deviation {std:.3f} and {other_std:.3f} ({error[1]:.3f}), of {samples} samples "
            f"({'ok' if good else 'DIFFERS'}: 3 standard errors and 0.01 are allowed)"
        )


def without_changes(maker: Any) -> Callable[[], None]:
    """Switch the peer's changes of intensity off; what comes back switches them on again."""
    kept, maker.augmentor = maker.augmentor, _Nothing()
    return lambda: setattr(maker, "augmentor", kept)


class _Nothing:
    def __call__(self, view: Tensor, **_: Any) -> Tensor:
        return view

    def set_random_state(self, seed: int) -> None:
        """Nothing is drawn."""


def waiting(folder: Path, steps: int) -> None:
    """How long the tiny recipe waits for data with one worker."""
    store = Store.create(folder / "phantoms")
    for seed in range(6):
        study = phantom(PhantomConfig(seed=seed))
        write(store, replace(study, subject=pseudonym(study.subject, bytes(32))))
    store.refresh()
    config = tiny.base()
    torch.set_num_threads(os.cpu_count() or 1)
    objective = Mae(config.objective, ScanVit(config.backbone))
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-4)
    how = LoaderConfig(batch=config.loader.batch, workers=1)
    keys = [record.key for record in store]
    source = Loader(store, keys, config.spec, views=config.views, config=how, seed=0)
    began = time.perf_counter()
    with closing(source.batches(0, steps)) as batches:
        for step, batch in enumerate(batches):
            if not step:
                began = time.perf_counter()
            objective.step(batch, progress=step / steps).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            objective.after_step(progress=step / steps)
    each, share = (time.perf_counter() - began) / steps, source.speed()["data_wait_share"]
    print(
        f"tiny with one worker: {1e3 * each:.0f} ms a step, of which {100 * share:.2f} % wait for data "
        f"(goal {100 * WAIT_GOAL:.0f} %: {'met' if share <= WAIT_GOAL else 'MISSED'})"
    )


def store_scan(folder: Path, array: np.ndarray, affine: np.ndarray) -> tuple[Store, Record]:
    """The scan in a store of ours."""
    store = Store.create(folder / "store")
    provenance = Provenance(source_format="phantom", sha256="", orientation="RAS")
    volume = Volume(array=array[None].astype(np.float32), affine_ras=affine, modality="CT", provenance=provenance)
    (key,) = write(store, Study(subject="s" + "0" * 24, volumes=(volume,)))
    store.refresh()
    return store, store.record(key)


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=48, help="of each side, whose views are compared")
    parser.add_argument("--small", action="store_true", help="a quick look: a smaller scan, fewer steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    shape = (384, 384, 160) if options.small else (512, 512, 300)
    print(f"{machine()}, torch {torch.__version__}; a scan of {shape}")
    with tempfile.TemporaryDirectory() as temporary:
        folder, affine = Path(temporary), np.diag([*SPACING_MM, 1.0])
        array = scan(shape)
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / "scan.nii.gz")
        store, record = store_scan(folder, array, affine)
        ours = our_side(store, record, VIEWS)
        if importlib.util.find_spec("spectre") is None:
            own, _ = race([ours], options.repeats)[ours.name]
            print(f"no peer in this environment; {ours.name}: {1e3 * own:.0f} ms of a core")
        else:
            theirs, maker, _ = peer_sides(folder / "scan.nii.gz")
            compare_speed([ours, *theirs], options.repeats)
            compare_changes()
            compare_extents(record, maker, options.samples)
            compare_intensities(ours, theirs[1], options.samples, what="all changes")
            again = without_changes(maker)
            plain = our_side(store, record, replace(VIEWS, augment=AugmentConfig()))
            compare_intensities(plain, theirs[1], options.samples, what="no changes")
            again()
        waiting(folder, STEPS // 6 if options.small else STEPS)


if __name__ == "__main__":
    main()
