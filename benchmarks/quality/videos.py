"""Decoded videos of a few rows: their distance from the 16-bit ones, and their prompt adherence."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.quality.reference import Reference
from benchmarks.quality.results import RowFiles, summary, write_json
from benchmarks.quality.rows import Row
from tempoquant.evaluate.metrics.prompt_adherence import check_prompt
from tempoquant.evaluate.metrics.video_metrics import Video, psnr_db, ssim
from tempoquant.progress import Progress

MAX_ROWS = 6


class Decoder:
    """Decodes final latents to videos, as the pipeline itself does.

    Args:
        pipeline: whose autoencoder decodes.
        in_bundled_world: whether pixels show if a video follows its prompt.
    """

    def __init__(self, pipeline: Any, in_bundled_world: bool) -> None:
        self._pipeline, self._in_bundled_world = pipeline, in_bundled_world
        self._references: dict[int, Video] = {}

    def judge(self, files: RowFiles, row: Row, reference: Reference, progress: Progress) -> dict[str, Any]:
        """Judge a finished row's videos of one seed, or read the stored judgement: one value a
        held-out prompt.

        The 16-bit videos are kept for the next row, until `forget`.
        """
        file = files.beside(row, reference.seed, "videos.json")
        if file.is_file():
            return dict(json.loads(file.read_text(encoding="utf-8")))
        found: dict[str, list[float]] = {}
        latents = files.final_latents(row, reference.seed)
        advance = progress.start(f"{row.label}: videos of seed {reference.seed}", len(latents))
        for index, trajectory in enumerate(reference.trajectories()):
            if index not in self._references:
                self._references[index] = self.decode(trajectory.final_latent)
            video = self.decode(latents[index : index + 1])
            judged = self._judge(self._references[index], video, trajectory.prompt.text)
            for key, value in judged.items():
                found.setdefault(key, []).append(value)
            advance()
        write_json(file, found)
        return found

    def forget(self) -> None:
        """Release the 16-bit videos, before those of another seed are decoded."""
        self._references.clear()

    @torch.no_grad()
    def decode(self, final_latent: torch.Tensor) -> Video:
        """Convert (1, channels, frames, height, width) to uint8 (frames, height, width, 3)."""
        vae = self._pipeline.vae
        latent = final_latent.to(vae.device, vae.dtype)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(latent)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        # As the pipeline computes it, so that bytes are the same.
        decoded = vae.decode(latent / (1.0 / std) + mean, return_dict=False)[0]
        frames = self._pipeline.video_processor.postprocess_video(decoded, output_type="np")[0]
        return (np.asarray(frames) * 255).round().clip(0, 255).astype(np.uint8)

    def _judge(self, reference: Video, video: Video, text: str) -> dict[str, float]:
        found = {"psnr_db": psnr_db(reference, video), "ssim": ssim(reference, video)}
        if self._in_bundled_world:
            adherence = check_prompt(video, text)
            found |= {
                "motion_followed": float(adherence.motion_followed),
                "appearance_kept": float(adherence.appearance_kept),
            }
        return found


def combine_videos(found: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Compute mean and standard error of each measure over the seeds."""
    return {key: summary([of_seed[key] for of_seed in found]) for key in found[0]}
