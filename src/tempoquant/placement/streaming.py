"""The places of a 16-bit pipeline's parts while it records: all on the device, one model at a time,
or on disk.

`disk` does not use diffusers' group offload to disk, which loads the whole model first and, in a
pipeline, writes all denoisers under the same file names. It reads each block from the denoiser's
own files when the block runs.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tempoquant.device import compute_dtype, free_memory
from tempoquant.errors import SettingsError
from tempoquant.hosts.diffusers.pipeline import from_pretrained, load_component, pipeline_class, told_its_device
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.placement.cpu_threads import suited_threads
from tempoquant.placement.disk_denoisers import DiskDenoisers, typed_model
from tempoquant.placement.modes import RECORDING_MODES, RecordingMemory

if TYPE_CHECKING:
    from tempoquant.models.lora.lora import LoraSum


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline that can run.

    Attributes:
        pipeline: without a text encoder if texts are encoded already.
        embeddings: text to the pipeline's arguments in its place, for texts encoded ahead; else
            empty.
    """

    pipeline: Any
    embeddings: Mapping[str, Mapping[str, torch.Tensor]]

    def texts(self, prompt: str, negative_prompt: str = "") -> dict[str, Any]:
        """Return the pipeline's arguments for a prompt."""
        if not self.embeddings:
            return {"prompt": prompt, "negative_prompt": negative_prompt}
        negative = {f"negative_{name}": tensor for name, tensor in self.embeddings[negative_prompt].items()}
        return {**self.embeddings[prompt], **negative}


def check_memory(memory: str, device: str) -> None:
    """Raise SettingsError for a mode that recording does not have, or not on this device."""
    if memory == "lean":
        raise SettingsError("lean is a mode of generating: choose disk, which reads each block from its file.")
    if memory not in RECORDING_MODES:
        raise SettingsError(f"memory is one of {', '.join(RECORDING_MODES)} while recording, not {memory!r}.")
    if memory == "swap" and torch.device(device).type == "cpu":
        raise SettingsError(
            "--memory swap keeps models in the computer's memory while the GPU runs others, and there is no GPU here: "
            "choose resident or disk."
        )


@contextlib.contextmanager
def loaded_pipeline(
    source: SourceModel,
    device: str,
    memory: RecordingMemory = "resident",
    texts: Sequence[str] = (),
    loras: Mapping[str, "LoraSum"] | None = None,
) -> Iterator[LoadedPipeline]:
    """Load a 16-bit pipeline within this context. Once nothing refers to it, `free_memory` frees
    its memory.

    Args:
        source: the pipeline.
        device: where it computes.
        memory: "resident" holds everything on the device; "swap" holds everything in RAM and one
            model on the GPU; "disk" encodes the texts first, releases the encoder, and reads each
            block from its file when it runs.
        texts: the texts for `LoadedPipeline.texts`, prompts and negative prompts; used by "disk"
            only.
        loras: added to the denoisers' weights.

    Raises:
        ModelError: the pipeline lacks a weight, or does not load.
        SettingsError: "swap" without a GPU.
    """
    check_memory(memory, device)
    if memory == "swap" and source.index.is_modular:
        raise SettingsError(
            f"a {source.index.class_name} has no hooks that swap its models: choose resident or disk to record with."
        )
    dtype = compute_dtype(device)
    where = device if memory != "swap" else "cpu"
    weights = {
        name: DenoiserWeights(source, name, dtype, where, (loras or {}).get(name)) for name in source.denoiser_names
    }
    components = {name: source.denoiser(name).component for name in weights}
    embeddings: dict[str, dict[str, torch.Tensor]] = {}
    if memory == "disk":
        embeddings = encode_texts(source, texts, device)
        denoisers = {components[name]: model for name, model in denoisers_on_disk(weights).items()}
        pipeline = _load(source, dtype, {**dict.fromkeys(source.text_components), **denoisers})
        family = source.family
        for name in (family.autoencoder, family.image_encoder, *family.brief_components):
            if (model := getattr(pipeline, name, None)) is not None:
                model.to(device)  # pipeline.to would move the denoisers, which are nowhere
        pipeline.stated_device = torch.device(device)
    else:
        denoisers = {components[name]: each.whole_model() for name, each in weights.items()}
        # In its stored dtype, as in `disk`: the mode must not affect a recorded sample.
        pipeline = _load(source, dtype, {**load_text_encoders(source), **denoisers})
        if memory == "swap":
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
    try:
        with suited_threads(source, device):
            yield LoadedPipeline(pipeline, embeddings)
    finally:
        if memory == "swap":
            pipeline.remove_all_hooks()


@contextlib.contextmanager
def loaded_autoencoder(source: SourceModel, device: str) -> Iterator[Any]:
    """Load a pipeline with only its autoencoder and its scheduler, enough to prepare latents.
    Raises ModelError.
    """
    left_out = dict.fromkeys((*source.text_components, *source.denoiser_components))
    pipeline = _load(source, compute_dtype(device), left_out).to(device)
    yield pipeline


def _load(source: SourceModel, dtype: torch.dtype, components: Mapping[str, nn.Module | None]) -> Any:
    """Load a pipeline on the CPU with a settable compute device: denoisers whose weights come and
    go have none.
    """
    pipeline = from_pretrained(source, dtype, **components)
    pipeline.__class__ = told_its_device(pipeline_class(source))
    return pipeline


def load_text_encoders(source: SourceModel, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Load the text encoders by name, on the CPU, in their stored dtypes; given ones as they are.
    Raises ModelError.
    """
    components = {name: source.components[name] for name in source.text_components if name not in (given or {})}
    loaded = {name: load_component(each, "auto") for name, each in components.items() if each.has_weights}
    return {**loaded, **(given or {})}


@torch.no_grad()
def encode_texts(
    source: SourceModel, texts: Sequence[str], device: str, given: Mapping[str, Any] | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """Encode each text: return the pipeline's arguments in its place, on the device, in the
    encoders' stored dtypes.

    Only the text encoders are in memory meanwhile, and they are released afterwards.

    Args:
        given: models in place of the source's own encoders, by the component's name.
    """
    encoders, family = load_text_encoders(source, given), source.family
    left_out = [name for name in source.components if source.components[name].has_weights]
    stand_ins = {name: source.components[name].without_weights() for name in family.stand_ins}
    parts = {**dict.fromkeys(left_out), **stand_ins, **encoders}
    pipeline = _load(source, encoders[family.text_encoder].dtype, parts)
    for encoder in encoders.values():
        encoder.to(device)
    pipeline.stated_device = torch.device(device)
    embeddings = {
        text: family.encoded_text(pipeline, text, family.text_tokens, torch.device(device))
        for text in dict.fromkeys(texts)
    }
    del pipeline, encoders, parts
    free_memory()
    return embeddings


def denoisers_on_disk(weights: Mapping[str, DenoiserWeights]) -> dict[str, Any]:
    """Return denoisers that read from their files: the parts outside blocks while this denoiser
    runs, each block while it runs.

    Returns:
        Denoiser's name to model. Its weights are on the meta device between calls.
    """
    models = {name: typed_model(each) for name, each in weights.items()}
    DiskDenoisers(weights, models, ahead=False)
    return models
