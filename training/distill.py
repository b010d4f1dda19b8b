"""Distil the bundled model to four steps without guidance: a LoRA for each expert, after
`training.teacher`.

    python -m training.distill                  # runs/distill
    python -m training.distill --export         # and the two files into src/tempoquant/tiny/loras
    # the distance of four steps from the teacher's answers, without and with
    python -m training.distill --judge

The student runs the shipped sampler for four steps from the teacher's noise, and at each of the
states that it reaches itself its prediction of the clean latents is pulled towards the teacher's
answer for that noise (Reflow, arXiv 2209.03003, eq. 1, on the student's own states, DAgger, arXiv
1011.0686). So the paths it learns are straight lines: a solver of any order takes them in few
steps. Resumes from runs/distill/checkpoint.safetensors; a batch depends on the step only.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import time
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn

from tempoquant.sqnr import sqnr_db
from tempoquant.tiny import lora_file
from training.architecture import EXPERTS
from training.checkpoints import RUNS, append_log, load_checkpoint, read_average, save_checkpoint, update_average
from training.latents import load_shards
from training.lora_files import write_loras
from training.memory import keep_freed_memory
from training.teacher import FOLDER as TEACHER_FOLDER
from training.teacher import Denoiser, expert_at, load_denoiser, load_sampler

CHECKPOINT = RUNS / "distill" / "checkpoint.safetensors"
NUM_SAMPLING_STEPS = 4
SEED = 6
RANK = 16
ALPHA = 8.0
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
NUM_STEPS = 420
BATCH_SIZE = 8
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 30
AVERAGE_DECAY = 0.98


def load_student() -> dict[str, Denoiser]:
    """Return both shipped experts, each with a LoRA of rank `RANK` that changes nothing yet and
    alone can train.
    """
    torch.manual_seed(SEED)
    student = {expert: load_denoiser(expert) for expert in EXPERTS}
    for denoiser in student.values():
        denoiser.model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    return student


class Sampled(NamedTuple):
    """The student's results from the teacher's noise.

    Attributes:
        losses: (`NUM_SAMPLING_STEPS`,), the mean squared error of the velocity at each state that
            it reached.
        latents: (clips, 16, 5, 8, 8), its final latents.
    """

    losses: Tensor
    latents: Tensor


def sample(student: dict[str, Denoiser], clips: dict[str, Tensor], backward: bool) -> Sampled:
    """Run the student, and judge it at each state.

    The right velocity at a state x of noise level σ is (x − answer) / σ: a straight line to the
    answer. With `backward`, each step's gradient is added, so that one forward pass is held at a
    time; else there are none.
    """
    sampler, latents = load_sampler(NUM_SAMPLING_STEPS), clips["noise"]
    losses = []
    for timestep, sigma in zip(sampler.timesteps, sampler.sigmas, strict=False):
        with torch.set_grad_enabled(backward):
            velocity = student[expert_at(float(timestep))].velocity(latents, float(timestep), clips)
            loss = (velocity - (latents - clips["answer"]) / float(sigma)).square().mean()
        if backward:
            loss.backward()
        losses.append(loss.detach())
        latents = sampler.step(velocity.detach(), timestep, latents, return_dict=False)[0]
    return Sampled(torch.stack(losses), latents)


def learning_rate(step: int, num_steps: int) -> float:
    """Compute a warm-up, then a cosine to 2 % of the peak."""
    cosine = 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(step / num_steps, 1.0)))
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * cosine


def held_out_losses(student: dict[str, Denoiser], model: nn.Module, average: dict[str, Tensor]) -> list[float]:
    """Compute losses of the averaged LoRAs on the held-out clips."""
    trained = {key: value.clone() for key, value in model.state_dict().items() if key in average}
    model.load_state_dict(average, strict=False)
    losses = sample(student, load_shards(TEACHER_FOLDER, "held-out"), backward=False).losses
    model.load_state_dict(trained, strict=False)
    return [round(float(loss), 5) for loss in losses]


def train(num_steps: int) -> None:
    """Run from the last checkpoint to `num_steps`."""
    student = load_student()
    model = nn.ModuleDict({expert: denoiser.model for expert, denoiser in student.items()})
    average = {key: value.clone() for key, value in model.state_dict().items() if ".lora_" in key}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    first_step = load_checkpoint(CHECKPOINT, model, average, optimizer)
    data = load_shards(TEACHER_FOLDER)
    start, running = time.monotonic(), torch.zeros(NUM_SAMPLING_STEPS)
    for step in range(first_step, num_steps):
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        chosen = torch.randint(len(data["noise"]), (BATCH_SIZE,), generator=generator)
        running += sample(student, {key: value[chosen] for key, value in data.items()}, backward=True).losses
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, model, min(AVERAGE_DECAY, (1 + step) / (10 + step)))
        if (step + 1) % 25 == 0:
            row = {"step": step + 1, "seconds": round(time.monotonic() - start, 1)}
            append_log("distill", {**row, "losses": [round(float(loss) / 25, 5) for loss in running]})
            running.zero_()
        if (step + 1) % 50 == 0 or step + 1 == num_steps:
            save_checkpoint(CHECKPOINT, model, average, optimizer, step + 1)
            held_out = held_out_losses(student, model, average)
            append_log("distill", {"step": step + 1, "held_out_losses": held_out, "num_clips": len(data["noise"])})
            data = load_shards(TEACHER_FOLDER)  # training.teacher may still be running


def judge() -> None:
    """Print losses and the SQNR of the final latents to the teacher's, mean ± standard error, on
    the held-out clips.
    """
    clips, student = load_shards(TEACHER_FOLDER, "held-out"), load_student()
    model = nn.ModuleDict({expert: denoiser.model for expert, denoiser in student.items()})
    for name, weights in (("without LoRAs", {}), ("with LoRAs", read_average(CHECKPOINT))):
        model.load_state_dict(weights, strict=False)
        found = sample(student, clips, backward=False)
        db = [sqnr_db(answer, latents) for answer, latents in zip(clips["answer"], found.latents, strict=True)]
        error = statistics.stdev(db) / math.sqrt(len(db))
        losses = ", ".join(f"{float(loss):.4f}" for loss in found.losses)
        print(f"{name}: losses {losses}; final latents {statistics.mean(db):.2f} ± {error:.2f} dB, n = {len(db)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--export", action="store_true", help="write the averaged LoRAs where the package has them")
    parser.add_argument("--judge", action="store_true", help="train nothing; say how near the averaged LoRAs come")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.num_threads)
    if arguments.judge:
        judge()
        return
    train(arguments.num_steps)
    if arguments.export:
        write_loras(read_average(CHECKPOINT), ALPHA)
        sha256 = {expert: hashlib.sha256(lora_file(expert).read_bytes()).hexdigest() for expert in EXPERTS}
        append_log("distill", {"step": arguments.num_steps, "sha256": sha256})


if __name__ == "__main__":
    main()
