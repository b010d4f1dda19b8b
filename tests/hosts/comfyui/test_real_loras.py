"""Inside a real ComfyUI: its LoRA nodes work on a 4-bit model, and what they cannot do there they
say.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tempoquant.errors import UnsupportedError
from tests.hosts.comfyui.real import load, needs_comfyui, on_device, predict, sqnr_db
from tests.quantized_wan import inputs, quantize_all, tiny_wan, write_component
from tests.quantized_wan import load as by_diffusers
from tests.wan_files import wan_name

pytestmark = [needs_comfyui, pytest.mark.slow]

RANK = 4
LINEARS = ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ffn.net.0.proj", "ffn.net.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a denoiser of random layers in int4, whose 16-bit rest is in float32."""
    model = tiny_wan(0, dtype=torch.float32)
    return write_component(tmp_path_factory.mktemp("loras") / "made", model, quantize_all(model, "int4"))


@pytest.fixture(scope="module")
def call() -> dict[str, Any]:
    return inputs(dtype=torch.float32)


def lora_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return pairs for some 4-bit linears and one in 16 bits, in diffusers' names."""
    generator = torch.Generator().manual_seed(5)
    model, state = by_diffusers(folder, torch.float32), {}
    names = [f"blocks.1.{name}" for name in LINEARS] + ["condition_embedder.text_embedder.linear_1"]
    for name in names:
        linear = model.get_submodule(name)
        state[f"{name}.lora_A.weight"] = torch.randn(RANK, linear.in_features, generator=generator) * 0.05
        state[f"{name}.lora_B.weight"] = torch.randn(linear.out_features, RANK, generator=generator) * 0.05
    return state


def in_comfyui(state: dict[str, torch.Tensor], more: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return the same LoRA by ComfyUI's names."""
    renamed = {}
    for name, tensor in state.items():
        module, _, half = name.partition(".lora_")
        renamed[f"diffusion_model.{wan_name(f'{module}.weight').removesuffix('.weight')}.lora_{half}"] = tensor
    return {**renamed, **{f"diffusion_model.{name}": tensor for name, tensor in (more or {}).items()}}


def with_lora(patcher: Any, lora: dict[str, torch.Tensor], strength: float = 1.0) -> Any:
    """Return Load LoRA's result for a model."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)[0]


def answer(patcher: Any, call: dict[str, Any], lowvram_bytes: int = 0) -> torch.Tensor:
    y = predict(on_device(patcher, lowvram_bytes), call)
    patcher.detach()
    return y


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_lora_adds_what_peft_adds_to_the_same_model_in_diffusers(folder: Path, call: Any, strength: float) -> None:
    state = lora_of(folder)
    model = by_diffusers(folder, torch.float32)
    model.load_lora_adapter({f"transformer.{name}": tensor for name, tensor in state.items()}, adapter_name="a")
    model.set_adapters("a", strength)
    with torch.no_grad():
        wanted = model(**call)[0]
        model.disable_lora()
        plain = model(**call)[0]
    patcher = load(folder)
    found = answer(with_lora(patcher, in_comfyui(state), strength), call)
    print(f"LoRA at {strength} against PEFT: {sqnr_db(found, wanted):.1f} dB; it moves the answer by "
          f"{-sqnr_db(wanted, plain):.1f} dB")  # fmt: skip
    assert sqnr_db(found, wanted) > 60 and sqnr_db(wanted, plain) < 30


def test_on_off_and_strength_change_without_a_new_model(folder: Path, call: Any) -> None:
    patcher, lora = load(folder), in_comfyui(lora_of(folder))
    packed = [m.packed.data_ptr() for m in patcher.model.modules() if hasattr(m, "packed")]
    plain = answer(patcher, call)
    full, half = with_lora(patcher, lora), with_lora(patcher, lora, 0.5)
    assert full.model is patcher.model and full.num_additions == len(LINEARS) and patcher.num_additions == 0
    at_full, at_half = answer(full, call), answer(half, call)
    assert not torch.equal(at_full, plain) and not torch.equal(at_full, at_half)
    assert torch.equal(answer(patcher, call), plain)
    assert torch.equal(answer(full.clone(), call), at_full) and torch.equal(answer(patcher, call), plain)
    assert sqnr_db(answer(with_lora(half, lora, 0.5), call), at_full) > 60
    assert [m.packed.data_ptr() for m in patcher.model.modules() if hasattr(m, "packed")] == packed


def test_streamed_layers_have_their_branches_and_memory_counts_them(folder: Path, call: Any) -> None:
    bare = load(folder)
    patcher = with_lora(bare, in_comfyui(lora_of(folder)))
    wanted = answer(patcher, call)
    assert torch.equal(answer(patcher, call, lowvram_bytes=2**16), wanted)
    sizes = []
    for each in (bare, patcher):
        sizes.append(on_device(each, lowvram_bytes=2**30).loaded_size())
        each.detach()
    branches = sum(a.up.nbytes + a.down.nbytes for each in patcher.weight_wrapper_patches.values() for a in each)
    assert sizes[1] - sizes[0] == branches > 0


def test_a_difference_of_a_bias_is_added_and_one_of_a_norm_is_merged_as_always(folder: Path, call: Any) -> None:
    width = by_diffusers(folder, torch.float32).blocks[0].ffn.net[2].out_features
    bias, norm = torch.randn(width), torch.randn(width)
    patcher = load(folder)
    plain = answer(patcher, call)
    changed = answer(
        with_lora(patcher, in_comfyui({}, {"blocks.0.ffn.2.diff_b": bias, "blocks.0.norm3.diff": norm})), call
    )
    model = by_diffusers(folder, torch.float32)
    model.blocks[0].norm2.weight.data += norm
    model.blocks[0].ffn.net[2].register_forward_hook(lambda module, args, y: y + bias)
    with torch.no_grad():
        assert sqnr_db(changed, model(**call)[0]) > 60
    assert sqnr_db(plain, changed) < 30 and torch.equal(answer(patcher, call), plain)


@pytest.mark.parametrize(("suffix", "reason"), [
    ("dora_scale", "DoRA scales the rows"), ("diff", "a whole difference"), ("hada_w1_a", "a loha is no plain LoRA"),
])  # fmt: skip
def test_what_would_have_to_be_merged_is_refused_by_the_node(folder: Path, suffix: str, reason: str) -> None:
    own = in_comfyui(lora_of(folder))
    name = "blocks.1.ffn.2"
    more = {"dora_scale": {f"{name}.dora_scale": torch.ones(128, 1)}, "diff": {f"{name}.diff": torch.zeros(128, 256)},
            "hada_w1_a": {f"{name}.hada_w{n}_{half}": torch.zeros(*shape) for n in (1, 2)
                          for half, shape in (("a", (128, 2)), ("b", (2, 256)))}}[suffix]  # fmt: skip
    if suffix != "dora_scale":
        own = {key: tensor for key, tensor in own.items() if name not in key}
    patcher = load(folder)
    with pytest.raises(UnsupportedError, match=rf"diffusion_model\.blocks\.1\.ffn\.2 has four bits.*{reason}"):
        with_lora(patcher, {**own, **{f"diffusion_model.{key}": tensor for key, tensor in more.items()}})
    assert patcher.num_additions == 0


def test_saving_merging_and_hooks_are_refused(folder: Path) -> None:
    import comfy.hooks
    import comfy.model_management

    patcher = load(folder)
    with pytest.raises(UnsupportedError, match="cannot be saved, merged or compared"):
        comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
    comfy.model_management.unload_all_models()
    key = "diffusion_model.blocks.0.ffn.2.weight"
    with pytest.raises(UnsupportedError, match="a LoRA with a schedule"):
        patcher.add_hook_patches(comfy.hooks.WeightHook(), {key: None})
    with pytest.raises(UnsupportedError, match="a wrapper of its weight"):
        patcher.add_weight_wrapper(key, lambda weight: weight)
    with pytest.raises(UnsupportedError, match="merging models"):
        patcher.add_patches({key: (torch.zeros(1),)}, 0.5, 0.5)
