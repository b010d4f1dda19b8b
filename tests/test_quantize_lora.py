"""LoRAs are in the weights before they are quantized, and change how calibration and the result
sample.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tempoquant
from tempoquant import Recipe
from tempoquant.checkpoint import read_config
from tempoquant.errors import ModelError, RecipeError
from tempoquant.models.lora.lora import Lora
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.family import WAN
from tempoquant.progress import SILENT
from tempoquant.quantizing.run import prepare_run
from tempoquant.tiny import weights_folder
from tests.recorded import SOURCE
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
    loaded = Lora.load(lora, WAN)
    save_file({name: loaded.fuse(name, tensor) for name, tensor in load_file(file).items()}, file)
    wanted = tempoquant.quantize(fused, tmp_path / "wanted", "rtn")
    found = tempoquant.quantize("tiny", tmp_path / "found", "rtn", lora={"high_noise": lora})
    plain = tempoquant.quantize("tiny", tmp_path / "plain", "rtn")
    for component, changes in (("transformer", True), ("transformer_2", False)):
        one, other, none = (all_tensors(folder / component) for folder in (wanted, found, plain))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert changes == any(not torch.equal(one[name], none[name]) for name in one)


def test_a_lora_of_few_steps_changes_the_sampler_of_calibration_and_result(tmp_path: Path, lora: Path) -> None:
    distilled = Path(shutil.copy(lora, tmp_path / "lora_4steps.safetensors"))
    recipe = Recipe.load("svdquant").replace(rank=0, num_prompts=1, num_frames=5)
    folder = tempoquant.quantize("tiny", tmp_path / "out", recipe, lora={"high_noise": (distilled, 0.5)})
    config, own = read_config(folder / "transformer"), default_settings(SOURCE)
    assert config.calibration is not None
    for settings in (config.calibration.settings, json.loads((folder / "sampling.json").read_text())):
        assert (settings["num_steps"], settings["guidance_scale"], settings["flow_shift"]) == (4, 1.0, 5.0)
    assert default_settings(SourceModel.open(folder)) == own.replace(num_steps=4, guidance_scale=1.0, flow_shift=5.0), (
        "the rest stays"
    )
    note = (
        f"the LoRA lora_4steps.safetensors (SHA-256 {Lora.load(lora, WAN).sha256}) is in the weights with strength 0.5"
    )
    assert config.notes == (note,) and read_config(folder / "transformer_2").notes == ()
    asked = sampling_of(recipe.replace(num_steps=6), {"high_noise": distilled})
    assert asked == own.replace(num_steps=6, guidance_scale=1.0, flow_shift=5.0).to_dict()


def sampling_of(recipe: Recipe, lora: dict[str, Any]) -> dict[str, Any] | None:
    return prepare_run("tiny", recipe, None, 0, None, lora, SILENT, identify=False).sampling


def test_any_other_lora_leaves_the_sampler_to_the_model_or_to_who_asks(lora: Path) -> None:
    own, recipe = default_settings(SOURCE), Recipe.load("svdquant").replace(num_frames=5)
    assert sampling_of(recipe, {}) is sampling_of(recipe, {"high_noise": lora}) is None
    asked = sampling_of(recipe.replace(num_steps=4, guidance_scale=1.0), {"high_noise": lora})
    assert asked == own.replace(num_steps=4, guidance_scale=1.0).to_dict()


def test_several_loras_with_strengths_are_in_the_weights(tmp_path: Path, lora: Path) -> None:
    """Half of one and half of its copy are the whole."""
    other = Path(shutil.copy(lora, tmp_path / "other.safetensors"))
    once = tempoquant.quantize("tiny", tmp_path / "once", "rtn", lora={"high_noise": lora})
    halves = tempoquant.quantize("tiny", tmp_path / "halves", "rtn", lora={"high_noise": [(lora, 0.5), (other, 0.5)]})
    one, two = (all_tensors(folder / "transformer") for folder in (once, halves))
    target = "condition_embedder.text_embedder.linear_1.weight"
    torch.testing.assert_close(two[target].float(), one[target].float(), rtol=2**-7, atol=1e-6)
    with pytest.raises(tempoquant.TempoQuantError, match="different lora"):
        tempoquant.quantize("tiny", tmp_path / "halves", "rtn", lora={"high_noise": [(lora, 0.5), (other, 0.25)]})
    with pytest.raises(RecipeError, match="is given twice for high_noise"):
        tempoquant.quantize("tiny", tmp_path / "out", "rtn", lora={"high_noise": [lora, (lora, 0.5)]})


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
