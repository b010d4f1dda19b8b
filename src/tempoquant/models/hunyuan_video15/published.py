"""Published HunyuanVideo-1.5 models as their configs describe them, for planning before anything is
fetched.

Sources of the configs: diffusers' scripts/convert_hunyuan_video1_5_to_diffusers.py and its classes'
defaults, Qwen2.5-VL-7B-Instruct's text model, google/byt5-small (Glyph-SDXL-v2's text encoder), and
SigLIP so400m, of FLUX.1-Redux.
"""

from typing import Any

from tempoquant.models.hunyuan_video15.pipelines import DENOISER, DENOISER_CLASS, IMAGE_TO_VIDEO, TEXT_TO_VIDEO

_DENOISER = {
    "attention_head_dim": 128, "image_embed_dim": 1152, "in_channels": 65, "mlp_ratio": 4.0, "num_attention_heads": 16,
    "num_layers": 54, "num_refiner_layers": 2, "out_channels": 32, "patch_size": 1, "patch_size_t": 1,
    "qk_norm": "rms_norm", "rope_axes_dim": [16, 56, 56], "rope_theta": 256.0, "text_embed_2_dim": 1472,
    "text_embed_dim": 3584, "use_meanflow": False, "target_size": 640,
}  # fmt: skip
_P720 = {"target_size": 960}
_QWEN = {  # 28 blocks: 7,070,619,136 weights without a head
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
}  # fmt: skip
_BYT5 = {
    "d_ff": 3584, "d_kv": 64, "d_model": 1472, "feed_forward_proj": "gated-gelu", "num_heads": 6, "num_layers": 12,
    "vocab_size": 1510, "tie_word_embeddings": False,
}  # fmt: skip
_SIGLIP = {
    "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "num_attention_heads": 16,
    "num_hidden_layers": 27, "patch_size": 14,
}  # fmt: skip


def published_models() -> dict[str, dict[str, Any]]:
    """Return the published text-to-video models by name: their index, the configs of their models,
    bytes on disk.
    """
    return {
        "hunyuanvideo-1.5-480p-t2v": _model(TEXT_TO_VIDEO, {**_DENOISER, "task_type": "t2v"}),
        "hunyuanvideo-1.5-720p-t2v": _model(TEXT_TO_VIDEO, {**_DENOISER, **_P720, "task_type": "t2v"}),
    }


def published_image_models() -> dict[str, dict[str, Any]]:
    """Return the published image-to-video models, as `published_models`."""
    return {
        "hunyuanvideo-1.5-480p-i2v": _model(IMAGE_TO_VIDEO, {**_DENOISER, "task_type": "i2v"}),
        "hunyuanvideo-1.5-720p-i2v": _model(IMAGE_TO_VIDEO, {**_DENOISER, **_P720, "task_type": "i2v"}),
    }


def _model(pipeline: str, denoiser: dict[str, Any]) -> dict[str, Any]:
    models: dict[str, tuple[str, str, dict[str, Any]]] = {
        DENOISER: ("diffusers", DENOISER_CLASS, denoiser),
        "text_encoder": ("transformers", "Qwen2_5_VLTextModel", _QWEN),
        "text_encoder_2": ("transformers", "T5EncoderModel", _BYT5),
        "vae": ("diffusers", "AutoencoderKLHunyuanVideo15", {}),
    }
    if pipeline == IMAGE_TO_VIDEO:
        models["image_encoder"] = ("transformers", "SiglipVisionModel", _SIGLIP)
    index = {"_class_name": pipeline, "target_size": denoiser["target_size"]}
    return {"index": index, "models": models, "disk_bytes": {}}
