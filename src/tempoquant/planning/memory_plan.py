"""The predicted memory of a generation, phase by phase, in each memory mode, without weights.

All are torch's own allocations. `OVERHEAD_BYTES` is reserved for a process's others: an assumption.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from tempoquant.kernels.dispatch import backend_at
from tempoquant.models.pipeline_configs import PipelineConfigs
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.placement.modes import MEMORY_MODES, Memory
from tempoquant.planning.generation_memory import (
    AutoencoderBytes,
    DenoiserBytes,
    Kernels,
    QuantizedLayers,
    TextEncoderBytes,
    autoencoder_bytes,
    denoiser_bytes,
    denoising_bytes,
    foreseen_layers,
    most_of,
    other_weight_bytes,
    text_encoder_bytes,
)
from tempoquant.planning.places import PLACES, Places
from tempoquant.recipe import Recipe

OVERHEAD_BYTES = 2**30
"""The reserve on a GPU for CUDA's context, the workspaces of its libraries, and fragmentation."""
HOST_OVERHEAD_BYTES = 3 * 2**30
"""RAM for the operating system, Python with its libraries, and CUDA's driver. An assumption."""

TEXT, IMAGE, BOUNDARY, VIDEO = "text encoding", "image encoding", "boundary", "video decoding"


@dataclass(frozen=True)
class Phase:
    """One phase of a generation on the device.

    Attributes:
        name: one of those above, or a result of `denoising_name`.
        weights: bytes of weights on the device at the phase's peak.
        activations: bytes of everything else.
    """

    name: str
    weights: int
    activations: int

    @property
    def peak(self) -> int:
        """Return the bytes on the device."""
        return self.weights + self.activations


@dataclass(frozen=True)
class ModePlan:
    """One memory mode of one model.

    Attributes:
        mode: "resident", "swap", "lean" or "disk".
        in_chunks: whether blocks compute a chunk of tokens at a time.
        phases: in order.
        host: the most bytes of RAM: all components, as they load or as they wait.
        places: of the denoisers: the page-locked part of RAM, and the copies.
    """

    mode: Memory
    in_chunks: bool
    phases: tuple[Phase, ...]
    host: int
    places: Places

    @property
    def pinned(self) -> int:
        """Return the bytes of RAM that are page-locked while generating."""
        return self.places.pinned

    @property
    def deciding(self) -> Phase:
        """Return the phase with the largest peak; the first of equal ones."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def peak(self) -> int:
        """Return the bytes on the device, over all phases."""
        return self.deciding.peak


@dataclass(frozen=True)
class ModelPlan:
    """All modes of a 16-bit or a quantized model.

    Attributes:
        label: "16-bit", or the recipe's name.
        disk: bytes of the model's weight files.
        modes: in chunks of tokens, if the family has them; the one with most on the device first.
        in_one_piece: the same modes with all tokens at once; `modes` itself without chunks.
    """

    label: str
    disk: int
    modes: tuple[ModePlan, ...]
    in_one_piece: tuple[ModePlan, ...]

    def fastest_within(self, device_bytes: float = math.inf, ram_bytes: float = math.inf) -> ModePlan | None:
        """Return the fastest mode whose peaks and the process's overhead fit a GPU and RAM, or
        None.

        "swap" copies each denoiser once a video, while another computes; chunks expand every 4-bit
        weight again for each chunk of each call. So "swap" in one piece comes before "resident" in
        chunks. Modes that copy weights in every call come last, and of these those that read files.
        """
        fitting = [
            mode
            for mode in (*self.in_one_piece, *self.modes)
            if mode.peak + OVERHEAD_BYTES <= device_bytes and mode.host + HOST_OVERHEAD_BYTES <= ram_bytes
        ]
        return min(fitting, key=_slowness, default=None)


def _slowness(mode: ModePlan) -> tuple[bool, bool, bool]:
    return any(mode.places.copied_each_call), mode.places.from_disk, mode.in_chunks


@dataclass(frozen=True)
class MemoryPlan:
    """The needs of a video of one size, in 16 bits and quantized.

    Attributes:
        model: as the user named it.
        size: of the video.
        sixteen_bit, quantized: with the same placement, tiles and chunks.
        kernels: by which the quantized model's linears are counted.
    """

    model: str
    size: SamplingSettings
    sixteen_bit: ModelPlan
    quantized: ModelPlan
    kernels: Kernels

    def reduction(self, mode: Memory) -> float:
        """Return the reduction of the quantized model's peak, as a share of the 16-bit one's."""
        peaks = [next(m.peak for m in model.modes if m.mode == mode) for model in (self.quantized, self.sixteen_bit)]
        return 1 - peaks[0] / peaks[1]


def plan_memory(
    configs: PipelineConfigs,
    size: SamplingSettings,
    recipe: Recipe,
    kernels: Kernels = "fp8",
    capability: tuple[int, int] | None = None,
) -> MemoryPlan:
    """Predict the peaks of every mode.

    Args:
        configs: of a 16-bit pipeline, or of a quantized one, whose own layers then count.
        size: of the video.
        recipe: the recipe for a 16-bit pipeline.
        kernels: how 4-bit linears compute.
        capability: compute capability of the GPU, whose kernels are then counted instead.

    Raises:
        ModelError: a config describes no model of its class.
        RecipeError: the recipe does not fit the model.
    """
    configs.geometry.require(size)
    others = OtherBytes(text_encoder_bytes(configs), autoencoder_bytes(configs, size), other_weight_bytes(configs))
    text = text_encoder_bytes(configs, configs.text_encoder_format if configs.quantized else recipe.text_encoder)
    layers = own_layers(configs)
    if not configs.quantized:
        layers = {name: foreseen_layers(configs, name, recipe) for name in layers}
    if capability is not None:
        entries = (entry for each in layers.values() if each is not None for entry in each.entries.values())
        kernels = most_of({backend_at(capability, entry.format).value for entry in entries})
    label = next((found.recipe.name for found in configs.quantized.values()), recipe.name)
    return MemoryPlan(
        configs.name,
        size,
        _model_plan("16-bit", configs, dict.fromkeys(layers), others, size, kernels),
        _model_plan(label, configs, layers, others._replace(text=text), size, kernels),
        kernels,
    )


class OtherBytes(NamedTuple):
    """Bytes of the models that are not quantized.

    Attributes:
        text, autoencoder: of these.
        weights: of the image encoder and of other briefly used models, by the component's name.
    """

    text: TextEncoderBytes
    autoencoder: AutoencoderBytes
    weights: Mapping[str, int]


def _model_plan(
    label: str,
    configs: PipelineConfigs,
    layers: Mapping[str, QuantizedLayers | None],
    others: OtherBytes,
    size: SamplingSettings,
    kernels: Kernels,
) -> ModelPlan:
    text, vae, weights = others
    image = weights.get(configs.family.image_encoder, 0)
    brief = sum(weights.values()) - image  # beside the text encoder, or beside the autoencoder: counted with both
    denoisers = {name: denoiser_bytes(configs, name, each) for name, each in layers.items()}
    family = configs.family
    on_disk = {family.text_encoder: text.weights, family.autoencoder: vae.weights, **weights}
    files = configs.disk_bytes if any(layers.values()) == bool(configs.quantized) else {}  # they are of one kind
    for denoiser in configs.denoisers:
        on_disk[denoiser.component] = denoisers[denoiser.name].total
        denoisers[denoiser.name] = replace(denoisers[denoiser.name], stored=files.get(denoiser.component))
    disk = sum(files.get(name, size) for name, size in on_disk.items())
    beside = text.weights + vae.weights + image + brief
    all_weights = beside + sum(each.total for each in denoisers.values())

    def plan_of(mode: Memory, in_chunks: bool, calls: Mapping[str, int]) -> ModePlan:
        places = PLACES[mode](list(denoisers.values()))
        away = places.away + vae.weights
        phases = (
            Phase(TEXT, away + text.on_device + brief, text.encoding),
            *([Phase(IMAGE, away + image, vae.encoding)] if family.takes_image(configs.index) else []),
            *_denoising(denoisers, places, calls),
            Phase(VIDEO, away + brief, vae.decoding),
        )
        # Page-locked copies replace the loaded weights one tensor at a time.
        host = max(all_weights if places.holds_all else 0, places.pinned + places.read_ahead + beside)
        return ModePlan(mode, in_chunks, phases, host, places)

    def plans(in_chunks: bool) -> tuple[ModePlan, ...]:
        calls = _calls(configs, layers, size, kernels, in_chunks)
        return tuple(plan_of(mode, in_chunks, calls) for mode in MEMORY_MODES)

    in_one_piece = plans(in_chunks=False)
    return ModelPlan(label, disk, in_one_piece if family.chunk_blocks is None else plans(in_chunks=True), in_one_piece)


def denoising_peak(
    configs: PipelineConfigs, size: SamplingSettings, mode: Memory, kernels: Kernels, in_chunks: bool
) -> int:
    """Return the most bytes on the device while a pipeline denoises, by its configs."""
    layers = own_layers(configs)
    denoisers = {name: denoiser_bytes(configs, name, each) for name, each in layers.items()}
    places = PLACES[mode](list(denoisers.values()))
    phases = _denoising(denoisers, places, _calls(configs, layers, size, kernels, in_chunks))
    return max(phase.peak for phase in phases)


def own_layers(configs: PipelineConfigs) -> dict[str, QuantizedLayers | None]:
    """Return the 4-bit layers of a pipeline, by denoiser; None for a denoiser in 16 bits."""
    found = {denoiser.name: configs.quantized.get(denoiser.name) for denoiser in configs.denoisers}
    return {
        name: None if each is None else QuantizedLayers(each.layers, each.bins.num_bins) for name, each in found.items()
    }


def _calls(
    configs: PipelineConfigs,
    layers: Mapping[str, QuantizedLayers | None],
    size: SamplingSettings,
    kernels: Kernels,
    in_chunks: bool,
) -> dict[str, int]:
    """Return the bytes of one call of each denoiser; equal ones are traced once."""
    found: dict[str, int] = {}
    for name, own in layers.items():
        alike = (
            found[other]
            for other in found
            if configs.denoiser(other) == configs.denoiser(name) and layers[other] == own
        )
        traced = next(alike, None)
        found[name] = denoising_bytes(configs, name, own, size, kernels, in_chunks) if traced is None else traced
    return found


def _denoising(denoisers: Mapping[str, DenoiserBytes], places: Places, calls: Mapping[str, int]) -> list[Phase]:
    """Return the phases between the first step and the last, with each change of denoisers."""
    names, phases = list(denoisers), []
    for index, name in enumerate(names):
        if index:
            both = max(calls[name], calls[names[index - 1]])
            phases.append(Phase(BOUNDARY, places.changing[index - 1], both))
        phases.append(Phase(denoising_name(name), places.running[index], calls[name]))
    return phases


def denoising_name(denoiser: str) -> str:
    """Name a denoiser's phase: "high-noise denoising", or "denoising" for a single one."""
    return f"{denoiser.replace('_', '-')} denoising" if denoiser.endswith("_noise") else "denoising"
