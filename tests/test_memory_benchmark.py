"""Laws of the memory benchmark: its random pipeline runs like a real one, and allocates what is
predicted.
"""

from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.memory import predicted, verdicts
from benchmarks.memory_model import TEXT, entering_phases, random_pipeline
from tempoquant.models.pipeline_configs import read_configs
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.models.wan.pipelines import I2V_A14B
from tempoquant.placement.memory_modes import set_memory_mode
from tempoquant.planning.allocations import LiveBytes
from tempoquant.planning.generation_memory import foreseen_layers
from tempoquant.planning.memory_plan import IMAGE, VIDEO, denoising_name, plan_memory
from tempoquant.planning.memory_plan import TEXT as TEXT_PHASE
from tempoquant.recipe import Recipe
from tempoquant.runtime.convert import quantized_linears

CPU = torch.device("cpu")
SIZE = I2V_A14B.replace(height=128, width=192, num_frames=9)
HIGH, LOW = (denoising_name(name) for name in COMPONENTS)


def generate(pipeline: Any, phases: list[str]) -> torch.Tensor:
    with entering_phases(pipeline, phases.append):
        return pipeline(
            Image.new("RGB", (SIZE.width, SIZE.height)), TEXT, negative_prompt="", height=SIZE.height,
            width=SIZE.width, num_frames=SIZE.num_frames, num_inference_steps=2, guidance_scale=2.0, output_type="pt",
        ).frames  # fmt: skip


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "nvfp4_m1", "int4"])
def test_the_random_pipeline_has_valid_layers_and_meets_every_phase(format):
    configs = read_configs("tiny")
    recipe = Recipe(name="r", format=format, rank=2, smoothing_alpha=0.5, deflation=True, centring=True)
    layers = {denoiser: foreseen_layers(configs, denoiser, recipe) for denoiser in COMPONENTS}
    pipeline = random_pipeline(configs, layers, CPU)
    pipeline.set_progress_bar_config(disable=True)
    for name, linear in quantized_linears(pipeline.transformer).items():
        linear.check(name)
    assert len(quantized_linears(pipeline.transformer_2)) == len(layers["low_noise"].entries)
    in_force = set_memory_mode(pipeline, "swap", CPU)
    phases: list[str] = []
    frames = generate(pipeline, phases)
    in_force.remove()
    assert frames.shape == (1, SIZE.num_frames, 3, SIZE.height, SIZE.width)
    assert phases == [TEXT_PHASE, IMAGE, HIGH, HIGH, LOW, LOW, VIDEO]


def test_a_real_generation_allocates_what_is_predicted():
    """The CPU is "the device" for everything: activations by phase, counted while the whole
    pipeline really runs.
    """
    configs = read_configs("tiny")
    plan = plan_memory(configs, SIZE, Recipe.load("tiny"))
    pipeline = random_pipeline(configs, dict.fromkeys(COMPONENTS), CPU)
    pipeline.set_progress_bar_config(disable=True)
    in_force = set_memory_mode(pipeline, "resident", CPU)
    peaks: dict[str, int] = {}

    class ByPhase(list):
        def append(self, phase: str) -> None:
            if self:
                peaks[self[-1]] = max(peaks.get(self[-1], 0), counted.peak)
            super().append(phase)
            counted.peak = counted.live

    counted = LiveBytes()
    with torch.no_grad(), counted:
        generate(pipeline, ByPhase())
    in_force.remove()
    expected = {phase.name: phase.activations for phase in plan.sixteen_bit.modes[0].phases}
    for phase in (TEXT_PHASE, IMAGE, HIGH, LOW):  # decoding leaves its frames on the "device" here
        assert peaks[phase] == pytest.approx(expected[phase], rel=0.10), (phase, peaks, expected)


def test_a_prediction_off_by_more_than_a_tenth_is_a_miss():
    rows = [
        {"model": "m", "mode": "lean", "phase": phase, "measured_bytes": measured, "predicted_bytes": 100}
        for phase, measured in (("a", 50), ("b", 109))
    ]
    assert [is_met for is_met, _ in verdicts(rows)] == [True]
    rows[1]["measured_bytes"] = 111
    assert [is_met for is_met, _ in verdicts(rows)] == [False]


def test_the_change_of_experts_is_part_of_the_call_it_happens_in():
    plan = plan_memory(read_configs("tiny"), SIZE, Recipe.load("tiny"))
    for mode in plan.quantized.modes:
        assert max(predicted(mode).values()) == mode.peak
        assert len(predicted(mode)) == len(mode.phases) - 1
