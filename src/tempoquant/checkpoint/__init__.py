"""The quantized component on disk: its config (schema), the tensors of each layer (tensors),
writing and reading it.
"""

from tempoquant.checkpoint.reader import (
    check_tensors,
    iter_layers,
    iter_rest,
    read_config,
    read_layer,
    read_model_config,
    read_tensor,
    verify_hashes,
)
from tempoquant.checkpoint.schema import FORMAT_VERSION, QUANT_METHOD, Calibration, ComponentConfig, LayerEntry
from tempoquant.checkpoint.writer import ComponentWriter

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "Calibration",
    "ComponentConfig",
    "ComponentWriter",
    "LayerEntry",
    "check_tensors",
    "iter_layers",
    "iter_rest",
    "read_config",
    "read_layer",
    "read_model_config",
    "read_tensor",
    "verify_hashes",
]
