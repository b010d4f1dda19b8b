"""Wan as model families: this folder holds everything that TempoQuant knows about it."""

import dataclasses
from collections.abc import Callable

from torch import nn

from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.models.family import Config, ModelFamily
from tempoquant.models.geometry import LatentGeometry
from tempoquant.models.wan import pipelines
from tempoquant.models.wan.comfyui import COMFYUI
from tempoquant.models.wan.latents import TEXT_TOKENS, example_inputs, noised_calls
from tempoquant.models.wan.names import is_of_image_branch, original_name, own_name
from tempoquant.models.wan.originals import DIFFUSERS_IDS, original_parts
from tempoquant.models.wan.pipelines import COMPONENTS
from tempoquant.models.wan.published import published_animate_models, published_models, published_vace_models

__all__ = ["COMPONENTS", "WAN", "WAN_ANIMATE", "WAN_VACE"]


def _geometry(denoiser: Config, autoencoder: Config) -> LatentGeometry:
    frames, rows, columns = denoiser["patch_size"]
    is_animate = "motion_encoder_size" in denoiser
    return LatentGeometry(
        autoencoder.get("scale_factor_spatial") or 8,
        autoencoder.get("scale_factor_temporal") or 4,
        (frames, rows, columns),
        given_latents=int(is_animate or "vace_layers" in denoiser),
        # Its pipeline divides by the frames of a segment except one.
        fewest_frames=5 if is_animate else 1,
    )


def _width(denoiser: Config) -> int:
    return int(denoiser["num_attention_heads"] * denoiser["attention_head_dim"])


def _latent_channels(denoiser: Config) -> int:
    return int(denoiser["out_channels"])


def _chunk_blocks(denoiser: nn.Module) -> Callable[[], None]:
    from tempoquant.models.wan.chunked_blocks import chunk_blocks  # imports the model's class

    return chunk_blocks(denoiser)


_SHARED_INPUTS = (
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ("attn2.to_k", "attn2.to_v"),
    ("attn2.add_k_proj", "attn2.add_v_proj"),
)
_CONFETTI = (
    "SageAttention's kernel for Hopper turns Wan's videos into confetti (huggingface/diffusers#12783): use _flash_3, "
    "_flash_3_hub, _native_cudnn or _sage_qk_int8_pv_fp16_cuda."
)
WAN = ModelFamily(
    name="wan",
    pipelines=frozenset({pipelines.TEXT_TO_VIDEO, pipelines.IMAGE_TO_VIDEO}),
    transformers=frozenset({pipelines.CLASSES[pipelines.TEXT_TO_VIDEO]}),
    denoisers=pipelines.denoisers,
    block_lists=pipelines.block_lists(pipelines.CLASSES[pipelines.TEXT_TO_VIDEO]),
    call=ModelCall(shared_inputs=_SHARED_INPUTS),
    text_linears=frozenset({"attn2.to_k", "attn2.to_v", "attn2.add_k_proj", "attn2.add_v_proj"}),
    text_tokens=TEXT_TOKENS,
    geometry=_geometry,
    width=_width,
    latent_channels=_latent_channels,
    autoencoder="vae",
    text_encoder="text_encoder",
    image_encoder="image_encoder",
    text_encoder_blocks="encoder.block",
    text_components=frozenset({"text_encoder", "tokenizer"}),
    title=pipelines.title,
    shortened=pipelines.shortened,
    published_models=published_models,
    published=pipelines.published,
    distilled=pipelines.DISTILLED,
    example_inputs=example_inputs,
    text_inputs=frozenset({"encoder_hidden_states"}),
    takes_image=pipelines.takes_image,
    needs=pipelines.needs,
    arguments=pipelines.arguments,
    own_name=own_name,
    original_name=original_name,
    noised_calls=noised_calls,
    diffusers_ids=DIFFUSERS_IDS,
    original_parts=original_parts,
    bare_parameters=frozenset({"scale_shift_table", "pos_embed"}),
    may_lack=is_of_image_branch,
    chunk_blocks=_chunk_blocks,
    comfyui=COMFYUI,
    skippable_blocks=True,
    denied_attention={"_sage_qk_int8_pv_fp8_cuda_sm90": _CONFETTI},
)

WAN_VACE = dataclasses.replace(
    WAN,
    name="wan-vace",
    pipelines=frozenset({pipelines.VACE}),
    transformers=frozenset({pipelines.CLASSES[pipelines.VACE]}),
    block_lists=pipelines.block_lists(pipelines.CLASSES[pipelines.VACE]),
    noised_calls=None,  # a clip's conditions are unknown without the user's mask
    published_models=published_vace_models,
    skippable_blocks=False,  # hints are added between them
)

WAN_ANIMATE = dataclasses.replace(
    WAN,
    name="wan-animate",
    pipelines=frozenset({pipelines.ANIMATE}),
    transformers=frozenset({pipelines.CLASSES[pipelines.ANIMATE]}),
    block_lists=pipelines.block_lists(pipelines.CLASSES[pipelines.ANIMATE]),
    text_inputs=frozenset(
        {"encoder_hidden_states", "encoder_hidden_states_image", "pose_hidden_states", "face_pixel_values"}
    ),
    noised_calls=None,  # a clip alone says nothing of poses and faces
    published_models=published_animate_models,
    chunk_blocks=None,  # its blocks attend to an image, which chunks do not support
    comfyui=None,  # its face adapter and motion encoder have names and layouts of their own there
    skippable_blocks=False,  # motion is added between them
)
