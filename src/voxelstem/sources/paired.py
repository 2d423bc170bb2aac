"""Phantoms whose reports are true: a corpus on which alignment, laterality and negation can be proven.

Facts are drawn first and the patient is drawn to fit, so that every sentence of the report can be held against the
voxels. Like all phantoms they prove that machinery works and nothing about medicine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from voxelstem.sources.anatomy import CLASSES, FLUID, Anatomy, Lesion
from voxelstem.sources.lobes import LIVER_PLACES, LUNG_PLACES, SIDES, draw_at
from voxelstem.sources.phantom import ORIENTATIONS, PhantomFiles, invent, scan, study_files
from voxelstem.sources.wording import Saying, write_report
from voxelstem.study import Report, Study

NAMES = CLASSES | {value: name for name, value in FLUID.items()}
"""Label values of a paired phantom."""
OTHER = {"left": "right", "right": "left"}
SIZES_MM = (16, 40)
"""Diameters of lesions: the smallest is seen at voxels of 4 mm."""
AMOUNTS = {"small": (0.025, 0.04), "moderate": (0.06, 0.08)}
"""Shares of a lung's room that fluid takes; a gap lies between the words."""
FACTS = (
    "contrast", "effusion", "effusion_amount", "kidneys", "spleen", "spleen_mm", "lung_side", "lung_lobe",
    "lung_density", "lung_mm", "liver_lobe", "liver_density", "liver_mm",
)  # fmt: skip
"""Names of what `Facts.values` tells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedConfig:
    """Which patient with which report, and how the scanner sees it.

    Facts, patient, picture and wording have streams of random numbers of their own: to settle one fact leaves the
    others, the patient's build and the scanner as they were.
    """

    seed: int
    contrast: Literal["none", "portal", "random"] = "random"
    spleen: Literal["normal", "enlarged", "absent", "random"] = "random"
    kidneys: Literal["both", "left absent", "right absent", "random"] = "random"
    effusion: Literal["none", "left", "right", "both", "random"] = "random"
    lung: str = "random"
    """Where a nodule lies: one of `LUNG_PLACES`, or `none`."""
    liver: str = "random"
    """In which lobe a lesion lies: `left`, `right` or `none`."""
    spacing_mm: tuple[float, float, float] = (4.0, 4.0, 4.0)
    orientation: str = "RAS"
    """How the array axes of a written file run; one of all 48 when `random`."""
    noise_hu: float = 18.0
    rewrites: int = 4
    """Further wordings of findings and impression that come with the report; every second one is brief."""

    def __post_init__(self) -> None:
        """Guard the settings.

        Raises:
            ValueError: a number is out of range, or a place or orientation does not exist.
        """
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.lung not in (*LUNG_PLACES, "none", "random"):
            raise ValueError(f"lung must be 'random', 'none' or one of {', '.join(LUNG_PLACES)}, got '{self.lung}'")
        if self.liver not in (*LIVER_PLACES, "none", "random"):
            raise ValueError(f"liver must be 'random', 'none', 'left' or 'right', got '{self.liver}'")
        if min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")
        if self.orientation != "random" and self.orientation not in ORIENTATIONS:
            raise ValueError(f"orientation must be 'random' or letters such as LPS, got '{self.orientation}'")
        if self.noise_hu < 0 or self.rewrites < 0:
            raise ValueError(f"noise_hu and rewrites must not be negative, got {self.noise_hu} and {self.rewrites}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """A lesion as a report names it."""

    side: str
    lobe: str
    """Of a lung; empty for the liver, whose lobe is its side."""
    size_mm: int
    density: str
    """`solid` or `calcified` in a lung; `hypodense`, `hyperdense` or `calcified` in the liver."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is true of a paired phantom."""

    contrast: str
    spleen: str
    spleen_mm: int
    """Its length; 0 where it is absent."""
    kidneys: str
    effusion: str
    amount: str
    """How much fluid on each side that has any; empty without."""
    lung: tuple[Spot, ...]
    """At most one."""
    liver: tuple[Spot, ...]

    def values(self) -> dict[str, str]:
        """All facts by name (`FACTS`), as words; `none` for what there is not."""
        lung = self.lung[0] if self.lung else Spot(side="none", lobe="none", size_mm=0, density="none")
        liver = self.liver[0] if self.liver else Spot(side="none", lobe="", size_mm=0, density="none")
        return {
            "contrast": self.contrast,
            "effusion": self.effusion,
            "effusion_amount": self.amount or "none",
            "kidneys": self.kidneys,
            "spleen": self.spleen,
            "spleen_mm": str(self.spleen_mm),
            "lung_side": lung.side,
            "lung_lobe": lung.lobe,
            "lung_density": lung.density,
            "lung_mm": str(lung.size_mm),
            "liver_lobe": liver.side,
            "liver_density": liver.density,
            "liver_mm": str(liver.size_mm),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wish:
    """What the stream of facts drew, before the patient is there to say whether a lesion finds room."""

    contrast: str
    spleen: str
    kidneys: str
    effusion: str
    amount: str
    shares: tuple[float, float]
    lung: str
    liver: str
    sizes_mm: tuple[int, int]
    """Of the nodule and of the liver's lesion."""
    densities: tuple[str, str]


def facts(config: PairedConfig) -> Facts:
    """The truth about the phantom of this config, without drawing it."""
    return _facts(*_invented(config))


def paired(config: PairedConfig) -> Study:
    """Draw the phantom: a labelled CT with a true report, and all facts as scan-level labels.

    Returns:
        A study with one volume of `spacing_mm` in RAS+; labels are `NAMES`. The same config gives the same bytes.
    """
    wish, anatomy = _invented(config)
    told = _facts(wish, anatomy)
    rng = np.random.default_rng([config.seed, 12])
    drawn = str(rng.choice(ORIENTATIONS))
    volume = scan(
        anatomy,
        config.spacing_mm,
        noise_hu=config.noise_hu,
        orientation=drawn if config.orientation == "random" else config.orientation,
        rng=rng,
        classes=NAMES,
    )
    return Study(subject=subject(config.seed), volumes=(volume,), report=_report(config, told), labels=told.values())


def subject(seed: int) -> str:
    """The id of a paired phantom's patient."""
    return f"paired-{seed:06d}"


def paired_report(config: PairedConfig) -> Report:
    """The report alone, as `paired` gives it."""
    return _report(config, facts(config))


def paired_files(folder: Path, configs: Iterable[PairedConfig]) -> PhantomFiles:
    """Write paired phantoms as the files a hospital would have, for `ingest --labels … --reports …`.

    As `phantom_files`, with a table for each of `FACTS`.

    Raises:
        VoxelstemError: the folder cannot be written.
    """
    return study_files(folder, map(paired, configs), tables=FACTS)


def sayings(told: Facts) -> tuple[Saying, ...]:
    """Everything that can be said of these facts, in the order in which radiologists go."""
    both = told.effusion == "both"
    fluid = {"side": told.effusion, "other": OTHER.get(told.effusion, ""), "amount": told.amount}
    kidney = told.kidneys.removesuffix(" absent")
    return (
        Saying(topic="contrast", case=told.contrast, amiss=False),
        _spot_said("lung", told.lung),
        Saying(topic="effusion", case="none", amiss=False)
        if told.effusion == "none"
        else Saying(topic="effusion", case="both" if both else "one", amiss=True, values={} if both else fluid),
        _spot_said("liver", told.liver),
        Saying(topic="spleen", case=told.spleen, amiss=told.spleen != "normal", values={"length": str(told.spleen_mm)}),
        Saying(topic="kidneys", case="both", amiss=False)
        if kidney == "both"
        else Saying(topic="kidneys", case="one", amiss=True, values={"side": kidney, "other": OTHER[kidney]}),
    )


def _spot_said(organ: str, spots: tuple[Spot, ...]) -> Saying:
    if not spots:
        return Saying(topic=organ, case="none", amiss=False)
    spot = spots[0]
    values = {"side": spot.side, "other": OTHER[spot.side], "size": str(spot.size_mm), "density": spot.density}
    values |= {"lobe": spot.lobe} if spot.lobe else {}
    return Saying(topic=organ, case="one", amiss=True, values=values)


def _report(config: PairedConfig, told: Facts) -> Report:
    return write_report(sayings(told), np.random.default_rng([config.seed, 13]), rewrites=config.rewrites)


def _wish(config: PairedConfig) -> _Wish:
    """All choices are drawn, also the settled ones, so that settling one does not change the others."""
    rng = np.random.default_rng([config.seed, 10])

    def one(settled: str, choices: tuple[str, ...], shares: tuple[float, ...]) -> str:
        drawn = str(rng.choice(choices, p=shares))
        return drawn if settled == "random" else settled

    contrast = one(config.contrast, ("none", "portal"), (0.5, 0.5))
    spleen = one(config.spleen, ("normal", "enlarged", "absent"), (0.55, 0.3, 0.15))
    kidneys = one(config.kidneys, ("both", "left absent", "right absent"), (0.5, 0.25, 0.25))
    effusion = one(config.effusion, ("none", *SIDES, "both"), (0.4, 0.25, 0.25, 0.1))
    amount = str(rng.choice(list(AMOUNTS)))
    fluid = rng.uniform(*AMOUNTS[amount], size=2)
    sides = SIDES if effusion == "both" else (effusion,)
    left, right = (float(share) if side in sides else 0.0 for side, share in zip(SIDES, fluid, strict=True))
    lung = one(config.lung, ("none", *LUNG_PLACES), (0.4, 0.15, 0.15, 0.1, 0.1, 0.1))
    liver = one(config.liver, ("none", *LIVER_PLACES), (0.4, 0.3, 0.3))
    nodule, lesion = (int(size) for size in rng.integers(SIZES_MM[0], SIZES_MM[1] + 1, size=2))
    densities = (
        str(rng.choice(["solid", "calcified"], p=[0.65, 0.35])),
        str(rng.choice(["hypodense", "hyperdense", "calcified"], p=[0.45, 0.3, 0.25])),
    )
    return _Wish(
        contrast=contrast,
        spleen=spleen,
        kidneys=kidneys,
        effusion=effusion,
        amount="" if effusion == "none" else amount,
        shares=(left, right),
        lung=lung,
        liver=liver,
        sizes_mm=(nodule, lesion),
        densities=densities,
    )


def _invented(config: PairedConfig) -> tuple[_Wish, Anatomy]:
    """The wish, and a patient of whom it is true as far as there is room."""
    wish = _wish(config)
    rng = np.random.default_rng([config.seed, 11])
    anatomy = invent(rng, spleen_enlarged=wish.spleen == "enlarged", phase=wish.contrast)
    removed = {"spleen"} if wish.spleen == "absent" else set[str]()
    removed |= set[str]() if wish.kidneys == "both" else {f"kidney_{wish.kidneys.removesuffix(' absent')}"}
    anatomy = replace(
        anatomy, removed=frozenset(removed), effusion=wish.shares, effusion_hu=float(rng.uniform(0.0, 20.0))
    )
    found: list[Lesion] = []
    for index, (organ, place) in enumerate((("lung", wish.lung), ("liver", wish.liver))):
        # A stream each: whether there is a nodule does not move the liver's lesion.
        own = np.random.default_rng([config.seed, 14, index])
        if place != "none":
            found += draw_at(own, anatomy, organ, place, size_mm=wish.sizes_mm[index], density=wish.densities[index])
    return wish, replace(anatomy, lesions=tuple(found))


def _facts(wish: _Wish, anatomy: Anatomy) -> Facts:
    spots: dict[str, tuple[Spot, ...]] = {"lung": (), "liver": ()}
    for lesion in anatomy.lesions:
        place, density = (wish.lung, wish.densities[0]) if lesion.organ == "lung" else (wish.liver, wish.densities[1])
        side, _, lobe = place.partition(" ")
        spots[lesion.organ] = (Spot(side=side, lobe=lobe, size_mm=round(2 * lesion.radius_mm), density=density),)
    gone = "spleen" in anatomy.removed
    return Facts(
        contrast=wish.contrast,
        spleen=wish.spleen,
        spleen_mm=0 if gone else round(2 * float(anatomy.organs["spleen"].radii_mm.max())),
        kidneys=wish.kidneys,
        effusion=wish.effusion,
        amount=wish.amount,
        lung=spots["lung"],
        liver=spots["liver"],
    )
