"""Nodes for tests inside ComfyUI: texts, image, latents and frames of the bundled model.

ComfyUI's own loaders of text encoders and autoencoders know fixed sizes, and its latents'
statistics are Wan's.
"""

import functools
from typing import Any

import numpy as np
import torch


@functools.cache
def pipeline() -> Any:
    """Return the bundled model, by diffusers."""
    from tempoquant.hosts.diffusers.pipeline import load_pipeline
    from tempoquant.models.source import SourceModel

    return load_pipeline(SourceModel.open("tiny"), "cpu")


class TinyTask:
    """Conditions of one evaluation item, as WanImageToVideo makes them."""

    CATEGORY, FUNCTION = "tests", "go"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return one number."""
        return {"required": {"index": ("INT", {"default": 0})}}

    @torch.no_grad()
    def go(self, index: int) -> tuple[Any, Any, Any]:
        """Return (positive, negative, latent)."""
        from tempoquant.tiny.sets import evaluation_items

        item, made = evaluation_items(index + 1)[index], pipeline()
        texts = made.encode_prompt(item.prompt, "", True, device="cpu")
        video = torch.zeros(1, 3, 17, 64, 64)
        video[:, :, 0] = torch.from_numpy(np.asarray(item.image).astype("f4") / 127.5 - 1).permute(2, 0, 1)
        latents = made.vae.encode(video).latent_dist.mode()
        mask = torch.ones(1, 1, latents.shape[2], 8, 8)
        mask[:, :, :1] = 0
        extra = {"concat_latent_image": latents, "concat_mask": mask}
        positive, negative = ([[text, dict(extra)]] for text in texts)
        return positive, negative, {"samples": torch.zeros_like(latents)}


class TinyLatents:
    """A model whose latents have the bundled autoencoder's mean and standard deviation."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "go", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return a model."""
        return {"required": {"model": ("MODEL",)}}

    def go(self, model: Any) -> tuple[Any]:
        """Return (MODEL,)."""
        config, format = pipeline().vae.config, model.model.latent_format
        for name in ("latents_mean", "latents_std"):
            setattr(format, name, torch.tensor(config[name]).view(1, -1, 1, 1, 1))
        return (model,)


class TinyDecode:
    """Frames."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "go", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return latents."""
        return {"required": {"samples": ("LATENT",)}}

    @torch.no_grad()
    def go(self, samples: dict[str, Any]) -> tuple[Any]:
        """Return (IMAGE,): (frames, height, width, 3)."""
        video = pipeline().vae.decode(samples["samples"]).sample[0]
        return ((video.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 3, 0).contiguous(),)


NODE_CLASS_MAPPINGS = {"TinyTask": TinyTask, "TinyLatents": TinyLatents, "TinyDecode": TinyDecode}
