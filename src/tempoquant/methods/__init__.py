"""One paper, one file, one function: tensors and numbers in, tensors out."""

from tempoquant.methods.clipping import ClipSearch
from tempoquant.methods.gptq import GptqResult, HessianAccumulator, gptq
from tempoquant.methods.lowrank import truncated_svd
from tempoquant.methods.rounding import round_to_nearest
from tempoquant.methods.smoothing import smoothing_factor
from tempoquant.methods.svdquant import Decomposition, svdquant

__all__ = [
    "ClipSearch", "Decomposition", "GptqResult", "HessianAccumulator", "gptq", "round_to_nearest", "smoothing_factor",
    "svdquant", "truncated_svd",
]  # fmt: skip
