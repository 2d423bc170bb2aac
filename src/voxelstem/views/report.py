"""What a model reads of a report, as drawn plans: which sections, which wording, which sentences, which side.

Two texts of one report differ by their plan alone: the report in the store is never changed, and a plan replays.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import numpy as np

from voxelstem.sentences import sentences, spoken
from voxelstem.study import Report
from voxelstem.views.laterality import swap_sides

Reason = str
"""Why a report cannot be learned from; an empty word where it can."""
REASONS = ("no-report", "empty", "encoding", "headings-only", "no-wanted-section", "language")


@dataclass(frozen=True, kw_only=True, slots=True)
class SectionConfig:
    """How one section enters the text."""

    take: bool = True
    heading: str = ""
    """Stands before it, as it is."""
    drop_p: float = 0.0
    """Chance that it is left out; of sections that would all be left out, one stays."""
    shuffle: bool = False
    """Whether its sentences come in a random order."""
    sentence_drop_p: float = 0.0
    """Chance of each sentence to be left out; one stays."""
    strip: tuple[str, ...] = ()
    """Words that are cut out of it wherever they stand, spelt exactly so."""

    def __post_init__(self) -> None:
        """Guard the chances.

        Raises:
            ValueError: a chance outside [0, 1].
        """
        for name in ("drop_p", "sentence_drop_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a chance between 0 and 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What a text takes from a report, in the order of the fields. By default it reads like the report.

    Findings or impression are each left out three times in ten, never both: later questions are as short as an
    impression or as long as findings. Sentences stay whole and in order, for nothing here shows that changing them
    helps. History, technique and codes are left out: the image does not show them. `SPECTRE` holds the other values in
    circulation.
    """

    history: SectionConfig = field(default_factory=lambda: SectionConfig(take=False, heading="Clinical history: "))
    technique: SectionConfig = field(default_factory=lambda: SectionConfig(take=False, heading="Technique: "))
    rest: SectionConfig = field(default_factory=lambda: SectionConfig(take=False))
    findings: SectionConfig = field(default_factory=lambda: SectionConfig(heading="Findings: ", drop_p=0.3))
    impression: SectionConfig = field(default_factory=lambda: SectionConfig(heading="Impression: ", drop_p=0.3))
    icd10: SectionConfig = field(default_factory=lambda: SectionConfig(take=False, heading="ICD10: "))
    rewrite_p: float = 0.5
    """Chance that a section comes in one of its rewrites, all alike likely, where the report has any."""
    most_icd10: int = 20
    """Of more diagnoses this many are drawn."""
    most_letters: int = 8000
    """A longer text loses sentences from the end of its longest section until it fits: what a report of 10,000 words
    says last is then never seen. 8,000 letters are about 2,000 tokens."""
    ending: str = ""
    """Stands after each section, whose lines are apart anyway."""
    languages: tuple[str, ...] = ("en",)
    """Two letters each (ISO 639-1); a report in another is left out. Empty: whatever comes."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: no section is taken, or a chance or number outside its range.
        """
        if not any(getattr(self, name).take for name in SECTIONS):
            raise ValueError(f"no section is taken; set one: {', '.join(f'{name}.take' for name in SECTIONS)}")
        if not 0 <= self.rewrite_p <= 1:
            raise ValueError(f"rewrite_p is a chance between 0 and 1, got {self.rewrite_p}")
        if self.most_icd10 < 1 or self.most_letters < 1:
            raise ValueError(f"most_icd10 and most_letters must be >= 1, got {self.most_icd10}, {self.most_letters}")


SECTIONS = ("history", "technique", "rest", "findings", "impression", "icd10")
"""In the order of a text."""
SPECTRE = ReportConfig(
    findings=SectionConfig(heading="Findings: ", drop_p=0.3, strip=("Impressions",)),
    impression=SectionConfig(heading="Impressions: "),
    icd10=SectionConfig(heading="ICD10: ", drop_p=0.3),
    rewrite_p=0.5,
    most_icd10=20,
    most_letters=1_000_000,
    ending="\n",
)
"""The text that SPECTRE (arXiv 2511.17209) was aligned with: its released template and chances."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One section of a text."""

    section: str
    heading: str
    version: int = 0
    """Which wording: 0 is the report's own, the others count its rewrites."""
    pieces: tuple[int, ...] = ()
    """Its sentences (or diagnoses) by number, in the order they come; none: all of it as it stands."""
    strip: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportPlan:
    """What is taken of one report; `apply_report` needs nothing else."""

    parts: tuple[Part, ...]
    most_letters: int
    ending: str = ""


def fault_of(report: Report | None, config: ReportConfig) -> Reason:
    """Say why a report cannot be learned from, by a word to be counted; an empty word where it can.

    `no-report`, `empty`, `encoding` (bytes were read in the wrong alphabet), `headings-only`, `no-wanted-section` (says
    something, but in none of the sections taken), `language` (the file says another one than wanted, or its common
    words do).
    """
    if report is None:
        return "no-report"
    every = {name: [said for said in _versions(report, name) if said.strip()] for name in SECTIONS}
    told = [text for texts in every.values() for text in texts]
    wanted = [text for name in SECTIONS for text in _wanted(config, report, name)]
    whole = "\n".join(told)
    reasons = {
        "empty": not told,
        "encoding": bool(_GARBLED.search(whole)),
        "headings-only": not any(map(_says, told)),
        "no-wanted-section": not any(map(_says, wanted)),
        "language": bool(config.languages) and not _languages(report, wanted) <= set(config.languages),
    }
    return next((reason for reason, true in reasons.items() if true), "")


def draw_report(config: ReportConfig, report: Report, rng: np.random.Generator) -> ReportPlan:
    """Draw what is taken of a report.

    Args:
        config: The chances.
        report: One without a fault, see `fault_of`; of one with nothing to say the text is empty.
        rng: The stream that is drawn from; how much is drawn depends on the report.
    """
    there = [name for name in SECTIONS if any(map(_says, _wanted(config, report, name)))]
    kept = [name for name in there if rng.random() >= getattr(config, name).drop_p]
    if there and not kept:
        kept = [there[int(rng.integers(len(there)))]]
    parts = [_draw_part(name, config, report, rng) for name in kept]
    return _fitted(ReportPlan(parts=tuple(parts), most_letters=config.most_letters, ending=config.ending), report)


def apply_report(plan: ReportPlan, report: Report, *, mirrored: bool) -> str:
    """Write the text that a plan takes from a report.

    Args:
        plan: Drawn for this report.
        report: What the plan was drawn for.
        mirrored: Whether the image that it goes with was mirrored along axis 0: left and right then change places in
            the words, see `views.laterality`.
    """
    lines = [f"{part.heading}{_body(part, report)}{plan.ending}" for part in plan.parts]
    text = ("" if plan.ending.endswith("\n") else "\n").join(lines)
    if len(text) > plan.most_letters:  # one endless sentence
        text = text[: plan.most_letters].rpartition(" ")[0] or text[: plan.most_letters]
    # A single sentence need not tell its language; the whole report may.
    return (
        swap_sides(text, language=spoken(text) or _two_letters(report.language) or spoken(report.text) or "en")
        if mirrored
        else text
    )


def _draw_part(name: str, config: ReportConfig, report: Report, rng: np.random.Generator) -> Part:
    how: SectionConfig = getattr(config, name)
    part = Part(section=name, heading=how.heading, strip=how.strip)
    if name == "icd10":
        order = rng.permutation(len(report.icd10))[: config.most_icd10]
        return replace(part, pieces=tuple(int(number) for number in order))
    told = [version for version, text in enumerate(_versions(report, name, how.strip)) if _says(text)]
    rewrites = [version for version in told if version > 0]
    if rewrites and (rng.random() < config.rewrite_p or 0 not in told):
        part = replace(part, version=rewrites[int(rng.integers(len(rewrites)))])
    if not (how.shuffle or how.sentence_drop_p):
        return part
    said = [_says(sentence) for sentence in _sentences(part, report)]
    numbers = [number for number in range(len(said)) if rng.random() >= how.sentence_drop_p]
    if not any(said[number] for number in numbers):  # all dropped, or all but blanks, numbers and headings
        talking = [number for number, says in enumerate(said) if says]
        numbers = [talking[int(rng.integers(len(talking)))]] if talking else numbers
    if how.shuffle:
        numbers = [numbers[place] for place in rng.permutation(len(numbers))]
    return replace(part, pieces=tuple(numbers))


def _fitted(plan: ReportPlan, report: Report) -> ReportPlan:
    """Take sentences from the end of the longest section until the text fits."""
    over = len(apply_report(replace(plan, most_letters=_ENDLESS), report, mirrored=False)) - plan.most_letters
    if over <= 0:
        return plan
    split = [_sentences(part, report) for part in plan.parts]
    pieces = [list(part.pieces or range(len(said))) for part, said in zip(plan.parts, split, strict=True)]
    sizes = [sum(len(said[number]) for number in numbers) for said, numbers in zip(split, pieces, strict=True)]
    while over > 0 and any(len(numbers) > 1 for numbers in pieces):
        longest = max((at for at in range(len(pieces)) if len(pieces[at]) > 1), key=sizes.__getitem__)
        cut = len(split[longest][pieces[longest].pop()])
        sizes[longest] -= cut
        over -= cut
    parts = tuple(replace(part, pieces=tuple(numbers)) for part, numbers in zip(plan.parts, pieces, strict=True))
    return replace(plan, parts=parts)


def _body(part: Part, report: Report) -> str:
    said = _sentences(part, report)
    if part.section == "icd10":
        return "; ".join(said[number].strip() for number in part.pieces or range(len(said)))
    if part.pieces in ((), tuple(range(len(part.pieces)))):  # the beginning, its own blanks and lines kept
        return "".join(said[: len(part.pieces) or None]).strip()
    return " ".join(said[number].strip() for number in part.pieces)


def _sentences(part: Part, report: Report) -> list[str]:
    if part.section == "icd10":
        return list(report.icd10)
    return sentences(_wording(part, report))


def _wording(part: Part, report: Report) -> str:
    return _versions(report, part.section, part.strip)[part.version]


def _wanted(config: ReportConfig, report: Report, section: str) -> tuple[str, ...]:
    """The wordings of a section as a text would have them; none where it is not taken."""
    how: SectionConfig = getattr(config, section)
    return _versions(report, section, how.strip) if how.take else ()


def _versions(report: Report, section: str, strip: tuple[str, ...] = ()) -> tuple[str, ...]:
    """A section's own words, then its rewrites, without the words to be cut out; of the codes one text."""
    match section:
        case "findings":
            texts = (report.findings_text, *report.findings_rewrites)
        case "impression":
            texts = (report.impression_text, *report.impression_rewrites)
        case "icd10":
            return ("; ".join(report.icd10),)
        case _:
            texts = (getattr(report, f"{section}_text"),)
    for word in strip:
        texts = tuple(text.replace(word, "") for text in texts)
    return texts


_ENDLESS = 10**12
# What UTF-8 looks like where it was read as Latin-1, the mark of a letter that could not be read, control codes, and
# halves of characters.
_GARBLED = re.compile(r"\ufffd|\u00c3[\u0080-\u00bf]|\u00e2\u20ac|[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
_HEADING = re.compile(r"[^\W\d_][\w /-]{0,40}:")
_NOTHING = re.compile(
    r"findings?|impressions?|conclusion|history|indication|technique|comparison|report|nan?|none|n|a|null|\d+"
    r"|befunde?|beurteilung|bevindingen|conclusie|technik|techniek|résultats"
)


def _says(text: str) -> bool:
    """Whether anything is left of a text without headings, and words that stand for nothing."""
    words = re.findall(r"\w+", _HEADING.sub(" ", text).lower())
    return any(not _NOTHING.fullmatch(word) for word in words)


def _two_letters(language: str) -> str:
    found = re.match(r"([a-z]{2})(?:[-_]|$)", language.lower())
    return found[1] if found else ""


def _languages(report: Report, texts: list[str]) -> set[str]:
    return {_two_letters(report.language), spoken("\n".join(texts))} - {""}
