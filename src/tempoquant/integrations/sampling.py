"""How a Wan pipeline samples: its settings, one generation, and a generation whose calls are watched."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image, ImageOps

from tempoquant.calibrate.capture import watching_calls
from tempoquant.calibrate.sample import CalibrationSample, GuidanceBranch, RecordedCall
from tempoquant.errors import ModelError, SettingsError
from tempoquant.images import as_seen
from tempoquant.integrations.sampling_file import SAMPLING_FILE, stated_sampling
from tempoquant.integrations.schedule import flow_shift_of, load_scheduler, shifted
from tempoquant.integrations.wan import EXPERT_COMPONENTS, on_device
from tempoquant.prompts import Prompt
from tempoquant.timesteps import Expert

_logger = logging.getLogger(__name__)

_FALLBACKS = ("height", "width", "num_frames", "num_steps", "guidance_scale", "flow_shift")
_SIZE_STEP = 16  # eight pixels a latent, two latents a patch
_MAX_SEED = 2**32 - 1  # torch reads no more of it on the CPU: larger seeds would repeat smaller ones


@dataclass(frozen=True)
class SamplingSettings:
    """How one video is sampled. The defaults are Wan2.2-I2V-A14B's as published.

    Attributes:
        height, width: pixels, multiples of 16.
        num_frames: of the video, 4k + 1.
        num_steps: of the sampler.
        guidance_scale: of classifier-free guidance, both experts; 1 for none.
        flow_shift: of the scheduler; None keeps the one stored in the pipeline.
        fps: frames a second of the written video.

    Raises:
        SettingsError: a value the model cannot run.
    """

    height: int = 480
    width: int = 832
    num_frames: int = 81
    num_steps: int = 40
    guidance_scale: float = 3.5
    flow_shift: float | None = 5.0
    fps: int = 16

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "num_steps", "fps"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise SettingsError(f"{name} is a whole number above 0, not {value!r}.")
        for name in ("height", "width"):
            if getattr(self, name) % _SIZE_STEP:
                raise SettingsError(f"{name} is a multiple of {_SIZE_STEP}, not {getattr(self, name)}.")
        if self.num_frames % 4 != 1:
            raise SettingsError(f"num_frames is 4k + 1 (1, 5, …, 81), not {self.num_frames}.")
        for name in ("guidance_scale", "flow_shift"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | float) or not 0 < value < 1e6):
                raise SettingsError(f"{name} is a number above 0, not {value!r}.")

    def replace(self, **changes: Any) -> "SamplingSettings":
        """A copy with some settings changed; None leaves a setting as it is."""
        return dataclasses.replace(self, **{key: value for key, value in changes.items() if value is not None})


def default_settings(folder: Path) -> SamplingSettings:
    """The model's own settings: what `stated_sampling` finds, or else those of Wan2.2-I2V-A14B.

    A flow shift that is left open there is the stored scheduler's.

    Raises:
        ModelError: the file is not what `SamplingSettings` takes, or the scheduler does not load.
    """
    stated = stated_sampling(folder, tuple(EXPERT_COMPONENTS.values()))
    if stated is None:
        return SamplingSettings()
    file, values = stated
    try:
        settings = SamplingSettings(**values)
    except (TypeError, SettingsError) as error:
        raise ModelError(f"{file} is not a valid sampling file ({error}): remove or repair it.") from error
    if settings.flow_shift is not None:
        return settings
    return settings.replace(flow_shift=flow_shift_of(load_scheduler(folder, None)))


def settings_of(folder: Path, changes: Mapping[str, Any]) -> SamplingSettings:
    """The model's own settings with some of them changed; None leaves one as it is.

    Raises as `default_settings` does, and SettingsError for a value that no model can run.
    """
    settings = default_settings(folder).replace(**changes)
    warn_of_published(folder, settings, changes)
    return settings


def warn_of_published(folder: Path, settings: SamplingSettings, given: Mapping[str, Any]) -> None:
    """Log which settings are the published ones, because neither the model nor `given` (None for no) says them."""
    left = [name for name in _FALLBACKS if given.get(name) is None]
    if left and stated_sampling(folder, tuple(EXPERT_COMPONENTS.values())) is None:
        _logger.warning(
            "%s has no %s, so %s are those that Wan2.2-I2V-A14B was published with: --size, --frames, --steps, "
            "--guidance-scale and --flow-shift change them.",
            folder, SAMPLING_FILE, ", ".join(f"{name} {getattr(settings, name):g}" for name in left),
        )  # fmt: skip


def use_flow_shift(pipeline: WanImageToVideoPipeline, flow_shift: float | None) -> None:
    """Give the pipeline's own scheduler a flow shift; None leaves it as stored.

    Raises:
        ModelError: the scheduler has none, or it moves no timestep.
    """
    pipeline.scheduler = shifted(pipeline.scheduler, flow_shift)


def sample_latents(
    pipeline: WanImageToVideoPipeline,
    prompt: Prompt,
    settings: SamplingSettings,
    seed: int,
    texts: Mapping[str, Any],
    output_type: str = "latent",
    on_step: Callable[[], None] = lambda: None,
    on_latents: Callable[[float, torch.Tensor], None] = lambda _timestep, _latents: None,
) -> Any:
    """One generation; what the pipeline calls `frames`. The image is cropped to the video's aspect ratio.

    Args:
        texts: the pipeline's arguments `prompt` and `negative_prompt`, or embeddings in their place.
        on_step: called after each step; setting `pipeline._interrupt` there ends the generation early.
        on_latents: called after each step with its timestep and the latents that it made.

    Raises:
        SettingsError: the seed is out of range.
    """
    if not 0 <= seed <= _MAX_SEED:
        raise SettingsError(f"a seed lies in 0 … 2^32 − 1, not {seed}.")
    use_flow_shift(pipeline, settings.flow_shift)

    def callback(_pipeline: Any, _step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_latents(float(timestep), tensors["latents"])
        on_step()
        return tensors

    return pipeline(
        **texts,
        image=first_frame(prompt, settings),
        height=settings.height,
        width=settings.width,
        num_frames=settings.num_frames,
        num_inference_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output_type,
        callback_on_step_end=callback,
    ).frames


def first_frame(prompt: Prompt, settings: SamplingSettings) -> Image.Image:
    """A prompt's image as a person sees it, cropped to the video's aspect ratio. Raises CalibrationError for none."""
    return ImageOps.fit(as_seen(prompt.image), (settings.width, settings.height))


def generate_video(
    pipeline: WanImageToVideoPipeline,
    prompt: Prompt,
    settings: SamplingSettings,
    seed: int,
    negative_prompt: str = "",
    on_step: Callable[[], None] = lambda: None,
    on_latents: Callable[[float, torch.Tensor], None] = lambda _timestep, _latents: None,
) -> np.ndarray:
    """Generate one video: uint8, (frames, height, width, 3). See `sample_latents` for what is called after each step.

    Raises:
        ModelError: a pixel is NaN or infinite.
        SettingsError: the seed is out of range.
    """
    texts = {"prompt": prompt.text, "negative_prompt": negative_prompt}
    frames = np.asarray(sample_latents(pipeline, prompt, settings, seed, texts, "np", on_step, on_latents)[0])
    if not np.isfinite(frames).all():
        raise ModelError(f"the video for {prompt.id!r} holds NaN or Inf: the model overflows in this dtype.")
    return (frames * 255).round().clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class CallPosition:
    """Which call of a generation: see `CalibrationSample` for the names."""

    expert: Expert
    step_index: int
    guidance_branch: GuidanceBranch


@contextlib.contextmanager
def watching_trajectory(
    pipeline: WanImageToVideoPipeline, observe: Callable[[CallPosition, dict[str, Any], Any], None]
) -> Iterator[Callable[[], None]]:
    """Within this context, `observe(position, inputs, output)` runs after each transformer call of one generation.

    Yields what the generation has to call after each step.
    """
    step_index = num_calls = 0

    def watch(expert: Expert) -> Callable[[dict[str, Any], Any], None]:
        def on_call(inputs: dict[str, Any], output: Any) -> None:
            # Guidance calls twice a step: with the prompt, then without.
            nonlocal num_calls
            observe(CallPosition(expert, step_index, "unconditional" if num_calls else "conditional"), inputs, output)
            num_calls += 1

        return on_call

    def on_step() -> None:
        nonlocal step_index, num_calls
        step_index, num_calls = step_index + 1, 0

    with ExitStack() as hooks:
        for expert, component in EXPERT_COMPONENTS.items():
            hooks.enter_context(watching_calls(getattr(pipeline, component), watch(expert)))
        yield on_step


def sample_of(prompt: Prompt, position: CallPosition, inputs: Mapping[str, Any]) -> CalibrationSample:
    """A watched call as a calibration sample: its tensors, on the CPU."""
    return CalibrationSample(
        prompt_id=prompt.id,
        expert=position.expert,
        timestep=float(inputs["timestep"].flatten()[0]),
        step_index=position.step_index,
        guidance_branch=position.guidance_branch,
        inputs={key: value.cpu() for key, value in inputs.items() if isinstance(value, torch.Tensor)},
    )


def record_trajectory(
    pipeline: WanImageToVideoPipeline,
    prompt: Prompt,
    settings: SamplingSettings,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> list[RecordedCall]:
    """Generate once and keep every transformer call: inputs and answer, in order, on the CPU."""
    calls: list[RecordedCall] = []

    def keep(position: CallPosition, inputs: dict[str, Any], output: Any) -> None:
        calls.append(RecordedCall(sample_of(prompt, position, inputs), output[0].cpu()))

    with watching_trajectory(pipeline, keep) as step_done:

        def after_step() -> None:
            step_done()
            on_step()

        texts = {"prompt": prompt.text, "negative_prompt": ""}
        sample_latents(pipeline, prompt, settings, seed, texts, on_step=after_step)
    return calls


@torch.no_grad()
def predict_noise(pipeline: WanImageToVideoPipeline, sample: CalibrationSample) -> torch.Tensor:
    """Run one recorded call through the pipeline's own expert: the noise prediction, on the CPU."""
    transformer = getattr(pipeline, EXPERT_COMPONENTS[sample.expert])
    inputs = on_device(transformer, sample.inputs, pipeline._execution_device)
    return transformer(**inputs, return_dict=False)[0].cpu()
