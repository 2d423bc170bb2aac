"""Left and right change places in the words of a report, as they do in a mirrored image.

What is changed: the words themselves, in English, German, Dutch and French, with their endings and compounds
("left-sided", "linksseitig", "rechterlong"), "dextro-" and "levo-" of curves, abbreviations of sided structures
("LUL", "RLQ"), and single letters before an organ or in a comparison ("L kidney", "R > L"). What is not: the same words
in another sense ("right away", "left in place", "upright", "grand droit"), and what has a side without naming it. After
a mirror the liver is on the patient's left and no word says so: mirror left and right only where that may be learned.

Whether a word is changed depends only on words that are not, so changing a text twice gives it back. The one exception
is French, where "gauche" does not tell whether it was "droit" or "droite": the nearest noun decides, and where a text
does not agree with it, the first change settles the spelling.
"""

from __future__ import annotations

import re

_BEGIN, _END = r"(?<![^\W_])", r"(?![^\W_])"


def _cased(*words: str) -> str:
    """The words in the three ways of writing that can be kept: small, Capital and CAPITALS."""
    return "|".join(form for word in words for form in (word, word.capitalize(), word.upper()))


# After the word, English means something else by it.
_OTHERWISE = (
    r"(?:away|now|here|through|alone|over|out|open|unchanged|untreated|unattended|in\s+place|in\s+situ|as\s+is|or\s+wrong"
    r"|on\s+(?:time|schedule)|to\s+(?:heal|drain))"
)
# A "right angle" is a shape, but the jaw has a "right angle of".
_SHAPES = r"(?:angled|angles?(?!\s+of))"
_NEAR = r"(?:after|before|behind|beside|next\s+to|above|below|under|underneath)"
_ENGLISH = (
    rf"{_BEGIN}(?:{_cased('left', 'right')})(?=(?i:wards?|most|sided)?{_END})"
    rf"(?![\s-]+(?i:{_SHAPES}){_END})"
    # "Right below the fissure" is just below it, "left in place" is where it was; "on the right below the fissure" and
    # "on the left unchanged" are sides.
    rf"(?!(?<!(?i:\bthe right))(?<!(?i:\bthe left))(?<!(?i:\bon right))(?<!(?i:\bon left))"
    rf"[\s-]+(?i:{_OTHERWISE}|{_NEAR}){_END})"
    r"(?!(?:(?<=(?i:all right))|(?<=(?i:all left)))\s*(?:[.,;:!?)]|$))"
)
_CURVES = (
    rf"{_BEGIN}(?:{_cased('dextro', 'levo')})"
    r"(?=-?(?i:scolio|convex|cardia|position|curvature|version|rota|rotoscolio))"
)
_STRUCTURES = (
    *("UL", "LL", "ML", "OL", "UQ", "LQ", "V", "VH", "IJ", "PA", "CFA", "SFA", "CIA", "EIA", "CCA", "ICA", "SCA"),
    *("UE", "LE", "MSB"),
)
_LETTERS = rf"{_BEGIN}(?:[LR])(?=(?:{'|'.join(_STRUCTURES)}){_END})"
_ORGANS = (
    r"(?:upper|lower|middle|mid|lung|lobe|kidney|renal|adrenal|breast|hilum|hilar|pleural?|effusion|base|basal|basilar"
    r"|apex|apical|hemithorax|hemidiaphragm|ribs?|side|ventricle|ventricular|atrium|atrial|arm|leg|hip|shoulder|axillar?y?"
    r"|iliac|femur|femoral|humerus|neck|thyroid|ovar(?:y|ian)|inguinal|ureter|ureteral|hydronephrosis|pneumothorax)"
)
_SINGLE = (
    rf"(?<![^\W_])(?<![-.])(?:[LR])(?:(?=-sided{_END})|(?=\s+(?i:{_ORGANS}){_END})|(?=\s?[<>]{{1,2}}\s?[LR]{_END})"
    rf"|(?<=[LR][<>].){_END}|(?<=[LR] [<>] .){_END}|(?<=[LR][<>]{{2}}.){_END}|(?<=[LR] [<>]{{2}} .){_END})"
)
# "RT" in capitals is radiotherapy.
_SHORT = rf"{_BEGIN}(?:[LlRr])(?=t\.?\s+(?i:{_ORGANS}){_END})"
# Dutch "rechtstreeks" is "directly"; "rechteckig", "aufrecht" and "rechtop" do not fit the endings.
_GERMANIC = (
    rf"{_BEGIN}(?:{_cased('link', 'recht')})"
    rf"(?=(?i:s(?!treeks)[^\W\d_]*|e[rnms]?{_END}|er[^\W\d_]+))"
)
_GERMANIC_SHORT = rf"{_BEGIN}(?:{_cased('re', 'li')}){_END}"
_FRENCH = rf"{_BEGIN}(?P<french>{_cased('gauches', 'gauche', 'droites', 'droits', 'droite', 'droit')}){_END}"

_SHARED = (_CURVES, _LETTERS, _SINGLE)
_PATTERNS = {
    "en": re.compile("|".join((_ENGLISH, *_SHARED, _SHORT)), re.MULTILINE),
    "de": re.compile("|".join((_GERMANIC, *_SHARED, _GERMANIC_SHORT))),
    "nl": re.compile("|".join((_GERMANIC, *_SHARED, _GERMANIC_SHORT))),
    "fr": re.compile("|".join((_FRENCH, *_SHARED))),
}
_PAIRS = (("left", "right"), ("dextro", "levo"), ("link", "recht"), ("li", "re"), ("l", "r"))
_OTHER = dict(_PAIRS) | {there: here for here, there in _PAIRS}

# Straight muscles and right angles, "tout droit".
_STRAIGHT = re.compile(r"\b(?:muscles?|grands?|petits?|angles?|tout)\s+$", re.IGNORECASE)
# "À droite" is spelt so whatever lies there.
_TO = re.compile(r"\bà\s+$", re.IGNORECASE)
_MASCULINE = re.compile(
    "poumons?|reins?|lobes?|côtés?|seins?|ventricules?|hiles?|uretères?|membres?|sinus|champs?|culs?-de-sac|ganglions?"
    "|épanchements?|nodules?|kystes?|sommets?|troncs?|hémithorax|segments?|bords?|versants?|quadrants?|flancs?|genoux?"
    "|pieds?|bras|fémurs?|humérus|tibias?|ovaires?|testicules?|psoas|cœur|pneumothorax|apex|foie"
)
_FEMININE = re.compile(
    "bases?|surrénales?|artères?|veines?|bronches?|plèvres?|loges?|glandes?|lésions?|opacités?|régions?|fosses?|coupoles?"
    "|jambes?|mains?|épaules?|hanches?|carotides?|jugulaires?|oreillettes?|masses?|scissures?|côtes?|clavicules?"
    "|atélectasies?|condensations?|pneumopathies?"
)
_NEAREST, _LOOK_BACK = 4, 200
"""Words and letters before it in which its noun is looked for."""


def swap_sides(text: str, *, language: str = "en") -> str:
    """Let left and right change places in the words of a text.

    Args:
        text: As it was written; the case of each word is kept where it is small, Capital or CAPITALS, and words in
            mIxed case stay as they are.
        language: `en`, `de`, `nl` or `fr`; any other is read as English.

    >>> swap_sides("Left-sided effusion, RUL nodule; drain left in place.")
    'Right-sided effusion, LUL nodule; drain left in place.'
    """

    def other(found: re.Match[str]) -> str:
        word = found.group()
        if found.lastgroup == "french":
            return _french(text, found)
        return _like(word, _OTHER[word.lower()])

    return _PATTERNS.get(language, _PATTERNS["en"]).sub(other, text)


def _like(word: str, other: str) -> str:
    """Write `other` in the case of `word`."""
    if word.islower():
        return other
    return other.upper() if word.isupper() else other.capitalize()


def _french(text: str, found: re.Match[str]) -> str:
    word, before = found.group(), text[max(0, found.start() - _LOOK_BACK) : found.start()]
    if _STRAIGHT.search(before[-20:]):
        return word
    small = word.lower()
    plural = "s" if small.endswith("s") else ""
    if small.startswith("droit"):
        return _like(word, f"gauche{plural}")
    if _TO.search(before):
        return _like(word, f"droite{plural}")
    near = re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*", re.split(r"[.;:,\n]", before)[-1].lower())[: -_NEAREST - 1 : -1]
    noun = next((each for each in near if _MASCULINE.fullmatch(each) or _FEMININE.fullmatch(each)), "")
    return _like(word, f"droit{'' if _MASCULINE.fullmatch(noun) else 'e'}{plural}")
