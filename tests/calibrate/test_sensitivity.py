"""Laws of sensitivity: it is the squared Jacobian, and what rounding one layer really does to the
noise prediction.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from tempoquant.calibrate.denoiser_model import Carried
from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.calibrate.sensitivity import (
    MAX_SAMPLES,
    LayerSensitivity,
    candidate_ranks,
    evenly_spaced,
    measure_denoiser,
)
from tempoquant.calibrate.sequential import quantize_denoiser
from tempoquant.errors import CalibrationError
from tempoquant.recipe import LayerRule, Recipe
from tests.calibrate.test_sequential import BINS, ToyTransformer, sample, samples
from tests.random_layers import reference_of

RECIPE = Recipe.load("default").replace(rank=4, gptq=False, act_order=False)
LINEARS = [f"blocks.{i}.{part}" for i in range(3) for part in ("up", "gate", "down")]


class EndingDenoiser(ToyTransformer):
    """The toy denoiser with something after its last block."""

    def finish(self, sample: CalibrationSample, carried: Carried) -> torch.Tensor:
        return torch.tanh(carried[0]) * (1 + sample.timestep / 1000)

    def run(self, of: CalibrationSample) -> torch.Tensor:
        hidden = of.inputs["hidden"]
        for block in self.blocks:
            hidden = block(hidden, shift=of.timestep / 1000)
        return self.finish(of, [hidden])


def measured(
    folder: Path, calls: Sequence[CalibrationSample], recipe: Recipe = RECIPE
) -> Mapping[str, LayerSensitivity]:
    groups = measure_denoiser(
        EndingDenoiser(), calls, recipe, HiddenStates(folder / "states"), HiddenStates(folder / "gradients")
    )
    return {name: layer for linears in groups for name, layer in linears.items()}


def few_tokens(seed: int = 0) -> CalibrationSample:
    whole = sample(400.0, seed)
    return dataclasses.replace(whole, inputs={"hidden": whole.inputs["hidden"][:, :4].clone()})


@pytest.mark.parametrize("name", ["blocks.0.up", "blocks.1.down", "blocks.2.gate"])
def test_the_gain_is_the_squared_jacobian_of_the_noise_prediction_over_its_power(name: str, tmp_path: Path) -> None:
    model, call = EndingDenoiser(), few_tokens()
    linear = model.blocks[int(name[7])].get_submodule(name[9:])

    def with_error(error: torch.Tensor) -> torch.Tensor:
        handle = linear.register_forward_hook(lambda _, args, output: output + error)
        try:
            return model.run(call)
        finally:
            handle.remove()

    no_error = torch.zeros(1, 4, linear.out_features)
    jacobian = torch.autograd.functional.jacobian(with_error, no_error)
    wanted = float(jacobian.square().sum() / with_error(no_error).detach().square().sum())
    num_signs = 48  # the same call again and again, with signs of its own each time
    found = measured(tmp_path, [few_tokens() for _ in range(num_signs)])[name].gain
    assert found == pytest.approx(wanted, rel=0.1)


def test_the_error_foreseen_is_the_one_that_rounding_a_layer_alone_makes(tmp_path: Path) -> None:
    calls, model = samples(), EndingDenoiser()
    with torch.no_grad():
        references = [model.run(call) for call in calls]
    found = measured(tmp_path, calls)
    states = HiddenStates(tmp_path / "quantized")
    layers = {named.name: named.layer for block in quantize_denoiser(model, calls, RECIPE, BINS, states)
              for named in block.layers}  # fmt: skip
    for name, layer in layers.items():
        linear = model.blocks[int(name[7])].get_submodule(name[9:])
        forward = linear.forward
        linear.forward = lambda x, layer=layer: rounded(layer, x)
        with torch.no_grad():
            outputs = [model.run(call) for call in calls]
        linear.forward = forward
        relative = [float((a - b).square().sum() / b.square().sum()) for a, b in zip(outputs, references, strict=True)]
        really = sum(relative) / len(relative)
        # One vector of random signs a sample: with so few samples such an estimate is a factor of
        # 1.5 off at times.
        assert abs(10 * math.log10(found[name].errors[4] / really)) < 2.0, name


def rounded(layer, x: torch.Tensor) -> torch.Tensor:
    return reference_of(layer, x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])


def test_every_layer_that_the_recipe_quantizes_is_measured_and_none_else(tmp_path: Path) -> None:
    recipe = RECIPE.replace(layers=(LayerRule("*.1.gate", "16bit"),))
    assert list(measured(tmp_path, samples(), recipe)) == [name for name in LINEARS if name != "blocks.1.gate"]


def test_linears_that_share_an_input_stand_together_where_they_share_a_rank(tmp_path: Path) -> None:
    def groups(recipe: Recipe, folder: Path) -> list[list[str]]:
        states = HiddenStates(folder / "states"), HiddenStates(folder / "gradients")
        return [list(linears) for linears in measure_denoiser(EndingDenoiser(), samples(), recipe, *states)]

    together, apart = groups(RECIPE, tmp_path / "a"), groups(RECIPE.replace(share_smoothing=False), tmp_path / "b")
    assert together[:2] == [["blocks.0.up", "blocks.0.gate"], ["blocks.0.down"]]
    assert apart == [[name] for name in LINEARS]


@pytest.mark.parametrize(
    "changes", [{}, {"deflation": False}, {"centring": False, "centring_by_bin": False, "smoothing_alpha": None}]
)
def test_a_larger_rank_leaves_less_error(changes: dict, tmp_path: Path) -> None:
    for layer in measured(tmp_path, samples(), RECIPE.replace(**changes)).values():
        assert layer.errors[0] > layer.errors[16] > 0


def test_measuring_again_gives_the_same_numbers(tmp_path: Path) -> None:
    assert measured(tmp_path / "a", samples()) == measured(tmp_path / "b", samples())


def test_few_samples_spread_over_the_timesteps_are_enough() -> None:
    calls = [sample(10.0 * i, 0, "conditional" if i % 3 else "unconditional") for i in range(40)]
    chosen = evenly_spaced(calls, RECIPE)
    assert len(chosen) == MAX_SAMPLES and (chosen[0].timestep, chosen[-1].timestep) == (0.0, 390.0)
    conditional = evenly_spaced(calls, RECIPE.replace(statistics_branches="conditional"))
    assert {each.guidance_branch for each in conditional} == {"conditional"}
    assert len(evenly_spaced(calls[:3], RECIPE)) == 3


def test_ranks_tried_are_within_a_quarter_of_the_smaller_side_and_the_recipes_own_is_among_them() -> None:
    assert candidate_ranks([torch.Size((64, 128))], 3) == [0, 2, 3, 4, 8, 16]
    assert candidate_ranks([torch.Size((5120, 5120)), torch.Size((5120, 5120))], 32)[-1] == 128


def test_an_expert_without_samples_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no calibration sample belongs to low_noise"):
        measured(tmp_path, [])
