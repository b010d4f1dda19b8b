"""Wan inside ComfyUI: the settings of its WanModel and VaceWanModel.

Source: ComfyUI's comfy/ldm/wan/model.py and comfy/model_detection.py, which reads the same settings
off a file's shapes, with heads of 128 features and texts of 4096.
"""

from collections.abc import Mapping
from typing import Any

from tempoquant.errors import ModelError
from tempoquant.models.comfyui_layout import ComfyLayout

_QK_NORM = "rms_norm_across_heads"


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ComfyUI's class. Raises ModelError for a config that it does not
    cover.
    """
    if config.get("qk_norm") != _QK_NORM:
        raise ModelError(f"the config says qk_norm {config.get('qk_norm')!r}, but ComfyUI's Wan has {_QK_NORM!r} only.")
    settings = {
        "image_model": "wan2.1",
        "model_type": "t2v" if config.get("image_dim") is None else "i2v",
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "num_heads": config["num_attention_heads"],
        "in_dim": config["in_channels"],
        "out_dim": config["out_channels"],
        "ffn_dim": config["ffn_dim"],
        "num_layers": config["num_layers"],
        "patch_size": tuple(config["patch_size"]),
        "freq_dim": config["freq_dim"],
        "text_dim": config["text_dim"],
        "window_size": (-1, -1),
        "qk_norm": True,
        "cross_attn_norm": config["cross_attn_norm"],
        "eps": config["eps"],
    }
    if config.get("pos_embed_seq_len") is not None:
        settings["flf_pos_embed_token_number"] = config["pos_embed_seq_len"]
    if "vace_layers" in config:
        settings |= _vace_settings(config)
    return settings


def _vace_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    layers, num_layers = list(config["vace_layers"]), config["num_layers"]
    if not layers or list(range(0, num_layers, num_layers // len(layers))) != layers:
        raise ModelError(
            f"the config has hints after blocks {layers} of {num_layers}, but ComfyUI's VACE spaces them evenly from "
            "the first: this model does not run in ComfyUI."
        )
    return {"model_type": "vace", "vace_layers": len(layers), "vace_in_dim": config["vace_in_channels"]}


COMFYUI = ComfyLayout(
    settings=_settings,
    in_float32=frozenset({"patch_embedding", "vace_patch_embedding"}),
)
