"""Encode the training clips once, so that the experts train from memory.

    python -m training.latents

Writes runs/latents/<shard>.safetensors of `SHARD_SIZE` clips each, in bfloat16, normalised as the
pipeline does: `video` (clips, 16, 5, 8, 8), the latents of the whole clip; `condition`, same shape,
those of the first frame followed by 16 gray (zero) frames; `text` (clips, `MAX_TOKENS`, 128), the
prompt's embeddings, zeros after `num_tokens` (clips,). Existing shards are kept, so a stopped run
resumes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from tempoquant.tiny.sets import CALIBRATION_SEED_BASE, TRAINING_SEED_BASE, scene_from_seed
from tempoquant.tiny.world import describe
from training.checkpoints import RUNS
from training.memory import keep_freed_memory
from training.text import FOLDER as TEXT_FOLDER
from training.vae import MODEL, render_clips, to_model
from training.whole_clip import encode_clip

FOLDER = RUNS / "latents"
SHARD_SIZE = 512
NUM_SHARDS = 16
MAX_TOKENS = 16
"""Longest prompt with its `</s>`, and room for at least one padding token: 15 + 1."""
BATCH_SIZE = 8


def load_text() -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """Load the frozen pair from `training.text`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TEXT_FOLDER / "tokenizer")
    return tokenizer, UMT5EncoderModel.from_pretrained(TEXT_FOLDER / "text_encoder").eval()


@torch.no_grad()
def embed_prompts(
    tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, prompts: list[str]
) -> tuple[Tensor, Tensor]:
    """Return (prompts, MAX_TOKENS, 128), zeros after the last token as in the pipeline, and
    (prompts,) token counts.
    """
    tokens = tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return hidden * tokens.attention_mask[..., None], tokens.attention_mask.sum(1)


@torch.no_grad()
def encode_normalised(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Return the posterior's mode, (clips, 16, 5, 8, 8), standardised by the statistics in the
    VAE's configuration.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = torch.cat([encode_clip(vae, batch)[0] for batch in clips.split(BATCH_SIZE)])
    return standardise(vae, latents.float())


def standardise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Compute (latents − mean) / std by the statistics in the VAE's configuration, channel by
    channel.
    """
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return (latents - mean) / std


def condition_of(clips: Tensor) -> Tensor:
    """Return the first frame followed by zeros, as `WanImageToVideoPipeline.prepare_latents` makes
    it.
    """
    condition = torch.zeros_like(clips)  # keeps channels last, which halves the encoder's time
    condition[:, :, 0] = clips[:, :, 0]
    return condition


def write_shard(path: Path, clips: NDArray[np.uint8], prompts: list[str], vae: AutoencoderKLWan) -> None:
    """Encode and write one shard, atomically."""
    pixels = to_model(clips)
    text, num_tokens = embed_prompts(*load_text(), prompts)
    tensors = {
        "video": encode_normalised(vae, pixels).bfloat16(),
        "condition": encode_normalised(vae, condition_of(pixels)).bfloat16(),
        "text": text.bfloat16(),
        "num_tokens": num_tokens,
    }
    unfinished = path.with_suffix(".unfinished")
    save_file({key: value.contiguous() for key, value in tensors.items()}, unfinished)
    os.replace(unfinished, path)


def load_shards(folder: Path = FOLDER, name: str = "training") -> dict[str, Tensor]:
    """Load all shards of a set, concatenated in order."""
    shards = [load_file(path) for path in sorted(folder.glob(f"{name}-*.safetensors"))]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--num-shards", type=int, default=NUM_SHARDS)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.num_threads)
    vae = AutoencoderKLWan.from_pretrained(MODEL).eval()
    FOLDER.mkdir(parents=True, exist_ok=True)
    # The held-out losses are measured on calibration scenes, so that evaluation scenes stay unseen
    # until the end.
    jobs = [("held-out-0000", CALIBRATION_SEED_BASE)]
    jobs += [(f"training-{i:04d}", TRAINING_SEED_BASE + i * SHARD_SIZE) for i in range(arguments.num_shards)]
    for name, seed_base in jobs:
        path = FOLDER / f"{name}.safetensors"
        if not path.exists():
            prompts = [describe(scene_from_seed(seed_base + i)) for i in range(SHARD_SIZE)]
            write_shard(path, render_clips(seed_base, SHARD_SIZE), prompts, vae)
            print(path, flush=True)


if __name__ == "__main__":
    main()
