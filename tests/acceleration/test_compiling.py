"""Laws of compiled blocks: one compilation serves a whole video, beneath caches too, and nothing
stays behind.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from diffusers import WanImageToVideoPipeline

from tempoquant.acceleration.cache_settings import CacheSettings
from tempoquant.acceleration.compiling import compile_blocks
from tempoquant.acceleration.step_cache import StepCache
from tempoquant.errors import UnsupportedError
from tempoquant.models.families import facts_of
from tempoquant.placement.memory_modes import set_memory_mode
from tests.quantized_wan import generate, write_pipeline


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> WanImageToVideoPipeline:
    """Return two experts with clip ratios and offsets by timestep bin."""
    folder = write_pipeline(tmp_path_factory.mktemp("pipeline") / "quantized", "nvfp4_m1", centred_by_bin=True)
    return WanImageToVideoPipeline.from_pretrained(folder, dtype=torch.bfloat16)


@contextlib.contextmanager
def counting(pipeline) -> Iterator[dict[str, int]]:
    """Count blocks compiled, `graphs` in all and `runs` of a graph, by a backend that runs its
    input unchanged.
    """
    counts = {"graphs": 0, "runs": 0}

    def backend(module, _inputs):
        counts["graphs"] += 1

        def run(*args):
            counts["runs"] += 1
            return module.forward(*args)

        return run

    torch._dynamo.reset()
    undo = compile_blocks(pipeline, facts_of(pipeline), backend)
    try:
        yield counts
    finally:
        undo.close()
        torch._dynamo.reset()


def latents(pipeline, num_steps: int, seed: int = 0) -> torch.Tensor:
    from PIL import Image

    with torch.no_grad():
        return pipeline(
            image=Image.new("RGB", (32, 32), "red"), prompt="a cat walks", negative_prompt="", height=32, width=32,
            num_frames=5, num_inference_steps=num_steps, guidance_scale=3.0, output_type="latent",
            generator=torch.Generator().manual_seed(seed),
        ).frames  # fmt: skip


def test_forty_steps_across_boundary_and_bins_compile_once(quantized):
    quantized.set_progress_bar_config(disable=True)
    before = latents(quantized, 40)
    with counting(quantized) as counts:
        assert torch.equal(latents(quantized, 1), latents(quantized, 1))
        first = dict(counts)
        assert torch.equal(latents(quantized, 40), before)
        assert counts["graphs"] <= 2 * first["graphs"], "the second expert's blocks may compile once, and no more"
        after = dict(counts)
        latents(quantized, 40, seed=1)
        assert counts["graphs"] == after["graphs"], "a second video compiled anew"
        assert counts["runs"] - after["runs"] >= 80
    assert not any("forward" in module.__dict__ for module in quantized.transformer.modules())
    assert torch.equal(latents(quantized, 40), before)


def test_blocks_stay_compiled_beneath_a_cache(quantized):
    """diffusers' hooks forbid compiling what they call; what was compiled before they came is
    called all the same.
    """
    quantized.set_progress_bar_config(disable=True)
    with counting(quantized) as counts:
        cache = StepCache(quantized, CacheSettings("magcache", threshold=0.0), {})
        latents(quantized, 4)
        cache.remove()
        assert counts["runs"] > 0


@pytest.mark.parametrize("mode", ["resident", "swap"])
def test_compiled_blocks_give_the_same_latents_where_denoisers_come_and_go(quantized, mode):
    """The blocks run in one piece; weights that are exchanged beneath a compiled block compile
    nothing anew.
    """
    quantized.set_progress_bar_config(disable=True)
    before = latents(quantized, 4)
    in_force = set_memory_mode(quantized, mode, "cpu", in_chunks=False)
    with counting(quantized) as counts:
        assert torch.equal(latents(quantized, 4), before)
        first = counts["graphs"]
        assert torch.equal(latents(quantized, 4), before) and counts["graphs"] == first > 0
    in_force.remove()
    assert torch.equal(latents(quantized, 4), before)


def test_blocks_in_chunks_are_refused(quantized):
    mode = set_memory_mode(quantized, "resident", "cpu")
    with pytest.raises(UnsupportedError, match="blocks of high_noise compute in chunks of tokens"):
        compile_blocks(quantized, facts_of(quantized), "eager")
    mode.remove()
    assert torch.equal(generate(quantized), generate(quantized))
