"""MiniMax-H3 as a model family: this folder holds everything that TempoQuant knows about it."""

from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.models.family import ModelFamily
from tempoquant.models.minimax_h3 import pipelines
from tempoquant.models.minimax_h3.names import own_name
from tempoquant.models.traced_text_encoder import TracedTextEncoder

__all__ = ["MINIMAX_H3"]

MINIMAX_H3 = ModelFamily(
    name="minimax-h3",
    pipelines=frozenset({pipelines.PIPELINE}),
    transformers=frozenset({pipelines.DENOISER_CLASS}),
    denoisers=pipelines.denoisers,
    block_lists=("transformer_blocks",),  # the token refiner's two blocks stay in 16 bits, see docs/models.md
    call=ModelCall(
        timestep_scale=-1000.0,
        timestep_offset=1000.0,  # 0 noise … 1 clean
        one_row=True,  # the timesteps of video, sound and what is given, all rows of one sequence
        shared_inputs=(("attn.to_q", "attn.to_k", "attn.to_v"),),
    ),
    text_linears=frozenset(),  # text, video and sound are rows of one sequence
    text_tokens=pipelines.TEXT_TOKENS,
    geometry=pipelines.geometry,
    width=lambda denoiser: int(denoiser["hidden_size"]),
    latent_channels=lambda denoiser: int(denoiser["in_channels"]),
    autoencoder="vae",
    text_encoder="text_encoder",
    image_encoder="none",  # the text encoder looks at images
    text_encoder_blocks="model.language_model.layers",
    text_encoder_called="model",
    text_components=frozenset({"text_encoder", "tokenizer", "processor"}),
    title=pipelines.title,
    shortened=pipelines.shortened,
    published_models=pipelines.published_models,
    published=pipelines.published,
    distilled={},
    example_inputs=pipelines.example_inputs,
    text_inputs=frozenset({"encoder_hidden_states", "text_indices"}),
    takes_image=lambda index: True,  # as the first frame; references are another denoiser's task
    arguments=pipelines.arguments,
    text_sees_image=True,
    own_name=own_name,
    noised_calls=None,  # a clip has no latents of its sound here
    num_branches=lambda index, settings: 1,  # the guidance is in the weights
    exact_inputs=frozenset({"hidden_states", "audio_hidden_states", "position_ids"}),
    modulation=frozenset({"adaln_proj.linear"}),  # a row for each timestep of a call
    encoded_text=pipelines.encoded_text,
    brief_components=("audio_vae",),
    autoencoder_channels=lambda autoencoder: int(autoencoder["latent_channels"]),
    traced_text_encoder=TracedTextEncoder(pipelines.shortened_encoder, pipelines.call_encoder),
    traced_frames=None,
    encodes_first_frame_alone=True,
    unused_components=frozenset({"transformer_ref"}),
    scheduled=pipelines.scheduled,
)
