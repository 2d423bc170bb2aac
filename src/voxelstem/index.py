"""A folder of vectors to search: 16 bits a number, mapped and not read, and the exact best of them all.

`vectors.f16` (scan, out) and `texts.f16` (report, out) hold unit vectors; `keys.bin` and `subjects.bin` say of each
scan which volume and which person it is, `texts.rows` of each report whose scan it is. `index.json` says how many rows
of each are valid and by which weights. It is replaced last: an index whose growing was cut short is as it was before.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8

from voxelstem.errors import ConfigError, StoreError
from voxelstem.ranking import best_rows, scores_of
from voxelstem.store.subjects import PSEUDONYM

Among = Literal["scans", "reports"]
FACTS, FORMAT = "index.json", 1
KEY_BYTES, SUBJECT_BYTES = 32, 12
QUERIES = 32
"""Queries that share one pass over the vectors; more would not be faster, and their scores take memory."""
_NAMED = {"vectors": "vectors.f16", "keys": "keys.bin", "subjects": "subjects.bin"}
_TEXTS = {"texts": "texts.f16", "rows": "texts.rows"}
_DAMAGED = "build the index again; `voxelstem search --add` adds what is missing"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What an index says of itself."""

    space: str
    """SHA-256 of what made the vectors (`Aligned.sha256`): others cannot be compared with them."""
    out: int
    """Length of a vector."""
    scans: int = 0
    texts: int = 0
    """How many of the scans have a vector of their report too."""
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A scan to be added. Neither its report nor any name comes here."""

    key: str
    """SHA-256 of the volume's content, 64 hexadecimal letters."""
    subject: str
    """The person's pseudonym."""
    vector: Float[np.ndarray, " out"]
    """Of unit length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One of the best."""

    key: str
    score: float
    """Cosine, computed in float64 from the stored 16-bit vector."""


class Index:
    """The vectors of an index as they were when it was opened. Any number of processes may search it."""

    def __init__(self, path: Path) -> None:
        """Map the files; use `open` or `create` instead."""
        self.path = path
        self.facts = _read_facts(path)
        facts = self.facts
        self._vectors = torch.from_numpy(_mapped(path / _NAMED["vectors"], np.float16, facts.scans, facts.out))
        self._keys = _mapped(path / _NAMED["keys"], np.uint8, facts.scans, KEY_BYTES)
        self._subjects = _mapped(path / _NAMED["subjects"], np.uint8, facts.scans, SUBJECT_BYTES)
        self._texts = torch.from_numpy(_mapped(path / _TEXTS["texts"], np.float16, facts.texts, facts.out))
        self._text_rows = _mapped(path / _TEXTS["rows"], np.int32, facts.texts, 1)[:, 0]
        if facts.texts and not 0 <= self._text_rows.min() <= self._text_rows.max() < facts.scans:
            raise StoreError(f"{_TEXTS['rows']} in '{path.name}' is damaged", hint=_DAMAGED)

    @classmethod
    def open(cls, path: Path | str) -> Index:
        """Open the index in the folder `path`.

        Raises:
            StoreError: there is none, it is damaged, or a newer version of voxelstem made it.
        """
        return cls(Path(path))

    @classmethod
    def create(cls, path: Path | str, *, space: str, out: int) -> Index:
        """Make an empty index, or open the one that is there.

        Raises:
            ConfigError: the one that is there was made by other weights.
            StoreError: the folder holds something else, or cannot be made.
        """
        path = Path(path)
        if not (path / FACTS).is_file():
            try:
                path.mkdir(parents=True, exist_ok=True)
                if any(map(_is_strange, path.iterdir())):
                    raise StoreError(f"'{path.name}' holds other files already", hint="choose an empty folder")
                for name in (*_NAMED.values(), *_TEXTS.values()):
                    (path / name).touch()
                with _alone(path):
                    if not (path / FACTS).is_file():  # another process may have been faster
                        _commit(path, Facts(space=space, out=out))
            except OSError as error:
                raise StoreError(f"no index can be made in '{path.name}': {error.strerror}") from error
        index = cls(path)
        index.check_space(space)
        return index

    def check_space(self, space: str) -> None:
        """Let only vectors come near that these weights made.

        Raises:
            ConfigError: other weights did.
        """
        if self.facts.space != space:
            raise ConfigError(
                f"'{self.path.name}' was made by other weights (space {self.facts.space[:16]}, not {space[:16]}): "
                "their vectors cannot be compared",
                hint="give the weights that it was made with, or build another index",
            )

    def __len__(self) -> int:
        """How many scans there are."""
        return self.facts.scans

    def keys(self) -> Iterator[str]:
        """Keys of all scans, in the order in which they came."""
        return (key.hex() for key in _cut(self._keys))

    def reported(self) -> set[str]:
        """Keys of the scans whose report has a vector."""
        return {key.hex() for key in _cut(self._keys[self._text_rows])}

    def row(self, beginning: str) -> int | None:
        """Place of the scan whose key begins so; None where none does.

        Raises:
            ConfigError: several keys begin so.
        """
        whole = bytes.fromhex(beginning[: len(beginning) // 2 * 2])
        same = (self._keys[:, : len(whole)] == np.frombuffer(whole, np.uint8)).all(axis=1)
        found = [row for row in np.flatnonzero(same) if self._keys[row].tobytes().hex().startswith(beginning)]
        if len(found) > 1:
            raise ConfigError(f"{len(found)} scans have a key that begins with {beginning}", hint="say more letters")
        return int(found[0]) if found else None

    def key(self, row: int) -> str:
        """Key of the scan at a place."""
        return self._keys[row].tobytes().hex()

    def vector(self, row: int) -> Float[np.ndarray, " out"]:
        """The stored vector of the scan at a place, as float32."""
        return self._vectors[row].float().numpy()

    def vectors(self, rows: Int64[np.ndarray, " row"]) -> Float[np.ndarray, "row out"]:
        """Stored vectors of some scans, as float32."""
        return self._vectors[torch.from_numpy(rows)].float().numpy()

    def of_subject(self, subject: str) -> Bool[np.ndarray, " scan"]:
        """Which scans are of this person, by pseudonym."""
        return (self._subjects == np.frombuffer(_subject_bytes(subject), np.uint8)).all(axis=1)

    def of_same_subject(self, row: int) -> Bool[np.ndarray, " scan"]:
        """Which scans are of the person of the scan at a place."""
        return (self._subjects == self._subjects[row]).all(axis=1)

    def compared(self, among: Among, hidden: Bool[np.ndarray, " scan"]) -> int:
        """How many scans or reports are left where some scans are hidden."""
        return int((~hidden).sum() if among == "scans" else (~hidden[self._text_rows]).sum())

    def best(
        self,
        query: Float[np.ndarray, " out"],
        top: int,
        *,
        among: Among = "scans",
        hidden: Bool[np.ndarray, " scan"] | None = None,
    ) -> list[Hit]:
        """The `top` scans of the largest cosine, or those whose reports have it; equal ones in the order of their keys.

        Args:
            query: Of unit length.
            top: How many; fewer come where there are fewer.
            among: Whether scans or their reports are compared with.
            hidden: Scans that are left out.
        """
        return self.best_of_each(query[None], top, among=among, hidden=hidden)[0]

    def best_of_each(
        self,
        queries: Float[np.ndarray, "query out"],
        top: int,
        *,
        among: Among = "scans",
        hidden: Bool[np.ndarray, " scan"] | None = None,
    ) -> list[list[Hit]]:
        """As `best`, for several queries that share their passes over the vectors.

        Raises:
            ValueError: queries of another length, or `top` below 1.
            ConfigError: a query holds numbers that are not finite.
            StoreError: the index does.
        """
        if queries.ndim != 2 or queries.shape[1] != self.facts.out or top < 1:  # noqa: PLR2004
            raise ValueError(f"queries are (query, {self.facts.out}) and top >= 1, got {queries.shape} and {top}")
        stored, keys = self._vectors, self._keys
        if among == "reports":
            stored, keys = self._texts, self._keys[self._text_rows]
            hidden = None if hidden is None else hidden[self._text_rows]
        wanted = np.ascontiguousarray(queries, np.float32)
        if not bool(np.isfinite(wanted).all()):
            raise ConfigError("the network gives no finite numbers for the question", hint="ask with something else")
        found: list[list[Hit]] = []
        for at in range(0, len(wanted), QUERIES):
            part = wanted[at : at + QUERIES]
            products = scores_of(stored, torch.from_numpy(part))
            if not bool(torch.isfinite(products).all()):
                raise StoreError(f"the vectors of '{self.path.name}' are damaged", hint=_DAMAGED)
            for query, scores in zip(part, products, strict=True):
                rows, exact = best_rows(stored, keys, query, scores, top, hidden)
                found.append(
                    [
                        Hit(key=keys[row].tobytes().hex(), score=float(value))
                        for row, value in zip(rows, exact, strict=True)
                    ]
                )
        return found

    def add(self, entries: Sequence[Entry]) -> Index:
        """Append scans, all or none of them; gives the index as it is then.

        Raises:
            ConfigError: a vector that is not of unit length (or not finite), a scan that is there already.
            StoreError: the disk does not take them, or another process adds to the index.
        """
        if not entries:
            return self
        rows = np.stack([entry.vector for entry in entries]).astype(np.float16)
        _check_unit(rows, self.facts.out)
        keys = [bytes.fromhex(entry.key) for entry in entries]
        if len({*keys}) < len(keys) or {*keys} & {*_cut(self._keys)} or any(len(key) != KEY_BYTES for key in keys):
            raise ConfigError("a scan is in the index already, or has no key of 64 letters", hint="add each once")
        written = {
            "vectors": rows.tobytes(),
            "keys": b"".join(keys),
            "subjects": b"".join(_subject_bytes(entry.subject) for entry in entries),
        }
        return self._append({_NAMED[name]: data for name, data in written.items()}, scans=len(entries))

    def add_reports(self, vectors: dict[str, Float[np.ndarray, " out"]]) -> Index:
        """Append the vectors of reports, each by the key of its scan; of scans that have one they are left out.

        Raises:
            ConfigError: a vector that is not of unit length, or a scan that is not there.
            StoreError: as `add`.
        """
        if not vectors:
            return self
        place = {key: row for row, key in enumerate(self.keys())}
        if missing := [key for key in vectors if key not in place]:
            raise ConfigError(
                f"{len(missing)} reports are of scans that the index does not hold", hint="add these first"
            )
        known = self.reported()
        fresh = {place[key]: vector for key, vector in vectors.items() if key not in known}
        if not fresh:
            return self
        rows = np.stack(list(fresh.values())).astype(np.float16)
        _check_unit(rows, self.facts.out)
        written = {_TEXTS["texts"]: rows.tobytes(), _TEXTS["rows"]: np.array(list(fresh), np.int32).tobytes()}
        return self._append(written, texts=len(fresh))

    def _append(self, written: dict[str, bytes], *, scans: int = 0, texts: int = 0) -> Index:
        facts = self.facts
        grown = replace(facts, scans=facts.scans + scans, texts=facts.texts + texts)
        try:
            with _alone(self.path):
                if _read_facts(self.path) != facts:
                    raise StoreError(f"another process has added to '{self.path.name}'", hint="run again")
                for name, data in written.items():
                    with (self.path / name).open("r+b") as file:
                        # What a process that was killed left behind its last commit is not part of the index.
                        file.truncate(_bytes_of(name, facts))
                        file.seek(0, os.SEEK_END)
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                _commit(self.path, grown)
        except OSError as error:
            raise StoreError(
                f"'{self.path.name}' cannot be written: {error.strerror}", hint="free some space"
            ) from error
        return Index(self.path)


def _read_facts(path: Path) -> Facts:
    if not (path / FACTS).is_file():
        raise StoreError(
            f"there is no index in '{path.name}'", hint="make one: `voxelstem search --index I --add STORE --weights W`"
        )
    try:
        said: dict[str, Any] = json.loads((path / FACTS).read_text(encoding="utf-8"))
        facts = Facts(**said)
        numbers = (facts.out, facts.scans, facts.texts, facts.format)
        if not all(type(number) is int and number >= 0 for number in (*numbers, facts.out - 1)) or not re.fullmatch(
            "[0-9a-f]{64}", facts.space
        ):
            raise ValueError("a number or a digest of another kind")
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise StoreError(f"{FACTS} in '{path.name}' is damaged", hint=_DAMAGED) from error
    if facts.format > FORMAT:
        raise StoreError(f"a newer version of voxelstem made '{path.name}'", hint="update voxelstem")
    return facts


def _bytes_of(name: str, facts: Facts) -> int:
    """How long a file is that holds what the facts say."""
    rows = {
        _NAMED["vectors"]: (facts.scans, 2 * facts.out),
        _NAMED["keys"]: (facts.scans, KEY_BYTES),
        _NAMED["subjects"]: (facts.scans, SUBJECT_BYTES),
        _TEXTS["texts"]: (facts.texts, 2 * facts.out),
        _TEXTS["rows"]: (facts.texts, 4),
    }
    count, size = rows[name]
    return count * size


def _mapped(path: Path, kind: type, rows: int, columns: int) -> np.ndarray:
    size = rows * columns * np.dtype(kind).itemsize
    if not path.is_file() or path.stat().st_size < size:
        raise StoreError(f"{path.name} of '{path.parent.name}' is missing or cut short", hint=_DAMAGED)
    if rows == 0:
        return np.zeros((0, columns), kind)
    # Copy on write: torch takes no memory that cannot be written to, and nothing writes to it.
    return np.memmap(path, kind, mode="c", shape=(rows, columns))


def _commit(path: Path, facts: Facts) -> None:
    """Replace what the index says of itself, after everything that it says is on the disk."""
    draft = path / f".{FACTS}.unfinished"  # one process at a time comes here
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(asdict(facts), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path / FACTS)
    finally:
        draft.unlink(missing_ok=True)


def _is_strange(path: Path) -> bool:
    """Whether a file is none that a process leaves behind which is killed while it makes an index."""
    empty = path.name in (*_NAMED.values(), *_TEXTS.values()) and path.stat().st_size == 0
    return not empty and not path.name.startswith(f".{FACTS}.")


def _cut(keys: UInt8[np.ndarray, "row byte"]) -> list[bytes]:
    """Keys one by one; a row of an array at a time would take ten times as long."""
    whole = keys.tobytes()
    return [whole[at : at + KEY_BYTES] for at in range(0, len(whole), KEY_BYTES)]


@contextlib.contextmanager
def _alone(path: Path) -> Generator[None]:
    """One process adds at a time."""
    with (path / _NAMED["keys"]).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _subject_bytes(subject: str) -> bytes:
    """A pseudonym's 96 bits; of any other word as many of its digest."""
    if PSEUDONYM.fullmatch(subject):
        return bytes.fromhex(subject[1:])
    return hashlib.sha256(subject.encode()).digest()[:SUBJECT_BYTES]


def _check_unit(rows: np.ndarray, out: int) -> None:
    lengths = np.linalg.norm(rows.astype(np.float32), axis=1)
    if rows.shape[1] != out or not bool((np.abs(lengths - 1) < 1e-2).all()):  # noqa: PLR2004 - 16 bits round
        raise ConfigError(
            f"vectors of an index have {out} finite numbers and length 1", hint="are these the weights of the index?"
        )
