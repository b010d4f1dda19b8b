"""What a Wan transformer block looks like inside, by name; needs nothing of diffusers."""

from collections.abc import Iterable

SHARED_INPUTS = (("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v"))
"""Linears of a block that read one input: q, k, v of self-attention the video, k and v of cross-attention the text."""


def sharing_an_input(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Of linears such as blocks.3.attn1.to_q, the groups that read one input, as far as they are among the names."""
    names = set(names)
    blocks = sorted({tuple(name.split(".")[:2]) for name in names})
    wanted = [tuple(f"{'.'.join(block)}.{linear}" for linear in group) for block in blocks for group in SHARED_INPUTS]
    found = [tuple(name for name in group if name in names) for group in wanted]
    return [group for group in found if len(group) > 1]
