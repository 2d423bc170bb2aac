"""Gates that a scan passes before it is believed: what kind of values it holds, and whether a CT's are HU.

Wrong values pass every check of form, so these gates look at the values themselves: in Hounsfield units air lies at
-1000 and fat, water and organs within 200 of 0, whatever the patient and the scanner. A scan that fits is accepted.
One that would fit after an offset, a factor or a change of sign is refused and told what was done to it.
`benchmarks/gates.py` measures both kinds of error on real scans and on faults made from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped

from voxelstem.errors import IngestError

MODALITIES = ("CT", "MR")

AIR_HU = -500.0
LOWEST_HU = -4000.0  # GE pads with -3024; phase images of MR begin at -4096
AIR_SHARE = 0.005
BONE_HU = 300.0
MOST_CLASSES = 256
FLAT_SHARE = 0.85  # measured: expert masks 0.977 and more, 8-bit MR 0.66 and less
THREE = 3

FEWEST_VOXELS = 8_000  # fewer make no histogram
SAMPLED_VOXELS = 2**18
SAMPLED_SLICES = 24

# Shares, in brackets what 37 clean CTs of 30 patients have: whole ones, crops round a limb, head and chest.
LEAST_AIR = 0.01  # from -1100 to -800, of all (0.09 to 0.75)
LEAST_SOFT = 0.005  # from -200 to 200, of all
SOFT_OF_BODY = 0.6  # from -200 to 200, of all above -250 (0.82 to 0.98)
MOST_BONE = 0.3  # above 500, of all above -400 (0.005 to 0.15)
MOST_BELOW_AIR = 0.02  # below -1200, padding apart (0 to 0.00002)
MOST_BETWEEN = 0.7  # from -800 to -250, for each one from -200 to 200 (0.02 to 0.28; MR less 1024: 1.03 and more)
NARROW_SHARE = 0.2  # of all from -800 to -250 within 30 HU of one another about -500 (0.07 at the most)
LEAST_COLD = 0.005  # below -50 in a crop without air: fat
PADDING_HU = -1100.0
PADDING_GAP_HU = 150.0
PADDING_SHARE = 0.001

WRAP_HU = 3300.0  # a wrap of 12 bits is a step of 4096; a real edge is blurred over several voxels
WRAP_LENGTH = 64  # voxels: longer runs lie between two things of metal
WRAP_VOXELS = 2**22  # looked at for wraps, in whole slices
FEWEST_PITS = 2  # found in clean scans: 0
FEWEST_HILLS = 20  # found in clean scans: 2 at the most, at thin wires
NARROWEST_RANGE_HU = 50.0
BYTE = 255.0

SOP_MODALITIES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",
}
"""What each image class of the standard holds (PS3.4, B.5): plain, enhanced, legacy converted."""
STANDARD_IMAGES = "1.2.840.10008.5.1.4.1.1."
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

REFUSED_WORDS = (
    ("localizer", "a localizer", ("LOCALIZER", "SCOUT", "TOPOGRAM")),
    ("dose-screen", "a dose report", ("DOSE", "DOSE_INFO", "DOSE REPORT")),
    ("screen-save", "a picture of a screen", ("SCREEN SAVE", "SCREENSAVE", "SCREEN", "PROTOCOL", "PASTED")),
    (
        "projection",
        "a projection of many slices",
        ("MIP", "MINIP", "MIN_IP", "MAX_IP", "PROJECTION IMAGE", "VOLUME RENDER"),
    ),
)
"""Code, what it is, and the words in ImageType (C.7.6.1.1.2, C.8.2.1.1.1, C.8.16.1, and what scanners write)."""

_Values = Float[np.ndarray, " _voxel"]

RESCUES: tuple[tuple[str, str, Callable[[_Values], _Values]], ...] = (
    ("no-rescale", "they lie 1024 too high: the rescale intercept was never added", lambda v: v - 1024),
    ("no-rescale", "they lie 1000 too high: the rescale intercept was never added", lambda v: v - 1000),
    ("no-rescale", "they lie 8192 too high: the rescale intercept was never added", lambda v: v - 8192),
    ("no-rescale", "they lie 32768 too high: stored numbers without their sign", lambda v: v - 32768),
    ("rescaled-twice", "they lie 1024 too low: the rescale intercept was added twice", lambda v: v + 1024),
    ("rescaled-twice", "they lie 1000 too low: the rescale intercept was added twice", lambda v: v + 1000),
    ("rescaled-twice", "they lie 8192 too low: the rescale intercept was added twice", lambda v: v + 8192),
    ("wrong-slope", "they are twice as large as HU", lambda v: v / 2),
    ("wrong-slope", "they are half as large as HU", lambda v: v * 2),
    ("wrong-slope", "they are ten times as large as HU", lambda v: v / 10),
    ("wrong-slope", "they are a tenth of HU", lambda v: v * 10),
    ("wrong-slope", "stored numbers were doubled before the intercept", lambda v: (v + 1024) / 2 - 1024),
    ("wrong-slope", "stored numbers were halved before the intercept", lambda v: (v + 1024) * 2 - 1024),
    ("inverted", "their sign is turned", lambda v: -v),
    ("inverted", "bright and dark are exchanged", lambda v: 2047 - v),
    ("wrong-unit", "they are a thousandth of HU", lambda v: v * 1000),
    ("wrong-unit", "stored numbers were scaled to 0..1", lambda v: v * 4095 - 1024),
)
"""Code, what was done to the values, and how it is undone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFacts:
    """What a header says of one picture, as it says it; an empty word where it says nothing."""

    modality: str
    sop_class: str = ""
    """SOPClassUID."""
    image_type: tuple[str, ...] = ()
    burned_in: str = ""
    """BurnedInAnnotation: `YES` or `NO`."""
    patient_position: str = ""
    """Such as `HFS`: head first, supine."""
    orientation: tuple[float, ...] = ()
    """ImageOrientationPatient."""


def check_image(facts: ImageFacts, *, name: str = "the image") -> tuple[str, ...]:
    """Refuse what is no original CT or MR picture, by its header alone.

    Returns:
        Doubts that are no reason to refuse, in plain words for the provenance.

    Raises:
        IngestError: `wrong-modality` (not CT or MR, or not what its image class holds), `secondary-capture`,
            `localizer`, `dose-screen`, `screen-save`, `projection`, `derived` (reformatted or computed from others)
            or `burned-in`.
    """
    words = tuple(word.strip().upper() for word in facts.image_type)
    if facts.sop_class == SECONDARY_CAPTURE or facts.sop_class.startswith(f"{SECONDARY_CAPTURE}."):
        raise _refused(name, "secondary-capture", "a secondary capture, a picture of another picture")
    for code, what, refused in REFUSED_WORDS:
        if any(word in refused for word in words):
            raise _refused(name, code, what)
    if words[:2] == ("DERIVED", "SECONDARY"):
        raise _refused(name, "derived", "derived from other pictures")
    if facts.burned_in.strip().upper() == "YES":
        raise _refused(name, "burned-in", "marked as holding burned-in annotation, which may name the patient")
    if facts.modality not in MODALITIES:
        raise _refused(name, "wrong-modality", f"of another modality than {' and '.join(MODALITIES)}")
    held = SOP_MODALITIES.get(facts.sop_class, "another kind")
    if held != facts.modality and facts.sop_class.startswith(STANDARD_IMAGES):
        raise _refused(name, "wrong-modality", f"said to be {facts.modality} in a file for {held}")
    return _position_doubts(facts)


def _refused(name: str, code: str, what: str) -> IngestError:
    return IngestError(f"{name} is {what}", code=code, hint="export the original series")


def _position_doubts(facts: ImageFacts) -> tuple[str, ...]:
    """Where an axial picture lies otherwise than a patient in that position is shown.

    PatientPosition describes how the patient lay, and does not change how the picture lies (C.7.3.1.1.2), so this is a
    doubt only: scanners turn pictures of feet-first and prone patients in different ways, but the patient's left of
    one who lies head first on the back is at the right of the picture and the back below.
    """
    if facts.patient_position.strip().upper() != "HFS" or len(facts.orientation) != 6:  # noqa: PLR2004 - two vectors
        return ()
    row, column = np.array(facts.orientation[:3]), np.array(facts.orientation[3:])
    axial = abs(np.cross(row, column)[2]) > 0.7  # noqa: PLR2004 - within 45 degrees
    if not axial or (row[0] > 0.7 and column[1] > 0.7):  # noqa: PLR2004
        return ()
    return ("patient-position: a patient on the back, head first, is shown mirrored or turned",)


def tell_kind(array: Shaped[np.ndarray, "i j k"], *, modality: str | None = None) -> tuple[str, str]:
    """Decide from the values alone what files without a modality hold: `CT`, `MR` or `label-map`.

    A CT has an air peak: its minimum lies between -4000 and -500 HU and either 0.5 % of the voxels are below
    -500 or the values run from below -900 to above 300. A label map has few whole numbers from zero up, and
    neighbours inside its regions are equal. Everything else counts as MR.

    Args:
        array: The voxels as stored, after the file's own slope and intercept.
        modality: What somebody who knows says it is. It decides between CT and MR, so that a crop of a CT without
            air is one; a mask stays a mask.

    Returns:
        The word and the reason for it, for the provenance.
    """
    low, high = float(array.min()), float(array.max())
    if modality is None and LOWEST_HU < low <= AIR_HU:
        share = float(np.count_nonzero(array < AIR_HU)) / array.size
        if share >= AIR_SHARE or (low <= -900.0 and high > BONE_HU):  # noqa: PLR2004 - air, as in the docstring
            return "CT", f"taken for CT: values {low:g} to {high:g}, {share:.1%} below {AIR_HU:g}"
    if low >= 0 and _is_label_map(array, high):
        return "label-map", f"few whole numbers from {low:g} to {high:g} in even regions"
    if modality is not None:
        return modality, f"said to be {modality}: values {low:g} to {high:g}"
    return "MR", f"taken for MR: values {low:g} to {high:g}, no air peak of a CT"


def check_hu(array: Float[np.ndarray, "i j k"], *, name: str = "the series", airless: bool = False) -> None:
    """Refuse a CT whose values are not Hounsfield units.

    Args:
        array: Values that should be HU; at least `FEWEST_VOXELS`, fewer are not judged. Padding below -1100 (one
            value, far from the others) is overlooked.
        name: What a message calls the scan.
        airless: Whether it may be a crop without air, which proves less. Whole scans always show air.

    Raises:
        IngestError: `no-rescale`, `rescaled-twice`, `wrong-slope`, `inverted`, `wrong-unit`, `windowed` (8-bit
            pictures), `wrapped` (12 bits overflowed), or `not-hu` where nothing explains the values, as in MR or PET.
    """
    if array.size < FEWEST_VOXELS:
        return
    values = _sample(array)
    if not any(_is_hu(some) for some in _with_and_without_padding(values)):
        found = _rescue(values)
        if found is not None:
            raise _not_hu(name, *found)
        if not (airless and _may_be_airless(values)):
            raise _not_hu(name, *_unexplained(values))
    pits, hills = _count_wraps(array)
    if pits >= FEWEST_PITS or hills >= FEWEST_HILLS:
        raise _not_hu(name, "wrapped", f"{pits + hills} runs lie about 4096 beside others: 12 bits overflowed")


def check_mr(array: Float[np.ndarray, "i j k"], *, name: str = "the series") -> None:
    """Refuse an MR whose values are those of a CT, as they are or after an offset or a factor.

    Args:
        array: Values without a unit; at least `FEWEST_VOXELS`, fewer are not judged.
        name: What a message calls the scan.

    Raises:
        IngestError: `wrong-modality` for a CT in HU, else as `check_hu` calls what was done to the CT.
    """
    if array.size < FEWEST_VOXELS:
        return
    values = _sample(array)
    if any(_is_hu(some) for some in _with_and_without_padding(values)):
        raise IngestError(
            f"'{name}' is said to be MR and holds Hounsfield units: air near -1000, fat and organs near 0",
            code="wrong-modality",
            hint="give it as CT",
        )
    found = _rescue(values, but="inverted")  # an MR's background and its fat do look like a CT with its sign turned
    if found is not None:
        raise _not_hu(name, *found)


def _not_hu(name: str, code: str, what: str) -> IngestError:
    return IngestError(
        f"the values of '{name}' are not Hounsfield units: {what}",
        code=code,
        hint="export or convert the scan again from the original series",
    )


def _sample(array: Float[np.ndarray, "i j k"]) -> _Values:
    """Every n-th voxel along each axis, about `SAMPLED_VOXELS` of them."""
    size = array.size
    strides: list[int] = []
    for edge in sorted(array.shape):  # short axes are thinned least
        left = THREE - len(strides)
        strides.append(min(max(round((size / SAMPLED_VOXELS) ** (1 / left)), 1), max(edge // 8, 1)))
        size = math.ceil(size / strides[-1])
    order = np.argsort(array.shape, kind="stable")
    by_axis = [strides[int(np.flatnonzero(order == axis)[0])] for axis in range(THREE)]
    return array[:: by_axis[0], :: by_axis[1], :: by_axis[2]].ravel().astype(np.float64)


def _with_and_without_padding(values: _Values) -> Iterator[_Values]:
    """The values; then those without the lowest, where it stands apart as a scanner's padding does."""
    yield values
    lowest = float(values.min())
    padding = values == lowest
    rest = values[~padding]
    if lowest >= PADDING_HU or padding.mean() < PADDING_SHARE or not rest.size:
        return
    if float(np.percentile(rest, 5)) - lowest > PADDING_GAP_HU:
        yield rest


def _is_hu(values: _Values) -> bool:
    """Whether air and soft tissue lie where they do in HU, and next to nothing lies where no tissue does."""
    soft = _count(values, -200.0, 200.0)
    between = values[(values >= -800) & (values < -250)]  # noqa: PLR2004 - lung and the edges of the body
    return (
        _count(values, -1100.0, -800.0) >= LEAST_AIR * values.size
        and soft >= LEAST_SOFT * values.size
        and soft >= SOFT_OF_BODY * _count(values, -250.0, np.inf)
        and _count(values, 500.0, np.inf) <= MOST_BONE * _count(values, -400.0, np.inf)
        and _count(values, -np.inf, -1200.0) <= MOST_BELOW_AIR * values.size
        and between.size <= MOST_BETWEEN * soft
        and (between.size < LEAST_AIR * values.size or not _is_narrow(between))
    )


def _is_narrow(values: _Values) -> bool:
    """Whether many of the values lie in a peak about -500, where halved air would and no lung does."""
    counts = np.histogram(values, bins=np.arange(-600.0, -399.0, 10.0))[0]
    return bool(np.convolve(counts, np.ones(3), "same").max() > NARROW_SHARE * values.size)


def _may_be_airless(values: _Values) -> bool:
    """Whether a crop without air may be HU: fat and organs about 0, bone at most beside them."""
    soft = _count(values, -200.0, 200.0)
    return (
        float(values.max() - values.min()) >= NARROWEST_RANGE_HU
        and soft >= SOFT_OF_BODY * values.size
        and _count(values, -np.inf, -50.0) >= LEAST_COLD * values.size
        and _count(values, -np.inf, -1200.0) <= MOST_BELOW_AIR * values.size
    )


def _count(values: _Values, low: float, high: float) -> int:
    return int(np.count_nonzero((values >= low) & (values < high)))


def _rescue(values: _Values, *, but: str = "") -> tuple[str, str] | None:
    """The code and the words of what was done to HU, if undoing it gives them back."""
    tried = list(_with_and_without_padding(values))
    for code, what, undo in RESCUES:
        if code != but and any(_is_hu(undo(some)) for some in tried):
            return code, what
    return None


def _unexplained(values: _Values) -> tuple[str, str]:
    low, high = float(values.min()), float(values.max())
    if high - low < NARROWEST_RANGE_HU:
        return "wrong-unit", f"they run from {low:g} to {high:g} only"
    if low >= 0 and high <= BYTE:
        return "windowed", f"they run from {low:g} to {high:g} as in an 8-bit picture"
    return "not-hu", f"they run from {low:g} to {high:g}, without air near -1000 and soft tissue near 0"


def _count_wraps(array: Float[np.ndarray, "i j k"]) -> tuple[int, int]:
    """Pits and hills: short runs within a slice that a step of about 4096 leads into, and one back out of.

    A step alone proves nothing: metal may end beside the dark streak that it throws. But where a dense thing overflows,
    the step into the dark has its way back on the other side, and noise of air that overflows stands alone.
    """
    count = min(max(WRAP_VOXELS // (array.shape[0] * array.shape[1]), 1), array.shape[2])
    chosen = np.unique(np.linspace(0, array.shape[2] - 1, count).astype(int))
    slices = np.ascontiguousarray(np.moveaxis(array[:, :, chosen], 2, 0), np.float32)
    lowest = float(slices.min())
    if float(slices.max()) - lowest < WRAP_HU:
        return 0, 0
    if lowest < PADDING_HU:
        slices[slices == lowest] = -1000
    pits = hills = 0
    for axis in (1, 2):
        steps = np.diff(np.moveaxis(slices, axis, 2), axis=2)
        length = steps.shape[2]
        at = np.flatnonzero(np.abs(steps) >= WRAP_HU)
        up = steps.ravel()[at] > 0
        near = (at[1:] // length == at[:-1] // length) & (at[1:] - at[:-1] <= WRAP_LENGTH)
        pits += int(np.count_nonzero(near & ~up[:-1] & up[1:]))
        hills += int(np.count_nonzero(near & up[:-1] & ~up[1:]))
    return pits, hills


def _is_label_map(array: Shaped[np.ndarray, "i j k"], high: float) -> bool:
    if high > np.iinfo(np.int16).max:
        return False
    seen = np.zeros(np.iinfo(np.int16).max + 1, bool)
    for k in range(array.shape[2]):  # slice by slice: a scan shows soon that it is none, and nothing large is made
        whole = array[..., k].astype(np.int16)
        if array.dtype.kind == "f" and not np.array_equal(whole, array[..., k]):
            return False
        seen[whole] = True
        if np.count_nonzero(seen) > MOST_CLASSES:
            return False
    whole = array.astype(np.int16)
    equal = pairs = 0
    for axis in range(THREE):
        lines = np.moveaxis(whole, axis, 0)
        both = (lines[1:] > 0) & (lines[:-1] > 0)
        pairs += int(np.count_nonzero(both))
        equal += int(np.count_nonzero(both & (lines[1:] == lines[:-1])))
    return equal >= FLAT_SHARE * pairs
