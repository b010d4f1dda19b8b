"""Loading of a stored denoiser into ComfyUI's model: its own class on the meta device, our linears
in it, every tensor.

ComfyUI's loader infers a model's settings from the shapes in a file, which 4-bit tensors do not
show. So the settings come from the denoiser's config.json, and the keys are checked here (ComfyUI
only warns).
"""

import logging
from dataclasses import dataclass
from typing import Any

import comfy.model_detection
import comfy.model_management
import torch
from torch import nn

from tempoquant.checkpoint.checks import damaged
from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.checkpoint.schema import ComponentConfig
from tempoquant.errors import ModelError
from tempoquant.hosts.comfyui.linear import ComfyLinear
from tempoquant.hosts.comfyui.names import comfy_module, comfy_tensor
from tempoquant.hosts.comfyui.patcher import TempoQuantPatcher
from tempoquant.hosts.comfyui.stored import StoredDenoiser
from tempoquant.runtime.bin_clock import BinClock
from tempoquant.runtime.convert import quantized_linears, replace_linears
from tempoquant.runtime.share_inputs import share_inputs

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """The source of our model in ComfyUI, as its attribute `tempoquant`.

    Attributes:
        stored: the denoiser on disk.
        clock: of its layers.
        dtype: of its computation.
    """

    stored: StoredDenoiser
    clock: BinClock
    dtype: torch.dtype


def default_dtype(device: torch.device) -> torch.dtype:
    """Return the compute dtype of a device: bfloat16 if it is fast there, else float16, and float32
    on a CPU.
    """
    if comfy.model_management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32


def load_model(stored: StoredDenoiser, dtype: torch.dtype | None = None) -> TempoQuantPatcher:
    """Load a denoiser as ComfyUI's MODEL, on the device where ComfyUI keeps idle models.

    Args:
        dtype: to compute in; None for `default_dtype`.

    Raises:
        ModelError: ComfyUI has no class for it.
        CheckpointError: its tensors differ from those of the class that its config describes.
    """
    device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    dtype = dtype or default_dtype(device)
    model = _empty_model(stored, dtype)
    clock = _put_linears(model.diffusion_model, stored, dtype)
    _fill(model.diffusion_model, stored, dtype)
    _prepare(model.diffusion_model, stored)
    model.device = offload_device  # ComfyUI records its construction there
    model.eval().requires_grad_(False)
    model.to(offload_device)
    model.tempoquant = Loaded(stored, clock, dtype)
    patcher = TempoQuantPatcher(model, load_device=device, offload_device=offload_device)
    _logger.info("TempoQuant: %s from %s, %.2f GiB", stored.name, stored.where, patcher.model_size() / 2**30)
    return patcher


def loaded_of(patcher: Any) -> Loaded:
    """Return the source of a MODEL. Raises ModelError for one that TempoQuant did not load."""
    loaded = getattr(patcher.model, "tempoquant", None)
    if not isinstance(loaded, Loaded):
        raise ModelError("this model was not loaded by TempoQuant: connect one from a TempoQuant loader.")
    return loaded


def _empty_model(stored: StoredDenoiser, dtype: torch.dtype) -> Any:
    try:
        settings = stored.layout.settings(stored.header.config)
    except KeyError as error:
        raise damaged(f"the config in {stored.where} does not say {error}") from error
    config = comfy.model_detection.model_config_from_unet_config(settings)
    if config is None:
        raise ModelError(f"the ComfyUI installed here has no model like {stored.where}: update ComfyUI.")
    config.set_inference_dtype(dtype, None)
    return config.get_model({}, "", device=torch.device("meta"))


def _put_linears(model: nn.Module, stored: StoredDenoiser, dtype: torch.dtype) -> BinClock:
    quantization, layout = stored.header.quantization, stored.layout
    layers = {comfy_module(name, stored.family): entry for name, entry in quantization.layers.items()}
    call = ModelCall(layout.timestep_argument)
    return replace_linears(model, layers, quantization.bins, dtype, call, ComfyLinear)


def _fill(model: nn.Module, stored: StoredDenoiser, dtype: torch.dtype) -> None:
    """Read every tensor. Raises CheckpointError unless they are exactly the model's, in its
    shapes.
    """
    linears = quantized_linears(model)
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (name.endswith(".weight") and name.removesuffix(".weight") in linears)
    }
    found = {comfy_tensor(name, stored.family): form.shape for name, (_, _, form) in stored.places.items()}
    for name in sorted(wanted.keys() ^ found.keys()):
        what = "lacks" if name in wanted else "holds"
        raise damaged(f"{stored.where} {what} {name}, which is {'' if name in wanted else 'not '}in ComfyUI's model")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise damaged(f"{name} is {list(found[name])} in {stored.where}, but {list(shape)} in ComfyUI's model")
    tensors = {}
    for own, tensor in stored.tensors():
        name = comfy_tensor(own, stored.family)
        module = name.rpartition(".")[0]
        in_float32 = module in stored.layout.in_float32
        tensors[name] = tensor if module in linears else tensor.to(torch.float32 if in_float32 else dtype)
    model.load_state_dict(tensors, assign=True)
    for name, linear in linears.items():
        linear.check(name)


def _prepare(model: nn.Module, stored: StoredDenoiser) -> None:
    """Let linears that read one input quantize it once, and look up the facts that FP8 kernels need
    of a weight.
    """
    quantization: ComponentConfig = stored.header.quantization
    call = quantization.call or stored.family.call
    groups = call.sharing_an_input(quantization.layers)
    share_inputs(model, [[comfy_module(name, stored.family) for name in group] for group in groups])
    for linear in quantized_linears(model).values():
        if linear.entry.format.is_fp8_exact:
            _ = linear.fits_fp8
