"""Costs of a generation, on the bundled model."""

import pytest

from tempoquant.evaluate.run_costs import PHASES, RunCosts, measuring_costs
from tempoquant.integrations.sampling import generate_video
from tempoquant.integrations.wan import load_pipeline
from tests.recorded import PROMPTS, SETTINGS, TINY


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(TINY, "cpu")


def watched(pipeline):
    """Methods that are replaced."""
    return {"encode_prompt", "prepare_latents", "decode"} & (set(vars(pipeline)) | set(vars(pipeline.vae)))


def test_phases_come_in_their_order_and_nothing_is_left_on_the_pipeline(pipeline, monkeypatch):
    entered = []
    original = RunCosts.enter
    monkeypatch.setattr(RunCosts, "enter", lambda self, phase: (entered.append(phase), original(self, phase))[1])
    with measuring_costs(pipeline) as costs:
        assert watched(pipeline) == {"encode_prompt", "prepare_latents", "decode"}
        generate_video(pipeline, PROMPTS[0], SETTINGS, 0, on_step=costs.step)
    assert tuple(phase for phase in entered if phase) == PHASES
    assert watched(pipeline) == set()
    assert 0 < costs.record()["seconds_per_step"] < 60
    assert costs.record()["peak_gpu_gib"] is None


def test_an_error_leaves_nothing_on_the_pipeline_either(pipeline):
    with pytest.raises(ZeroDivisionError), measuring_costs(pipeline):
        raise ZeroDivisionError
    assert watched(pipeline) == set()


def test_peak_rss_is_of_this_generation_alone(pipeline):
    with measuring_costs(pipeline) as costs:
        block = b"x" * (300 * 2**20)
        del block
    with measuring_costs(pipeline) as later:
        pass
    if costs.peak_rss_gib is None:
        pytest.skip("this system cannot forget an earlier peak")
    assert costs.peak_rss_gib - later.peak_rss_gib > 0.25
