"""What a pipeline is made of, from its config files alone: no weight is read, or fetched."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempoquant.checkpoint.schema import ComponentConfig
from tempoquant.errors import ModelError
from tempoquant.integrations.expert_weights import EXPERT_COMPONENTS
from tempoquant.integrations.pipeline_folder import check_pipeline_folder, hub_id_of, read_json, resolve_model
from tempoquant.timesteps import Expert

A14B = "wan2.2-i2v-a14b"
"""Wan2.2-I2V-A14B by a name that needs no file: for planning before anything is fetched."""

_EXPERT = {
    "added_kv_proj_dim": None, "attention_head_dim": 128, "cross_attn_norm": True, "eps": 1e-6, "ffn_dim": 13824,
    "freq_dim": 256, "image_dim": None, "in_channels": 36, "num_attention_heads": 40, "num_layers": 40,
    "out_channels": 16, "patch_size": [1, 2, 2], "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024, "text_dim": 4096,
}  # fmt: skip
_EXPERT_DISK_BYTES = 57_155_604_736  # 14,288,901,184 weights, published in float32
_TEXT_ENCODER = {  # google/umt5-xxl's encoder: 5,680,910,336 weights
    "d_ff": 10240, "d_kv": 64, "d_model": 4096, "feed_forward_proj": "gated-gelu", "num_heads": 64, "num_layers": 24,
    "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "vocab_size": 256384,
}  # fmt: skip


@dataclass(frozen=True)
class PipelineConfigs:
    """A two-expert Wan pipeline as its configs describe it.

    Attributes:
        name: as it was asked for.
        experts: config of each transformer. Source of the built-in one: diffusers' scripts/convert_wan_to_diffusers.py.
        text_encoder: config of the UMT5 encoder.
        vae: config of the autoencoder; what it leaves out is the class's default, that of Wan2.1's.
        quantized: of experts that are quantized already.
        disk_bytes: of a component's weight files, where an index file or the publisher says it.
    """

    name: str
    experts: Mapping[Expert, Mapping[str, Any]]
    text_encoder: Mapping[str, Any]
    vae: Mapping[str, Any]
    quantized: Mapping[Expert, ComponentConfig] = field(default_factory=dict)
    disk_bytes: Mapping[str, int] = field(default_factory=dict)


def read_configs(model: str) -> PipelineConfigs:
    """The configs of a bundled model, a folder, a hub id (its JSON files are fetched), or `wan2.2-i2v-a14b`.

    Raises:
        ModelError: there is no such model, it is of another class, a config is missing or malformed, or a folder with
            weights lacks some.
        CheckpointError: a quantized expert's config is not one that this TempoQuant reads.
    """
    if model == A14B:
        disk = dict.fromkeys(EXPERT_COMPONENTS.values(), _EXPERT_DISK_BYTES)
        return PipelineConfigs(model, dict.fromkeys(Expert, _EXPERT), _TEXT_ENCODER, {}, disk_bytes=disk)
    folder = resolve_model(model, configs_only=True)
    # A folder without any weights holds configs to plan by, and the hub's cache what was fetched of a model so far.
    check_pipeline_folder(folder, weights=hub_id_of(model) is None and any(folder.glob("*/*.safetensors")))
    experts, quantized = {}, {}
    for expert, component in EXPERT_COMPONENTS.items():
        config = _config(folder / component)
        if (found := config.pop("quantization_config", None)) is not None:
            quantized[expert] = ComponentConfig.from_dict(found, f"quantization_config of {folder / component}")
        experts[expert] = config
    components = (*EXPERT_COMPONENTS.values(), "text_encoder", "vae")
    disk = {component: size for component in components if (size := _disk_bytes(folder / component)) is not None}
    return PipelineConfigs(model, experts, _config(folder / "text_encoder"), _config(folder / "vae"), quantized, disk)


def _config(component: Path) -> dict[str, Any]:
    config = read_json(component / "config.json")
    if not isinstance(config, dict):
        raise ModelError(f"{component / 'config.json'} is not a JSON object.")
    return config


def _disk_bytes(component: Path) -> int | None:
    """Of the weights: what their index says, or the files' own; None where neither is there.

    The index comes first, since the hub's cache may hold some of its shards only.
    """
    for index in component.glob("*.index.json"):
        size = read_json(index).get("metadata", {}).get("total_size")
        if isinstance(size, int):
            return size
    files = [file for file in component.glob("*.safetensors") if file.is_file()]
    return sum(file.stat().st_size for file in files) if files else None
