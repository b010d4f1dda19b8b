"""The two verbs: quantize a pipeline, quantize one layer."""

from tempoquant.quantizing.linear import quantize_linear
from tempoquant.quantizing.machine import Machine
from tempoquant.quantizing.pipeline import plan, quantize

__all__ = ["Machine", "plan", "quantize", "quantize_linear"]
