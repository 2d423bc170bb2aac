"""One scan's way to its embedding: read, check, stream through the network, pool.

The same function for every scan, whichever process or machine it runs in; `embed` hands out the tasks and writes.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from voxelstem.backbones.compute import Precision, Way
from voxelstem.backbones.pools import Pool
from voxelstem.embedding import FITS, UNJUDGED, Computing, Embedding, Feeding, Underway, pack, read
from voxelstem.errors import ConfigError, IngestError, StoreError, VoxelstemError
from voxelstem.intake import scrub
from voxelstem.manifest import Row
from voxelstem.model import Model, Only
from voxelstem.packing import Packer
from voxelstem.sources import Source, ct_rate
from voxelstem.sources.gates import FEWEST_VOXELS
from voxelstem.store import Store
from voxelstem.store.encoding import content_key
from voxelstem.store.subjects import keyed_id, pseudonym
from voxelstem.streaming import of_store, with_spacing
from voxelstem.study import Study
from voxelstem.weights import hub
from voxelstem.workers import ahead

NO_MEMORY = "can't allocate memory"
COLUMNS_AHEAD = 2
"""Columns of blocks that wait for the network. The next scan is read while they do, when this one's voxels are gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """How scans are embedded; everything that decides the numbers is written into `out`/embed.json."""

    precision: Precision = "fp32"
    """Number format of the network's arithmetic; the manifest states the error that was measured."""
    tokens: bool = False
    """Keep the patch tokens too."""
    like_spectre: bool = False
    """Cut the scan to whole blocks about its middle, as the original of SPECTRE does, instead of padding its end."""
    spacing: str | tuple[float, float, float] | None = None
    """Another spacing than the card's: a name in `study.INPUT_SPECS`, `native`, or millimetres along R, A, S."""
    pool: Pool = "cls-mean"
    """What a block (and a scan) is described by: cls, the mean of its tokens, or both."""
    compile: bool = False
    """Let torch compile the network: minutes at the start, for many scans."""
    cluster: str | None = None
    """Address of a Ray cluster that embeds in place of this process, see `cluster.Cluster`."""
    commercial: bool = False
    """Claim commercial use: weights whose licence forbids it are refused."""
    layout: Literal["npz", "fomo"] = "npz"
    """Only the .npz of each scan, or also `<id>.npy` as FOMO's probes read it: these names come from the files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One scan to embed, maybe on another machine: a source, or a volume of a store."""

    name: str
    """The manifest's name for it."""
    source: Source | None = None
    store: Path | None = None
    key: str = ""
    """Of the store's volume."""
    known: Row | None = None
    """Its row in the manifest, where its embedding is whole."""

    @property
    def relative(self) -> str:
        """What a person knows it by."""
        return self.source.relative if self.source else f"volume {self.key[:16]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a task. Holds nobody's name."""

    row: Row = field(default_factory=dict)
    packed: bytes = b""
    """The .npz; nothing where it was there before, or the scan was refused."""
    skipped: bool = False
    code: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedder:
    """Embeds tasks in this process; called with one it does the same alone, which is how a cluster uses it."""

    weights: Weights
    sha256: str
    """Digest of the weights that are meant: a machine of a cluster may have others at the same path."""
    how: EmbedConfig
    out: Path
    """Where embeddings of the same content may lie already."""
    key: bytes = field(repr=False)
    way: str = ""
    """Through the network, see `computing_once`."""

    def __call__(self, task: Task) -> Outcome:
        """Embed one scan."""
        return next(self.map([task]))[1]

    def map(
        self, tasks: Iterable[Task], settle: Callable[[], Computing] | None = None
    ) -> Iterator[tuple[Task, Outcome]]:
        """Embed scans, in their order: the next one is read while this one is computed, and they share passes.

        `settle` gives the way through the network, if it is not to be the named one; the first scan is read meanwhile.

        Raises:
            ConfigError: other weights lie here than are meant.
        """
        model = load_once(self.weights)
        if model.card.sha256 != self.sha256:
            raise ConfigError("a machine of the cluster has other weights", hint="copy the same folder to all of them")
        with ahead(self._feed(tasks, model), COLUMNS_AHEAD) as feed:
            computing = settle() if settle else computing_once(self.weights, self.how, self.way)
            packer = Packer(torch.inference_mode()(computing.encode_blocks), per_pass=model.blocks_per_pass)
            waiting: deque[_Place] = deque()
            for place, start, blocks in feed:
                if blocks is None:
                    waiting.append(place)
                elif place.underway is not None:
                    packer.put(place.underway, start, blocks)
                while waiting and waiting[0].ready:
                    yield waiting[0].task, self._outcome(waiting.popleft(), computing)
            packer.flush()
            for place in waiting:
                yield place.task, self._outcome(place, computing)

    def _feed(self, tasks: Iterable[Task], model: Model) -> Iterator[tuple[_Place, int, torch.Tensor | None]]:
        """Announce each task's place, then bring its blocks. Runs beside the network, and holds one scan at a time."""
        feeding = feeding_of(model, self.how)
        for task in tasks:
            place, told = _Place(task), False
            try:
                self._open(place, model, feeding)
                told = True
                yield place, 0, None
                if place.underway is not None:
                    for start, blocks in place.underway.blocks():
                        yield place, start, blocks
            except (VoxelstemError, MemoryError, ValueError, RuntimeError) as error:
                # torch says so when memory is short; anything else that goes wrong inside it is a fault of ours.
                if isinstance(error, RuntimeError) and NO_MEMORY not in str(error):
                    raise
                place.refuse(error)
                if not told:
                    yield place, 0, None

    def _open(self, place: _Place, model: Model, feeding: Feeding) -> None:
        """Read a scan, and lay it out unless its embedding is there."""
        task = place.task
        if task.known is not None:
            place.row, place.skipped = task.known, True
            return
        if task.store is not None:
            store = Store.open(task.store)
            record = store.record(task.key)
            scan, hu = of_store(store, task.key), FITS if record.modality == "CT" else UNJUDGED
            row = {"key": record.key, "subject": record.subject, "modality": record.modality}
            stamp = ""
        else:
            assert task.source is not None
            stamp = stamp_of(task.source, self.key)
            study = _read_source(task.source, model.spec.modality)
            (scan,) = study.volumes
            large = scan.modality == "CT" and scan.array[0].size >= FEWEST_VOXELS
            hu = FITS if large else UNJUDGED  # or the reader would have refused it
            row = {
                "key": content_key(scan),
                "subject": pseudonym(study.subject, self.key),
                "modality": scan.modality,
            }
        place.row = {**row, "weights": self.sha256, "stamp": stamp}
        place.known = whole(self.out / f"{row['key']}.npz", self.how)
        if place.known is None:
            place.underway = model.begin(scan, feeding, hu=hu)

    def _outcome(self, place: _Place, computing: Computing) -> Outcome:
        if place.code:
            return Outcome(code=place.code, reason=place.reason)
        if place.underway is None:
            told = _told(place.known) if place.known else {}
            return Outcome(row={**place.row, **told}, skipped=True)
        embedding = place.underway.finish(computing)
        return Outcome(row={**place.row, **_told(embedding)}, packed=pack(embedding))


class _Place:
    """A task in line, and what is known of it so far."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.row: Row = {}
        self.underway: Underway | None = None
        self.known: Embedding | None = None
        self.skipped = False
        self.code = self.reason = ""

    @property
    def ready(self) -> bool:
        return bool(self.code) or self.underway is None or self.underway.left == 0

    def refuse(self, error: Exception) -> None:
        code, problem = _why(error)
        source = self.task.source
        self.reason = scrub(problem, source.path, source) if source else problem
        self.code = code


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Which weights, and when they were written: what is loaded of them once in each process."""

    name: str
    """A folder or a name, see `weights.hub.load`."""
    commercial: bool = False
    stamp: str = ""
    """Changes when the folder's files do, so that new weights at the same place are loaded anew."""


def weights_at(name: str | Path, *, commercial: bool = False) -> Weights:
    """Name weights so that other processes of this machine find them too."""
    folder = Path(name)
    if not folder.is_dir():
        return Weights(name=str(name), commercial=commercial)
    times = [entry.stat().st_mtime_ns for entry in sorted(folder.iterdir())]
    return Weights(name=str(folder.resolve()), commercial=commercial, stamp=repr(times))


@functools.lru_cache(maxsize=1)
def load_once(weights: Weights) -> Model:
    """The model, loaded once in each process."""
    return hub.load(weights.name, commercial=weights.commercial)


_computing: dict[tuple[Weights, Precision, bool], Computing] = {}


def computing_once(weights: Weights, how: EmbedConfig, way: str, *, blocks_ahead: int = 0) -> Computing:
    """The way through the network, measured once in each process: the named one, or the fastest for ""."""
    what = weights, how.precision, how.compile
    there = _computing.get(what)
    if there is not None and way in ("", there.name):
        return there
    known: list[Only] = [name for name in get_args(Way) if name == way]
    made = load_once(weights).computing(
        how.precision, compile=how.compile, only=known[0] if known else "auto", blocks_ahead=blocks_ahead
    )
    _computing.clear()  # one at a time: each may hold a copy of the weights
    _computing[what] = made
    return made


def feeding_of(model: Model, how: EmbedConfig) -> Feeding:
    """How scans are fed to the model, by what is asked for.

    Raises:
        ConfigError: no such spacing or pool.
    """
    spec = with_spacing(model.spec, how.spacing)
    return Feeding(spec=spec, like_spectre=how.like_spectre, tokens=how.tokens, pool=how.pool)


def stamp_of(source: Source, key: bytes) -> str:
    """Names, sizes and times of a scan's files, hashed: equal where nothing was written to them."""
    facts: list[tuple[str, int, int]] = []
    for file in source.all_files():
        with contextlib.suppress(OSError):  # the reader will say it better
            seen = file.stat()
            facts.append((file.name, seen.st_size, seen.st_mtime_ns))
    return keyed_id("stamp", repr(facts), key)


def whole(path: Path, how: EmbedConfig) -> Embedding | None:
    """An embedding that is there, with tokens if they are wanted."""
    known = read(path)
    return None if known is None or (how.tokens and known.tokens is None) else known


def _told(embedding: Embedding) -> Row:
    """The manifest's columns on an embedding."""
    row = {"coverage": f"{embedding.coverage:.4f}", "grid": "x".join(map(str, embedding.grid))}
    facts = embedding.facts
    if facts is None:
        return row
    rank = facts.effective_rank
    return row | {
        "seen_mm": "x".join(f"{edge:.1f}" for edge in facts.seen_mm),
        "spacing_mm": "x".join(f"{edge:.4g}" for edge in facts.spacing_mm),
        "effective_rank": "" if rank is None else f"{rank:.2f}",
        "hu": facts.hu,
        "compute": facts.compute,
        "precision": facts.precision,
        "relative_error": f"{facts.relative_error:.1e}",
        "warnings": "; ".join(facts.warnings),
    }


def _read_source(source: Source, modality: str) -> Study:
    """Read a scan and keep its one volume of the wanted modality."""
    try:
        study = ct_rate.annotate(source.read(), source.relative, None)
    except OSError as error:  # told apart here from an `out` that cannot be written
        raise IngestError(f"it cannot be read: {error.strerror}", code="unreadable") from error
    wanted = tuple(volume for volume in study.volumes if volume.modality == modality)
    if len(wanted) != 1:
        seen = ", ".join(volume.modality for volume in study.volumes)
        raise IngestError(f"one {modality} volume is wanted, it holds {seen}", code="wrong-modality")
    return replace(study, volumes=wanted)


def _why(error: Exception) -> tuple[str, str]:
    """The short code and the sentence of what kept a scan out."""
    match error:
        case IngestError():
            return error.code, error.problem
        case ConfigError():
            return "wrong-modality", error.problem
        case StoreError():
            return "damaged", error.problem
        case MemoryError() | RuntimeError():
            return "too-large", "there is not enough memory to embed it"
        case _:
            return "unreadable", str(error)
