"""The referee of quantization recipes: same model, same calibration samples, held-out evaluation,
every bit counted.
"""
