"""diffusers' `nunchaku_lite` on disk: the layers that it can hold, a QuantizedLayer as its tensors
and back, its config.json.

    y = Q(x / smooth_factor) · (qweight · wscales · wcscales · wtscale)ᵀ
        + (x · proj_down) · proj_upᵀ + bias

Every tensor has the layout of the kernels (`nunchaku_packing.py`). Sources: diffusers'
quantizers/nunchaku/utils.py (SVDQW4A4Linear) for names, shapes and dtypes, nunchaku's
src/kernels/zgemm for their meaning; docs/export.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.nn import functional

from tempoquant.checkpoint.checks import damaged
from tempoquant.checkpoint.schema import ComponentConfig, LayerEntry
from tempoquant.checkpoint.tensors import StoredAs
from tempoquant.errors import CheckpointError, UnsupportedError
from tempoquant.formats import INT4, NVFP4, Format, ScaleRule, scale_from_bytes, scale_to_bytes
from tempoquant.hosts.exportable import unknown_elsewhere
from tempoquant.hosts.nunchaku import packing as packing
from tempoquant.layer import LowRankBranch, QuantizedLayer
from tempoquant.timesteps import TimestepBins

TARGET = "nunchaku-lite"
QUANT_METHOD = "nunchaku_lite"
OWN_SECTION = "tempoquant"
FORMATS = {format.name: format for format in (INT4, NVFP4)}  # diffusers' `precision` has the same names
MAX_RANK = 1024  # nunchaku's src/kernels/zgemm/lora.cuh
BINS = TimestepBins()
"""The target has no timesteps, so all of them form one bin."""
REMEDY = "quantize with --recipe nunchaku_int4 or --recipe nunchaku_nvfp4, whose layers can be exported"


@dataclass(frozen=True)
class ExportedConfig(ComponentConfig):
    """The content of an exported component, in our terms: all timesteps in one bin, whose clip
    ratio is 1.
    """

    def num_replacing_bytes(self, name: str) -> int:
        """Return the bytes that replace a layer's 16-bit weight (so not the bias)."""
        forms = [form for key, form in target_forms(self.layers[name]).items() if key != "bias"]
        return sum(torch.Size(form.shape).numel() * form.dtype.itemsize for form in forms)


def require_exportable(name: str, entry: LayerEntry) -> None:
    """Raise UnsupportedError, naming the layer and the setting, for a layer that the target cannot
    hold.
    """
    what = unknown_elsewhere(entry, TARGET)
    if entry.format.name not in FORMATS:
        what = f"is in {entry.format.name}, and {TARGET} has {' and '.join(FORMATS)} only"
    elif what is None and entry.rank > MAX_RANK:
        what = f"has rank {entry.rank}, and {TARGET} holds at most {MAX_RANK}"
    if what is not None:
        raise UnsupportedError(f"{name} {what}: {REMEDY}.")
    if entry.out_features % packing.TILE or entry.in_features % packing.TILE:
        raise UnsupportedError(
            f"{name} is {entry.out_features} × {entry.in_features}, and {TARGET} has layers of multiples of "
            f"{packing.TILE} only: quantize again with this layer kept in 16 bits by a `layers` pattern."
        )


def common_format(layers: Mapping[str, LayerEntry]) -> Format:
    """Return the one format of all layers. Raises UnsupportedError for none and for several, naming
    a layer of each.
    """
    if not layers:
        raise UnsupportedError(f"there is no 4-bit layer, and {TARGET} needs one: {REMEDY}.")
    first, *others = sorted(layers)
    for name in others:
        if layers[name].format != layers[first].format:
            raise UnsupportedError(
                f"{first} is in {layers[first].format.name} and {name} in {layers[name].format.name}, but {TARGET} has "
                "one format for all layers of a denoiser: quantize again with one format."
            )
    return layers[first].format


def common_rank(layers: Mapping[str, LayerEntry]) -> int:
    """Return the one rank of all branches: the largest, in whole tiles, and one tile if no layer
    has a branch.
    """
    largest = max(entry.rank for entry in layers.values())
    return max(1, -(-largest // packing.RANK_TILE)) * packing.RANK_TILE


def exported_entry(entry: LayerEntry, rank: int) -> LayerEntry:
    """Return the entry of the layer that `from_target` makes of `to_target`."""
    bias = None if entry.bias is None else "bfloat16"
    return replace(entry, activation_scale_rule=ScaleRule.CEIL, rank=rank, smoothed=True, bias=bias)


def target_forms(entry: LayerEntry) -> dict[str, StoredAs]:
    """Return key, dtype and shape of each tensor of a layer; `entry` is an exported one."""
    rows, columns, rank, bf16 = entry.out_features, entry.in_features, entry.rank, torch.bfloat16
    scale_dtype = torch.float8_e4m3fn if entry.format.has_tensor_scale else bf16
    forms = {
        "qweight": StoredAs(torch.int8, (rows, columns // 2)),
        "wscales": StoredAs(scale_dtype, (entry.format.num_groups(columns), rows)),
        "smooth_factor": StoredAs(bf16, (columns,)),
        "proj_down": StoredAs(bf16, (columns, rank)),
        "proj_up": StoredAs(bf16, (rows, rank)),
    }
    if entry.format.has_tensor_scale:
        forms |= {"wcscales": StoredAs(bf16, (rows,)), "wtscale": StoredAs(bf16, (1,))}
    if entry.bias is not None:
        forms["bias"] = StoredAs(bf16, (rows,))
    return forms


def to_target(layer: QuantizedLayer, rank: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer that passed `require_exportable`, its branch padded with zeros
    to `rank`.

    Codes, scales, smoothing and branch are unchanged. The tensor scale and a wider bias are rounded
    to bfloat16 (2^−8 relative at most), and clip ratios have no place.
    """
    ones, bf16 = torch.ones, torch.bfloat16
    smoothing = ones(layer.in_features, dtype=bf16) if layer.smoothing_factor is None else layer.smoothing_factor
    up, down = torch.zeros(layer.out_features, 0, dtype=bf16), torch.zeros(0, layer.in_features, dtype=bf16)
    if layer.branch is not None:
        up, down = layer.branch.up, layer.branch.down
    missing = rank - up.shape[1]
    tensors = {
        "qweight": packing.pack_codes(layer.packed),
        "smooth_factor": packing.pack_vectors(smoothing),
        "proj_down": packing.pack_down(functional.pad(down, (0, 0, 0, missing))),
        "proj_up": packing.pack_up(functional.pad(up, (0, missing))),
    }
    if layer.tensor_scale is None:
        tensors["wscales"] = packing.pack_vectors(scale_from_bytes(layer.scale, layer.format).to(bf16))
    else:
        tensors["wscales"] = packing.pack_micro_scales(layer.scale)
        tensors["wtscale"] = layer.tensor_scale.to(bf16).reshape(1)
        tensors["wcscales"] = ones(layer.out_features, dtype=bf16)
    if layer.bias is not None:
        tensors["bias"] = packing.pack_vectors(layer.bias.to(bf16))
    return tensors


def from_target(tensors: Mapping[str, torch.Tensor], format: Format) -> QuantizedLayer:
    """Return the layer that stored tensors describe; they have the forms of `target_forms`.

    Raises CheckpointError for column scales other than 1, which no export writes.
    """
    if format.has_tensor_scale:
        if not bool((tensors["wcscales"] == 1).all()):
            raise damaged("wcscales holds something other than 1")
        scale, tensor_scale = packing.unpack_micro_scales(tensors["wscales"]), tensors["wtscale"].float().reshape(())
    else:
        scale = scale_to_bytes(packing.unpack_vectors(tensors["wscales"]).float(), format)
        tensor_scale = None
    bias = tensors.get("bias")
    return QuantizedLayer(
        format=format,
        activation_scale_rule=ScaleRule.CEIL,
        packed=packing.unpack_codes(tensors["qweight"]),
        scale=scale,
        tensor_scale=tensor_scale,
        smoothing_factor=packing.unpack_vectors(tensors["smooth_factor"]),
        branch=LowRankBranch(packing.unpack_up(tensors["proj_up"]), packing.unpack_down(tensors["proj_down"])),
        bias=None if bias is None else packing.unpack_vectors(bias),
        clip_ratio=torch.ones(BINS.num_bins),
        bins=BINS,
    )


def quantization_config(component: ComponentConfig) -> dict[str, Any]:
    """Return an exported component's `quantization_config`: diffusers' keys, and our section, which
    it ignores.
    """
    return {
        "quant_method": QUANT_METHOD,
        "compute_dtype": "bfloat16",
        "svdq_w4a4": _svdq_section(component),
        OWN_SECTION: {"clip_ratios_carried": False, "component": component.to_dict()},
    }


def _svdq_section(component: ComponentConfig) -> dict[str, Any]:
    format = common_format(component.layers)
    return {
        "precision": format.name,
        "group_size": format.group_size,
        "rank": common_rank(component.layers),
        "targets": sorted(component.layers),
    }


def is_exported(model_config: Mapping[str, Any]) -> bool:
    """Return whether a component's config.json is that of an export, ours or another program's."""
    config = model_config.get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD


def exported_config(model_config: Mapping[str, Any], where: str) -> ExportedConfig:
    """Return the checked config of an exported component from its config.json.

    Raises CheckpointError that starts with `where` for a config that `export` did not write.
    """
    config = model_config["quantization_config"]
    section = config.get(OWN_SECTION)
    if not isinstance(section, dict) or set(section) != {"clip_ratios_carried", "component"}:
        raise CheckpointError(f"{where} is {QUANT_METHOD} of another program: TempoQuant reads its own exports only.")
    component = ComponentConfig.from_dict(section["component"], where)
    try:
        for name, entry in component.layers.items():
            require_exportable(name, entry)
        wanted = quantization_config(component)
    except UnsupportedError as error:
        raise damaged(f"{where} contradicts itself ({error})") from error
    entries = {name: exported_entry(entry, wanted["svdq_w4a4"]["rank"]) for name, entry in component.layers.items()}
    if entries != dict(component.layers) or {**wanted, OWN_SECTION: 0} != {**config, OWN_SECTION: 0}:
        raise damaged(f"{where} contradicts itself")
    return ExportedConfig(**{field.name: getattr(component, field.name) for field in fields(component)})
