"""Inputs that are no source: each is refused by its kind, with a replacement."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tempoquant.errors import ModelError
from tempoquant.hosts.diffusers.pipeline import load_pipeline, open_pipeline
from tempoquant.models.pipeline_configs import read_configs
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.models.with_experts import WithExperts
from tests.wan_files import as_bytes, state_of, write_fp8, write_single

Tensors = dict[str, torch.Tensor]


def gguf(folder: Path) -> Any:
    file = folder.parent / "wan2.2-q4.gguf"
    file.write_bytes(b"GGUF")
    return WithExperts(folder, {"high_noise": file})


def pickled(folder: Path) -> Any:
    file = folder.parent / "wan.pth"
    file.write_bytes(b"PK")
    return WithExperts(folder, {"high_noise": file})


def given(name: str, change: Callable[[Tensors], Any]) -> Callable[[Path], Any]:
    """Return a single file with some of its tensors changed."""

    def write_file(folder: Path) -> Any:
        file = folder.parent / "given.safetensors"
        write_fp8(file, state_of(folder)) if name == "fp8" else write_single(file, state_of(folder))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return WithExperts(folder, {"high_noise": file})

    return write_file


def twice(folder: Path) -> Any:
    file = write_single(folder.parent / "one.safetensors", state_of(folder))
    return WithExperts(folder, {"high_noise": file, "low_noise": file})


def of_another_model(folder: Path) -> Any:
    state = state_of(folder)
    wider = torch.zeros(128, 36, 1, 2, 2)
    file = write_single(folder.parent / "i2v.safetensors", {**state, "patch_embedding.weight": wider})
    return WithExperts(folder, {"high_noise": file})


def quantized(method: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> Any:
        config = folder / "transformer_2" / "config.json"
        section = {"quant_method": method, "load_in_4bit": True}
        config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": section}))
        return folder

    return change


def original(folder: Path) -> Any:
    release = folder.parent / "Wan2.2-I2V-A14B"
    for name in ("high_noise", "low_noise"):
        write_single(release / f"{name}_model" / "diffusion_pytorch_model.safetensors", state_of(folder))
    (release / "Wan2.1_VAE.pth").write_bytes(b"PK")
    return release


def original_single(folder: Path) -> Any:
    release = folder.parent / "Wan2.1-T2V-1.3B"
    write_single(release / "diffusion_pytorch_model.safetensors", state_of(folder))
    (release / "config.json").write_text('{"_class_name": "WanModel", "model_type": "t2v"}')
    return release


def alone(suffix: str) -> Callable[[Path], Any]:
    def write_file(folder: Path) -> Any:
        file = folder.parent / f"wan{suffix}"
        file.write_bytes(b"")
        return file

    return write_file


def only_gguf(folder: Path) -> Any:
    for file in (folder / "transformer").glob("*.safetensors"):
        file.rename(file.with_suffix(".gguf"))
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gguf": (gguf, r"wan2\.2-q4\.gguf is a GGUF file, .*give its weights as safetensors in 16 bits or fp8_scaled"),
    "pickle": (pickled, r"wan\.pth would have to be unpickled, .*give its weights as safetensors"),
    "missing": (lambda folder: WithExperts(folder, {"high_noise": "no/file"}), "no file or folder no/file to read"),
    "unknown": (lambda folder: WithExperts(folder, {"transformer": folder / "vae"}),
                "model has no denoiser 'transformer', only high_noise and low_noise"),
    "twice": (twice, "one.safetensors is given as high_noise and as low_noise: each has weights of its own"),
    "empty": (lambda folder: WithExperts(folder, {"high_noise": folder.parent / "model" / "scheduler"}),
              "is no safetensors file: give"),
    "lacking": (given("", lambda t: t.pop("head.head.bias")),
                r"given.safetensors lacks 1 weight\(s\), such as proj_out.bias: give files of the model that .*config"),
    "left over": (given("", lambda t: t.update({"blocks.0.adapter.weight": torch.ones(2)})),
                  "holds blocks.0.adapter.weight, which is not known as a part of a WanTransformer3DModel"),
    "another block": (given("", lambda t: t.update({"blocks.7.ffn.0.weight": torch.ones(2)})),
                      r"holds blocks.7.ffn.net.0.proj.weight, which its model lacks"),
    "lora": (given("", lambda t: t.update({"blocks.0.ffn.0.lora_A.weight": torch.ones(2)})),
             "blocks.0.ffn.0.lora_A.weight, which is a LoRA's, which --lora takes"),
    "another model": (of_another_model,
                      r"patch_embedding.weight in .*i2v.safetensors is \[128, 36, 1, 2, 2\], but \[128, 16, 1, 2, 2\]"),
    "scale without 8 bits": (given("", lambda t: t.update({"blocks.0.ffn.0.scale_weight": torch.ones(())})),
                             "blocks.0.ffn.0.scale_weight in .* scales no 8-bit weight"),
    "scale by group": (given("fp8", lambda t: t.update({"blocks.0.ffn.0.scale_weight": torch.ones(256, 4)})),
                       r"blocks.0.ffn.0.scale_weight in .* is \[256, 4\] .*only one scale for a weight or for each"),
    "another format": (given("fp8", lambda t: t.update({"blocks.0.ffn.0.comfy_quant": as_bytes({"format": "nvfp4"})})),
                       "is quantized already .nvfp4, by its blocks.0.ffn.0.comfy_quant"),
    "bitsandbytes": (quantized("bitsandbytes"),
                     r"transformer_2 is already quantized \(by bitsandbytes\): start from the 16-bit model"),
    "torchao": (quantized("torchao"), r"transformer_2 is already quantized \(by torchao\): start from"),
    "original release": (original, r"Wan2.2-I2V-A14B is an original release, no diffusers pipeline: give --base "
                         r"Wan-AI/Wan2.2-I2V-A14B-Diffusers and --expert high_noise=\S+/high_noise_model --expert l"),
    "original single": (original_single, r"give --base Wan-AI/Wan2.1-T2V-1.3B-Diffusers and --expert transformer=\S+B"),
    "one file": (alone(".safetensors"), r"wan.safetensors is one file of weights, .*--base .*--expert DENOISER=\S+wan"),
    "one gguf": (alone(".gguf"), r"wan.gguf is a GGUF file"),
    "one pickle": (alone(".ckpt"), r"wan.ckpt would have to be unpickled"),
    "gguf in a folder": (only_gguf, r"transformer/\S+.gguf is a GGUF file"),
    "configs alone": (lambda folder: folder / "vae", "vae has no model_index.json, so it is no diffusers pipeline"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_what_it_is(case: str, folder: Path) -> None:
    prepare, words = REFUSED[case]
    with pytest.raises(ModelError, match=words) as refused:
        open_pipeline(prepare(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "gguf", "quanto"])
def test_a_quantized_denoiser_is_no_source_for_anything(method: str, folder: Path) -> None:
    quantized(method)(folder)
    words = rf"transformer_2 is already quantized \(by {method}\): start from the 16-bit model"
    with pytest.raises(ModelError, match=words):
        DenoiserWeights(SourceModel.open(folder), "low_noise", torch.float32, "cpu")
    with pytest.raises(ModelError, match=words):
        read_configs(str(folder))
    with pytest.raises(ModelError, match=words):
        SourceModel.open(WithExperts(folder, {"low_noise": folder / "transformer_2"}))


def test_a_package_that_a_component_needs_and_that_is_absent_is_one_sentence(folder: Path) -> None:
    config = folder / "text_encoder" / "config.json"
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": section}))
    with pytest.raises(ModelError, match=r"does not load as a .*bitsandbytes"):
        load_pipeline(open_pipeline(folder), "cpu")
