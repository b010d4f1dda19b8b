"""What we know about Wan2.2-I2V in diffusers: which component is which expert, where its linears are, its sampling."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from safetensors import safe_open
from torch import nn

from tempoquant.calibrate.capture import first_call, watching_calls
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.calibrate.sequential import BlockCall
from tempoquant.errors import ModelError
from tempoquant.integrations.pipeline_folder import check_pipeline_folder, read_json
from tempoquant.prompts import Prompt
from tempoquant.timesteps import Expert

EXPERT_COMPONENTS = {Expert.HIGH_NOISE: "transformer", Expert.LOW_NOISE: "transformer_2"}

SAMPLING_FILE = "sampling.json"


@dataclass(frozen=True)
class SamplingSettings:
    """How one video is sampled.

    Attributes:
        height, width: pixels.
        num_frames: of the video; 4k + 1.
        num_steps: of the sampler.
        guidance_scale: of classifier-free guidance, both experts; 1 for none.
        flow_shift: of the scheduler; None keeps the one stored in the pipeline.
        fps: frames a second of the written video.
    """

    height: int = 480
    width: int = 832
    num_frames: int = 81
    num_steps: int = 40
    guidance_scale: float = 3.5
    flow_shift: float | None = 5.0
    fps: int = 16

    def replace(self, **changes: Any) -> "SamplingSettings":
        """A copy with some settings changed; None leaves a setting as it is."""
        return dataclasses.replace(self, **{key: value for key, value in changes.items() if value is not None})


def default_settings(folder: Path) -> SamplingSettings:
    """The model's own settings: `sampling.json` beside model_index.json, or else Wan2.2-I2V-A14B's as published.

    Raises:
        ModelError: the file is not what `SamplingSettings` takes.
    """
    file = folder / SAMPLING_FILE
    if not file.is_file():
        return SamplingSettings()
    try:
        return SamplingSettings(**json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{file} is not a valid sampling file ({error}): remove or repair it.") from error


def default_device() -> str:
    """CUDA when there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(device: str) -> torch.dtype:
    """bfloat16 on a GPU; float32 on the CPU, where it is the faster one and costs no accuracy."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_pipeline(folder: Path, device: str | None = None, dtype: torch.dtype | None = None) -> WanImageToVideoPipeline:
    """Load a two-expert Wan image-to-video pipeline, 16-bit or quantized.

    Raises:
        ModelError: the folder is no such pipeline, or would need unpickling.
    """
    check_pipeline_folder(folder)
    device = device or default_device()
    try:
        pipeline = WanImageToVideoPipeline.from_pretrained(
            folder, dtype=dtype or compute_dtype(device), use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder} does not load as a WanImageToVideoPipeline: {error}") from error
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            _require_complete(component, folder / name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def use_flow_shift(pipeline: WanImageToVideoPipeline, flow_shift: float | None) -> None:
    """Give the pipeline's scheduler a flow shift; None leaves it as stored."""
    if flow_shift is not None and pipeline.scheduler.config.flow_shift != flow_shift:
        pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=flow_shift)


def _sample(
    pipeline: WanImageToVideoPipeline,
    prompt: Prompt,
    settings: SamplingSettings,
    seed: int,
    output_type: str,
    negative_prompt: str = "",
    on_step: Callable[[], None] | None = None,
) -> Any:
    """One generation; what the pipeline calls `frames`."""
    use_flow_shift(pipeline, settings.flow_shift)

    def callback(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step()
        return tensors

    image = prompt.image.convert("RGB").resize((settings.width, settings.height))
    return pipeline(
        image=image,
        prompt=prompt.text,
        negative_prompt=negative_prompt,
        height=settings.height,
        width=settings.width,
        num_frames=settings.num_frames,
        num_inference_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output_type,
        callback_on_step_end=callback,
    ).frames


def generate_video(
    pipeline: WanImageToVideoPipeline,
    prompt: Prompt,
    settings: SamplingSettings,
    seed: int,
    negative_prompt: str = "",
    on_step: Callable[[], None] | None = None,
) -> np.ndarray:
    """Generate one video: uint8, (frames, height, width, 3). `on_step` is called after each step."""
    frames = _sample(pipeline, prompt, settings, seed, "np", negative_prompt, on_step)[0]
    return (np.asarray(frames) * 255).round().clip(0, 255).astype(np.uint8)


def record_trajectory(
    pipeline: WanImageToVideoPipeline,
    prompt: Prompt,
    settings: SamplingSettings,
    seed: int,
    on_step: Callable[[], None] | None = None,
) -> list[CalibrationSample]:
    """Generate once and keep every transformer call: inputs and answer, in order, on the CPU."""
    samples: list[CalibrationSample] = []

    def observer(expert: Expert) -> Callable[[dict[str, Any], Any], None]:
        def observe(inputs: dict[str, Any], output: Any) -> None:
            timestep = float(inputs["timestep"].flatten()[0])
            again = bool(samples) and samples[-1].timestep == timestep  # guidance calls twice: with the prompt, without
            samples.append(
                CalibrationSample(
                    prompt_id=prompt.id,
                    expert=expert,
                    timestep=timestep,
                    step_index=samples[-1].step_index + (not again) if samples else 0,
                    branch="unconditional" if again else "conditional",
                    inputs={key: value.cpu() for key, value in inputs.items() if isinstance(value, torch.Tensor)},
                    noise_prediction=output[0].cpu(),
                )
            )

        return observe

    with ExitStack() as hooks:
        for expert, component in EXPERT_COMPONENTS.items():
            hooks.enter_context(watching_calls(getattr(pipeline, component), observer(expert)))
        _sample(pipeline, prompt, settings, seed, "latent", on_step=on_step)
    return samples


@torch.no_grad()
def predict_noise(pipeline: WanImageToVideoPipeline, sample: CalibrationSample) -> torch.Tensor:
    """Run one recorded call through the pipeline's own expert: the noise prediction, on the CPU."""
    transformer = getattr(pipeline, EXPERT_COMPONENTS[sample.expert])
    return transformer(**_on(transformer, sample.inputs), return_dict=False)[0].cpu()


def _on(transformer: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs on the transformer's device, floats in the dtype it computes in."""
    weight = transformer.get_parameter("patch_embedding.weight")
    moved = {key: value.to(weight.device) for key, value in inputs.items()}
    return {k: v.to(weight.dtype) if v.is_floating_point() and k != "timestep" else v for k, v in moved.items()}


def block_linears(transformer: WanTransformer3DModel, index: int) -> dict[str, nn.Linear]:
    """The linears of one block by name: q, k, v, o of both attentions and the two of the FFN."""
    return {
        f"blocks.{index}.{name}": module
        for name, module in transformer.blocks[index].named_modules()
        if isinstance(module, nn.Linear)
    }


class WanExpert:
    """One expert as calibration sees it (`calibrate.sequential.ExpertModel`)."""

    def __init__(self, transformer: WanTransformer3DModel, expert: Expert) -> None:
        self.expert = expert
        self.num_blocks = len(transformer.blocks)
        self._transformer = transformer

    def first_block_call(self, sample: CalibrationSample) -> BlockCall:
        """Run the embeddings on a sample; what block 0 is called with."""
        inputs = _on(self._transformer, sample.inputs)
        return first_call(self._transformer.blocks[0], lambda: self._transformer(**inputs, return_dict=False))

    def block(self, index: int) -> nn.Module:
        """Block `index`."""
        return self._transformer.blocks[index]

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """See `block_linears`."""
        return block_linears(self._transformer, index)

    def next_block_call(self, call: BlockCall, output: torch.Tensor) -> BlockCall:
        """Wan blocks take the hidden states first and pass all else on unchanged."""
        args, kwargs = call
        return ((output, *args[1:]), kwargs)


def load_expert(folder: Path, expert: Expert, device: str, dtype: torch.dtype) -> WanTransformer3DModel:
    """One 16-bit expert, ready to be calibrated.

    Raises:
        ModelError: its files are damaged, pickled, already quantized, or of another class.
    """
    component = EXPERT_COMPONENTS[expert]
    if "quantization_config" in component_config(folder, expert):
        raise ModelError(f"{folder / component} is already quantized: start from the 16-bit model.")
    try:
        transformer = WanTransformer3DModel.from_pretrained(
            folder, subfolder=component, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / component} does not load as a WanTransformer3DModel: {error}") from error
    _require_complete(transformer, folder / component)
    return transformer.to(device)


def _require_complete(model: nn.Module, folder: Path) -> None:
    """diffusers only warns when a file lacks a weight, and leaves it on the meta device."""
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} weight(s), such as {missing[0]}: fetch the model again.")


def component_config(folder: Path, expert: Expert) -> dict[str, Any]:
    """An expert's config.json as it is in the folder."""
    return dict(read_json(folder / EXPERT_COMPONENTS[expert] / "config.json"))


def unquantized_tensors(folder: Path, expert: Expert, quantized: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the source's files that belongs to no quantized layer, by name, in the dtype it is stored in."""
    component = folder / EXPERT_COMPONENTS[expert]
    for file in sorted(component.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                if name.rpartition(".")[0] not in quantized:
                    yield name, tensors.get_tensor(name).clone()  # not a view of the mapped file: alignment matters
