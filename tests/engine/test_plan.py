from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from voxelstem.config import overlay
from voxelstem.engine.cost import FLOAT
from voxelstem.engine.hardware import GIB, Fleet
from voxelstem.engine.loader import LoaderConfig
from voxelstem.engine.plan import Plan, gpu_makes_views, plan
from voxelstem.engine.scans import trainable
from voxelstem.errors import ConfigError
from voxelstem.pretrain import make_loader, make_objective
from voxelstem.recipes import named
from voxelstem.store import Store

SMALL = {
    "backbone.block.dim": 24,
    "backbone.block.depth": 1,
    "loader.batch": 2,
    "checkpoint.keep": 2,
    "precision": "fp32",
}


def plan_of(config, store: Store, *, out: Path = Path(), fleet: Fleet | None = None) -> Plan:
    chosen = trainable(store, config.spec)
    return plan(
        config, chosen, make=make_objective, load=lambda few: make_loader(few, store, chosen), out=out, fleet=fleet
    )


@pytest.fixture(scope="module")
def here(phantoms: Store, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_of(overlay(named("tiny.mae"), SMALL), phantoms, out=tmp_path_factory.mktemp("plan") / "run")


def test_a_plan_counts_what_is_there(here: Plan, phantoms: Store):
    config = overlay(named("tiny.mae"), SMALL)
    objective, chosen = make_objective(config), trainable(phantoms, config.spec)
    assert (here.scans, here.subjects) == (len(chosen), chosen.subjects())
    assert here.samples == config.steps * 2
    assert here.epochs == pytest.approx(config.steps * 2 / config.loader.samples_per_open / len(chosen))
    assert here.backbone_parameters == sum(p.numel() for p in objective.backbone.parameters())
    assert here.trained_parameters == sum(p.numel() for p in objective.parameters())
    assert here.memory.weights == FLOAT * sum(value.numel() for value in objective.state_dict().values())
    assert here.checkpoint_bytes == 3 * here.state_on_disk
    assert here.precision == "fp32"


def test_a_small_step_is_measured_and_a_run_is_that_many_steps(here: Plan):
    assert here.source.startswith(("measured on 2 samples", "limited by 1 threads"))
    assert 0 < here.step_seconds < 60
    assert here.samples_per_s == pytest.approx(2 / here.step_seconds)
    assert here.days * 86400 == pytest.approx(here.steps * here.step_seconds)
    # 10 W for each busy core.
    assert here.kwh == pytest.approx(here.days * 24 * 10 * torch.get_num_threads() / 1000)


def test_samples_come_from_the_store_s_compressed_files(here: Plan, phantoms: Store):
    traffic = here.traffic
    largest = max(record.volume_bytes for record in phantoms)
    assert 0 < traffic.read_bytes_per_sample <= largest
    assert traffic.read_gb_per_s == pytest.approx(traffic.read_bytes_per_sample * here.samples_per_s / 1e9)
    assert traffic.view_bytes_per_sample == 4 * 64**3
    assert traffic.readers == pytest.approx(traffic.sample_seconds * here.samples_per_s)
    assert traffic.network_bytes_per_step == 0


def test_facts_are_json_and_words_name_every_number(here: Plan):
    facts = here.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["memory"]["weights"] == here.memory.weights
    assert facts["refused"] == []
    words = here.words()
    for name in ("device memory", "activations", "disk", "a step", "samples a second", "network", "days", "kWh"):
        assert name in words


def test_what_fits_is_let_through_and_what_does_not_is_refused_with_the_numbers(here: Plan):
    here.check()
    for changed, words in (
        ({"room_bytes": here.memory.total / 2}, "on each device, which has"),
        ({"disk_free_bytes": here.checkpoint_bytes - 1}, "checkpoints need"),
        ({"ram_free_bytes": here.ram_bytes - 1}, "reading ahead needs"),
    ):
        with pytest.raises(ConfigError, match=words) as refused:
            replace(here, **changed).check()
        assert "iB" in refused.value.problem


@pytest.fixture(scope="module")
def large(phantoms: Store) -> Plan:
    """338 M parameters trained, as many in the teacher, heads of 65,536."""
    config = overlay(named("ct.spectre_stage1_paper"), {"parallel.kind": "fsdp", "parallel.recompute": True})
    return plan_of(config, phantoms, fleet=Fleet(gpus=32))


@pytest.mark.slow
def test_a_run_on_32_gpus_is_planned_without_its_network(large: Plan):
    assert large.source.startswith("estimated")
    assert large.trained_parameters > 338e6
    assert large.batch_per_device == 48
    # A step of the student alone: 2 views of 374 GFLOP, forward and twice back, and the teacher's 2.
    assert large.flops_per_sample > 374e9 * (2 * 3 + 2)
    assert large.memory.weights < large.state_bytes / 32
    assert large.traffic.network_bytes_per_step > 0
    assert large.ram_free_bytes == 0
    assert large.room_bytes == 80 * GIB


def test_a_batch_that_cannot_be_shared_out_is_refused(phantoms: Store):
    with pytest.raises(ConfigError, match="cannot be shared out evenly among 3 GPUs in 1 micro-batches"):
        plan_of(overlay(named("tiny.mae"), SMALL), phantoms, fleet=Fleet(gpus=3))


def test_more_gpus_take_less_time_and_fsdp_less_memory_each(phantoms: Store):
    config = overlay(named("tiny.mae"), SMALL | {"loader.batch": 64})
    few, many = (plan_of(config, phantoms, fleet=Fleet(gpus=gpus)) for gpus in (2, 32))
    assert many.days < few.days
    assert many.memory.activations == pytest.approx(few.memory.activations / 16)
    sharded = plan_of(overlay(config, {"parallel.kind": "fsdp"}), phantoms, fleet=Fleet(gpus=32))
    assert sharded.memory.optimiser == pytest.approx(many.memory.optimiser / 32)


def test_the_slowest_of_computing_reading_and_sending_sets_the_pace(phantoms: Store):
    config = overlay(named("tiny.mae"), SMALL | {"loader.batch": 64})
    slow = plan_of(config, phantoms, fleet=Fleet(gpus=32, network_gb_per_s=1e-4))
    assert slow.source == "limited by 0.0001 GB/s of network for each GPU"
    assert slow.traffic.network_gb_per_s == pytest.approx(1e-4)
    compute = slow.flops_per_sample * 64 / 32 / Fleet(gpus=32).flops_per_s(bf16=False)
    assert slow.step_seconds > compute


def test_readers_are_timed_without_the_views_that_a_gpu_makes():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert gpu_makes_views(LoaderConfig(), Fleet(), gpu)
    assert gpu_makes_views(LoaderConfig(), Fleet(gpus=1), cpu)
    assert not gpu_makes_views(LoaderConfig(), Fleet(), cpu)
    assert not gpu_makes_views(LoaderConfig(made="worker"), Fleet(gpus=1), gpu)


def test_samples_that_pass_in_chunks_are_computed_once_more_and_those_that_pass_at_once_are_not(phantoms: Store):
    config = overlay(named("tiny.align"), {"loader.batch": 4, "precision": "fp32", "backbone.block.depth": 1})
    at_once, chunked, recomputed = (
        plan_of(overlay(config, changes), phantoms)
        for changes in (
            {"objective.chunk": 4},
            {"objective.chunk": 1},
            {"objective.chunk": 4, "parallel.recompute": True},
        )
    )
    # Recomputing repeats the transformers' blocks; what stands beside them, such as codes of places
    # and the atlas, only chunks do.
    assert at_once.flops_per_sample < recomputed.flops_per_sample < chunked.flops_per_sample
    assert chunked.flops_per_sample == pytest.approx(recomputed.flops_per_sample, rel=0.02)
    # The codes of places are there once, however many samples pass.
    assert chunked.memory.activations == pytest.approx(at_once.memory.activations / 4, rel=0.02)
