"""Exported files in ComfyUI itself. COMFYUI_PATH is a checkout whose nvfp4 has `pre_quant_scale`
(0.33 or later), and COMFYUI_PYTHON an interpreter that has its requirements, if it is not this one;
without the first nothing is run.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tempoquant.checkpoint import read_layer
from tempoquant.hosts.comfyui.nvfp4_export import export
from tempoquant.sqnr import sqnr_db
from tests import quantized_wan
from tests.random_layers import random
from tests.wan_files import wan_name

WIDTH, TEXT = 256, 4096
"""ComfyUI takes heads of 128 features, and texts of 4096."""
COMPONENTS = {"high_noise": "transformer", "low_noise": "transformer_2"}
USERS_LAYER = "blocks.0.attn1.to_q"


def comfyui() -> Path:
    """Return the checkout. The test is skipped without one, or if it lacks support for the
    files.
    """
    folder = os.environ.get("COMFYUI_PATH")
    if not folder:
        pytest.skip("COMFYUI_PATH names no checkout of ComfyUI")
    operations = Path(folder) / "comfy" / "ops.py"
    if "pre_quant_scale" not in operations.read_text(encoding="utf-8"):
        pytest.skip("this ComfyUI's nvfp4 has no pre_quant_scale: it is older than 0.33")
    return Path(folder)


def denoiser_of(seed: int) -> WanTransformer3DModel:
    """Make a random denoiser of a size that ComfyUI's loader recognises."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=WIDTH // 2, in_channels=36, out_channels=16,
        text_dim=TEXT, freq_dim=256, ffn_dim=2 * WIDTH, num_layers=2, rope_max_seq_len=64,
    ).eval()  # fmt: skip


def exported(folder: Path) -> tuple[Path, Path, Path]:
    """Return a quantized random pipeline, and the exported model and branch of its first
    denoiser.
    """
    source = quantized_wan.write_pipeline(folder / "quantized", "nvfp4", deflated=False, centred=False)
    for number, (denoiser, component) in enumerate(COMPONENTS.items()):
        shutil.rmtree(source / component)
        model = denoiser_of(number)
        layers = quantized_wan.quantize_all(model, "nvfp4", deflated=False, centred=False)
        quantized_wan.write_component(source / component, model, layers, denoiser=denoiser)
    [written, _] = export(source, folder / "out")
    return source, folder / "out" / written.model_file, folder / "out" / str(written.branch_file)


@torch.no_grad()
def predicted(component: Path, inputs: dict[str, torch.Tensor], user: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Return the prediction of our layers' effective weights; `user` is added to the weight of
    USERS_LAYER.
    """
    model = denoiser_of(0)
    for name in quantized_wan.quantize_all(model, "nvfp4", deflated=False, centred=False):
        model.get_submodule(name).weight.data = read_layer(component, name).dequantize()
    model.get_submodule(USERS_LAYER).weight.data += user
    return model(**inputs, return_dict=False)[0]


def test_comfyui_predicts_what_our_layers_do_in_16_bit_activations(tmp_path: Path) -> None:
    """A CPU dequantizes its 4-bit weights. The warnings of docs/comfyui-nvfp4.md hold: a second
    bypass takes the branch's place, and an ordinary LoRA gives a wrong result.
    """
    core = comfyui()
    source, model_file, branch_file = exported(tmp_path)
    inputs = {
        "hidden_states": random(2, 36, 2, 8, 8), "timestep": torch.tensor([900.0, 900.0]),
        "encoder_hidden_states": random(2, 5, TEXT, seed=1),
    }  # fmt: skip
    up, down = 0.2 * random(WIDTH, 4, seed=2), 0.2 * random(4, WIDTH, seed=3)
    key = f"diffusion_model.{wan_name(USERS_LAYER)}"
    save_file({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}, tmp_path / "user.safetensors")
    save_file(inputs, tmp_path / "inputs.safetensors")
    words = [model_file, branch_file, *(tmp_path / f"{name}.safetensors" for name in ("user", "inputs", "outputs"))]
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    run = subprocess.run(
        [python, Path(__file__).with_name("run_core.py"), *words], env={**os.environ, "PYTHONPATH": str(core)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "lora key not loaded" not in run.stderr and "unet missing" not in run.stderr
    found = load_file(tmp_path / "outputs.safetensors")
    component = source / COMPONENTS["high_noise"]
    wanted, with_user = predicted(component, inputs), predicted(component, inputs, up @ down)
    assert sqnr_db(wanted, found["branch"]) > 100
    assert sqnr_db(wanted, found["nothing"]) < 20
    assert torch.equal(found["branch, then user"], found["user"])
    change = found["branch and ordinary user"] - found["branch"]
    assert sqnr_db(with_user - wanted, change) < 12
