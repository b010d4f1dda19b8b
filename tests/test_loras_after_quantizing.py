"""A LoRA that is loaded on a 4-bit pipeline is worth as much as one that was fused before
quantizing.
"""

from pathlib import Path

import pytest

import tempoquant
from benchmarks.loras import load_adapters, measure, random_lora, write_random
from tempoquant.hosts.diffusers.pipeline import load_pipeline, open_pipeline
from tempoquant.recording.prompt_sets import evaluation_prompts
from tempoquant.runtime.convert import quantized_linears
from tests.recorded import SOURCE

SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_steps": 4, "guidance_scale": 1.0}
WITHIN_DB = 0.5


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tempoquant.quantize("tiny", tmp_path_factory.mktemp("plain") / "rtn", "rtn")


def test_loading_a_lora_is_within_half_a_decibel_of_fusing_it_before(plain: Path, tmp_path: Path) -> None:
    """Leaving it out costs a decibel more, so that this could be false."""
    files = write_random(SOURCE, 0.2, tmp_path)
    found = measure("rtn", files, 0.7, evaluation_prompts("tiny", None, 2), plain, tmp_path / "fused", SMALL)
    for denoiser in SOURCE.denoiser_names:
        assert found["loaded after"][denoiser] >= found["fused before"][denoiser] - WITHIN_DB, found
        assert found["without"][denoiser] <= found["fused before"][denoiser] - 1.0, found


def test_loading_a_lora_requantizes_nothing(plain: Path, tmp_path: Path) -> None:
    """The packed weights stay the very tensors that they were, in both denoisers, whatever the
    strength.
    """
    pipeline = load_pipeline(open_pipeline(plain), "cpu")
    models = [getattr(pipeline, denoiser.component) for denoiser in SOURCE.denoisers]

    def places() -> list[tuple[int, int]]:
        return [
            (linear.packed.data_ptr(), linear.packed._version)
            for model in models for linear in quantized_linears(model).values()
        ]  # fmt: skip

    before = places()
    load_adapters(pipeline, write_random(SOURCE, 0.1, tmp_path), 1.0)
    for strength in (0.3, -1.0):
        pipeline.set_adapters("lora", strength)
        assert places() == before
    pipeline.unload_lora_weights()
    assert places() == before


def test_a_random_lora_has_the_share_of_the_weight_that_is_asked_for() -> None:
    tensors = random_lora(SOURCE, "low_noise", 0.1, 0)
    assert len(tensors) == 2 * len(SOURCE.linears("low_noise"))
    for name in SOURCE.linears("low_noise"):
        weight = SOURCE.component_of("low_noise").tensors[f"{name}.weight"].read().float()
        change = tensors[f"transformer.{name}.lora_B.weight"] @ tensors[f"transformer.{name}.lora_A.weight"]
        assert float(change.norm() / weight.norm()) == pytest.approx(0.1, rel=1e-4)
