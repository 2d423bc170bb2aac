from __future__ import annotations

import copy
import gc
import logging
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.backbones import text
from voxelstem.backbones.pretrained import Pretrained, read_pretrained, read_tokenizer
from voxelstem.backbones.text import TextTower, TowerConfig, pool_states, project, tower_of
from voxelstem.chance import Chance
from voxelstem.config import flatten, overlay
from voxelstem.errors import ConfigError

TEXTS = [
    "No pleural effusion.",
    "A nodule of 12 mm in the left lower lobe of the lung, and the liver is normal.",
    "The liver is normal.",
    "No nodule.",
]


@pytest.fixture(autouse=True)
def nothing_remembered():
    text._memories.clear()


@pytest.fixture(scope="module")
def minilm() -> TextTower:
    return tower_of(TowerConfig())


@pytest.fixture
def settings(qwen: Path) -> TowerConfig:
    """Of the tiny Qwen3, with changes at the four projections."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    return TowerConfig(
        source=str(qwen), pooling="last", trains="lowrank", rank=2, alpha=8.0, dropout=0.5, targets=targets
    )


def learnt(config: TowerConfig) -> TextTower:
    """A tower whose changes are no longer zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tower = tower_of(config)
        if config.trains == "lowrank":
            for parameter in tower.parameters():
                nn.init.normal_(parameter, std=0.2)
    return tower


def weighed(vectors: Tensor) -> Tensor:
    """A loss of them. Not the sum of squares: the last normalisation of a Qwen3 holds that still."""
    return (vectors * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(3))).sum()


def gradients(tower: TextTower, loss: Tensor) -> dict[str, Tensor]:
    tower.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in tower.named_parameters() if x.grad is not None}


def passes(tower: TextTower) -> list[int]:
    """Texts in each pass through the network from now on."""
    seen: list[int] = []
    network: Any = tower._held[0]
    network.register_forward_pre_hook(
        lambda _module, _args, words: seen.append(len(words["input_ids"])), with_kwargs=True
    )
    return seen


# ------------------------------------------------------------------------------------------------ what a vector is


def test_minilm_s_vector_is_the_mean_over_the_states_of_a_text_s_tokens(minilm: TextTower):
    base = read_pretrained("minilm")
    found = minilm(TEXTS)
    assert found.shape == (4, 384) == (4, minilm.dim)
    for sentence, vector in zip(TEXTS, found, strict=True):
        ids = base.tokenizer(sentence)["input_ids"]
        with torch.no_grad():
            states = base.network(input_ids=torch.tensor([ids])).last_hidden_state[0].tolist()
        naive = [sum(state[at] for state in states) / len(states) for at in range(384)]
        torch.testing.assert_close(vector, torch.tensor(naive), rtol=1e-5, atol=1e-5)


def test_minilm_finds_other_words_for_the_same_nearer(minilm: TextTower):
    asked, same, other = F.normalize(
        minilm(["Pleural effusion.", "There is fluid around the lung.", "The femur is fractured."]), dim=1
    )
    assert float(asked @ same) > float(asked @ other) + 0.1


def test_a_qwen3_s_vector_is_the_state_of_the_token_that_ends_the_text(qwen: Path, settings: TowerConfig):
    import transformers

    network, words = transformers.Qwen3Model.from_pretrained(qwen).eval(), read_tokenizer(qwen)
    found = tower_of(replace(settings, trains="nothing"))(TEXTS)
    for sentence, vector in zip(TEXTS, found, strict=True):
        ids = torch.tensor([words(sentence)["input_ids"]])
        assert int(ids[0, -1]) == words.pad_token_id
        with torch.no_grad():
            wanted = network(input_ids=ids).last_hidden_state[0, -1]
        torch.testing.assert_close(vector, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_filled_up_at_either_end_give_the_same_vectors(qwen: Path, settings: TowerConfig, side: str):
    import transformers

    network, words = transformers.Qwen3Model.from_pretrained(qwen).eval(), read_tokenizer(qwen)
    given = words(TEXTS, padding=True, padding_side=side, return_tensors="pt")
    with torch.no_grad():
        states = network(**given).last_hidden_state
    wanted = pool_states(states, given["attention_mask"].bool(), "last")
    tower = learnt(replace(settings, trains="all")).eval()
    with torch.no_grad():
        torch.testing.assert_close(tower(TEXTS), wanted, rtol=1e-4, atol=1e-5)


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), left=st.booleans())
def test_pooling_sees_the_tokens_that_are_present_and_no_others(sizes: list[int], left: bool):
    states = torch.randn(len(sizes), 6, 3)
    rows = [list(range(6 - size, 6)) if left else list(range(size)) for size in sizes]
    present = torch.tensor([[at in row for at in range(6)] for row in rows])
    spoilt = torch.where(present[..., None], states, torch.tensor(1e6))
    for row, own in enumerate(rows):
        wanted = {"mean": states[row, own].mean(dim=0), "last": states[row, own[-1]], "cls": states[row, own[0]]}
        torch.testing.assert_close(pool_states(spoilt, present, "last")[row], wanted["last"])
        torch.testing.assert_close(pool_states(spoilt, present, "cls")[row], wanted["cls"])
        torch.testing.assert_close(pool_states(states, present, "mean")[row], wanted["mean"])


def test_a_prefix_stands_before_every_text(settings: TowerConfig):
    plain = tower_of(replace(settings, trains="nothing"))
    asked = tower_of(replace(settings, trains="nothing", prefix="the lung "))
    assert torch.equal(asked(TEXTS), plain([f"the lung {sentence}" for sentence in TEXTS]))


# ------------------------------------------------------------------------------------------------ frozen


def test_a_frozen_tower_has_nothing_to_learn_and_nothing_to_save(minilm: TextTower):
    assert not list(minilm.parameters())
    assert not minilm.state_dict()
    assert not minilm(TEXTS).requires_grad


def test_a_frozen_tower_computes_each_text_once(settings: TowerConfig):
    tower = tower_of(replace(settings, trains="nothing"))
    seen = passes(tower)
    first = tower([TEXTS[0], TEXTS[1], TEXTS[0]])
    again = tower([TEXTS[1], TEXTS[2], TEXTS[0]])
    assert sum(seen) == 3
    assert torch.equal(first[[1, 0]], again[[0, 2]])
    assert torch.equal(first[0], first[2])


def test_a_text_s_vector_has_the_same_bits_whatever_stands_beside_it(settings: TowerConfig):
    # Given their base, towers do not remember together.
    config = replace(settings, trains="nothing")
    one, other = (TextTower(config, read_pretrained(config.source)) for _ in range(2))
    assert torch.equal(one(TEXTS), torch.stack([other([sentence])[0] for sentence in reversed(TEXTS)]).flip(0))


def test_towers_of_the_same_files_compute_each_text_once_for_as_long_as_one_of_them_lives(settings: TowerConfig):
    config = replace(settings, trains="nothing")
    first, second, cut = (
        tower_of(config),
        tower_of(config).to(torch.device("cpu")),
        tower_of(replace(config, max_tokens=4)),
    )
    said, seen, seen_cut = first(TEXTS), passes(second), passes(cut)
    assert torch.equal(second(TEXTS), said)
    assert not seen
    assert not torch.equal(cut(TEXTS), said)
    assert seen_cut
    del first, second
    gc.collect()
    third = tower_of(config)
    again = passes(third)
    assert torch.equal(third(TEXTS), said)
    assert sum(again) == len(TEXTS)


def test_of_a_text_only_its_hash_is_kept(settings: TowerConfig):
    tower = tower_of(replace(settings, trains="nothing"))
    tower(["Mrs Kowalczyk has no effusion."])
    assert [len(key) for key in tower._vectors] == [32]
    held = pickle.dumps({name: value for name, value in vars(tower).items() if name not in ("_held", "_tokenizer")})
    assert b"Kowalczyk" not in held


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(settings: TowerConfig, monkeypatch: pytest.MonkeyPatch):
    tower = tower_of(replace(settings, trains="nothing"))
    monkeypatch.setattr(text, "KEPT_BYTES", 2 * 4 * tower.dim)
    seen = passes(tower)
    assert len(tower(TEXTS)) == 4
    assert len(tower._vectors) == 2
    tower(TEXTS[2:])
    assert sum(seen) == 4
    tower(TEXTS[:1])
    assert sum(seen) == 5


def test_vectors_kept_in_inference_take_part_in_a_later_gradient(settings: TowerConfig):
    tower = tower_of(replace(settings, trains="nothing"))
    with torch.inference_mode():
        tower(TEXTS)
    weight = torch.ones(tower.dim, requires_grad=True)
    (tower(TEXTS) * weight).sum().backward()
    assert weight.grad is not None


def test_no_texts_give_no_vectors(minilm: TextTower):
    assert minilm([]).shape == (0, 384)


# ------------------------------------------------------------------------------------------------ what trains


def test_only_the_changes_are_saved_and_they_bring_everything_back(settings: TowerConfig):
    tower = learnt(settings).eval()
    state = tower.state_dict()
    assert len(state) == 2 * 4 * 2
    assert {name.rpartition(".")[2] for name in state} == {"lora_A", "lora_B"}
    assert "changes.layers.1.self_attn.o_proj.lora_B" in state
    back = tower_of(settings).eval()
    assert not torch.allclose(back(TEXTS), tower(TEXTS))
    back.load_state_dict(state)
    assert torch.equal(back(TEXTS), tower(TEXTS))


def test_the_base_stays_and_the_changes_learn(settings: TowerConfig):
    tower = learnt(settings)
    network: Any = tower._held[0]
    before = {name: x.detach().clone() for name, x in network.named_parameters() if not name.endswith(("_A", "_B"))}
    optimizer = torch.optim.AdamW(tower.parameters(), lr=0.05, weight_decay=0.1)
    wanted = torch.randn(4, tower.dim, generator=torch.Generator().manual_seed(2))
    losses: list[float] = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (tower(TEXTS) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(x, before[name]) for name, x in network.named_parameters() if name in before)


def test_where_all_trains_all_is_saved(settings: TowerConfig):
    tower = learnt(replace(settings, trains="all"))
    found = gradients(tower, weighed(tower(TEXTS)))
    assert set(found) == set(tower.state_dict())
    assert "base.layers.0.self_attn.q_proj.weight" in found


@pytest.mark.parametrize("source", ["minilm", "qwen"])
def test_every_change_gets_a_gradient(settings: TowerConfig, source: str):
    config = settings if source == "qwen" else TowerConfig(trains="lowrank", rank=2)
    tower = learnt(config)
    found = gradients(tower, weighed(tower(TEXTS[:2])))
    assert set(found) == set(dict(tower.named_parameters()))
    assert all(float(gradient.abs().max()) > 1e-3 for gradient in found.values())


def test_dropout_is_drawn_by_key_so_that_it_is_replayed_and_shared_out_alike(settings: TowerConfig):
    tower, chance = learnt(settings), Chance.of(5, count=4)
    weight = torch.randn(4, tower.dim, generator=torch.Generator().manual_seed(3))
    whole = gradients(tower, (tower(TEXTS, chance=chance) * weight).sum())
    assert all(
        torch.equal(one, whole[name])
        for name, one in gradients(tower, (tower(TEXTS, chance=chance) * weight).sum()).items()
    )
    parts = [
        gradients(tower, (tower(TEXTS[at], chance=chance.part(at.start, at.stop)) * weight[at]).sum())
        for at in (slice(0, 1), slice(1, 4))
    ]
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], gradient, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tower(TEXTS, chance=Chance.of(6, count=4)), tower(TEXTS, chance=chance))


def test_a_pass_without_gradient_sees_what_the_one_with_it_sees(settings: TowerConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text, "_ROWS", 3)
    tower, chance = learnt(settings), Chance.of(5, count=4)
    with torch.no_grad():
        first = tower(TEXTS, chance=chance)
    torch.testing.assert_close(first, tower(TEXTS, chance=chance), rtol=1e-5, atol=1e-5)


def test_recomputing_changes_no_gradient(settings: TowerConfig):
    chance, found = Chance.of(5, count=4), []
    for recompute in (False, True):
        tower = learnt(replace(settings, recompute=recompute))
        network: Any = tower._held[0]
        assert network.layers[0].gradient_checkpointing is recompute
        # Two passes before the first gradient: what is recomputed must not take the later one's keys.
        one, other = tower(TEXTS, chance=chance), tower(TEXTS[:1], chance=Chance.of(9))
        found.append(gradients(tower, weighed(one) + weighed(other)))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_in_evaluation_and_without_keys_nothing_is_dropped(settings: TowerConfig):
    tower = learnt(settings)
    plain = tower(TEXTS)
    torch.testing.assert_close(tower.eval()(TEXTS, chance=Chance.of(5, count=4)), plain, rtol=1e-5, atol=1e-5)


def test_the_base_moves_along(settings: TowerConfig):
    tower = learnt(settings).double()
    assert {x.dtype for x in tower._held[0].parameters()} == {torch.float64}
    assert tower(TEXTS).dtype == torch.float32


def test_a_copy_learns_apart(settings: TowerConfig):
    tower = learnt(settings)
    twin = copy.deepcopy(tower)
    assert torch.equal(twin(TEXTS), tower(TEXTS))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.allclose(twin(TEXTS), tower(TEXTS))
    assert torch.allclose(twin(TEXTS), tower_of(replace(settings, trains="nothing"))(TEXTS), atol=1e-5)


# ------------------------------------------------------------------------------------------------ odd input


def test_a_report_of_10_000_words_is_cut_counted_and_never_quoted(
    settings: TowerConfig, caplog: pytest.LogCaptureFixture
):
    tower = tower_of(replace(settings, trains="nothing", max_tokens=16))
    long = "Kowalczyk has a nodule. " * 2500
    (count,) = tower.tokens([long])
    assert count > 10_000
    with caplog.at_level(logging.INFO):
        vector = tower([long, TEXTS[0]])[0]
    assert tower.truncated == 1
    assert torch.equal(vector, tower(["Kowalczyk has a nodule. " * 100])[0])
    assert f"a text has {count} tokens, of which 16 are read" in caplog.text
    assert "Kowalczyk" not in caplog.text


def test_a_cut_text_still_ends_in_the_token_that_ends_texts(settings: TowerConfig):
    tower = tower_of(replace(settings, trains="nothing", max_tokens=5))
    assert [ids[-1] for ids in tower._cut(TEXTS)] == [0] * 4
    assert [len(ids) for ids in tower._cut(TEXTS)] == [5] * 4


@pytest.mark.parametrize("empty", ["", " \n\t"])
def test_an_empty_text_is_refused_by_its_number(minilm: TextTower, empty: str):
    with pytest.raises(ConfigError) as error:
        minilm(["Kowalczyk", empty, "more"])
    assert error.value.problem == "text 2 of 3 is empty"


def test_halves_of_characters_are_refused_by_their_text_s_number(minilm: TextTower):
    with pytest.raises(ConfigError, match="text 1 of 1 holds halves of characters"):
        minilm(["Kowalczyk \udcff"])


def test_one_text_is_not_taken_for_its_letters(minilm: TextTower):
    with pytest.raises(ValueError, match="give a list"):
        minilm("effusion")


def test_keys_that_are_not_as_many_as_the_texts_are_refused(settings: TowerConfig):
    with pytest.raises(ValueError, match="4 texts need as many keys, got 3"):
        learnt(settings)(TEXTS, chance=Chance.of(0, count=3))


def test_more_tokens_than_the_network_reads_are_refused():
    with pytest.raises(ConfigError, match="max_tokens is 513, and this text tower reads at most 512"):
        tower_of(TowerConfig(max_tokens=513))


def test_a_tokenizer_of_another_network_is_refused(settings: TowerConfig):
    mixed = Pretrained(
        network=read_pretrained(settings.source).network, tokenizer=read_pretrained("minilm").tokenizer, sha256=""
    )
    with pytest.raises(ConfigError, match="30522 tokens and the network 300"):
        TextTower(replace(settings, max_tokens=64), mixed)


def test_the_last_token_is_only_taken_where_it_ends_the_text(settings: TowerConfig, endless: Path):
    base = read_pretrained(settings.source)
    with pytest.raises(ConfigError, match="ends a text with no token of its own"):
        TextTower(settings, replace(base, tokenizer=read_tokenizer(endless)))


def test_a_target_that_matches_nothing_is_refused(settings: TowerConfig):
    with pytest.raises(ConfigError, match="no linear layer of this network is called 'query'"):
        tower_of(replace(settings, targets=("query",)))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"max_tokens": 1}, {"source": ""}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match="need"):
        TowerConfig(**wrong)


def test_the_settings_are_written_and_read_back(settings: TowerConfig):
    assert overlay(TowerConfig(), flatten(settings)) == settings


def test_transformers_is_imported_by_nobody_before_a_tower_is_read():
    rooms = Path(text.__file__).parent.glob("*.py")
    heads = [line for room in rooms for line in room.read_text().splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in heads if line.split()[1].split(".")[0] in {"transformers", "tokenizers", "peft"}]


def test_sentence_by_sentence_a_text_is_the_mean_of_what_the_head_makes_of_each():
    whole, each = tower_of(TowerConfig()), tower_of(TowerConfig(each="sentence"))
    head = torch.nn.Sequential(torch.nn.Linear(384, 6), torch.nn.GELU())
    parts = ["Effusion on the left.", "No nodule, e.g. in the lungs.", "2. Spleen absent."]
    with torch.no_grad():
        found = project(each, head, [" ".join(parts), parts[0]], device=torch.device("cpu"))
        alone = head(whole(parts))
        torch.testing.assert_close(found[0], alone.mean(dim=0))
        torch.testing.assert_close(found[1], alone[0])
        torch.testing.assert_close(
            project(whole, head, parts, device=torch.device("cpu")), alone, msg="as a whole each text is one"
        )
    assert project(each, head, [], device=torch.device("cpu")).shape == (0, 6)


def test_a_long_report_is_read_to_its_end_sentence_by_sentence():
    each, said = tower_of(TowerConfig(each="sentence", max_tokens=32)), "The liver is of normal size. " * 200
    with torch.no_grad():
        short = project(each, torch.nn.Identity(), ["The liver is of normal size."], device=torch.device("cpu"))
        long = project(each, torch.nn.Identity(), [said + "Spleen absent."], device=torch.device("cpu"))
    assert each.truncated == 0
    assert 1e-4 < float((long - short).norm() / short.norm()) < 0.1


def test_a_tower_that_learns_reads_whole_texts():
    with pytest.raises(ValueError, match="each=sentence"):
        TowerConfig(each="sentence", trains="lowrank")
