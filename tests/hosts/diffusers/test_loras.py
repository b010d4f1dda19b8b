"""LoRAs that are loaded after quantizing: strengths, several at once, both denoisers, in every
memory mode.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline

from tempoquant.placement import host_copies
from tempoquant.placement.memory_modes import set_memory_mode
from tempoquant.runtime.convert import quantized_linears
from tests.quantized_wan import generate, write_pipeline

MODES = (None, "resident", "swap", "lean")
COMPONENTS = ("transformer", "transformer_2")
LINEARS = {"self_attn.q": (128, 128), "cross_attn.v": (128, 128), "ffn.0": (256, 128), "ffn.2": (128, 256)}
RANK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "quantized", centred_by_bin=True)


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU play a GPU: every copy to it is a new tensor."""
    monkeypatch.setattr(host_copies, "to_device", lambda host, _device: host.clone())


def lightning_lora(seed: int) -> dict[str, torch.Tensor]:
    """Write a LoRA in LightX2V's form, for every kind of linear in the block; its factor is alpha /
    rank = 1/2.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in LINEARS.items():
        module = f"diffusion_model.blocks.0.{name}"
        tensors[f"{module}.lora_down.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
        tensors[f"{module}.lora_up.weight"] = 0.5 * torch.randn(rows, RANK, generator=generator)
        tensors[f"{module}.alpha"] = torch.tensor(RANK / 2)
    return tensors


def load_both(pipeline: Any, adapter: str, high_noise: int, low_noise: int) -> None:
    """Load two LoRAs of given seeds into the two denoisers, under one name, as a user does."""
    pipeline.load_lora_weights(lightning_lora(high_noise), adapter_name=adapter)
    pipeline.load_lora_weights(lightning_lora(low_noise), adapter_name=adapter, load_into_transformer_2=True)


def packed(pipeline: Any) -> dict[str, torch.Tensor]:
    """Return every stored tensor of every 4-bit layer."""
    return {
        f"{component}.{name.replace('.base_layer', '')}.{key}": tensor.clone()
        for component in COMPONENTS
        for name, linear in quantized_linears(getattr(pipeline, component)).items()
        for key, tensor in linear.state_dict().items()
    }


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, torch.Tensor]:
    """Return latents of a pipeline without a memory mode, loaded anew for each."""
    results = {}
    for name, weights in {
        "none": None, "style": ([1.0, 0.0]), "both": [0.75, -0.5], "other strengths": [0.25, 1.5],
        "by denoiser": [{"transformer": 1.0, "transformer_2": 0.0}, {"transformer": 0.0, "transformer_2": 1.0}],
    }.items():  # fmt: skip
        pipeline = WanImageToVideoPipeline.from_pretrained(folder, dtype=torch.bfloat16)
        if weights is not None:
            load_both(pipeline, "style", 1, 2)
            load_both(pipeline, "character", 3, 4)
            pipeline.set_adapters(["style", "character"], weights)
        results[name] = generate(pipeline)
    assert all(not torch.equal(one, two) for i, one in enumerate(results.values()) for two in [*results.values()][:i])
    return results


@pytest.mark.parametrize("mode", MODES)
def test_two_adapters_with_strengths_give_the_same_latents_in_every_mode(folder, expected, copying, mode):
    pipeline = WanImageToVideoPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    before = packed(pipeline)
    if mode is not None:
        set_memory_mode(pipeline, mode, "cpu")
    assert torch.equal(generate(pipeline), expected["none"])
    load_both(pipeline, "style", 1, 2)
    assert torch.equal(generate(pipeline), expected["style"])
    load_both(pipeline, "character", 3, 4)
    pipeline.set_adapters(["style", "character"], [0.75, -0.5])
    assert torch.equal(generate(pipeline), expected["both"])
    pipeline.set_adapters(["style", "character"], [0.25, 1.5])
    assert torch.equal(generate(pipeline), expected["other strengths"]), "a strength takes effect at once"
    by_denoiser = [{"transformer": 1.0, "transformer_2": 0.0}, {"transformer": 0.0, "transformer_2": 1.0}]
    pipeline.set_adapters(["style", "character"], by_denoiser)
    assert torch.equal(generate(pipeline), expected["by denoiser"])
    pipeline.disable_lora()
    assert torch.equal(generate(pipeline), expected["none"])
    pipeline.enable_lora()
    pipeline.delete_adapters("character")
    pipeline.set_adapters("style", 1.0)
    assert torch.equal(generate(pipeline), expected["style"])
    pipeline.unload_lora_weights()
    assert torch.equal(generate(pipeline), expected["none"])
    after = packed(pipeline)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_two_adapters_of_a_layer_add_up(folder: Path) -> None:
    """Half of a LoRA and half of its copy change a 4-bit layer's output as the whole does, to
    bfloat16's rounding.
    """
    pipeline = WanImageToVideoPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    load_both(pipeline, "one", 1, 2)
    load_both(pipeline, "copy", 1, 2)
    layer = pipeline.transformer_2.blocks[0].ffn.net[2]
    x = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    outputs = []
    for names, weights in ((["one"], [0.0]), (["one"], [1.0]), (["one", "copy"], [0.5, 0.5])):
        pipeline.set_adapters(names, weights)
        with layer.base_layer.at_timestep(500.0):
            outputs.append(layer(x).float())
    none, whole, halves = outputs
    assert (halves - whole).abs().max() <= 2.0**-7 * whole.abs().max()
    assert (whole - none).norm() > 0.1 * none.norm()
