"""From a quantized pipeline on disk to a published model: checks, the model card, the upload."""
