"""Four-bit formats as values, and functions from tensors to tensors that round to them."""

from tempoquant.formats.eight_bits import eight_bit_scale, quantize_activation_to_8_bits
from tempoquant.formats.format import FORMATS, INT4, MXFP4, NVFP4, NVFP4_M1, Format, ScaleGrid, ScaleRule, get_format
from tempoquant.formats.levels import decode, encode, nearest_level
from tempoquant.formats.packing import pack, unpack
from tempoquant.formats.quantize import (
    WeightScale,
    from_codes,
    group_amax,
    quantize_activation,
    to_codes,
    weight_scale,
)
from tempoquant.formats.rotation import ROTATION_SIZE, rotate
from tempoquant.formats.scales import check_scale_bytes, group_scale, scale_from_bytes, scale_to_bytes

__all__ = [
    "FORMATS",
    "Format",
    "INT4",
    "MXFP4",
    "NVFP4",
    "NVFP4_M1",
    "ROTATION_SIZE",
    "ScaleGrid",
    "ScaleRule",
    "WeightScale",
    "check_scale_bytes",
    "decode",
    "eight_bit_scale",
    "encode",
    "from_codes",
    "get_format",
    "group_amax",
    "group_scale",
    "nearest_level",
    "pack",
    "quantize_activation",
    "quantize_activation_to_8_bits",
    "rotate",
    "scale_from_bytes",
    "scale_to_bytes",
    "to_codes",
    "unpack",
    "weight_scale",
]
