"""One paper, one file, one function: tensors and numbers in, tensors out."""

from tempoquant.methods.allocation import Option, allocate
from tempoquant.methods.clipping import best_clip_ratio, clip_errors
from tempoquant.methods.deflation import Deflation, deflation_by, deflation_of, leading_directions, regression, split
from tempoquant.methods.gptq import gptq
from tempoquant.methods.hessian import Feedback, HessianAccumulator, act_order, feedback_matrix
from tempoquant.methods.lowrank import truncated_svd
from tempoquant.methods.prior import add_prior_, certain_mean, prior_energy, typical_energy
from tempoquant.methods.rounding import round_to_nearest
from tempoquant.methods.smoothing import fit_scale_range, smoothing_factor
from tempoquant.methods.svdquant import Decomposition, split_by, svdquant

__all__ = [
    "Decomposition", "Deflation", "Feedback", "HessianAccumulator", "Option", "act_order", "add_prior_", "allocate",
    "best_clip_ratio", "certain_mean", "clip_errors", "deflation_by", "deflation_of", "feedback_matrix",
    "fit_scale_range", "gptq", "leading_directions", "prior_energy", "regression", "round_to_nearest",
    "smoothing_factor", "split", "split_by", "svdquant", "truncated_svd", "typical_energy",
]  # fmt: skip
