"""The tensors that one layer stores: key, dtype and shape of each, and conversion from
QuantizedLayer and back.

Exact data is stored as bytes (uint8), because loaders cast floating tensors to the dtype that the
user asks for and leave integers alone. The branch and the bias are floating, and our own loader
keeps them as stored.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from tempoquant.checkpoint.checks import REMEDY, damaged
from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.errors import CheckpointError
from tempoquant.formats import check_scale_bytes
from tempoquant.layer import LowRankBranch, QuantizedLayer
from tempoquant.timesteps import TimestepBins

OWN_KEYS = ("packed", "tensor_scale", "smoothing_factor", "clip_ratio", "input_offset")  # which no 16-bit module has
KEYS = (
    "packed",
    "scale",
    "tensor_scale",
    "smoothing_factor",
    "clip_ratio",
    "up",
    "down",
    "deflation",
    "input_offset",
    "bias",
)


class StoredAs(NamedTuple):
    """The dtype and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def stored_as(entry: LayerEntry, num_bins: int) -> dict[str, StoredAs]:
    """Return the tensors of a layer, by key, in the order of KEYS, without those that the entry
    excludes.
    """
    format, rows, columns = entry.format, entry.out_features, entry.in_features
    scale_columns = format.num_groups(columns) * format.scale_grid.num_bytes
    table = {
        "packed": StoredAs(torch.uint8, (rows, columns // 2)),
        "scale": StoredAs(torch.uint8, (rows, scale_columns)),
        "clip_ratio": StoredAs(torch.uint8, (4 * num_bins,)),
    }
    if format.has_tensor_scale:
        table["tensor_scale"] = StoredAs(torch.uint8, (4,))
    if entry.smoothed:
        table["smoothing_factor"] = StoredAs(torch.uint8, (2 * columns,))
    if entry.rank:
        table["up"] = StoredAs(torch.bfloat16, (rows, entry.rank))
        table["down"] = StoredAs(torch.bfloat16, (entry.rank, columns))
    if entry.deflated:
        table["deflation"] = StoredAs(torch.bfloat16, (columns, entry.rank))
    if entry.centred:
        table["input_offset"] = StoredAs(torch.bfloat16, (columns,))
    if entry.bias is not None:
        table["bias"] = StoredAs(getattr(torch, entry.bias), (rows,))
    for key in keys_by_bin(entry):
        table[key] = StoredAs(table[key].dtype, (num_bins, *table[key].shape))
    return {key: table[key] for key in KEYS if key in table}


def keys_by_bin(entry: LayerEntry) -> tuple[str, ...]:
    """Return the tensors with one row for each timestep bin, along their first dimension; all but
    the clip ratio.
    """
    centred = ("input_offset", "bias") if entry.centred_by_bin else ()
    return (*(("up", "deflation") if entry.deflated_by_bin else ()), *centred)


def num_replacing_bytes(entry: LayerEntry, num_bins: int) -> int:
    """Return the bytes that replace the 16-bit weight. A bias counts only by what it holds beyond
    the original bias, that is, with a bias by timestep bin, all rows but one.
    """
    stored = stored_as(entry, num_bins)
    sizes = {key: math.prod(form.shape) * form.dtype.itemsize for key, form in stored.items()}
    if "bias" in sizes:
        sizes["bias"] -= sizes["bias"] // (num_bins if entry.centred_by_bin else 1)
    return sum(sizes.values())


def entry_of(layer: QuantizedLayer) -> LayerEntry:
    """Return the entry that describes a layer. Raises CheckpointError if the format cannot store
    the layer.
    """
    return LayerEntry(
        format=layer.format,
        activation_scale_rule=layer.activation_scale_rule,
        in_features=layer.in_features,
        out_features=layer.out_features,
        rank=layer.rank,
        smoothed=layer.smoothing_factor is not None,
        deflated=layer.rank > 0 and layer.branch is not None and layer.branch.deflation is not None,
        centred=layer.input_offset is not None,
        rotated=layer.rotated,
        weights_alone=layer.weights_alone,
        centred_by_bin=layer.is_centred_by_bin,
        deflated_by_bin=layer.rank > 0 and layer.is_deflated_by_bin,
        bias=None if layer.bias is None else str(layer.bias.dtype).removeprefix("torch."),
    )


def to_stored(layer: QuantizedLayer, where: str) -> dict[str, torch.Tensor]:
    """Return the stored tensors of a layer; they share memory with it if they can.

    Raises CheckpointError that starts with `where` if the format does not store a tensor's dtype,
    shape or value.
    """
    try:
        branch = layer.branch if layer.rank else None
        up, down, deflation = (None,) * 3 if branch is None else (branch.up, branch.down, branch.deflation)
        tensors = {
            "packed": layer.packed,
            "scale": layer.scale,
            "tensor_scale": _to_bytes(layer.tensor_scale, torch.float32),
            "smoothing_factor": _to_bytes(layer.smoothing_factor, torch.bfloat16),
            "clip_ratio": _to_bytes(layer.clip_ratio, torch.float32),
            "up": up,
            "down": down,
            "deflation": deflation,
            "input_offset": layer.input_offset,
            "bias": layer.bias,
        }
        present = {key: tensor.detach() for key, tensor in tensors.items() if tensor is not None}
        check_layer(present, entry_of(layer), layer.bins.num_bins, "it")
    except CheckpointError as error:
        raise CheckpointError(f"{where} cannot be stored: {str(error).removesuffix(REMEDY).rstrip()}") from error
    return present


def from_stored(tensors: Mapping[str, torch.Tensor], entry: LayerEntry, bins: TimestepBins) -> QuantizedLayer:
    """Return the layer that stored tensors describe; it shares their memory. They must have passed
    `check_layer`.
    """
    tensor_scale, smoothing_factor = tensors.get("tensor_scale"), tensors.get("smoothing_factor")
    return QuantizedLayer(
        format=entry.format,
        activation_scale_rule=entry.activation_scale_rule,
        packed=tensors["packed"],
        scale=tensors["scale"],
        tensor_scale=None if tensor_scale is None else tensor_scale.view(torch.float32).reshape(()),
        smoothing_factor=None if smoothing_factor is None else smoothing_factor.view(torch.bfloat16),
        branch=LowRankBranch(tensors["up"], tensors["down"], tensors.get("deflation")) if entry.rank else None,
        input_offset=tensors.get("input_offset"),
        bias=tensors.get("bias"),
        clip_ratio=tensors["clip_ratio"].view(torch.float32),
        bins=bins,
        rotated=entry.rotated,
        weights_alone=entry.weights_alone,
    )


def check_layer(tensors: Mapping[str, torch.Tensor], entry: LayerEntry, num_bins: int, where: str) -> None:
    """Raise CheckpointError unless the tensors agree with the entry in presence, dtypes, shapes and
    values.
    """
    table = stored_as(entry, num_bins)
    check_presence(set(tensors), set(table), where)
    for key, tensor in tensors.items():
        check_form(StoredAs(tensor.dtype, tuple(tensor.shape)), table[key], f"{where}.{key}")
        check_values(key, tensor, entry, f"{where}.{key}")


def check_presence(found: set[str], wanted: set[str], where: str) -> None:
    """Raise CheckpointError if a layer's keys are not the wanted ones."""
    if found != wanted:
        missing, extra = sorted(wanted - found), sorted(found - wanted)
        what = f"lacks {missing[0]!r}" if missing else f"has a tensor {extra[0]!r} that its config does not mention"
        raise damaged(f"{where} {what}")


def check_form(found: StoredAs, wanted: StoredAs, where: str) -> None:
    """Raise CheckpointError if a tensor's dtype or shape is not the wanted one."""
    if found != wanted:
        stored, described = (f"{form.dtype} {list(form.shape)}" for form in (found, wanted))
        raise damaged(f"{where} is {stored}, but its config says {described}")


def check_values(key: str, tensor: torch.Tensor, entry: LayerEntry, where: str) -> None:
    """Raise CheckpointError for values that no writer writes. `tensor` has the right dtype and
    shape, any alignment.
    """
    if key == "scale":
        check_scale_bytes(tensor, entry.format, where)
    elif key == "tensor_scale":
        _require_positive(_from_bytes(tensor, torch.float32), where)
    elif key == "smoothing_factor":
        _require_positive(_from_bytes(tensor, torch.bfloat16).float(), where)
    elif key == "clip_ratio":
        ratios = _from_bytes(tensor, torch.float32)
        if not bool(((ratios > 0) & (ratios <= 2)).all()):
            raise damaged(f"{where} holds a clip ratio outside (0, 2]")
    elif key != "packed" and not bool(torch.isfinite(tensor).all()):
        raise damaged(f"{where} holds NaN or Inf")


def _require_positive(values: torch.Tensor, where: str) -> None:
    if not bool((torch.isfinite(values) & (values > 0)).all()):
        raise damaged(f"{where} holds a value that is not a positive number")


def _to_bytes(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if tensor is None:
        return None
    if tensor.dtype != dtype:
        raise CheckpointError(f"it holds {tensor.dtype} where the format stores {dtype}.")
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _from_bytes(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # A clone is aligned. Bytes inside a memory-mapped file may not be, and then cannot be viewed as
    # a wider dtype.
    return stored.clone(memory_format=torch.contiguous_format).view(dtype)
