from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_together

from voxelstem import cli, pretrain
from voxelstem.card import Card, read_card
from voxelstem.config import flatten, overlay, read_toml
from voxelstem.engine.journal import facts_of, read_journal
from voxelstem.engine.loader import Loader
from voxelstem.engine.scans import choose, trainable
from voxelstem.engine.transfer import Crops
from voxelstem.errors import CheckpointError, ConfigError, StoreError
from voxelstem.model import load
from voxelstem.pretrain import PretrainConfig
from voxelstem.protocols import Batch
from voxelstem.recipes import named
from voxelstem.seen import seen_line
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Fractions, Store, write
from voxelstem.store.subjects import pseudonym
from voxelstem.terminal import DONE, WRONG

SMALL = {
    "steps": 6,
    "precision": "fp32",
    "spec.spacing_mm": (8.0, 8.0, 8.0),
    "spec.block_ijk": (8, 8, 8),
    "backbone.block_ijk": (8, 8, 8),
    "backbone.block.dim": 12,
    "backbone.block.depth": 1,
    "backbone.block.heads": 2,
    "backbone.scan.dim": 12,
    "backbone.scan.depth": 1,
    "backbone.scan.heads": 2,
    "checkpoint.every": 2,
    "health.every": 3,
    "health.blocks": 6,
    "loader.batch": 2,
}
MAE = SMALL | {
    "objective.grid": (2, 2, 2),
    "views.global_.size_ijk": (16, 16, 16),
    "objective.decoder.dim": 12,
    "objective.decoder.depth": 1,
    "objective.decoder.heads": 2,
}
DINO = SMALL | {
    "backbone.scan.depth": 0,
    "views.global_.size_ijk": (8, 8, 8),
    "views.local.size_ijk": (4, 4, 4),
    "objective.projector.prototypes": 16,
}


def small(name: str = "tiny.mae") -> PretrainConfig:
    config = named(name)
    changes = MAE if name == "tiny.mae" else DINO
    # Both at once: a spec and a backbone may not disagree, not even for a moment.
    spec = {key.removeprefix("spec."): value for key, value in changes.items() if key.startswith("spec.")}
    rest = {key: value for key, value in changes.items() if not key.startswith("spec.")}
    return overlay(config, {"spec": overlay(config.spec, spec), **rest})


def test_a_recipe_without_a_spacing_is_refused() -> None:
    with pytest.raises(ConfigError, match="views need a spacing"):
        overlay(small(), {"spec.resampling": "fit"})


def make_store(folder: Path, seeds: range, *, modality: str = "CT", fractions: Fractions | None = None) -> Path:
    Store.create(folder, fractions=fractions or Fractions(train=0.5, validation=0.0, test=0.5))
    return make_more(folder, seeds, modality=modality)


def make_more(folder: Path, seeds: range, *, modality: str = "CT") -> Path:
    store = Store.open(folder)
    for seed in seeds:
        study = phantom(PhantomConfig(seed=seed, spacing_mm=(6.0, 6.0, 8.0)))
        volumes = (replace(study.volumes[0], modality=modality),)
        write(store, replace(study, subject=pseudonym(study.subject, bytes(32)), volumes=volumes))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_store(tmp_path_factory.mktemp("pretrain") / "store", range(6))
    assert {record.split for record in Store.open(folder)} == {"train", "test"}
    return folder


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain.run(small(), store=store, out=out)
    return out


def facts(run: Path) -> list[dict[str, float]]:
    """What was trained, without what a clock said."""
    return facts_of(read_journal(run))


def card_of(run: Path) -> Card:
    return read_card(run / "weights")


def model_of(run: Path) -> dict[str, torch.Tensor]:
    return load(run / "weights").backbone.state_dict()


def weights(run: Path) -> bytes:
    return (run / "weights" / "model.safetensors").read_bytes()


def test_a_run_leaves_its_config_journal_checkpoints_and_weights(whole: Path):
    assert {"config.toml", "journal.jsonl", "checkpoints", "weights"} <= {path.name for path in whole.iterdir()}
    assert [line["step"] for line in facts(whole)] == [0, 1, 2, 3, 4, 5, 6]
    assert "probe/patch_balanced_accuracy" in facts(whole)[-1]


def test_the_config_of_a_run_replays(whole: Path):
    assert overlay(small(), read_toml(whole / "config.toml")) == small()
    assert read_toml(whole / "config.toml").keys() == flatten(small()).keys()


def test_the_weights_load_and_embed_and_say_what_they_saw(whole: Path, store: Path):
    model = load(whole / "weights")
    opened = Store.open(store)
    train = [record for record in opened if record.split == "train"]
    assert model.card.data == (
        f"{len(train)} CT scans from phantom sources",
        f"of {len(train)} acquisitions and {len(train)} subjects",
        seen_line(record.key for record in train),
    )
    assert model.card.trained == ("block", "scan")
    assert model.spec == small().spec
    embedding = model.embed(opened.volume(train[0].key))
    assert embedding.scan.shape == (24,)
    assert embedding.coverage == 1.0


class StoppedError(Exception):
    """What stops a run from outside."""


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    real = pretrain.dashboard

    @contextmanager
    def stopping(title: str, total: int, *, start: int = 0) -> Iterator[Any]:
        def show(step: int, told: Mapping[str, Any]) -> None:
            spoken(step, told)
            if step + 1 == steps:
                raise StoppedError

        with real(title, total, start=start) as spoken:
            yield show

    monkeypatch.setattr(pretrain, "dashboard", stopping)


@pytest.mark.parametrize("after", [1, 2, 5, 6])
def test_a_run_interrupted_and_started_again_equals_one_that_was_not(
    whole: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
):
    out = tmp_path / "run"
    stop_after(monkeypatch, after)
    with pytest.raises(StoppedError):
        pretrain.run(small(), store=store, out=out)
    monkeypatch.undo()
    assert not (out / "weights").exists()
    pretrain.run(small(), store=store, out=out)
    assert weights(out) == weights(whole)
    assert facts(out) == facts(whole)


@pytest.mark.slow
def test_dino_runs_and_resumes_too(store: Path, tmp_path: Path):
    config = small("tiny.dino")
    pretrain.run(config, store=store, out=tmp_path / "one")
    two = tmp_path / "two"
    pretrain.run(config, store=store, out=two)
    assert weights(tmp_path / "one") == weights(two)
    # Taken back to the first whole checkpoint, it arrives at the same weights.
    for path in [two / "weights", sorted((two / "checkpoints").iterdir())[-1]]:
        shutil.rmtree(path)
    pretrain.run(config, store=store, out=two)
    assert weights(tmp_path / "one") == weights(two)
    assert load(two / "weights").card.trained == ("block",)


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import pathlib, importlib
test = importlib.import_module("test_pretrain")
test.pretrain.run(test.small(), store=pathlib.Path(sys.argv[2]), out=pathlib.Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_a_run_that_was_killed_equals_one_that_was_not(whole: Path, store: Path, tmp_path: Path):
    out = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(store), str(out)]
    for steps in (1, 3, 5):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(read_journal(out)) < steps:
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    if not (out / "weights").exists():
        pretrain.run(small(), store=store, out=out)
    assert weights(out) == weights(whole)
    assert facts(out) == facts(whole)


def test_a_finished_run_is_not_trained_on_and_gives_its_card_back(whole: Path, store: Path):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert pretrain.run(small(), store=store, out=whole) == read_card(whole / "weights")
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_finished_run_refuses_other_settings(whole: Path, store: Path):
    before = weights(whole)
    with pytest.raises(CheckpointError, match=r"trained with other settings: optim\.lr") as caught:
        pretrain.run(overlay(small(), {"optim.lr": 0.5}), store=store, out=whole)
    assert "--out" in caught.value.hint
    assert weights(whole) == before


def test_a_run_that_does_not_say_how_it_was_trained_is_left_alone(whole: Path, store: Path, tmp_path: Path):
    shutil.copytree(whole / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"no config\.toml"):
        pretrain.run(small(), store=store, out=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def started(whole: Path, out: Path) -> Path:
    """A run that has checkpoints and is not finished."""
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("weights"))
    return out


def test_what_fails_before_the_first_step_leaves_no_folder(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(self: Loader, step: int) -> None:
        raise StoreError("a volume is damaged")

    monkeypatch.setattr(Loader, "batch", broken)
    with pytest.raises(StoreError, match="damaged"):
        pretrain.run(small(), store=store, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_checkpoint_is_free_for_other_settings(whole: Path, store: Path, tmp_path: Path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.toml").write_bytes((whole / "config.toml").read_bytes())
    pretrain.run(overlay(small(), {"steps": 1, "seed": 3}), store=store, out=out)
    assert read_toml(out / "config.toml")["seed"] == 3
    assert (out / "weights").is_dir()


def test_other_settings_are_named_and_only_they(whole: Path, store: Path, tmp_path: Path):
    out = started(whole, tmp_path / "run")
    changed = overlay(small(), {"optim.lr": 0.5, "seed": 3})
    with pytest.raises(
        CheckpointError, match=r"started with other settings: optim\.lr: 0\.002 -> 0\.5, seed: 0 -> 3\n"
    ) as caught:
        pretrain.run(changed, store=store, out=out)
    assert "choose a new --out" in caught.value.hint


def test_another_objective_is_other_settings_too(whole: Path, store: Path, tmp_path: Path):
    out = started(whole, tmp_path / "run")
    with pytest.raises(CheckpointError, match="started with other settings"):
        pretrain.run(small("tiny.dino"), store=store, out=out)


def test_a_store_of_mr_only_is_a_clear_error(tmp_path: Path):
    store = make_store(tmp_path / "mr", range(2), modality="MR", fractions=Fractions(train=1, validation=0, test=0))
    with pytest.raises(StoreError, match=r"no CT scan in its training split \(it holds MR, 2 in all\)"):
        pretrain.run(small(), store=store, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_empty_store_is_a_clear_error(tmp_path: Path):
    store = make_store(tmp_path / "empty", range(0))
    with pytest.raises(StoreError, match="it holds nothing"):
        pretrain.run(small(), store=store, out=tmp_path / "run")


def test_subjects_of_the_test_split_are_never_read(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read: set[str] = set()
    for name in ("crop", "label_crop"):
        real = getattr(Store, name)

        def spy(self, key, *rest, real=real):
            read.add(key)
            return real(self, key, *rest)

        monkeypatch.setattr(Store, name, spy)
    pretrain.run(small(), store=store, out=tmp_path / "run")
    opened = Store.open(store)
    assert read == {record.key for record in opened if record.split == "train"}


def test_the_same_seed_makes_the_same_objective_and_leaves_torch_s_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two = pretrain.make_objective(small()).state_dict(), pretrain.make_objective(small()).state_dict()
    other = pretrain.make_objective(replace(small(), seed=1)).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_an_estimate_is_what_it_then_costs(whole: Path, store: Path, tmp_path: Path):
    found = pretrain.estimate(small(), store=store, out=tmp_path / "run")
    estimate, objective = found.facts(), pretrain.make_objective(small())
    assert estimate["scans"] == estimate["subjects"] == len(trainable(Store.open(store), small().spec))
    assert estimate["samples"] == 12
    assert estimate["backbone_parameters"] == sum(p.numel() for p in objective.backbone.parameters())
    assert estimate["trained_parameters"] == sum(p.numel() for p in objective.parameters() if p.requires_grad)
    assert 0 < estimate["step_seconds"] < 60
    assert estimate["precision"] == "fp32"
    written = sum(path.stat().st_size for path in (whole / "weights" / "training").glob("*.safetensors"))
    # Headers and step counters weigh much on so small a model.
    assert estimate["checkpoint_bytes"] == pytest.approx(3 * written, rel=0.5)
    assert json.loads(json.dumps(estimate)) == estimate
    found.check()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"precision": "fp8"}, {"seed": -1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, object]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(small(), **wrong)


def test_samples_that_are_compared_must_share_a_micro_batch():
    with pytest.raises(ConfigError, match=r"loader\.batch >= 2 in every micro-batch, got 1"):
        overlay(named("tiny.dino"), {"loader.batch": 4, "parallel.accumulate": 4})
    overlay(named("tiny.dino"), {"loader.batch": 4, "parallel.accumulate": 2})


def test_a_spec_and_a_backbone_that_disagree_are_refused():
    with pytest.raises(ValueError, match="differ"):
        replace(small(), spec=replace(small().spec, block_ijk=(16, 16, 16)))


TINY = [
    ("objective.name=dino", "choose recipe tiny.dino"),
    ("objective.name=din", "did you mean 'dino'"),
    ("backbone.name=vit", "scan_vit"),
    ("views.global_.size_ijk=[50,50,50]", "which is (64, 64, 64), got (50, 50, 50)"),
    ("objective.grid=[3,2,2]", "which is (96, 64, 64)"),
    ("objective.grid=[0,2,2]", "at least one block"),
    ("objective.keep=0.0001", "leave no patch"),
    ("objective.decoder.heads=0", "heads >= 1"),
    ("backbone.block.dim=0", "dim >= 1"),
    ("backbone.channels=2", "channels must be 1"),
    ("backbone.channels=0", "channels must be >= 1"),
    ("backbone.patch_ijk=[0,0,0]", "at least one voxel"),
    ("views.global_.count=0", "count must be >= 1"),
    ("views.region_scale=-1", "region_scale must be > 0"),
    ("views.overhang=-0.1", "overhang must be >= 0"),
    ("seed=-1", "seed must be >= 0"),
    ("health.every=0", "health.every"),
    ("optim.betas=[0.9,1.5]", "betas lie in [0, 1)"),
    ("optim.lr=inf", "lr > 0"),
]
TINY_DINO = [
    ("objective.name=mae", "choose recipe tiny.mae"),
    ("views.global_.size_ijk=[30,32,32]", "views.global_.size_ijk must be a multiple of patch_ijk"),
    ("views.local.size_ijk=[15,16,16]", "views.local.size_ijk must be a multiple of patch_ijk"),
    ("views.global_.count=1 views.local.count=0", "two views or more"),
    ("loader.batch=1", "loader.batch >= 2"),
    ("objective.student_temperature=0", "temperatures must be > 0"),
    ("objective.momentum_start=2", "momentum_start lies in [0, 1]"),
    ("objective.projector.prototypes=0", "must be >= 1"),
]


@pytest.mark.parametrize(
    ("recipe", "words", "said"), [("tiny", *case) for case in TINY] + [("tiny.dino", *case) for case in TINY_DINO]
)
def test_a_setting_that_cannot_train_is_one_sentence_and_leaves_nothing(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, words: str, said: str
):
    out = tmp_path / "run"
    code = cli.run(["pretrain", recipe, *words.split(), "steps=1", "--store", str(store), "--out", str(out)])
    shown = capsys.readouterr()
    assert (code, shown.out) == (WRONG, "")
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err
    assert said in shown.err
    assert not out.exists()


def test_the_same_command_on_a_finished_run_answers_the_same(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    few = ["loader.batch=1", "backbone.block.depth=1", "backbone.scan.depth=1", "health.blocks=4"]
    words = ["pretrain", "tiny", "steps=1", *few, "--store", str(store), "--out", str(tmp_path / "run")]
    answers = [(cli.run(words), capsys.readouterr().out) for _ in range(2)]
    assert answers == [(DONE, f"{tmp_path / 'run' / 'weights'}\n")] * 2


def test_the_loader_of_a_run_is_given_training_scans_only(store: Path):
    opened = Store.open(store)
    loader = pretrain.make_loader(small(), opened, trainable(opened, small().spec))
    assert {opened.record(key).split for key in loader.keys} == {"train"}
    assert len(loader.keys) == sum(record.split == "train" for record in opened)


def test_a_run_may_resume_with_other_readers_and_a_quarantined_scan_stays_out(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy, run = tmp_path / "store", tmp_path / "run"
    shutil.copytree(store, copy)
    opened = Store.open(copy)
    # The one that is read first, so that the first checkpoint knows of it.
    bad = pretrain.make_loader(small(), opened, trainable(opened, small().spec)).plan(0, 0)[0].key
    (file,) = copy.rglob(f"{bad}*.b2nd")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    stop_after(monkeypatch, 5)
    with pytest.raises(StoppedError):
        pretrain.run(small(), store=copy, out=run)
    monkeypatch.undo()
    assert [line["quarantined"] for line in read_journal(run) if "quarantined" in line] == [bad[:16]]
    # It could be read again by now: what the first half of the run went without, the second goes without too.
    file.write_bytes(whole)
    seen: list[set[str]] = []
    real = Loader.batches

    def watching(self: Loader, start: int, stop: int, *, device: torch.device) -> object:
        seen.append(set(self.quarantined))
        return real(self, start, stop, device=device)

    monkeypatch.setattr(Loader, "batches", watching)
    other = replace(small(), loader=replace(small().loader, workers=1, threads=2, ahead=2))
    pretrain.run(other, store=copy, out=run)
    assert seen == [{bad}]
    after = read_journal(run)
    assert [line["reader"] for line in after if "reader" in line] == ["blosc2 mmap"] * 2, "each start says its way"
    assert after[-1]["read_gb"] > 0


def unreadable(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    """Training cannot read this scan; whoever looks at the run's health still can."""
    real = Crops.read

    def read(self: Crops, key: str, start: tuple[int, int, int], size: tuple[int, int, int]) -> torch.Tensor:
        if key == bad:
            raise StoreError("the file is damaged")
        return real(self, key, start, size)

    monkeypatch.setattr(Crops, "read", read)


@pytest.mark.parametrize("step", [0, 2])
def test_a_scan_that_stays_unreadable_changes_no_line_of_a_run_that_resumes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    opened = Store.open(store)
    bad = pretrain.make_loader(small(), opened, trainable(opened, small().spec)).plan(step, 0)[0].key
    with monkeypatch.context() as damage:
        unreadable(damage, bad)
        pretrain.run(small(), store=store, out=tmp_path / "whole")
        with monkeypatch.context() as stop:
            stop_after(stop, 5)
            with pytest.raises(StoppedError):
                pretrain.run(small(), store=store, out=tmp_path / "run")
        pretrain.run(small(), store=store, out=tmp_path / "run")
    assert [line["quarantined"] for line in facts(tmp_path / "run") if "quarantined" in line] == [bad[:16]]
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def meanwhile(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Do something else while the next run prepares."""
    real, due = Loader.batch, [work]

    def batch(self: Loader, step: int) -> Batch:
        if due:
            due.pop()()
        return real(self, step)

    monkeypatch.setattr(Loader, "batch", batch)


def test_a_run_that_another_one_finished_while_it_prepared_gives_that_one_s_card(
    whole: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    meanwhile(monkeypatch, lambda: pretrain.run(small(), store=store, out=tmp_path / "run"))
    assert pretrain.run(small(), store=store, out=tmp_path / "run") == read_card(tmp_path / "run" / "weights")
    assert facts(tmp_path / "run") == facts(whole)


def test_settings_are_compared_by_the_one_who_holds_the_folder(
    whole: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    meanwhile(monkeypatch, lambda: started(whole, tmp_path / "run"))
    with pytest.raises(CheckpointError, match="started with other settings: seed: 0 -> 3"):
        pretrain.run(replace(small(), seed=3), store=store, out=tmp_path / "run")
    assert (tmp_path / "run" / "config.toml").read_bytes() == (whole / "config.toml").read_bytes()


def test_a_run_does_not_resume_on_other_scans(whole: Path, tmp_path: Path):
    out = started(whole, tmp_path / "run")
    other = make_store(tmp_path / "other", range(10, 12), fractions=Fractions(train=1, validation=0, test=0))
    with pytest.raises(CheckpointError, match=r"started on other scans \(\d then, 2 now\)"):
        pretrain.run(small(), store=other, out=out)


def test_a_page_that_cannot_be_written_costs_no_run_and_is_written_later(
    whole: Path, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    out = started(whole, tmp_path / "run")
    shutil.rmtree(out / "report")
    (out / "report").write_text("a file where a folder should be")
    pretrain.run(small(), store=store, out=out)
    assert "page was not written" in caplog.text
    (out / "report").unlink()
    pretrain.run(small(), store=store, out=out)
    assert (out / "report" / "index.html").is_file()


def test_energy_of_steps_that_run_again_is_spent_too(whole: Path, store: Path, tmp_path: Path):
    out = started(whole, tmp_path / "run")
    shutil.rmtree(sorted((out / "checkpoints").iterdir())[-1])
    lines = [line | ({"kwh": 5.0} if line["step"] == 6 else {}) for line in read_journal(whole)]
    (out / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pretrain.run(small(), store=store, out=out)
    assert 5.0 < read_journal(out)[-1]["kwh"] < 5.1


def test_a_level_that_is_no_longer_there_does_not_count_as_trained(whole: Path, store: Path):
    config, opened = small("tiny.dino"), Store.open(store)
    chosen = choose(opened, config.spec, config.views)
    parent = read_card(whole / "weights")
    card = pretrain.make_card(config, pretrain.make_objective(config), opened, chosen, parent)
    assert parent.trained == ("block", "scan")
    assert card.trained == ("block",)


def on_two(config: PretrainConfig, store: Path, out: Path, stop: int) -> None:
    """Train, up to a step; the scan that process 1 reads first cannot be read."""
    opened = Store.open(store)
    bad = pretrain.make_loader(config, opened, trainable(opened, config.spec)).plan(2, 1)[0].key
    with pytest.MonkeyPatch.context() as patched:
        unreadable(patched, bad)
        if stop:
            stop_after(patched, stop)
            # Process 0 shows, and stops; the other hears no more of it.
            with pytest.raises((StoppedError, RuntimeError)):
                pretrain.run(config, store=store, out=out)
        else:
            pretrain.run(config, store=store, out=out)


@pytest.mark.slow
def test_two_processes_resume_to_the_last_bit_and_tell_of_each_other_s_scans(store: Path, tmp_path: Path):
    for out, stops in (("whole", [0]), ("run", [5, 0])):
        for stop in stops:
            run_together(on_two, 2, tmp_path, (small(), store, tmp_path / out, stop), join=False)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")
    assert len([line for line in facts(tmp_path / "run") if "quarantined" in line]) >= 1


def test_of_a_mixed_store_only_the_recipe_s_modality_is_trained_on(tmp_path: Path):
    everybody = Fractions(train=1, validation=0, test=0)
    folder = make_store(tmp_path / "mixed", range(3), fractions=everybody)
    make_more(folder, range(3, 6), modality="MR")
    card = pretrain.run(replace(small(), steps=2), store=folder, out=tmp_path / "run")
    assert card.data[:2] == ("3 CT scans from phantom sources", "of 3 acquisitions and 3 subjects")
    assert card.data[2:] == (seen_line(record.key for record in Store.open(folder)),)


def test_too_few_scans_for_a_batch_are_a_clear_error(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    code = cli.run(["pretrain", "tiny", "loader.batch=9", "--store", str(store), "--out", str(out)])
    assert code == WRONG
    assert "a batch of 9 samples needs as many scans" in capsys.readouterr().err
    assert not out.exists()


def test_a_run_that_continues_weights_begins_with_them_and_keeps_their_licence(
    whole: Path, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    parent = tmp_path / "parent"
    shutil.copytree(whole / "weights", parent)
    about = json.loads((parent / "config.json").read_text())
    about |= {"licence": "cc-by-nc-sa-4.0", "origin": "somebody else"}
    (parent / "config.json").write_text(json.dumps(about))
    config = overlay(small(), {"steps": 1, "optim.lr": 1e-4})
    card = pretrain.run(config, store=store, out=tmp_path / "run", weights=parent)
    assert (card.licence, card.origin, card.parent) == ("cc-by-nc-sa-4.0", "somebody else", card_of(whole).sha256)
    assert "without --probe" in caplog.text
    lines = read_journal(tmp_path / "run")
    assert [line["begun_from"] for line in lines if "begun_from" in line] == ["full"]
    before, after = (model_of(folder) for folder in (whole, tmp_path / "run"))
    drawn = pretrain.make_objective(config).backbone.state_dict()
    # At step 0 the rate is 0: the weights are still the parent's.
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(before[name], drawn[name]) for name in before)


def test_a_probe_store_is_looked_at_before_and_after_and_is_never_trained_on(whole: Path, store: Path, tmp_path: Path):
    labelled = make_store(tmp_path / "probe", range(20, 24))
    config = overlay(small(), {"steps": 2, "optim.lr": 1e-4})
    card = pretrain.run(config, store=store, out=tmp_path / "run", weights=whole / "weights", probe=labelled)
    assert all("6 CT" not in line for line in card.data)
    looks = [line["probe/patch_knn"] for line in read_journal(tmp_path / "run") if "probe/patch_knn" in line]
    assert len(looks) == 2
    assert "kNN probe" in (tmp_path / "run" / "report" / "index.html").read_text()


def test_a_probe_store_without_labels_is_a_clear_error(store: Path, tmp_path: Path):
    Store.create(tmp_path / "bare")
    with pytest.raises(StoreError, match="probe store has fewer than two subjects"):
        pretrain.run(small(), store=store, out=tmp_path / "run", probe=tmp_path / "bare")
