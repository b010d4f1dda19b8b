"""Train one expert by flow matching on its own range of timesteps.

    python -m training.experts high_noise
    python -m training.experts low_noise

As in Wan: x_t = (1 − σ)·x0 + σ·noise, the target is noise − x0, the timestep is ⌊1000·σ⌋ (the
sampler rounds down), σ is uniform before the flow shift, and the high-noise expert has the
timesteps from 900. Ten percent of the prompts are empty, for classifier-free guidance. Resumes from
runs/experts/<expert>/checkpoint.safetensors. An expert may start from the other's weights
(`--start-from`): where an object is and where it goes is the same question at every noise level.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from training.architecture import BOUNDARY_RATIO, EXPERTS, FLOW_SHIFT, NUM_TRAIN_TIMESTEPS, VARIANTS, build_expert
from training.checkpoints import RUNS, append_log, load_checkpoint, read_average, save_checkpoint, update_average
from training.latents import MAX_TOKENS, embed_prompts, load_shards, load_text
from training.memory import keep_freed_memory
from training.padding import PaddingBiasProcessor, padding_bias, use_padding_bias

SEEDS = {"high_noise": 3, "low_noise": 4}
NUM_STEPS = {"high_noise": 8400, "low_noise": 10600}
BATCH_SIZE = 16
PEAK_LEARNING_RATE = 1e-3
WARMUP_STEPS = 150
AVERAGE_DECAY = 0.998
PROMPT_DROPOUT = 0.1
PADDED_LENGTH = 512


def sample_sigma(expert: str, uniform: Tensor) -> Tensor:
    """Compute an expert's noise levels: uniform numbers in [0, 1), shifted as the sampler shifts,
    within the expert's range.
    """
    boundary = BOUNDARY_RATIO / (FLOW_SHIFT - (FLOW_SHIFT - 1.0) * BOUNDARY_RATIO)
    before_shift = boundary + (1.0 - boundary) * uniform if expert == "high_noise" else boundary * uniform
    return FLOW_SHIFT * before_shift / (1.0 + (FLOW_SHIFT - 1.0) * before_shift)


def sample_padded_length(size: int) -> Tensor:
    """Draw the padded lengths of the text, (size,): mostly 512, sometimes less, so that the model
    does not depend on it.
    """
    shorter = torch.randint(MAX_TOKENS, PADDED_LENGTH + 1, (size,))
    return torch.where(torch.rand(size) < 0.8, torch.full((size,), PADDED_LENGTH), shorter)


def first_frame_mask(size: int) -> Tensor:
    """Return ones at the first latent frame, (size, 4, 5, 8, 8), the pipeline's mask of the given
    frames.
    """
    mask = torch.zeros(size, 4, 5, 8, 8)
    mask[:, :, 0] = 1.0
    return mask


def make_batch(data: dict[str, Tensor], empty: tuple[Tensor, Tensor], expert: str, chosen: Tensor) -> dict[str, Tensor]:
    """Make noisy inputs and targets for the clips `chosen`; uses torch's global generator."""
    size = len(chosen)
    video, condition = data["video"][chosen].float(), data["condition"][chosen].float()
    text, num_tokens = data["text"][chosen].float(), data["num_tokens"][chosen]
    dropped = torch.rand(size) < PROMPT_DROPOUT
    text = torch.where(dropped[:, None, None], empty[0], text)
    num_tokens = torch.where(dropped, empty[1], num_tokens)
    sigma = sample_sigma(expert, torch.rand(size))
    noise = torch.randn_like(video)
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1.0 - level) * video + level * noise
    return {
        "hidden_states": torch.cat([noisy, first_frame_mask(size), condition], dim=1),
        "timestep": (sigma * NUM_TRAIN_TIMESTEPS).floor(),
        "text": text,
        "bias": padding_bias(num_tokens, MAX_TOKENS, sample_padded_length(size)),
        "target": noise - video,
    }


def loss_of(model: WanTransformer3DModel, processor: PaddingBiasProcessor, batch: dict[str, Tensor]) -> Tensor:
    """Compute the mean squared error of the velocity."""
    processor.bias = batch["bias"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = model(batch["hidden_states"], batch["timestep"], batch["text"], return_dict=False)[0]
    return (predicted.float() - batch["target"]).square().mean()


@torch.no_grad()
def held_out_loss(
    weights: dict[str, Tensor], data: dict[str, Tensor], empty: tuple[Tensor, Tensor], expert: str, variant: str
) -> float:
    """Compute the loss of the averaged weights on the first 256 held-out clips, with fixed
    noise.
    """
    model = build_expert(VARIANTS[variant]).eval()
    model.load_state_dict(weights)
    processor = use_padding_bias(model)
    torch.manual_seed(SEEDS[expert])
    batches = [make_batch(data, empty, expert, chosen) for chosen in torch.arange(256).split(64)]
    losses = [loss_of(model, processor, batch) for batch in batches]
    return float(torch.stack(losses).mean())


def learning_rate(step: int, num_steps: int) -> float:
    """Compute a warm-up, then a cosine to 2 % of the peak."""
    cosine = 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(step / num_steps, 1.0)))
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * cosine


def checkpoint_of(expert: str, variant: str = "tiny") -> Path:
    """Return the place of an expert's training state."""
    return RUNS / ("experts" if variant == "tiny" else f"experts-{variant}") / expert / "checkpoint.safetensors"


def train(expert: str, num_steps: int, compiled: bool, start_from: str | None, variant: str = "tiny") -> None:
    """Run from the last checkpoint to `num_steps`; a new run starts from random weights or another
    expert's.
    """
    seed = SEEDS[expert] + VARIANTS[variant].seed
    log = expert if variant == "tiny" else f"{variant}-{expert}"
    torch.manual_seed(seed)
    data, held_out = load_shards(), load_shards(name="held-out")
    empty = embed_prompts(*load_text(), [""])
    model = build_expert(VARIANTS[variant])
    if start_from is not None:
        model.load_state_dict(read_average(checkpoint_of(start_from, variant)))
    processor = use_padding_bias(model)
    average = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    path = checkpoint_of(expert, variant)
    first_step = load_checkpoint(path, model, average, optimizer)
    loss_function = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    start, running = time.monotonic(), 0.0
    for step in range(first_step, num_steps):
        torch.manual_seed(seed * 1_000_003 + step)
        batch = make_batch(data, empty, expert, torch.randint(len(data["video"]), (BATCH_SIZE,)))
        loss = loss_function(model, processor, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, model, min(AVERAGE_DECAY, (1 + step) / (10 + step)))
        running += float(loss.detach())
        if (step + 1) % 50 == 0:
            seconds = round(time.monotonic() - start, 1)
            append_log(log, {"step": step + 1, "seconds": seconds, "loss": round(running / 50, 5)})
            running = 0.0
        if (step + 1) % 250 == 0 or step + 1 == num_steps:
            save_checkpoint(path, model, average, optimizer, step + 1)
            loss_held_out = held_out_loss(average, held_out, empty, expert, variant)
            row = {"step": step + 1, "held_out_loss": round(loss_held_out, 5), "num_clips": len(data["video"])}
            append_log(log, row)
            data = load_shards()  # training.latents may still be running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("expert", choices=EXPERTS)
    parser.add_argument("--num-steps", type=int, help="NUM_STEPS of the expert when left out")
    parser.add_argument("--start-from", choices=EXPERTS, help="the expert whose weights a new run starts from")
    parser.add_argument("--variant", choices=VARIANTS, default="tiny", help="which pair of experts")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.num_threads)
    num_steps = arguments.num_steps or NUM_STEPS[arguments.expert]
    train(arguments.expert, num_steps, arguments.compile, arguments.start_from, arguments.variant)


if __name__ == "__main__":
    main()
