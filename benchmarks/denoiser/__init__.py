"""Recipes on a real pretrained denoiser, whose activations change along its trajectory."""
