"""Quantizes text encoders by transformers' own quantizers: plain transformers and diffusers load
what is saved.

torchao holds a linear in eight bits with a scale for each output feature, bitsandbytes in NF4 with
one for each 64 weights. Both save as safetensors, and need no GPU. Embeddings, norms and what
transformers itself leaves out stay as they were stored: bitsandbytes leaves out T5's and UMT5's
`wo`, which these models keep for float32.
"""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from tempoquant.errors import ModelError, OutputError, UnsupportedError
from tempoquant.hosts.text_encoder_contents import NEEDS
from tempoquant.layer_rule import KEPT_TEXT_ENCODER, TextEncoderFormat
from tempoquant.models.component_files import Component

_NF4_TABLE = 4 * 16 + 79  # bytes: levels, and how it was quantized, in JSON
_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError)
_LENGTH_BYTES = 8  # of a safetensors file, before its header


def require_quantizer(format: TextEncoderFormat) -> None:
    """Raise UnsupportedError where the package that a format needs is not installed."""
    package = NEEDS.get(format)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UnsupportedError(
            f"text encoders in {format} need {package}, which is not installed: pip install 'tempoquant[text-encoder]'."
        )


def quantized_encoder(component: Component, format: TextEncoderFormat) -> Any:
    """Load a 16-bit text encoder to the CPU, its linears quantized as they are read.

    Raises:
        ModelError: it is quantized already, or does not load.
        UnsupportedError: the package that the format needs is not installed.
    """
    require_quantizer(format)
    component.require_16_bit()
    kind: Any = component.kind
    try:
        model = kind.from_pretrained(
            component.folder,
            dtype="auto",
            variant=component.variant,
            use_safetensors=True,
            local_files_only=True,
            quantization_config=_settings(format, _dtypes_of_linears(component, format)),
            device_map={"": "cpu"},
        )
    except _ERRORS as error:
        raise ModelError(f"{component.folder} does not load in {format}: {error}") from error
    return model.eval()


def save_quantized(component: Component, format: TextEncoderFormat, folder: Path) -> None:
    """Write a text encoder with quantized linears: the same bytes every time.

    It is saved before it runs: bitsandbytes packs weights anew for a CPU that they run on.

    Raises:
        ModelError, UnsupportedError: as `quantized_encoder`; or transformers wrote no quantization.
        OutputError: the disk refuses.
    """
    model = quantized_encoder(component, format)
    try:
        model.save_pretrained(folder)
    except OSError as error:
        raise OutputError(f"{folder} could not be written: {error.strerror or error}.") from error
    files = sorted(folder.glob("*.safetensors"))
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not files or "quantization_config" not in written:
        raise ModelError(f"transformers wrote {component.class_name} in {format} without its quantization: upgrade it.")
    for file in files:
        _settle_header(file)


def linear_bytes(model: nn.Module, format: TextEncoderFormat) -> dict[nn.Linear, int]:
    """Return what is stored in place of the weight of each linear that transformers would quantize.

    torchao keeps a scale in float32 and a zero point for each output feature, bitsandbytes a scale
    in float32 for each 64 weights and a table of sixteen numbers. Counted without the package, and
    without weights.
    """
    if format == KEPT_TEXT_ENCODER:
        return {}
    kept = HfQuantizer.get_modules_to_not_convert(model, None, getattr(model, "_keep_in_fp32_modules", None))
    # torchao's quantizer asks by the names of weights, for which the end of a module's name is not
    # kept.
    end = ".weight" if format == "int8" else ""
    found: dict[nn.Linear, int] = {}
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or isinstance(linear, NonDynamicallyQuantizableLinear):
            continue
        if should_convert_module(name + end, kept):
            weights = linear.out_features * linear.in_features
            int8 = weights + linear.out_features * (4 + 1)
            found[linear] = int8 if format == "int8" else weights // 2 + 4 * -(-weights // 64) + _NF4_TABLE
    return found


def is_quantized(model: nn.Module) -> bool:
    """Return whether transformers quantized a model, whose tensors then hold more than their
    numbers.
    """
    return isinstance(getattr(model, "hf_quantizer", None), HfQuantizer)


def _dtypes_of_linears(component: Component, format: TextEncoderFormat) -> set[torch.dtype]:
    """Return the stored dtypes of the weights that a format quantizes: norms may have others."""
    kind: Any = component.kind
    with torch.device("meta"):
        model = kind(kind.config_class.from_pretrained(component.folder, local_files_only=True))
    quantized = linear_bytes(model, format)
    weights = {f"{name}.weight" for name, module in model.named_modules() if module in quantized}
    return {form.dtype for name, (_, form) in component.forms.items() if name in weights}


def _settings(format: TextEncoderFormat, dtypes: Iterable[torch.dtype]) -> Any:
    """Return the settings for transformers' quantizer."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if format == "nf4":
        wide = torch.float32 if torch.float32 in dtypes else torch.bfloat16
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=wide)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


def _settle_header(file: Path) -> None:
    """Sort the header of a safetensors file, in place: the library writes its texts in random
    order.
    """
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        header = json.loads(stream.read(length))
        texts = header.pop("__metadata__", {})
        ordered = {"__metadata__": dict(sorted(texts.items())), **header}
        content = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(content) > length:
            raise OutputError(f"{file} has a header that cannot be put in order: upgrade tempoquant.")
        stream.seek(_LENGTH_BYTES)
        stream.write(content.ljust(length))
