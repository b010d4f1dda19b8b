"""GPTQ (arXiv 2210.17323): round a weight column by column and propagate each error to the
remaining columns.

In the form of LDLQ (QuIP, arXiv 2307.13304), column k is rounded after the updates of all earlier
columns have reached it:

    q_k = Q(w_k + Σ_{j<k} (w_j − q_j)·M_jk) ,   H + damping = M·D²·Mᵀ, M unit upper triangular
"""

import torch

from tempoquant.formats import Format, WeightScale, encode, nearest_level
from tempoquant.methods.hessian import Feedback
from tempoquant.methods.products import add_product_

# Columns of a block are updated one element at a time; more columns would not fit the processor's
# L1 cache.
_STRIP = 32


def gptq(
    residual_weight: torch.Tensor,
    feedback: Feedback,
    scale: WeightScale,
    format: Format,
    block_size: int = 128,
) -> torch.Tensor:
    """Round a weight so that its error on inputs with this Hessian is small.

    Args:
        residual_weight: (out, in) float32 or float64; not changed.
        feedback: of the Hessian of the input.
        scale: fixed before, so that features keep their groups in any rounding order.
        block_size: columns rounded one by one before one product propagates their errors to later
            columns; speed, never the result (beyond the order of float32 sums).

    Returns:
        codes: (out, in) int8.
    """
    matrix = feedback.matrix.to(residual_weight.dtype)
    group_scale = scale.effective.to(residual_weight.dtype).T.contiguous()
    codes = torch.empty(residual_weight.shape, dtype=torch.int8, device=residual_weight.device)
    in_features = residual_weight.shape[1]
    order = torch.arange(in_features, device=codes.device) if feedback.order is None else feedback.order
    # Columns still to come hold the number they will be rounded from; columns already rounded hold
    # their error, w − q.
    working = residual_weight.index_select(1, order)
    for number, start in enumerate(range(0, in_features, block_size), start=1):
        end = min(start + block_size, in_features)
        features = order[start:end]
        wanted, original = _transposed(working[:, start:end]), _transposed(residual_weight.index_select(1, features))
        column_scale = group_scale[features // format.group_size]
        levels = _round_block(wanted, original, column_scale, matrix[start:end, start:end], format)
        codes.index_copy_(1, features, _transposed(encode(levels, format)))
        working[:, start:end] = _transposed(original - levels.mul_(column_scale))
        # The last 1, 2, 4, … blocks propagate to as many blocks to come, so that every pair of
        # blocks meets once and most of the work lies in few, large and square products.
        span = (number & -number) * block_size
        after = slice(end, end + span)
        if end < in_features:
            add_product_(working[:, after], working[:, end - span : end], matrix[end - span : end, after].T)
    return codes


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """Return the transpose, contiguous. PyTorch transposes only whole matrices tile by tile, so a
    slice is copied first.
    """
    return matrix.contiguous().T.contiguous()


def _round_block(
    wanted: torch.Tensor,
    original: torch.Tensor,
    column_scale: torch.Tensor,
    feedback: torch.Tensor,
    format: Format,
) -> torch.Tensor:
    """Round a few columns one by one. All arguments are transposed, so that a column is contiguous:
    (columns, out).

    Args:
        wanted: original plus the propagated errors of every column before this block; overwritten.
        feedback: (columns, columns), unit upper triangular.

    Returns:
        The chosen levels, (columns, out), in units of column_scale.
    """
    levels, change = torch.empty_like(wanted), torch.empty_like(wanted)
    reaching = feedback.T.contiguous()  # row k: the share of each earlier column's error that column k takes
    for start in range(0, wanted.shape[0], _STRIP):
        end = start + _STRIP
        for column in range(start, min(end, wanted.shape[0])):
            number = torch.addmv(wanted[column], change[start:column].T, reaching[column, start:column])
            level = nearest_level(number.div_(column_scale[column]), format)
            levels[column] = level
            torch.sub(original[column], level.mul_(column_scale[column]), out=change[column])
        wanted[end:].addmm_(reaching[end:, start:end], change[start:end])
    return levels
