"""The needs of measuring sensitivity, which a run with a budget does between recording and
quantizing.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tempoquant.calibrate.sensitivity import MAX_SAMPLES
from tempoquant.models.source import SourceModel
from tempoquant.planning.block_costs import DenoiserCosts
from tempoquant.planning.run_estimate import GIB, MEASURE, RunEstimate, StageEstimate
from tempoquant.recipe import Recipe

_BACKWARD = 3  # passes: forward once more with autograd, then back
_GRAPH_WIDTHS = 40  # of autograd's stored tensors of a block, in hidden states of the sample
_FORWARD_SHARE = {"cpu": 0.9, "cuda": 0.6}


def states_bytes(cost: DenoiserCosts) -> int:
    """Return the most bytes on the disk while a denoiser is measured: the hidden states before
    every block, and gradients.
    """
    return (cost.num_blocks + 2) * cost.hidden_bytes // 2


def with_sensitivity(
    planned: RunEstimate,
    source: SourceModel,
    recipe: Recipe,
    devices: Sequence[str],
    num_samples: Mapping[str, int],
    gemm_rates: Mapping[str, float] | None = None,
) -> RunEstimate:
    """Insert the stages that measure each denoiser's sensitivity before the denoisers are
    quantized.

    Memory and time are estimated from shapes; the disk, for the hidden states before every block,
    is exact.
    """
    recorded = [stage for stage in planned.stages if stage.name == "record"]
    store_gib = recorded[0].disk_gib if recorded else 0.0
    names = source.denoiser_names
    places = dict(zip(names, itertools.cycle(devices), strict=False))
    counts = {name: min(MAX_SAMPLES, num_samples.get(name, 0)) for name in names}
    costs = {name: DenoiserCosts(source, name, recipe, counts[name], places[name]) for name in names}
    all_states = sum(map(states_bytes, costs.values())) if planned.side_by_side else 0
    stages = []
    for denoiser, cost in costs.items():
        count, device = counts[denoiser], places[denoiser]
        graph = _GRAPH_WIDTHS * cost.num_tokens * cost.width * cost.dtype.itemsize
        computing = (cost.block_bytes + graph) / GIB
        on_gpu = device.startswith("cuda")
        quantizing = next(stage for stage in planned.stages if stage.name.endswith(denoiser))
        held = quantizing.peak_memory_gib if on_gpu else max(quantizing.peak_memory_gib, computing)
        seconds = None
        if gemm_rates is not None:
            rate = gemm_rates[device] * _FORWARD_SHARE["cuda" if on_gpu else "cpu"]
            seconds = (1 + _BACKWARD) * count * cost.num_blocks * cost.forward_operations / rate
        stages.append(
            StageEstimate(
                f"{MEASURE}{denoiser}",
                seconds,
                held,
                computing if on_gpu else 0.0,
                store_gib + (all_states or states_bytes(cost)) / GIB,
            )
        )
    rest = [stage for stage in planned.stages if stage not in recorded]
    return replace(planned, stages=(*recorded, *stages, *rest))
