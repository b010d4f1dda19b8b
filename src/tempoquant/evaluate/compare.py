"""Compare quantized models with their reference: the same held-out prompts, seeds and settings on every side.

One pipeline is in memory at a time. What the reference did (videos, and trajectories for the noise predictions) is
kept on the CPU.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tempoquant.calibrate.sample import CalibrationSample, RecordedCall
from tempoquant.engines.memory import free_memory
from tempoquant.errors import CalibrationError, ModelError
from tempoquant.evaluate.contents import (
    bits_per_weight,
    calibration_prompts_of,
    configs_of,
    num_weight_bytes,
)
from tempoquant.evaluate.noise_prediction import call_errors, summarize
from tempoquant.evaluate.prompt_adherence import PromptAdherence, check_prompt, parse_prompt
from tempoquant.evaluate.results import Comparison, ModelResult, NoisePredictionError, VideoResult, plain
from tempoquant.evaluate.video_metrics import Video, psnr_db, ssim
from tempoquant.integrations.memory_modes import load_in_mode, remove_memory_mode
from tempoquant.integrations.residency import Memory
from tempoquant.integrations.sampling import SamplingSettings, generate_video, predict_noise, record_trajectory
from tempoquant.integrations.schedule import sampling_steps
from tempoquant.integrations.wan import EXPERT_COMPONENTS, default_device
from tempoquant.progress import SILENT, Progress
from tempoquant.prompts import Prompt, check_disjoint
from tempoquant.timesteps import Expert, TimestepBins

BITS_OF_16BIT = 16.0
"""What an unquantized model counts as, whichever dtype its files happen to store."""


@dataclass(frozen=True)
class Task:
    """What every model is asked to do.

    Attributes:
        prompts: held out from calibration; prompt i is generated with seed + i.
        settings: of every generation.
        seed: of the first generation.
        num_trajectories: the first so many prompts also measure the noise prediction.
        in_bundled_world: whether the models draw the bundled world, where pixels tell whether a video follows its
            prompt (if the prompt speaks of that world).
    """

    prompts: Sequence[Prompt]
    settings: SamplingSettings
    seed: int = 0
    num_trajectories: int = 4
    in_bundled_world: bool = False

    def __post_init__(self) -> None:
        if not self.prompts:
            raise CalibrationError("there is no prompt to compare on: ask for at least one sample.")


@dataclass(frozen=True)
class Evidence:
    """A comparison together with the videos it judged.

    Attributes:
        comparison: the numbers.
        videos: label to one video per prompt, the reference first.
    """

    comparison: Comparison
    videos: Mapping[str, Sequence[Video]]


def compare(
    reference: Path,
    models: Mapping[str, Path],
    task: Task,
    device: str | None = None,
    progress: Progress = SILENT,
    prepare: Callable[[Any], None] | None = None,
    memory: Memory = "resident",
) -> Evidence:
    """Generate and measure with the reference, then with each model.

    Args:
        reference: a pipeline folder, 16-bit as a rule.
        models: label to quantized pipeline folder.
        task: what to generate.
        device: where to run; None for CUDA where there is one, else the CPU.
        progress: told of every step and call.
        prepare: called with the pipeline of each model, not of the reference, before it runs.
        memory: the memory mode of every pipeline.

    Raises:
        CalibrationError: a model was calibrated on one of the prompts.
        ModelError: a folder is no such pipeline, or a model predicts NaN.
        CheckpointError: a checkpoint is damaged.
    """
    for folder in (reference, *models.values()):
        check_disjoint(task.prompts, calibration_prompts_of(folder))
        sampling_steps(folder, task.settings.num_steps, task.settings.flow_shift)  # refuses a scheduler before loading
    is_16bit = not configs_of(reference) and "16-bit" not in models  # somebody may call a folder "16-bit"
    reference_label = "16-bit" if is_16bit else "reference"
    bins = _common_bins(models.values())
    device = device or default_device()
    pipeline = _load(reference, reference_label, memory, device, progress)
    recorded = _record(pipeline, task, reference_label, progress)
    reference_videos = _generate(pipeline, task, reference_label, progress)
    remove_memory_mode(pipeline)
    del pipeline
    videos: dict[str, Sequence[Video]] = {reference_label: reference_videos}
    results = []
    for label, folder in models.items():
        free_memory()
        pipeline = _load(folder, label, memory, device, progress)
        if prepare is not None:
            prepare(pipeline)
        errors = _noise_prediction(pipeline, recorded, bins, label, progress)
        videos[label] = _generate(pipeline, task, label, progress)
        results.append(_result(label, folder, errors, _judge(task, videos[label], reference_videos)))
        remove_memory_mode(pipeline)
        del pipeline
    comparison = Comparison(
        reference=_result(reference_label, reference, (), _judge(task, reference_videos, None)),
        models=tuple(results),
        prompts={prompt.id: prompt.text for prompt in task.prompts},
        seed=task.seed,
        settings=plain(task.settings),
    )
    return Evidence(comparison, videos)


def _common_bins(folders: Iterable[Path]) -> dict[Expert, TimestepBins]:
    """For each expert the finest bins that any of the models has, so that all are measured on the same ones."""
    finest: dict[Expert, TimestepBins] = {}
    for folder in folders:
        for expert, config in configs_of(folder).items():
            if expert not in finest or config.bins.num_bins > finest[expert].num_bins:
                finest[expert] = config.bins
    return finest


def _load(folder: Path, label: str, memory: Memory, device: str, progress: Progress) -> Any:
    on_loaded = progress.start(f"{label}: loading", 1)
    pipeline = load_in_mode(folder, memory, device)
    on_loaded()
    return pipeline


def _record(pipeline: Any, task: Task, label: str, progress: Progress) -> list[RecordedCall]:
    prompts = task.prompts[: task.num_trajectories]
    on_step = progress.start(f"{label}: recording trajectories", len(prompts) * task.settings.num_steps)
    return [
        call
        for index, prompt in enumerate(prompts)
        for call in record_trajectory(pipeline, prompt, task.settings, task.seed + index, on_step)
    ]


def _generate(pipeline: Any, task: Task, label: str, progress: Progress) -> list[Video]:
    on_step = progress.start(f"{label}: generating videos", len(task.prompts) * task.settings.num_steps)
    return [
        generate_video(pipeline, prompt, task.settings, task.seed + index, on_step=on_step)
        for index, prompt in enumerate(task.prompts)
    ]


def _noise_prediction(
    pipeline: Any,
    recorded: Sequence[RecordedCall],
    bins: Mapping[Expert, TimestepBins],
    label: str,
    progress: Progress,
) -> tuple[NoisePredictionError, ...]:
    on_call = progress.start(f"{label}: noise prediction", len(recorded))
    predict: Callable[[CalibrationSample], torch.Tensor] = lambda sample: predict_noise(pipeline, sample)  # noqa: E731
    try:
        return summarize(call_errors(predict, recorded, on_call), bins)
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from error


def _judge(task: Task, videos: Sequence[Video], reference: Sequence[Video] | None) -> tuple[VideoResult, ...]:
    found = []
    for index, (prompt, video) in enumerate(zip(task.prompts, videos, strict=True)):
        adherence = _adherence(video, prompt.text) if task.in_bundled_world else None
        found.append(
            VideoResult(
                prompt_id=prompt.id,
                psnr_db=None if reference is None else psnr_db(reference[index], video),
                ssim=None if reference is None else ssim(reference[index], video),
                motion_followed=None if adherence is None else adherence.motion_followed,
                appearance_kept=None if adherence is None else adherence.appearance_kept,
            )
        )
    return tuple(found)


def _adherence(video: Video, text: str) -> PromptAdherence | None:
    """The pixels' verdict; None for a prompt that names nothing of the bundled world."""
    try:
        parse_prompt(text)
    except ValueError:
        return None
    return check_prompt(video, text)


def _result(
    label: str, folder: Path, errors: tuple[NoisePredictionError, ...], videos: tuple[VideoResult, ...]
) -> ModelResult:
    configs = configs_of(folder)
    return ModelResult(
        label=label,
        folder=str(folder),
        bits_per_weight=bits_per_weight(configs.values()) if configs else BITS_OF_16BIT,
        num_bytes=sum(num_weight_bytes(folder / name) for name in EXPERT_COMPONENTS.values()),
        noise_prediction=errors,
        videos=videos,
    )
