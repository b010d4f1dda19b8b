"""What a generation will need of a GPU and its host, phase by phase, in each memory mode, before any weight is there.

Everything is torch's own allocations. A process takes more: `OVERHEAD_BYTES` is set aside for that, an assumption and
no measurement.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tempoquant.integrations.generation_memory import (
    AutoencoderBytes,
    ExpertBytes,
    Kernels,
    QuantizedLayers,
    TextEncoderBytes,
    autoencoder_bytes,
    denoising_bytes,
    expert_bytes,
    foreseen_layers,
    text_encoder_bytes,
)
from tempoquant.integrations.pipeline_configs import PipelineConfigs
from tempoquant.integrations.residency import MEMORY_MODES, Memory
from tempoquant.integrations.sampling import SamplingSettings
from tempoquant.recipe import Recipe
from tempoquant.timesteps import Expert

OVERHEAD_BYTES = 2**30
"""Of a GPU: CUDA's context, the workspaces of its libraries, and what the allocator cannot use."""

TEXT, IMAGE, HIGH, BOUNDARY, LOW, VIDEO = (
    "text encoding", "image encoding", "high-noise denoising", "boundary", "low-noise denoising", "video decoding",
)  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """One phase of a generation on the device.

    Attributes:
        name: one of those above.
        weights: bytes of weights on the device at the phase's peak.
        activations: bytes of everything else.
    """

    name: str
    weights: int
    activations: int

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return self.weights + self.activations


@dataclass(frozen=True)
class ModePlan:
    """One memory mode of one model.

    Attributes:
        mode: "resident", "swap" or "lean".
        phases: in order.
        host: bytes of RAM at the most: all components, as they load or as they wait.
        pinned: bytes of it that are page-locked while generating.
    """

    mode: Memory
    phases: tuple[Phase, ...]
    host: int
    pinned: int

    @property
    def deciding(self) -> Phase:
        """The phase that takes the most; the first of those that take the same."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def peak(self) -> int:
        """Bytes on the device, over all phases."""
        return self.deciding.peak


@dataclass(frozen=True)
class ModelPlan:
    """All modes of a 16-bit or a quantized model.

    Attributes:
        label: "16-bit", or the recipe's name.
        disk: bytes of the model's weight files.
        modes: the fastest first.
    """

    label: str
    disk: int
    modes: tuple[ModePlan, ...]

    def fastest_within(self, device_bytes: float) -> ModePlan | None:
        """The fastest mode whose peak, and what a process takes beside it, fits a device; None when none does."""
        return next((mode for mode in self.modes if mode.peak + OVERHEAD_BYTES <= device_bytes), None)


@dataclass(frozen=True)
class MemoryPlan:
    """What a video of one size needs, in 16 bits and quantized.

    Attributes:
        model: as it was asked for.
        size: of the video.
        sixteen_bit, quantized: with the same placement, tiles and chunks.
    """

    model: str
    size: SamplingSettings
    sixteen_bit: ModelPlan
    quantized: ModelPlan

    def reduction(self, mode: Memory) -> float:
        """How much less the quantized model's peak is, as a share of the 16-bit one's in the same mode."""
        peaks = [next(m.peak for m in model.modes if m.mode == mode) for model in (self.quantized, self.sixteen_bit)]
        return 1 - peaks[0] / peaks[1]


def plan_memory(
    configs: PipelineConfigs, size: SamplingSettings, recipe: Recipe, kernels: Kernels = "fp8"
) -> MemoryPlan:
    """Predict the peaks of every mode.

    Args:
        configs: of a 16-bit pipeline, or of a quantized one, whose own layers are then taken.
        size: of the video.
        recipe: what a 16-bit pipeline would be quantized with.
        kernels: how 4-bit linears compute.

    Raises:
        ModelError: a config describes no model of its class.
        RecipeError: the recipe does not fit the model.
    """
    text, vae = text_encoder_bytes(configs.text_encoder), autoencoder_bytes(configs.vae, size)
    layers: dict[Expert, QuantizedLayers | None] = {}
    for expert, config in configs.experts.items():
        found = configs.quantized.get(expert)
        if found is not None:
            layers[expert] = QuantizedLayers(found.layers, found.bins.num_bins)
        else:
            layers[expert] = None if configs.quantized else foreseen_layers(config, expert, recipe)
    label = next((found.recipe.name for found in configs.quantized.values()), recipe.name)
    return MemoryPlan(
        configs.name,
        size,
        _model_plan("16-bit", configs, dict.fromkeys(Expert), (text, vae), size, kernels),
        _model_plan(label, configs, layers, (text, vae), size, kernels),
    )


def _model_plan(
    label: str,
    configs: PipelineConfigs,
    layers: Mapping[Expert, QuantizedLayers | None],
    others: tuple[TextEncoderBytes, AutoencoderBytes],
    size: SamplingSettings,
    kernels: Kernels,
) -> ModelPlan:
    text, vae = others
    experts = {e: expert_bytes(config, layers[e]) for e, config in configs.experts.items()}
    calls = _calls(configs, layers, size, kernels)
    on_disk = {"text_encoder": text.weights, "vae": vae.weights}
    is_given = any(layers.values()) == bool(configs.quantized)  # or else the files are of the other kind
    for expert, component in zip(Expert, ("transformer", "transformer_2"), strict=True):
        on_disk[component] = experts[expert].total
    disk = sum(configs.disk_bytes.get(name, size) if is_given else size for name, size in on_disk.items())
    all_weights = text.weights + vae.weights + sum(expert.total for expert in experts.values())
    modes = []
    for mode in MEMORY_MODES:
        away, high, boundary, low = _PLACES[mode](experts)
        phases = (
            Phase(TEXT, away + vae.weights + text.on_device, text.encoding),
            Phase(IMAGE, away + vae.weights, vae.encoding),
            Phase(HIGH, high, calls[Expert.HIGH_NOISE]),
            Phase(BOUNDARY, boundary, max(calls.values())),
            Phase(LOW, low, calls[Expert.LOW_NOISE]),
            Phase(VIDEO, away + vae.weights, vae.decoding),
        )
        pinned = 0 if mode == "resident" else sum(expert.pinned for expert in experts.values())
        # Page-locked copies take the places of the loaded weights one tensor at a time.
        host = max(all_weights, pinned + text.weights + vae.weights)
        modes.append(ModePlan(mode, phases, host, pinned))
    return ModelPlan(label, disk, tuple(modes))


def _calls(
    configs: PipelineConfigs, layers: Mapping[Expert, QuantizedLayers | None], size: SamplingSettings, kernels: Kernels
) -> dict[Expert, int]:
    """Of one call of each expert; traced once where both are alike, as they are in Wan2.2."""
    high, low = Expert
    first = denoising_bytes(configs.experts[high], layers[high], size, kernels)
    if configs.experts[high] == configs.experts[low] and layers[high] == layers[low]:
        return {high: first, low: first}
    return {high: first, low: denoising_bytes(configs.experts[low], layers[low], size, kernels)}


Places = tuple[int, int, int, int]
"""Bytes of experts on the device: while neither runs, while one does, while they change places, and with the other."""


def _resident(experts: Mapping[Expert, ExpertBytes]) -> Places:
    both = sum(expert.total for expert in experts.values())
    return both, both, both, both


def _swap(experts: Mapping[Expert, ExpertBytes]) -> Places:
    """Each part of the first leaves before its counterpart is brought: blocks in order, and last what is in none."""
    high, low = experts[Expert.HIGH_NOISE], experts[Expert.LOW_NOISE]
    there = most = high.total
    for leaving, coming in _counterparts([*high.blocks, high.rest], [*low.blocks, low.rest]):
        there += coming - leaving
        most = max(most, there)
    return 0, high.total, most, low.total


def _counterparts(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(first, second, strict=False))


def _lean(experts: Mapping[Expert, ExpertBytes]) -> Places:
    high, low = (expert.rest + _two_in_a_row(expert.blocks) for expert in experts.values())
    return 0, high, max(high, low), low


def _two_in_a_row(blocks: Sequence[int]) -> int:
    """The block that runs and the next, which is copied meanwhile."""
    return max(sum(pair) for pair in zip(blocks, [*blocks[1:], 0], strict=True))


_PLACES: Mapping[Memory, Callable[[Mapping[Expert, ExpertBytes]], Places]] = {
    "resident": _resident,
    "swap": _swap,
    "lean": _lean,
}
