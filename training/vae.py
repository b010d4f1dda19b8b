"""Train the VAE: single frames first, then 5-frame clips, then 17-frame clips.

    python -m training.vae

Resumes from runs/vae/checkpoint.safetensors; ends with runs/vae/model (diffusers layout) that holds
the running average of the weights and the measured mean and standard deviation of its latents.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor

from tempoquant.tiny.sets import EVALUATION_SEED_BASE, TRAINING_SEED_BASE, scene_from_seed
from tempoquant.tiny.world import render
from training.architecture import build_vae
from training.checkpoints import RUNS, append_log, load_checkpoint, save_checkpoint, update_average
from training.memory import keep_freed_memory
from training.whole_clip import decode_clip, encode_clip

CHECKPOINT = RUNS / "vae" / "checkpoint.safetensors"
MODEL = RUNS / "vae" / "model"
SEED = 1
PEAK_LEARNING_RATE = 1.2e-3
AVERAGE_DECAY = 0.998
KL_WEIGHT = 1e-4
NUM_CLIPS = 4096


@dataclass(frozen=True)
class Stage:
    """A stage of `num_steps` steps on batches of (batch_size, 3, num_frames, 64, 64)."""

    num_frames: int
    batch_size: int
    num_steps: int

    @property
    def total_frames(self) -> int:
        return self.num_frames * self.batch_size * self.num_steps


STAGES = (Stage(1, 16, 2800), Stage(5, 8, 200), Stage(17, 2, 300))


def render_clips(seed_base: int, num_clips: int) -> NDArray[np.uint8]:
    """Render the scenes of seeds seed_base … seed_base + num_clips − 1: (num_clips, 17, 64, 64,
    3).
    """
    clips = np.empty((num_clips, 17, 64, 64, 3), dtype=np.uint8)
    for index in range(num_clips):
        clips[index] = render(scene_from_seed(seed_base + index))
    return clips


def to_model(clips: NDArray[np.uint8]) -> Tensor:
    """Convert uint8 (batch, frames, height, width, 3) to float (batch, 3, frames, height, width) in
    [−1, 1], channels last.
    """
    return (torch.from_numpy(clips).float() / 127.5 - 1.0).permute(0, 4, 1, 2, 3)


def learning_rate(share_done: float, step: int, peak: float) -> float:
    """Compute a linear warm-up over 200 steps, then a cosine to 2 % of the peak over the share of
    frames seen.
    """
    cosine = 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(share_done, 1.0)))
    return peak * min(1.0, (step + 1) / 200) * cosine


def reconstruct(vae: AutoencoderKLWan, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Return the decoded clip of sampled latents, and the mean KL divergence from a unit Gaussian
    per latent element.
    """
    mean, log_variance = encode_clip(vae, clip)
    latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).float().mean()
    return decode_clip(vae, latents), kl


def stage_of(step: int) -> tuple[Stage, float]:
    """Return the stage of a step, and the share of all frames seen before it."""
    total, seen = sum(stage.total_frames for stage in STAGES), 0
    for stage in STAGES:
        if step < stage.num_steps:
            return stage, (seen + step * stage.num_frames * stage.batch_size) / total
        step, seen = step - stage.num_steps, seen + stage.total_frames
    return STAGES[-1], 1.0


def draw_batch(clips: NDArray[np.uint8], stage: Stage, step: int) -> Tensor:
    """Draw the batch of a step; it depends only on the step, so that a resumed run sees the same as
    an unbroken one.
    """
    rng = np.random.default_rng([SEED, step])
    chosen = rng.integers(0, len(clips), stage.batch_size)
    starts = rng.integers(0, 17 - stage.num_frames + 1, stage.batch_size)
    picked = [clips[c, s : s + stage.num_frames] for c, s in zip(chosen, starts, strict=True)]
    return to_model(np.stack(picked))


@torch.no_grad()
def held_out_psnr_db(weights: dict[str, Tensor], clips: NDArray[np.uint8], num_frames: int) -> float:
    """Average over clips the PSNR (peak 1) after encode and decode through diffusers' own
    chunks.
    """
    vae = build_vae().eval()
    vae.load_state_dict(weights)
    values = []
    for clip in clips[:, :num_frames]:
        decoded = vae.decode(vae.encode(to_model(clip[None])).latent_dist.mode()).sample
        error = ((decoded - to_model(clip[None])) / 2.0).square().mean()
        values.append(-10.0 * math.log10(float(error)))
    return sum(values) / len(values)


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, clips: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Compute mean and standard deviation of each of the 16 latent channels over whole clips."""
    latents = torch.cat([encode_clip(vae, to_model(clip[None]))[0] for clip in clips])
    return latents.mean((0, 2, 3, 4)).tolist(), latents.std((0, 2, 3, 4)).tolist()


def finish(weights: dict[str, Tensor], clips: NDArray[np.uint8], folder: Path = MODEL) -> None:
    """Save the averaged VAE with its latents' statistics in diffusers layout."""
    vae = build_vae().eval()
    vae.load_state_dict(weights)
    mean, std = latent_statistics(vae, clips)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(folder)


def train_step(
    vae: AutoencoderKLWan, forward: Callable[..., tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer, clip: Tensor
) -> dict[str, float]:
    """Do one optimizer step on L1 + 4·MSE + KL; return the losses."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded, kl = forward(vae, clip)
    error = decoded.float() - clip
    l1, mse = error.abs().mean(), error.square().mean()
    (l1 + 4.0 * mse + KL_WEIGHT * kl).backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "l1": float(l1.detach()),
        "psnr_db": -10.0 * math.log10(float(mse.detach()) / 4.0),
        "kl": float(kl.detach()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.num_threads)
    torch.manual_seed(SEED)
    clips, held_out = render_clips(TRAINING_SEED_BASE, NUM_CLIPS), render_clips(EVALUATION_SEED_BASE, 16)
    vae = build_vae()
    average = {key: value.clone() for key, value in vae.state_dict().items()}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    first_step = load_checkpoint(CHECKPOINT, vae, average, optimizer)
    forward = torch.compile(reconstruct, dynamic=False) if arguments.compile else reconstruct
    start, total_steps = time.monotonic(), sum(stage.num_steps for stage in STAGES)
    for step in range(first_step, total_steps):
        stage, share = stage_of(step)
        torch.manual_seed(SEED * 1_000_003 + step)
        optimizer.param_groups[0]["lr"] = learning_rate(share, step, PEAK_LEARNING_RATE)
        losses = train_step(vae, forward, optimizer, draw_batch(clips, stage, step))
        update_average(average, vae, min(AVERAGE_DECAY, (1 + step) / (10 + step)))
        if step % 50 == 0:
            seconds = round(time.monotonic() - start, 1)
            row = {key: round(value, 5) for key, value in losses.items()}
            append_log("vae", {"step": step, "num_frames": stage.num_frames, "seconds": seconds, **row})
        if (step + 1) % 100 == 0 or step + 1 == total_steps:
            save_checkpoint(CHECKPOINT, vae, average, optimizer, step + 1)
            psnr = held_out_psnr_db(average, held_out, stage.num_frames)
            append_log("vae", {"step": step + 1, "num_frames": stage.num_frames, "held_out_psnr_db": round(psnr, 2)})
    finish(average, clips[:64])


if __name__ == "__main__":
    main()
