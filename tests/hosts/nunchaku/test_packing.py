"""Laws of nunchaku's layouts: where each number lies, index by index, and that nothing is lost on
the way back.
"""

from collections.abc import Callable

import pytest
import torch

from tempoquant.formats import INT4, NVFP4, unpack
from tempoquant.hosts.nunchaku.packing import (
    pack_codes,
    pack_down,
    pack_micro_scales,
    pack_up,
    pack_vectors,
    unpack_codes,
    unpack_down,
    unpack_micro_scales,
    unpack_up,
    unpack_vectors,
)

N, K, RANK = 256, 384, 48  # more than one tile along each axis, and no two axes alike
GENERATOR = torch.Generator().manual_seed(0)


def random_bytes(*shape: int, top: int = 256) -> torch.Tensor:
    return torch.randint(0, top, shape, dtype=torch.uint8, generator=GENERATOR)


def random_bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR).to(torch.bfloat16)


def test_codes_lie_where_the_formula_says() -> None:
    packed = random_bytes(N, K // 2)
    words = [int(word) & 0xFFFFFFFF for word in pack_codes(packed).view(-1).view(torch.int32).tolist()]
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).tolist()
    for n in range(N):
        nt, np, nps, nl = n // 128, n // 16 % 8, n // 8 % 2, n % 8
        for k in range(K):
            kt, kps, kl, rk = k // 64, k // 32 % 2, k // 8 % 4, k % 8
            word = ((((((nt * (K // 64) + kt) * 8 + np) * 8 + nl) * 4 + kl) * 2 + nps) * 2) + kps
            assert words[word] >> (4 * rk) & 15 == nibbles[n][k]


@pytest.mark.parametrize("num_groups", [1, 6])
def test_vectors_and_int4_scales_lie_where_the_formula_says(num_groups: int) -> None:
    values = random_bf16(N, num_groups)
    stored = pack_vectors(values).view(-1)
    for n in range(N):
        t, a, b, l, e = n // 128, n // 16 % 8, n // 8 % 2, n // 2 % 4, n % 2
        for g in range(num_groups):
            assert stored[(t * num_groups + g) * 128 + a * 16 + l * 4 + b * 2 + e] == values[n, g]


def test_micro_scales_lie_where_the_formula_says() -> None:
    scale = random_bytes(N, K // 16)
    stored = pack_micro_scales(scale).view(torch.uint8).view(-1)
    for n in range(N):
        t, p, q, r = n // 128, n // 32 % 4, n // 8 % 4, n % 8
        for g in range(K // 16):
            kt, j = g // 4, g % 4
            assert stored[((((t * (K // 64) + kt) * 8 + r) * 4 + q) * 4 + p) * 4 + j] == scale[n, g]


@pytest.mark.parametrize("side", ["up", "down"])
def test_the_branch_lies_where_the_formula_says(side: str) -> None:
    plain = random_bf16(N, RANK) if side == "up" else random_bf16(RANK, K)
    stored = (pack_up if side == "up" else pack_down)(plain).view(-1)
    for row in range(plain.shape[0]):
        nps, nl = row % 16 // 8, row % 8
        for column in range(plain.shape[1]):
            kps, kl, rk = column % 16 // 8, column % 8 // 2, column % 2
            feature_tile, rank_tile = (row // 16, column // 16) if side == "up" else (column // 16, row // 16)
            tile = feature_tile * (RANK // 16) + rank_tile
            assert stored[((((tile * 8 + nl) * 4 + kl) * 2 + nps) * 2 + kps) * 2 + rk] == plain[row, column]


ROUND_TRIPS: dict[str, tuple[Callable, Callable, torch.Tensor, tuple[int, ...], torch.dtype]] = {
    "codes": (pack_codes, unpack_codes, random_bytes(N, K // 2), (N, K // 2), torch.int8),
    "int4 scales": (pack_vectors, unpack_vectors, random_bf16(N, 6), (6, N), torch.bfloat16),
    "a vector": (pack_vectors, unpack_vectors, random_bf16(K), (K,), torch.bfloat16),
    "micro scales": (
        pack_micro_scales, unpack_micro_scales, random_bytes(N, K // 16, top=127), (K // 16, N), torch.float8_e4m3fn,
    ),
    "up": (pack_up, unpack_up, random_bf16(N, RANK), (N, RANK), torch.bfloat16),
    "down": (pack_down, unpack_down, random_bf16(RANK, K), (K, RANK), torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_unpacking_returns_what_was_packed_and_packing_what_was_unpacked(name: str) -> None:
    pack, unpacked, plain, shape, dtype = ROUND_TRIPS[name]
    stored = pack(plain)
    assert (tuple(stored.shape), stored.dtype) == (shape, dtype)
    assert stored.is_contiguous()
    back = unpacked(stored)
    assert back.dtype == plain.dtype and torch.equal(back, plain)
    again = pack(back)
    assert torch.equal(again.view(torch.uint8), stored.view(torch.uint8))


def test_a_tensor_that_is_not_contiguous_is_packed_alike() -> None:
    plain = random_bf16(RANK, K)
    assert torch.equal(pack_down(plain.T.contiguous().T), pack_down(plain))


def test_a_nibble_means_the_same_level_there() -> None:
    """Index 8 of nunchaku's FP4 table is −0 and 9 to 15 mirror 1 to 7; INT4 is two's complement."""
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    nibbles = torch.arange(16, dtype=torch.uint8)
    codes = unpack((nibbles | nibbles << 4).unsqueeze(0), NVFP4)[0, ::2].tolist()
    assert [(1 if c >= 0 else -1) * NVFP4.levels[abs(c)] for c in codes] == table
    assert unpack(nibbles.unsqueeze(0), INT4)[0, ::2].tolist() == [*range(8), *range(-8, 0)]
