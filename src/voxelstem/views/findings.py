"""Which findings a report names, denies or doubts, by rules: a list of phrases, and the reach of a "no".

In the manner of NegEx (Chapman et al. 2001, doi 10.1006/jbin.2001.1029): a finding that is named is denied by a "no"
before it or an "is not seen" after it, in the same clause; doubted by "possible" or "cannot be excluded" likewise.
Rules read words and nothing else. How often they are right, and when not, is said in docs/concepts/reports.md.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import itertools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from voxelstem.errors import ConfigError
from voxelstem.sentences import sentences
from voxelstem.study import Report

Status = Literal["present", "absent", "uncertain", "unmentioned"]
_STRENGTH: tuple[Status, ...] = ("unmentioned", "absent", "uncertain", "present")

_FIGURE = re.compile(r"(?<=\d)\.(?=\d)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How reports name one finding."""

    name: str
    said: re.Pattern[str]
    other: re.Pattern[str] | None
    """The same words about something else."""
    normal: re.Pattern[str] | None
    """Phrases that say by themselves that it is not there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """A list of findings, and the digest of the file that it came from."""

    name: str
    version: int
    sha256: str
    rules: tuple[Rule, ...]

    @property
    def findings(self) -> tuple[str, ...]:
        """Their names, in the file's order."""
        return tuple(rule.name for rule in self.rules)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cues:
    """What denies and what doubts, as it stands in `negation_en.toml`."""

    no: re.Pattern[str]
    maybe: re.Pattern[str]
    surely_no: re.Pattern[str]
    vain: re.Pattern[str]
    no_after: re.Pattern[str]
    maybe_after: re.Pattern[str]
    ends: re.Pattern[str]

    def status(self, clause: str, start: int, end: int) -> Status:
        """Say whether what a clause names from `start` to `end` is there, by what stands before, within and after."""
        reach = max(0, start - _REACH)
        doubted = self.maybe.search(clause, reach, start) and not self.surely_no.search(clause, reach, start)
        if doubted or self.maybe_after.match(clause, end):
            return "uncertain"
        within = _NO_WITHIN.search(clause, start, end)  # "nodes, none enlarged"
        return (
            "absent"
            if within or self.no.search(clause, reach, start) or self.no_after.match(clause, end)
            else "present"
        )


@functools.cache
def _cues() -> _Cues:
    told = tomllib.loads((_FOLDER / "negation_en.toml").read_text(encoding="utf-8"))
    spelt = {name: "|".join(phrases) for name, phrases in told.items()}
    words = {name: re.compile(rf"\b(?:{spelt[name]})\b") for name in ("no", "maybe", "surely_no", "vain")}
    near = {name: rf"[^.;:,]{{0,40}}?\b(?:{spelt[name]})\b" for name in ("no_after", "maybe_after")}
    return _Cues(
        **words,
        no_after=re.compile(rf"{near['no_after']}| ?[:-] ?(?:none|no|negative|absent)\b"),
        maybe_after=re.compile(near["maybe_after"]),
        ends=re.compile(spelt["ends"]),
    )


_FOLDER = importlib.resources.files("voxelstem.views")
_NO_WITHIN = re.compile(r"\b(?:not|no|none|never|without|free of)\b")
_REACH = 300
"""Letters that a denial or doubt reaches at most, in a clause that never ends."""
_BETWEEN = r"(?:[ ,/-]+[\w·-]+){0,3}?[ ,/-]+"


def read_rules(place: str | Path = "ct-rate") -> Rules:
    """Read a list of findings: one in the package by its name, or a file.

    Raises:
        ConfigError: there is none of that name, or it is not a list of findings.
    """
    if isinstance(place, str):
        packaged = _FOLDER / f"findings_{place.replace('-', '_')}.toml"
        if not packaged.is_file():
            raise ConfigError(
                f"there is no list of findings '{place}'", hint="there is 'ct-rate'; or give a file's path"
            )
        content = packaged.read_bytes()
    else:
        try:
            content = place.read_bytes()
        except OSError as error:
            raise ConfigError(f"{place.name} cannot be read: {error.strerror}", hint="check the path") from error
    try:
        told = tomllib.loads(content.decode())
        rules = tuple(_rule(each) for each in told["finding"])
        digest = hashlib.sha256(content).hexdigest()
        return Rules(name=told["name"], version=told["version"], sha256=digest, rules=rules)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError, re.error) as error:
        raise ConfigError(
            "the list of findings cannot be read",
            hint="needs `name`, `version`, and `[[finding]]` with `name` and `said`, a list of regular expressions",
        ) from error


def statuses(report: Report | str, rules: Rules) -> dict[str, Status]:
    """Say of each finding whether the report names it as present, absent or uncertain, or does not mention it.

    Of several mentions the strongest counts: present before uncertain before absent. Of a `Report`, findings and
    impression are read: history says what was feared, not what was seen.
    """
    text = "\n".join((report.findings_text, report.impression_text)) if isinstance(report, Report) else report
    clauses = [clause for sentence in sentences(text) for clause in _clauses(sentence)]
    return {rule.name: _strongest(rule, clauses) for rule in rules.rules}


def _clauses(sentence: str) -> list[str]:
    """Pieces of a sentence that a "no" does not reach out of, in small letters."""
    small = _FIGURE.sub("·", re.sub(r"\s+", " ", sentence.lower()).strip())
    small = _cues().vain.sub(_blank, small)
    starts = [0, *(found.start() for found in _cues().ends.finditer(small)), len(small)]
    return [small[start:end] for start, end in itertools.pairwise(starts)]


def _strongest(rule: Rule, clauses: list[str]) -> Status:
    found: set[Status] = {"unmentioned"}
    for clause in clauses:
        if rule.normal and rule.normal.search(clause):
            found.add("absent")
        own = rule.other.sub(_blank, clause) if rule.other else clause
        found |= {_cues().status(clause, *named.span()) for named in rule.said.finditer(own)}
    return max(found, key=_STRENGTH.index)


def _blank(found: re.Match[str]) -> str:
    return "_" * len(found.group())


def _rule(told: Mapping[str, object]) -> Rule:
    said = _pattern(told["said"])
    if said is None:
        raise TypeError("a finding without names")
    return Rule(
        name=str(told["name"]), said=said, other=_pattern(told.get("not", [])), normal=_pattern(told.get("normal", []))
    )


def _pattern(phrases: object) -> re.Pattern[str] | None:
    if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
        raise TypeError("phrases are a list of texts")
    spelt = [phrase.replace(" ~ ", _BETWEEN) for phrase in phrases]
    return re.compile(rf"\b(?:{'|'.join(spelt)})\b") if spelt else None
