"""Packing of codes into bytes, and back: two codes a byte, the even feature in the low nibble, rows
in order.

E2M1 nibbles are the format's own bits (sign, exponent, mantissa), so other engines can read them;
INT4 nibbles are two's complement. `−0` (nibble 8 of E2M1) is never written and reads as 0; nibble 8
of INT4 is −8, never written either.
"""

import torch

from tempoquant.formats.format import Format, ScaleGrid


def _is_twos_complement(format: Format) -> bool:
    return format.scale_grid is ScaleGrid.BF16


def pack(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Pack two codes into each byte.

    Args:
        codes: (rows, in), int8 in −7 … 7, `in` even.

    Returns:
        (rows, in / 2), uint8.
    """
    signed = codes.to(torch.int16)
    nibbles = signed & 0xF if _is_twos_complement(format) else torch.where(signed < 0, 8 - signed, signed)
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).to(torch.uint8)


def unpack(packed: torch.Tensor, format: Format) -> torch.Tensor:
    """Unpack bytes into codes, the inverse of `pack`: (rows, in / 2) uint8 to (rows, in) int8."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).to(torch.int8)
    if _is_twos_complement(format):
        return torch.where(nibbles >= 8, nibbles - 16, nibbles)
    return torch.where(nibbles >= 8, 8 - nibbles, nibbles)
