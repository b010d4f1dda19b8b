"""SQNR of the noise prediction, teacher-forced on the reference's trajectory.

The quantized denoiser repeats every recorded call *on the reference's inputs*, so that errors of
earlier steps do not add up and each timestep is judged alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tempoquant.calibrate.sample import CalibrationSample, RecordedCall
from tempoquant.errors import ModelError
from tempoquant.evaluate.results import NoisePredictionError, Summary
from tempoquant.sqnr import sqnr_db
from tempoquant.timesteps import TimestepBins

Predict = Callable[[CalibrationSample], torch.Tensor]


@dataclass(frozen=True)
class CallError:
    """The error of one transformer call."""

    prompt_id: str
    denoiser: str
    timestep: float
    sqnr_db: float


def call_errors(
    predict: Predict, calls: Iterable[RecordedCall], on_call: Callable[[], None] = lambda: None
) -> list[CallError]:
    """Repeat each recorded call and compare it with the recorded 16-bit prediction.

    Args:
        predict: runs the model under test on the inputs of one sample; returns the shape of the
            call's `noise_prediction`.
        calls: recorded from the reference.
        on_call: called after each one.

    Raises:
        ModelError: a prediction is not finite or of another shape; it names the call.
    """
    errors = []
    for call in calls:
        sample = call.sample
        where = f"{sample.denoiser} at timestep {sample.timestep:g} of prompt {sample.prompt_id!r}"
        try:
            value = sqnr_db(call.noise_prediction, predict(sample))
        except ModelError as error:
            raise ModelError(f"{where}: {error}") from error
        errors.append(CallError(sample.prompt_id, sample.denoiser, sample.timestep, value))
        on_call()
    return errors


def summarize(
    errors: Sequence[CallError], bins: Mapping[str, TimestepBins] | None = None
) -> tuple[NoisePredictionError, ...]:
    """Summarize per denoiser (all timesteps first, then several bins from clean to noisy), high
    noise first.

    Each prompt counts once: its value is the mean over its calls. Denoisers and bins without a call
    are left out.
    """
    found = []
    noisiest: dict[str, float] = {}
    for error in errors:
        noisiest[error.denoiser] = max(error.timestep, noisiest.get(error.denoiser, 0.0))
    for denoiser in sorted(noisiest, key=noisiest.__getitem__, reverse=True):
        of_denoiser = [error for error in errors if error.denoiser == denoiser]
        found.append(_summary_of(of_denoiser, denoiser, None))
        denoiser_bins = (bins or {}).get(denoiser, TimestepBins())
        for bin_index in range(denoiser_bins.num_bins) if denoiser_bins.num_bins > 1 else ():
            in_bin = [error for error in of_denoiser if denoiser_bins.of(error.timestep) == bin_index]
            if in_bin:
                found.append(_summary_of(in_bin, denoiser, bin_index))
    return tuple(found)


def _summary_of(errors: Sequence[CallError], denoiser: str, bin_index: int | None) -> NoisePredictionError:
    by_prompt: dict[str, list[float]] = {}
    for error in errors:
        by_prompt.setdefault(error.prompt_id, []).append(error.sqnr_db)
    timesteps = [error.timestep for error in errors]
    return NoisePredictionError(
        denoiser=denoiser,
        bin_index=bin_index,
        timesteps=(min(timesteps), max(timesteps)),
        sqnr_db=Summary.of([Summary.of(values).mean for values in by_prompt.values()]),
        num_calls=len(errors),
    )
