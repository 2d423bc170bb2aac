"""Image biomarkers by name: the names that the Image Biomarker Standardisation Initiative (IBSI) gave them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Float

FEATURES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "stat_mean": ("Q4LE", "mean"),
        "stat_var": ("ECT3", "variance"),
        "stat_skew": ("KE2A", "skewness"),
        "stat_kurt": ("IPH6", "excess kurtosis"),
        "stat_median": ("Y12H", "median"),
        "stat_min": ("1GSF", "minimum"),
        "stat_p10": ("QG58", "10th percentile"),
        "stat_p90": ("8DWT", "90th percentile"),
        "stat_max": ("84IY", "maximum"),
        "stat_iqr": ("SALO", "interquartile range"),
        "stat_range": ("2OJQ", "range"),
        "stat_mad": ("4FUA", "mean absolute deviation"),
        "stat_rmad": ("1128", "robust mean absolute deviation"),
        "stat_medad": ("N72L", "median absolute deviation"),
        "stat_cov": ("7TET", "coefficient of variation"),
        "stat_qcod": ("9S40", "quartile coefficient of dispersion"),
        "stat_energy": ("N8CA", "energy"),
        "stat_rms": ("5ZWQ", "root mean square"),
        "ih_mean": ("X6K6", "mean discretised intensity"),
        "ih_var": ("CH89", "discretised intensity variance"),
        "ih_skew": ("88K1", "discretised intensity skewness"),
        "ih_kurt": ("C3I7", "excess discretised intensity kurtosis"),
        "ih_median": ("WIFQ", "median discretised intensity"),
        "ih_min": ("1PR8", "minimum discretised intensity"),
        "ih_p10": ("GPMT", "10th discretised intensity percentile"),
        "ih_p90": ("OZ0C", "90th discretised intensity percentile"),
        "ih_max": ("3NCY", "maximum discretised intensity"),
        "ih_mode": ("AMMC", "intensity histogram mode"),
        "ih_iqr": ("WR0O", "discretised intensity interquartile range"),
        "ih_range": ("5Z3W", "discretised intensity range"),
        "ih_mad": ("D2ZX", "intensity histogram mean absolute deviation"),
        "ih_rmad": ("WRZB", "intensity histogram robust mean absolute deviation"),
        "ih_medad": ("4RNL", "intensity histogram median absolute deviation"),
        "ih_cov": ("CWYJ", "intensity histogram coefficient of variation"),
        "ih_qcod": ("SLWD", "intensity histogram quartile coefficient of dispersion"),
        "ih_entropy": ("TLU2", "discretised intensity entropy"),
        "ih_uniformity": ("BJ5W", "discretised intensity uniformity"),
        "ih_max_grad": ("12CE", "maximum histogram gradient"),
        "ih_max_grad_g": ("8E6O", "maximum histogram gradient intensity"),
        "ih_min_grad": ("VQB3", "minimum histogram gradient"),
        "ih_min_grad_g": ("RHQZ", "minimum histogram gradient intensity"),
        "morph_volume": ("RNU0", "volume (mesh)"),
        "morph_vol_approx": ("YEKZ", "volume (voxel counting)"),
        "morph_area_mesh": ("C0JK", "surface area (mesh)"),
        "morph_av": ("2PR5", "surface to volume ratio"),
        "morph_comp_1": ("SKGS", "compactness 1"),
        "morph_comp_2": ("BQWJ", "compactness 2"),
        "morph_sph_dispr": ("KRCK", "spherical disproportion"),
        "morph_sphericity": ("QCFX", "sphericity"),
        "morph_asphericity": ("25C7", "asphericity"),
        "morph_com": ("KLMA", "centre of mass shift"),
        "morph_diam": ("L0JK", "maximum 3D diameter"),
        "morph_pca_maj_axis": ("TDIC", "major axis length"),
        "morph_pca_min_axis": ("P9VJ", "minor axis length"),
        "morph_pca_least_axis": ("7J51", "least axis length"),
        "morph_pca_elongation": ("Q3CK", "elongation"),
        "morph_pca_flatness": ("N17B", "flatness"),
        "morph_vol_dens_aabb": ("PBX1", "volume density (axis-aligned bounding box)"),
        "morph_area_dens_aabb": ("R59B", "area density (axis-aligned bounding box)"),
        "morph_vol_dens_aee": ("6BDE", "volume density (approximate enclosing ellipsoid)"),
        "morph_area_dens_aee": ("RDD2", "area density (approximate enclosing ellipsoid)"),
        "morph_vol_dens_conv_hull": ("R3ER", "volume density (convex hull)"),
        "morph_area_dens_conv_hull": ("7T7F", "area density (convex hull)"),
        "morph_integ_int": ("99N0", "integrated intensity"),
    }
)
"""Every feature by its tag in IBSI's tables of reference values: its permanent code, and its name in the manual.
Lengths are in mm, areas in mm2, volumes in mm3, intensities in the scan's unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Biomarkers:
    """Features of one region, by name. A value is NaN where its definition divides by zero."""

    names: tuple[str, ...]
    values: Float[np.ndarray, "feature"]

    def __post_init__(self) -> None:
        """Guard the vector.

        Raises:
            ValueError: not one value for each name, a name that occurs twice, or a value that is infinite.
        """
        if self.values.shape != (len(self.names),):
            raise ValueError(f"{len(self.names)} names need as many values, got shape {self.values.shape}")
        if len(set(self.names)) < len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"a feature has one value, and these occur twice: {', '.join(twice)}")
        if np.isinf(self.values).any():
            raise ValueError("a feature is finite or NaN, and one of these is infinite")

    def __getitem__(self, name: str) -> float:
        """The value of one feature.

        Raises:
            KeyError: it was not measured.
        """
        if name not in self.names:
            raise KeyError(f"{name} was not measured; there are {', '.join(self.names)}")
        return float(self.values[self.names.index(name)])

    def only(self, names: Sequence[str]) -> Biomarkers:
        """These features, in this order.

        Raises:
            KeyError: one of them was not measured.
        """
        return Biomarkers(names=tuple(names), values=np.array([self[name] for name in names], dtype=np.float64))

    @property
    def undefined(self) -> tuple[str, ...]:
        """Names of the features that have no value here."""
        return tuple(name for name, nan in zip(self.names, np.isnan(self.values), strict=True) if nan)
