"""Methods, one file for each paper: functions from tensors and numbers to tensors."""

from tempoquant.methods.allocation import Option, allocate
from tempoquant.methods.clipping import best_clip_ratio, clip_errors
from tempoquant.methods.deflation import (
    Deflation,
    deflation_along,
    deflation_of,
    leading_directions,
    regression,
    split_weight,
)
from tempoquant.methods.gptq import gptq
from tempoquant.methods.hessian import Feedback, HessianAccumulator, act_order, feedback_matrix
from tempoquant.methods.lowrank import truncated_svd
from tempoquant.methods.prior import add_prior_, prior_energy, shrunk_mean, typical_energy
from tempoquant.methods.rounding import round_to_nearest
from tempoquant.methods.smoothing import fit_scale_range, smoothing_factor
from tempoquant.methods.svdquant import Decomposition, split_with_factors, svdquant

__all__ = [
    "Decomposition",
    "Deflation",
    "Feedback",
    "HessianAccumulator",
    "Option",
    "act_order",
    "add_prior_",
    "allocate",
    "best_clip_ratio",
    "clip_errors",
    "deflation_along",
    "deflation_of",
    "feedback_matrix",
    "fit_scale_range",
    "gptq",
    "leading_directions",
    "prior_energy",
    "regression",
    "round_to_nearest",
    "shrunk_mean",
    "smoothing_factor",
    "split_weight",
    "split_with_factors",
    "svdquant",
    "truncated_svd",
    "typical_energy",
]
