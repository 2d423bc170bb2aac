from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.spaces import ARCHITECTURE, DIM, OUT, SPEC, aligned_weights, head

from voxelstem.aligned import HEADS, Aligned, is_aligned, read_aligned, space_digest
from voxelstem.card import Card, read_card, write_weights
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.model import make_model
from voxelstem.objectives.siglip import Siglip, SiglipConfig
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.streaming import of_volume

SCAN = phantom(PhantomConfig(seed=1, spacing_mm=(20.0, 20.0, 20.0), orientation="RAS"))
PLANTED = "Frau Plantedmüller"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return aligned_weights(tmp_path_factory.mktemp("weights") / "weights")


@pytest.fixture(scope="module")
def aligned(weights: Path) -> Aligned:
    return read_aligned(weights)


def test_a_scan_s_vector_is_its_embedding_through_the_image_head_at_length_one(aligned: Aligned):
    embedding = aligned.model.embed(SCAN)
    row = torch.from_numpy(embedding.scan)
    state = head(2 * DIM, seed=0).state_dict()
    for place in (0, 2, 4):
        row = state[f"mlp.{place}.weight"] @ row + state[f"mlp.{place}.bias"]
        row = torch.nn.functional.gelu(row) if place < 4 else row
    rows = [direction / direction.norm() for direction in state["direction"]]
    row = torch.stack([direction @ row for direction in rows])
    wanted = (row / row.norm()).numpy()
    found = aligned.embed_scan(embedding)
    assert found.dtype == np.float32
    assert found.shape == (OUT,)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_study_a_volume_a_stream_and_an_embedding_of_one_scan_have_one_vector(aligned: Aligned):
    (volume,) = SCAN.volumes
    first = aligned.embed_scan(SCAN)
    for other in (volume, of_volume(volume), aligned.model.embed(volume)):
        np.testing.assert_array_equal(aligned.embed_scan(other), first)


def test_texts_have_vectors_of_length_one_that_do_not_depend_on_their_company(aligned: Aligned):
    texts = ["no pleural effusion", "a nodule of 8 mm in the left lower lobe"]
    both = aligned.embed_texts(texts)
    assert both.shape == (2, OUT)
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(aligned.embed_texts(texts[1:]), both[1:])
    assert aligned.embed_texts([]).shape == (0, OUT)


def test_an_empty_text_is_named_by_its_number_and_the_others_by_nothing(aligned: Aligned):
    with pytest.raises(ConfigError, match="text 2 of 2") as error:
        aligned.embed_texts([PLANTED, " \n"])
    assert PLANTED not in str(error.value)


def test_a_probability_is_the_sigmoid_of_the_scaled_cosine(aligned: Aligned):
    scan, text = np.eye(OUT, dtype=np.float32)[:2]
    text = 0.6 * scan + 0.8 * text
    wanted = 1 / (1 + math.exp(-(math.exp(2.3026) * 0.6 - 10)))
    assert float(aligned.probability(scan, text)) == pytest.approx(wanted, rel=1e-6)
    assert aligned.probability(np.stack([scan, scan]), np.stack([text, scan])).shape == (2,)


def test_without_temperature_there_is_no_probability(tmp_path: Path):
    found = read_aligned(aligned_weights(tmp_path / "w", logit=False))
    assert (found.temperature, found.bias) == (None, None)
    with pytest.raises(CheckpointError, match="temperature"):
        found.probability(np.ones(OUT), np.ones(OUT))


def test_an_embedding_of_another_length_is_refused(aligned: Aligned):
    with pytest.raises(ConfigError, match=f"{DIM}.* numbers, the image head .* takes {2 * DIM}"):
        aligned.embed_scan(aligned.model.embed(SCAN, pool="cls"))


def test_weights_without_heads_are_refused(tmp_path: Path):
    model = make_model(Card(architecture=ARCHITECTURE, spec=SPEC, trained=("block",)), seed=0)
    write_weights(tmp_path / "plain", model.backbone.state_dict(), model.card)
    assert not is_aligned(read_card(tmp_path / "plain"))
    with pytest.raises(CheckpointError, match="not aligned with reports"):
        read_aligned(tmp_path / "plain")


def test_heads_that_do_not_fit_backbone_tower_or_each_other_are_refused(tmp_path: Path):
    for name, told, made in (
        ("image", "image head takes 10 numbers, the backbone gives 48", {"image": head(10, seed=0)}),
        ("text", "text head takes 10 numbers, the text tower gives 384", {"text": head(10, seed=0)}),
        ("out", "gives 16 numbers and the text head 8", {"text": head(384, seed=0, out=8)}),
    ):
        with pytest.raises(CheckpointError, match=told):
            read_aligned(aligned_weights(tmp_path / name, **made))


def test_heads_copied_from_other_weights_are_refused(tmp_path: Path, weights: Path):
    other = aligned_weights(tmp_path / "other", seed=5)
    (other / HEADS).write_bytes((weights / HEADS).read_bytes())
    with pytest.raises(CheckpointError, match=r"heads.safetensors differs from the card's sha256"):
        read_aligned(other)


def test_another_tower_than_they_were_aligned_with_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is not the one that these weights were aligned with"):
        read_aligned(aligned_weights(tmp_path / "w", sha256="0" * 64))


def test_heads_without_a_tower_are_refused(tmp_path: Path):
    model = make_model(Card(architecture=ARCHITECTURE, spec=SPEC, trained=("block",)), seed=0)
    sides = {"image": head(2 * DIM, seed=0), "text": head(384, seed=1)}
    tensors = {f"{side}.{name}": x for side, made in sides.items() for name, x in made.state_dict().items()}
    write_weights(tmp_path / "w", model.backbone.state_dict(), model.card, {HEADS: tensors})
    with pytest.raises(CheckpointError, match="no text tower"):
        read_aligned(tmp_path / "w")


def test_other_heads_over_the_same_backbone_are_another_space(tmp_path: Path, weights: Path, aligned: Aligned):
    other = aligned_weights(tmp_path / "w", text=head(384, seed=9))
    cards = read_card(weights), read_card(other)
    assert cards[0].sha256 == cards[1].sha256
    assert space_digest(cards[0]) == aligned.sha256 != space_digest(cards[1])
    assert space_digest(replace(cards[0], spec=replace(SPEC, high_hu=400.0))) != aligned.sha256


def test_what_the_objective_writes_is_read_back_and_gives_its_vectors(tmp_path: Path):
    """The one agreement between training and use: the files of `Siglip.beside`."""
    architecture = ARCHITECTURE | {"scan.dim": 12, "scan.depth": 1, "scan.heads": 2}
    model = make_model(Card(architecture=architecture, spec=SPEC, trained=("block", "scan")), seed=0)
    objective = Siglip(SiglipConfig(hidden=16, bottleneck=8, out=4), model.backbone).eval()
    extras, texts = objective.beside()
    write_weights(tmp_path / "w", model.backbone.state_dict(), model.card, extras, texts)
    found = read_aligned(tmp_path / "w")
    scan = torch.from_numpy(model.embed(SCAN).scan)
    with torch.no_grad():
        wanted = objective.image_head(scan)
        said = objective.text_head(objective.tower(["spleen is enlarged"]))[0]
    np.testing.assert_allclose(found.embed_scan(SCAN), (wanted / wanted.norm()).numpy(), atol=1e-6)
    np.testing.assert_allclose(found.embed_texts(["spleen is enlarged"])[0], (said / said.norm()).numpy(), atol=1e-6)
    assert (found.temperature, found.bias) == (pytest.approx(2.3026), pytest.approx(-10.0))
