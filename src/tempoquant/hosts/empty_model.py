"""The denoiser of a config.json without its weights, the reference for an export's tensors."""

from collections.abc import Mapping
from typing import Any

import diffusers
from accelerate import init_empty_weights
from torch import nn

from tempoquant.checkpoint.checks import damaged
from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.errors import CheckpointError


def empty_model(model_config: Mapping[str, Any], layers: Mapping[str, LayerEntry], where: str) -> Any:
    """Build the denoiser of a config.json on the meta device, except for buffers that no file
    holds.

    Raises CheckpointError if it describes none, or one that lacks one of the layers.
    """
    class_name = str(model_config.get("_class_name"))
    kind = getattr(diffusers, class_name, None)
    if kind is None or not issubclass(kind, nn.Module):
        raise CheckpointError(f"{where} is of {class_name}, which the diffusers installed here does not have.")
    try:
        with init_empty_weights(include_buffers=False):
            model = kind.from_config(dict(model_config))
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{where} does not describe a {class_name}: {error}") from error
    modules = dict(model.named_modules())
    for name, entry in layers.items():
        linear = modules.get(name)
        wanted = (entry.out_features, entry.in_features, entry.bias is not None)
        if not isinstance(linear, nn.Linear) or wanted != (
            linear.out_features,
            linear.in_features,
            linear.bias is not None,
        ):
            raise damaged(f"{where} does not describe a model with the layer {name}")
    return model
