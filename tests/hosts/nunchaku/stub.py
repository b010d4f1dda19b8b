"""Stands in for the package `kernels` and the two operators diffusers calls, so that its own
modules run on a CPU.

Each number is looked up by the index formula of docs/export.md, written out anew, never by the code
that packs.
"""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

FP4_LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
INT4_LEVELS = torch.tensor([float(level) for level in (*range(8), *range(-8, 0))])
EVEN_FIRST = torch.tensor([*range(0, 16, 2), *range(1, 16, 2)])
"""Of two levels equally near the first is taken: the device rounds ties to even."""
MODULE = "diffusers.quantizers.nunchaku.utils"


def diffusers_with_stubbed_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import diffusers' quantizers/nunchaku/utils.py as if the kernels were installed; it is
    removed afterwards.
    """
    import diffusers.utils
    from diffusers.quantizers.nunchaku.nunchaku_quantizer import NunchakuLiteQuantizer

    kernels = ModuleType("kernels")
    kernels.get_kernel = lambda *args, **kwargs: SimpleNamespace(ops=SimpleNamespace(**OPERATORS))
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr(diffusers.utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(diffusers.utils, "is_kernels_version", lambda *args: True)
    monkeypatch.setattr(diffusers.utils.constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    monkeypatch.setattr(NunchakuLiteQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
    sys.modules.pop(MODULE, None)
    from importlib import import_module

    yield import_module(MODULE)
    sys.modules.pop(MODULE, None)


def axes(*sizes: int) -> list[torch.Tensor]:
    return list(torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij"))


def vector(stored: torch.Tensor, length: int, num_groups: int = 1) -> torch.Tensor:
    """Return (length, num_groups) float32."""
    n, g = axes(length, num_groups)
    index = (n // 128 * num_groups + g) * 128 + n // 16 % 8 * 16 + n // 2 % 4 * 4 + n // 8 % 2 * 2 + n % 2
    return stored.reshape(-1)[index].float()


def nibbles(qweight: torch.Tensor) -> torch.Tensor:
    """Return (out, in) int64."""
    out_features, in_features = qweight.shape[0], 2 * qweight.shape[1]
    n, k = axes(out_features, in_features)
    word = (n // 128 * (in_features // 64) + k // 64) * 8 + n // 16 % 8
    word = (((word * 8 + n % 8) * 4 + k // 8 % 4) * 2 + n // 8 % 2) * 2 + k // 32 % 2
    return (qweight.reshape(-1).view(torch.int32)[word] >> (4 * (k % 8))).long() & 15


def micro_scales(wscales: torch.Tensor) -> torch.Tensor:
    """Return (out, groups) float32."""
    num_groups, out_features = wscales.shape
    n, g = axes(out_features, num_groups)
    index = (n // 128 * (num_groups // 4) + g // 4) * 8 + n % 8
    index = ((index * 4 + n // 8 % 4) * 4 + n // 32 % 4) * 4 + g % 4
    return wscales.reshape(-1).float()[index]


def branch_side(stored: torch.Tensor, down: bool) -> torch.Tensor:
    """Return (rank, in) or (out, rank), float32."""
    features, rank = stored.shape
    row, column = axes(rank, features) if down else axes(features, rank)
    tile = (column // 16 if down else row // 16) * (rank // 16) + (row // 16 if down else column // 16)
    index = (((tile * 8 + row % 8) * 4 + column % 8 // 2) * 2 + row % 16 // 8) * 2 + column % 16 // 8
    return stored.reshape(-1)[index * 2 + column % 2].float()


def quantize_w4a4_act_fuse_lora(
    x: torch.Tensor, out: torch.Tensor, scales: torch.Tensor, proj_down: torch.Tensor, lora_act: torch.Tensor,
    smooth: torch.Tensor, fuse_glu: bool, fp4: bool,
) -> None:  # fmt: skip
    """Return four-bit activations, one index of a level a byte pair, row-major; only the kernels
    know their real layout.
    """
    assert x.dtype == torch.bfloat16 and not fuse_glu
    rows, features = x.shape
    group_size, top, levels = (16, 6.0, FP4_LEVELS) if fp4 else (64, 7.0, INT4_LEVELS)
    smoothed = (x / vector(smooth, features)[:, 0].to(torch.bfloat16)).float().unflatten(-1, (-1, group_size))
    wanted = smoothed.abs().amax(-1) * torch.tensor(1 / top)
    if fp4:
        wanted = wanted.clamp(max=448)
    distances = ((smoothed / wanted.unsqueeze(-1)).unsqueeze(-1) - levels[EVEN_FIRST]).abs()
    indices = EVEN_FIRST[distances.argmin(-1)].flatten(-2)
    out[:rows] = (indices[:, 0::2] | indices[:, 1::2] << 4).to(torch.uint8)
    scales[:, :rows] = wanted.T.to(scales.dtype)
    lora_act[:rows] = x.float() @ branch_side(proj_down, down=True).T


def gemm_w4a4(*arguments: Any) -> None:
    """Compute with the arguments that diffusers passes; others are refused."""
    act, weight, out, _, ascales, wscales, _, _, lora_act, lora_up, *rest = arguments
    bias, act_unsigned, lora_scales, fp4, alpha, wcscales = (rest[i] for i in (5, 9, 10, 12, 13, 14))
    used = (5, 9, 10, 12, 13, 14)
    assert all(value in (None, False, 0) for i, value in enumerate(rest) if i not in used) and not act_unsigned
    rows, out_features = out.shape
    levels, group_size = (FP4_LEVELS, 16) if fp4 else (INT4_LEVELS, 64)
    num_groups = 2 * weight.shape[1] // group_size
    weight_scales = micro_scales(wscales) if fp4 else vector(wscales, out_features, num_groups)
    residual = levels[nibbles(weight)] * weight_scales.repeat_interleave(group_size, 1)
    codes = torch.stack((act[:rows] & 15, act[:rows] >> 4), -1).flatten(-2).long()
    activations = levels[codes] * ascales[:, :rows].float().T.repeat_interleave(group_size, 1)
    y = activations @ residual.T
    if fp4:
        y = y * alpha.float() * vector(wcscales, out_features)[:, 0]
    assert lora_scales == [1.0] * (lora_up.shape[1] // 16)
    y = y + lora_act[:rows].to(torch.bfloat16).float() @ branch_side(lora_up, down=False).T
    out.copy_(y if bias is None else y + vector(bias, out_features)[:, 0])


OPERATORS = {"quantize_w4a4_act_fuse_lora": quantize_w4a4_act_fuse_lora, "gemm_w4a4": gemm_w4a4}
