"""Conversion of a model's linears into QuantizedLinears, by name, with a clock."""

from collections.abc import Mapping

import torch
from torch import nn

from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.errors import CheckpointError
from tempoquant.layer import QuantizedLayer
from tempoquant.runtime.bin_clock import BinClock
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.timesteps import TimestepBins


def replace_linears(
    model: nn.Module,
    layers: Mapping[str, LayerEntry],
    bins: TimestepBins,
    compute_dtype: torch.dtype = torch.bfloat16,
    call: ModelCall | None = None,
    kind: type[QuantizedLinear] = QuantizedLinear,
) -> BinClock:
    """Replace linears by empty QuantizedLinears on the meta device, and attach a clock to the
    model.

    Args:
        model: holds the linears that `layers` names.
        call: how the model takes its timestep; the default suits most models.
        kind: the class of QuantizedLinear to use.

    Raises CheckpointError if the model has no such linear, or one of another shape; the model is
    then unchanged.
    """
    for name, entry in layers.items():
        _check_linear(model, name, entry)
    clock = BinClock(bins, call)
    clock.attach(model)
    for name, entry in layers.items():
        # set_submodule indexes into ModuleLists (`to_out.0`, `ffn.net.2`), which have no attribute
        # "0".
        model.set_submodule(name, kind(entry, clock, compute_dtype, device="meta"))
    return clock


def install_layers(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    bins: TimestepBins,
    compute_dtype: torch.dtype = torch.bfloat16,
) -> BinClock:
    """Replace linears by layers that are already in memory (they are shared, not copied), and
    attach a clock.
    """
    modules = {name: (layer, QuantizedLinear.from_layer(layer).entry) for name, layer in layers.items()}
    clock = replace_linears(model, {name: entry for name, (_, entry) in modules.items()}, bins, compute_dtype)
    for name, layer in layers.items():
        model.set_submodule(name, QuantizedLinear.from_layer(layer, clock, compute_dtype))
    return clock


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return every QuantizedLinear of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def _check_linear(model: nn.Module, name: str, entry: LayerEntry) -> None:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"the model has no layer {name}: config.json describes another model.") from error
    if not isinstance(module, nn.Linear) or isinstance(module, QuantizedLinear):
        raise CheckpointError(
            f"{name} is a {type(module).__name__}, not a linear: config.json describes another model."
        )
    found = (module.out_features, module.in_features, module.bias is not None)
    has_bias = entry.bias is not None and (found[2] or not entry.centred)  # centring adds a bias
    if found != (entry.out_features, entry.in_features, has_bias):
        raise CheckpointError(
            f"{name} is {found[0]} × {found[1]}{'' if found[2] else ' without bias'} in the model, but "
            f"{entry.out_features} × {entry.in_features} in quantization_config: config.json contradicts itself."
        )
