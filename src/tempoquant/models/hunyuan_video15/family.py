"""HunyuanVideo-1.5 as model families: this folder holds everything that TempoQuant knows about
it.
"""

import dataclasses

from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.models.family import Config, ModelFamily
from tempoquant.models.hunyuan_video15 import pipelines
from tempoquant.models.hunyuan_video15.calls import (
    QWEN_TOKENS,
    SYSTEM_TOKENS,
    TEXT_INPUTS,
    TEXT_TOKENS,
    example_inputs,
    trace,
)
from tempoquant.models.hunyuan_video15.names import own_name
from tempoquant.models.hunyuan_video15.published import published_image_models, published_models
from tempoquant.models.traced_text_encoder import TracedTextEncoder

__all__ = ["HUNYUAN_VIDEO15", "HUNYUAN_VIDEO15_I2V"]


def _width(denoiser: Config) -> int:
    return int(denoiser["num_attention_heads"] * denoiser["attention_head_dim"])


_TEXT_STREAM = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
HUNYUAN_VIDEO15 = ModelFamily(
    name="hunyuan-video-1.5",
    pipelines=frozenset({pipelines.TEXT_TO_VIDEO}),
    transformers=frozenset({pipelines.DENOISER_CLASS}),
    denoisers=pipelines.denoisers,
    block_lists=("transformer_blocks",),  # the token refiner's two blocks stay in 16 bits, see docs/models.md
    call=ModelCall(shared_inputs=(("attn.to_q", "attn.to_k", "attn.to_v"), _TEXT_STREAM)),
    text_linears=frozenset({*_TEXT_STREAM, "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"}),
    text_tokens=TEXT_TOKENS,
    geometry=pipelines.geometry,
    width=_width,
    latent_channels=lambda denoiser: int(denoiser["out_channels"]),
    autoencoder="vae",
    text_encoder="text_encoder",
    image_encoder="image_encoder",
    text_encoder_blocks="layers",
    text_components=frozenset({"text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"}),
    title=pipelines.title,
    shortened=pipelines.shortened,
    published_models=published_models,
    published=pipelines.published,
    distilled={"guidance_scale": 1.0},
    example_inputs=example_inputs,
    text_inputs=TEXT_INPUTS,
    takes_image=pipelines.takes_image,
    needs=pipelines.needs,
    arguments=pipelines.arguments,
    own_name=own_name,
    noised_calls=None,  # no function makes its calls from a clip's latents yet
    diffusers_ids={"tencent/HunyuanVideo-1.5": "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"},
    exact_inputs=frozenset({"timestep_r"}),
    modulation=frozenset({"norm1.linear", "norm1_context.linear"}),  # one row a call
    set_timesteps=pipelines.set_timesteps,
    encoded_text=pipelines.encoded_text,
    brief_components=("text_encoder_2",),
    autoencoder_channels=lambda autoencoder: int(autoencoder["latent_channels"]),
    traced_text_encoder=TracedTextEncoder(pipelines.shortened_encoder, pipelines.call_encoder),
    stand_ins=frozenset({"vae"}),
    encoder_tokens=SYSTEM_TOKENS + QWEN_TOKENS,
    traced_frames=None,
    encodes_first_frame_alone=True,
    trace=trace,
)

HUNYUAN_VIDEO15_I2V = dataclasses.replace(
    HUNYUAN_VIDEO15,
    name="hunyuan-video-1.5-i2v",
    pipelines=frozenset({pipelines.IMAGE_TO_VIDEO}),
    geometry=pipelines.geometry_by_image,
    published_models=published_image_models,
    diffusers_ids={},
)
