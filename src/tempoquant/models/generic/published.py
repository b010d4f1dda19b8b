"""Published image models as their configs describe them, with what the generic family observes: for
planning before anything is fetched.

Sources of the configs: the defaults of diffusers' FluxTransformer2DModel,
QwenImageTransformer2DModel and ZImageTransformer2DModel, which are those of FLUX.1-dev, Qwen-Image
and Z-Image; FLUX.1-dev's autoencoder, which Z-Image has too; CLIP ViT-L/14, T5 v1.1 XXL,
Qwen2.5-VL-7B-Instruct and Qwen3-4B. No weights were read.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.models.family import Config, ModelFamily, PipelineIndex
from tempoquant.models.generic.assumptions import Assumptions
from tempoquant.models.generic.family import family_from
from tempoquant.models.generic.linears import MODULATION

_SIDE = 1024
_TEXT_TOKENS = 512
"""The tokens of a prompt in plans. FLUX pads to this number; the others use the prompt's own."""

_Inputs = Callable[[PipelineIndex, Config, tuple[int, int, int]], dict[str, Any]]

_AUTOENCODER = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
_T5 = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "tie_word_embeddings": False,
}
_QWEN25 = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
}
_QWEN3 = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _flux_inputs(_index: PipelineIndex, denoiser: Config, latents: tuple[int, int, int]) -> dict[str, Any]:
    num_tokens = latents[0] * latents[1] * latents[2] // 4
    return {
        "hidden_states": _empty(1, num_tokens, denoiser["in_channels"]),
        "encoder_hidden_states": _empty(1, _TEXT_TOKENS, denoiser["joint_attention_dim"]),
        "pooled_projections": _empty(1, denoiser["pooled_projection_dim"]),
        "timestep": _empty(1),
        "img_ids": _empty(num_tokens, 3),
        "txt_ids": _empty(_TEXT_TOKENS, 3),
        "guidance": _empty(1, dtype=torch.float32),
    }


def _qwen_inputs(_index: PipelineIndex, denoiser: Config, latents: tuple[int, int, int]) -> dict[str, Any]:
    frames, rows, columns = latents
    return {
        "hidden_states": _empty(1, frames * rows * columns // 4, denoiser["in_channels"]),
        "encoder_hidden_states": _empty(1, _TEXT_TOKENS, denoiser["joint_attention_dim"]),
        "timestep": _empty(1),
        "img_shapes": [[(frames, rows // 2, columns // 2)]],
    }


def _z_inputs(_index: PipelineIndex, denoiser: Config, latents: tuple[int, int, int]) -> dict[str, Any]:
    frames, rows, columns = latents
    return {
        "x": [_empty(denoiser["in_channels"], frames, rows, columns)] if frames else [],
        "t": _empty(1, dtype=torch.float32),
        "cap_feats": [_empty(_TEXT_TOKENS, denoiser["cap_feat_dim"])],
    }


def _defaults(num_steps: int, scale: float) -> dict[str, Any]:
    return {
        "height": _SIDE,
        "width": _SIDE,
        "num_frames": 1,
        "num_steps": num_steps,
        "guidance_scale": scale,
        "flow_shift": None,
        "fps": 1,
    }


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADD_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_ADD_KVQ = ("attn.add_k_proj", "attn.add_v_proj", "attn.add_q_proj")  # as Qwen-Image has them
_FLUX = Assumptions(
    pipeline="FluxPipeline",
    transformer="FluxTransformer2DModel",
    component="transformer",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    call=ModelCall("timestep", 1000.0, (("proj_mlp", *_QKV), _ADD_QKV)),
    kept=dict.fromkeys(("norm1.linear", "norm1_context.linear", "norm.linear"), MODULATION),
    text_linears=(*_ADD_QKV, "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"),
    text_tokens=_TEXT_TOKENS,
    width=3072,
    guidance_calls=("conditional", "unconditional"),
    guidance_rows=(),
    guidance_argument="guidance_scale",
    guided_above=None,
    text_inputs=("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids", "guidance"),
    exact_inputs=("guidance",),
    pixels=8,
    frames=1,
    is_image=True,
    latent_channels=16,
    defaults=_defaults(28, 3.5),
    brief_components=("text_encoder", "text_encoder_2"),
)
_QWEN_IMAGE = dataclasses.replace(
    _FLUX,
    pipeline="QwenImagePipeline",
    transformer="QwenImageTransformer2DModel",
    block_lists=("transformer_blocks",),
    call=ModelCall("timestep", 1000.0, (_QKV, _ADD_QKV)),
    kept=dict.fromkeys(("img_mod.1", "txt_mod.1"), MODULATION),
    text_linears=(*_ADD_KVQ, "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    guidance_argument="true_cfg_scale",
    guided_above=1.0,
    text_inputs=("encoder_hidden_states",),
    exact_inputs=(),
    defaults=_defaults(50, 4.0),
    brief_components=("text_encoder",),
)
_Z_IMAGE = dataclasses.replace(
    _QWEN_IMAGE,
    pipeline="ZImagePipeline",
    transformer="ZImageTransformer2DModel",
    block_lists=("noise_refiner", "context_refiner", "layers"),
    call=ModelCall(
        "t",
        -1000.0,
        (("attention.to_q", "attention.to_k", "attention.to_v"), ("feed_forward.w1", "feed_forward.w3")),
        1000.0,
    ),
    kept={"adaLN_modulation.0": MODULATION},
    text_linears=(),
    text_tokens=0,
    width=3840,
    guidance_calls=("conditional",),
    guidance_rows=("conditional", "unconditional"),
    guidance_argument="guidance_scale",
    guided_above=0.0,
    text_inputs=("cap_feats",),
    defaults=_defaults(50, 5.0),
)


def _family(assumed: Assumptions, inputs: _Inputs, name: str, models: dict[str, Any]) -> ModelFamily:
    described = {"index": {"_class_name": assumed.pipeline}, "models": models, "disk_bytes": {}}
    return dataclasses.replace(
        family_from(assumed), example_inputs=inputs, published_models=partial(dict, {name: described})
    )


PUBLISHED: tuple[ModelFamily, ...] = (
    _family(
        _FLUX,
        _flux_inputs,
        "flux.1-dev",
        {
            "transformer": (
                "diffusers",
                "FluxTransformer2DModel",
                {
                    "in_channels": 64,
                    "num_layers": 19,
                    "num_single_layers": 38,
                    "joint_attention_dim": 4096,
                    "pooled_projection_dim": 768,
                    "guidance_embeds": True,
                },
            ),
            "text_encoder": ("transformers", "CLIPTextModel", _CLIP),
            "text_encoder_2": ("transformers", "T5EncoderModel", _T5),
            "vae": ("diffusers", "AutoencoderKL", _AUTOENCODER),
        },
    ),
    _family(
        _QWEN_IMAGE,
        _qwen_inputs,
        "qwen-image",
        {
            "transformer": (
                "diffusers",
                "QwenImageTransformer2DModel",
                {
                    "in_channels": 64,
                    "num_layers": 60,
                    "joint_attention_dim": 3584,
                },
            ),
            "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration", _QWEN25),
            "vae": ("diffusers", "AutoencoderKLQwenImage", {}),
        },
    ),
    _family(
        _Z_IMAGE,
        _z_inputs,
        "z-image",
        {
            "transformer": ("diffusers", "ZImageTransformer2DModel", {"in_channels": 16, "cap_feat_dim": 2560}),
            "text_encoder": ("transformers", "Qwen3Model", _QWEN3),
            "vae": ("diffusers", "AutoencoderKL", _AUTOENCODER),
        },
    ),
)
"""Families of these three, each with its one published model."""
