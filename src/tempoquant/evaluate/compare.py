"""Comparison of quantized models with their reference: the same held-out prompts, seeds and
settings for all.

One pipeline is in memory at a time. The reference's outputs (videos, and trajectories for the noise
predictions) are kept on the CPU.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tempoquant.calibrate.sample import CalibrationSample, RecordedCall
from tempoquant.device import default_device, free_memory
from tempoquant.errors import CalibrationError, ModelError
from tempoquant.evaluate.metrics.prompt_adherence import PromptAdherence, check_prompt, parse_prompt
from tempoquant.evaluate.metrics.video_metrics import Video, psnr_db, ssim
from tempoquant.evaluate.noise_prediction import call_errors, summarize
from tempoquant.evaluate.reference_loras import warn_of_other_loras
from tempoquant.evaluate.results import Comparison, ModelResult, NoisePredictionError, Summary, VideoResult
from tempoquant.evaluate.text_embeddings import embedding_db, embeddings_of, has_quantized_text_encoder
from tempoquant.hosts.contents import bits_per_weight, calibration_prompts_of, configs_of
from tempoquant.hosts.diffusers.sampling import generate_video, predict_noise, record_trajectory
from tempoquant.models.prompt_needs import require_needed
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.schedule import sampling_steps
from tempoquant.models.source import SourceModel
from tempoquant.placement.memory_modes import load_in_mode, remove_memory_mode
from tempoquant.placement.modes import Memory
from tempoquant.progress import SILENT, Progress
from tempoquant.prompts import Prompt, check_disjoint
from tempoquant.timesteps import TimestepBins


@dataclass(frozen=True)
class Task:
    """The task of every model.

    Attributes:
        prompts: held out from calibration; prompt i is generated with seed + i.
        settings: of every generation.
        seed: of the first generation.
        num_trajectories: how many of the first prompts also measure the noise prediction.
        in_bundled_world: whether the models draw the bundled world, where pixels show whether a
            video follows its prompt (if the prompt describes that world).
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
    reference: SourceModel,
    models: Mapping[str, SourceModel],
    task: Task,
    device: str | None = None,
    progress: Progress = SILENT,
    prepare: Callable[[Any], None] | None = None,
    memory: Memory = "resident",
) -> Evidence:
    """Generate and measure with the reference, then with each model.

    Args:
        reference: a pipeline, 16-bit as a rule.
        models: label to quantized pipeline.
        task: what to generate.
        device: where to run; None for CUDA if there is a GPU, else the CPU.
        progress: receives every step and call.
        prepare: called with the pipeline of each model, not of the reference, before it runs.
        memory: the memory mode of every pipeline.

    Raises:
        CalibrationError: a prompt lacks what a pipeline needs, or a model was calibrated on it.
        ModelError: a folder is no such pipeline, or a model predicts NaN.
        CheckpointError: a checkpoint is damaged.
    """
    for source in (reference, *models.values()):
        require_needed(source, task.prompts)
        check_disjoint(task.prompts, calibration_prompts_of(source.folder))
        sampling_steps(source, task.settings)  # refuses a scheduler before loading
    warn_of_other_loras(reference, {label: configs_of(source.folder) for label, source in models.items()})
    is_16bit = not configs_of(reference.folder) and "16-bit" not in models  # a folder may be called "16-bit"
    reference_label = "16-bit" if is_16bit else "reference"
    bins = _common_bins(source.folder for source in models.values())
    device = device or default_device()
    pipeline = _load(reference, reference_label, memory, device, progress)
    recorded = _record(pipeline, task, reference_label, progress)
    has_embeddings = any(has_quantized_text_encoder(source) for source in (reference, *models.values()))
    embeddings = _embeddings(pipeline, task) if has_embeddings else []
    reference_videos = _generate(pipeline, task, reference_label, progress)
    remove_memory_mode(pipeline)
    del pipeline
    videos: dict[str, Sequence[Video]] = {reference_label: reference_videos}
    results = []
    for label, source in models.items():
        free_memory()
        pipeline = _load(source, label, memory, device, progress)
        if prepare is not None:
            prepare(pipeline)
        errors = _noise_prediction(pipeline, recorded, bins, label, progress)
        videos[label] = _generate(pipeline, task, label, progress)
        result = _result(label, source, errors, _judge(task, videos[label], reference_videos))
        if has_embeddings:
            lost = [embedding_db(*pair) for pair in zip(embeddings, _embeddings(pipeline, task), strict=True)]
            result = replace(result, embedding_db=Summary.of(lost))
        results.append(result)
        remove_memory_mode(pipeline)
        del pipeline
    comparison = Comparison(
        reference=_result(reference_label, reference, (), _judge(task, reference_videos, None)),
        models=tuple(results),
        prompts={prompt.id: prompt.text for prompt in task.prompts},
        seed=task.seed,
        settings=task.settings.to_dict(),
    )
    return Evidence(comparison, videos)


def _common_bins(folders: Iterable[Path]) -> dict[str, TimestepBins]:
    """Return for each denoiser the finest bins of any model, so that all models are measured on the
    same ones.
    """
    finest: dict[str, TimestepBins] = {}
    for folder in folders:
        for denoiser, config in configs_of(folder).items():
            if denoiser not in finest or config.bins.num_bins > finest[denoiser].num_bins:
                finest[denoiser] = config.bins
    return finest


def _load(source: SourceModel, label: str, memory: Memory, device: str, progress: Progress) -> Any:
    on_loaded = progress.start(f"{label}: loading", 1)
    pipeline = load_in_mode(source, memory, device)
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


def _embeddings(pipeline: Any, task: Task) -> list[dict[str, torch.Tensor]]:
    return [embeddings_of(pipeline, prompt.text) for prompt in task.prompts]


def _generate(pipeline: Any, task: Task, label: str, progress: Progress) -> list[Video]:
    on_step = progress.start(f"{label}: generating videos", len(task.prompts) * task.settings.num_steps)
    return [
        generate_video(pipeline, prompt, task.settings, task.seed + index, on_step=on_step)
        for index, prompt in enumerate(task.prompts)
    ]


def _noise_prediction(
    pipeline: Any,
    recorded: Sequence[RecordedCall],
    bins: Mapping[str, TimestepBins],
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
    """Judge a video's pixels; None for a prompt that names nothing of the bundled world."""
    try:
        parse_prompt(text)
    except ValueError:
        return None
    return check_prompt(video, text)


def _result(
    label: str, source: SourceModel, errors: tuple[NoisePredictionError, ...], videos: tuple[VideoResult, ...]
) -> ModelResult:
    configs = configs_of(source.folder)
    return ModelResult(
        label=label,
        folder=str(source.folder),
        bits_per_weight=bits_per_weight(configs.values()) if configs else source.bits_per_weight,
        num_bytes=source.weight_bytes,
        noise_prediction=errors,
        videos=videos,
    )
