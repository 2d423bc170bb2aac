"""Two Ray nodes on this machine, of which one is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from voxelstem.cluster import Cluster
from voxelstem.errors import ConfigError, IngestError
from voxelstem.workers import Lost

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'voxelstem[cluster]'")


def square(number: int) -> int:
    if number < 0:
        raise IngestError("below zero", code="negative")
    return number * number


def slow_square(number: int) -> tuple[int, str]:
    time.sleep(0.3)
    return number * number, ray.get_runtime_context().get_node_id()


def die(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def sleep_long(number: int) -> int:
    time.sleep(60 if number == 1 else 0)
    return number


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without processors of its own, so that all work is done on the two nodes beside it."""
    from ray.cluster_utils import Cluster as Nodes

    # The processes of the nodes must find this file's functions.
    path = str(Path(__file__).parent)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path if not before else f"{path}{os.pathsep}{before}"
    made = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def test_nobody_at_the_address_is_a_clear_error():
    with pytest.raises(ConfigError, match="no Ray cluster answers"), Cluster(square, "127.0.0.1:1"):
        pass


@pytest.mark.slow
def test_results_come_in_order_and_what_is_raised_comes_back(nodes):
    nodes.add_node(num_cpus=1)
    with Cluster(square, nodes.address) as cluster:
        assert list(cluster.map(range(20))) == [(number, number * number) for number in range(20)]
        with pytest.raises(IngestError, match="below zero") as caught:
            list(cluster.map([1, -1]))
        assert caught.value.code == "negative"


@pytest.mark.slow
def test_a_killed_node_loses_nothing(nodes):
    doomed = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    seen = []
    with Cluster(slow_square, nodes.address) as cluster:
        for number, answer in cluster.map(range(16)):
            assert not isinstance(answer, Lost)
            assert answer[0] == number * number
            seen.append(answer[1])
            if len(seen) == 4:
                nodes.remove_node(doomed, allow_graceful=False)
    assert len(seen) == 16
    assert len(set(seen[:8])) == 2, "both nodes worked before one was killed"
    assert len(set(seen[-4:])) == 1


@pytest.mark.slow
def test_a_task_that_kills_its_process_is_lost_and_the_others_go_on(nodes):
    with Cluster(die, nodes.address) as cluster:
        answers = dict(cluster.map(range(4)))
    assert (answers[0], answers[2], answers[3]) == (0, 2, 3)
    assert isinstance(answers[1], Lost)
    assert answers[1].code == "worker-died"


@pytest.mark.slow
def test_a_task_that_hangs_is_lost_and_the_others_go_on(nodes):
    with Cluster(sleep_long, nodes.address, timeout_s=15.0) as cluster:
        answers = dict(cluster.map(range(4)))
    assert isinstance(answers[1], Lost)
    assert (answers[1].code, answers[3]) == ("worker-hung", 3)
