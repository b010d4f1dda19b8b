"""The functions that quantize a pipeline, quantize one layer, or measure sensitivity."""

from tempoquant.quantizing.budget import Budget
from tempoquant.quantizing.linear import quantize_linear
from tempoquant.quantizing.machine import Machine
from tempoquant.quantizing.pipeline import plan, quantize
from tempoquant.quantizing.sensitivity import measure_sensitivity

__all__ = ["Budget", "Machine", "measure_sensitivity", "plan", "quantize", "quantize_linear"]
