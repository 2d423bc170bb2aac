"""Which labelled subjects are one person: copies of a scan under two names must be held out together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from voxelstem.store import Record, Store
from voxelstem.store.copies import Limits, find_copies
from voxelstem.whole import write_whole

Pairs = tuple[tuple[str, str], ...]
"""Pseudonyms of subjects who share a scan, the lesser first."""
LIMITS = Limits(likeness=0.98, most=4)
"""Only what looks nearly the same is read, so that a look costs about one scan in each: heads of frozen features are
fitted in seconds. Copies that were cropped a lot are what `voxelstem show STORE --against STORE` looks for."""


def same_people(store: Store, records: Sequence[Record], rest: Path) -> Pairs:
    """Subjects among these scans' who have a copy of a scan in common, equal or near (`store.copies`).

    Scans that look alike are read once to compare their voxels; what was found rests in `rest` beside the features
    and is found again for the same scans. Subjects are pseudonyms.

    Raises:
        StoreError: a volume's file is missing or damaged.
    """
    subjects = {record.key: record.subject for record in records}
    if len(set(subjects.values())) < 2:  # noqa: PLR2004 - nobody could be the same as somebody else
        return ()
    named = hashlib.sha256("\n".join(sorted(f"{key} {one}" for key, one in subjects.items())).encode()).hexdigest()
    path = rest / f"copies-{named[:16]}.json"
    if path.is_file():
        return tuple((str(a), str(b)) for a, b in json.loads(path.read_text(encoding="utf-8")))
    found = {
        (min(pair), max(pair))
        for copy in find_copies(store, among=records, limits=LIMITS)
        if len(set(pair := (subjects[copy.key_a], subjects[copy.key_b]))) > 1
    }
    pairs = tuple(sorted(found))
    rest.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(pairs) + "\n").encode())
    return pairs
