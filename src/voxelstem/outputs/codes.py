"""Names of classes and findings in the clinic's vocabulary: SNOMED CT where it is known, else our own scheme.

Numbers and meanings are those that DICOM PS3.16 lists (CID 7150 and 7151).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from voxelstem.allowed import LONGEST_NAME
from voxelstem.errors import ConfigError
from voxelstem.findings import Code

PRIVATE = "99VOXELSTEM"
"""Our scheme: private ones begin with 99 (PS3.16, 8.2)."""


def _sct(value: str, meaning: str) -> Code:
    return Code(value=value, scheme="SCT", meaning=meaning)


ANATOMY = _sct("91723000", "Anatomical Structure")
ABNORMAL = _sct("49755003", "Morphologically Abnormal Structure")
TISSUE = _sct("85756007", "Tissue")
SUBSTANCE = _sct("91720002", "Body Substance")
SIDES = {"left": _sct("7771000", "Left"), "right": _sct("24028007", "Right")}
YES, NO = _sct("373066001", "Yes"), _sct("373067005", "No")

ORGANS = {
    "adrenal": _sct("23451007", "Adrenal gland"),
    "adrenal gland": _sct("23451007", "Adrenal gland"),
    "amygdala": _sct("4958002", "Amygdala"),
    "aorta": _sct("15825003", "Aorta"),
    "bladder": _sct("89837001", "Bladder"),
    "urinary bladder": _sct("89837001", "Bladder"),
    "bone": _sct("272673000", "Bone"),
    "brain": _sct("12738006", "Brain"),
    "brain stem": _sct("119238007", "Brain Stem"),
    "brainstem": _sct("119238007", "Brain Stem"),
    "breast": _sct("76752008", "Breast"),
    "bronchus": _sct("955009", "Bronchus"),
    "caudate": _sct("11000004", "Caudate Nucleus"),
    "cerebellum": _sct("113305005", "Cerebellum"),
    "clavicle": _sct("51299004", "Clavicle"),
    "colon": _sct("71854001", "Colon"),
    "corpus callosum": _sct("88442005", "Corpus callosum"),
    "duodenum": _sct("38848004", "Duodenum"),
    "esophagus": _sct("32849002", "Esophagus"),
    "femur": _sct("71341001", "Femur"),
    "gallbladder": _sct("28231008", "Gallbladder"),
    "gall bladder": _sct("28231008", "Gallbladder"),
    "heart": _sct("80891009", "Heart"),
    "hip": _sct("29836001", "Hip"),
    "hippocampus": _sct("5366008", "Hippocampus"),
    "humerus": _sct("85050009", "Humerus"),
    "inferior vena cava": _sct("64131007", "Inferior vena cava"),
    "kidney": _sct("64033007", "Kidney"),
    "lateral ventricle": _sct("66720007", "Lateral Ventricle"),
    "liver": _sct("10200004", "Liver"),
    "lung": _sct("39607008", "Lung"),
    "lymph node": _sct("59441001", "Lymph Node"),
    "oesophagus": _sct("32849002", "Esophagus"),
    "pancreas": _sct("15776009", "Pancreas"),
    "pericardium": _sct("76848001", "Pericardium"),
    "pleura": _sct("3120008", "Pleura"),
    "portal vein": _sct("32764006", "Portal vein"),
    "prostate": _sct("41216001", "Prostate"),
    "pulmonary artery": _sct("81040000", "Pulmonary artery"),
    "putamen": _sct("89278009", "Putamen"),
    "rectum": _sct("34402009", "Rectum"),
    "rib": _sct("113197003", "Rib"),
    "sacrum": _sct("54735007", "Sacrum"),
    "scapula": _sct("79601000", "Scapula"),
    "small bowel": _sct("30315005", "Small intestine"),
    "small intestine": _sct("30315005", "Small intestine"),
    "spinal cord": _sct("2748008", "Spinal cord"),
    "spine": _sct("421060004", "Spine"),
    "spleen": _sct("78961009", "Spleen"),
    "sternum": _sct("56873002", "Sternum"),
    "stomach": _sct("69695003", "Stomach"),
    "superior vena cava": _sct("48345005", "Superior vena cava"),
    "thalamus": _sct("42695009", "Thalamus"),
    "thyroid": _sct("69748006", "Thyroid"),
    "trachea": _sct("44567001", "Trachea"),
    "uterus": _sct("35039007", "Uterus"),
    "ventricles": _sct("35764002", "Brain ventricle"),
    "vertebra": _sct("51282000", "Vertebra"),
}
TISSUES = {
    "fat": _sct("55603005", "Fat"),
    "gray matter": _sct("389081007", "Gray Matter"),
    "grey matter": _sct("389081007", "Gray Matter"),
    "muscle": _sct("71616004", "Muscle"),
    "skeletal muscle": _sct("127954009", "Skeletal muscle"),
    "white matter": _sct("389080008", "White Matter"),
}
SUBSTANCES = {
    "cerebrospinal fluid": _sct("65216001", "Cerebrospinal Fluid"),
    "csf": _sct("65216001", "Cerebrospinal Fluid"),
}
LESIONS = {
    "cyst": _sct("367643001", "Cyst"),
    "edema": _sct("79654002", "Edema"),
    "effusion": _sct("41699000", "Effusion"),
    "haemorrhage": _sct("50960005", "Hemorrhage"),
    "hematoma": _sct("35566002", "Hematoma"),
    "hemorrhage": _sct("50960005", "Hemorrhage"),
    "lesion": _sct("52988006", "Lesion"),
    "mass": _sct("4147007", "Mass"),
    "metastasis": _sct("128462008", "Metastasis"),
    "necrosis": _sct("6574001", "Necrosis"),
    "neoplasm": _sct("108369006", "Neoplasm"),
    "nodule": _sct("27925004", "Nodule"),
    "oedema": _sct("79654002", "Edema"),
    "tumor": _sct("108369006", "Neoplasm"),
    "tumour": _sct("108369006", "Neoplasm"),
}
"""May stand alone or behind an organ: `lesion`, `liver_lesion`, `lung nodule left`."""

_PLAIN: tuple[tuple[Code, dict[str, Code]], ...] = (
    (ANATOMY, ORGANS),
    (TISSUE, TISSUES),
    (SUBSTANCE, SUBSTANCES),
    (ABNORMAL, LESIONS),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Coded:
    """What a name means."""

    category: Code
    kind: Code
    side: Code | None = None
    """Of the region where there is one, otherwise of the kind."""
    region: Code | None = None
    """The organ that a lesion lies in."""


def coded(name: str) -> Coded:
    """Look up the name of a class or finding; `kidney_left`, `left kidney` and `Kidney-Left` are one.

    A name that is not known, or that names both sides, keeps all its words in our own scheme, as an abnormal
    structure where one of its words is: a wrong code would be worse than a private one.
    """
    words = re.split(r"[\s_-]+", name.strip().lower())
    sides = [SIDES[word] for word in words if word in SIDES]
    rest = [word for word in words if word not in SIDES]
    if len(sides) < 2:  # noqa: PLR2004 - one side or none
        side = sides[0] if sides else None
        for category, table in _PLAIN:
            if " ".join(rest) in table:
                return Coded(category=category, kind=table[" ".join(rest)], side=side)
        organ = ORGANS.get(" ".join(rest[:-1]))
        if organ is not None and rest[-1] in LESIONS:
            return Coded(category=ABNORMAL, kind=LESIONS[rest[-1]], side=side, region=organ)
    category = ABNORMAL if LESIONS.keys() & set(rest) else ANATOMY
    return Coded(category=category, kind=private(name))


def private(text: str) -> Code:
    """A code of our own scheme for a text; the same text has the same code everywhere."""
    # A code value is short (SH, 16 characters), so it cannot be the text itself.
    return Code(value=f"VS{hashlib.sha256(text.encode()).hexdigest()[:12].upper()}", scheme=PRIVATE, meaning=text)


def check_texts(texts: Iterable[str], *, most: int = LONGEST_NAME) -> None:
    """Accept only texts that every DICOM character set can spell.

    Raises:
        ConfigError: one is longer than `most`, holds a backslash, or a letter that is not ASCII.
    """
    for text in texts:
        if not (text.isascii() and text.isprintable() and "\\" not in text and len(text) <= most):
            raise ConfigError(
                f"'{text}' cannot be written as DICOM: at most {most} ASCII characters and no backslash may be used",
                hint="rename the class, or choose the outputs json and nifti",
            )
