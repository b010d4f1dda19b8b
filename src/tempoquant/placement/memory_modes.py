"""Memory modes: which part of a pipeline is on the device at which time of a generation.

There are four, fast to frugal; docs/memory.md has their peaks. All of them stream the text encoder
through the device block by block, keep the autoencoder there only while it works and in tiles, its
video in host memory, and compute blocks in chunks of tokens or in one piece. They differ in the
denoisers: *resident* keeps both on the device, *swap* the running one, *lean* the running block and
the next; *disk* reads the running block from its file, so that RAM holds no denoiser either.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import accelerate
import torch
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import nn

from tempoquant.device import compute_dtype, default_device
from tempoquant.errors import SettingsError, UnsupportedError
from tempoquant.hosts.diffusers.modular import is_modular
from tempoquant.hosts.diffusers.pipeline import load_pipeline, told_its_device
from tempoquant.hosts.text_encoders import is_quantized
from tempoquant.models.families import PipelineFacts, facts_of
from tempoquant.models.hooks import OFFLOADING, OFFLOADING_HOOKS, own_forward
from tempoquant.models.host_timesteps import HostTimesteps
from tempoquant.models.source import SourceModel
from tempoquant.placement.compiled_blocks import refuse_compiled
from tempoquant.placement.denoiser_swap import DenoiserSwap, Placed, next_denoiser, parts_of, requiring_same_weights
from tempoquant.placement.disk_denoisers import DiskDenoisers
from tempoquant.placement.disk_mode import refuse_other_than_loaded, refusing_changes, weights_on_disk, without_weights
from tempoquant.placement.host_copies import PinnedSlabs, SideStream, stream_blocks
from tempoquant.placement.lifted_verbs import DENOISER_VERBS, PIPELINE_VERBS, lift_for
from tempoquant.placement.modes import MEMORY_MODES, Memory
from tempoquant.placement.one_at_a_time import Turn, one_at_a_time
from tempoquant.placement.quantized_encoder import stream_quantized_blocks
from tempoquant.placement.tiles import use_tiles

_ATTRIBUTE = "_tempoquant_memory_mode"


class MemoryMode:
    """A memory mode in force on a pipeline.

    Attributes:
        mode: "resident", "swap", "lean" or "disk".
        in_chunks: whether blocks compute a chunk of tokens at a time.
        swap: the denoisers that take turns; None except in "swap".
    """

    def __init__(self, pipeline: Any, mode: Memory, device: torch.device, in_chunks: bool) -> None:
        self.mode, self.in_chunks = mode, in_chunks
        self.swap: DenoiserSwap | None = None
        self._pipeline, self._device, self._facts = pipeline, device, facts_of(pipeline)
        self._undo, self._verbs = ExitStack(), ExitStack()
        self._is_lifted = False
        self._set()
        lifted = refusing_changes if mode == "disk" else self._lifted
        self._verbs.push(lift_for(pipeline, PIPELINE_VERBS, lifted))
        for denoiser in self._facts.denoisers:
            self._verbs.push(lift_for(getattr(pipeline, denoiser.component), DENOISER_VERBS, lifted))

    def remove(self) -> None:
        """Restore a plain pipeline without hooks: in "disk" denoisers then have no weights."""
        self._verbs.close()
        self._undo.close()

    @contextlib.contextmanager
    def _lifted(self) -> Iterator[None]:
        """Suspend the mode within this context: the pipeline is plain, as after `remove`."""
        if self._is_lifted:  # one method calls another
            yield
            return
        self._is_lifted = True
        self._undo.close()
        try:
            yield
        finally:
            self._is_lifted = False
            self._set()

    def _set(self) -> None:
        pipeline, device, family = self._pipeline, self._device, self._facts.family
        denoisers = {each.name: Placed.of(family, getattr(pipeline, each.component)) for each in self._facts.denoisers}
        for placed in denoisers.values():
            refuse_compiled(self.mode, placed.model, placed.blocks)
        with ExitStack() as undo:  # if the rest fails, this is undone
            stream = SideStream(device)
            # Others are told by the hooks of their models, these by their weights: a modular
            # pipeline's first model's.
            if is_modular(pipeline) or self.mode == "disk":
                undo.callback(_tell_device(pipeline, device))
            if self.in_chunks and family.chunk_blocks is not None:
                for placed in denoisers.values():
                    undo.callback(family.chunk_blocks(placed.model))
            encoder = getattr(pipeline, family.text_encoder) if family.text_encoder_blocks else None
            if encoder is not None:
                embedding = encoder.get_input_embeddings().weight
                blocks = encoder.get_submodule(family.text_encoder_blocks)
                called = encoder.get_submodule(family.text_encoder_called)
                streamed = stream_quantized_blocks if is_quantized(encoder) else stream_blocks
                undo.callback(streamed(called, list(blocks), embedding, stream))
            models = [each.model for each in denoisers.values()]
            if (autoencoder := getattr(pipeline, family.autoencoder)) is not None:
                undo.callback(_use_autoencoder(autoencoder, models, device))
            for name in (family.image_encoder, *family.brief_components):
                if (component := getattr(pipeline, name, None)) is not None:
                    undo.callback(_use_briefly(component, models, device))
            undo.callback(self._place(pipeline, denoisers, stream))
            models += [] if encoder is None else [encoder]
            coding = [] if autoencoder is None else [(autoencoder, verb) for verb in ("encode", "decode")]
            undo.push(one_at_a_time(Turn(), models, coding))
            self._undo = undo.pop_all()

    def _place(self, pipeline: Any, denoisers: dict[str, Placed], stream: SideStream) -> Callable[[], None]:
        if self.mode == "swap":
            timesteps = HostTimesteps(pipeline, self._facts.family)
            foresee = _foreseeing(pipeline, self._facts, timesteps)
            self.swap = DenoiserSwap(denoisers, stream, foresee, timesteps.of)
            return self.swap.remove
        if self.mode == "lean":
            return _offload_blocks(denoisers, stream.device)
        if self.mode == "disk":
            models = {name: placed.model for name, placed in denoisers.items()}
            return DiskDenoisers(weights_on_disk(pipeline), models, ahead=True).remove
        for placed in denoisers.values():
            placed.model.to(stream.device)
        return lambda: None


def set_memory_mode(
    pipeline: Any,
    mode: Memory = "resident",
    device: str | torch.device | None = None,
    in_chunks: bool = True,
) -> MemoryMode:
    """Set which part of a pipeline is on the device at which time. Call it instead of
    `pipeline.to(device)`.

    Args:
        pipeline: of a family that TempoQuant knows, 16-bit or quantized, best still on the CPU.
        mode: "resident": all denoisers stay on the device; the fastest. "swap": the running
            denoiser, the other one in page-locked host memory; they change places while the first
            one's last call still runs. "lean": the running block and the next. ("disk" is a mode to
            load a pipeline in: `load_pipeline`.)
        device: the compute device; by default CUDA if there is a GPU.
        in_chunks: whether blocks compute a chunk of tokens at a time, if the family has chunks:
            less than half of the activations, and slower. `tempoquant plan` gives the memory of
            both.

    Returns:
        The mode, whose `remove()` ends it. Setting another one also ends it.

    Raises:
        SettingsError: there is no such mode.
        UnsupportedError: other hooks already place the pipeline's models, its class is another one,
            or it was loaded in "disk" for another device.
    """
    if mode not in MEMORY_MODES:
        raise SettingsError(f"memory is one of {', '.join(MEMORY_MODES)}, not {mode!r}.")
    on = torch.device(device or default_device())
    refuse_other_than_loaded(pipeline, mode, on)
    remove_memory_mode(pipeline)
    _check(pipeline)
    in_force = MemoryMode(pipeline, mode, on, in_chunks)
    setattr(pipeline, _ATTRIBUTE, in_force)
    return in_force


def remove_memory_mode(pipeline: Any) -> None:
    """Remove the memory mode of a pipeline, if any."""
    if (in_force := getattr(pipeline, _ATTRIBUTE, None)) is not None:
        in_force.remove()
        setattr(pipeline, _ATTRIBUTE, None)


def load_in_mode(source: SourceModel, mode: Memory, device: str, in_chunks: bool = True) -> Any:
    """Load a pipeline to the CPU, in the compute dtype of the device, and set its memory mode.

    Raises as `load_pipeline` and `set_memory_mode` do.
    """
    if mode == "disk":
        pipeline = without_weights(source, device)
    else:
        pipeline = load_pipeline(source, "cpu", compute_dtype(device))
    set_memory_mode(pipeline, mode, device, in_chunks)
    return pipeline


def _check(pipeline: Any) -> None:
    facts_of(pipeline)  # refuses what no family covers, and a pipeline without its denoisers
    models = [model for model in pipeline.components.values() if isinstance(model, nn.Module)]
    offloaded = any(_group_offloaded(module) for model in models for module in model.modules())
    if offloaded or any(hasattr(model, "_hf_hook") for model in models) or pipeline.hf_device_map is not None:
        raise UnsupportedError(
            "other hooks place this pipeline's models already (a device map, CPU or group offloading): load the "
            "pipeline without them, or call its remove_all_hooks(), and set the memory mode instead."
        )


def _group_offloaded(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook(OFFLOADING) is not None


def _foreseeing(
    pipeline: Any, facts: PipelineFacts, timesteps: HostTimesteps
) -> Callable[[str, float, int], str | None]:
    """Return the prediction of the next denoiser, by the scheduler and guidance at each call."""

    def foresee(denoiser: str, timestep: float, num_calls: int) -> str | None:
        schedule = timesteps.schedule()
        guidance_scale = getattr(pipeline, "_guidance_scale", None)  # which no pipeline has before its first call
        if not schedule or guidance_scale is None:
            return denoiser
        num_branches = 2 if pipeline.do_classifier_free_guidance else 1
        follows = next_denoiser(schedule, facts.denoisers, num_branches)
        return follows(denoiser, timestep, num_calls)

    return foresee


def _use_autoencoder(vae: Any, denoisers: Sequence[nn.Module], device: torch.device) -> Callable[[], None]:
    """Let the autoencoder work in tiles, on the device only while it works."""
    back = use_tiles(vae)
    # Tiles, their blending, and the whole video: ten times the size of a tile at work.
    to_host = vae.decoder.register_forward_hook(lambda _module, _args, decoded: decoded.cpu())
    release = _use_briefly(vae, denoisers, device)

    def undo() -> None:
        to_host.remove()
        release()
        back()

    return undo


def _use_briefly(model: Any, denoisers: Sequence[nn.Module], device: torch.device) -> Callable[[], None]:
    """Keep a model on the device from its call until a denoiser's."""
    _, offload = accelerate.cpu_offload_with_hook(model, device)
    handles = [denoiser.register_forward_pre_hook(lambda *_: offload.offload()) for denoiser in denoisers]

    def undo() -> None:
        for handle in handles:
            handle.remove()
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        own_forward(model)
        model.to("cpu")

    return undo


def _tell_device(pipeline: Any, device: torch.device) -> Callable[[], None]:
    """Make a pipeline compute on a device, wherever the weights of its models are."""
    own: Any = type(pipeline)
    pipeline.__class__ = told_its_device(own)
    pipeline.stated_device = device

    def undo() -> None:
        pipeline.__class__ = own

    return undo


def _offload_blocks(denoisers: dict[str, Placed], device: torch.device) -> Callable[[], None]:
    """Offload blocks to RAM by diffusers, whose offloading to disk mixes up two denoisers'
    files.
    """
    streams = device.type == "cuda"
    handles = [
        placed.model.register_forward_pre_hook(requiring_same_weights(name, placed.model))
        for name, placed in denoisers.items()
    ]
    for placed in denoisers.values():
        if streams:  # otherwise it page-locks each tensor by itself
            slabs = PinnedSlabs()
            for tensor in itertools.chain.from_iterable(parts_of(placed)):
                tensor.data = slabs.hold(tensor.data)
        apply_group_offloading(
            placed.model, onload_device=device, offload_device=torch.device("cpu"), offload_type="block_level",
            num_blocks_per_group=1, use_stream=streams, record_stream=streams,
        )  # fmt: skip

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for model in (placed.model for placed in denoisers.values()):
            registry = HookRegistry.check_if_exists_or_initialize(model)
            for name in OFFLOADING_HOOKS:
                registry.remove_hook(name, recurse=True)
            for module in model.modules():
                own_forward(module)
            model.to("cpu")

    return undo
