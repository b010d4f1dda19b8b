"""The published LTX-2 as its configs describe it, for planning before anything is fetched.

Source of the transformer's, the connectors', the autoencoders' and the vocoder's: diffusers'
scripts/convert_ltx2_to_diffusers.py (version 2.0) and the defaults of the classes; of the text
encoder's: Gemma 3 12B's config. Not known from these: bytes on the disk, so that they are taken for
those of 16 bits.
"""

from typing import Any

from tempoquant.models.ltx2.pipelines import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, TRANSFORMER

_DENOISER = {
    "in_channels": 128, "out_channels": 128, "patch_size": 1, "patch_size_t": 1, "num_attention_heads": 32,
    "attention_head_dim": 128, "cross_attention_dim": 4096, "vae_scale_factors": [8, 32, 32], "pos_embed_max_pos": 20,
    "base_height": 2048, "base_width": 2048, "audio_in_channels": 128, "audio_out_channels": 128,
    "audio_patch_size": 1, "audio_patch_size_t": 1, "audio_num_attention_heads": 32, "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048, "audio_scale_factor": 4, "audio_pos_embed_max_pos": 20,
    "audio_sampling_rate": 16000, "audio_hop_length": 160, "num_layers": 48, "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads", "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 3840,
    "attention_bias": True, "attention_out_bias": True, "rope_theta": 10000.0, "causal_offset": 1,
}  # fmt: skip
_AUTOENCODER = {
    "latent_channels": 128, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8, "decoder_causal": False,
}  # fmt: skip
_TEXT_ENCODER = {
    "text_config": {
        "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 262208,
    },
    "vision_config": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 896, "patch_size": 14,
    },
}  # fmt: skip
_PIPELINE = "diffusers.pipelines.ltx2"


def published_models() -> dict[str, dict[str, Any]]:
    """Return published models by name: their model_index.json, the configs of their models, and
    bytes on the disk.
    """
    models: dict[str, tuple[str, str, dict[str, Any]]] = {
        "transformer": ("diffusers", TRANSFORMER, _DENOISER),
        "text_encoder": ("transformers", "Gemma3ForConditionalGeneration", _TEXT_ENCODER),
        "vae": ("diffusers", "AutoencoderKLLTX2Video", _AUTOENCODER),
        "audio_vae": ("diffusers", "AutoencoderKLLTX2Audio", {}),
        "connectors": (_PIPELINE, "LTX2TextConnectors", {}),
        "vocoder": (_PIPELINE, "LTX2Vocoder", {}),
    }
    return {
        name: {"index": {"_class_name": pipeline}, "models": models, "disk_bytes": {}}
        for name, pipeline in (("ltx-2", TEXT_TO_VIDEO), ("ltx-2-i2v", IMAGE_TO_VIDEO))
    }
