"""Laws of loading through diffusers: plain from_pretrained works, nothing is cast, and damage is
refused here too.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.quantizers import PipelineQuantizationConfig, auto
from safetensors.torch import load_file
from torch import nn

from tempoquant.checkpoint import check_tensors, iter_layers, read_model_config
from tempoquant.checkpoint.files import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from tempoquant.errors import UnsupportedError
from tempoquant.formats import FORMATS
from tempoquant.hosts.diffusers.loader import TempoQuantConfig, register
from tempoquant.runtime.convert import install_layers, quantized_linears
from tests.quantized_wan import (
    BINS,
    generate,
    load,
    model_config,
    quantize_all,
    run,
    tiny_pipeline,
    tiny_wan,
    write_component,
    write_pipeline,
)
from tests.random_layers import by_bin

register()
MODEL = tiny_wan(num_layers=1)
LAYERS = quantize_all(MODEL, "mixed")
LAYERS["blocks.0.attn2.to_q"] = by_bin(LAYERS["blocks.0.attn2.to_q"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_component(tmp_path / "component", MODEL, LAYERS)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "quantized")


def quantized_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of every quantized layer, straight from the files."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    layers = read_model_config(folder)["quantization_config"]["layers"]
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in layers}


def assert_same_quantized(a: Path, b: Path) -> None:
    first, second = quantized_tensors(a), quantized_tensors(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    configs = [read_model_config(folder)["quantization_config"] for folder in (a, b)]
    for config in configs:
        config.pop("weight_sha256", None)  # hashes of files that save_pretrained rewrites
    assert configs[0] == configs[1]


# Loading.


def test_registering_twice_changes_nothing() -> None:
    before = (dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING))
    register()
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)


def test_a_loaded_model_computes_what_its_layers_compute(folder: Path) -> None:
    expected = copy.deepcopy(MODEL)
    install_layers(expected, LAYERS, BINS)
    loaded = load(folder)
    assert quantized_linears(loaded).keys() == LAYERS.keys()
    for timestep in (900.0, 930.0, 990.0):
        assert torch.equal(run(loaded, timestep=timestep), run(expected, timestep=timestep))


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_the_16bit_rest_follows_diffusers_dtype_rules(tmp_path: Path, folder: Path, dtype: torch.dtype | None) -> None:
    MODEL.save_pretrained(tmp_path / "source")
    plain, quantized = load(tmp_path / "source", dtype), load(folder, dtype)
    assert plain.dtype == quantized.dtype
    rest = {name: tensor for name, tensor in quantized.state_dict().items() if name in plain.state_dict()}
    assert "proj_out.weight" in rest and "scale_shift_table" in rest
    for name, tensor in rest.items():
        if name.rpartition(".")[0] not in LAYERS:
            assert tensor.dtype == plain.state_dict()[name].dtype and torch.equal(tensor, plain.state_dict()[name])


@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("max_shard_size", ["10GB", "150KB"])
def test_quantized_tensors_survive_loading_and_saving_in_every_dtype(
    tmp_path: Path, folder: Path, dtype: torch.dtype | None, max_shard_size: str
) -> None:
    loaded = load(folder, dtype)
    loaded.save_pretrained(tmp_path / "again", max_shard_size=max_shard_size)
    assert (tmp_path / "again" / INDEX_NAME).exists() == (max_shard_size == "150KB")
    assert_same_quantized(folder, tmp_path / "again")
    check_tensors(tmp_path / "again")
    reloaded = load(tmp_path / "again", dtype)
    assert torch.equal(run(reloaded, dtype or torch.float32), run(loaded, dtype or torch.float32))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    loaded = load(folder)
    loaded.save_pretrained(first)
    loaded.save_pretrained(second)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("has", [{}, {"deflated": False}, {"rank": 0, "smoothed": False, "centred": False}], ids=str)
def test_every_format_loads(tmp_path: Path, format: str, has: dict[str, Any]) -> None:
    layers = quantize_all(MODEL, format, **has)
    loaded = load(write_component(tmp_path / "c", MODEL, layers))
    for name, layer in layers.items():
        assert torch.equal(loaded.get_submodule(name).dequantize(), layer.dequantize())


def test_a_sharded_component_loads(tmp_path: Path, folder: Path) -> None:
    sharded = write_component(tmp_path / "sharded", MODEL, LAYERS, max_shard_bytes=150_000)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(run(load(sharded)), run(load(folder)))


def test_a_device_map_is_followed(folder: Path) -> None:
    assert torch.equal(run(load(folder, device_map={"": "cpu"})), run(load(folder)))


def test_weights_stay_packed_in_memory(folder: Path) -> None:
    loaded = load(folder)
    for name, linear in quantized_linears(loaded).items():
        assert linear.num_bytes == LAYERS[name].num_bytes
        assert linear.bits_per_weight == LAYERS[name].bits_per_weight
    held = sum(tensor.numel() * tensor.element_size() for tensor in loaded.state_dict().values())
    dense = sum(tensor.numel() * tensor.element_size() for tensor in MODEL.state_dict().values())
    assert held < 0.75 * dense  # whose other half is the 16-bit rest: embeddings, which are large at this width


def test_dequantize_gives_linears_of_the_effective_weights(tmp_path: Path) -> None:
    layers = quantize_all(MODEL, "mixed")
    dense = load(write_component(tmp_path / "c", MODEL, layers), torch.float32).dequantize()
    assert not quantized_linears(dense)
    linear = dense.blocks[0].attn1.to_q
    assert type(linear) is nn.Linear and torch.equal(linear.weight, layers["blocks.0.attn1.to_q"].dequantize())


def test_a_layer_with_tensors_by_bin_is_dequantized_to_the_mean_over_bins(folder: Path) -> None:
    dense = load(folder, torch.float32).dequantize()
    for name, layer in LAYERS.items():
        linear = dense.get_submodule(name)
        assert torch.equal(linear.weight, layer.dequantize()) and torch.equal(linear.bias, layer.effective_bias())


# The pipeline.


def test_a_pipeline_loads_generates_and_saves_both_experts(pipeline: Path, tmp_path: Path) -> None:
    pipe = WanImageToVideoPipeline.from_pretrained(pipeline, dtype=torch.bfloat16)
    for denoiser in (pipe.transformer, pipe.transformer_2):
        assert quantized_linears(denoiser).keys() == LAYERS.keys()
    latents = generate(pipe)
    assert torch.isfinite(latents).all() and torch.equal(generate(pipe), latents)
    pipe.save_pretrained(tmp_path / "again")
    for name in ("transformer", "transformer_2"):
        assert_same_quantized(pipeline / name, tmp_path / "again" / name)
    again = WanImageToVideoPipeline.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    torch.testing.assert_close(generate(again), latents, rtol=0.02, atol=0.02)  # the 16-bit VAE is mapped, not copied


def test_an_expert_loads_alone_and_beside_a_16bit_partner(pipeline: Path) -> None:
    alone = WanTransformer3DModel.from_pretrained(pipeline, subfolder="transformer_2", dtype=torch.bfloat16)
    partner = tiny_wan(0, num_layers=1)
    pipe = WanImageToVideoPipeline.from_pretrained(
        pipeline, transformer=partner, transformer_2=alone, dtype=torch.bfloat16
    )
    assert not quantized_linears(pipe.transformer) and quantized_linears(pipe.transformer_2)
    assert torch.isfinite(generate(pipe)).all()


def test_two_pipelines_in_one_process_do_not_disturb_each_other(pipeline: Path) -> None:
    first, second = (WanImageToVideoPipeline.from_pretrained(pipeline, dtype=torch.bfloat16) for _ in range(2))
    expected = generate(first)
    generate(second, seed=1)
    assert torch.equal(generate(first), expected)


# Quantizing while loading.


def test_quantizing_while_loading_is_refused_and_names_the_way(tmp_path: Path, folder: Path) -> None:
    MODEL.save_pretrained(tmp_path / "source")
    config = TempoQuantConfig.from_dict(read_model_config(folder)["quantization_config"])
    with pytest.raises(UnsupportedError, match=r"tempoquant\.quantize"):
        load(tmp_path / "source", quantization_config=config)


def test_quantizing_a_pipeline_while_loading_is_refused(pipeline: Path, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    config = TempoQuantConfig.from_dict(read_model_config(pipeline / "transformer")["quantization_config"])
    with pytest.raises(UnsupportedError, match=r"tempoquant\.quantize"):
        WanImageToVideoPipeline.from_pretrained(
            tmp_path, quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": config})
        )


def test_the_written_config_loads_without_a_warning(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(folder)
    assert capfd.readouterr().err == ""


def test_layers_read_by_the_reader_are_those_that_diffusers_loads(folder: Path) -> None:
    loaded = quantized_linears(load(folder))
    for name, layer in iter_layers(folder):
        assert all(torch.equal(loaded[name].dequantize(i), layer.dequantize(i)) for i in range(BINS.num_bins))
    assert model_config(MODEL).items() <= read_model_config(folder).items()
