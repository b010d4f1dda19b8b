"""Evaluation: the distance of a quantized model from its reference, in numbers and in pictures."""
