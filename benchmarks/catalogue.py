"""A catalogue of 250,000 made-up volumes: what a collection's size costs whoever asks it something.

    python benchmarks/catalogue.py [--volumes 250000] [--repeats 5] [--keep DIR]

Rows are made here: subjects with several examinations, CT in two kernels and MR in three contrasts, reports, voxel
labels, thumbnails, copies. Each question is asked in a process of its own, which tells its seconds (without Python's
own start) and its greatest memory; the median and the worst of the repeats are printed. Goals: 2 s and 1 GiB each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from voxelstem.store import Record, Store, Wanted, epoch_order, split_of
from voxelstem.store.catalogue import FILE_NAME, Catalogue
from voxelstem.study import Acquisition, Provenance, Report

GOAL_SECONDS, GOAL_GIB = 2.0, 1.0
FINDINGS = "The liver is of normal size and density. No focal lesion. " * 12
CLASSES = {value: f"structure {value}" for value in range(1, 41)}
AFFINE = np.diag([1.5, 1.5, 1.5, 1.0])


def digest(*words: object) -> str:
    """Make up a digest."""
    return hashlib.sha256(repr(words).encode()).hexdigest()


def records(count: int) -> Iterator[Record]:
    """Make up volumes: four a subject, of which two are near-copies; one in fifty has a twin with equal voxels."""
    thumbnail = bytes(range(256)) * 3
    for number in range(count):
        person, visit = number // 4, number // 2
        subject = f"s{digest('subject', person)[:24]}"
        ct = person % 5 != 0
        contrast = ("venous" if ct else ("T1w", "T2w", "FLAIR")[number % 3]) if number % 7 else ""
        size = 160 + number % 97
        said = Acquisition(
            series=digest("series", number)[:32],
            study=digest("study", visit)[:32],
            group=digest("group", visit)[:32],
            session=str(1 + visit % 2),
            date="2020-02-03",
            age_years=20.0 + person % 60,
            sex="FM"[person % 2],
            contrast=contrast,
            facts={"ConvolutionKernel": "B30f" if number % 2 else "B70f", "SliceThickness": "1.5", "KVP": "120"},
        )
        yield Record(
            key=digest("key", number),
            voxels=digest("voxels", number - (number % 100 == 1)),
            subject=subject,
            study=said.study,
            modality="CT" if ct else "MR",
            channels=1,
            shape_ijk=(size, size, 200),
            spacing_mm=(1.5, 1.5, 1.5 + 1.5 * (number % 2)),
            affine_ras=AFFINE,
            body_start_ijk=(4, 4, 0),
            body_size_ijk=(size - 8, size - 8, 200),
            dtype="int16",
            slope=1.0,
            intercept=0.0,
            split=split_of(subject),
            bytes=4_000_000 + number,
            label_key=digest("labels", number) if number % 10 == 0 else "",
            label_bytes=90_000 if number % 10 == 0 else 0,
            classes=CLASSES if number % 10 == 0 else {},
            labels={},
            report=Report(findings_text=FINDINGS, language="en") if ct else None,
            provenance=Provenance(source_format="dicom", sha256=digest("source", number), orientation="LPS"),
            ingested="2026-01-01T00:00:00+00:00",
            acquisition=said,
            thumbnail=thumbnail,
        )


def make(folder: Path, count: int) -> Path:
    """Write the catalogue, in one transaction."""
    Store.create(folder)
    with Catalogue.write(folder) as catalogue, catalogue.transaction():
        catalogue.put(*records(count))
    return folder


def plan(store: Store) -> int:
    """Choose what to train on and shuffle it: fine CT with a report, one reconstruction an acquisition."""
    wanted = Wanted(
        split="train", modality="CT", max_spacing_mm=2.0, min_voxels=1_000_000, reported=True, one_per_group=True
    )
    chosen = store.select(wanted)
    return len(chosen.take(epoch_order(len(chosen), seed=1, epoch=3)))


def by_subject(store: Store) -> int:
    """All subjects of each split."""
    return sum(len(store.subjects(split)) for split in ("train", "validation", "test"))


QUESTIONS: dict[str, Callable[[Store], int]] = {
    "open and count": len,
    "subject split": by_subject,
    "duplicate query": lambda store: len(store.duplicates()),
    "filtered epoch plan": plan,
    "all columns": lambda store: len(store.select()),
    "one record": lambda store: store.record(digest("key", 7)).channels,
    "1,000 records by key": lambda store: sum(store.record(digest("key", at)).channels for at in range(1000)),
    "all records": lambda store: sum(1 for _ in store),
}
WITHIN_GOALS = ("open and count", "subject split", "duplicate query", "filtered epoch plan")


def ask(folder: Path, question: str) -> None:
    """Answer in this process: seconds from opening the store, the greatest memory, and the answer."""
    began, busy = time.perf_counter(), time.process_time()
    answer = QUESTIONS[question](Store.open(folder))
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    print(json.dumps({"seconds": seconds, "busy": busy, "gib": peak_gib(), "answer": answer}))


def peak_gib() -> float:
    """The most memory that this process ever had; `getrusage` would count the parent's before the start, too."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    told = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return (told[0] if told else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20


def measure(folder: Path, repeats: int) -> bool:
    """Ask all questions in turn, again and again, each in a fresh process."""
    heard: dict[str, list[dict[str, float]]] = {question: [] for question in QUESTIONS}
    for _ in range(repeats):
        for question, answers in heard.items():
            command = [sys.executable, __file__, "--ask", question, "--keep", str(folder)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            answers.append(json.loads(said))
    print(f"{'question':24} {'answer':>9} {'median s':>9} {'worst s':>9} {'busy s':>9} {'peak GiB':>9}  goal")
    reached = True
    for question, answers in heard.items():
        seconds = [each["seconds"] for each in answers]
        gib = max(each["gib"] for each in answers)
        good = statistics.median(seconds) <= GOAL_SECONDS and gib <= GOAL_GIB
        verdict = ("reached" if good else "MISSED") if question in WITHIN_GOALS else ""
        reached &= verdict != "MISSED"
        print(
            f"{question:24} {answers[0]['answer']:9} {statistics.median(seconds):9.2f} {max(seconds):9.2f} "
            f"{statistics.median(each['busy'] for each in answers):9.2f} {gib:9.2f}  {verdict}"
        )
    return reached


def main() -> int:
    """Read the arguments, make the catalogue where there is none, and ask."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--volumes", type=int, default=250_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder of the catalogue; kept, and used again")
    parser.add_argument("--ask", choices=sorted(QUESTIONS), help="(used by itself) answer one question")
    given = parser.parse_args()
    if given.ask:
        ask(given.keep, given.ask)
        return 0
    with tempfile.TemporaryDirectory() as passing:
        folder = given.keep or Path(passing) / "store"
        if not (folder / FILE_NAME).exists():
            began = time.perf_counter()
            make(folder, given.volumes)
            print(f"made {given.volumes} volumes in {time.perf_counter() - began:.0f} s")
        size = (folder / FILE_NAME).stat().st_size / 2**20
        print(f"{len(Store.open(folder))} volumes, catalogue of {size:.0f} MiB")
        return 0 if measure(folder, given.repeats) else 1


if __name__ == "__main__":
    sys.exit(main())
