"""Where the parts of a 16-bit pipeline are while it runs: all on the device, one model at a time, or one block.

`lean` does not use diffusers' group offload to disk, which loads the whole model first and, in a pipeline, writes both
experts under the same file names. It reads each block from the expert's own files when the block runs.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import transformers
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from torch import nn

from tempoquant.engines.memory import free_memory
from tempoquant.errors import ModelError, SettingsError
from tempoquant.integrations.cpu_threads import suited_threads
from tempoquant.integrations.expert_weights import EXPERT_COMPONENTS, ExpertWeights
from tempoquant.integrations.pipeline_folder import check_pipeline_folder, components_of
from tempoquant.integrations.wan import LOADING_ERRORS, compute_dtype, require_complete
from tempoquant.timesteps import Expert

if TYPE_CHECKING:
    from tempoquant.integrations.lora import LoraSum

Memory = Literal["resident", "swap", "lean"]
MEMORY_MODES: tuple[Memory, ...] = get_args(Memory)
MAX_TOKENS = 512  # of a text, as the pipeline's own default


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline that can run.

    Attributes:
        pipeline: without a text encoder where texts are encoded already.
        embeddings: text to (1, tokens, features), of the texts that were encoded ahead; else empty.
    """

    pipeline: WanImageToVideoPipeline
    embeddings: Mapping[str, torch.Tensor]

    def texts(self, prompt: str, negative_prompt: str = "") -> dict[str, Any]:
        """The pipeline's arguments for a prompt."""
        if not self.embeddings:
            return {"prompt": prompt, "negative_prompt": negative_prompt}
        return {
            "prompt_embeds": self.embeddings[prompt],
            "negative_prompt_embeds": self.embeddings[negative_prompt],
        }


def check_memory(memory: str, device: str) -> None:
    """Raise SettingsError for a mode that does not exist, or not on this device."""
    if memory not in MEMORY_MODES:
        raise SettingsError(f"memory is one of {', '.join(MEMORY_MODES)}, not {memory!r}.")
    if memory == "swap" and torch.device(device).type == "cpu":
        raise SettingsError(
            "--memory swap keeps models in the computer's memory while the GPU runs others, and there is no GPU here: "
            "choose resident or lean."
        )


@contextlib.contextmanager
def loaded_pipeline(
    folder: Path,
    device: str,
    memory: Memory = "resident",
    texts: Sequence[str] = (),
    loras: Mapping[Expert, "LoraSum"] | None = None,
) -> Iterator[LoadedPipeline]:
    """A 16-bit pipeline within this context. Once nobody refers to it any more, `free_memory` gives its memory back.

    Args:
        folder: of the pipeline.
        device: where it computes.
        memory: "resident" holds everything on the device; "swap" holds everything in RAM and one model on the GPU;
            "lean" encodes the texts first, lets go of the encoder, and holds one block of one expert.
        texts: what `LoadedPipeline.texts` will be asked for, both prompts and negative prompts; used by "lean" only.
        loras: added to the experts' weights.

    Raises:
        ModelError: the folder is no such pipeline, lacks a weight, or would need unpickling.
        SettingsError: "swap" without a GPU.
    """
    check_memory(memory, device)
    check_pipeline_folder(folder)
    dtype = compute_dtype(device)
    where = device if memory != "swap" else "cpu"
    weights = {e: ExpertWeights(folder, e, dtype, where, (loras or {}).get(e)) for e in EXPERT_COMPONENTS}
    embeddings: dict[str, torch.Tensor] = {}
    if memory == "lean":
        embeddings = encode_texts(folder, texts, device)
        experts = lean_experts(weights)
        pipeline = load_parts(folder, dtype, text_encoder=None, tokenizer=None, **experts)
        pipeline.vae.to(device)  # pipeline.to would move the experts, which are nowhere
        pipeline.lean_device = torch.device(device)
    else:
        experts = {EXPERT_COMPONENTS[expert]: _whole_expert(each) for expert, each in weights.items()}
        # In its stored dtype, as `lean` has it: which mode recorded a sample must not show in it.
        pipeline = load_parts(folder, dtype, text_encoder=load_text_encoder(folder), **experts)
        if memory == "swap":
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
    try:
        with suited_threads(folder, device):
            yield LoadedPipeline(pipeline, embeddings)
    finally:
        if memory == "swap":
            pipeline.remove_all_hooks()


@contextlib.contextmanager
def loaded_autoencoder(folder: Path, device: str) -> Iterator[WanImageToVideoPipeline]:
    """A pipeline that has its autoencoder and its scheduler only: enough to prepare latents. Raises ModelError."""
    parts = dict.fromkeys(("text_encoder", "tokenizer", "transformer", "transformer_2"))
    pipeline = load_parts(folder, compute_dtype(device), **parts).to(device)
    yield pipeline


def load_parts(folder: Path, dtype: torch.dtype, **parts: nn.Module | None) -> WanImageToVideoPipeline:
    """A pipeline on the CPU in which some components are given, or left out as None; the others are loaded.

    Raises:
        ModelError: one does not load, or lacks a weight.
    """
    try:
        pipeline = _Pipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True, **parts)
    except LOADING_ERRORS as error:
        raise ModelError(f"{folder} does not load as a WanImageToVideoPipeline: {error}") from error
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name not in parts:
            require_complete(component, folder / name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _Pipeline(WanImageToVideoPipeline):
    """Can be told where it computes: experts whose weights come and go have no device to ask for."""

    lean_device: torch.device | None = None

    @property
    def _execution_device(self) -> torch.device:
        return self.lean_device or super()._execution_device


def load_text_encoder(folder: Path) -> Any:
    """The text encoder on the CPU, in the dtype it is stored in. Raises ModelError."""
    components = components_of(folder)
    if "text_encoder" not in components:
        raise ModelError(f"{folder} names no text_encoder in its model_index.json: fetch the model again.")
    _, class_name = components["text_encoder"]
    try:
        encoder = getattr(transformers, class_name).from_pretrained(
            folder / "text_encoder", dtype="auto", use_safetensors=True, local_files_only=True
        )
    except LOADING_ERRORS as error:
        raise ModelError(f"{folder / 'text_encoder'} does not load as a {class_name}: {error}") from error
    require_complete(encoder, folder / "text_encoder")
    return encoder


@torch.no_grad()
def encode_texts(folder: Path, texts: Sequence[str], device: str) -> dict[str, torch.Tensor]:
    """Each text's embedding, (1, 512, features), on the device, in the dtype the encoder is stored in.

    Nothing but the text encoder is in memory meanwhile, and it is gone afterwards.
    """
    encoder = load_text_encoder(folder)
    parts = {"text_encoder": encoder, "vae": None, "transformer": None, "transformer_2": None}
    pipeline = load_parts(folder, encoder.dtype, **parts).to(device)
    embeddings = {}
    for text in dict.fromkeys(texts):
        embeddings[text], _ = pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS, device=torch.device(device)
        )
    del pipeline, encoder, parts
    free_memory()
    return embeddings


def _whole_expert(weights: ExpertWeights) -> WanTransformer3DModel:
    """An expert with all its weights, on its device."""
    model = weights.empty_model()
    weights.fill(model, "")
    for index, block in enumerate(model.blocks):
        weights.fill(block, f"blocks.{index}.")
    return model


def lean_experts(weights: Mapping[Expert, ExpertWeights]) -> dict[str, WanTransformer3DModel]:
    """Experts that read what they need from their files: what lies outside the blocks while this expert and no other
    runs, each block while it runs.

    Returns:
        Component name to model. Its weights are on the meta device between calls.
    """
    models = {expert: _typed(each.empty_model(), each) for expert, each in weights.items()}
    running: list[Expert] = []

    def begin(expert: Expert) -> None:
        if running == [expert]:
            return
        for other in running:
            weights[other].release(models[other], "")
        weights[expert].fill(models[expert], "")
        running[:] = [expert]

    for expert, model in models.items():
        model.register_forward_pre_hook(lambda *_, expert=expert: begin(expert))
        for index, block in enumerate(model.blocks):
            prefix = f"blocks.{index}."
            block.register_forward_pre_hook(lambda b, _, w=weights[expert], prefix=prefix: w.fill(b, prefix))
            block.register_forward_hook(
                lambda b, _args, _output, w=weights[expert], prefix=prefix: w.release(b, prefix), always_call=True
            )
    return {EXPERT_COMPONENTS[expert]: model for expert, model in models.items()}


def _typed(model: WanTransformer3DModel, weights: ExpertWeights) -> WanTransformer3DModel:
    """The pipeline asks an expert for its dtype before any weight is read."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(weights.dtype_of(name))
    return model
