"""Published Wan models as their configs describe them, for planning before anything is fetched.

Source of the configs: diffusers' scripts/convert_wan_to_diffusers.py.
"""

from typing import Any

from tempoquant.models.wan.pipelines import CLASSES

A14B = "wan2.2-i2v-a14b"

_LARGE = {
    "added_kv_proj_dim": None, "attention_head_dim": 128, "cross_attn_norm": True, "eps": 1e-6, "ffn_dim": 13824,
    "freq_dim": 256, "image_dim": None, "in_channels": 16, "num_attention_heads": 40, "num_layers": 40,
    "out_channels": 16, "patch_size": [1, 2, 2], "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024, "text_dim": 4096,
}  # fmt: skip
_SMALL = {**_LARGE, "ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30}
_TI2V = {**_LARGE, "ffn_dim": 14336, "in_channels": 48, "num_attention_heads": 24, "num_layers": 30, "out_channels": 48}
_WITH_FRAME = {**_LARGE, "in_channels": 36}
_WITH_IMAGE = {**_WITH_FRAME, "added_kv_proj_dim": 5120, "image_dim": 1280}
_VACE = {"vace_in_channels": 96}
_VACE_SMALL = {**_SMALL, **_VACE, "vace_layers": list(range(0, 30, 2))}
_VACE_LARGE = {**_LARGE, **_VACE, "vace_layers": list(range(0, 40, 5))}

_ANIMATE = {
    **_WITH_IMAGE, "face_encoder_hidden_dim": 1024, "face_encoder_num_heads": 4, "inject_face_latents_blocks": 5,
    "latent_channels": 16, "motion_dim": 20, "motion_encoder_batch_size": 8, "motion_encoder_channel_sizes": None,
    "motion_encoder_dim": 512, "motion_encoder_size": 512, "motion_style_dim": 512,
}  # fmt: skip

_TEXT_ENCODER = {  # google/umt5-xxl's encoder: 5,680,910,336 weights
    "d_ff": 10240, "d_kv": 64, "d_model": 4096, "feed_forward_proj": "gated-gelu", "num_heads": 64, "num_layers": 24,
    "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "vocab_size": 256384,
}  # fmt: skip
_AUTOENCODER_2_2 = {  # 16 pixels a latent: two in its patches, eight in its convolutions
    "base_dim": 160, "clip_output": False, "decoder_base_dim": 256, "in_channels": 12, "is_residual": True,
    "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4, "z_dim": 48,
    "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
_A14B_DISK_BYTES = 57_155_604_736  # 14,288,901,184 weights, published in float32


def published_models() -> dict[str, dict[str, Any]]:
    """Return published models by name: their model_index.json, the configs of their models, and
    bytes on the disk.
    """
    disk = dict.fromkeys(("transformer", "transformer_2"), _A14B_DISK_BYTES)
    return {
        A14B: _model("WanImageToVideoPipeline", _WITH_FRAME, boundary_ratio=0.9, disk_bytes=disk),
        "wan2.2-t2v-a14b": _model("WanPipeline", _LARGE, boundary_ratio=0.875),
        "wan2.2-ti2v-5b": _model("WanPipeline", _TI2V, _AUTOENCODER_2_2, expand_timesteps=True),
        "wan2.1-t2v-1.3b": _model("WanPipeline", _SMALL),
        "wan2.1-t2v-14b": _model("WanPipeline", _LARGE),
        "wan2.1-i2v-14b": _model("WanImageToVideoPipeline", _WITH_IMAGE),
    }


def published_vace_models() -> dict[str, dict[str, Any]]:
    """Return the published models of VACE, as `published_models`."""
    return {
        "wan2.1-vace-1.3b": _model("WanVACEPipeline", _VACE_SMALL),
        "wan2.1-vace-14b": _model("WanVACEPipeline", _VACE_LARGE),
    }


def published_animate_models() -> dict[str, dict[str, Any]]:
    """Return the published models of Animate, as `published_models`."""
    return {"wan2.2-animate-14b": _model("WanAnimatePipeline", _ANIMATE)}


def _model(
    pipeline: str,
    denoiser: dict[str, Any],
    autoencoder: dict[str, Any] | None = None,
    *,
    boundary_ratio: float | None = None,
    expand_timesteps: bool = False,
    disk_bytes: dict[str, int] | None = None,
) -> dict[str, Any]:
    class_name = CLASSES[pipeline]
    names = ("transformer",) if boundary_ratio is None else ("transformer", "transformer_2")
    models: dict[str, tuple[str, str, dict[str, Any]]] = dict.fromkeys(names, ("diffusers", class_name, denoiser))
    models["text_encoder"] = ("transformers", "UMT5EncoderModel", _TEXT_ENCODER)
    models["vae"] = ("diffusers", "AutoencoderKLWan", autoencoder or {})
    if denoiser["image_dim"]:
        models["image_encoder"] = ("transformers", "CLIPVisionModel", _IMAGE_ENCODER)
    index = {"_class_name": pipeline, "boundary_ratio": boundary_ratio, "expand_timesteps": expand_timesteps}
    return {"index": index, "models": models, "disk_bytes": disk_bytes or {}}


_IMAGE_ENCODER = {  # CLIP's ViT-H/14
    "hidden_act": "gelu", "hidden_size": 1280, "image_size": 224, "intermediate_size": 5120, "num_attention_heads": 16,
    "num_hidden_layers": 32, "patch_size": 14, "projection_dim": 1024,
}  # fmt: skip
