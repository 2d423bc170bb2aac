"""What the catalogue knows of a volume, as a record and as rows of its tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from voxelstem.store.splits import Split
from voxelstem.study import Acquisition, Provenance, Report

Triple = tuple[int, int, int]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Native:
    """The scan before it was resampled, kept beside it by choice."""

    key: str
    """SHA-256 of its content; also its file's name."""
    voxels: str
    """SHA-256 of its voxel values alone."""
    bytes: int
    """Of its file; its voxel labels are counted apart."""
    channels: int
    shape_ijk: Triple
    affine_ras: Float[np.ndarray, "4 4"]
    slope: float
    intercept: float
    label_key: str = ""
    """Name of the file with the voxel labels on its own grid; empty where there are none."""
    label_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Record:
    """What the catalogue knows of one volume, without touching its voxels."""

    key: str
    """SHA-256 of the volume's content; also its file's name."""
    voxels: str
    """SHA-256 of the voxel values alone: equal for two copies of a scan whose headers differ."""
    subject: str
    """A pseudonym, see `store.subjects`."""
    study: str
    """Volumes of one examination share this."""
    modality: str
    channels: int
    shape_ijk: Triple
    spacing_mm: tuple[float, float, float]
    affine_ras: Float[np.ndarray, "4 4"]
    body_start_ijk: Triple
    """The box that holds the patient (CT: all voxels above -500 HU); the whole volume for other modalities."""
    body_size_ijk: Triple
    dtype: str
    slope: float
    """Value = stored number * slope + intercept, in HU for CT."""
    intercept: float
    split: Split
    bytes: int
    """On disk, voxel labels and the native scan included."""
    label_key: str
    """Name of the file with the voxel labels; empty where there are none."""
    label_bytes: int
    classes: Mapping[int, str]
    """Names of the voxel labels' values."""
    labels: Mapping[str, str]
    """Scan-level facts, such as `lesion: yes`."""
    report: Report | None
    provenance: Provenance
    ingested: str
    """When, ISO 8601 in UTC."""
    acquisition: Acquisition = field(default_factory=Acquisition)
    """How, when and of whom it was made; de-identified."""
    thumbnail: bytes = b""
    """The volume in at most a KiB, see `store.thumbnails`; empty where an earlier version wrote it."""
    native: Native | None = None

    @property
    def has_labels(self) -> bool:
        """Whether there are voxel labels."""
        return bool(self.label_key)

    @property
    def volume_bytes(self) -> int:
        """Size of the volume's own file."""
        beside = self.native.bytes + self.native.label_bytes if self.native else 0
        return self.bytes - self.label_bytes - beside

    @property
    def group(self) -> str:
        """What near-copies share: the acquisition they were reconstructed from, else the voxel values themselves."""
        return self.acquisition.group or self.voxels


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A line of the ledger: a source that did not get in, and why. `source` names nobody (`subjects.source_name`)."""

    source: str
    code: str
    reason: str


_PLAIN = ("key", "voxels", "subject", "study", "modality", "channels", "dtype", "slope", "intercept", "split")
_LATER = ("label_key", "label_bytes", "ingested")
_SAID = ("session", "contrast", "age_years", "sex", "date", "series")
_GRID = ("voxels", "channels", "shape_ijk", "slope", "intercept")


def to_rows(record: Record) -> tuple[Row, Row]:
    """Turn a record into its row of `volumes`, what can be asked about, and its row of `details`, all the rest."""
    said, native = record.acquisition, record.native
    narrow: Row = {name: getattr(record, name) for name in (*_PLAIN, *_LATER)}
    narrow |= {name: getattr(said, name) for name in _SAID}
    narrow |= dict(zip(("size_i", "size_j", "size_k"), record.shape_ijk, strict=True))
    narrow |= dict(zip(("spacing_i", "spacing_j", "spacing_k"), record.spacing_mm, strict=True))
    narrow |= {
        "acq_study": said.study,
        "acq_group": said.group,
        "bytes": record.volume_bytes,
        "reported": int(record.report is not None),
        "language": record.report.language if record.report else "",
        "source_format": record.provenance.source_format,
        "native_key": native.key if native else "",
        "native_bytes": native.bytes if native else 0,
        "native_label_key": native.label_key if native else "",
        "native_label_bytes": native.label_bytes if native else 0,
    }
    grid: Row | None = None
    if native is not None:
        grid = {name: getattr(native, name) for name in _GRID} | {"affine_ras": native.affine_ras.tolist()}
    wide: Row = {
        "affine": json.dumps(record.affine_ras.tolist()),
        "body": json.dumps([record.body_start_ijk, record.body_size_ijk]),
        "classes": json.dumps({str(value): name for value, name in sorted(record.classes.items())}),
        "labels": json.dumps(dict(record.labels), sort_keys=True),
        "report": None if record.report is None else _write_report(record.report),
        "provenance": json.dumps(asdict(record.provenance), sort_keys=True),
        "facts": json.dumps(dict(said.facts), sort_keys=True),
        "native": None if grid is None else json.dumps(grid, sort_keys=True),
    }
    return narrow, wide


def to_record(row: Mapping[str, Any]) -> Record:
    """Turn a row of both tables, joined, back into a record."""
    start, size = json.loads(row["body"])
    provenance = json.loads(row["provenance"])
    provenance["notes"] = tuple(provenance["notes"])
    native = _to_native(row)
    beside = native.bytes + native.label_bytes if native else 0
    return Record(
        **{name: row[name] for name in (*_PLAIN, *_LATER)},
        shape_ijk=(row["size_i"], row["size_j"], row["size_k"]),
        spacing_mm=(row["spacing_i"], row["spacing_j"], row["spacing_k"]),
        affine_ras=_affine(json.loads(row["affine"])),
        body_start_ijk=tuple(start),
        body_size_ijk=tuple(size),
        bytes=row["bytes"] + row["label_bytes"] + beside,
        classes={int(value): name for value, name in json.loads(row["classes"]).items()},
        labels=json.loads(row["labels"]),
        report=None if row["report"] is None else _read_report(row["report"]),
        provenance=Provenance(**provenance),
        acquisition=Acquisition(
            **{name: row[name] for name in _SAID},
            study=row["acq_study"],
            group=row["acq_group"],
            facts=json.loads(row["facts"]),
        ),
        thumbnail=row["thumbnail"] or b"",
        native=native,
    )


def _write_report(report: Report) -> str:
    """Only what is said, so that a report without the newer sections reads everywhere."""
    return json.dumps({name: said for name, said in asdict(report).items() if said}, sort_keys=True)


def _read_report(text: str) -> Report:
    said: dict[str, Any] = json.loads(text)
    for name in ("findings_rewrites", "impression_rewrites", "icd10"):
        said[name] = tuple(said.get(name, ()))
    return Report(**said)


def _to_native(row: Mapping[str, Any]) -> Native | None:
    if row["native"] is None:
        return None
    grid = json.loads(row["native"])
    grid |= {"affine_ras": _affine(grid["affine_ras"]), "shape_ijk": tuple(grid["shape_ijk"])}
    names = ("key", "bytes", "label_key", "label_bytes")
    return Native(**grid, **{name: row[f"native_{name}"] for name in names})


def _affine(rows: list[list[float]]) -> Float[np.ndarray, "4 4"]:
    affine = np.array(rows, dtype=np.float64)
    affine.flags.writeable = False
    return affine
