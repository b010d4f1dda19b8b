"""The work of one denoiser call by part, for a GPU: in 16 bits or in four, eager or compiled,
attention in fewer bits.

One trace of the 16-bit denoiser at the video's size serves all: linears that get four bits are
replaced by their kernels' stages, attention by that of another kernel, and the rest by what
compiling can save at best.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.kernels.dispatch import backend_at
from tempoquant.models.pipeline_configs import PipelineConfigs
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.planning.generation_memory import empty_denoiser
from tempoquant.planning.gpus import Gpu, Operand
from tempoquant.planning.linear_stages import Size, multiplying, quantizing_input
from tempoquant.planning.traced_work import Traced, fused_bytes, trace
from tempoquant.planning.work import Work

LINEARS, SELF, CROSS, ELEMENTWISE, OUTSIDE = (
    "linears",
    "self-attention",
    "cross-attention",
    "elementwise",
    "outside the blocks",
)
CALL_PARTS = (LINEARS, SELF, CROSS, ELEMENTWISE, OUTSIDE)
"""Of a call. Linears are all products of blocks but attention; what is outside of them is skipped
by no cache.
"""

_PART_OF_KIND = {
    "linear": LINEARS,
    "product": LINEARS,
    "self-attention": SELF,
    "cross-attention": CROSS,
    "other": ELEMENTWISE,
}

Works = dict[str, list[Work]]
"""By part."""


@dataclass(frozen=True)
class TracedDenoiser:
    """The computation of a 16-bit denoiser in one call.

    Attributes:
        found: its operations.
        fused: bytes of each, where neighbours run as one kernel.
        blocks: of each operation the block it lies in, or None.
        calls_in_chunks: of a linear, by its name in a block: how often it is called where blocks
            compute in chunks.
    """

    found: tuple[Traced, ...]
    fused: tuple[int, ...]
    blocks: tuple[str | None, ...]
    calls_in_chunks: Mapping[str, int]


@dataclass(frozen=True)
class CallSettings:
    """The settings of a call's computation.

    Attributes:
        layers: the 4-bit linears by name; none in 16 bits.
        attention: what QKᵀ and PV multiply.
        is_compiled: whether neighbours that are no products run as one kernel.
        in_chunks: whether blocks compute a chunk of tokens at a time.
        shares_inputs: whether 4-bit linears that read one tensor quantize it once.
    """

    layers: Mapping[str, LayerEntry]
    attention: tuple[Operand, Operand] = ("bf16", "bf16")
    is_compiled: bool = False
    in_chunks: bool = False
    shares_inputs: bool = True


def trace_denoiser(configs: PipelineConfigs, denoiser: str, size: SamplingSettings) -> TracedDenoiser:
    """Trace one call of a whole denoiser at the size of a video. Raises ModelError."""
    family = configs.family
    model = empty_denoiser(configs, denoiser)
    inputs = _inputs(configs, denoiser, size)
    found = trace(model, lambda: family.trace(model, inputs))
    blocks = tuple(family.block_of(each.module) for each in found)
    return TracedDenoiser(tuple(found), tuple(fused_bytes(found)), blocks, _calls_in_chunks(configs, denoiser, size))


def works_of_call(traced: TracedDenoiser, settings: CallSettings, gpu: Gpu) -> Works:
    """Return the work of a call by part; operations that are alike are one Work."""
    works: dict[str, Counter[Work]] = {part: Counter() for part in CALL_PARTS}
    quantized: set[tuple[str | None, int]] = set()
    for each, fused, block in zip(traced.found, traced.fused, traced.blocks, strict=True):
        part = OUTSIDE if block is None else _PART_OF_KIND[each.kind]
        entry = settings.layers.get(each.module) if each.kind == "linear" else None
        if entry is not None:
            is_first = not settings.shares_inputs or (block, each.input) not in quantized
            if not entry.weights_alone:
                quantized.add((block, each.input))
            works[part].update(_four_bits(each, entry, gpu, is_first, _num_calls(traced, settings, each, block)))
        elif each.kind in ("self-attention", "cross-attention") and block is not None:
            works[part][_attention(each, settings.attention)] += 1
        else:
            num_bytes = fused if settings.is_compiled else each.num_bytes
            plain = Work.moving(num_bytes) if each.operand is None else product_of(each)
            works[part][plain] += 1
    return {part: [work.repeated(times) for work, times in found.items()] for part, found in works.items()}


def product_of(each: Traced) -> Work:
    """Return an operation that multiplies, as work."""
    assert each.operand is not None
    return Work.of(each.operand, each.operations, each.num_bytes)


def _four_bits(each: Traced, entry: LayerEntry, gpu: Gpu, is_first: bool, num_calls: int) -> Iterable[Work]:
    """Return the stages of a linear; those that read one tensor have it quantized once."""
    backend = backend_at(gpu.capability, entry.format)
    rows, inner, outer = each.shape
    size = Size(rows / num_calls, inner, outer)
    stages = [*(quantizing_input(entry, size, backend) if is_first else []), *multiplying(entry, size, backend)]
    return stages * num_calls


def _num_calls(traced: TracedDenoiser, settings: CallSettings, each: Traced, block: str | None) -> int:
    return traced.calls_in_chunks.get(each.module.removeprefix(f"{block}."), 1) if settings.in_chunks else 1


def _attention(each: Traced, products: tuple[Operand, Operand]) -> Work:
    """Return one kernel's work: QKᵀ is half of its products, PV the other half."""
    halves: dict[Operand, float] = {}
    for operand in products:
        halves[operand] = halves.get(operand, 0.0) + each.operations / 2
    return Work(tuple(halves.items()), each.num_bytes)


def _inputs(configs: PipelineConfigs, denoiser: str, size: SamplingSettings) -> dict[str, Any]:
    shape = configs.geometry.latents(size.height, size.width, size.num_frames)
    return configs.family.example_inputs(configs.index, configs.denoiser(denoiser).config, shape)


class _Counted(nn.Module):
    """A linear that counts its calls and allocates its answer."""

    def __init__(self, name: str, linear: nn.Linear, counts: Counter[str]) -> None:
        super().__init__()
        self._name, self._out_features, self._counts = name, linear.out_features, counts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._counts[self._name] += 1
        return x.new_empty((*x.shape[:-1], self._out_features))


@torch.no_grad()
def _calls_in_chunks(configs: PipelineConfigs, denoiser: str, size: SamplingSettings) -> dict[str, int]:
    """Count the calls of each linear of a block, by its name in it; none where the family has no
    chunks.
    """
    family = configs.family
    if family.chunk_blocks is None:
        return {}
    model = empty_denoiser(configs, denoiser, num_blocks=1)
    block = family.blocks_of(model)[0]
    counts: Counter[str] = Counter()
    linears = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    for name, linear in linears.items():
        if family.block_of(name) == block:
            model.set_submodule(name, _Counted(name.removeprefix(f"{block}."), linear, counts))
    family.chunk_blocks(model)
    family.trace(model, _inputs(configs, denoiser, size))
    return dict(counts)
