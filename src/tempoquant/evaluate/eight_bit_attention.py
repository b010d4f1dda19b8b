"""A model in plain PyTorch of 8-bit attention, SageAttention's kernels, for any machine.

QKᵀ is a product of INT8 numbers after the mean of K is subtracted (SageAttention, arXiv
2410.02367). PV is a product of FP16 numbers there, and of FP8 numbers in SageAttention 2 (arXiv
2411.10958). Sums are exact here, unlike kernels' FP16 and 22-bit accumulators: this is the error of
the number formats, the least that a kernel can make. `python -m benchmarks.attention_numerics`
compares it with PyPI's sageattention under Triton's interpreter.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ValueDtype = Literal["fp16", "fp8"]
VALUE_DTYPES: tuple[ValueDtype, ...] = get_args(ValueDtype)

QUERY_BLOCK, KEY_BLOCK = 128, 64
"""Tokens that share a scale, as in SageAttention's own kernels (its blocks of queries and keys)."""
_INT8_MAX = 127.0
_FP8_MAX = 448.0  # of float8_e4m3fn
_SAMPLED_BLOCKS = 8


def eight_bit_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    values_in: ValueDtype = "fp16",
) -> torch.Tensor:
    """Return softmax(QKᵀ·scale)·V as 8-bit kernels compute it.

    Args:
        query, key, value: (…, tokens, features), floating; keys and values have as many tokens.
        scale: of the scores; 1/√features if left out.
        values_in: what PV multiplies: "fp16", or "fp8" with a scale for each feature of V and P
            times 448.

    Returns:
        (…, query tokens, features), float32.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    smooth = key.float() - key.float().mean(dim=-2, keepdim=True)
    keys, key_scales = _int8(smooth, KEY_BLOCK)
    queries, query_scales = _int8(query.float() * scale, QUERY_BLOCK)
    rows = []
    for start in range(0, queries.shape[-2], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        scores = queries[..., block, :] @ keys.mT * (query_scales[..., block, :] * key_scales.mT)
        shares = torch.exp(scores - scores.amax(dim=-1, keepdim=True))  # at most 1: the sum divides after PV
        rows.append(_weighted(shares, value.float(), values_in) / shares.sum(dim=-1, keepdim=True))
    return torch.cat(rows, dim=-2)


def _int8(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to integers −127 … 127 as float32, and return the scale of each token, (…, tokens, 1):
    one for a block of them.
    """
    num_tokens = x.shape[-2]
    padded = functional.pad(x, (0, 0, 0, -num_tokens % block)).unflatten(-2, (-1, block))
    scales = padded.abs().amax(dim=(-2, -1), keepdim=True) / _INT8_MAX
    scales = scales.expand(*padded.shape[:-1], 1).flatten(-3, -2)[..., :num_tokens, :]
    codes = x / torch.where(scales > 0, scales, 1.0)
    return torch.trunc(codes + torch.copysign(torch.full_like(codes, 0.5), codes)), scales


def _weighted(shares: torch.Tensor, value: torch.Tensor, values_in: ValueDtype) -> torch.Tensor:
    if values_in == "fp16":
        return shares.half().float() @ value.half().float()
    scales = value.abs().amax(dim=-2, keepdim=True) / _FP8_MAX
    codes = (value / torch.where(scales > 0, scales, 1.0)).to(torch.float8_e4m3fn).float()
    return (shares * _FP8_MAX).to(torch.float8_e4m3fn).float() @ codes * (scales / _FP8_MAX)


@contextlib.contextmanager
def watching_attention(model: nn.Module, observe: Callable[[str, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Call `observe(name, wanted, found)` with each attention of a model and its 8-bit version,
    within this context.

    `name` is the attention module's name followed by the number formats that it multiplies, such as
    "blocks.0.attn1.int8_fp8". `wanted` is the model's output, `found` the 8-bit output of the same
    inputs, for some blocks of queries. The model continues with its own output.
    """
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "set_processor")}
    watch = _Watch(observe)

    def entering(name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            watch.name = name

        return enter

    handles = [module.register_forward_pre_hook(entering(name)) for name, module in modules.items()]
    try:
        with watch:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    """Sees every scaled_dot_product_attention of any library."""

    def __init__(self, observe: Callable[[str, torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self.name = ""
        self._observe = observe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        answer = func(*args, **given)
        if func is not functional.scaled_dot_product_attention or not self.name:
            return answer
        named = {**dict(zip(("query", "key", "value"), args, strict=False)), **given}
        if named.get("attn_mask") is not None or named.get("is_causal"):
            return answer  # 8-bit kernels have no mask: such attention stays in 16 bits
        query, rows = _some_blocks(named["query"])
        for values_in in VALUE_DTYPES:
            found = eight_bit_attention(query, named["key"], named["value"], named.get("scale"), values_in)
            self._observe(f"{self.name}.int8_{values_in}", answer[..., rows, :].float(), found)
        return answer


def _some_blocks(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whole blocks of queries, spread over all of them; rows of attention do not depend on
    each other.
    """
    num_tokens = query.shape[-2]
    num_blocks = math.ceil(num_tokens / QUERY_BLOCK)
    chosen = torch.linspace(0, num_blocks - 1, min(num_blocks, _SAMPLED_BLOCKS)).round().long()
    # A block that is not full comes last, and stays last.
    rows = torch.cat([torch.arange(i * QUERY_BLOCK, min((i + 1) * QUERY_BLOCK, num_tokens)) for i in chosen.tolist()])
    rows = rows.to(query.device)
    return query[..., rows, :], rows
