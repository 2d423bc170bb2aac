"""Sentences of a report, and the language it is written in."""

from __future__ import annotations

import re
from collections import Counter

# A list's number ("2."), and words whose full stop ends nothing.
_NUMBER = re.compile(r"\s*(?:\(?\d{1,2}|[a-z])[.)]\s*", re.IGNORECASE)
_SHORT = re.compile(
    r"\b(?:e\.g|i\.e|vs|dr|ca|approx|figs?|resp|incl|cf|rt|lt|re|li|bzw|z\.b|u\.a|s\.o|n\.b|bijv|env|av)\.\s*$",
    re.IGNORECASE,
)
_LONGEST_SHORT = 12
# Runs are bounded, so that a page of dots is read in time that grows with its length alone.
_STOP = re.compile(r"[.!?]{1,8}[\"')\]]{0,4}[ \t]+(?=[^\W_a-z]|[-*•(\[])|\n\s*")

_COMMON = {
    "en": "the of with and there no is are not without seen has was normal left right",
    "de": "der die das und keine kein mit ist nicht ohne im den des bei sowie links rechts normal",
    "nl": "de het een geen van en met niet zijn bij wordt zonder links rechts normaal",
    "fr": "le la les des du de pas et une un sans est dans au à gauche droite normal",
}
_COMMON_WORDS = {language: frozenset(words.split()) for language, words in _COMMON.items()}
LANGUAGES = tuple(_COMMON)
"""ISO 639-1; those in which sections, sides and common words are known."""
_WORD = re.compile(r"[^\W\d_]+")
_FEW, _SHARE = 3, 0.05
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]+")


def sentences(text: str) -> list[str]:
    """Part a text into its sentences; joined without anything between, they are the text again.

    A sentence ends with a full stop, question or exclamation mark before a blank and a capital or number, and with its
    line, unless the next goes on in small letters. Decimals, numbers of a list and common abbreviations end none.

    >>> sentences("1. Nodule of 2.5 cm. 2. No effusion, e.g. Pleural.")
    ['1. Nodule of 2.5 cm. ', '2. No effusion, e.g. Pleural.']
    """
    parts: list[str] = []
    start = 0
    for stop in _STOP.finditer(text):
        piece = text[start : stop.end()]
        if _ends_line(text, stop) if stop.group().startswith("\n") else _ends_sentence(piece):
            parts.append(piece)
            start = stop.end()
    return [part for part in (*parts, text[start:]) if part]


def bare_sentences(text: str) -> list[str]:
    """The sentences without the blanks around them; those that are blank are left out."""
    return [part.strip() for part in sentences(text) if part.strip()]


def _ends_sentence(piece: str) -> bool:
    return not (len(piece) <= _LONGEST_SHORT and _NUMBER.fullmatch(piece)) and not _SHORT.search(
        piece[-_LONGEST_SHORT:]
    )


def _ends_line(text: str, stop: re.Match[str]) -> bool:
    """Whether a sentence ends with its line; one that was broken to fit a page goes on in small letters."""
    blank, goes_on = stop.group().count("\n") > 1, text[stop.end() : stop.end() + 1].islower()
    return blank or not goes_on or text[max(0, stop.start() - 8) : stop.start()].rstrip(" \t").endswith(tuple(".!?:;"))


def spoken(text: str) -> str:
    """Guess the language of a text by its commonest words; an empty word where they do not tell.

    "other" is a text that is not written in Latin letters. One that uses them in a fifth language says nothing: its
    common words are not known here.
    """
    words = [word.lower() for word in _WORD.findall(text)]
    if sum(map(len, _LATIN.findall(text))) < sum(map(len, words)) / 2:
        return "other"
    counts = Counter(words)
    hits = {language: sum(counts[word] for word in common) for language, common in _COMMON_WORDS.items()}
    first, second, *_ = sorted(hits, key=lambda language: -hits[language])
    told = hits[first] >= max(_FEW, _SHARE * len(words)) and hits[first] >= 2 * hits[second]
    return first if told else ""
