"""Controls of the bundled model: whether it follows its prompts, and whether its two experts
matter. The pixel checker judges held-out tasks.

    python -m benchmarks.tiny_controls --num-items 64

Six runs over the same (image, prompt, seed) triples: as shipped; with another prompt on the same
image; with an empty prompt (judged against the missing prompt, which measures chance); with the
denoisers swapped; and with one for all steps. Then the teacher-forced loss of each denoiser on each
range of timesteps. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from torch import Tensor

from tempoquant.models.sampling_file import default_settings
from tempoquant.models.source import SourceModel
from tempoquant.tiny import evaluation_items, render, weights_folder
from tempoquant.tiny.sets import TinyItem, item_of
from tempoquant.tiny.world import with_other_motions
from training.experts import sample_sigma
from training.generate import generate, summary

COLUMNS = {
    "motion_followed_fraction": "videos followed",
    "movers_followed_fraction": "movers followed",
    "appearance_kept_fraction": "appearance kept",
    "psnr_db": "PSNR to drawn (dB)",
}


def load(dtype: torch.dtype) -> WanImageToVideoPipeline:
    """Load the bundled 16-bit pipeline."""
    pipeline = WanImageToVideoPipeline.from_pretrained(weights_folder(), dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_other_prompts(items: Sequence[TinyItem]) -> list[TinyItem]:
    """Return the same first frames, with motions (and so prompts and drawn scenes) that differ for
    every mover.
    """
    rng = np.random.default_rng(0)
    return [item_of(with_other_motions(item.scene, rng), item.id) for item in items]


def with_experts(pipeline: WanImageToVideoPipeline, high: str, low: str) -> WanImageToVideoPipeline:
    """Return the same pipeline with its components `high` and `low` on the high-noise and low-noise
    steps.
    """
    parts = dict(pipeline.components)
    parts["transformer"], parts["transformer_2"] = pipeline.components[high], pipeline.components[low]
    changed = WanImageToVideoPipeline(**parts, boundary_ratio=pipeline.config.boundary_ratio)
    changed.set_progress_bar_config(disable=True)
    return changed


def generation_rows(
    pipeline: WanImageToVideoPipeline, items: list[TinyItem], num_steps: int, guidance_scale: float
) -> dict[str, dict[str, float]]:
    """Make one row a control; see the module."""
    other = with_other_prompts(items)
    emptied = [replace(item, prompt="") for item in items]
    high, low = "transformer", "transformer_2"
    runs = {
        "as shipped": (pipeline, items, items),
        "another prompt": (pipeline, other, other),
        "empty prompt": (pipeline, emptied, items),
        "denoisers swapped": (with_experts(pipeline, low, high), items, items),
        "only high noise": (with_experts(pipeline, high, high), items, items),
        "only low noise": (with_experts(pipeline, low, low), items, items),
    }
    rows = {}
    for name, (model, asked, judged) in runs.items():
        start = time.monotonic()
        rows[name] = summary(generate(model, asked, num_steps, guidance_scale), judged)
        rows[name]["seconds_per_video"] = (time.monotonic() - start) / len(items)
    return rows


@torch.no_grad()
def teacher_forced_losses(pipeline: WanImageToVideoPipeline, items: Sequence[TinyItem]) -> dict[str, float]:
    """Return each denoiser's mean squared velocity error on noised encodings, for both timestep
    ranges.
    """
    generator = torch.Generator().manual_seed(0)
    losses: dict[str, list[float]] = {}
    for item in items:
        clean, condition = _encode(pipeline, item)
        text, _ = pipeline.encode_prompt(item.prompt, do_classifier_free_guidance=False, max_sequence_length=512)
        noise, uniform = torch.randn(clean.shape, generator=generator), torch.rand(1, generator=generator)
        for range_name in ("high_noise", "low_noise"):
            sigma = sample_sigma(range_name, uniform)
            noisy = torch.cat([(1.0 - sigma) * clean + sigma * noise, condition], dim=1)
            for denoiser_name, component in (("high_noise", "transformer"), ("low_noise", "transformer_2")):
                denoiser = pipeline.components[component]
                velocity = denoiser(noisy.to(denoiser.dtype), (sigma * 1000).floor(), text, return_dict=False)[0]
                loss = float((velocity.float() - (noise - clean)).square().mean())
                losses.setdefault(f"{denoiser_name} denoiser on {range_name} steps", []).append(loss)
    return {name: float(np.mean(values)) for name, values in losses.items()}


def _encode(pipeline: WanImageToVideoPipeline, item: TinyItem) -> tuple[Tensor, Tensor]:
    """Return standardised latents of the drawn scene, and the 20 condition channels, as the
    pipeline makes them.
    """
    vae = pipeline.vae
    clip = torch.from_numpy(render(item.scene)).float().permute(3, 0, 1, 2)[None] / 127.5 - 1.0
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    clean = (vae.encode(clip.to(vae.dtype)).latent_dist.mode().float() - mean) / std
    image = pipeline.video_processor.preprocess(item.image, height=64, width=64)
    _, condition = pipeline.prepare_latents(image, 1, height=64, width=64, num_frames=17, dtype=torch.float32)
    return clean, condition


def main() -> None:
    shipped = default_settings(SourceModel.open("tiny"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-items", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=shipped.num_steps)
    parser.add_argument("--guidance-scale", type=float, default=shipped.guidance_scale)
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="float32", help="float32 is what the CLI uses on a CPU"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    pipeline = load(getattr(torch, arguments.dtype))
    items = evaluation_items(arguments.num_items)
    rows = generation_rows(pipeline, items, arguments.num_steps, arguments.guidance_scale)
    losses = teacher_forced_losses(pipeline, items)
    print("| run | " + " | ".join(COLUMNS.values()) + " |\n|---|" + "---|" * len(COLUMNS))
    for name, row in rows.items():
        cells = [f"{row[key]:.1f}" if key == "psnr_db" else f"{100 * row[key]:.1f} %" for key in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| teacher-forced loss | |\n|---|---|")
    for name, loss in losses.items():
        print(f"| {name} | {loss:.4f} |")
    print(json.dumps({"benchmark": "tiny_controls", **vars(arguments), "runs": rows, "losses": losses}))


if __name__ == "__main__":
    main()
