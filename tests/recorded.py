"""Small recordings of the bundled model: two experts, a few steps, videos of eight tokens."""

from pathlib import Path
from typing import Any

import torch

from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.calibrate.store import SampleStore
from tempoquant.engines import Local
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.recording.plan import ModelIdentity, RecordingPlan
from tempoquant.recording.prompt_sets import calibration_prompts
from tempoquant.tiny import weights_folder

CPU = Local(("cpu",))
TINY = weights_folder()
SOURCE = SourceModel.open(TINY)
SETTINGS = SamplingSettings(32, 32, 5, 4, 2.5, 5.0, 8)
MODEL = ModelIdentity("f" * 64)
PROMPTS = calibration_prompts("tiny", None, 3)


def plan(num_prompts: int = 2, samples_per_denoiser: int = 6, **changes: Any) -> RecordingPlan:
    """Plan the first prompts, with guidance: two steps of each denoiser, eight calls with two
    prompts.
    """
    return RecordingPlan(**{
        "prompts": PROMPTS[:num_prompts], "settings": SETTINGS, "samples_per_denoiser": samples_per_denoiser, **changes
    })  # fmt: skip


def samples_of(store: SampleStore) -> list[CalibrationSample]:
    """Return all samples, high noise first."""
    return [sample for denoiser in COMPONENTS for sample in store.samples(denoiser)]


def position(sample: CalibrationSample) -> tuple[object, ...]:
    """Return the facts that distinguish a sample from all others."""
    return sample.prompt_id, sample.step_index, sample.guidance_branch


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write_lora(file: Path, strength: float) -> Path:
    """Write a LoRA that changes one linear of one block."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    shapes = {"lora_A": (2, 256), "lora_B": (256, 2)}
    save_file(
        {
            f"transformer.blocks.1.attn1.to_q.{key}.weight": strength * torch.randn(shape, generator=generator)
            for key, shape in shapes.items()
        },
        file,
    )
    return file


class Counting:
    """A progress that remembers [total, done] of each task."""

    def __init__(self) -> None:
        self.tasks: dict[str, list[int]] = {}

    def start(self, description: str, total: int, done: int = 0) -> Any:
        task = self.tasks[description] = [total, done]

        def advance() -> None:
            task[1] += 1

        return advance
