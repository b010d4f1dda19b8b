"""Sampling with a pipeline: one generation, and a generation whose calls are watched."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from tempoquant.calibrate.capture import watching_calls
from tempoquant.calibrate.sample import CalibrationSample, GuidanceBranch, RecordedCall
from tempoquant.errors import ModelError, SettingsError
from tempoquant.hosts.diffusers import modular
from tempoquant.hosts.diffusers.guiders import guider_of, use_guidance_scale
from tempoquant.hosts.diffusers.steps import watching_steps
from tempoquant.models.denoiser_inputs import on_device
from tempoquant.models.families import facts_of
from tempoquant.models.family import ModelFamily
from tempoquant.models.guidance import prediction_of
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.schedule import shifted
from tempoquant.prompts import Prompt

_ROUNDING = 2**-8  # of bfloat16, relative
_MAX_SEED = 2**32 - 1  # torch reads no more of it on the CPU: larger seeds would repeat smaller ones


def use_flow_shift(pipeline: Any, flow_shift: float | None) -> None:
    """Give the pipeline's own scheduler a flow shift; None leaves it as stored.

    Raises:
        ModelError: the scheduler has none, or it changes no timestep.
    """
    pipeline.scheduler = shifted(pipeline.scheduler, flow_shift)


def sample_latents(
    pipeline: Any,
    prompt: Prompt,
    settings: SamplingSettings,
    seed: int,
    texts: Mapping[str, Any],
    output_type: str = "latent",
    on_step: Callable[[], None] = lambda: None,
    on_latents: Callable[[float, torch.Tensor], None] = lambda _timestep, _latents: None,
) -> Any:
    """Generate once, and return the pipeline's `frames`, or `images`. An image is cropped to the
    video's aspect ratio.

    Args:
        texts: the pipeline's arguments `prompt` and `negative_prompt`, or embeddings in their
            place.
        on_step: called after each step; setting `pipeline._interrupt` there ends the generation
            early.
        on_latents: called after each step with its timestep and resulting latents.

    Raises:
        SettingsError: the seed is out of range.
    """
    if not 0 <= seed <= _MAX_SEED:
        raise SettingsError(f"a seed lies in 0 … 2^32 − 1, not {seed}.")
    use_flow_shift(pipeline, settings.flow_shift)
    facts = facts_of(pipeline)

    def on_stepped(timestep: Any, latents: torch.Tensor) -> None:
        on_latents(float(facts.family.scheduled(torch.as_tensor(timestep))), latents)
        on_step()
        if modular.is_modular(pipeline) and pipeline._interrupt:  # others check it themselves
            raise modular.Interrupted

    def callback(_pipeline: Any, _step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_stepped(timestep, tensors["latents"])
        return tensors

    given = {
        **texts,
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.num_frames,
        "guidance_scale": settings.guidance_scale,
        **({} if settings.sigmas is None else {"sigmas": list(settings.sigmas)}),
        "callback_on_step_end": callback,
        **facts.family.arguments(facts.index, prompt, settings),
    }
    if guider_of(pipeline) is not None:
        use_guidance_scale(pipeline, settings.guidance_scale)
    given["num_inference_steps"] = settings.num_steps
    given["generator"] = torch.Generator("cpu").manual_seed(seed)
    if modular.is_modular(pipeline):
        pipeline._interrupt = False
        with watching_steps([pipeline.scheduler], on_stepped):
            return modular.run(pipeline, given, output_type)
    takes = _takes(pipeline)  # some take their frames from a clip, or make images
    watched = () if takes("callback_on_step_end") else (pipeline.scheduler,)
    with watching_steps(watched, on_stepped):
        answer = pipeline(**{name: value for name, value in given.items() if takes(name)}, output_type=output_type)
    return answer.frames if hasattr(answer, "frames") else answer.images


def _takes(pipeline: Any) -> Callable[[str], bool]:
    """Return a function that tells whether a pipeline's call takes an argument of a name."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return lambda name: takes_all or name in parameters


def generate_video(
    pipeline: Any,
    prompt: Prompt,
    settings: SamplingSettings,
    seed: int,
    negative_prompt: str = "",
    on_step: Callable[[], None] = lambda: None,
    on_latents: Callable[[float, torch.Tensor], None] = lambda _timestep, _latents: None,
) -> np.ndarray:
    """Generate one video: uint8, (frames, height, width, 3). `sample_latents` describes the
    callbacks.

    Raises:
        ModelError: a pixel is NaN or infinite.
        SettingsError: the seed is out of range.
    """
    texts = {"prompt": prompt.text, "negative_prompt": negative_prompt}
    frames = np.asarray(sample_latents(pipeline, prompt, settings, seed, texts, "np", on_step, on_latents)[0])
    frames = frames[None] if frames.ndim == 3 else frames  # an image is a video of one frame
    if not np.isfinite(frames).all():
        raise ModelError(f"the video for {prompt.id!r} holds NaN or Inf: the model overflows in this dtype.")
    return (frames * 255).round().clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class CallPosition:
    """The position of a call of a generation, or of a row of a call: see `CalibrationSample` for
    the names.
    """

    denoiser: str
    step_index: int
    guidance_branch: GuidanceBranch
    timestep: float


@contextlib.contextmanager
def watching_trajectory(
    pipeline: Any, observe: Callable[[CallPosition, dict[str, Any], Any], None]
) -> Iterator[Callable[[], None]]:
    """Call `observe(position, inputs, output)` after each transformer call of one generation,
    within this context.

    It is called once for each row with its own guidance branch. Yields a function that the
    generation must call after each step.
    """
    step_index = num_calls = 0
    facts = facts_of(pipeline)

    def watch(denoiser: str) -> Callable[[dict[str, Any], Any], None]:
        def on_call(inputs: dict[str, Any], output: Any) -> None:
            nonlocal num_calls
            timestep = _scheduled(pipeline, facts.family, facts.family.timestep_of(inputs))
            for part in facts.family.guidance.parts(inputs, output, num_calls):
                position = CallPosition(denoiser, step_index, part.branch, timestep)
                observe(position, part.arguments, part.answer)
            num_calls += 1

        return on_call

    def on_step() -> None:
        nonlocal step_index, num_calls
        step_index, num_calls = step_index + 1, 0

    with ExitStack() as hooks:
        for denoiser in facts.denoisers:
            hooks.enter_context(watching_calls(getattr(pipeline, denoiser.component), watch(denoiser.name)))
        yield on_step


def _scheduled(pipeline: Any, family: ModelFamily, told: float) -> float:
    """Return the scheduler's timestep from a denoiser's argument, which some pipelines round to 16
    bits.
    """
    timesteps = [float(each) for each in family.scheduled(pipeline.scheduler.timesteps)]
    nearest = min(timesteps, key=lambda each: abs(each - told), default=told)
    return nearest if abs(nearest - told) <= nearest * _ROUNDING else told


def sample_of(prompt: Prompt, position: CallPosition, inputs: Mapping[str, Any]) -> CalibrationSample:
    """Convert a watched call to a calibration sample: its arguments without output options, on the
    CPU.
    """
    own = {key: value for key, value in inputs.items() if key != "return_dict"}
    return CalibrationSample(
        prompt_id=prompt.id,
        denoiser=position.denoiser,
        timestep=position.timestep,
        step_index=position.step_index,
        guidance_branch=position.guidance_branch,
        inputs=pytree.tree_map_only(torch.Tensor, _copy, own),
    )


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU in fresh memory: some pipelines write the next latents into those
    of a call.
    """
    return tensor.to("cpu", copy=True)


def record_trajectory(
    pipeline: Any,
    prompt: Prompt,
    settings: SamplingSettings,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> list[RecordedCall]:
    """Generate once and keep every transformer call: inputs and answer, in order, on the CPU."""
    calls: list[RecordedCall] = []

    def keep(position: CallPosition, inputs: dict[str, Any], output: Any) -> None:
        calls.append(RecordedCall(sample_of(prompt, position, inputs), prediction_of(output).cpu()))

    with watching_trajectory(pipeline, keep) as step_done:

        def after_step() -> None:
            step_done()
            on_step()

        texts = {"prompt": prompt.text, "negative_prompt": ""}
        sample_latents(pipeline, prompt, settings, seed, texts, on_step=after_step)
    return calls


@torch.no_grad()
def predict_noise(pipeline: Any, sample: CalibrationSample) -> torch.Tensor:
    """Run one recorded call through the pipeline's own denoiser, and return the noise prediction,
    on the CPU.
    """
    facts = facts_of(pipeline)
    denoiser = getattr(pipeline, facts.denoiser(sample.denoiser).component)
    inputs = on_device(denoiser, facts.family, sample.inputs, pipeline._execution_device)
    return prediction_of(denoiser(**inputs, return_dict=False)).cpu()
