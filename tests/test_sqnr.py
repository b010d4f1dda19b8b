import math

import pytest
import torch

from tempoquant.errors import ModelError
from tempoquant.sqnr import sqnr_db


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_error(reference: torch.Tensor, error_db: float) -> torch.Tensor:
    """Return the reference plus an error whose power is exactly `error_db` below its own."""
    error = noise(*reference.shape, seed=1)
    return reference + error * (reference.norm() / error.norm()) * 10 ** (-error_db / 20)


def test_equal_tensors_have_an_infinite_ratio():
    reference = noise(7, 5)
    assert sqnr_db(reference, reference.clone()) == math.inf
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == math.inf


@pytest.mark.parametrize("error_db", [-10.0, 0.0, 20.0, 60.0])
def test_an_error_of_known_power_is_measured_as_such(error_db):
    reference = noise(7, 5)
    assert sqnr_db(reference, with_error(reference, error_db)) == pytest.approx(error_db, abs=1e-9)


def test_scaling_or_permuting_both_changes_nothing():
    reference = noise(7, 5)
    other = with_error(reference, 12.0)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    assert sqnr_db(-1e-3 * reference, -1e-3 * other) == pytest.approx(12.0, abs=1e-9)
    assert sqnr_db(reference[order], other[order]) == pytest.approx(12.0, abs=1e-9)


def test_halving_the_error_gains_six_decibels():
    reference = noise(7, 5)
    other = with_error(reference, 12.0)
    closer = reference + (other - reference) / 2
    assert sqnr_db(reference, closer) - sqnr_db(reference, other) == pytest.approx(20 * math.log10(2), abs=1e-9)


def test_a_silent_reference_is_infinitely_bad():
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf


def test_half_precision_powers_do_not_overflow():
    reference = torch.full((4,), 6e4, dtype=torch.float16)  # 6e4² is beyond float16
    assert math.isfinite(sqnr_db(reference, reference * 0.5))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_an_error(value):
    with pytest.raises(ModelError, match="NaN or infinity"):
        sqnr_db(torch.ones(3), torch.tensor([1.0, value, 1.0]))


def test_tensors_of_other_shapes_are_refused():
    with pytest.raises(ModelError, match="differ in shape"):
        sqnr_db(torch.ones(3), torch.ones(1, 3))
