"""Cross-attention to hundreds of padding tokens, at the cost of a few.

The pipeline pads the text embeddings with zeros to `max_sequence_length` (512), and Wan attends to
all of them. Equal keys with equal values can be merged: n copies of one key weigh as much as one
key with log(n) added to its logits. So training keeps `MAX_TOKENS` tokens and spreads the padding
over those after the prompt, by a bias; the function is the same to rounding
(tests/tiny/test_training.py).
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn import functional as F


class PaddingBiasProcessor:
    """Wan's cross-attention with an additive bias on the keys, `bias`: (batch, 1, 1, tokens). For
    training only.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self) -> None:
        self.bias: Tensor | None = None

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        bias = None if self.bias is None else self.bias.to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key.to(query.dtype), value, attn_mask=bias)
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2, 3)))


def padding_bias(num_tokens: Tensor, num_kept: int, padded_length: Tensor) -> Tensor:
    """Compute the logit bias, (batch, 1, 1, num_kept): 0 on prompt tokens, log(paddings / kept
    paddings) on the others.

    Args:
        num_tokens, padded_length: (batch,), the prompt's tokens and the length the pipeline would
            pad to.
    """
    is_padding = torch.arange(num_kept) >= num_tokens[:, None]
    copies = (padded_length - num_tokens) / (num_kept - num_tokens)
    return torch.where(is_padding, copies[:, None].log(), 0.0)[:, None, None, :]


def use_padding_bias(expert: WanTransformer3DModel) -> PaddingBiasProcessor:
    """Give every cross-attention of the expert one shared processor; set its `bias` before each
    forward.
    """
    processor = PaddingBiasProcessor()
    for block in expert.blocks:
        block.attn2.set_processor(processor)
    return processor
