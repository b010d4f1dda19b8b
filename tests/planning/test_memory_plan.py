"""Laws of the prediction: weights are counted to the byte, modes differ as they should, targets of
A14B are kept.
"""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from torch import nn

from tempoquant.errors import ModelError
from tempoquant.kernels.dispatch import Backend
from tempoquant.models.pipeline_configs import ModelConfig, PipelineConfigs, read_configs
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.models.wan.pipelines import I2V_A14B
from tempoquant.models.wan.published import A14B
from tempoquant.planning.allocations import peak_bytes
from tempoquant.planning.generation_memory import (
    DenoiserBytes,
    Kernels,
    QuantizedLayers,
    _ForeseenLinear,
    autoencoder_bytes,
    denoiser_bytes,
    denoising_bytes,
    foreseen_layers,
    text_encoder_bytes,
)
from tempoquant.planning.memory_plan import (
    HOST_OVERHEAD_BYTES,
    OVERHEAD_BYTES,
    MemoryPlan,
    ModePlan,
    _slowness,
    plan_memory,
)
from tempoquant.planning.places import PLACES
from tempoquant.recipe import Recipe
from tests.quantized_wan import tiny_wan, write_pipeline
from tests.recorded import TINY

GIB, GB = 2**30, 10**9
RAM, GPUS = (8, 16, 24, 32, 48, 64, 96, 128, 192), (4, 8, 12, 16, 24, 32, 48, 80)
LAST = (True, True, True, True)
"""Slower than any mode: none that fits."""
DEFAULT, PAPER = Recipe.load("default"), Recipe.load("paper")


def size_of(height: int, width: int, num_frames: int) -> SamplingSettings:
    return I2V_A14B.replace(height=height, width=width, num_frames=num_frames)


def with_config(configs: PipelineConfigs, component: str, **changes: object) -> PipelineConfigs:
    """Return the same with another config of one component."""
    described = configs.models[component]
    config = ModelConfig(described.library, described.class_name, {**described.config, **changes})
    return dataclasses.replace(configs, models={**configs.models, component: config})


def num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("q") / "pipeline", centred_by_bin=True, deflated_by_bin=True)


@pytest.fixture(scope="module")
def plans() -> dict[str, MemoryPlan]:
    configs, size = read_configs(A14B), size_of(480, 832, 81)
    return {recipe.name: plan_memory(configs, size, recipe) for recipe in (DEFAULT, PAPER)}


def test_weights_are_counted_to_the_byte(quantized):
    pipeline = WanImageToVideoPipeline.from_pretrained(quantized, dtype=torch.bfloat16)
    configs = read_configs(str(quantized))
    for denoiser, model in zip(COMPONENTS, (pipeline.transformer, pipeline.transformer_2), strict=True):
        component = configs.quantized[denoiser]
        found = denoiser_bytes(configs, denoiser, QuantizedLayers(component.layers, component.bins.num_bins))
        assert found.total == num_bytes(model)
        assert found.blocks == tuple(num_bytes(block) for block in model.blocks)
    assert text_encoder_bytes(configs).weights == num_bytes(pipeline.text_encoder)
    assert autoencoder_bytes(configs, size_of(16, 16, 5)).weights == 2 * num_bytes(pipeline.vae)  # float32


def test_16_bit_weights_are_those_of_a_loaded_expert():
    model = tiny_wan()
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    configs = with_config(read_configs(A14B), "transformer", **config)
    assert denoiser_bytes(configs, "high_noise").total == num_bytes(model)


def test_the_built_in_model_has_the_published_number_of_weights():
    configs = read_configs(A14B)
    found = denoiser_bytes(configs, "high_noise").total
    assert 2 * 14_288_901_184 < found < 2 * 14_288_901_184 + 2 * 30 * 2**20 * 2  # norms and modulation in float32
    assert text_encoder_bytes(configs).weights == 2 * 5_680_910_336
    assert autoencoder_bytes(configs, size_of(64, 64, 5)).weights == 4 * 126_892_531


def test_the_page_locked_memory_of_an_expert_is_hardly_more_than_its_weights():
    configs = read_configs(A14B)
    for layers in (None, foreseen_layers(configs, "high_noise", DEFAULT)):
        found = denoiser_bytes(configs, "high_noise", layers)
        assert found.total <= found.pinned <= 1.15 * found.total


def test_the_reference_takes_more_than_kernels(quantized):
    configs = read_configs(str(quantized))
    found = configs.quantized["high_noise"]
    layers = QuantizedLayers(found.layers, found.bins.num_bins)
    size = size_of(128, 128, 17)
    by_kernels, by_reference = (
        denoising_bytes(configs, "high_noise", layers, size, each) for each in ("fp8", "reference")
    )
    assert by_kernels < by_reference


@pytest.mark.parametrize(("kernels", "expanded"), [("fp8", 1), ("int8", 1), ("bf16", 2)])
def test_a_linear_is_counted_as_its_arithmetic_says(kernels, expanded):
    entry = foreseen_layers(read_configs(A14B), "high_noise", DEFAULT).entries["blocks.0.ffn.net.0.proj"]
    x = torch.empty(1, 100, 5120, dtype=torch.bfloat16, device="meta")
    peak = peak_bytes(lambda: _ForeseenLinear(entry, kernels)(x))
    of_one_bin = 2 * 5120 + 2 * 13824  # its offset and bias
    assert peak == expanded * (100 + 13824) * 5120 + 2 * 100 * 32 + of_one_bin + 2 * 100 * 13824


def test_fp4_expands_no_weight_and_packs_its_input():
    entry = foreseen_layers(read_configs(A14B), "high_noise", DEFAULT).entries["blocks.0.ffn.net.0.proj"]
    x = torch.empty(1, 100, 5120, dtype=torch.bfloat16, device="meta")
    peak = peak_bytes(lambda: _ForeseenLinear(entry, "fp4")(x))
    of_one_bin = 2 * 5120 + 2 * 13824
    assert peak == 100 * (5120 // 2 + 5120 // 16) + 2 * 100 * 32 + of_one_bin + 2 * 100 * 13824


def test_every_backend_is_counted():
    assert get_args(Kernels) == tuple(backend.value for backend in Backend)


def test_targets_of_a14b_at_480p(plans):
    assert plans["default"].reduction("resident") >= 0.665  # chunks hold queries too, in 16 bits as well
    assert plans["paper"].reduction("resident") >= 0.69
    lean = plans["default"].quantized.modes[2]
    assert lean.mode == "lean" and lean.peak + OVERHEAD_BYTES <= 12 * GB


def test_the_document_shows_what_is_predicted(plans):
    document = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    for recipe, plan in plans.items():
        [row] = [line for line in document.splitlines() if line.startswith(f"| 480 × 832 | `{recipe}` |")]
        for before, after in zip(plan.sixteen_bit.modes, plan.quantized.modes, strict=True):
            assert f"{before.peak / GIB:.1f} → {after.peak / GIB:.1f}" in row
            assert before.mode in ("lean", "disk") or f"−{100 * plan.reduction(before.mode):.1f} %" in row


def test_targets_of_a14b_at_720p():
    plan = plan_memory(read_configs(A14B), size_of(720, 1280, 81), DEFAULT)
    assert plan.reduction("resident") >= 0.60
    assert plan.quantized.modes[2].peak + OVERHEAD_BYTES <= 16 * GB


def test_faster_modes_take_more_and_the_fastest_that_fits_is_recommended(plans):
    model = plans["default"].quantized
    assert [mode.mode for mode in model.modes] == ["resident", "swap", "lean", "disk"]
    peaks = [mode.peak for mode in model.modes]
    assert peaks == sorted(peaks, reverse=True)
    resident, swap, lean, _ = model.in_one_piece
    for mode in (resident, swap, model.modes[1], lean, model.modes[2]):
        assert model.fastest_within(mode.peak + OVERHEAD_BYTES) is mode
    assert model.fastest_within(model.modes[0].peak + OVERHEAD_BYTES) is swap, "in one piece before all in chunks"
    assert model.fastest_within(peaks[-1] + OVERHEAD_BYTES - 1) is None


def test_more_memory_never_recommends_a_slower_mode_and_ram_decides_too(plans):
    for model in (plans["default"].quantized, plans["default"].sixteen_bit):
        by_ram = [{gpu: model.fastest_within(gpu * GIB, ram * GIB) for gpu in GPUS} for ram in RAM]
        slowness = [[LAST if mode is None else _slowness(mode) for mode in row.values()] for row in by_ram]
        for rows in (slowness, list(zip(*slowness, strict=True))):
            for column in zip(*rows, strict=True):
                assert list(column) == sorted(column, reverse=True)
        for ram, row in zip(RAM, by_ram, strict=True):
            for gpu, mode in row.items():
                if mode is not None:
                    assert mode.peak + OVERHEAD_BYTES <= gpu * GIB and mode.host + HOST_OVERHEAD_BYTES <= ram * GIB
    assert plans["default"].quantized.fastest_within(24 * GIB, 8 * GIB) is None
    assert plans["default"].quantized.fastest_within(ram_bytes=64 * GIB).mode == "resident"


def test_ram_holds_everything_that_waits_there(plans):
    for model in (plans["default"].sixteen_bit, plans["default"].quantized):
        resident, swap, lean = (next(m for m in model.modes if m.mode == name) for name in ("resident", "swap", "lean"))
        assert resident.pinned == 0 and swap.pinned == lean.pinned > 0
        others = 2 * 5_680_910_336 + 4 * 126_892_531
        for mode in (swap, lean):
            assert mode.host >= mode.pinned + others
        copied = swap.places.copied_first + sum(swap.places.copied_between)
        assert copied == sum(lean.places.copied_each_call) == resident.phases[2].weights


@pytest.mark.parametrize(("rest", "in_ram"), [(30, 40), (100, 100)])
def test_disk_mode_has_two_blocks_in_ram_or_what_lies_in_none(rest, in_ram):
    sizes = [DenoiserBytes(rest, (10, 20), 0, stored=2 * (rest + 30)), DenoiserBytes(5, (10, 10, 10), 0)]
    places = PLACES["disk"](sizes)
    assert places.read_ahead == in_ram and places.from_disk
    assert (places.copied_each_call, places.read_each_call) == ([30, 30], [60, 30])
    assert (places.copied_first, places.copied_between, places.read_first) == (rest, [5], [2 * rest, 5])


def test_one_piece_takes_what_diffusers_own_blocks_take(plans):
    """114 kB a token in 16 bits: 11 hidden states of 5,120 numbers, some of them in float32."""
    for model in (plans["default"].sixteen_bit, plans["default"].quantized):
        for whole, chunked in zip(model.in_one_piece, model.modes, strict=True):
            denoising = whole.phases[2].activations
            assert 3.6e9 < denoising < 4.0e9 and denoising > 2 * chunked.phases[2].activations
            assert whole.mode == chunked.mode and (whole.in_chunks, chunked.in_chunks) == (False, True)


def test_where_nothing_computes_an_expert_only_resident_has_one_there(plans):
    for model in (plans["default"].sixteen_bit, plans["default"].quantized):
        resident, swap, *_ = model.modes
        text, image, *_, video = swap.phases
        assert {text.name, image.name, video.name} == {"text encoding", "image encoding", "video decoding"}
        both = 2 * swap.phases[2].weights
        for phase, in_swap in zip(resident.phases, swap.phases, strict=True):
            expected = both if in_swap.weights * 2 == both else both + in_swap.weights
            assert phase.weights == expected and phase.activations == in_swap.activations


def test_activations_follow_the_number_of_tokens():
    configs = read_configs(A14B)
    sizes = [size_of(480, 832, frames) for frames in (41, 81, 161)]
    small, middle, large = (denoising_bytes(configs, "high_noise", None, size) for size in sizes)
    # Beyond what a chunk needs it is a straight line: 11, 21 and 41 latent frames.
    assert (large - middle) / 20 == pytest.approx((middle - small) / 10, rel=0.05)


def but_reading(mode: ModePlan) -> ModePlan:
    """Return a mode without the bytes that it reads: only files tell their own sizes exactly."""
    places = dataclasses.replace(mode.places, read_each_call=(), read_first=())
    return dataclasses.replace(mode, places=places)


def test_a_plan_reads_configs_and_no_weights(quantized, tmp_path):
    for file in quantized.rglob("*.json"):
        place = tmp_path / "configs" / file.relative_to(quantized)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    size = size_of(32, 32, 5)
    with_weights, without = (
        plan_memory(read_configs(str(folder)), size, DEFAULT) for folder in (quantized, tmp_path / "configs")
    )
    for one, other in ((without.quantized, with_weights.quantized), (without.sixteen_bit, with_weights.sixteen_bit)):
        assert [but_reading(mode) for mode in one.modes] == [but_reading(mode) for mode in other.modes]
    assert without.quantized.label == "test"  # the checkpoint's own recipe


def test_a_broken_or_foreign_config_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"model_index\.json is missing"):
        read_configs(str(tmp_path))
    configs = read_configs(str(TINY))
    with pytest.raises(ModelError, match="does not describe a WanTransformer3DModel"):
        denoiser_bytes(with_config(configs, "transformer", num_attention_heads="many"), "high_noise")
    with pytest.raises(ModelError, match="does not describe a AutoencoderKLWan"):
        autoencoder_bytes(with_config(configs, "vae", base_dim=None), size_of(16, 16, 5))
    with pytest.raises(ModelError, match="does not describe a UMT5EncoderModel"):
        text_encoder_bytes(with_config(configs, "text_encoder", d_model="wide"))
    with pytest.raises(ModelError, match="do not say how a video becomes tokens"):
        plan_memory(with_config(configs, "transformer", patch_size=None), size_of(16, 16, 5), DEFAULT)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ModelError, match="FluxPipeline"):
        read_configs(str(tmp_path))
