"""The scaling of an evaluation over GPUs: the time of each part on N of them, and the part that
limits the gain. Computed.

Model after model, the 16-bit one first: the others are measured against its videos. Within a model
every GPU takes one whole video at a time, so the last round may leave some idle.
"""

import math
from dataclasses import dataclass

from benchmarks.evaluation_operations import SHARE, video_cost
from benchmarks.evaluation_stages import LOAD_BYTES_PER_S, RECIPES, Evaluated, memory_plans, take_bytes
from benchmarks.kernels_roofline import H100_SXM, Rates
from tempoquant.planning.run_estimate import GIB


@dataclass(frozen=True)
class Cluster:
    """Assumptions about the machines.

    Attributes:
        gpus: of all nodes.
        gpus_per_node: at the most.
        storage_bytes_per_s: of the shared folder, for all nodes together.
        node_bytes_per_s: of one node's reading from it.
    """

    gpus: int
    gpus_per_node: int = 8
    storage_bytes_per_s: float = 10e9
    node_bytes_per_s: float = 2e9

    @property
    def nodes(self) -> int:
        """Return the number of nodes."""
        return math.ceil(self.gpus / self.gpus_per_node)

    @property
    def workers_per_node(self) -> int:
        """Return the processes of a full node, one a GPU."""
        return min(self.gpus, self.gpus_per_node)

    def read_s(self, num_bytes: float) -> float:
        """Return the seconds until every node has read a model once; its workers share its page
        cache.
        """
        return max(num_bytes / self.node_bytes_per_s, self.nodes * num_bytes / self.storage_bytes_per_s)


@dataclass(frozen=True)
class ModelLoad:
    """One model: its label, bytes of its files, in RAM while a worker loads it, and page-locked in
    mode `swap`.
    """

    label: str
    disk: int
    host: int
    pinned: int


def model_loads(what: Evaluated) -> list[ModelLoad]:
    """Return the 16-bit model and one for each recipe."""
    plans = memory_plans(what.size)
    models = [next(iter(plans.values())).sixteen_bit, *(plan.quantized for plan in plans.values())]
    found = []
    for label, model in zip(("16-bit", *RECIPES), models, strict=True):
        by_mode = {mode.mode: mode for mode in model.modes}
        found.append(ModelLoad(label, model.disk, by_mode["resident"].host, by_mode["swap"].pinned))
    return found


@dataclass(frozen=True)
class ScalePlan:
    """The times of an evaluation on a cluster, in hours.

    Attributes:
        load: reading and casting each model once a worker.
        generate: rounds of videos, their encoding included, without idle GPUs in the last round.
        tail: GPUs waiting for the last videos of a model, as time of all of them.
        measure_alone: if one process measured every video.
        measure_spread: if every worker measured its share.
    """

    cluster: Cluster
    load: float
    generate: float
    tail: float
    measure_alone: float
    measure_spread: float

    def total(self, spread: bool) -> float:
        """Return the hours from the first model's load to the last video's numbers."""
        return self.load + self.generate + self.tail + (self.measure_spread if spread else self.measure_alone)


def scale_plan(
    what: Evaluated,
    cluster: Cluster,
    loads: list[ModelLoad],
    cpu_s: tuple[float, float],
    rates: Rates = H100_SXM,
    share: float = SHARE,
) -> ScalePlan:
    """Compute the times of an evaluation on a cluster.

    Args:
        cpu_s: processor seconds of writing a video and of measuring it
            (benchmarks/scoring_time.py), one core each.
    """
    cost, (write_s, score_s) = video_cost(what.size, rates, share), cpu_s
    load = generate = tail = 0.0
    for number, model in enumerate(loads):
        in_memory = model.host  # what is cast
        load += max(cluster.read_s(model.disk), in_memory / LOAD_BYTES_PER_S)
        seconds = (cost.seconds_4bit if number else cost.seconds_16bit) + write_s
        generate += what.takes / cluster.gpus * seconds
        tail += (math.ceil(what.takes / cluster.gpus) - what.takes / cluster.gpus) * seconds
    measured = (len(loads) - 1) * what.takes
    alone, spread = measured * score_s, math.ceil(measured / cluster.gpus) * score_s
    return ScalePlan(cluster, *(seconds / 3600 for seconds in (load, generate, tail, alone, spread)))


def storage_gib(what: Evaluated, num_models: int) -> dict[str, float]:
    """Bound the size of the evaluation's folder, by kind of file."""
    return {kind: num_models * what.takes * size / GIB for kind, size in take_bytes(what.size).items()}
