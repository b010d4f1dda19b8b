"""The 16-bit side, once for each seed: calibration samples, held-out trajectories and final
latents, kept in files.
"""

import json
import os
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.quality.task import Task, hash_of
from tempoquant.calibrate.sample import CalibrationSample, RecordedCall
from tempoquant.calibrate.store import SampleStore
from tempoquant.checkpoint.files import sync
from tempoquant.hosts.diffusers.sampling import CallPosition, sample_latents, sample_of, watching_trajectory
from tempoquant.models.guidance import prediction_of
from tempoquant.progress import Progress
from tempoquant.prompts import Prompt
from tempoquant.recording.plan import ModelIdentity, RecordingPlan
from tempoquant.recording.record import record_into


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One held-out generation of the 16-bit pipeline.

    Attributes:
        prompt: its prompt.
        seed: of its noise.
        calls: every transformer call and its answer, in order.
        final_latent: (1, channels, frames, height, width), what the autoencoder would decode.
    """

    prompt: Prompt
    seed: int
    calls: list[RecordedCall]
    final_latent: torch.Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """The 16-bit pipeline's results for one seed.

    Attributes:
        task: the task.
        seed: of the benchmark.
        store: calibration samples.
        folder: of the trajectories.
    """

    task: Task
    seed: int
    store: SampleStore
    folder: Path

    def trajectories(self) -> Iterator[Trajectory]:
        """Yield trajectories in the order of the held-out prompts, one in memory at a time."""
        for index, prompt in enumerate(self.task.held_out):
            file, seed = self.folder / f"{index:04d}.safetensors", self.task.evaluation_seed(self.seed, index)
            yield _load(file, prompt, seed, self.task.source.family.text_inputs)


def prepare(task: Task, seed: int, pipeline: Any, work: Path, progress: Progress) -> Reference:
    """Record what the work folder lacks. If two processes ask for the same, one waits for the
    other.
    """
    folder = work / f"reference-{hash_of(task.identity())}" / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        plan = RecordingPlan(task.calibration, task.settings, task.samples_per_denoiser, task.calibration_seed(seed))
        model = ModelIdentity(task.fingerprint)
        store = record_into(task.source, folder / "store", plan, model=model, device=task.device, progress=progress)
        files = {index: folder / f"{index:04d}.safetensors" for index in range(len(task.held_out))}
        num_done = sum(file.is_file() for file in files.values())
        advance = progress.start(f"Seed {seed}: held-out trajectories", len(files), num_done)
        for index, file in files.items():
            if not file.is_file():
                trajectory = record(task, pipeline, task.held_out[index], task.evaluation_seed(seed, index))
                _save(file, trajectory, task.source.family.text_inputs)
                advance()
    return Reference(task, seed, store, folder)


def record(task: Task, pipeline: Any, prompt: Prompt, seed: int) -> Trajectory:
    """Generate once; keep every call and the final latent, on the CPU."""
    calls: list[RecordedCall] = []

    def keep(position: CallPosition, inputs: dict[str, Any], output: Any) -> None:
        calls.append(RecordedCall(sample_of(prompt, position, inputs), prediction_of(output).cpu()))

    with watching_trajectory(pipeline, keep) as step_done:
        final_latent = generate(task, pipeline, prompt, seed, step_done)
    return Trajectory(prompt, seed, calls, final_latent)


def generate(task: Task, pipeline: Any, prompt: Prompt, seed: int, on_step: Any = lambda: None) -> torch.Tensor:
    """Return the final latent of one full generation, (1, channels, frames, height, width), on the
    CPU.
    """
    texts = {"prompt": prompt.text, "negative_prompt": ""}
    return sample_latents(pipeline, prompt, task.settings, seed, texts, on_step=on_step).cpu()


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that is complete or absent."""
    unfinished = unfinished_name(file)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata)
    sync(unfinished)
    unfinished.replace(file)


def unfinished_name(file: Path) -> Path:
    """Return the place of a file until it is complete, one for each process, since two may share a
    work folder.
    """
    return file.with_name(f"{file.name}.unfinished-{os.getpid()}")


def _save(file: Path, trajectory: Trajectory, texts: Set[str]) -> None:
    """Store once the text, which all calls of a guidance branch share, and the tensors that both
    calls of a step share.
    """
    tensors, positions = {"final_latent": trajectory.final_latent}, []
    for number, (sample, prediction) in enumerate((call.sample, call.noise_prediction) for call in trajectory.calls):
        positions.append([sample.denoiser, sample.timestep, sample.step_index, sample.guidance_branch])
        tensors[f"{number}.noise_prediction"] = prediction
        for key, value in sample.inputs.items():
            group = sample.guidance_branch if key in texts else _step(sample.step_index)
            tensors[f"{group}.{key}"] = value
    write_tensors(file, tensors, {"calls": json.dumps(positions)})


def _step(index: int) -> str:
    return f"step {index}"


def _load(file: Path, prompt: Prompt, seed: int, texts: Set[str]) -> Trajectory:
    with safe_open(file, framework="pt", device="cpu") as stored:
        positions = json.loads(stored.metadata()["calls"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    calls = []
    for number, (denoiser, timestep, step_index, branch) in enumerate(positions):
        prediction = tensors.pop(f"{number}.noise_prediction")
        inputs = {
            key: tensor
            for group, _, key, tensor in ((*name.partition("."), tensor) for name, tensor in tensors.items())
            if group == (branch if key in texts else _step(step_index))
        }
        sample = CalibrationSample(prompt.id, denoiser, timestep, step_index, branch, inputs)
        calls.append(RecordedCall(sample, prediction))
    return Trajectory(prompt, seed, calls, tensors["final_latent"])
