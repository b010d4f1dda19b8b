"""A check that the disk has room for an evaluation, before anything is generated.

Every number is a bound: lossless video of noise takes more than its raw size, and tests hold the
bounds to noise.
"""

import shutil
from collections.abc import Sequence

from tempoquant.device import compute_dtype
from tempoquant.errors import OutputError
from tempoquant.evaluate.evaluation_folder import EvaluationFolder
from tempoquant.evaluate.plan import Plan
from tempoquant.models.sampling_settings import SamplingSettings

_LOSSLESS_SHARE = 1.2  # FFV1 of its raw size: noise takes 1.11, black and white 1.14
_MP4_BYTES_PER_PIXEL = 1.0  # x264 at our quality: 0.75 for noise, 0.85 for black and white; under 0.1 for films
_CONTAINER_BYTES, _FRAME_BYTES = 4096, 512  # Matroska and MP4: headers and indices, and the addition of each frame
_TAKE_BYTES = 2**14  # lines in the manifest, the metrics and evaluation.json; a file's header
_MODEL_BYTES = 2**20  # layer maps, once alone and once in evaluation.json


def check_space(folder: EvaluationFolder, plan: Plan, labels: Sequence[str], keeps_calls: bool) -> None:
    """Raise OutputError if the remaining generations may need more than the free space on the disk.

    Args:
        folder: claimed.
        labels: of all models, the reference first.
        keeps_calls: whether the reference's transformer calls are kept for layer maps.
    """
    missing = _missing_takes(folder, plan, labels)
    needed, free = missing_bytes(folder, plan, labels, keeps_calls), shutil.disk_usage(folder.path).free
    if needed > free:
        raise OutputError(
            f"{missing} videos are still to be generated, which with their latents take up to {_size(needed)}, and the "
            f"disk of {folder.path} has {_size(free)} free: free some, give another folder with -o, or ask for fewer "
            "items or seeds."
        )


def missing_bytes(folder: EvaluationFolder, plan: Plan, labels: Sequence[str], keeps_calls: bool) -> int:
    """Bound the bytes that will be added to the folder; 0 once every take exists. Arguments are as
    in `check_space`.
    """
    num_missing = _missing_takes(folder, plan, labels)
    if not num_missing:
        return 0
    settings = plan.settings
    images = sum(item.image is not None and not folder.image(item.id).is_file() for item in plan.items)
    calls = sum(not folder.calls(*mapped).is_file() for mapped in plan.mapped_takes) if keeps_calls else 0
    return round(
        num_missing * (_latents_bytes(plan) + video_bytes(settings) + _TAKE_BYTES)
        + images * image_bytes(settings)
        + calls * _calls_bytes(plan)
        + len(labels) * _MODEL_BYTES
    )


def video_bytes(settings: SamplingSettings) -> float:
    """Bound the bytes of one video, as FFV1 and as H.264."""
    pixels = settings.num_frames * settings.height * settings.width
    containers = 2 * (_CONTAINER_BYTES + settings.num_frames * _FRAME_BYTES)
    return pixels * (3 * _LOSSLESS_SHARE + _MP4_BYTES_PER_PIXEL) + containers


def image_bytes(settings: SamplingSettings) -> float:
    """Bound the bytes of one first frame as PNG: deflate stores incompressible data, and each row
    has a filter byte.
    """
    return 1.01 * settings.height * (3 * settings.width + 1) + _CONTAINER_BYTES


def _missing_takes(folder: EvaluationFolder, plan: Plan, labels: Sequence[str]) -> int:
    done = {take for take, line in folder.takes().items() if not line.get("failed")}
    return sum(take not in done for label in labels for _, take in plan.takes(label))


def _latents_bytes(plan: Plan) -> int:
    """Count the bytes of one take: a float32 latent after each timestep bin."""
    reference = plan.reference
    channels = reference.family.latent_channels(reference.first.config)
    return len(plan.bin_names) * reference.geometry.num_latents(plan.settings) * channels * 4


def _calls_bytes(plan: Plan) -> int:
    """Count the bytes of one take: latents with their condition and the text, in the denoisers'
    compute dtype; a timestep.
    """
    settings, reference = plan.settings, plan.reference
    first = reference.denoiser_names[0]
    sizes = reference.sample_sizes(first, settings.height, settings.width, settings.num_frames)
    values = sizes.video_values + sizes.text_values
    return len(plan.mapped_steps) * (values * compute_dtype(plan.device).itemsize + 8) + _TAKE_BYTES


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
