"""The meaning of the tensors in a denoiser's files: other names, and 8-bit weights with their
scales.

ComfyUI's files have the names of the model's first release, often behind a prefix. In its
`fp8_scaled` files a weight is float8, and `scale_weight` (later `weight_scale`) multiplies it; the
factor of inputs (`scale_input`) matters only to products in 8 bits. Source: ComfyUI's comfy/ops.py,
comfy/utils.py.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from tempoquant.checkpoint.files import open_weights
from tempoquant.checkpoint.tensors import StoredAs
from tempoquant.errors import CheckpointError, ModelError
from tempoquant.models.family import ModelFamily
from tempoquant.models.weight_files import Forms

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_OTHER_MODELS = ("text_encoders.", "cond_stage_model.", "conditioner.", "clip_vision.", "first_stage_model.", "vae.")
"""Prefixes of the other models in a file of a whole pipeline, in which denoisers have the first of
_PREFIXES.
"""

_SCALES = {"scale_weight", "weight_scale"}
_OF_PRODUCTS = {"scale_input", "input_scale"}
_FORMAT = "comfy_quant"
_MARKERS = {"scaled_fp8"}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


class Place(NamedTuple):
    """The place of a tensor in a file, and its form."""

    file: Path
    key: str
    stored: StoredAs

    def read(self) -> torch.Tensor:
        """Read the tensor as stored, into fresh memory. Raises ModelError."""
        try:
            # Opened anew each time: the touched part of a mapping counts as memory in use until it
            # is closed.
            with open_weights(self.file) as tensors:
                return tensors.get_tensor(self.key).clone()
        except (CheckpointError, SafetensorError, OSError) as error:
            raise ModelError(f"{self.key} cannot be read from {self.file} ({error}): fetch the model again.") from error


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a denoiser.

    Attributes:
        place: of its numbers.
        scale: of their factor; None for none.
    """

    place: Place
    scale: Place | None = None

    @property
    def form(self) -> StoredAs:
        """Return dtype and shape of the result of `read`: wide enough for 8 bits, and for others as
        stored.
        """
        dtype = self.place.stored.dtype
        if self.scale is not None:
            dtype = torch.float32
        elif dtype in _EIGHT_BITS:
            dtype = torch.bfloat16  # which holds every number of both
        return StoredAs(dtype, self.place.stored.shape)

    @property
    def is_8_bit(self) -> bool:
        """Return whether its numbers are stored in 8 bits."""
        return self.place.stored.dtype in _EIGHT_BITS

    def read(self) -> torch.Tensor:
        """Read the tensor into fresh memory. Raises ModelError for a dtype that is none of a
        model's, NaN and Inf.
        """
        file, key, stored = self.place
        if stored.dtype not in _FLOATS + _EIGHT_BITS:
            raise ModelError(
                f"{key} in {file} is {stored.dtype}: start from weights in bfloat16, float16, float32 or float8."
            )
        tensor = self.place.read().to(self.form.dtype)
        if self.scale is not None:
            scale = self.scale.read().float()
            tensor *= scale if scale.numel() == 1 else scale.reshape(-1, *[1] * (tensor.dim() - 1))
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{key} in {file} holds NaN or Inf: the model file is damaged.")
        return tensor


@dataclass(frozen=True)
class Meaning:
    """The meaning of a file's keys.

    Attributes:
        tensors: the model's names to keys.
        scales: the names of weights to the keys of their scales.
        formats: keys of layers' quantization formats.
        unknown: unknown keys.
    """

    tensors: Mapping[str, str]
    scales: Mapping[str, str]
    formats: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def is_renamed(self) -> bool:
        """Return whether some tensor has another name in the file than in the model."""
        return any(name != key for name, key in self.tensors.items())


def meaning_of(keys: Iterable[str], family: ModelFamily) -> Meaning:
    """Return the meaning of the keys in a denoiser's files. Raises ModelError if two keys mean one
    tensor.
    """
    keys = list(keys)
    prefix = next((each for each in _PREFIXES if any(key.startswith(each) for key in keys)), "")
    tensors: dict[str, str] = {}
    scales: dict[str, str] = {}
    formats, unknown = [], []
    for key in keys:
        own = key.removeprefix(prefix)
        module, _, leaf = own.rpartition(".")
        if (key.startswith(_OTHER_MODELS) and prefix == _PREFIXES[0]) or own in _MARKERS or leaf in _OF_PRODUCTS:
            continue
        if leaf == _FORMAT:
            formats.append(key)
        elif leaf in _SCALES and (name := _name_of(f"{module}.weight", family)) is not None:
            _enter(scales, name, key)
        elif key.startswith(prefix) and (name := _name_of(own, family)) is not None:
            _enter(tensors, name, key)
        else:
            unknown.append(key)
    return Meaning(tensors, scales, tuple(formats), tuple(unknown))


def tensors_of(forms: Forms, meaning: Meaning) -> dict[str, StoredTensor]:
    """Return a denoiser's tensors by the model's names.

    Raises:
        ModelError: a scale has no 8-bit weight, or is not one number for it or for each of its
            rows, or a layer's quantization is unknown.
    """

    def place(key: str) -> Place:
        return Place(forms[key][0], key, forms[key][1])

    for key in meaning.formats:
        _check_format(place(key))
    found = {name: StoredTensor(place(key)) for name, key in meaning.tensors.items()}
    for name, key in meaning.scales.items():
        weight, scale = found.get(name), place(key)
        if weight is None or not weight.is_8_bit:
            raise ModelError(f"{key} in {scale.file} scales no 8-bit weight: start from the 16-bit model.")
        rows = weight.place.stored.shape[:1]
        if scale.stored.dtype not in _FLOATS or scale.stored.shape not in {(), (1,), (1, 1), rows, (*rows, 1)}:
            raise ModelError(
                f"{key} in {scale.file} is {list(scale.stored.shape)} in {scale.stored.dtype}: only one scale for a "
                "weight or for each of its rows is read; start from the 16-bit model."
            )
        found[name] = StoredTensor(weight.place, scale)
    return found


def _name_of(key: str, family: ModelFamily) -> str | None:
    """Return the model's name of a tensor from any known name."""
    whole = family.own_name(key)
    if whole is not None and family.is_parameter(whole):
        return whole
    module, _, leaf = key.rpartition(".")
    name = family.own_name(module) if leaf in ("weight", "bias") else None
    return None if name is None or family.is_parameter(name) else f"{name}.{leaf}"


def _enter(names: dict[str, str], name: str, key: str) -> None:
    if names.setdefault(name, key) != key:
        raise ModelError(f"{names[name]} and {key} both mean {name}: give the files of one model alone.")


def _check_format(place: Place) -> None:
    """Raise ModelError unless a layer's stated quantization agrees with its dtype and its scale."""
    try:
        values = json.loads(bytes(place.read().flatten().view(torch.uint8)))
        format = str(values.pop("format"))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{place.key} in {place.file} is not JSON ({error}): fetch the file again.") from error
    if not re.fullmatch("float8_e(4m3fn|5m2)", format) or values.keys() - {"full_precision_matrix_mult"}:
        raise ModelError(
            f"{place.file} is quantized already ({format}, by its {place.key}): start from weights in 16 bits or "
            "fp8_scaled."
        )
