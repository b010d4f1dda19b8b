"""ModelFamily: everything true of one kind of model and of no other, in one value.

A new model is a new folder in `models/` with such a value, and a line in `families.py`. Everything
else asks the value.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.models.comfyui_layout import ComfyLayout
from tempoquant.models.geometry import LatentGeometry
from tempoquant.models.guidance import TWO_CALLS, Guidance
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.traced_text_encoder import PLAIN_ENCODER, TracedTextEncoder
from tempoquant.prompts import Prompt
from tempoquant.timesteps import Denoiser

Config = Mapping[str, Any]
"""A component's config.json."""


class PipelineIndex(NamedTuple):
    """A pipeline's model_index.json, or modular_model_index.json.

    Attributes:
        folder: its location.
        values: its whole content.
        components: name to (library, class name).
    """

    folder: Path
    values: Mapping[str, Any]
    components: Mapping[str, tuple[str, str]]

    @property
    def class_name(self) -> str:
        """Return the pipeline's class."""
        return str(self.values.get("_class_name"))

    @property
    def is_modular(self) -> bool:
        """Return whether it is a modular pipeline, made of blocks."""
        return "_blocks_class_name" in self.values

    @property
    def file_name(self) -> str:
        """Return the file name of the index."""
        return "modular_model_index.json" if self.is_modular else "model_index.json"


def _never(_name: str) -> bool:
    return False


def _no_name(_name: str) -> str | None:
    return None


def _none_of(_folder: Path) -> dict[str, Path]:
    return {}


def _nothing(_index: PipelineIndex) -> tuple[str, ...]:
    return ()


def _by_number(
    _index: PipelineIndex, scheduler: Any, settings: SamplingSettings, _latents: tuple[int, int, int]
) -> None:
    if settings.sigmas is None:
        scheduler.set_timesteps(settings.num_steps)
    else:
        scheduler.set_timesteps(sigmas=list(settings.sigmas))


def _one_embedding(pipeline: Any, text: str, num_tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    embedding, _ = pipeline.encode_prompt(
        text, do_classifier_free_guidance=False, max_sequence_length=num_tokens, device=device
    )
    return {"prompt_embeds": embedding}


def _z_dim(autoencoder: Config) -> int:
    return int(autoencoder["z_dim"])


def _as_it_is(timesteps: torch.Tensor) -> torch.Tensor:
    return timesteps


def _called(denoiser: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return denoiser(**inputs, return_dict=False)


def _two_above_one(_index: PipelineIndex, settings: SamplingSettings) -> int:
    return 2 if settings.guidance_scale > 1 else 1


@dataclass(frozen=True, eq=False)
class ModelFamily:
    """Facts of one kind of model.

    Attributes:
        name: for messages and checkpoints.
        pipelines: the diffusers pipeline classes that it covers.
        transformers: the diffusers classes of its denoisers.
        denoisers: a pipeline's, the noisiest first; raises ModelError for a pipeline that the family cannot run.
        block_lists: the ModuleLists of transformer blocks in a denoiser, in the order in which they run.
        call: how a denoiser takes its timestep, and which linears of a block read one tensor.
        text_linears: linears of a block that read the text, or a stream of about as few tokens; all others read the
            video.
        text_tokens: of a prompt, padded.
        geometry: from the configs of a denoiser and of the autoencoder.
        width: features of a token, from a denoiser's config.
        latent_channels: of what a denoiser predicts, from its config.
        autoencoder, text_encoder: names of these components.
        image_encoder: the name of the component that looks at images, in pipelines that have it.
        text_encoder_blocks: the list of the text encoder's blocks, by name in it.
        text_components: names of all that make embeddings of texts: encoders and tokenizers.
        title: what a model card calls a pipeline.
        shortened: a denoiser's config with so many blocks (at most) in place of its own.
        published_models: published models by name: "index", "models" (component to library, class and config) and
            "disk_bytes".
        published: the published model that a pipeline is like, and how it samples; for pipelines that do not say.
        distilled: what LoRAs that distil the model to a few steps change of its sampling, the steps apart.
        example_inputs: of one call, on the meta device, for a pipeline, a denoiser's config and the shape of the
            latents (frames, rows, columns).
        text_inputs: names of the inputs that are the same in all calls for one prompt in one branch of guidance.
        takes_image: whether a pipeline encodes an image with its autoencoder, where a prompt has one.
        text_sees_image: whether the text encoder looks at a prompt's image too, so that a text alone
            does not say what it makes of it.
        arguments: of a pipeline's call, for a prompt of one video that brings what is needed, beside texts, size, steps
            and noise; raises CalibrationError for a clip that cannot be read or is too short.
        noised_calls: make calls of a clip's latents without sampling, see `wan/latents.py`; None where nothing does.
        own_name: other people's name of a module, such as the original release's, to diffusers' name; None for a name
            that means nothing here.
        original_name: a tensor's name in the original release, which ComfyUI uses too, from diffusers' name; None for a
            name that it has not. The inverse of `own_name`.
        bare_parameters: last parts of names that are parameters by themselves, and no modules.
        diffusers_ids: hub ids of original releases to those of their diffusers pipelines.
        original_parts: a release's folders of weights by denoiser; none for a folder that is no release of the family.
        may_lack: whether some denoisers of the family lack a tensor, so that a LoRA's change of it may be left out.
        chunk_blocks: have a denoiser compute its blocks a chunk of tokens at a time; returns what undoes it. None where
            the family has no such forward.
        skippable_blocks: whether a denoiser's blocks follow each other with nothing between them that changes the
            hidden state, so that a cache of steps may leave them out together.
        denied_attention: diffusers' attention backends that break its videos, each with why and what to use.
        needs: what a prompt must bring to a pipeline beside its text: "image", and names of `prompts.CLIPS`.
        guidance: which call, or which row of a call, is guided by the text and which is not.
        num_branches: of guidance that a pipeline computes with these settings: 2, or 1 without guidance.
        set_timesteps: of a scheduler, as a pipeline sets them with these settings for latents of a shape (frames,
            rows, columns).
        encoded_text: what a pipeline is called with in place of a prompt's text, by the names of its arguments; those
            in place of a negative prompt have the same names after "negative_".
        brief_components: names of models beside the text encoder, the image encoder, the autoencoder and the denoisers,
            each of which is on the device only while it is used.
        autoencoder_channels: of its latents, from its config.
        encodes_first_frame_alone: whether a pipeline that takes an image encodes it alone, and no frames after it.
        traced_text_encoder: changes of the text encoder's config that leave so many of its blocks, at most; and how it
            is called with embedded tokens (1, tokens, features) and a mask, to see what it allocates.
        text_encoder_called: the module of the text encoder that the pipeline calls, by its name; "" for all of it.
        encoder_tokens: that the text encoder reads, where they are not `text_tokens`.
        stand_ins: names of models that a pipeline's constructor asks for facts: where all others are left out, these
            are there without weights.
        traced_frames: latent frames that the autoencoder codes in as much memory as a whole video; None where it codes
            all at once.
        unused_components: that a pipeline's index names for other tasks than the family's: neither fetched, nor copied.
        scheduled: a scheduler's timesteps, as 0 clean … 1000 noise.
        trace: call a denoiser on the meta device, where no number can be looked at.
        exact_inputs: names of inputs beside the timestep that keep their dtype, whatever the denoiser computes in.
        kept_in_16_bits: linears, by their names in a block, that no recipe quantizes.
        modulation: linears, by their names in a block, that read a timestep and no tokens: a recipe may give their
            weights four bits, and never their inputs.
        stored: what a denoiser's config keeps beside its own, for those who load it later.
        comfyui: its denoisers inside ComfyUI; None where they do not run there.
    """

    name: str
    pipelines: frozenset[str]
    transformers: frozenset[str]
    denoisers: Callable[[PipelineIndex], tuple[Denoiser, ...]]
    block_lists: tuple[str, ...]
    call: ModelCall
    text_linears: frozenset[str]
    text_tokens: int
    geometry: Callable[[Config, Config], LatentGeometry]
    width: Callable[[Config], int]
    latent_channels: Callable[[Config], int]
    autoencoder: str
    text_encoder: str
    image_encoder: str
    text_encoder_blocks: str
    text_components: frozenset[str]
    title: Callable[[PipelineIndex], str]
    shortened: Callable[[Config, int], dict[str, Any]]
    published_models: Callable[[], dict[str, dict[str, Any]]]
    published: Callable[[PipelineIndex], tuple[str, SamplingSettings]]
    distilled: Mapping[str, Any]
    example_inputs: Callable[[PipelineIndex, Config, tuple[int, int, int]], dict[str, Any]]
    text_inputs: frozenset[str]
    takes_image: Callable[[PipelineIndex], bool]
    arguments: Callable[[PipelineIndex, Prompt, SamplingSettings], dict[str, Any]]
    own_name: Callable[[str], str | None]
    original_name: Callable[[str], str | None] = _no_name
    noised_calls: Callable[..., Callable[..., dict[str, torch.Tensor]]] | None = None
    bare_parameters: frozenset[str] = frozenset()
    diffusers_ids: Mapping[str, str] = field(default_factory=dict)
    original_parts: Callable[[Path], Mapping[str, Path]] = _none_of
    may_lack: Callable[[str], bool] = _never
    chunk_blocks: Callable[[nn.Module], Callable[[], None]] | None = None
    skippable_blocks: bool = False
    denied_attention: Mapping[str, str] = field(default_factory=dict)
    needs: Callable[[PipelineIndex], tuple[str, ...]] = _nothing
    guidance: Guidance = TWO_CALLS
    num_branches: Callable[[PipelineIndex, SamplingSettings], int] = _two_above_one
    set_timesteps: Callable[[PipelineIndex, Any, SamplingSettings, tuple[int, int, int]], None] = _by_number
    encoded_text: Callable[[Any, str, int, torch.device], dict[str, torch.Tensor]] = _one_embedding
    brief_components: tuple[str, ...] = ()
    autoencoder_channels: Callable[[Config], int] = _z_dim
    encodes_first_frame_alone: bool = False
    traced_text_encoder: TracedTextEncoder = PLAIN_ENCODER
    text_encoder_called: str = ""
    encoder_tokens: int | None = None
    stand_ins: frozenset[str] = frozenset()
    traced_frames: int | None = 3
    unused_components: frozenset[str] = frozenset()
    scheduled: Callable[[torch.Tensor], torch.Tensor] = _as_it_is
    trace: Callable[[nn.Module, Mapping[str, Any]], Any] = _called
    exact_inputs: frozenset[str] = frozenset()
    kept_in_16_bits: frozenset[str] = frozenset()
    modulation: frozenset[str] = frozenset()
    text_sees_image: bool = False
    stored: Mapping[str, Any] = field(default_factory=dict)
    comfyui: ComfyLayout | None = None

    def block_of(self, name: str) -> str | None:
        """Return the block of a tensor or module, such as "blocks.3"; None outside of blocks."""
        parts = name.split(".")
        for list_name in self.block_lists:
            depth = list_name.count(".") + 1
            if ".".join(parts[:depth]) == list_name and len(parts) > depth and parts[depth].isdecimal():
                return f"{list_name}.{parts[depth]}"
        return None

    def may_quantize(self, linear: str) -> bool:
        """Return whether a recipe may quantize a linear and its input: it is in a block, neither kept nor
        modulation.
        """
        block = self.block_of(linear)
        return block is not None and linear.removeprefix(f"{block}.") not in self.kept_in_16_bits | self.modulation

    def is_modulation(self, linear: str) -> bool:
        """Return whether a linear, by its name in the denoiser, is a block's modulation."""
        block = self.block_of(linear)
        return block is not None and linear.removeprefix(f"{block}.") in self.modulation

    def blocks_of(self, denoiser: nn.Module) -> tuple[str, ...]:
        """Return the names of a denoiser's transformer blocks, in the order in which they run."""
        return self.in_order({name for name, _ in denoiser.named_modules() if self.block_of(name) == name})

    def in_order(self, blocks: Iterable[str]) -> tuple[str, ...]:
        """Return blocks by name in the order in which they run."""

        def position(block: str) -> tuple[int, int]:
            list_name, _, number = block.rpartition(".")
            return self.block_lists.index(list_name), int(number)

        return tuple(sorted(blocks, key=position))

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Return groups of linears of a block that read one tensor."""
        return self.call.shared_inputs

    @property
    def timestep_argument(self) -> str:
        """Return the name of the timestep in a denoiser's forward."""
        return self.call.timestep_argument

    def timestep_of(self, inputs: Mapping[str, Any]) -> float:
        """Return the noisiest timestep of one call, 0 clean … 1000 noise."""
        return float(self.call.timesteps(inputs).max())

    def is_parameter(self, name: str) -> bool:
        """Return whether a name that `own_name` returns is a parameter's; else it is a module's."""
        return name.rpartition(".")[2] in self.bare_parameters
