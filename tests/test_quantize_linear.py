"""Laws of quantizing one linear."""

import pytest
import torch

from tempoquant import QuantizedLinear, Recipe, TempoQuantError, quantize_linear
from tempoquant.checkpoint.tensors import to_stored
from tempoquant.errors import CalibrationError, ModelError, RecipeError
from tempoquant.formats import FORMATS


def layer_problem(seed: int = 0, in_features: int = 128, out_features: int = 96):
    """Return a weight, a bias, and two sets of inputs with outlier channels and correlated
    features.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    mixing = (
        torch.eye(in_features) + 0.5 * torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    )
    mixing *= torch.randn(in_features, generator=generator).mul(1.2).exp()  # outlier channels, as in real layers
    inputs = torch.randn(3000, in_features, generator=generator) @ mixing
    return weight, torch.randn(out_features, generator=generator), inputs[:2000], inputs[2000:]


def error_db(layer: QuantizedLinear, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> float:
    reference = x @ weight.T + bias
    return float(10 * torch.log10((layer(x) - reference).square().sum() / reference.square().sum()))


def recipe(name: str, **changes: object) -> Recipe:
    return Recipe.load(name).replace(**{"rank": 4, **changes})


@pytest.mark.parametrize("format", FORMATS)
def test_every_step_of_the_paper_gains_on_held_out_inputs(format: str) -> None:
    weight, bias, x, held_out = layer_problem()
    steps = [
        recipe("rtn", rank=0, format=format),
        recipe("svdquant", rank=0, format=format),
        recipe("svdquant", format=format),
        recipe("paper", clip_ratios=(), format=format),
        recipe("paper", format=format),
    ]
    errors = [error_db(quantize_linear(weight, bias, x, step), weight, bias, held_out) for step in steps]
    # Smoothing: these inputs have outlier channels. Scales of one mantissa bit saturate too much to
    # gain all of it.
    assert errors[1] < errors[0] - (0.1 if format == "nvfp4_m1" else 0.5), errors
    assert errors[2] < errors[1], errors  # branch
    assert errors[3] < errors[2], errors  # GPTQ
    assert errors[4] < errors[3] + 0.05, errors  # the clip search does not lose


def test_gptq_gains_beside_a_prior_when_nothing_else_needs_the_range_of_the_inputs() -> None:
    weight, bias, _, _ = layer_problem()
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(8, 128, generator=generator)  # what is correlated is what GPTQ gains by
    x, held_out = torch.randn(1200, 8, generator=generator).matmul(few).split(600)
    rounded, beside = (
        error_db(quantize_linear(weight, bias, x, each), weight, bias, held_out)
        for each in (recipe("rtn", rank=0), recipe("rtn", rank=0, gptq=True, prior_fraction=0.125))
    )
    assert beside < rounded - 1, (rounded, beside)


def test_a_full_rank_branch_reproduces_the_layer_to_the_precision_of_bfloat16() -> None:
    weight, bias, x, held_out = layer_problem()
    layer = quantize_linear(weight, bias, x, recipe("svdquant", rank=96))
    assert error_db(layer, weight, bias, held_out) < -50


def test_dequantize_is_what_inputs_on_the_grid_are_multiplied_by() -> None:
    weight, bias, x, _ = layer_problem()
    layer = quantize_linear(weight, bias, x, recipe("paper", clip_ratios=()))
    factor = layer.to_layer().smoothing_factor
    assert factor is not None
    on_grid = torch.diag(6 * factor.float())  # smoothed: one 6 in a group of zeros, exact in four bits
    torch.testing.assert_close(layer(on_grid) - bias, on_grid @ layer.dequantize().T, rtol=1e-5, atol=1e-4)


def test_several_bins_need_a_timestep_and_use_their_own_clip_ratio() -> None:
    weight, bias, x, _ = layer_problem()
    layer = quantize_linear(weight, bias, {0: x, 1: x.pow(3) / 100}, "paper")
    clip_ratio = layer.to_layer().clip_ratio
    assert layer.to_layer().bins.edges == (500.0,) and clip_ratio.shape == (2,)
    with pytest.raises(TempoQuantError, match="at_timestep"):
        layer(x)
    with layer.at_timestep(20):
        clean = layer(x)
    with layer.at_timestep(500):
        noisy = layer(x)
    assert (clip_ratio[0] == clip_ratio[1]) == torch.equal(clean, noisy)


def test_the_same_inputs_give_the_same_bytes() -> None:
    weight, bias, x, _ = layer_problem()
    first, second = (quantize_linear(weight, bias, x, "paper").to_layer() for _ in range(2))
    one, other = to_stored(first, "the first"), to_stored(second, "the second")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_round_to_nearest_needs_no_inputs_and_the_paper_does() -> None:
    weight, bias, *_ = layer_problem()
    assert quantize_linear(weight, bias, None, "rtn").bits_per_weight == pytest.approx(4.25, abs=0.01)
    with pytest.raises(CalibrationError, match="calibration_inputs"):
        quantize_linear(weight, bias, None, "paper")


def test_bad_numbers_are_named() -> None:
    weight, bias, x, _ = layer_problem()
    spoiled = weight.clone()
    spoiled[3, 4] = torch.nan
    with pytest.raises(ModelError, match="weight of the layer holds NaN"):
        quantize_linear(spoiled, bias, x)
    spoiled_x = x.clone()
    spoiled_x[7, 1] = torch.inf
    with pytest.raises(CalibrationError, match="input of the layer holds NaN or Inf"):
        quantize_linear(weight, bias, spoiled_x)


def test_a_group_size_that_does_not_divide_is_named() -> None:
    weight, bias, x, _ = layer_problem(in_features=96)
    with pytest.raises(RecipeError, match="in_features = 96, which groups of 64"):
        quantize_linear(weight, bias, x, recipe("paper", format="int4"))


def test_wrongly_shaped_calibration_inputs_are_refused() -> None:
    weight, bias, x, _ = layer_problem()
    with pytest.raises(CalibrationError, match="bin 0 have shape"):
        quantize_linear(weight, bias, x[:, :64])
    with pytest.raises(CalibrationError, match="numbered 0, 1"):
        quantize_linear(weight, bias, {1: x, 2: x})
