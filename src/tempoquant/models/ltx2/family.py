"""LTX-2 as a model family: video and audio in two streams that attend to each other, and to the
text.
"""

from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.models.family import ModelFamily
from tempoquant.models.guidance import Guidance
from tempoquant.models.ltx2 import pipelines
from tempoquant.models.ltx2.names import BARE_PARAMETERS, own_name
from tempoquant.models.ltx2.published import published_models
from tempoquant.models.traced_text_encoder import TracedTextEncoder

__all__ = ["LTX2"]

_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_SELF, _TEXT = ("attn1", "audio_attn1"), ("attn2", "audio_attn2")
_QKV, _KV = ("to_q", "to_k", "to_v"), ("to_k", "to_v")
_AUDIO = {f"audio_attn1.{name}" for name in (*_QKV, "to_out.0")} | {
    "audio_attn2.to_q",
    "audio_attn2.to_out.0",
    "audio_ff.net.0.proj",
    "audio_ff.net.2",
    "video_to_audio_attn.to_q",
    "video_to_audio_attn.to_out.0",
    "audio_to_video_attn.to_k",
    "audio_to_video_attn.to_v",
}

LTX2 = ModelFamily(
    name="ltx2",
    pipelines=frozenset({pipelines.TEXT_TO_VIDEO, pipelines.IMAGE_TO_VIDEO}),
    transformers=frozenset({pipelines.TRANSFORMER}),
    denoisers=pipelines.denoisers,
    block_lists=("transformer_blocks",),
    call=ModelCall(
        shared_inputs=tuple(
            tuple(f"{attention}.{name}" for name in (_QKV if attention in _SELF else _KV)) for attention in _ATTENTIONS
        )
    ),
    text_linears=frozenset(_AUDIO | {f"{attention}.{name}" for attention in _TEXT for name in _KV}),
    text_tokens=pipelines.TEXT_TOKENS,
    geometry=pipelines.geometry,
    width=pipelines.width,
    latent_channels=pipelines.latent_channels,
    autoencoder="vae",
    autoencoder_channels=pipelines.autoencoder_channels,
    encodes_first_frame_alone=True,
    text_encoder="text_encoder",
    image_encoder="image_encoder",
    brief_components=("connectors", "audio_vae", "vocoder"),
    text_encoder_blocks="model.language_model.layers",
    text_components=frozenset({"text_encoder", "tokenizer", "processor", "prompt_enhancer"}),
    encoded_text=pipelines.encoded_text,
    traced_text_encoder=TracedTextEncoder(pipelines.all_layers, pipelines.call_text_encoder),
    title=pipelines.title,
    shortened=pipelines.shortened,
    published_models=published_models,
    published=pipelines.published,
    distilled={"guidance_scale": 1.0},
    example_inputs=pipelines.example_inputs,
    exact_inputs=frozenset({"audio_timestep", "sigma", "audio_sigma", "video_coords", "audio_coords"}),
    text_inputs=frozenset(
        {
            "encoder_hidden_states",
            "audio_encoder_hidden_states",
            "encoder_attention_mask",
            "audio_encoder_attention_mask",
            "video_coords",
            "audio_coords",
        }
    ),
    set_timesteps=pipelines.set_timesteps,
    guidance=Guidance(calls=("conditional",), rows=("unconditional", "conditional")),
    takes_image=pipelines.takes_image,
    needs=pipelines.needs,
    arguments=pipelines.arguments,
    own_name=own_name,
    bare_parameters=BARE_PARAMETERS,
    kept_in_16_bits=frozenset(f"{attention}.to_gate_logits" for attention in _ATTENTIONS),  # one number for each head
)
