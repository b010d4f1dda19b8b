"""Laws of magnitude ratios: what is stored is read back, other schedules lie on the same curve,
nothing is made up.
"""

import json
import math

import pytest

from tempoquant.checkpoint.magnitude_ratios import NOT_RECORDED, MagnitudeRatios
from tempoquant.errors import CheckpointError

TIMESTEPS = (1000.0, 800.0, 600.0, 400.0)
RATIOS = MagnitudeRatios(TIMESTEPS, {"conditional": (1.0, 1.2, 0.9, 0.5), "unconditional": (1.0, 1.0, 1.0, 1.0)})


def test_what_is_written_is_read_back():
    assert MagnitudeRatios.from_dict(json.loads(json.dumps(RATIOS.to_dict()))) == RATIOS


def test_the_recorded_schedule_gets_the_recorded_ratios():
    assert RATIOS.at("conditional", TIMESTEPS) == pytest.approx([1.0, 1.2, 0.9, 0.5], rel=1e-12)


def test_a_step_twice_as_long_has_the_product_of_two_ratios_and_half_a_step_its_root():
    assert RATIOS.at("conditional", [1000.0, 600.0]) == pytest.approx([1.0, 1.2 * 0.9])
    assert RATIOS.at("conditional", [600.0, 500.0, 400.0]) == pytest.approx([1.0, math.sqrt(0.5), math.sqrt(0.5)])


def test_what_was_not_recorded_is_no_small_change():
    assert RATIOS.at("conditional", [1000.0, 400.0, 200.0])[-1] == NOT_RECORDED
    only = MagnitudeRatios(TIMESTEPS, {"conditional": (1.0,) * 4})
    assert only.at("unconditional", TIMESTEPS) == [NOT_RECORDED] * 4


def test_the_mean_is_over_the_prompts_that_came_so_far():
    prompts = [{"conditional": [1.0, 1.2, 0.8]}, {"conditional": [1.0, 1.4]}, {}]
    mean = MagnitudeRatios.mean_of(prompts, TIMESTEPS)
    assert mean is not None and mean.timesteps == TIMESTEPS[:3]
    assert mean.by_branch["conditional"] == pytest.approx((1.0, 1.3, 0.8))
    assert MagnitudeRatios.mean_of([{}, {}], TIMESTEPS) is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"timesteps": [400.0, 600.0, 800.0, 1000.0]}, "timesteps fall"),
        ({"conditional": [1.0, 1.2]}, "conditional is a ratio above 0 for each timestep"),
        ({"conditional": [1.0, -1.0, 1.0, 1.0]}, "conditional is a ratio above 0"),
        ({"conditional": "abcd"}, "conditional is a list"),
        ({"conditional": [1.0, math.nan, 1.0, 1.0]}, "conditional is a list"),
        ({"guided": [1.0] * 4}, "unknown key"),
    ],
)
def test_a_damaged_record_is_refused_by_the_name_of_its_key(change, match):
    with pytest.raises(CheckpointError, match=match):
        MagnitudeRatios.from_dict({**RATIOS.to_dict(), **change})
