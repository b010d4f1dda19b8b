"""Laws of recorded magnitude ratios: they are what diffusers' own calibration finds, and they reach
the checkpoint.
"""

import pytest
from diffusers import MagCacheConfig

import tempoquant
from tempoquant.acceleration import accelerate
from tempoquant.acceleration.accelerate import recorded_ratios
from tempoquant.errors import UnsupportedError
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import sample_latents
from tempoquant.models.families import facts_of
from tempoquant.models.fingerprint import fingerprint
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.recording.plan import CALIBRATION_NOISE, ModelIdentity
from tempoquant.recording.record import record
from tests.recorded import CPU, MODEL, PROMPTS, SETTINGS, SOURCE, plan

RECIPE = tempoquant.Recipe(name="short", format="mxfp4", smoothing_alpha=0.5)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return record(SOURCE, tmp_path_factory.mktemp("recorded") / "store", plan(1, 8), model=MODEL, engine=CPU)


def test_a_recording_finds_the_ratios_that_diffusers_own_calibration_prints(store):
    pipeline = load_pipeline(SOURCE, "cpu")
    found: dict[str, dict[str, list[float]]] = {}
    for component in COMPONENTS.values():
        getattr(pipeline, component).enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=1000))

    def note() -> None:
        for name, component in COMPONENTS.items():
            hook = getattr(pipeline, component).blocks[0]._diffusers_hook.hooks["mag_cache_leader_block_hook"]
            for context, state in hook.state_manager._state_cache.items():
                found.setdefault(name, {})[context] = list(state.calibration_ratios)

    texts = {"prompt": PROMPTS[0].text, "negative_prompt": ""}
    sample_latents(pipeline, PROMPTS[0], SETTINGS, CALIBRATION_NOISE, texts, on_step=note)
    for name in COMPONENTS:
        recorded = store.magnitude_ratios(name)
        assert recorded.timesteps == store.schedule(name)
        assert recorded.by_branch["conditional"] == pytest.approx(found[name]["cond"], rel=1e-3)
        assert recorded.by_branch["unconditional"] == pytest.approx(found[name]["uncond"], rel=1e-3)
        assert any(abs(ratio - 1) > 1e-3 for ratio in recorded.by_branch["conditional"])


def test_a_checkpoint_holds_the_ratios_of_its_samples_and_magcache_finds_them(tmp_path):
    model = ModelIdentity(fingerprint(SOURCE))
    store = record(SOURCE, tmp_path / "store", plan(1, 8), model=model, engine=CPU)
    folder = tempoquant.quantize(SOURCE.folder, tmp_path / "out", RECIPE, store=store.folder)
    pipeline = load_pipeline(SourceModel.open(folder), "cpu")
    assert recorded_ratios(pipeline, facts_of(pipeline)) == {name: store.magnitude_ratios(name) for name in COMPONENTS}
    accelerate(pipeline, "fast").remove()


def test_magcache_says_that_it_needs_a_recording():
    with pytest.raises(UnsupportedError, match="MagCache needs magnitude ratios, which a recording measures"):
        accelerate(load_pipeline(SOURCE, "cpu"), "fast")
