"""Costs of a generation, on the bundled model."""

from types import SimpleNamespace

import pytest
import torch

from tempoquant.evaluate.run_costs import PHASES, RunCosts, measuring_costs
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import generate_video
from tests.recorded import PROMPTS, SETTINGS, SOURCE


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(SOURCE, "cpu")


def watched(pipeline):
    """Return the methods that are replaced."""
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


def test_the_gpu_that_computes_is_measured_also_while_all_weights_are_in_host_memory(monkeypatch):
    """The weights are as in the memory mode `swap` before the first denoiser is called. Functions
    replace CUDA.
    """
    asked = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 2**30 * len(asked))
    gpu = torch.device("cuda", 1)

    class Pipeline:
        _execution_device, device = gpu, torch.device("cpu")
        vae = SimpleNamespace(decode=lambda: None)
        encode_prompt = prepare_latents = staticmethod(lambda: None)

    pipeline = Pipeline()
    with measuring_costs(pipeline) as costs:
        pipeline.encode_prompt()
        pipeline.prepare_latents()
        pipeline.vae.decode()
    assert set(asked) == {gpu}
    assert tuple(costs.peak_gpu_gib) == PHASES
    assert sorted(costs.peak_gpu_gib.values()) == list(costs.peak_gpu_gib.values()), "a phase has another one's peak"


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
