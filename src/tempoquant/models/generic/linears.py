"""The linears in a denoiser's blocks, as one call shows them: which read one tensor, and which have
no tokens.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from tempoquant.formats import FORMATS

_WIDTH_STEP = max(each.group_size for each in FORMATS.values())
"""Input features that fill whole groups in every format."""

MODULATION = "one input for all tokens (modulation)"
"""Why a linear is kept in 16 bits that is a block's modulation, and fills whole groups."""
_NARROW_MODULATION = f"one input for all tokens, of a width that is no multiple of {_WIDTH_STEP}"

Inputs = Mapping[str, Mapping[str, torch.Tensor]]
"""The inputs of blocks' linears, by block and by the linears' names in it."""


class Linears(NamedTuple):
    """The linears of a denoiser's blocks.

    Attributes:
        kept: in 16 bits, with the reason.
        together: linears that read one tensor.
        of_text: those whose rows no size changes, with text_tokens at most.
        width: features of a token.
    """

    kept: dict[str, str]
    together: tuple[tuple[str, ...], ...]
    of_text: tuple[str, ...]
    text_tokens: int
    width: int


def linears_of(
    blocks: Mapping[str, nn.Module], first: Inputs, larger: Inputs, num_rows: int, num_larger_rows: int
) -> Linears:
    """Return the facts that two calls show, the other with a larger picture.

    Args:
        blocks: of the denoiser by name.
        first, larger: of the two calls.
        num_rows, num_larger_rows: of their batches.
    """
    kept: dict[str, str] = {}
    tokens: dict[str, set[int]] = {}
    fixed: dict[str, bool] = {}
    widths: Counter[int] = Counter()
    for block, module in blocks.items():
        own = {name: each for name, each in module.named_modules() if isinstance(each, nn.Linear)}
        for name, linear in own.items():
            seen = first.get(block, {}).get(name)
            if seen is None:
                kept.setdefault(name, "not called in the steps that were observed")
            elif (rows := _rows(seen, num_rows)) <= 1:
                kept.setdefault(name, MODULATION if linear.in_features % _WIDTH_STEP == 0 else _NARROW_MODULATION)
            elif linear.in_features % _WIDTH_STEP:
                kept.setdefault(name, f"{linear.in_features} input features, no multiple of {_WIDTH_STEP}")
            else:
                tokens.setdefault(name, set()).add(rows)
                same = rows == _rows(larger[block][name], num_larger_rows)
                fixed[name] = fixed.get(name, True) and same
                widths[linear.in_features] += not same
    of_text = tuple(name for name, is_fixed in fixed.items() if is_fixed and name not in kept)
    return Linears(
        kept=kept,
        together=_together(first, kept),
        of_text=of_text,
        text_tokens=max((max(tokens[name]) for name in of_text), default=0),
        width=widths.most_common(1)[0][0] if widths else 0,
    )


def _rows(x: torch.Tensor, num_rows: int) -> int:
    """Return the tokens of one row of a batch."""
    return x.numel() // x.shape[-1] // num_rows


def _together(inputs: Inputs, kept: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """Return the largest groups that agree with every block."""
    by_block = []
    for own in inputs.values():
        groups: dict[int, list[str]] = {}
        for name, x in own.items():
            if name not in kept:
                groups.setdefault(id(x), []).append(name)
        by_block.append([tuple(names) for names in groups.values()])
    several = dict.fromkeys(group for groups in by_block for group in groups if len(group) > 1)
    every = sorted(several, key=len, reverse=True)
    found: list[tuple[str, ...]] = []
    for group in every:
        agrees = all(
            tuple(name for name in group if any(name in names for names in groups)) in (*groups, ())
            for groups in by_block
        )
        if agrees and not any({*group} & {*other} for other in found):
            found.append(group)
    return tuple(found)
