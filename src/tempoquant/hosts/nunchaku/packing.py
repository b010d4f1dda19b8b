"""The tensor layouts of nunchaku's kernels, as permutations in closed form: pack and unpack,
inverses of each other.

The data that a kernel's thread reads is contiguous, so storage is a permutation of the plain tensor
inside tiles of 128 outputs by 64 inputs (16 by 16 for the branch); the stored shape is nominal.
Every function needs whole tiles: sides that `TILE` divides, ranks that `RANK_TILE` divides. Source:
the packing of nunchaku and deepcompressor (`NunchakuWeightPacker`); docs/export.md has the index
formulas.
"""

from typing import NamedTuple

import torch

TILE = 128
"""Both sides of a linear are a multiple of this."""
RANK_TILE = 16
"""The rank of a branch is a multiple of this."""


class _Layout(NamedTuple):
    """A plain tensor viewed as `dims` is stored with its axes in `order`."""

    dims: tuple[int, ...]
    order: tuple[int, ...]

    def pack(self, plain: torch.Tensor) -> torch.Tensor:
        """Return the tensor in one dimension, in stored order."""
        return plain.contiguous().view(self.dims).permute(self.order).reshape(-1)

    def unpack(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the plain tensor of that shape."""
        inverse = [self.order.index(axis) for axis in range(len(self.order))]
        return stored.reshape([self.dims[axis] for axis in self.order]).permute(inverse).reshape(shape)


def _codes(out_features: int, in_features: int) -> _Layout:
    """Return the layout of 4-byte words, eight inputs each: (out, in / 8)."""
    # tile, np, nps, nl | tile, kps, kl
    return _Layout((out_features // 128, 8, 2, 8, in_features // 64, 2, 4), (0, 4, 1, 3, 6, 2, 5))


def _vectors(out_features: int, num_groups: int) -> _Layout:
    """Return the layout of bfloat16 vectors: (out, groups)."""
    # tile, a, b, l, e | group
    return _Layout((out_features // 128, 8, 2, 4, 2, num_groups), (0, 5, 1, 3, 2, 4))


def _micro_scales(out_features: int, num_groups: int) -> _Layout:
    """Return the layout of E4M3 bytes: (out, groups)."""
    # tile, p, q, r | tile, j
    return _Layout((out_features // 128, 4, 4, 8, num_groups // 4, 4), (0, 4, 3, 2, 1, 5))


def _branch_up(out_features: int, rank: int) -> _Layout:
    """Return the layout of a branch's up in bfloat16: (out, rank)."""
    # tile, nps, nl | tile, kps, kl, rk
    return _Layout((out_features // 16, 2, 8, rank // 16, 2, 4, 2), (0, 3, 2, 5, 1, 4, 6))


def _branch_down(rank: int, in_features: int) -> _Layout:
    """Return the layout of a branch's down in bfloat16: (rank, in). Tiles go along the rank first
    here too.
    """
    return _Layout((rank // 16, 2, 8, in_features // 16, 2, 4, 2), (3, 0, 2, 5, 1, 4, 6))


def pack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Convert a QuantizedLayer's `packed`, (out, in / 2) uint8, to `qweight`, (out, in / 2) int8.

    Within eight inputs both have the same nibbles in the same order, and a nibble means the same
    level.
    """
    out_features, num_bytes = packed.shape
    words = packed.contiguous().view(torch.int32)
    return _codes(out_features, 2 * num_bytes).pack(words).view(torch.int8).view(out_features, num_bytes)


def unpack_codes(qweight: torch.Tensor) -> torch.Tensor:
    """Invert `pack_codes`."""
    out_features, num_bytes = qweight.shape
    words = qweight.contiguous().view(-1).view(torch.int32)
    plain = _codes(out_features, 2 * num_bytes).unpack(words, (out_features, num_bytes // 4))
    return plain.contiguous().view(torch.uint8)


def pack_vectors(values: torch.Tensor) -> torch.Tensor:
    """Convert (out, groups) to (groups, out): scales of INT4. A vector (n,), such as bias and
    smoothing, stays (n,).
    """
    grid = values.reshape(len(values), -1)
    stored = _vectors(*grid.shape).pack(grid)
    return stored if values.dim() == 1 else stored.view(grid.shape[1], grid.shape[0])


def unpack_vectors(stored: torch.Tensor) -> torch.Tensor:
    """Invert `pack_vectors`."""
    num_groups, length = (1, len(stored)) if stored.dim() == 1 else stored.shape
    plain = _vectors(length, num_groups).unpack(stored, (length, num_groups))
    return plain.view(length) if stored.dim() == 1 else plain


def pack_micro_scales(scale: torch.Tensor) -> torch.Tensor:
    """Convert an NVFP4 QuantizedLayer's `scale`, (out, groups) uint8, to `wscales`, (groups, out)
    float8_e4m3fn.
    """
    stored = _micro_scales(*scale.shape).pack(scale)
    return stored.view(torch.float8_e4m3fn).view(scale.shape[1], scale.shape[0])


def unpack_micro_scales(wscales: torch.Tensor) -> torch.Tensor:
    """Invert `pack_micro_scales`."""
    num_groups, out_features = wscales.shape
    stored = wscales.contiguous().view(torch.uint8)
    return _micro_scales(out_features, num_groups).unpack(stored, (out_features, num_groups))


def pack_up(up: torch.Tensor) -> torch.Tensor:
    """Convert a branch's `up`, (out, rank), to `proj_up`, (out, rank)."""
    return _branch_up(*up.shape).pack(up).view(up.shape)


def unpack_up(proj_up: torch.Tensor) -> torch.Tensor:
    """Invert `pack_up`."""
    return _branch_up(*proj_up.shape).unpack(proj_up, tuple(proj_up.shape))


def pack_down(down: torch.Tensor) -> torch.Tensor:
    """Convert a branch's `down`, (rank, in), to `proj_down`, (in, rank)."""
    return _branch_down(*down.shape).pack(down).view(down.shape[1], down.shape[0])


def unpack_down(proj_down: torch.Tensor) -> torch.Tensor:
    """Invert `pack_down`."""
    in_features, rank = proj_down.shape
    return _branch_down(rank, in_features).unpack(proj_down, (rank, in_features))
