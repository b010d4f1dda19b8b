"""The measures of a video: a table of functions, each of a clip and the reference's clip of the
same item and seed.

Decibels of equal things are infinite, which no mean can hold: CEILING_DB replaces them, and
everything beyond.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tempoquant.evaluate.metrics import vmaf
from tempoquant.evaluate.metrics.prompt_adherence import check_prompt, parse_prompt
from tempoquant.evaluate.metrics.video_metrics import SSIM_WINDOW, Video, psnr_db, ssim, temporal_flickering
from tempoquant.sqnr import sqnr_db
from tempoquant.tiny.world import FRAME_SIZE, NUM_FRAMES

CEILING_DB = 100.0

Value = float | bool | dict[str, float] | None


@dataclass(frozen=True, eq=False)
class Clip:
    """The outputs of one take.

    Attributes:
        text: the prompt.
        video: its frames.
        file: the same, lossless.
        latents: the latent at the end of each timestep bin, in sampling order: the last one is the
            final latent.
        embeddings: of the prompt, if a text encoder is quantized.
    """

    text: str
    video: Video
    file: Path
    latents: Mapping[str, torch.Tensor]
    embeddings: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
        names: of its metrics.
        of: a clip and the reference's to the values by name.
        against_reference: whether it is a distance from the reference's clip, so that the reference
            has none.
    """

    names: tuple[str, ...]
    of: Callable[[Clip, Clip], Mapping[str, Value]]
    against_reference: bool = True


@dataclass(frozen=True)
class Metric:
    """The form of a metric: the unit after its number, and its digits."""

    words: str
    unit: str = ""
    digits: int = 3


METRICS = {
    "psnr_db": Metric("PSNR", " dB", 2),
    "ssim": Metric("SSIM"),
    "vmaf": Metric("VMAF", "", 1),
    "vmaf_neg": Metric("VMAF-NEG", "", 1),
    "temporal_flickering": Metric("temporal flickering", "", 4),
    "final_latent_db": Metric("SQNR of the final latent", " dB", 2),
    "sqnr_db": Metric("SQNR of the latent", " dB", 2),
    "embedding_db": Metric("SQNR of the text's embeddings", " dB", 2),
    "motion_followed": Metric("motion followed", "", 2),
    "appearance_kept": Metric("appearance kept", "", 2),
}
"""Every metric in the order of reports."""


def measures(bundled: bool, height: int, width: int, with_embeddings: bool = False) -> tuple[Measure, ...]:
    """Return the measures that can be taken here.

    Args:
        bundled: whether the items are of the bundled world, where pixels show whether a prompt was
            followed.
        height, width: of the videos.
        with_embeddings: whether clips have those of their prompts.
    """
    found = [
        Measure(("psnr_db",), lambda clip, reference: {"psnr_db": _capped(psnr_db(reference.video, clip.video))}),
        Measure(
            ("temporal_flickering",),
            lambda clip, _: {"temporal_flickering": temporal_flickering(clip.video)},
            against_reference=False,
        ),
        Measure(("final_latent_db", "sqnr_db"), _latents),
    ]
    if min(height, width) >= SSIM_WINDOW:
        found.append(Measure(("ssim",), lambda clip, reference: {"ssim": ssim(reference.video, clip.video)}))
    if vmaf.has_libvmaf() and min(height, width) >= vmaf.SMALLEST:
        found.append(Measure(("vmaf", "vmaf_neg"), lambda clip, ref: vmaf.vmaf(ref.file, clip.file)._asdict()))
    if with_embeddings:
        found.append(Measure(("embedding_db",), _embeddings))
    if bundled:
        found.append(Measure(("motion_followed", "appearance_kept"), _adherence, against_reference=False))
    return tuple(found)


def notes(height: int, width: int) -> list[str]:
    """Return notes for readers of the metrics."""
    found = [
        "PSNR, SSIM, VMAF and the latents' SQNR say how close a video is to the reference's, not how good it is: two "
        "good videos of one prompt and seed can differ.",
        f"Decibels are capped at {CEILING_DB:g}, which equal videos or latents get.",
    ]
    if not vmaf.has_libvmaf():
        found.append(vmaf.MISSING)
    elif min(height, width) < vmaf.SMALLEST:
        found.append(vmaf.TOO_SMALL)
    elif min(height, width) < vmaf.SMALLEST_MEANINGFUL:
        found.append(vmaf.SMALL)
    return found


def take_measures(which: Sequence[Measure], clip: Clip, reference: Clip | None) -> dict[str, Any]:
    """Measure all values of a clip by name; with None for the reference's clip, those of the
    reference itself.
    """
    found: dict[str, Any] = {}
    for measure in which:
        if reference is not None:
            found.update(measure.of(clip, reference))
        elif not measure.against_reference:
            found.update(measure.of(clip, clip))
    return found


def names_of(which: Sequence[Measure], is_reference: bool) -> list[str]:
    """Return the names of all values that `take_measures` returns."""
    return [name for measure in which if not (is_reference and measure.against_reference) for name in measure.names]


def _latents(clip: Clip, reference: Clip) -> dict[str, Value]:
    by_bin = {name: _capped(sqnr_db(latent, clip.latents[name])) for name, latent in reference.latents.items()}
    return {"final_latent_db": list(by_bin.values())[-1], "sqnr_db": by_bin}


def _embeddings(clip: Clip, reference: Clip) -> dict[str, Value]:
    """Return the SQNR of the embedding that lost most."""
    found = [sqnr_db(embedding, clip.embeddings[name]) for name, embedding in reference.embeddings.items()]
    return {"embedding_db": _capped(min(found))}


def _adherence(clip: Clip, _: Clip) -> dict[str, Value]:
    """Judge adherence; None if the video's size differs from the bundled world's, or the prompt
    describes another world.
    """
    nothing: dict[str, Value] = {"motion_followed": None, "appearance_kept": None}
    if clip.video.shape != (NUM_FRAMES, FRAME_SIZE, FRAME_SIZE, 3):
        return nothing
    try:
        parse_prompt(clip.text)
    except ValueError:
        return nothing
    found = check_prompt(clip.video, clip.text)
    return {"motion_followed": found.motion_followed, "appearance_kept": found.appearance_kept}


def _capped(decibels: float) -> float:
    return max(-CEILING_DB, min(CEILING_DB, decibels))
