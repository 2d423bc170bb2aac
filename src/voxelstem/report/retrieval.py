"""What was found for words: each query with its best scans, as pictures with scores and what was said of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Float
from matplotlib.image import imsave
from scipy import ndimage

from voxelstem.report import page
from voxelstem.report.figures import show_scan
from voxelstem.store import Record, Store
from voxelstem.study import Volume

WINDOW_HU = (-400.0, 400.0)
"""Wide enough to see nodules in lungs and lesions in organs."""
WIDTH = 240
"""Of a picture, in pixels."""
KEY_LETTERS = 16
CAPTION_LETTERS = 220
NOTHING = ("", "0", "no", "none")
"""Labels that say what a scan has not; there are many."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Match:
    """A scan that was found."""

    key: str
    """In the store; its first letters name the scan."""
    score: float
    """Cosine of query and scan."""
    picture: Float[np.ndarray, "down across"]
    """Grey values in [0, 1], square pixels, the patient's right on the left."""
    caption: str = ""
    """What the report or the labels say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A query and its scans, the best first."""

    text: str
    pool: int
    """Scans that could have been found."""
    matches: tuple[Match, ...]
    among: Literal["scans", "reports"] = "scans"
    """What the query was compared with."""


def retrieval_panel(queries: Sequence[Asked], *, title: str = "Asked in words, found by sight") -> page.Section:
    """A section with a row of pictures for each query."""
    unread = all(asked.among == "scans" for asked in queries)
    how = "the search did not read them" if unread else "where reports were compared, the search read those"
    parts = [
        page.paragraph(
            "Each row shows the scans whose vectors, or those of whose reports, lie nearest to the query's. The words "
            f"under a picture are those of its own report and labels: {how}."
        )
    ]
    for asked in queries:
        scans = f"1 {asked.among[:-1]}" if asked.pool == 1 else f"{asked.pool:,} {asked.among}"
        parts.append(f"<h3>“{escape(asked.text)}”</h3>")
        parts.append(page.paragraph(f"Best {len(asked.matches)} of a pool of {scans}."))
        cards = "".join(_card(rank, match) for rank, match in enumerate(asked.matches, start=1))
        parts.append(f'<div class="found">{cards}</div>')
    return page.section(title, *parts)


def retrieval_page(queries: Sequence[Asked], *, about: Mapping[str, object], title: str = "Found in words") -> str:
    """A page of its own: the panel, and what made it (weights, index, prompt set: names, versions, digests)."""
    limits = page.note(
        "A near vector is no finding: it says that a scan is more like these words than others of the pool are.",
        "Which scans come first depends on wording. The rank of a scan says nothing about how likely a disease is.",
        page.NOT_A_DEVICE,
    )
    sections = [
        retrieval_panel(queries),
        page.section("What made this page", page.facts(about)),
        page.section("What these pictures cannot show", limits),
    ]
    return page.page(title, sections)


def asked_of(
    store: Store,
    text: str,
    pool: int,
    hits: Iterable[tuple[str, float]],
    *,
    among: Literal["scans", "reports"] = "scans",
) -> Asked:
    """Draw what a search found: key and score of each hit, the best first.

    Raises:
        StoreError: a hit is not in this store, or damaged.
    """
    matches = tuple(match_of(store, key, score) for key, score in hits)
    return Asked(text=text, pool=pool, matches=matches, among=among)


def match_of(store: Store, key: str, score: float) -> Match:
    """Draw a scan of the store and quote what is known of it.

    Raises:
        StoreError: there is no such scan, or it is damaged.
    """
    return Match(key=key, score=score, picture=coronal(store.volume(key)), caption=said_of(store.record(key)))


def said_of(record: Record) -> str:
    """The beginning of the impression, else of the findings, and the labels that name something."""
    report = record.report
    text = " ".join(((report.impression_text or report.findings_text or report.rest_text) if report else "").split())
    if len(text) > CAPTION_LETTERS:
        text = text[:CAPTION_LETTERS].rsplit(" ", 1)[0] + " …"
    labels = ", ".join(f"{name}: {value}" for name, value in sorted(record.labels.items()) if value not in NOTHING)
    return " · ".join(part for part in (text, labels) if part)


def coronal(volume: Volume, *, width: int = WIDTH) -> Float[np.ndarray, "down across"]:
    """The middle coronal slice in true proportions, `width` pixels across; CT within `WINDOW_HU`."""
    low, high = WINDOW_HU
    grey = show_scan(volume, "coronal", volume.shape_ijk[1] // 2, low=low, high=high)
    across_mm, up_mm = volume.spacing_mm[0], volume.spacing_mm[2]
    down = max(1, round(width * grey.shape[0] * up_mm / (grey.shape[1] * across_mm)))
    shares = (down / grey.shape[0], width / grey.shape[1])
    scaled = np.asarray(cast(Any, ndimage.zoom(grey, shares, order=1, grid_mode=True, mode="nearest")))
    return np.clip(scaled, 0, 1)


def _card(rank: int, match: Match) -> str:
    buffer = io.BytesIO()
    options: Any = {"cmap": "gray", "vmin": 0, "vmax": 1, "format": "png", "metadata": {"Software": None}}
    imsave(buffer, cast(Any, match.picture), **options)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    name = match.key[:KEY_LETTERS]
    alt = f"Coronal slice of scan {name}, rank {rank}, cosine {match.score:.3f}"
    said = f"<p>{escape(match.caption)}</p>" if match.caption else ""
    return (
        f'<figure><div class="scan"><img src="data:image/png;base64,{data}" alt="{escape(alt, quote=True)}">'
        '<span aria-hidden="true">R</span><span aria-hidden="true">L</span></div>'
        f"<figcaption><strong>{rank}. cosine {match.score:.3f}</strong> <code>{escape(name)}</code>{said}</figcaption>"
        "</figure>"
    )
