"""Quantizing on a Ray cluster of two machines: recording, measuring, all denoisers; one machine is
lost midway.
"""

import threading
import time
from pathlib import Path

import pytest

import tempoquant
from tempoquant import Recipe
from tempoquant.engines import RayCluster
from tempoquant.hosts.contents import contents_of
from tempoquant.quantizing import Budget, Machine
from tests.engines.ray_cluster import RAY_IS_MISSING, two_machines

pytestmark = pytest.mark.slow

QUICK = Recipe.load("paper").replace(num_prompts=2, num_steps=4, rank=2, num_frames=5)
BUDGET = Budget(bits_per_weight=5.0)


@RAY_IS_MISSING
@pytest.mark.timeout(600)
def test_a_machine_that_is_lost_midway_costs_nothing_that_was_finished(tmp_path: Path) -> None:
    with two_machines() as cluster:
        machine = Machine(("cpu",), cluster=RayCluster("cpu", cluster.address))

        def lose_one() -> None:
            while len(list((tmp_path / "out.unfinished").glob("*.journal"))) < 2:
                time.sleep(0.02)
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

        losing = threading.Thread(target=lose_one, daemon=True)
        losing.start()
        folder = tempoquant.quantize("tiny", tmp_path / "out", QUICK, machine=machine, budget=BUDGET)
        losing.join(60)
        assert not losing.is_alive(), "all denoisers were never begun side by side"
    here = tempoquant.quantize("tiny", tmp_path / "here", QUICK, device="cpu", budget=BUDGET)
    found, wanted = contents_of(folder), contents_of(here)
    assert found.bits_per_weight == pytest.approx(wanted.bits_per_weight, rel=0.01)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in here.iterdir())
    assert not (tmp_path / "out.unfinished").exists()
