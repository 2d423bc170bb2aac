from __future__ import annotations

import json
import zlib
from collections import Counter as Counts
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_together
from torch import Tensor, nn

from voxelstem import distributed
from voxelstem.backbones.encoder import Encoder, EncoderConfig
from voxelstem.backbones.heads import AlignHead
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.backbones.text import TowerConfig
from voxelstem.chance import Chance
from voxelstem.config import overlay
from voxelstem.engine.optim import OptimConfig, make_optimizer, set_rate
from voxelstem.engine.parallel import ParallelConfig, Trainee
from voxelstem.errors import ConfigError
from voxelstem.objectives import siglip as siglip_module
from voxelstem.objectives.siglip import Siglip, SiglipConfig, in_chunks
from voxelstem.protocols import Batch
from voxelstem.sentences import sentences
from voxelstem.testing import check_objective
from voxelstem.views.crop import ViewKind

CPU = torch.device("cpu")
EXACT, EQUAL = 1e-6, 1e-5
GRID = (2, 1, 2)
SIZE = (16, 8, 16)
SAMPLES = 8
SIZES: dict[str, Any] = {"hidden": 12, "bottleneck": 8, "out": 6}
FROZEN, LOW_RANK = TowerConfig(), TowerConfig(trains="lowrank", rank=2, dropout=0.2)
WORDS = ("Left", "Right", "Upper", "Lower", "Nodule", "Cyst", "Effusion", "Normal")


class Bag(nn.Module):
    """A text tower of the shape of `backbones.text.TextTower` that needs no file: the mean of its words' vectors."""

    dim = 10
    sha256 = "0" * 64

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        fixed = torch.Generator().manual_seed(0)
        self.words = torch.randn(64, self.dim, generator=fixed)
        self.mix = torch.randn(self.dim, self.dim, generator=fixed) / 3
        if config.trains == "lowrank":
            self.down = nn.Parameter(torch.randn(config.rank, self.dim) / 3)
            self.up = nn.Parameter(torch.randn(self.dim, config.rank) / 3)

    def forward(self, texts: Sequence[str], *, chance: Chance | None = None) -> Tensor:
        rows = torch.stack(
            [self.words[[zlib.crc32(word.encode()) % 64 for word in text.split()]].mean(0) for text in texts]
        )
        if self.config.trains == "nothing":
            return rows @ self.mix.T
        if chance is not None:
            rows = rows * (chance.purpose("dropout").uniform(self.dim) >= self.config.dropout)
        return rows @ (self.mix + self.up @ self.down).T


def make_objective(
    text: TowerConfig = FROZEN, *, drop_path: float = 0.2, factor: float = 4.0, **changes: Any
) -> Siglip:
    """Small, and drawn large enough that samples differ."""
    size = EncoderConfig(dim=12, depth=2, heads=2, drop_path=drop_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = ScanVit(ScanVitConfig(patch_ijk=(4, 4, 4), block_ijk=(8, 8, 8), block=size, scan=size))
        settings = SIZES | {"temperature_start": 1.0, "bias_start": -1.0} | changes
        objective = Siglip(SiglipConfig(text=text, **settings), backbone, make_tower=Bag)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            parameter.mul_(factor if name.endswith("weight") and parameter.ndim > 1 else 1)
    return objective


def make_batch(samples: int = SAMPLES, seed: int = 0) -> Batch:
    noise = torch.Generator().manual_seed(seed)
    cells = torch.rand(samples, 1, 1, 4, 2, 4, generator=noise)
    views = {"global": cells.repeat_interleave(4, 3).repeat_interleave(4, 4).repeat_interleave(4, 5)}
    places = {"global": torch.rand(samples, 1, 2, 3, generator=noise) * 100}
    texts = tuple(f"{WORDS[n % 8]}. {WORDS[(n // 2 + 3) % 8]} {n} mm. {WORDS[(n + 5) % 8]}." for n in range(samples))
    return Batch(views=views, places_mm=places, seed=seed + 1, texts=texts)


def gradients(objective: Siglip, batch: Batch, *, progress: float = 1.0, low: bool = False) -> dict[str, Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        loss = objective.step(batch, progress=progress).loss
    loss.backward()
    return grads_of(objective)


def grads_of(objective: nn.Module) -> dict[str, Tensor]:
    return {name: whole(own.grad) for name, own in objective.named_parameters() if own.grad is not None}


def whole(value: Any) -> Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference between two tensors of one name as a share of their length, and where."""
    assert one.keys() == other.keys()
    return max((float((one[name] - other[name]).norm() / other[name].norm()), name) for name in one)


def joined(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


class Counter:
    """How many scans' blocks went through the block level."""

    def __init__(self, objective: Siglip) -> None:
        self.rows, encode_blocks = 0, objective.backbone.encode_blocks

        def count(blocks: Tensor, **settings: Any) -> Any:
            self.rows += len(blocks)
            return encode_blocks(blocks, **settings)

        objective.backbone.encode_blocks = count

    @property
    def scans(self) -> float:
        return self.rows / 4


# ------------------------------------------------------------------------------------------- what a step says


def test_it_keeps_the_public_contract() -> None:
    check_objective(lambda: redrawn(Siglip), size_ijk=(16, 16, 16))


def redrawn(kind: type[Siglip]) -> Siglip:
    size = EncoderConfig(dim=12, depth=1, heads=2)
    backbone = ScanVit(ScanVitConfig(patch_ijk=(4, 4, 4), block_ijk=(8, 8, 8), block=size, scan=size))
    return kind(SiglipConfig(text=LOW_RANK, chunk=3, text_chunk=3, **SIZES), backbone, make_tower=Bag)


def test_a_step_compares_every_scan_with_every_report() -> None:
    objective, batch = make_objective(drop_path=0.0), make_batch(4)
    found = objective.step(batch, progress=1.0)
    image, text = [], []
    for scan, words in zip(batch.views["global"][:, 0], batch.texts, strict=True):
        blocks = [scan[:, i : i + 8, :, k : k + 8] for i in (0, 8) for k in (0, 8)]  # k fastest
        tokens = objective.backbone.encode(torch.stack(blocks)[None], GRID)
        image.append(objective.image_head(torch.cat([tokens.scan[0], tokens.blocks[0].mean(0)])))
        text.append(objective.text_head(objective.tower([words])[0]))
    loss = torch.zeros(())
    for i, one in enumerate(image):
        for j, other in enumerate(text):
            logit = objective.temperature.exp() * torch.cosine_similarity(one, other, dim=0) + objective.bias
            loss = loss - torch.log(torch.sigmoid(logit if i == j else -logit)).sum() / 4
    torch.testing.assert_close(found.loss, loss)
    assert found.scalars["loss/siglip"] == float(found.loss.detach())


def test_beside_whole_texts_one_or_two_of_their_sentences_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, both = (make_objective(drop_path=0.0, brief_weight=weight) for weight in (0.0, 0.5))
    asked: list[str] = []
    look = Bag.forward

    def forward(self: Bag, texts: Sequence[str], *, chance: Chance | None = None) -> Tensor:
        asked.extend(texts)
        return look(self, texts, chance=chance)

    monkeypatch.setattr(Bag, "forward", forward)
    numbers: set[int] = set()
    for seed in range(4):
        batch = make_batch(seed=seed)
        asked.clear()
        found = both.step(batch, progress=1.0)
        whole, brief = tuple(asked[:SAMPLES]), tuple(asked[SAMPLES:])
        assert whole == batch.texts
        for text, few in zip(whole, brief, strict=True):
            said = sentences(text)
            kept = [sentence.strip() for sentence in said if sentence.strip() in few]
            assert " ".join(kept) == few
            numbers.add(len(kept))
        one, other = (plain.step(replace(batch, texts=texts), progress=1.0).loss for texts in (whole, brief))
        torch.testing.assert_close(found.loss, (one + 0.5 * other) / 1.5)
        assert found.scalars["loss/brief"] == pytest.approx(float(other.detach()), rel=1e-5)
    assert numbers == {1, 2}


def test_of_brief_texts_every_sentence_and_every_pair_is_drawn_alike() -> None:
    text = "One. Two. Three. Four."
    count = Counts(siglip_module._brief(text, drawn) for drawn in Chance.of(0, count=12_000).uniform(3).tolist())
    assert len(count) == 4 + 6
    for few, times in count.items():
        assert times / 12_000 == pytest.approx(0.5 / (4 if few.count(".") == 1 else 6), rel=0.1)
    assert siglip_module._brief("All of it", (0.9, 0.9, 0.9)) == "All of it"


def test_the_journal_hears_how_alike_pairs_are_and_what_is_learned_about_the_scale() -> None:
    scalars = make_objective().step(make_batch(), progress=1.0).scalars
    assert scalars.keys() == {"loss/siglip", "temperature", "bias", "cosine/pairs", "cosine/others", "top1"}
    assert scalars["temperature"] == pytest.approx(2.71828, rel=1e-4)
    assert scalars["bias"] == -1.0
    assert 0 <= scalars["top1"] <= 1


def test_scans_learn_to_find_their_reports() -> None:
    objective, few = make_objective(LOW_RANK, drop_path=0.0, factor=6.0, chunk=4, bias_start=-2.0), make_batch(4)
    few.views["global"].mul_(0.3)
    few.views["global"][:2, ..., 8:] += 0.7
    few.views["global"][::2, ..., 8:, :, :] += 0.7
    optimizer = make_optimizer(objective, objective.learner.param_groups(), OptimConfig(lr=2e-3, weight_decay=0.0))
    said: list[dict[str, float]] = []
    for _ in range(80):
        output = objective.step(few, progress=1.0)
        output.loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        said.append(output.scalars)
    first, last = said[0], said[-1]
    assert last["loss/siglip"] < 0.3 * first["loss/siglip"]
    assert last["top1"] == 1.0
    assert last["cosine/pairs"] > last["cosine/others"] + 0.5
    assert (last["temperature"], last["bias"]) != (first["temperature"], first["bias"])


def test_the_paper_s_form_has_no_bias() -> None:
    objective = make_objective(form="paper")
    assert "bias" not in gradients(objective, make_batch())
    assert float(objective.bias) == 0.0


# ------------------------------------------------------------------------------------------- gradient caching


@pytest.mark.parametrize("text", [FROZEN, LOW_RANK], ids=["frozen", "lowrank"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_gradients_are_those_without_caching(text: TowerConfig, recompute: bool, chunk: int) -> None:
    plain, cached = make_objective(text, chunk=SAMPLES), make_objective(text, chunk=chunk, text_chunk=3)
    for encoder in cached.modules():
        if isinstance(encoder, Encoder):
            encoder.recompute = recompute
    found, wanted = gradients(cached, make_batch()), gradients(plain, make_batch())
    assert furthest({"all": joined(found)}, {"all": joined(wanted)})[0] <= EXACT
    far, name = furthest(found, wanted)
    assert far <= EQUAL, name


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_what_is_computed_again_is_what_was_computed_before(
    recompute: bool, low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, plain, batch = make_objective(LOW_RANK, chunk=2), make_objective(LOW_RANK, chunk=2), make_batch()
    for encoder in cached.modules():
        if isinstance(encoder, Encoder):
            encoder.recompute = recompute
    found = gradients(cached, batch, low=low)
    # The same chunks, and everything is kept.
    monkeypatch.setattr(siglip_module, "checkpoint", lambda work, *part, **_: work(*part))
    wanted = gradients(plain, batch, low=low)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_in_bf16_many_chunks_are_as_near_to_the_truth_as_one() -> None:
    batch, changes = make_batch(48), {"drop_path": 0.0, "factor": 2.0}
    truth = gradients(make_objective(chunk=48, **changes), batch)
    far = {}
    for chunk in (1, 48):
        found = gradients(make_objective(chunk=chunk, **changes), batch, low=True)
        far[chunk] = sum(float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth)
    assert far[1] < 1.3 * far[48]


def kept_by_a_step(chunk: int, samples: int) -> int:
    """Numbers that wait for the way back, those of the batch itself not counted."""
    batch, kept = make_batch(samples), 0
    own = batch.views["global"].untyped_storage().data_ptr()

    def note(value: Tensor) -> Tensor:
        nonlocal kept
        kept += value.numel() * (value.untyped_storage().data_ptr() != own)
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        make_objective(chunk=chunk).step(batch, progress=1.0)
    return kept


def test_nothing_but_embeddings_and_one_chunk_waits_for_the_way_back() -> None:
    few, many, plain = kept_by_a_step(1, 4), kept_by_a_step(1, 32), kept_by_a_step(32, 32)
    # Each further scan leaves its embedding, its report's and its row of the table of pairs.
    assert (many - few) / 28 < 0.03 * plain / 32


def test_every_chunk_but_the_last_is_computed_twice_and_none_without_gradients() -> None:
    objective = make_objective(chunk=2)
    counter = Counter(objective)
    gradients(objective, make_batch())
    assert counter.scans == 2 * SAMPLES - 2
    counter.rows = 0
    with torch.no_grad():
        objective.step(make_batch(), progress=1.0)
    assert counter.scans == SAMPLES


def test_the_packaged_tower_learns_the_same_in_chunks_of_reports_though_it_drops_by_chance() -> None:
    text = TowerConfig(trains="lowrank", rank=2, dropout=0.3, targets=("query",))
    found: list[dict[str, Tensor]] = []
    for chunk in (4, 1):
        torch.manual_seed(0)
        objective = Siglip(SiglipConfig(text=text, text_chunk=chunk, **SIZES), make_objective().backbone)
        with torch.no_grad():
            for name, own in objective.tower.named_parameters():
                own.add_(0.05 * torch.randn(own.shape, generator=torch.Generator().manual_seed(len(name))))
        found.append(gradients(objective, make_batch(4)))
    assert any(name.startswith("tower.") and own.abs().sum() > 0 for name, own in found[0].items())
    far, name = furthest(found[1], found[0])
    assert far <= EQUAL, name


def test_rows_come_in_the_order_of_the_parts() -> None:
    parts = [(torch.tensor([[1.0], [2.0]]),), (torch.tensor([[3.0]]),)]
    assert in_chunks(lambda rows: 2 * rows, parts).flatten().tolist() == [2.0, 4.0, 6.0]


# ------------------------------------------------------------------------------------------- what learns when


def test_at_first_the_block_level_is_neither_recorded_nor_trained() -> None:
    objective = make_objective(chunk=2, frozen_image=0.5)
    counter = Counter(objective)
    early = objective.step(make_batch(), progress=0.4)
    early.loss.backward()
    assert counter.scans == SAMPLES
    learned = {name.split(".")[1] for name in grads_of(objective) if name.startswith("backbone.")}
    assert learned == {"scan_project", "scan_encoder"}
    assert {"image_head.direction", "text_head.direction", "temperature", "bias"} <= grads_of(objective).keys()
    late = objective.step(make_batch(), progress=0.5)
    assert torch.equal(late.loss, early.loss)
    late.loss.backward()
    assert {"backbone.embed.weight", "backbone.block_encoder.prefix"} <= grads_of(objective).keys()


def test_a_block_level_that_does_not_learn_gives_the_others_the_gradients_they_would_have() -> None:
    frozen, free = (make_objective(chunk=2, frozen_image=share) for share in (1.0, 0.0))
    found, wanted = (gradients(objective, make_batch(), progress=0.9) for objective in (frozen, free))
    far, name = furthest(found, {name: wanted[name] for name in found})
    assert far <= EXACT, name


def test_the_optimiser_leaves_a_block_level_that_does_not_learn_as_it_is() -> None:
    objective = make_objective(frozen_image=0.5)
    before = {name: value.detach().clone() for name, value in objective.named_parameters()}
    optimizer = make_optimizer(objective, objective.learner.param_groups(), OptimConfig(lr=1e-2, weight_decay=0.5))
    gradients(objective, make_batch(), progress=0.0)
    optimizer.step()
    moved = {name for name, value in objective.named_parameters() if not torch.equal(value, before[name])}
    assert not {name for name in moved if name.startswith(("backbone.embed", "backbone.block_"))}
    assert "backbone.scan_project.weight" in moved


def rates(objective: Siglip, config: OptimConfig, progress: float) -> dict[str, float]:
    optimizer = make_optimizer(objective, objective.learner.param_groups(), config)
    set_rate(optimizer, config, progress=progress)
    of = {id(own): group["lr"] for group in optimizer.param_groups for own in group["params"]}
    return {name: of[id(own)] for name, own in objective.named_parameters() if id(own) in of}


def test_with_decay_by_layer_the_scan_level_heads_and_tower_learn_at_the_full_rate() -> None:
    config = OptimConfig(lr=1e-3, warm_up=0.0, layer_decay=0.5, patch_embed_scale=0.2)
    found = rates(make_objective(LOW_RANK), config, 0.0)
    fresh = ("backbone.scan_", "image_head.", "text_head.", "tower.", "temperature", "bias")
    assert {rate for name, rate in found.items() if name.startswith(fresh)} == {1e-3}
    assert found["backbone.scan_project.weight"] == found["backbone.scan_encoder.prefix"] == 1e-3
    assert found["backbone.block_encoder.blocks.1.fc1.weight"] == 0.5e-3
    assert found["backbone.embed.weight"] == pytest.approx(0.2 * 0.125e-3)


def test_last_layers_of_both_heads_may_stay_as_drawn_at_first_and_gains_always_do() -> None:
    config = OptimConfig(lr=1e-3, warm_up=0.0, frozen_prototypes=0.1)
    objective = make_objective()
    early, late = (rates(objective, config, progress) for progress in (0.05, 0.2))
    last = {"image_head.direction", "text_head.direction"}
    assert {name for name, rate in early.items() if not rate} == last
    assert min(late.values()) > 0
    assert not {name for name in early if name.endswith("gain")}


# ------------------------------------------------------------------------------------------- processes


CASES: dict[str, tuple[dict[str, Any], ParallelConfig, float]] = {
    "frozen": ({"text": FROZEN}, ParallelConfig(), 1.0),
    "lowrank": ({"text": LOW_RANK, "text_chunk": 1}, ParallelConfig(recompute=True), 1.0),
    "frozen image": ({"text": LOW_RANK, "frozen_image": 0.5}, ParallelConfig(), 0.0),
    "standardised": ({"text": FROZEN, "standardise": True}, ParallelConfig(), 1.0),
    "brief": ({"text": LOW_RANK, "brief_weight": 0.5}, ParallelConfig(), 1.0),
    "paper": ({"text": LOW_RANK, "form": "paper"}, ParallelConfig(), 1.0),
    "sharded": ({"text": LOW_RANK}, ParallelConfig(kind="fsdp"), 1.0),
}


def train_together(names: Sequence[str]) -> dict[str, Any]:
    """Two steps of each case on this process's share: what was said, gradients of both, and the weights after."""
    here, results = distributed.here(), {}
    for name in names:
        settings, parallel, progress = CASES[name]
        trainee = Trainee(
            make_objective(**settings, chunk=1), OptimConfig(lr=1e-3), parallel, device=CPU, precision="fp32"
        )
        said, found = [], {}
        for step in range(2):
            size = SAMPLES // here.count
            share = make_batch(seed=step).part(here.rank * size, (here.rank + 1) * size)
            output = trainee.backward(share, progress=progress)
            said.append({"loss": float(output.loss)} | output.scalars)
            found |= {f"{own} of step {step}": value for own, value in grads_of(trainee.objective).items()}
            trainee.update()
            trainee.objective.after_step(progress=progress)
            found |= {f"{own} after step {step}": value.clone() for own, value in trainee.objective.named_buffers()}
        results[name] = {"said": said, "gradients": found}
    return results


def hold_against_one_process(together: list[dict[str, Any]], names: Sequence[str]) -> None:
    alone = train_together(names)
    for name in names:
        for rank in together:
            for found, wanted in zip(rank[name]["said"], alone[name]["said"], strict=True):
                assert found == pytest.approx(wanted, rel=EQUAL, abs=EQUAL)
            far, where = furthest(rank[name]["gradients"], alone[name]["gradients"])
            assert far <= EQUAL, f"{name}: {where}"


FAST = ("frozen", "lowrank", "frozen image", "standardised", "brief")


def test_two_processes_give_the_image_and_text_gradients_of_one(tmp_path: Path) -> None:
    hold_against_one_process(run_together(train_together, 2, tmp_path, (FAST,)), FAST)


def test_four_processes_give_the_image_and_text_gradients_of_one(tmp_path: Path) -> None:
    hold_against_one_process(run_together(train_together, 4, tmp_path, (FAST[:2],)), FAST[:2])


@pytest.mark.slow
def test_so_do_two_that_share_out_the_weights_and_two_with_the_paper_s_form(tmp_path: Path) -> None:
    rest = tuple(name for name in CASES if name not in FAST)
    hold_against_one_process(run_together(train_together, 2, tmp_path, (rest,)), rest)


# ------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("text", [FROZEN, LOW_RANK], ids=["frozen", "lowrank"])
def test_beside_the_weights_lie_heads_scale_and_what_became_of_the_tower(text: TowerConfig) -> None:
    from voxelstem.aligned import CHANGES, HEADS, TOWER

    objective = make_objective(text)
    files, texts = objective.beside()
    heads = files[HEADS]
    for side, dim in (("image", 24), ("text", 10)):
        head = AlignHead(dim, **SIZES)
        head.load_state_dict({n.partition(".")[2]: own for n, own in heads.items() if n.startswith(f"{side}.")})
        rows = torch.randn(3, dim)
        assert torch.equal(head(rows), getattr(objective, f"{side}_head")(rows))
    assert torch.equal(heads["logit.temperature"], torch.tensor([1.0]))
    assert torch.equal(heads["logit.bias"], torch.tensor([-1.0]))
    facts = json.loads(texts[TOWER])
    assert facts.pop("sha256") == "0" * 64
    assert overlay(TowerConfig(), facts) == text
    assert (files.keys() == {HEADS}) == (text is FROZEN)
    assert set(files.get(CHANGES, {})) == (set() if text is FROZEN else {"down", "up"})


# ------------------------------------------------------------------------------------------- bad input


def test_scans_without_reports_say_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"a text for each scan, and got 0 for 8"):
        make_objective().step(replace(make_batch(), texts=()), progress=0.0)


def test_a_backbone_without_a_scan_level_is_refused() -> None:
    none = ScanVitConfig(block_ijk=(8, 8, 8), scan=EncoderConfig(depth=0))
    with pytest.raises(ConfigError, match="no scan level"):
        Siglip(SiglipConfig(), ScanVit(none), make_tower=Bag)


@pytest.mark.parametrize(
    "wrong",
    [
        {"brief_weight": -0.1},
        {"chunk": 0},
        {"text_chunk": 0},
        {"out": 0},
        {"frozen_image": 1.1},
        {"bias_start": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        SiglipConfig(**wrong)


BACKBONE = ScanVitConfig(block_ijk=(8, 8, 8))
ONE = {"global_": ViewKind(count=1, size_ijk=SIZE), "local": ViewKind(count=0, size_ijk=(8, 8, 8)), "batch": 2}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"global_": ViewKind(count=2, size_ijk=SIZE)}, "once and whole"),
        ({"local": ViewKind(count=1, size_ijk=(8, 8, 8))}, "once and whole"),
        ({"global_": ViewKind(count=1, size_ijk=(16, 8, 12))}, "multiple of block_ijk"),
        ({"batch": 1}, "batch >= 2"),
        ({"backbone": replace(BACKBONE, scan=EncoderConfig(depth=0))}, "scan level"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(change: dict[str, Any], match: str) -> None:
    check: Callable[..., None] = SiglipConfig().check
    check(**ONE, backbone=BACKBONE)
    with pytest.raises(ValueError, match=match):
        check(**{**ONE, "backbone": BACKBONE, **change})
