import math

import pytest
import torch

from tempoquant.calibrate.sample import CalibrationSample, RecordedCall
from tempoquant.errors import ModelError
from tempoquant.evaluate.noise_prediction import CallError, call_errors, summarize
from tempoquant.timesteps import TimestepBins


def call(denoiser: str, timestep: float, prompt_id: str = "p0") -> RecordedCall:
    prediction = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(int(timestep)))
    inputs = {"hidden_states": prediction.clone()}
    return RecordedCall(CalibrationSample(prompt_id, denoiser, timestep, 0, "conditional", inputs), prediction)


CALLS = [call("high_noise", 950.0), call("low_noise", 500.0), call("low_noise", 100.0)]


def repeat(sample: CalibrationSample) -> torch.Tensor:
    """Return a model's noise prediction that equals its input, as in CALLS."""
    return sample.inputs["hidden_states"]


def test_a_model_that_repeats_the_reference_has_no_error():
    errors = call_errors(repeat, CALLS)
    assert [error.sqnr_db for error in errors] == [math.inf] * 3


def test_an_error_of_a_tenth_of_the_amplitude_is_twenty_decibels():
    errors = call_errors(lambda s: 1.1 * repeat(s), CALLS)
    assert [error.sqnr_db for error in errors] == pytest.approx([20.0] * 3, abs=1e-3)


def test_every_call_is_fed_the_recorded_inputs_and_reported():
    seen, done = [], []
    call_errors(lambda s: (seen.append(s), repeat(s))[1], CALLS, lambda: done.append(None))
    assert seen == [call.sample for call in CALLS]
    assert len(done) == len(CALLS)


def test_a_prediction_that_is_not_finite_names_the_call():
    with pytest.raises(ModelError, match="high_noise at timestep 950 of prompt 'p0'"):
        call_errors(lambda s: repeat(s) * math.nan, CALLS)


def test_experts_and_bins_are_summarized_apart():
    errors = [
        CallError("p0", "high_noise", 950.0, 30.0),
        CallError("p0", "low_noise", 500.0, 20.0),
        CallError("p0", "low_noise", 100.0, 10.0),
    ]
    found = summarize(errors, {"high_noise": TimestepBins(), "low_noise": TimestepBins((500.0,))})
    rows = [(each.denoiser, each.bin_index, each.sqnr_db.mean, each.timesteps) for each in found]
    assert rows == [
        ("high_noise", None, 30.0, (950.0, 950.0)),
        ("low_noise", None, 15.0, (100.0, 500.0)),
        ("low_noise", 0, 10.0, (100.0, 100.0)),
        ("low_noise", 1, 20.0, (500.0, 500.0)),  # an edge belongs to the noisier bin
    ]


def test_each_prompt_counts_once_however_many_calls_it_has():
    errors = [CallError("p0", "high_noise", 950.0, 10.0) for _ in range(9)]
    errors.append(CallError("p1", "high_noise", 950.0, 20.0))
    [found] = summarize(errors)
    assert found.sqnr_db.mean == 15.0
    assert found.sqnr_db.num_values == 2
    assert found.num_calls == 10


def test_bins_and_experts_without_a_call_are_absent():
    bins = {"low_noise": TimestepBins((50.0, 900.0))}
    found = summarize([CallError("p0", "low_noise", 500.0, 10.0)], bins)
    assert [(each.denoiser, each.bin_index) for each in found] == [("low_noise", None), ("low_noise", 1)]
