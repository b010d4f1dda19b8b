"""Features of diffusers on 4-bit models: each works as on 16-bit ones, or is refused and changes
nothing.
"""

import copy
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from tempoquant.errors import UnsupportedError
from tempoquant.hosts.diffusers.loader import register
from tempoquant.runtime.convert import quantized_linears
from tests.quantized_wan import generate, load, quantize_all, run, tiny_wan, write_component, write_pipeline
from tests.random_layers import by_bin

register()
MODEL = tiny_wan(num_layers=1)
LAYERS = quantize_all(MODEL, "mixed")
LAYERS["blocks.0.attn2.to_q"] = by_bin(LAYERS["blocks.0.attn2.to_q"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_component(tmp_path / "component", MODEL, LAYERS)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "quantized")


def test_a_lora_loads_switches_and_unloads(folder: Path) -> None:
    model = load(folder)
    before = run(model)
    for name in ("one", "two"):
        config = LoraConfig(
            r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_out.0", "ffn.net.2"]
        )
        model.add_adapter(config, name)
    adapter = model.blocks[0].attn1.to_q.lora_A["one"].weight
    assert adapter.dtype == torch.bfloat16 and adapter.device == before.device
    results = []
    for name in ("one", "two"):
        model.set_adapters([name])
        results.append(run(model))
    assert not torch.equal(*results) and not torch.equal(results[0], before)
    model.disable_adapters()
    assert torch.equal(run(model), before)
    model.enable_adapters()
    model.set_adapters(["one", "two"], [0.0, 1.0])
    assert torch.equal(run(model), results[1])
    model.delete_adapters("two")
    model.unload_lora()
    assert torch.equal(run(model), before) and quantized_linears(model).keys() == LAYERS.keys()


def test_a_lora_file_loads_into_a_pipeline(pipeline: Path, tmp_path: Path) -> None:
    donor = tiny_wan(0, num_layers=1)
    donor.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k"]))
    state = {f"transformer.{name}": tensor.contiguous() for name, tensor in get_peft_model_state_dict(donor).items()}
    save_file(state, tmp_path / "lora.safetensors")
    pipe = WanImageToVideoPipeline.from_pretrained(pipeline, dtype=torch.bfloat16)
    before = generate(pipe)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="x")
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="x", load_into_transformer_2=True)
    loaded = generate(pipe)
    assert not torch.equal(loaded, before)
    with pytest.raises(UnsupportedError, match="keep LoRA adapters loaded"):
        pipe.fuse_lora(components=["transformer", "transformer_2"])
    assert torch.equal(generate(pipe), loaded), "a refused fuse leaves the adapters as they were"
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), before)


def test_fusing_projections_is_refused_and_changes_nothing(folder: Path) -> None:
    model = load(folder)
    before = run(model)
    with pytest.raises(UnsupportedError, match="QKV projections unfused"):
        model.fuse_qkv_projections()
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("to_disk", [False, True])
def test_group_offload_changes_nothing(tmp_path: Path, folder: Path, offload_type: str, to_disk: bool) -> None:
    cpu = torch.device("cpu")
    model = load(folder)
    before = run(model)
    model.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type=offload_type, num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path / "offloaded") if to_disk else None,
    )  # fmt: skip
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_sequential_offload_changes_nothing_and_leaves_nothing_behind(folder: Path, offload_buffers: bool) -> None:
    model = load(folder)
    before = run(model)
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=offload_buffers)
    for linear in quantized_linears(model).values():
        assert all(tensor.is_meta for tensor in linear.state_dict().values())
    assert torch.equal(run(model), before)


def test_a_device_map_with_the_disk_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="enable_group_offload"):
        load(folder, device_map={"": "cpu", "blocks": "disk"}, offload_folder=tmp_path / "offload")


def test_layerwise_casting_leaves_quantized_layers_alone(tmp_path: Path) -> None:
    some = {name: layer for name, layer in LAYERS.items() if "attn1" in name}
    model = load(write_component(tmp_path / "c", MODEL, some))
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    run(model)
    assert model.blocks[0].attn2.to_q.weight.dtype == torch.float8_e4m3fn
    assert quantized_linears(model).keys() == some.keys()
    for name, linear in quantized_linears(model).items():
        assert torch.equal(linear.dequantize(), LAYERS[name].dequantize())


def test_a_copy_of_a_loaded_model_computes_the_same(folder: Path) -> None:
    model = load(folder)
    assert torch.equal(run(copy.deepcopy(model)), run(model))


def test_casting_a_loaded_model_is_refused_by_diffusers(folder: Path) -> None:
    with pytest.raises(ValueError, match="quantized model"):
        load(folder).to(torch.float16)
