"""One paper, one file, one function: tensors and numbers in, tensors out."""

from tempoquant.methods.allocation import Option, allocate
from tempoquant.methods.clipping import best_clip_ratio, clip_errors
from tempoquant.methods.deflation import Deflation, deflation_of, split
from tempoquant.methods.gptq import gptq
from tempoquant.methods.hessian import Feedback, HessianAccumulator, feedback_matrix
from tempoquant.methods.lowrank import truncated_svd
from tempoquant.methods.rounding import round_to_nearest
from tempoquant.methods.smoothing import smoothing_factor
from tempoquant.methods.svdquant import Decomposition, svdquant

__all__ = [
    "Decomposition", "Deflation", "Feedback", "HessianAccumulator", "Option", "allocate", "best_clip_ratio", "clip_errors", "deflation_of",
    "feedback_matrix", "gptq", "round_to_nearest", "smoothing_factor", "split", "svdquant", "truncated_svd",
]  # fmt: skip
