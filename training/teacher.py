"""The answers of the shipped model at its full steps, recorded for `training.distill`.

    python -m training.teacher

Training scenes, the bundled sampler, its own steps and guidance; all of it in latents, nothing is
decoded. Writes runs/teacher/<shard>.safetensors of `SHARD_SIZE` clips each: `noise` (clips, 16, 5,
8, 8), the sampler's start, and `answer`, same shape, its end, float32; `condition`, `text` and
`num_tokens` as in `training.latents`. Needs the shipped weights only. Existing shards are kept, so
a stopped run resumes.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from tempoquant.tiny import describe, weights_folder
from tempoquant.tiny.sets import CALIBRATION_SEED_BASE, TRAINING_SEED_BASE, scene_from_seed
from training.architecture import BOUNDARY_RATIO, EXPERTS, NUM_TRAIN_TIMESTEPS
from training.checkpoints import RUNS, append_log
from training.experts import PADDED_LENGTH, first_frame_mask
from training.export import SAMPLING
from training.latents import MAX_TOKENS, condition_of, embed_prompts, encode_normalised
from training.memory import keep_freed_memory
from training.padding import PaddingBiasProcessor, padding_bias, use_padding_bias
from training.vae import render_clips, to_model

FOLDER = RUNS / "teacher"
SEED = 5
SHARD_SIZE = 64
NUM_SHARDS = 10
BATCH_SIZE = 16


class Denoiser(NamedTuple):
    """An expert, and the padding of its cross-attention."""

    model: WanTransformer3DModel
    padding: PaddingBiasProcessor

    def velocity(self, latents: Tensor, timestep: float, clips: dict[str, Tensor]) -> Tensor:
        """Predict the noise for latents (clips, 16, 5, 8, 8), all at one timestep: the same shape,
        float32.
        """
        size = len(latents)
        self.padding.bias = padding_bias(clips["num_tokens"], MAX_TOKENS, torch.full((size,), PADDED_LENGTH))
        hidden = torch.cat([latents, first_frame_mask(size), clips["condition"]], dim=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = self.model(hidden, torch.full((size,), timestep), clips["text"], return_dict=False)[0]
        return predicted.float()


def load_denoiser(expert: str) -> Denoiser:
    """Return a shipped expert in float32, frozen."""
    model = WanTransformer3DModel.from_pretrained(weights_folder(), subfolder=EXPERTS[expert], dtype=torch.float32)
    model.requires_grad_(False).eval()
    return Denoiser(model, use_padding_bias(model))


def load_sampler(num_steps: int) -> UniPCMultistepScheduler:
    """Return the shipped sampler, with its flow shift, at the start of so many steps."""
    sampler = UniPCMultistepScheduler.from_pretrained(weights_folder(), subfolder="scheduler")
    sampler.set_timesteps(num_steps)
    return sampler


def expert_at(timestep: float) -> str:
    """Return the expert that runs at a timestep; the boundary belongs to high noise."""
    return "high_noise" if timestep >= BOUNDARY_RATIO * NUM_TRAIN_TIMESTEPS else "low_noise"


@torch.no_grad()
def answer_of(denoisers: dict[str, Denoiser], noise: Tensor, clips: dict[str, Tensor], empty: Tensor) -> Tensor:
    """Return the teacher's final latents, (clips, 16, 5, 8, 8): its own steps and guidance.

    `empty` is the embedding of the empty prompt, (1, MAX_TOKENS, 128), which has one token.
    """
    sampler, latents, size = load_sampler(SAMPLING["num_steps"]), noise, len(noise)
    both = {
        "condition": clips["condition"].repeat(2, 1, 1, 1, 1),
        "text": torch.cat([clips["text"], empty.expand(size, -1, -1)]),
        "num_tokens": torch.cat([clips["num_tokens"], torch.ones(size, dtype=torch.long)]),
    }
    for timestep in sampler.timesteps:
        denoiser = denoisers[expert_at(float(timestep))]
        with_prompt, without = denoiser.velocity(latents.repeat(2, 1, 1, 1, 1), float(timestep), both).chunk(2)
        guided = without + SAMPLING["guidance_scale"] * (with_prompt - without)
        latents = sampler.step(guided, timestep, latents, return_dict=False)[0]
    return latents


def write_shard(path: Path, seed_base: int, num_clips: int, denoisers: dict[str, Denoiser]) -> None:
    """Draw scenes, encode their first frames and prompts, sample the teacher, and write all of it
    atomically.
    """
    folder = weights_folder()
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    prompts = [describe(scene_from_seed(seed_base + i)) for i in range(num_clips)]
    text, num_tokens = embed_prompts(tokenizer, encoder, prompts)
    condition = encode_normalised(vae, condition_of(to_model(render_clips(seed_base, num_clips))))
    clips = {"condition": condition, "text": text, "num_tokens": num_tokens}
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + seed_base)
    noise = torch.randn(num_clips, 16, 5, 8, 8, generator=generator)
    empty, _ = embed_prompts(tokenizer, encoder, [""])
    answers = [
        answer_of(denoisers, noise[chosen], {key: value[chosen] for key, value in clips.items()}, empty)
        for chosen in torch.arange(num_clips).split(BATCH_SIZE)
    ]
    tensors = {**clips, "noise": noise, "answer": torch.cat(answers)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file({key: value.contiguous() for key, value in tensors.items()}, unfinished)
    os.replace(unfinished, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--num-shards", type=int, default=NUM_SHARDS)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.num_threads)
    denoisers = {expert: load_denoiser(expert) for expert in EXPERTS}
    # Held-out losses are measured on calibration scenes, so that evaluation scenes stay unseen
    # until the end.
    jobs = [("held-out-0000", CALIBRATION_SEED_BASE)]
    jobs += [(f"training-{i:04d}", TRAINING_SEED_BASE + i * SHARD_SIZE) for i in range(arguments.num_shards)]
    for name, seed_base in jobs:
        path = FOLDER / f"{name}.safetensors"
        if not path.exists():
            start = time.monotonic()
            write_shard(path, seed_base, SHARD_SIZE, denoisers)
            append_log("teacher", {"shard": name, "seconds": round(time.monotonic() - start, 1)})


if __name__ == "__main__":
    main()
