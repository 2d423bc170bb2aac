"""By which line a card says what its weights were pretrained on, so that a store can be told to be the same one.

One digest stands for all training scans of a store: it names none of them, and who has only some cannot make it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

BEFORE = "before: "
"""Ahead of a line about what was trained on before that."""
_SAYS = "SHA-256 over the keys of the store's training scans: "
_LINE = re.compile(rf"((?:{BEFORE})*){_SAYS}([0-9a-f]{{64}})")


def seen_digest(keys: Iterable[str]) -> str:
    """SHA-256 over the keys of a store's training scans, whatever order they come in."""
    return hashlib.sha256("\n".join(sorted(set(keys))).encode()).hexdigest()


def seen_line(keys: Iterable[str]) -> str:
    """What a card says among `data`."""
    return _SAYS + seen_digest(keys)


def digests_of(data: Sequence[str]) -> tuple[str, ...]:
    """Digests of all the pretrainings that a card tells of, the last one first; none if one of them has no digest.

    >>> digests_of(["before: 3 CT scans", seen_line(["a"])]) == ()
    True
    """
    depth = max((_depth(line) for line in data), default=0)
    found = {_depth(hit[1]): hit[2] for line in data if (hit := _LINE.fullmatch(line))}
    return tuple(found[place] for place in range(depth + 1)) if set(found) == set(range(depth + 1)) else ()


def _depth(line: str) -> int:
    """How many pretrainings ago that was."""
    depth = 0
    while line.startswith(BEFORE * (depth + 1)):
        depth += 1
    return depth
