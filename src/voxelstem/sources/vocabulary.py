"""Words that are known to be harmless: makers and models of scanners, kernels, body parts, contrasts.

A header's text goes on only where every word of it is one of these, so that what somebody typed, or a scanner's next
software wrote, about a person does not. A kernel or model that is missing here is lost, not misread: add its word.
"""

from __future__ import annotations

import re

MOST_CHARACTERS = 64  # of one value: DICOM's longest plain text (LO) and longest UID


def words(*known: str) -> re.Pattern[str]:
    """One pattern of several, in large or small letters; only ASCII."""
    return re.compile("|".join(known), re.IGNORECASE | re.ASCII)


MAKERS = words(
    "GE|SIEMENS|Philips|TOSHIBA|Canon|HITACHI|FUJIFILM|Shimadzu|Hyperfine|Esaote|Neusoft|Agfa(-Gevaert)?|AG|UIH|United",
    "Imaging|MEDICAL|SYSTEMS?|Healthcare|Healthineers|Corporation|Inc",
)
MODELS = words(
    "LightSpeed(16|32)?|VCT|Discovery|Revolution|Optima|BrightSpeed|HiSpeed|ProSpeed|Signa|SIGNA|Premier|Architect|Artist",
    "SOMATOM|Definition|Sensation|Emotion|Force|Drive|Edge|Flash|Scope|Perspective|Confidence|Spirit|Balance|NAEOTOM|Alpha",
    "Biograph(16|40|64|128)?(_mCT)?|mCT|Vision|Horizon|TrioTim|Trio|Verio|Skyra(fit)?|Prisma(_fit)?|Aera|Avanto(_fit)?|Vida",
    "Espree|Symphony(Tim)?|Harmony|Allegra|Sola|Lumina|Altea|Magnetom|Terra|Cima|Free|Max",
    "Brilliance|iCT|IQon|Spectral|Incisive|Ingenuity|MX8000|Gemini|Achieva|Ingenia|Intera|Elition|Ambition|Prodiva|Panorama",
    "Aquilion|Asteion|Activion|Astelion|Alexion|Vantage|Titan|Galan|Orian|Elan|ONE|PRIME|GENESIS|Lightning|Precision",
    "Scenaria|Supria|Eclos|Echelon|Oval|Airis|Oasis|Aperto|uCT|uMR|uPMR|Swoop",
    r"(CT|MR|PET)?\d{1,3}[A-Z]?|\d(\.\d+)?T|Ultra|Plus|Pro|Elite|EVO|HD|HDe|HDx|HDxt|GSI|AS|DS|ES|X|XT|CX|SP|TX|Dual",
    "CT|MR|PET|Xr|MRI|Big|Bore",
)
KERNELS = words(
    "STANDARD|STND|STD|SOFT|SMOOTH|DETAIL|CHEST|CHST|LUNG|BONE|BONE(PLUS)?|EDGE|ULTRA|HD|HDPLUS|PLUS|SHARP|BODY|HEAD|BRAIN",
    r"[ABDHIJQSTUE][A-Za-z]?\d{2}[a-z]{0,2}",  # Siemens: B30f, Br40d, Hr38h, I31f, Qr40
    r"F[CL]\d{2}",  # Toshiba and Canon
    r"[A-F]|L|S[ABC]|Y[ABCD]|U[ABC]|E[BC]",  # Philips
    r"\d{1,2}",  # the strength of iterative reconstruction that Siemens writes behind the kernel
)
PARTS = words(
    "CHEST|THORAX|LUNG|HEART|CARDIAC|CORONARY|AORTA|ABDOMEN|ABD|LIVER|PANCREAS|KIDNEY|SPLEEN|COLON|BOWEL|PELVIS|BLADDER",
    "PROSTATE|UTERUS|HIP|BREAST|HEAD|BRAIN|SKULL|SINUS(ES)?|ORBITS?|EAR|JAW|NECK|[CTL]?SPINE|CERVICAL|SPINE|SHOULDER|ARM",
    "ELBOW|WRIST|HAND|LEG|KNEE|ANKLE|FOOT|EXTREMITY|UPPER|LOWER|WHOLE|WHOLEBODY|BODY|PARTIALBODY|TRUNK|AND|LSSPINE|TLSPINE",
)
SCANS = words("AXIAL|HELICAL|SPIRAL|CINE|SCOUT|SEQUENCE|MODE|MOD|PER|RG|CG|PPG|FC|PFF|PFP|SP|FS|FAST|GEMS|SFS|NONE")
SEQUENCES = words("SE|IR|GR|EP|RM|SK|MTC|SS|TRSS|SP|MP|OSP|TOF|EC|NONE")
CONTRASTS = words(
    "none|enhanced|oral|native|arterial|venous|portal|delayed|late|early|dynamic|postcontrast|precontrast|post|pre|ce|gad",
    r"T1(w|rho|map)?|T2(w|star|starw|starmap|map)?|PD(w|T2|map)?|FLAIR|FLASH|MEGRE|MESE|MP2RAGE|MPRAGE|MPM|MT[RSw]|UNIT1|VFA|IRT1|SWI",
    r"inplaneT[12]|angio|TOF|dwi|ADC|trace|sbref|bold|cbv|asl|m0scan|phase([12]|diff)?|magnitude[12]?|fieldmap|epi|CT|inv\d|echo\d|b\d{1,4}",
)
IMAGE_TYPES = words(
    "ORIGINAL|DERIVED|PRIMARY|SECONDARY|MIXED|AXIAL|LOCALIZER|REFORMATTED|MPR|MIP|MINIP|PROJECTION|VOLUME|NONE|OTHER|NORM",
    "ND|DIS2D|DIS3D|M|P|R|I|MFSPLIT|SE|M_SE|M_FFE|M_IR|FFE|IR|T1|T2|ADC|TRACEW|FA|DIFFUSION|PERFUSION|ANGIO|CT_SOM5|SPI|SEQ",
    "MON|TOP|ADD|AVERAGE|RESAMPLED|CSA|IMAGE|WHOLE|BODY|HELICAL|DYNAMIC|CARDIAC|GATED|MOSAIC|FMRI|FM|VFRAME|ENERGY|VMI|MONO",
)

_UNENHANCED = re.compile(r"\b(NO|NON|NONE|NICHT|OHNE|W/?O|WITHOUT|UNENHANCED|NATIVE?|NATIV|PLAIN|0)\b", re.IGNORECASE)
_IN_THE_GUT = re.compile(r"\b(ORAL|PO|GASTRO\w*|BARIUM|RECTAL|TELEBRIX|READI-?CAT|WATER)\b", re.IGNORECASE)
_IN_A_VEIN = re.compile(r"\b(IV|I\.V|OMNI\w*|ISOVUE\w*|ULTRAVIST\w*|VISIPAQUE\w*|IO\w+|OPTIRAY\w*)", re.IGNORECASE)


def all_known(text: str, known: re.Pattern[str]) -> bool:
    """Whether a text has words, and each is one of `known` from beginning to end."""
    parts = [part for part in re.split(r"[\s,+&/.]+", text.strip()) if part.strip("_-")]
    return bool(parts) and all(
        known.fullmatch(part) or all(map(known.fullmatch, filter(None, re.split(r"[_-]+", part)))) for part in parts
    )


def at_most_one_number(text: str) -> bool:
    """Whether no more than one word is made of digits alone: a row of short numbers can be a telephone's, or a day."""
    return sum(part.isdigit() for part in re.split(r"[^A-Za-z0-9]+", text)) <= 1


def tidy(text: str) -> str:
    """A text on one line, and not beginning with a sign that a spreadsheet takes for a formula's."""
    return " ".join(text.split()).lstrip(" +-_&/.,")


def contrast_agent(text: str) -> str:
    """One word for what somebody typed about contrast agent: `none`, `oral`, `enhanced`, or empty for nothing typed.

    DICOM says it in free text (ContrastBolusAgent), so the text itself never goes on.
    """
    if not text.strip():
        return ""
    if _UNENHANCED.search(text):
        return "none"
    return "oral" if _IN_THE_GUT.search(text) and not _IN_A_VEIN.search(text) else "enhanced"


def clean_contrast(text: str) -> str:
    """A contrast's name if all its words are known, such as `T1w` or `portal`, else empty."""
    text = tidy(text)
    return text if len(text) <= MOST_CHARACTERS and all_known(text, CONTRASTS) else ""
