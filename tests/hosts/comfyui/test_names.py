"""Names inside ComfyUI, both ways, and what of a denoiser's config its class is made from."""

from typing import Any

import pytest

from tempoquant.errors import ModelError
from tempoquant.hosts.comfyui.names import comfy_tensor, family_in_comfyui, own_tensor
from tempoquant.models.wan.comfyui import COMFYUI
from tests.quantized_wan import model_config
from tests.wan_files import wan_name
from tests.wan_pipelines import IMAGE_DIM, LATENTS, WIDTH, transformer

CONFIGS: dict[str, dict[str, Any]] = {
    "text": {"in_channels": LATENTS},
    "image": {"in_channels": 36},
    "image branch": {"in_channels": 36, "image_dim": IMAGE_DIM, "added_kv_proj_dim": WIDTH},
    "first and last frame": {"in_channels": 36, "image_dim": IMAGE_DIM, "added_kv_proj_dim": WIDTH,
                             "pos_embed_seq_len": 4},
    "vace": {"in_channels": LATENTS, "vace_layers": [0, 1], "vace_in_channels": 96},
}  # fmt: skip
STORED = (
    "packed",
    "scale",
    "clip_ratio",
    "smoothing_factor",
    "up",
    "down",
    "deflation",
    "input_offset",
    "tensor_scale",
)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_has_the_original_releases_name_and_comes_back(kind: str) -> None:
    model = transformer(0, **CONFIGS[kind])
    family, _ = family_in_comfyui(model_config(model), "here")
    names = [*model.state_dict(), *(f"blocks.1.attn1.to_out.0.{key}" for key in STORED)]
    theirs = {name: comfy_tensor(name, family) for name in names}
    assert len({*theirs.values()}) == len(names)
    for name, key in theirs.items():
        assert key == wan_name(name) and own_tensor(key, family) == name


def test_what_comfyui_has_no_place_for_is_refused() -> None:
    family, _ = family_in_comfyui(model_config(transformer(0, LATENTS)), "here")
    assert own_tensor("blocks.0.mlp.0.weight", family) is None and own_tensor("head.modulation.weight", family) is None
    with pytest.raises(ModelError, match=r"blocks\.0\.attn3 has no place in ComfyUI's model"):
        comfy_tensor("blocks.0.attn3.weight", family)


@pytest.mark.parametrize("class_name", ["WanAnimateTransformer3DModel", "LTXVideoTransformer3DModel", None])
def test_a_denoiser_that_does_not_run_there_is_refused_by_its_class(class_name: str | None) -> None:
    with pytest.raises(ModelError, match=f"DIR is a {class_name}, which TempoQuant does not run in ComfyUI"):
        family_in_comfyui({"_class_name": class_name}, "DIR")


def test_settings_are_those_of_the_config() -> None:
    config = {**model_config(transformer(0, **CONFIGS["first and last frame"])), "num_attention_heads": 4}
    settings = COMFYUI.settings(config)
    assert (settings["dim"], settings["num_heads"], settings["in_dim"], settings["out_dim"]) == (
        2 * WIDTH,
        4,
        36,
        LATENTS,
    )
    assert settings["model_type"] == "i2v" and settings["flf_pos_embed_token_number"] == 4
    assert COMFYUI.settings(model_config(transformer(0, LATENTS)))["model_type"] == "t2v"


def test_vace_with_hints_elsewhere_than_comfyui_puts_them_is_refused() -> None:
    config = model_config(transformer(0, **CONFIGS["vace"]))
    settings = COMFYUI.settings(config)
    assert (settings["model_type"], settings["vace_layers"], settings["vace_in_dim"]) == ("vace", 2, 96)
    with pytest.raises(ModelError, match=r"hints after blocks \[0, 2\] of 3"):
        COMFYUI.settings({**config, "num_layers": 3, "vace_layers": [0, 2]})


def test_another_normalization_of_q_and_k_is_refused() -> None:
    with pytest.raises(ModelError, match="qk_norm None"):
        COMFYUI.settings({**model_config(transformer(0, LATENTS)), "qk_norm": None})
