"""The names of Wan's own files agree with diffusers' converter, tensor by tensor, for every kind of
denoiser.
"""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from tempoquant.errors import ModelError
from tempoquant.models.families import FAMILIES
from tempoquant.models.stored_tensors import meaning_of
from tempoquant.models.wan.family import WAN, WAN_VACE
from tests.wan_files import wan_name
from tests.wan_pipelines import IMAGE_DIM, LATENTS, WIDTH, transformer

DENOISERS = {
    "text": (WAN, {"in_channels": LATENTS}),
    "image": (WAN, {"in_channels": 36, "image_dim": IMAGE_DIM, "added_kv_proj_dim": WIDTH}),
    "vace": (WAN_VACE, {"in_channels": LATENTS, "vace_layers": [0, 1], "vace_in_channels": 96}),
}
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")


@pytest.mark.parametrize("kind", DENOISERS)
def test_every_tensor_has_the_name_that_diffusers_gives_it(kind: str) -> None:
    family, config = DENOISERS[kind]
    state = transformer(0, **config).state_dict()
    theirs = convert_wan_transformer_to_diffusers({wan_name(name): tensor for name, tensor in state.items()})
    assert {name: tensor.data_ptr() for name, tensor in theirs.items()} == {
        name: tensor.data_ptr() for name, tensor in state.items()
    }
    for prefix in PREFIXES:
        found = meaning_of([prefix + wan_name(name) for name in state], family)
        assert found.tensors == {name: prefix + wan_name(name) for name in state}
        assert found.unknown == () and found.is_renamed
    assert {name: family.original_name(name) for name in state} == {name: wan_name(name) for name in state}
    own = meaning_of(state, family)
    assert own.tensors == {name: name for name in state} and own.unknown == () and not own.is_renamed


def test_a_position_of_first_and_last_frame_has_a_name_too() -> None:
    config = {"in_channels": 36, "image_dim": IMAGE_DIM, "pos_embed_seq_len": 4}
    assert "condition_embedder.image_embedder.pos_embed" in transformer(0, **config).state_dict()
    assert meaning_of(["img_emb.emb_pos"], WAN).tensors == {
        "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos"
    }
    assert WAN.original_name("condition_embedder.image_embedder.pos_embed") == "img_emb.emb_pos"


@pytest.mark.parametrize("name", ["blocks.0.attn1.strange.weight", "face_adapter.weight", "blocks.0.self_attn.q.bias"])
def test_a_tensor_that_the_release_has_not_has_no_name_in_it(name: str) -> None:
    assert WAN.original_name(name) is None


def test_a_linear_has_a_name_without_its_weight_too() -> None:
    assert WAN.original_name("blocks.12.attn2.to_out.0") == "blocks.12.cross_attn.o"


def test_what_is_no_tensor_of_a_denoiser_is_told_apart() -> None:
    keys = ["blocks.0.ffn.0.weight", "blocks.0.ffn.0.scale_weight", "blocks.0.ffn.0.scale_input", "scaled_fp8",
            "blocks.0.ffn.2.comfy_quant", "blocks.0.ffn.9.weight", "blocks.0.ffn.0", "vae.x",
            "blocks.0.modulation.weight"]  # fmt: skip
    found = meaning_of(keys, WAN)
    assert found.tensors == {"blocks.0.ffn.net.0.proj.weight": keys[0]} and found.formats == (keys[4],)
    assert found.scales == {"blocks.0.ffn.net.0.proj.weight": keys[1]}
    assert found.unknown == ("blocks.0.ffn.9.weight", "blocks.0.ffn.0", "vae.x", "blocks.0.modulation.weight")
    inside = meaning_of(["model.diffusion_model.head.modulation", "vae.x", "text_encoders.y", "head.head.bias"], WAN)
    assert list(inside.tensors) == ["scale_shift_table"] and inside.unknown == ("head.head.bias",)
    with pytest.raises(ModelError, match=r"both mean blocks\.0\.ffn\.net\.2\.weight"):
        meaning_of(["blocks.0.ffn.2.weight", "blocks.0.ffn.net.2.weight"], WAN)


def test_the_original_repositories_have_distinct_diffusers_ones() -> None:
    ids = {
        original: base
        for family in FAMILIES
        if family.name.startswith("wan")
        for original, base in family.diffusers_ids.items()
    }
    assert ids["Wan-AI/Wan2.2-I2V-A14B"] == "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
    assert all(base.lower() == f"{original}-diffusers".lower() for original, base in ids.items())


def test_eight_bits_hold_what_is_read_of_them() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        finite = numbers[numbers.isfinite()]
        assert torch.equal(finite.to(torch.bfloat16).float(), finite)
