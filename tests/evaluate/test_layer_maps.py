"""Layer maps of the bundled model, quantized in memory."""

import pytest
import torch

from tempoquant.calibrate.capture import watching_outputs
from tempoquant.evaluate.layer_maps import layer_maps
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import record_trajectory
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.runtime.convert import install_layers, quantized_linears
from tempoquant.sqnr import sqnr_db
from tempoquant.timesteps import TimestepBins
from tests.quantized_wan import BINS, quantize_all
from tests.recorded import PROMPTS, SETTINGS, SOURCE

NAME = "blocks.1.ffn.net.2"


@pytest.fixture(scope="module")
def calls():
    found = record_trajectory(load_pipeline(SOURCE, "cpu"), PROMPTS[0], SETTINGS, 0)
    return [call.sample for call in found if call.sample.guidance_branch == "conditional"]


@pytest.fixture(scope="module")
def quantized():
    pipeline = load_pipeline(SOURCE, "cpu")
    layers = quantize_all(pipeline.transformer_2, "mxfp4")
    install_layers(pipeline.transformer_2, layers, BINS, torch.float32)
    return pipeline


def test_the_error_is_that_of_the_layer_on_its_own_input(calls, quantized):
    low = [call for call in calls if call.denoiser == "low_noise"][:1]
    [(denoiser, found)] = layer_maps(quantized, SOURCE, low, dict.fromkeys(COMPONENTS, TimestepBins())).items()
    seen = {}
    module = quantized.transformer_2.get_submodule(NAME)
    with watching_outputs({NAME: module}, lambda name, x, y: seen.update(x=x, y=y)), torch.no_grad():
        quantized.transformer_2(**low[0].inputs, return_dict=False)
    original = load_pipeline(SOURCE, "cpu").transformer_2.get_submodule(NAME)
    with torch.no_grad():
        wanted = -sqnr_db(original(seen["x"]), seen["y"])
    assert denoiser == "low_noise"
    assert found["error_db"][found["layers"].index(NAME)][0] == pytest.approx(wanted, abs=1e-3)


def test_attention_in_8_bits_stands_beside_the_linears(calls, quantized):
    found = layer_maps(quantized, SOURCE, calls, dict.fromkeys(COMPONENTS, TimestepBins()))["low_noise"]["attention"]
    num_blocks = len(quantized.transformer_2.blocks)
    assert len(found["layers"]) == len(found["error_db"]) == num_blocks * 2 * 2
    errors = dict(zip(found["layers"], (row[0] for row in found["error_db"]), strict=True))
    assert all(-80 < error < -15 for error in errors.values())
    assert errors["blocks.0.attn1.int8_fp8"] > errors["blocks.0.attn1.int8_fp16"]


def test_bins_without_a_call_are_none_and_no_hook_is_left(calls, quantized):
    edges = TimestepBins((1.0,))  # no call is as clean as that
    found = layer_maps(quantized, SOURCE, calls, dict.fromkeys(COMPONENTS, edges))["low_noise"]
    assert found["bins"] == [[0.0, 1.0], [1.0, 900.0]]
    assert all(row[0] is None and row[1] is not None for row in found["error_db"])
    assert all(row[0] is None and 0 < row[1] <= 2 for row in found["clip_ratio"])
    assert not any(linear._forward_hooks for linear in quantized_linears(quantized.transformer_2).values())


def test_an_expert_in_16_bits_has_no_map(calls, quantized):
    assert "high_noise" not in layer_maps(quantized, SOURCE, calls, dict.fromkeys(COMPONENTS, TimestepBins()))
