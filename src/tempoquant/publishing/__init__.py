"""Publishing of a quantized pipeline on disk as a model: checks, the model card, the upload."""
