"""Laws of `accelerate`: it says what it chose, comes off without a trace, and refuses by name what
cannot be.
"""

from collections.abc import Iterator

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

import tempoquant
from tempoquant.acceleration import accelerate
from tempoquant.acceleration.accelerate import acceleration_of
from tempoquant.acceleration.cache_settings import CacheSettings
from tempoquant.acceleration.choices import Choices
from tempoquant.acceleration.speeds import SPEEDS
from tempoquant.errors import SettingsError, UnsupportedError
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.placement.memory_modes import set_memory_mode
from tests.acceleration.test_step_cache import OFTEN, RATIOS, video
from tests.recorded import SOURCE


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(SOURCE, "cpu")


@pytest.fixture
def plain(pipeline) -> Iterator[object]:
    yield pipeline
    if (in_force := acceleration_of(pipeline)) is not None:
        in_force.remove()
    assert traces(pipeline) == []


def traces(pipeline) -> list[str]:
    """Return what is left on a pipeline's denoisers, without the bin clocks of quantized ones."""
    models = {name: getattr(pipeline, component) for name, component in COMPONENTS.items()}
    return [
        f"{name}.{inner}"
        for name, model in models.items()
        for inner, module in model.named_modules()
        if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
        or getattr(getattr(module, "processor", None), "_attention_backend", None) is not None
    ]  # fmt: skip


@pytest.mark.parametrize("speed", SPEEDS)
def test_every_speed_comes_off_bit_for_bit(plain, speed):
    before = video(plain)
    in_force = tempoquant.accelerate(plain, speed, magnitude_ratios=RATIOS)
    assert acceleration_of(plain) is in_force
    during = video(plain)
    assert torch.equal(during, before) == (speed == "exact")
    in_force.remove()
    assert traces(plain) == [] and acceleration_of(plain) is None
    assert torch.equal(video(plain), before)


def test_it_says_what_it_chose_and_what_to_expect(plain):
    in_force = accelerate(plain, "fast", magnitude_ratios=RATIOS)
    found = in_force.to_dict()
    assert found["attention"] == "native" and found["cache"].startswith("magcache") and not found["compiled"]
    assert "on a CPU PyTorch's own attention is the only one" in str(in_force)
    assert "skip their blocks" in str(in_force) and "(counted)" in str(in_force)
    assert in_force.calls_in_words() == ""
    video(plain)
    assert "denoiser calls skipped their blocks" in in_force.calls_in_words()


def test_another_call_replaces_what_is_in_force(plain):
    accelerate(plain, "fast", magnitude_ratios=RATIOS)
    second = accelerate(plain, "exact", cache="firstblock")
    assert second.cache.settings.name == "firstblock"
    second.remove()


def test_an_attention_backend_is_the_denoisers_alone(plain):
    before = video(plain)
    active = _AttentionBackendRegistry.get_active_backend()
    in_force = accelerate(plain, "exact", attention="_native_math")
    assert _AttentionBackendRegistry.get_active_backend() == active
    assert len(traces(plain)) > 0
    torch.testing.assert_close(video(plain), before, rtol=1e-3, atol=1e-3)
    in_force.remove()


@pytest.mark.parametrize("mode", ["resident", "swap", "lean"])
def test_a_cache_skips_in_every_memory_mode_what_it_skips_without(plain, mode):
    cached = accelerate(plain, "exact", cache=OFTEN["magcache"], magnitude_ratios=RATIOS)
    wanted, counts = video(plain), cached.cache.counts
    cached.remove()
    in_force = set_memory_mode(plain, mode, "cpu")
    cached = accelerate(plain, "exact", cache=OFTEN["magcache"], magnitude_ratios=RATIOS)
    assert torch.equal(video(plain), wanted)
    assert cached.cache.counts == counts and all(each.skipped > 0 for each in counts.values())
    cached.remove()
    in_force.remove()


def test_what_cannot_be_is_refused_by_name_and_leaves_nothing(plain):
    for arguments, error, match in [
        ({"speed": "slow"}, SettingsError, "a speed is one of exact, fast, fastest, not 'slow'"),
        ({"cache": "teacache"}, SettingsError, "a cache is one of magcache, firstblock, taylorseer, none"),
        ({"attention": "sagest"}, SettingsError, "no attention backend 'sagest'"),
        ({"attention": "sage"}, UnsupportedError, "sage needs a CUDA GPU"),
        ({"speed": "fast"}, UnsupportedError, "high_noise has none"),
    ]:
        with pytest.raises(error, match=match):
            accelerate(plain, **arguments)
        assert traces(plain) == [] and acceleration_of(plain) is None
    with pytest.raises(UnsupportedError, match="--compile and --memory lean cannot be combined"):
        Choices("exact", asked_compile=True).require_possible("lean")
    with pytest.raises(UnsupportedError, match="--compile and --cache taylorseer cannot be combined"):
        Choices("exact", None, CacheSettings("taylorseer"), True).require_possible(None)
