"""ComfyUI's own `nvfp4` on disk: the layers that it can hold, and a QuantizedLayer as its tensors
and a LoRA.

    y = f(x) + up · (down · x)
    f(x) = Q(x ∘ pre_quant_scale) · (weight · weight_scale · weight_scale_2)ᵀ + bias

f is ComfyUI's linear of that format. Its bypass loader computes the rest from a LoRA, which reads
the raw x: SVDQuant's formula (arXiv 2411.05007, eq. 5). ComfyUI defines Q: NVFP4 by one dynamic
scale a tensor on Blackwell and later, and the identity elsewhere. Sources: ComfyUI's comfy/ops.py
(names and products) and comfy/weight_adapter (the bypass), comfy-kitchen's TensorCoreNVFP4Layout
(bytes, padding, order of scales); docs/comfyui-nvfp4.md.
"""

import json
from collections.abc import Mapping

import torch
from torch.nn import functional

from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.checkpoint.tensors import StoredAs
from tempoquant.errors import UnsupportedError
from tempoquant.formats import NVFP4
from tempoquant.hosts.exportable import unknown_elsewhere
from tempoquant.layer import QuantizedLayer

TARGET = "comfyui-nvfp4"
REMEDY = "quantize with --recipe comfyui_nvfp4, whose layers can be exported"
COMFY_QUANT = json.dumps({"format": "nvfp4"}).encode()
"""The mark of a layer for ComfyUI."""
LORA_PREFIX = "diffusion_model."
"""The prefix of a LoRA's keys, which ComfyUI knows in every model."""
ROW_TILE = 16
"""The rows of packed weights are padded to a multiple of this."""
SCALE_ROWS, SCALE_COLUMNS, SCALE_QUARTER = 128, 4, 32
"""The tile of stored scales, and its rows that are stored beside each other."""


def require_exportable(name: str, entry: LayerEntry) -> None:
    """Raise UnsupportedError, naming the layer and the setting, for a layer that the format cannot
    hold.
    """
    what = unknown_elsewhere(entry, TARGET)
    if entry.format != NVFP4:
        what = f"is in {entry.format.name}, and {TARGET} has {NVFP4.name} only"
    if what is not None:
        raise UnsupportedError(f"{name} {what}: {REMEDY}.")


def layer_forms(entry: LayerEntry) -> dict[str, StoredAs]:
    """Return key, dtype and shape of each tensor of a layer without its branch."""
    rows, columns = _padded(entry.out_features, ROW_TILE), entry.in_features
    scales = _padded(rows, SCALE_ROWS), _padded(NVFP4.num_groups(columns), SCALE_COLUMNS)
    forms = {
        "weight": StoredAs(torch.uint8, (rows, columns // 2)),
        "weight_scale": StoredAs(torch.float8_e4m3fn, scales),
        "weight_scale_2": StoredAs(torch.float32, ()),
        "comfy_quant": StoredAs(torch.uint8, (len(COMFY_QUANT),)),
    }
    if entry.smoothed:
        forms["pre_quant_scale"] = StoredAs(torch.float32, (columns,))
    if entry.bias is not None:
        forms["bias"] = StoredAs(getattr(torch, entry.bias), (entry.out_features,))
    return forms


def layer_tensors(layer: QuantizedLayer) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer that passed `require_exportable`, without its branch.

    Codes, both scales and the bias are unchanged. The smoothing factor becomes its reciprocal,
    rounded to float32; ComfyUI rounds that to the dtype it computes in. Clip ratios have no place.
    """
    assert layer.tensor_scale is not None
    missing_rows = _padded(layer.out_features, ROW_TILE) - layer.out_features
    tensors = {
        "weight": functional.pad(swap_nibbles(layer.packed), (0, 0, 0, missing_rows)),
        "weight_scale": block_scales(layer.scale).view(torch.float8_e4m3fn),
        "weight_scale_2": layer.tensor_scale,
        "comfy_quant": torch.frombuffer(bytearray(COMFY_QUANT), dtype=torch.uint8),
    }
    if layer.smoothing_factor is not None:
        tensors["pre_quant_scale"] = layer.smoothing_factor.double().reciprocal().float()
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return tensors


def branch_forms(entry: LayerEntry) -> dict[str, StoredAs]:
    """Return key, dtype and shape of each tensor of a layer's branch as a LoRA; none without a
    branch.
    """
    if entry.rank == 0:
        return {}
    return {
        "lora_up.weight": StoredAs(torch.bfloat16, (entry.out_features, entry.rank)),
        "lora_down.weight": StoredAs(torch.bfloat16, (entry.rank, entry.in_features)),
        "alpha": StoredAs(torch.float32, ()),
    }


def branch_tensors(layer: QuantizedLayer) -> dict[str, torch.Tensor]:
    """Return the branch of a layer, bit for bit, as a LoRA. Its alpha is its rank: at strength 1
    its factor is 1.
    """
    if layer.branch is None or layer.rank == 0:
        return {}
    return {
        "lora_up.weight": layer.branch.up,
        "lora_down.weight": layer.branch.down,
        "alpha": torch.tensor(float(layer.rank)),
    }


def num_replacing_bytes(entry: LayerEntry) -> int:
    """Return the bytes of everything, branch included, that replaces a layer's 16-bit weight (so
    not the bias).
    """
    forms: Mapping[str, StoredAs] = {**layer_forms(entry), **branch_forms(entry)}
    return sum(torch.Size(form.shape).numel() * form.dtype.itemsize for key, form in forms.items() if key != "bias")


def swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Exchange the two codes of every byte, uint8: ours has the even feature in the low half,
    ComfyUI in the high.
    """
    return (packed << 4) | (packed >> 4)


def block_scales(scale: torch.Tensor) -> torch.Tensor:
    """Return scales (out, groups) of one byte in cuBLAS' order, padded with zeros to
    (128·⌈out/128⌉, 4·⌈groups/4⌉).

    The scale of row r and group g lies at byte 512·(⌈groups/4⌉·⌊r/128⌋ + ⌊g/4⌋) + 16·(r mod 32) +
    4·⌊(r mod 128)/32⌋ + g mod 4 of the result's flat bytes; its shape is nominal. Source: NVIDIA's
    cuBLAS manual, "1D block scaling factors layout".
    """
    rows, groups = scale.shape
    height, width = _padded(rows, SCALE_ROWS), _padded(groups, SCALE_COLUMNS)
    whole = functional.pad(scale, (0, width - groups, 0, height - rows))
    tiles = whole.view(height // SCALE_ROWS, SCALE_ROWS // SCALE_QUARTER, SCALE_QUARTER, -1, SCALE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(height, width)


def _padded(size: int, tile: int) -> int:
    return -(-size // tile) * tile
