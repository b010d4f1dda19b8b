"""A real ComfyUI, when COMFYUI_PATH names a checkout of it and this Python has its requirements."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

COMFYUI_PATH = os.environ.get("COMFYUI_PATH")
needs_comfyui = pytest.mark.skipif(COMFYUI_PATH is None, reason="COMFYUI_PATH names no checkout of ComfyUI")


def import_comfyui() -> None:
    """Make ComfyUI importable, on the CPU. Its folder comes last: it has packages called tests and
    utils.
    """
    assert COMFYUI_PATH is not None
    if COMFYUI_PATH not in sys.path:
        sys.path.append(COMFYUI_PATH)
    from comfy.cli_args import args

    args.cpu = True


def sqnr_db(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Compute the SQNR of a tensor against another."""
    error = (found.double() - wanted.double()).square().sum()
    return float(10 * torch.log10(wanted.double().square().sum() / error.clamp_min(1e-300)))


def load(path: Path, name: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """Load a denoiser as ComfyUI's MODEL, by our loader."""
    import_comfyui()
    from tempoquant.hosts.comfyui.loader import load_model
    from tempoquant.hosts.comfyui.stored import open_denoiser

    return load_model(open_denoiser(path, name), dtype)


def dense(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a 16-bit denoiser's folder as ComfyUI's own classes load the original release's
    names.
    """
    import_comfyui()
    import comfy.model_detection
    import comfy.model_management
    import comfy.model_patcher

    from tempoquant.checkpoint.reader import read_model_config
    from tempoquant.models.wan.comfyui import COMFYUI
    from tests.wan_files import state_of, wan_name

    config = comfy.model_detection.model_config_from_unet_config(COMFYUI.settings(read_model_config(folder)))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "")
    model.load_model_weights({wan_name(name): tensor for name, tensor in state_of(folder.parent, folder.name).items()})
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


@torch.inference_mode()
def predict(patcher: Any, inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return ComfyUI's answer to the arguments of a call of diffusers' model."""
    hidden, text = inputs["hidden_states"].to(dtype), inputs["encoder_hidden_states"].to(dtype)
    rest = {key: value.to(dtype) for key, value in inputs.items() if key in ("clip_fea", "vace_context")}
    rest |= {key: value for key, value in inputs.items() if key == "vace_strength"}
    return patcher.model.diffusion_model(hidden, inputs["timestep"].float(), context=text, **rest).float()


def on_device(patcher: Any, lowvram_bytes: int = 0) -> Any:
    """Make ComfyUI load a model as before sampling; with few bytes, most of it stays away and is
    streamed.
    """
    patcher.patch_model(patcher.load_device, lowvram_model_memory=lowvram_bytes)
    return patcher
