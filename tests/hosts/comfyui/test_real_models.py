"""Inside a real ComfyUI: every kind of Wan that both know answers the same, and names are those of
its own loader.
"""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from tempoquant.errors import CheckpointError
from tempoquant.hosts.comfyui.stored import open_denoiser
from tests.hosts.comfyui.real import dense, import_comfyui, load, needs_comfyui, predict, sqnr_db
from tests.quantized_wan import quantize_all, write_component
from tests.random_layers import random_layer
from tests.wan_files import wan_name
from tests.wan_pipelines import LATENTS, TEXT_DIM, WIDTH, transformer

pytestmark = [needs_comfyui, pytest.mark.slow]

CLIP_DIM = 1280  # which ComfyUI's class has fixed
KINDS: dict[str, dict[str, Any]] = {
    "text": {"in_channels": LATENTS},
    "text, Wan2.2's later latents": {"in_channels": 48, "out_channels": 48},
    "image": {"in_channels": 36},
    "image branch": {"in_channels": 36, "image_dim": CLIP_DIM, "added_kv_proj_dim": WIDTH},
    "vace": {"in_channels": LATENTS, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 96},
}


def call_of(kind: str) -> dict[str, Any]:
    """Return a call of two rows, in diffusers' terms."""
    generator = torch.Generator().manual_seed(2)
    batch, channels = 2, KINDS[kind]["in_channels"]
    text_tokens = 512 if kind == "image branch" else 7  # diffusers tells texts from images by the number
    call: dict[str, Any] = {
        "hidden_states": torch.randn(batch, channels, 2, 8, 8, generator=generator),
        "timestep": torch.tensor([930.0, 990.0]),  # each row in a bin of its own
        "encoder_hidden_states": torch.randn(batch, text_tokens, TEXT_DIM, generator=generator),
    }
    if kind == "image branch":
        call["encoder_hidden_states_image"] = torch.randn(batch, 257, CLIP_DIM, generator=generator)
    if kind == "vace":
        call["control_hidden_states"] = torch.randn(batch, 96, 2, 8, 8, generator=generator)
        call["control_hidden_states_scale"] = torch.ones(2)
    return call


def in_comfyui(call: dict[str, Any]) -> dict[str, Any]:
    """Return the same call in ComfyUI's terms."""
    renamed = dict(call)
    if "encoder_hidden_states_image" in call:
        renamed["clip_fea"] = call["encoder_hidden_states_image"]
    if "control_hidden_states" in call:
        renamed |= {"vace_context": call["control_hidden_states"][:, None], "vace_strength": [1.0]}
    return renamed


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_answers_as_in_diffusers(kind: str, tmp_path: Path) -> None:
    model = transformer(0, **KINDS[kind])
    layers = {
        name: random_layer(module, "mxfp4", seed=number)
        for number, (name, module) in enumerate(model.named_modules())
        if isinstance(module, torch.nn.Linear) and name.startswith(("blocks.", "vace_blocks."))
    }
    assert len(layers) == {"image branch": 24, "vace": 63}.get(kind, 20)
    folder = write_component(tmp_path / "made", model, layers, denoiser="transformer")
    same = type(model).from_pretrained(folder, dtype=torch.float32)
    call = call_of(kind)
    with torch.no_grad():
        wanted = same(**call, return_dict=False)[0]
    found = predict(load(folder), in_comfyui(call))
    print(f"{kind}: {sqnr_db(found, wanted):.1f} dB")
    assert sqnr_db(found, wanted) > 40  # one rounding that flips leaves 50, none more than 110; a wrong wire 20 or less


def test_ours_differs_from_what_comfyuis_own_loader_makes_in_the_4_bit_linears_alone(tmp_path: Path) -> None:
    """The sizes are those that its loader assumes: heads of 128 features, texts of 4096."""
    import_comfyui()
    import comfy.sd

    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=128, in_channels=36, out_channels=16,
        text_dim=4096, freq_dim=256, ffn_dim=512, num_layers=2, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    own = {wan_name(name): tensor for name, tensor in model.state_dict().items()}
    stock = comfy.sd.load_diffusion_model_state_dict(dict(own), model_options={"dtype": torch.float32})
    model.save_pretrained(tmp_path / "dense/transformer")
    layers = quantize_all(model, "int4")
    ours = load(write_component(tmp_path / "made", model, layers))
    assert type(ours.model) is type(stock.model)
    theirs, mine = (dict(each.model.diffusion_model.state_dict()) for each in (stock, ours))
    four_bit = {wan_name(f"{name}.weight").removesuffix(".weight") for name in layers}
    for name, tensor in theirs.items():
        if name.rpartition(".")[0] not in four_bit:
            assert torch.equal(mine[name], tensor) and mine[name].dtype == tensor.dtype
    assert {name.rpartition(".")[0] for name in theirs.keys() ^ mine.keys()} == four_bit
    call = {"hidden_states": torch.randn(1, 36, 2, 8, 8), "timestep": torch.tensor([950.0]),
            "encoder_hidden_states": torch.randn(1, 9, 4096)}  # fmt: skip
    with torch.no_grad():
        wanted = model(**call, return_dict=False)[0]
    assert torch.equal(predict(stock, call), predict(dense(tmp_path / "dense/transformer"), call))
    assert sqnr_db(predict(stock, call), wanted) > 100


def test_a_config_of_another_size_than_the_tensors_is_refused(tmp_path: Path) -> None:
    model = transformer(0, LATENTS)
    folder = write_component(tmp_path / "made", model, quantize_all(model, "int4"), denoiser="transformer")
    stored = open_denoiser(folder)
    stored.header.config["text_dim"] += 1  # type: ignore[index]
    from tempoquant.hosts.comfyui.loader import load_model

    with pytest.raises(CheckpointError, match=r"text_embedding\.0\.weight is \[128, 64\]"):
        load_model(stored)
    stored.header.config.update(text_dim=TEXT_DIM, num_layers=3)  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"lacks blocks\.2\."):
        load_model(stored)
