from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

Shapes = dict[str, tuple[int, ...]]
KEYS = Path(__file__).parent.parent / "data" / "spectre_keys.txt"
SPEC = Path(__file__).parents[3] / "shared" / "spec" / "spectre_keys.txt"


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def unfolded(lines: list[str]) -> Shapes:
    """Each run of lines with the same `{0..n}` stands for n + 1 copies of the run."""
    shapes: Shapes = {}
    folded: list[tuple[str, tuple[int, ...]]] = []
    for line in [*lines, ""]:
        name, _, shape = line.partition(" ")
        if "{" in name:
            folded.append((name, numbers(shape)))
            continue
        if folded:
            last = int(re.findall(r"\{0\.\.(\d+)\}", folded[0][0])[0])
            for at in range(last + 1):
                shapes |= {re.sub(r"\{.*\}", str(at), name): shape for name, shape in folded}
            folded = []
        if name:
            shapes[name] = numbers(shape)
    return shapes


@pytest.fixture(scope="session")
def spectre_keys() -> Mapping[str, Shapes]:
    """Names and shapes of the released files, by part."""
    sections = re.split(r"\n\[(.*)\]\n", KEYS.read_text())[1:]
    return {name: unfolded(text.strip().splitlines()) for name, text in zip(sections[::2], sections[1::2], strict=True)}


@pytest.fixture(scope="session")
def spec_keys() -> Mapping[str, Shapes]:
    """The same facts as the specification lists them, which is not part of the package."""
    if not SPEC.exists():
        pytest.skip("the specification's list of keys is not here")
    titles = {
        f"spectre-{size} :: {kind}_{size}{rest}": f"spectre-{size}/{part}"
        for size in ("small", "base", "large")
        for kind, rest, part in (("vit", "_patch16_128", "backbone"), ("feat_vit", "", "combiner"))
    } | {
        "SigLIPProjectionHead image (2160->512)": "image_head",
        "SigLIPProjectionHead text (1024->512)": "text_head",
        "Qwen3-Embedding-0.6B + loralib LoRA(r=16) text encoder": "text",
    }
    found: dict[str, Shapes] = {}
    for section in SPEC.read_text().split("\n### ")[1:]:
        title, *lines = section.strip().splitlines()
        rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
        if title in titles:
            found[titles[title]] = {name: numbers(shape) for name, shape, _ in rows}
    return found
