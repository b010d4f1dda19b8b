"""The results of an evaluation, as frozen values: summaries of numbers, results of one model, a
whole comparison.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempoquant.errors import ModelError
from tempoquant.plain_values import fields_of, plain


@dataclass(frozen=True)
class Summary:
    """A summary of a sample of numbers.

    Attributes:
        mean: infinite if a value is (equal tensors have an infinite SQNR).
        standard_deviation: of the sample (n − 1); None for fewer than two values or if a value is
            infinite.
        standard_error: standard deviation / √n; None likewise.
        num_values: n.
    """

    mean: float
    standard_deviation: float | None
    standard_error: float | None
    num_values: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Summarize at least one number. Raises ModelError for none, for NaN, and for +inf beside
        −inf.
        """
        if not values:
            raise ModelError("there is nothing to summarize: no value was measured.")
        mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else sum(values)
        if math.isnan(mean):
            raise ModelError(f"a measurement is not a number: {list(values)}.")
        if len(values) < 2 or math.isinf(mean):
            return cls(mean, None, None, len(values))
        deviation = statistics.stdev(values)
        return cls(mean, deviation, deviation / math.sqrt(len(values)), len(values))

    def text(self, digits: int = 1) -> str:
        """Write mean ± standard deviation, such as "21.3 ± 0.4"."""
        if math.isinf(self.mean):
            return "identical" if self.mean > 0 else "−inf"
        spread = "" if self.standard_deviation is None else f" ± {self.standard_deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class NoisePredictionError:
    """The accuracy of one denoiser's noise prediction, over all its timesteps or inside one
    timestep bin.

    Attributes:
        denoiser: the denoiser's name.
        bin_index: the timestep bin, 0 the cleanest; None for all of the denoiser's timesteps.
        timesteps: lowest and highest timestep that was measured.
        sqnr_db: one value per prompt (the mean over its calls: calls of one prompt are no
            independent samples).
        num_calls: transformer calls in all.
    """

    denoiser: str
    bin_index: int | None
    timesteps: tuple[float, float]
    sqnr_db: Summary
    num_calls: int


@dataclass(frozen=True)
class VideoResult:
    """One generated video.

    Attributes:
        prompt_id: its prompt.
        psnr_db, ssim: against the reference's video of the same seed; None for the reference
            itself.
        motion_followed, appearance_kept: whether the video follows the prompt; None for prompts
            outside the bundled world.
    """

    prompt_id: str
    psnr_db: float | None = None
    ssim: float | None = None
    motion_followed: bool | None = None
    appearance_kept: bool | None = None


@dataclass(frozen=True)
class ModelResult:
    """All measurements of one model.

    Attributes:
        label: its name in tables and pictures.
        folder: its location.
        bits_per_weight: of the linears of all denoisers' blocks, scales and branch included; 16 for
            the reference.
        num_bytes: of the denoisers on disk.
        noise_prediction: per denoiser and per bin; empty for the reference.
        videos: one per prompt, in the order of the prompts.
        embedding_db: SQNR of the prompts' embeddings against the reference's; None if no text
            encoder is quantized.
    """

    label: str
    folder: str
    bits_per_weight: float
    num_bytes: int
    noise_prediction: tuple[NoisePredictionError, ...]
    videos: tuple[VideoResult, ...]
    embedding_db: Summary | None = None

    @property
    def psnr_db(self) -> Summary | None:
        """Return PSNR over the videos; None for the reference."""
        return _summary([video.psnr_db for video in self.videos])

    @property
    def ssim(self) -> Summary | None:
        """Return SSIM over the videos; None for the reference."""
        return _summary([video.ssim for video in self.videos])

    @property
    def motion_followed(self) -> Summary | None:
        """Return the share of videos that follow the motion; None outside the bundled world."""
        return _summary([video.motion_followed for video in self.videos])

    @property
    def appearance_kept(self) -> Summary | None:
        """Return the share of videos that keep the appearance; None outside the bundled world."""
        return _summary([video.appearance_kept for video in self.videos])

    def denoiser_sqnr_db(self, denoiser: str) -> Summary | None:
        """Return the SQNR over all timesteps of one denoiser; None if it was not measured."""
        found = [e.sqnr_db for e in self.noise_prediction if e.denoiser == denoiser and e.bin_index is None]
        return found[0] if found else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the summaries; missing measurements are absent."""
        summaries = {key: getattr(self, key) for key in ("psnr_db", "ssim", "motion_followed", "appearance_kept")}
        return plain({**fields_of(self), **summaries})


@dataclass(frozen=True)
class Comparison:
    """A reference and the models compared with it, on the same prompts, seed and settings.

    Attributes:
        reference: the first model; its own row has prompt adherence only.
        models: the others.
        prompts: prompt id to prompt text, held out from calibration.
        seed: of every generation.
        settings: how videos were sampled, as plain values.
    """

    reference: ModelResult
    models: tuple[ModelResult, ...]
    prompts: Mapping[str, str]
    seed: int
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "prompts": dict(self.prompts),
            "seed": self.seed,
            "settings": plain(dict(self.settings)),
            "reference": self.reference.to_dict(),
            "models": [model.to_dict() for model in self.models],
        }


def _summary(values: Sequence[float | bool | None]) -> Summary | None:
    measured = [float(value) for value in values if value is not None]
    return Summary.of(measured) if measured else None
