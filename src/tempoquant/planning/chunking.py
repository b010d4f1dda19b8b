"""The choice whether a generation computes its blocks in chunks of tokens: only if memory requires
it.

Chunks hold less than half of a block's activations. They cost launches, and every 4-bit weight is
expanded again for each of them, so one piece is faster wherever it fits.
"""

from typing import NamedTuple

import torch

from tempoquant.kernels.dispatch import Backend, choose
from tempoquant.kernels.operators import eight_bit_backend
from tempoquant.models.pipeline_configs import PipelineConfigs, configs_of
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.source import SourceModel
from tempoquant.placement.modes import Memory
from tempoquant.planning.generation_memory import Kernels, most_of
from tempoquant.planning.memory_plan import OVERHEAD_BYTES, denoising_peak


class Chunking(NamedTuple):
    """The computation of blocks: in chunks or in one piece.

    Attributes:
        in_chunks: a chunk of tokens at a time, or all tokens in one piece.
        reason: a sentence for people.
    """

    in_chunks: bool
    reason: str


def choose_chunking(
    source: SourceModel,
    size: SamplingSettings,
    mode: Memory,
    device: str,
    asked: bool | None = None,
    has_eight_bits: bool = False,
) -> Chunking:
    """Decide how a pipeline that is about to be loaded computes its blocks.

    Args:
        source: the pipeline, quantized or not.
        size: of the video.
        mode: the memory mode that it will be in.
        device: the device whose free memory decides.
        asked: whether the user wants chunks; None to decide by memory.
        has_eight_bits: whether activations have eight bits at some timesteps.

    Returns:
        One piece if the predicted peak of denoising plus `OVERHEAD_BYTES` is free.

    Raises:
        ModelError: a config describes no model of its class.
    """
    if source.family.chunk_blocks is None:
        return Chunking(False, "in one piece: blocks of this model have no other way")
    if asked is not None:
        return Chunking(asked, f"{_HOW[asked]}: the user asked for it")
    if torch.device(device).type != "cuda":
        return Chunking(True, f"{_HOW[True]}: on a CPU they save memory, and there are no launches to save")
    free, _ = torch.cuda.mem_get_info(device)
    configs = configs_of(source)
    kernels = kernels_of(configs, device, has_eight_bits)
    return decide(denoising_peak(configs, size, mode, kernels, in_chunks=False), free)


def decide(peak: int, free: int) -> Chunking:
    """Choose one piece if its predicted peak plus the process's overhead are free; both are
    bytes.
    """
    needed, there = (f"{number / 2**30:.1f} GiB" for number in (peak + OVERHEAD_BYTES, free))
    if peak + OVERHEAD_BYTES <= free:
        return Chunking(False, f"{_HOW[False]}: predicted to take {needed}, and {there} of the GPU are free")
    return Chunking(True, f"{_HOW[True]}: one piece would take {needed} (predicted), and {there} of the GPU are free")


def kernels_of(configs: PipelineConfigs, device: str, has_eight_bits: bool = False) -> Kernels:
    """Return the kernels of a pipeline's 4-bit linears on a device; if they differ, those that take
    most.

    Args:
        has_eight_bits: whether activations have eight bits at some timesteps, which FP4 does not
            hold.
    """
    formats = {entry.format.name: entry.format for each in configs.quantized.values() for entry in each.layers.values()}
    names = set()
    for format in formats.values():
        backend = choose(torch.device(device), format).backend
        names.add(eight_bit_backend(format) if has_eight_bits and backend is Backend.FP4 else backend.value)
    return most_of(names)


_HOW = {True: "in chunks of tokens", False: "in one piece"}
