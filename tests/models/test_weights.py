"""Laws of reading a denoiser tensor by tensor."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tempoquant.errors import ModelError
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.tiny import weights_folder
from tests.quantized_wan import write_pipeline


def weights(folder: Path | None = None, dtype: torch.dtype = torch.float32) -> DenoiserWeights:
    return DenoiserWeights(SourceModel.open(folder or weights_folder()), "low_noise", dtype, "cpu")


def filled(source: DenoiserWeights) -> WanTransformer3DModel:
    model = source.empty_model()
    source.fill(model, "")
    for index, block in enumerate(model.blocks):
        source.fill(block, f"blocks.{index}.")
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(weights_folder(), tmp_path / "model"))


def sharded_in_float32(folder: Path) -> Path:
    """Write Wan2.2 as on the hub: several shards of float32, and an index."""
    component = folder / "transformer_2"
    [file] = component.glob("*.safetensors")
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    file.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(3):
        shard = f"diffusion_pytorch_model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, component / shard)
        weight_map |= dict.fromkeys(names[number::3], shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (component / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_filled_model_is_the_one_diffusers_loads(folder: Path, dtype: torch.dtype, sharded: bool) -> None:
    if sharded:
        sharded_in_float32(folder)
    ours = filled(weights(folder, dtype))
    theirs = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer_2", dtype=dtype)
    for mine, wanted in ((ours.state_dict(), theirs.state_dict()), *[
        (dict(model.named_buffers()), dict(other.named_buffers())) for model, other in [(ours, theirs)]
    ]):  # fmt: skip
        assert mine.keys() == wanted.keys()
        assert all(torch.equal(mine[name], wanted[name]) and mine[name].dtype == wanted[name].dtype for name in wanted)


def test_nothing_is_in_memory_but_what_was_filled() -> None:
    source = weights()
    model = source.empty_model()
    assert all(parameter.is_meta for parameter in model.parameters())
    source.fill(model.blocks[1], "blocks.1.")
    real = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert real and all(name.startswith("blocks.1.") for name in real)
    source.release(model.blocks[1], "blocks.1.")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_filling_the_model_leaves_its_blocks_out() -> None:
    source = weights()
    model = source.empty_model()
    source.fill(model, "")
    real = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert "proj_out.weight" in real and not any(name.startswith("blocks.") for name in real)


def test_what_is_read_is_as_stored(folder: Path) -> None:
    assert weights(folder).read("blocks.0.attn1.to_q.bias").dtype == torch.bfloat16
    assert weights(folder).read("blocks.0.scale_shift_table").dtype == torch.float32
    found = dict(weights(folder).stored(lambda name: name.startswith("blocks.0.")))
    assert list(found) == sorted(found) and not any(name.startswith("blocks.1.") for name in found)


def changed(folder: Path, name: str, change: torch.Tensor | None) -> Path:
    [file] = (folder / "transformer_2").glob("*.safetensors")
    tensors = load_file(file)
    tensors = {**tensors, name: change} if change is not None else {k: v for k, v in tensors.items() if k != name}
    save_file(tensors, file)
    return folder


def test_a_missing_weight_is_named_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks 1 weight\(s\), such as blocks\.1\.attn2\.to_k\.weight"):
        weights(changed(folder, "blocks.1.attn2.to_k.weight", None))


def test_a_weight_of_another_shape_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"proj_out\.bias in .* is \[3\]"):
        weights(changed(folder, "proj_out.bias", torch.zeros(3)))


def test_a_quantized_expert_is_no_16_bit_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"transformer_2 is already quantized: start from the 16-bit model"):
        weights(write_pipeline(tmp_path / "quantized"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    source = weights(changed(folder, "proj_out.bias", torch.full((64,), value)))
    with pytest.raises(ModelError, match=r"proj_out\.bias in .* holds NaN or Inf"):
        source.read("proj_out.bias")


def test_a_truncated_shard_is_one_sentence(folder: Path) -> None:
    shard = sorted((sharded_in_float32(folder) / "transformer_2").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"00002-of-00003\.safetensors is not a whole safetensors file"):
        weights(folder)
