"""From stored numbers to HU or intensities: unused bits, sign, padding, and each slice's own rescale."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from voxelstem.errors import IngestError
from voxelstem.sources import raster
from voxelstem.sources.header import Header
from voxelstem.sources.pixels import Layout, Plane

AIR_HU = -1024.0
"""What padding of a CT becomes: the lowest value of the 12-bit scale that scanners use."""
HIGHEST_HU = 31_743.0
"""The end of the extended scale (16 bits, from -1024 HU, ten times 12 bits): no scanner stores more."""
MOST_BITS = 16  # whole numbers of so many bits, times a whole slope, are exact in float32


class Reading:
    """Turns the stored numbers of one series into values, and keeps what all of them tell together."""

    def __init__(self, modality: str) -> None:
        """Begin a series of this modality, `CT` or `MR`."""
        self.modality = modality
        self.low, self.high = np.nan, np.nan
        self.padded = self.holes = self.stray = 0
        self._kept_padding = False
        self._unextended = False
        self._below: set[float] = set()

    def values(
        self, raw: Plane, stored: Layout, header: Header, *, slope: float, intercept: float
    ) -> Float[np.ndarray, "row column"]:
        """HU or intensities of one slice. Padding becomes `AIR_HU` in a CT, NaN in an MR (see `holes`).

        Raises:
            IngestError: `stray-bits`, or `corrupt`.
        """
        values, unextended, stray = in_range(raw, stored, header)
        if stray and self.modality != "CT":
            raise stray_bits(
                f"{header.name} says that it stores {stored.bits_stored} bits, and {stray} values need more"
            )
        self.stray += stray
        self._unextended |= unextended
        if slope.is_integer() and intercept.is_integer() and stored.bits_allocated <= MOST_BITS:
            plane = np.multiply(values, np.float32(slope), dtype=np.float32, casting="unsafe")
            plane += np.float32(intercept)
        else:
            plane = (values * slope + intercept).astype(np.float32)
        padding = padding_range(header, stored)
        if padding is not None:
            self._clear(plane, (values >= padding[0]) & (values <= padding[1]))
        self.low, self.high = float(np.fmin(self.low, np.nanmin(plane))), float(np.fmax(self.high, np.nanmax(plane)))
        if self._unextended:
            low = plane[plane < AIR_HU]
            self._below |= {float(low.min()), float(low.max())} if low.size else set()
        return plane

    def _clear(self, plane: Float[np.ndarray, "row column"], padding: Bool[np.ndarray, "row column"]) -> None:
        """Take the padding out, if there is any and it is none of a CT's own values."""
        count = int(np.count_nonzero(padding))
        if not count:
            return
        if self.modality != "CT":
            self.holes += count
            plane[padding] = np.nan
            return
        low, high = float(plane[padding].min()), float(plane[padding].max())
        if high < AIR_HU or low > HIGHEST_HU:
            self.padded += count
            plane[padding] = AIR_HU
        elif (low, high) != (AIR_HU, AIR_HU):
            self._kept_padding = True

    def is_wrapped(self) -> bool:
        """Whether a CT's values prove that their sign was read wrongly.

        Either they lie beyond every scanner's scale, or numbers whose sign the unused bits do not repeat would be
        of many kinds below air, where nothing but one padding value can be.
        """
        return self.modality == "CT" and (self.high > HIGHEST_HU or (self._unextended and len(self._below) > 1))

    def notes(self) -> tuple[str, ...]:
        """What was done to padding, for the provenance."""
        said = [f"{self.padded} voxels of padding set to {AIR_HU:g} HU"] if self.padded else []
        said += [f"{self.holes} voxels of padding set to the lowest value beside them"] if self.holes else []
        said += ["padding values that lie within the scale of HU were kept"] if self._kept_padding else []
        return tuple(said)


def may_be_wrong(stored: Layout) -> bool:
    """Whether a sign read from the header can turn out wrong, so that the pixels must be decoded once more."""
    return stored.signed if stored.bits_stored < stored.bits_allocated else not stored.signed


def in_range(values: Plane, stored: Layout, header: Header) -> tuple[Plane, bool, int]:
    """Take the stored bits out of the allocated ones.

    Returns:
        The values; whether negative ones came without their sign in the unused bits (the standard allows that, but so
        look positive values of 2^(bits - 1) and more that were declared signed by mistake); and how many values need
        unused bits that nothing explains. Those are left as they are: what they mean, the whole series must prove.
    """
    if stored.bits_stored == stored.bits_allocated:
        return values, False, 0
    span, shift = 1 << stored.bits_stored, stored.high_bit + 1 - stored.bits_stored
    low, high = int(values.min()), int(values.max())
    if not shift:
        if (-span // 2 if stored.signed else 0) <= low and high < (span // 2 if stored.signed else span):
            return values, False, 0
        if stored.signed and low >= 0 and high < span:
            return np.where(values >= span // 2, values.astype(np.int32) - span, values), True, 0
        padding = padding_range(header, stored)
        outside = (values < (-span // 2 if stored.signed else 0)) | (values >= (span // 2 if stored.signed else span))
        stray = outside if padding is None else outside & ~((values >= padding[0]) & (values <= padding[1]))
        count = int(np.count_nonzero(stray))
        if not count or not _has_overlay(header):
            return values, False, count
    values = (values.astype(np.int64) >> shift) & (span - 1)
    return (np.where(values >= span // 2, values - span, values) if stored.signed else values), False, 0


def stray_bits(problem: str) -> IngestError:
    """The refusal of values that need more bits than the header says were stored."""
    hint = "nothing proves which bits count; export the original series"
    return IngestError(problem, code="stray-bits", hint=hint)


def _has_overlay(header: Header) -> bool:
    """Whether the header says that unused bits of the pixels hold a drawing, as PS3.3 C.9.2 (retired) allowed."""
    groups = range(0x6000, 0x6020, 2)
    return any((group, 0x0102) in header.dataset and (group, 0x3000) not in header.dataset for group in groups)


def padding_range(header: Header, stored: Layout) -> tuple[int, int] | None:
    """The stored values that mean "nothing was measured here" (PS3.3, C.7.5.1.1.2), lowest and highest.

    Writers disagree on the sign of these numbers, so they are read as the pixels are.
    """
    edges = [*header.values("PixelPaddingValue"), *header.values("PixelPaddingRangeLimit")]
    if not edges:
        return None
    try:
        whole = [int(str(edge)) % (1 << stored.bits_allocated) for edge in edges]
    except ValueError as problem:
        raise raster.corrupt(header.name, "its PixelPaddingValue is not a number") from problem
    signed = [
        value - (1 << stored.bits_allocated) if stored.signed and value >> (stored.bits_allocated - 1) else value
        for value in whole
    ]
    return min(signed), max(signed)
