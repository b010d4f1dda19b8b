"""An evaluation on several workers, one of which dies midway: nothing is lost, and nothing is there
twice.
"""

import contextlib
import functools
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tempoquant.engines import Engine, Local, RayCluster
from tempoquant.evaluate.benchmark_sets.bundled import load_bundled
from tempoquant.evaluate.evaluation import evaluate
from tempoquant.evaluate.metrics.measures import CEILING_DB
from tempoquant.evaluate.plan import Model
from tempoquant.evaluate.request import Request
from tests.engines.ray_cluster import RAY_IS_MISSING, two_machines
from tests.recorded import SETTINGS, SOURCE

pytestmark = pytest.mark.slow

NUM_ITEMS, NUM_STEPS = 5, 6
LABELS = ("16-bit", "again")


def note_generations(pipeline: Any, log: Path) -> None:
    """Make a pipeline record each generation that begins, and its process."""
    original = pipeline.prepare_latents

    def noting(*arguments: Any, **named: Any) -> Any:
        with log.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        return original(*arguments, **named)

    pipeline.prepare_latents = noting


def request(log: Path) -> Request:
    reference, again = (Model(label, SOURCE, prepare=functools.partial(note_generations, log=log)) for label in LABELS)
    return Request(reference, [again], load_bundled(NUM_ITEMS), SETTINGS.replace(num_steps=NUM_STEPS))


@contextlib.contextmanager
def two_processes(log: Path) -> Iterator[tuple[Engine, Callable[[], None]]]:
    """Return the engine, and a function that kills one of its workers."""
    yield Local(("cpu", "cpu")), lambda: os.kill(int(log.read_text().split()[-1]), signal.SIGKILL)


@contextlib.contextmanager
def two_nodes(log: Path) -> Iterator[tuple[Engine, Callable[[], None]]]:
    """Return the engine, and a function that cuts off a machine with everything on it."""
    with two_machines() as cluster:
        second = next(iter(cluster.worker_nodes))
        yield RayCluster("cpu", cluster.address), lambda: cluster.remove_node(second, allow_graceful=False)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("several", [two_processes, pytest.param(two_nodes, marks=RAY_IS_MISSING)])
def test_a_death_midway_costs_the_item_in_hand_and_nothing_else(several: Any, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    with several(log) as (engine, kill):
        at_work = threading.Thread(target=functools.partial(when_both_are_at_work, log, kill), daemon=True)
        at_work.start()
        record = evaluate(request(log), out, engine)
        at_work.join(60)
        assert not at_work.is_alive(), "the worker was never killed"
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    takes = Counter((line["label"], line["id"]) for line in lines)
    assert len(takes) == 2 * NUM_ITEMS and set(takes.values()) == {1}, takes
    assert not any(line.get("failed") for line in lines)
    assert len(log.read_text().splitlines()) in (2 * NUM_ITEMS, 2 * NUM_ITEMS + 1)
    for item in record["items"]:
        assert item["metrics"]["again"]["psnr_db"] == item["metrics"]["again"]["final_latent_db"] == CEILING_DB
    assert [sum(model["devices"].values()) for model in record["models"]] == [NUM_ITEMS] * 2
    assert [path.name for path in out.rglob(".*")] == [".lock"]


def when_both_are_at_work(log: Path, kill: Callable[[], None]) -> None:
    while not log.is_file() or len(set(log.read_text().split())) < 2:
        time.sleep(0.02)
    kill()
