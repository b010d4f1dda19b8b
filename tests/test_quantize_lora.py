"""LoRAs are in the weights before they are quantized, and change how calibration and the result sample."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tempoquant
from tempoquant import Recipe
from tempoquant.checkpoint import read_config
from tempoquant.errors import ModelError, RecipeError
from tempoquant.integrations.lora import Lora
from tempoquant.tiny import weights_folder
from tests.test_quantize import all_tensors

TARGETS = ("blocks.0.attn1.to_q", "blocks.3.ffn.net.2", "condition_embedder.text_embedder.linear_1")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    weights = load_file(weights_folder() / "transformer" / "diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in TARGETS:
        rows, columns = weights[f"{name}.weight"].shape
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"transformer.{name}.lora_B.weight"] = 0.1 * torch.randn(rows, 4, generator=generator)
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def test_quantizing_with_a_lora_is_quantizing_the_model_it_is_fused_into(tmp_path: Path, lora: Path) -> None:
    fused = Path(shutil.copytree(weights_folder(), tmp_path / "fused"))
    file = fused / "transformer" / "diffusion_pytorch_model.safetensors"
    loaded = Lora.load(lora)
    save_file({name: loaded.fuse(name, tensor) for name, tensor in load_file(file).items()}, file)
    wanted = tempoquant.quantize(fused, tmp_path / "wanted", "rtn")
    found = tempoquant.quantize("tiny", tmp_path / "found", "rtn", lora={"high_noise": lora})
    plain = tempoquant.quantize("tiny", tmp_path / "plain", "rtn")
    for component, changes in (("transformer", True), ("transformer_2", False)):
        one, other, none = (all_tensors(folder / component) for folder in (wanted, found, plain))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert changes == any(not torch.equal(one[name], none[name]) for name in one)


def test_a_lora_changes_the_sampler_of_calibration_and_result(tmp_path: Path, lora: Path) -> None:
    recipe = Recipe.load("svdquant").replace(rank=0, num_prompts=1, num_frames=5)
    folder = tempoquant.quantize("tiny", tmp_path / "out", recipe, lora={"high_noise": lora})
    config = read_config(folder / "transformer")
    assert config.calibration is not None
    for settings in (config.calibration.settings, json.loads((folder / "sampling.json").read_text())):
        assert (settings["num_steps"], settings["guidance_scale"], settings["flow_shift"]) == (4, 1.0, 5.0)
    assert config.notes == (f"the LoRA lora.safetensors (SHA-256 {Lora.load(lora).sha256}) is in the weights",)
    assert read_config(folder / "transformer_2").notes == ()
    asked = tempoquant.quantize("tiny", tmp_path / "asked", recipe.replace(num_steps=6), lora={"high_noise": lora})
    assert json.loads((asked / "sampling.json").read_text())["num_steps"] == 6


def test_a_lora_that_does_not_fit_is_refused_before_any_work(tmp_path: Path, lora: Path) -> None:
    tensors = load_file(lora)
    wide = {name: torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1]) if "lora_A" in name else tensor
            for name, tensor in tensors.items()}  # fmt: skip
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(ModelError, match=r"blocks\.0\.attn1\.to_q\.weight"):
        tempoquant.quantize("tiny", tmp_path / "out", "rtn", lora={"high_noise": tmp_path / "wide.safetensors"})
    with pytest.raises(RecipeError, match="belongs to high_noise or low_noise, not 'both'"):
        tempoquant.quantize("tiny", tmp_path / "out", "rtn", lora={"both": lora})
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()


def test_another_lora_is_another_run(tmp_path: Path, lora: Path) -> None:
    tempoquant.quantize("tiny", tmp_path / "out", "rtn", lora={"high_noise": lora})
    with pytest.raises(tempoquant.TempoQuantError, match="different lora"):
        tempoquant.quantize("tiny", tmp_path / "out", "rtn")
