"""Laws of caches of steps: where nothing is skipped nothing changes, and no state outlives what it
belongs to.
"""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from tempoquant.acceleration.cache_settings import CACHES, CacheSettings, skipped_steps
from tempoquant.acceleration.step_cache import StepCache
from tempoquant.checkpoint.magnitude_ratios import MagnitudeRatios
from tempoquant.errors import SettingsError, UnsupportedError
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import sample_latents
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.schedule import sampling_steps
from tempoquant.models.wan.family import COMPONENTS
from tests.recorded import PROMPTS, SOURCE
from tests.wan_pipelines import vace

NEVER = {
    "magcache": CacheSettings("magcache", max_skip_steps=0),
    "firstblock": CacheSettings("firstblock", threshold=0.0),
    "taylorseer": CacheSettings("taylorseer", interval=1),
}
OFTEN = {
    "magcache": CacheSettings("magcache", threshold=10.0, max_skip_steps=2, retention_ratio=0.0),
    "firstblock": CacheSettings("firstblock", threshold=10.0),
    "taylorseer": CacheSettings("taylorseer", interval=3),
}
NUM_STEPS = 8
SETTINGS = SamplingSettings(32, 32, 5, NUM_STEPS, 2.5, 5.0, 8)
TIMESTEPS = {
    name: [float(s.timestep) for s in sampling_steps(SOURCE, SETTINGS) if s.denoiser == name] for name in COMPONENTS
}
RATIOS = {
    name: MagnitudeRatios(
        tuple(each), {"conditional": (1.0,) + (1.01,) * (len(each) - 1), "unconditional": (1.0,) * len(each)}
    )
    for name, each in TIMESTEPS.items()
}


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(SOURCE, "cpu")


@pytest.fixture
def plain(pipeline) -> Iterator[object]:
    yield pipeline
    models = [getattr(pipeline, name) for name in COMPONENTS.values()]
    cached = [model.disable_cache() for model in models if model.is_cache_enabled]  # or the next test would fail, too
    assert not cached
    assert not any("forward" in module.__dict__ for model in models for module in model.modules())


def video(pipeline, prompt: int = 0, seed: int = 0, on_step=lambda: None, settings=SETTINGS) -> torch.Tensor:
    texts = {"prompt": PROMPTS[prompt].text, "negative_prompt": ""}
    return sample_latents(pipeline, PROMPTS[prompt], settings, seed, texts, on_step=on_step)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_skips_nothing_changes_no_bit(plain, name):
    before = video(plain)
    cache = StepCache(plain, NEVER[name], RATIOS)
    assert torch.equal(video(plain), before)
    assert all(each.skipped == 0 for each in cache.counts.values())
    assert sum(each.computed for each in cache.counts.values()) == 2 * NUM_STEPS
    cache.remove()
    assert torch.equal(video(plain), before)


@pytest.mark.parametrize("name", CACHES)
def test_the_second_video_is_what_it_is_alone_also_after_one_that_was_broken_off(plain, name):
    cache = StepCache(plain, OFTEN[name], RATIOS)
    alone = video(plain, prompt=1, seed=5)
    skipped = sum(each.skipped for each in cache.counts.values())
    assert skipped > 0
    video(plain)
    assert torch.equal(video(plain, prompt=1, seed=5), alone)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        video(plain, on_step=stop)
    assert torch.equal(video(plain, prompt=1, seed=5), alone)
    cache.remove()
    assert not torch.equal(video(plain, prompt=1, seed=5), alone)


@pytest.mark.parametrize("name", CACHES)
def test_a_denoiser_forgets_everything_once_the_other_one_runs(plain, name):
    cache = StepCache(plain, OFTEN[name], RATIOS)
    high, low = cache._denoisers
    kept, held = [], []

    def look() -> None:
        held.append((sum(bool(m._state_cache) for m in high.managers), sum(bool(m._state_cache) for m in low.managers)))
        if name == "magcache" and len(held) == 1:
            kept.append(weakref.ref(high.managers[0]._state_cache["cond"].previous_residual))

    video(plain, on_step=look)
    gc.collect()
    num_high = len(TIMESTEPS["high_noise"])
    assert all(first > 0 and second == 0 for first, second in held[:num_high])
    assert all(first == 0 and second > 0 for first, second in held[num_high:])
    assert all(reference() is None for reference in kept), "the boundary leaves a hidden state in memory"
    cache.remove()


def test_branches_of_guidance_skip_by_their_own_ratios_and_as_foretold(plain):
    """The conditional branch changes by half a percent a step, the unconditional one not at all."""
    settings = CacheSettings("magcache", threshold=0.025, max_skip_steps=3, retention_ratio=0.0)
    cache = StepCache(plain, settings, RATIOS)
    video(plain)
    for name, ratios in RATIOS.items():
        foretold = [skipped_steps(ratios.at(branch, TIMESTEPS[name]), settings) for branch in ratios.by_branch]
        assert cache.counts[name].skipped == sum(map(sum, foretold))
        assert cache.counts[name].computed == sum(len(each) - sum(each) for each in foretold)
    assert sum(skipped_steps(RATIOS["low_noise"].by_branch["conditional"], settings)) < sum(
        skipped_steps(RATIOS["low_noise"].by_branch["unconditional"], settings)
    )
    cache.remove()


def test_magcache_without_a_recording_computes_every_step(plain):
    before = video(plain)
    cache = StepCache(plain, OFTEN["magcache"], {})
    assert torch.equal(video(plain), before)
    assert all(each.skipped == 0 for each in cache.counts.values())
    cache.remove()


def test_what_a_cache_cannot_do_is_refused_by_name(plain):
    with pytest.raises(UnsupportedError, match="WanVACEPipeline changes the hidden state between its blocks"):
        StepCache(vace(), OFTEN["magcache"], {})
    cache = StepCache(plain, OFTEN["magcache"], {})
    with pytest.raises(UnsupportedError, match="high_noise has a cache already"):
        StepCache(plain, OFTEN["magcache"], {})
    cache.remove()
    with pytest.raises(SettingsError, match="a cache is one of magcache, firstblock, taylorseer, not 'teacache'"):
        CacheSettings("teacache")  # type: ignore[arg-type]
