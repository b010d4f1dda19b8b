"""Wan's transformer blocks in chunks of tokens: the same numbers with a third of the activations.

Everything in a block except self-attention's keys and values treats each token by itself. diffusers
computes every step for all tokens at once, in float32 where it modulates: the memory of 11 hidden
states at 16 bits. Here queries, keys and values are computed first, in chunks, from one modulated
input, which 4-bit linears quantize once. Then each chunk attends and goes through the rest of the
block, and its result replaces its input: at most four hidden states. Every row of every product is
the same as before, so results differ only where a library sums in another order for another number
of rows.

SageAttention would smooth and quantize keys and values again for each chunk of queries. With it,
all queries attend at once, which takes one hidden state more. Each chunk costs launches and expands
4-bit weights again: if memory suffices, one piece is faster.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import diffusers
import torch
from diffusers import WanTransformer3DModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock

from tempoquant.errors import UnsupportedError
from tempoquant.models.hooks import is_watched

CHUNK_TOKENS = 4096
"""Large enough for full matrix products, small enough to vanish beside four hidden states of a
video.
"""


def chunk_blocks(transformer: Any, num_tokens: int = CHUNK_TOKENS) -> Callable[[], None]:
    """Make a WanTransformer3DModel compute in chunks of tokens.

    Args:
        transformer: 16-bit or quantized, with or without adapters.
        num_tokens: of a chunk.

    Returns:
        A function that undoes it.

    Raises:
        UnsupportedError: this diffusers' blocks differ from these chunks.
    """
    _check_same_results()
    return _use_chunks(transformer, num_tokens)


def _use_chunks(transformer: Any, num_tokens: int) -> Callable[[], None]:
    ours: dict[Any, Callable[..., Any]] = {
        block: functools.partial(_forward, block, num_tokens)
        for block in transformer.blocks
        if type(block) is WanTransformerBlock
    }
    ours[transformer.norm_out] = functools.partial(_LazyNorm, transformer, num_tokens)
    if any("forward" in module.__dict__ for module in ours):
        raise UnsupportedError(
            "a cache or another hook of diffusers is on the transformer's blocks already: set the memory mode first, "
            "and enable caches afterwards."
        )
    for module, forward in ours.items():
        module.forward = forward

    def undo() -> None:
        for module, forward in ours.items():
            _take_off(module, forward)

    return undo


def _take_off(module: Any, forward: Callable[..., Any]) -> None:
    """Restore a module's own forward, beneath hooks that were added since."""
    if module.__dict__.get("forward") is forward:
        del module.forward
        return
    registry = getattr(module, "_diffusers_hook", None)
    for reference in () if registry is None else registry._fn_refs:
        for name in ("forward", "original_forward"):
            if getattr(reference, name) is forward:
                setattr(reference, name, type(module).forward.__get__(module))


def _forward(
    block: WanTransformerBlock,
    num_tokens: int,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Compute WanTransformerBlock.forward: (batch, tokens, features), perhaps overwritten."""
    if temb.ndim == 4 or torch.is_grad_enabled() or not _is_plain(block):
        return type(block).forward(block, hidden_states, encoder_hidden_states, temb, rotary_emb)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + temb.float()).chunk(6, dim=1)
    output = torch.empty_like(hidden_states) if is_watched(block) else hidden_states

    def modulated(x: torch.Tensor) -> torch.Tensor:
        return _modulated(block.norm1(x.float()), scale, shift).type_as(x)

    chunks = list(_chunks(hidden_states.shape[1], num_tokens))
    inputs = (modulated(hidden_states[:, chunk]) for chunk in chunks)
    query, key, value = _projections(block.attn1, "qkv", inputs, chunks, rotary_emb)
    for chunk, attended in zip(chunks, _attended(block.attn1, _rows(query), chunks, key, value), strict=True):
        output[:, chunk] = _gated(hidden_states[:, chunk], attended, gate)
        del attended
    del query, key, value
    text = slice(0, encoder_hidden_states.shape[1])
    text_key, text_value = _projections(block.attn2, "kv", [encoder_hidden_states], [text], None)

    def text_query(chunk: slice) -> torch.Tensor:
        inside = [each for each in chunks if chunk.start <= each.start and each.stop <= chunk.stop]
        normed = (block.norm2(output[:, each].float()).type_as(output) for each in inside)
        return _projections(block.attn2, "q", normed, inside, None)[0]

    for chunk, attended in zip(chunks, _attended(block.attn2, text_query, chunks, text_key, text_value), strict=True):
        x = output[:, chunk] + attended
        del attended
        inner = _modulated(block.norm3(x.float()), ffn_scale, ffn_shift).type_as(x)
        output[:, chunk] = _gated(x, block.ffn(inner), ffn_gate)
    return output


def _modulated(normed: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Compute normed · (1 + scale) + shift, float32, in the memory of the norm's output."""
    return normed.mul_(1 + scale).add_(shift)


def _gated(x: torch.Tensor, change: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Compute x + change · gate, in float32, rounded once to the dtype of x."""
    return change.float().mul_(gate).add_(x).type_as(x)


def _projections(
    attention: WanAttention,
    which: str,
    inputs: Iterable[torch.Tensor],
    chunks: Sequence[slice],
    rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
) -> list[torch.Tensor]:
    """Compute queries, keys, values by `which`: each (batch, tokens, heads, features), in chunks.

    The linears get the same tensor one after the other, so that a shared input is quantized once.
    """
    whole: dict[str, torch.Tensor] = {}
    for chunk, x in zip(chunks, inputs, strict=True):
        for name in which:
            part = _rotated(_heads(attention, name, x), None if name == "v" else rotary_emb, chunk)
            if len(chunks) == 1:
                whole[name] = part
                continue
            if name not in whole:
                whole[name] = part.new_empty((x.shape[0], chunks[-1].stop, *part.shape[2:]))
            whole[name][:, chunk] = part
            del part
        del x
    return [whole[name] for name in which]


def _heads(attention: WanAttention, which: str, x: torch.Tensor) -> torch.Tensor:
    """Compute heads of x, (batch, tokens, heads, features a head), queries and keys normed."""
    projected = getattr(attention, f"to_{which}")(x)
    if which != "v":
        projected = getattr(attention, f"norm_{which}")(projected)
    return projected.unflatten(2, (attention.heads, -1))


def _rotated(x: torch.Tensor, rotary_emb: tuple[torch.Tensor, torch.Tensor] | None, chunk: slice) -> torch.Tensor:
    """Apply WanAttnProcessor's rotary embedding to the tokens of a chunk."""
    if rotary_emb is None:
        return x
    cos, sin = rotary_emb[0][:, chunk, :, 0::2], rotary_emb[1][:, chunk, :, 1::2]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.empty_like(x)
    rotated[..., 0::2] = (even * cos).sub_(odd * sin)
    rotated[..., 1::2] = (even * sin).add_(odd * cos)
    return rotated


def _attended(
    attention: WanAttention,
    query: Callable[[slice], torch.Tensor],
    chunks: Sequence[slice],
    key: torch.Tensor,
    value: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """Yield each chunk's attention, (batch, tokens of the chunk, features), projected.

    Args:
        query: of some tokens, (batch, tokens, heads, features a head).
        key, value: of all tokens.
    """
    backend = attention.processor._attention_backend

    def attend(queries: torch.Tensor) -> torch.Tensor:
        return dispatch_attention_fn(queries, key, value, backend=backend).type_as(queries)

    whole = attend(query(slice(0, chunks[-1].stop))) if quantizes_keys(backend) else None
    for chunk in chunks:
        yield _projected(attention, attend(query(chunk)) if whole is None else whole[:, chunk])


def _rows(query: torch.Tensor) -> Callable[[slice], torch.Tensor]:
    return lambda tokens: query[:, tokens]


def _projected(attention: WanAttention, heads: torch.Tensor) -> torch.Tensor:
    return attention.to_out[1](attention.to_out[0](heads.flatten(2, 3)))


def quantizes_keys(backend: Any) -> bool:
    """Return whether an attention backend quantizes keys and values in each call.

    Args:
        backend: of a processor: diffusers' name; None for the one that is active in the process.
    """
    registry = attention_dispatch._AttentionBackendRegistry
    name = registry.get_active_backend()[0] if backend is None else backend
    return "sage" in str(getattr(name, "value", name))


def _is_plain(block: WanTransformerBlock) -> bool:
    """Return whether attention is diffusers' own, on one device, and no hook looks inside."""
    for attention in (block.attn1, block.attn2):
        processor = attention.processor
        is_own = type(processor) is WanAttnProcessor and processor._parallel_config is None
        if not is_own or attention.add_k_proj is not None or attention.fused_projections:
            return False
    inside = (module for module in block.modules() if module is not block)
    return not any(is_watched(module) or "forward" in module.__dict__ for module in inside)


def _chunks(num_tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


class _LazyNorm:
    """A stand-in for the output of the head's norm: it only supports `(norm(x.float()) * factor +
    term).type_as(x)`, and computes it a chunk of tokens at a time once the last part is known.
    """

    def __init__(self, transformer: Any, num_tokens: int, x: torch.Tensor) -> None:
        self._transformer, self._num_tokens, self._x = transformer, num_tokens, x
        self._factor: torch.Tensor | None = None
        self._term: torch.Tensor | None = None

    def __mul__(self, factor: torch.Tensor) -> "_LazyNorm":
        self._factor = factor
        return self

    def __add__(self, term: torch.Tensor) -> "_LazyNorm":
        self._term = term
        return self

    def type_as(self, like: torch.Tensor) -> torch.Tensor:
        assert self._factor is not None and self._term is not None  # _check_same_results has seen them
        norm, blocks = self._transformer.norm_out, self._transformer.blocks
        overwrites = not torch.is_grad_enabled() and len(blocks) > 0 and not is_watched(blocks[-1])
        output = like if overwrites else torch.empty_like(like)  # the last block's output, which nothing else reads
        for chunk in _chunks(like.shape[1], self._num_tokens):
            normed = type(norm).forward(norm, self._x[:, chunk])
            output[:, chunk] = (normed * _of(chunk, self._factor) + _of(chunk, self._term)).type_as(like)
        return output


def _of(chunk: slice, modulation: torch.Tensor) -> torch.Tensor:
    """Return a modulation's share of a chunk: all of it, unless each token has its own."""
    return modulation if modulation.shape[1] == 1 else modulation[:, chunk]


@functools.cache
@torch.no_grad()
def _check_same_results() -> None:
    """Compare a small random model with itself in chunks: other diffusers may differ."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)  # the CPU's alone: torch.manual_seed would touch every GPU's
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=8, freq_dim=8, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=16,
        ).eval()  # fmt: skip
        inputs = {
            "hidden_states": torch.randn(1, 4, 2, 4, 6), "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 3, 8), "return_dict": False,
        }  # fmt: skip
    expected = model(**inputs)[0]
    difference: float | str
    try:
        _use_chunks(model, num_tokens=5)
        difference = float((model(**inputs)[0] - expected).abs().max() / expected.abs().max())
    except (TypeError, AttributeError, ValueError, RuntimeError, AssertionError) as error:
        difference = str(error)
    if isinstance(difference, str) or not difference < 1e-5:  # float32: sums of at most 32 products, in two blocks
        raise UnsupportedError(
            f"diffusers {diffusers.__version__} computes its Wan blocks in a way that TempoQuant does not know "
            f"({difference}): upgrade tempoquant, or install an earlier diffusers."
        )
