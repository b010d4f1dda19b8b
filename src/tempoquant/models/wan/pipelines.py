"""The Wan pipelines: their denoisers, their conditions, and the published models' sampling."""

from collections.abc import Mapping
from typing import Any

from tempoquant.errors import ModelError
from tempoquant.images import as_seen, first_frame
from tempoquant.models.clips import read_frames
from tempoquant.models.family import Config, PipelineIndex
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.prompts import Prompt
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS, Denoiser

IMAGE_TO_VIDEO, TEXT_TO_VIDEO = "WanImageToVideoPipeline", "WanPipeline"
VACE, ANIMATE = "WanVACEPipeline", "WanAnimatePipeline"

HIGH_NOISE, LOW_NOISE = "high_noise", "low_noise"
COMPONENTS = {HIGH_NOISE: "transformer", LOW_NOISE: "transformer_2"}
"""Wan2.2's two experts and their components. A single denoiser is the first component, and has its
name.
"""

CLASSES = {
    IMAGE_TO_VIDEO: "WanTransformer3DModel",
    TEXT_TO_VIDEO: "WanTransformer3DModel",
    VACE: "WanVACETransformer3DModel",
    ANIMATE: "WanAnimateTransformer3DModel",
}
"""The class of the denoisers by pipeline class."""


def denoisers(index: PipelineIndex) -> tuple[Denoiser, ...]:
    """Return a pipeline's denoisers: two experts with a boundary between them, or a single
    transformer.

    Raises:
        ModelError: one is missing, of another class, or would have no timesteps.
    """
    first, second = COMPONENTS.values()
    ratio, wanted = index.values.get("boundary_ratio"), ("diffusers", CLASSES[index.class_name])
    for name in (first,) if ratio is None and second not in index.components else (first, second):
        if index.components.get(name) != wanted:
            raise ModelError(
                f"{index.folder} has no {wanted[1]} as {name}: a pipeline with two experts and a boundary_ratio needs "
                "both, any other one needs its transformer."
            )
    if second not in index.components:
        return (Denoiser(first, first),)
    if not isinstance(ratio, int | float):
        raise ModelError(f"{index.folder} has no boundary_ratio: a pipeline with two experts needs one.")
    if isinstance(ratio, bool) or not 0 < ratio < 1:
        raise ModelError(
            f"the boundary_ratio of {index.folder} is {ratio}: it lies between 0 and 1, so that each expert has "
            "timesteps."
        )
    boundary, most = ratio * NUM_TRAIN_TIMESTEPS, float(NUM_TRAIN_TIMESTEPS)
    return Denoiser(HIGH_NOISE, first, (boundary, most)), Denoiser(LOW_NOISE, second, (0.0, boundary))


def has_timestep_by_token(index: PipelineIndex) -> bool:
    """Return whether each token has its own timestep, as in Wan2.2-TI2V-5B: those of a given first
    frame are clean.
    """
    return bool(index.values.get("expand_timesteps"))


def takes_image(index: PipelineIndex) -> bool:
    """Return whether a pipeline encodes an image, or a video as a condition."""
    return index.class_name != TEXT_TO_VIDEO


def needs(index: PipelineIndex) -> tuple[str, ...]:
    """Return the inputs that a prompt needs beside its text; VACE takes an image if there is
    one.
    """
    return {IMAGE_TO_VIDEO: ("image",), ANIMATE: ("image", "pose", "face")}.get(index.class_name, ())


def arguments(index: PipelineIndex, prompt: Prompt, settings: SamplingSettings) -> dict[str, Any]:
    """Return a pipeline's arguments for one prompt, beside texts, size, steps and noise.

    Raises:
        CalibrationError: a clip cannot be read, or is too short.
    """
    if prompt.image is None or not takes_image(index):
        return {}
    if index.class_name == ANIMATE:
        return _animate_arguments(prompt, settings)
    image = first_frame(prompt.image, settings.width, settings.height)
    return {"reference_images": [image]} if index.class_name == VACE else {"image": image}


_FACE_SIZE = 512
"""Pixels of a square face, as in the published model; the pipeline scales it for others."""


def _animate_arguments(prompt: Prompt, settings: SamplingSettings) -> dict[str, Any]:
    """Return the person's picture, uncropped, and the clips of one segment: the whole video is
    one.
    """
    assert prompt.image is not None  # `needs` has it
    num_frames = settings.num_frames
    return {
        "image": as_seen(prompt.image),
        "pose_video": read_frames(prompt.id, prompt.clips["pose"], num_frames, (settings.width, settings.height)),
        "face_video": read_frames(prompt.id, prompt.clips["face"], num_frames, (_FACE_SIZE, _FACE_SIZE)),
        "segment_frame_length": num_frames,
    }


I2V_A14B = SamplingSettings(480, 832, 81, 40, 3.5, 5.0, 16)
_T2V_A14B = SamplingSettings(480, 832, 81, 40, 4.0, 12.0, 16)
_TI2V_5B = SamplingSettings(704, 1280, 121, 50, 5.0, 5.0, 24)
_WAN21 = SamplingSettings(480, 832, 81, 50, 5.0, 5.0, 16)
_ANIMATE_14B = SamplingSettings(720, 1280, 77, 20, 1.0, 5.0, 30)


def published(index: PipelineIndex) -> tuple[str, SamplingSettings]:
    """Return the name of the published model that a pipeline resembles, and its sampling.

    Source: the configs of Wan2.2's and Wan2.1's own repositories, and diffusers' defaults.
    """
    if has_timestep_by_token(index):
        return "Wan2.2-TI2V-5B", _TI2V_5B
    if index.class_name == ANIMATE:
        return "Wan2.2-Animate-14B", _ANIMATE_14B
    if index.values.get("boundary_ratio") is None:
        return "Wan2.1", _WAN21
    if index.class_name == IMAGE_TO_VIDEO:
        return "Wan2.2-I2V-A14B", I2V_A14B
    return "Wan2.2-T2V-A14B", _T2V_A14B


def title(index: PipelineIndex) -> str:
    """Return a pipeline's title for a model card."""
    is_later = has_timestep_by_token(index) or index.values.get("boundary_ratio") is not None
    kinds = {IMAGE_TO_VIDEO: "image-to-video", TEXT_TO_VIDEO: "text-to-video", VACE: "VACE", ANIMATE: "Animate"}
    return f"Wan{'2.2' if is_later or index.class_name == ANIMATE else '2.1'} {kinds[index.class_name]} pipeline"


DISTILLED: Mapping[str, Any] = {"guidance_scale": 1.0, "flow_shift": 5.0}
"""The sampling of LoRAs that distil Wan to a few steps."""


def block_lists(class_name: str) -> tuple[str, ...]:
    """Return the lists of blocks of a denoiser class, in the order in which they run."""
    return ("vace_blocks", "blocks") if class_name == CLASSES[VACE] else ("blocks",)


def shortened(denoiser: Config, num_blocks: int) -> dict[str, Any]:
    """Return a config with at most so many blocks; all of VACE's, since its hints belong to certain
    blocks.
    """
    if "vace_layers" in denoiser:
        return dict(denoiser)
    num_layers = min(num_blocks, int(denoiser["num_layers"]))
    changed = {**denoiser, "num_layers": num_layers}
    if (between := denoiser.get("inject_face_latents_blocks")) is not None:  # a face adapter follows the first block
        changed["inject_face_latents_blocks"] = min(num_layers, between)
    return changed
