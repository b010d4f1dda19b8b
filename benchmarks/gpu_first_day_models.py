"""The models of `benchmarks.gpu_first_day`: one Wan block, two denoisers in turns, small
linears.
"""

import contextlib
import time
from typing import Any

import torch

from benchmarks.memory_model import fill
from tempoquant.models.pipeline_configs import read_configs
from tempoquant.models.wan.family import WAN
from tempoquant.models.wan.published import A14B
from tempoquant.placement.denoiser_swap import DenoiserSwap, Placed
from tempoquant.placement.host_copies import SideStream
from tempoquant.planning.generation_memory import empty_denoiser, foreseen_layers
from tempoquant.recipe import Recipe
from tempoquant.runtime.convert import quantized_linears, replace_linears
from tempoquant.runtime.share_inputs import share_inputs
from tempoquant.timesteps import TimestepBins

VIDEO = (21, 60, 104)
"""Latent frames, rows and columns of 480 × 832 and 81 frames."""
SMALL = (2, 4, 4)
TINY = "tiny"


def denoiser(is_quantized: bool, num_blocks: int, device: str) -> Any:
    """Build blocks of A14B's shapes with random weights, or of the bundled model's on a CPU."""
    configs = read_configs(TINY if device == "cpu" else A14B)
    name = configs.denoisers[0].name
    model = empty_denoiser(configs, name, num_blocks)
    rope = model.rope
    model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    if is_quantized:
        layers = foreseen_layers(configs, name, Recipe.load(TINY if device == "cpu" else "default"))
        blocks = set(WAN.blocks_of(model))
        entries = {name: entry for name, entry in layers.entries.items() if WAN.block_of(name) in blocks}
        edges = TimestepBins(tuple(100.0 * index for index in range(1, layers.num_bins)))
        replace_linears(model, entries, edges, torch.bfloat16)
    fill(model, torch.device(device))
    for linear in quantized_linears(model).values():
        linear.settle()
    if is_quantized:
        share_inputs(model, WAN.call.sharing_an_input(quantized_linears(model)))
    return model.to(device)


def inputs(model: Any, device: str) -> dict[str, Any]:
    """Make the inputs of one call."""
    configs = read_configs(TINY if device == "cpu" else A14B)
    shape = SMALL if device == "cpu" else VIDEO
    made = WAN.example_inputs(configs.index, dict(model.config), shape)
    random = {name: torch.randn(each.shape).to(device, each.dtype) for name, each in made.items() if name != "timestep"}
    return {**random, "timestep": torch.full(made["timestep"].shape, 950.0, device=device), "return_dict": False}


def seconds_a_call(model: Any, arguments: dict[str, Any], device: str, repeats: int = 3) -> float:
    """Return the least time of some calls after one that warms up."""
    model(**arguments)
    found = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        model(**arguments)
        _synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


def measure_block(device: str) -> dict[str, Any]:
    """Measure a call of one block (with the parts outside blocks) by kind, chunks and compiler, and
    its peaks on a GPU.
    """
    found = {}
    for is_quantized in (False, True):
        model = denoiser(is_quantized, 1, device)
        arguments = inputs(model, device)
        for in_chunks in (False, True):
            undo = contextlib.ExitStack()
            if in_chunks:
                assert WAN.chunk_blocks is not None
                undo.callback(WAN.chunk_blocks(model))
            for compiled in (False, True):
                if compiled:
                    torch.compiler.reset()
                    model.compile_repeated_blocks(fullgraph=True, **({"backend": "eager"} if device == "cpu" else {}))
                name = f"{'W4A4' if is_quantized else '16-bit'}, {'chunks' if in_chunks else 'one piece'}"
                with _peaks(device) as peaks:
                    seconds = seconds_a_call(model, arguments, device)
                found[f"{name}, {'compiled' if compiled else 'eager'}"] = {"seconds": seconds, **peaks}
            for each in model.blocks:
                each._compiled_call_impl = None
            undo.close()
        del model
    return found


def measure_swap(device: str, num_blocks: int = 6) -> dict[str, Any]:
    """Measure two denoisers of a few blocks, called in turns: each change is known in advance."""
    models = {name: denoiser(True, 2 if device == "cpu" else num_blocks, device).to("cpu") for name in ("one", "other")}
    arguments = inputs(models["one"], device)
    expected = {}
    for name, model in models.items():
        expected[name] = model.to(device)(**arguments)[0].cpu()
        model.to("cpu")
    one = sum(tensor.nbytes for tensor in (*models["one"].parameters(), *models["one"].buffers()))
    placed = {name: Placed.of(WAN, model) for name, model in models.items()}
    turns = {"one": "other", "other": "one"}
    with _peaks(device) as peaks:
        swap = DenoiserSwap(placed, SideStream(torch.device(device)), lambda name, *_: turns[name])
        is_same = all(torch.equal(models[name](**arguments)[0].cpu(), expected[name]) for name in 3 * tuple(turns))
        swap.remove()
    return {"is_same": is_same, "bytes_of_one": one, **peaks}


def small_linears() -> None:
    """Run a few linears of small odd shapes on the GPU."""
    from benchmarks.gpu_first_day_steps import checked_linear

    with torch.no_grad():
        for format in ("nvfp4_m1", "mxfp4", "nvfp4", "int4"):
            linear = checked_linear(format, 256, "cuda")
            for num_tokens in (1, 37):
                linear(torch.randn(1, num_tokens, 256, device="cuda", dtype=torch.bfloat16))
    torch.cuda.synchronize()


@contextlib.contextmanager
def _peaks(device: str) -> Any:
    """Yield a dict that holds the GPU's peaks after the context: allocated memory, memory in use by
    some stream, and reserved memory.

    `max_memory_allocated` alone does not see memory that waits for another stream.
    """
    peaks: dict[str, int] = {}
    if device == "cpu":
        yield peaks
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield peaks
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    for kind in ("allocated", "active", "reserved"):
        peaks[f"{kind}_bytes"] = stats[f"{kind}_bytes.all.peak"]


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
