"""Evaluation: how far a quantized model is from its reference, in numbers and in pictures."""
