"""Laws of calibrating linears that read one input, deflated and centred."""

import pytest
import torch
from torch import nn

from tempoquant.calibrate.corrected_bias import corrected_bias
from tempoquant.calibrate.linear_calibration import InputCalibration
from tempoquant.calibrate.named_layer import NamedLayer
from tempoquant.calibrate.phases import Phase, phases_of
from tempoquant.formats import FORMATS, quantize_activation, rotate
from tempoquant.kernels.reference import dequantize_residual
from tempoquant.layer import QuantizedLayer
from tempoquant.recipe import Recipe
from tempoquant.timesteps import TimestepBins
from tests.random_layers import random, reference_of

UNCENTRED = {"centring": False, "centring_by_bin": False}
DEFAULT = Recipe.load("default").replace(rank=4)
IN, NUM_TOKENS = 128, 1200
BFLOAT16_UNIT = 2.0**-8


def inputs(seed: int = 0, mean: float = 2.0) -> torch.Tensor:
    mixing = torch.eye(IN) + 0.5 * random(IN, IN, seed=1) / IN**0.5
    return (random(NUM_TOKENS, IN, seed=seed) @ mixing + mean * random(IN, seed=2)) * random(IN, seed=3).exp()


def linear(out_features: int, seed: int, bias: bool = True) -> nn.Linear:
    made = nn.Linear(IN, out_features, bias)
    made.weight = nn.Parameter(random(out_features, IN, seed=seed) / IN**0.5, requires_grad=False)
    if bias:
        made.bias = nn.Parameter(random(out_features, seed=seed + 1), requires_grad=False)
    return made


def calibrate(
    linears: dict[str, nn.Linear], recipe: Recipe = DEFAULT, x: torch.Tensor | None = None, parts: int = 1
) -> dict[str, NamedLayer]:
    x = inputs() if x is None else x
    calibration = InputCalibration(linears, recipe.default_format, recipe, TimestepBins(), [parts])
    for phase in phases_of(recipe):
        for part in x.chunk(parts):
            calibration.observe(phase, part, 0)
        calibration.end_phase(phase)
    return {named.name: named for named in calibration.finish()}


def parts_of(layer: QuantizedLayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the branch's input and the quantizer's input from raw inputs, in float64."""
    transform = layer.input_transform
    return transform.hidden(x.double()), transform(x.double())


@pytest.mark.parametrize("format", FORMATS)
def test_linears_of_one_input_share_what_is_done_to_it(format: str) -> None:
    layers = calibrate({"q": linear(96, 10), "k": linear(64, 20)}, DEFAULT.replace(format=format))
    q, k = layers["q"].layer, layers["k"].layer
    assert torch.equal(q.smoothing_factor, k.smoothing_factor) and torch.equal(q.input_offset, k.input_offset)
    assert torch.equal(q.branch.down, k.branch.down) and torch.equal(q.branch.deflation, k.branch.deflation)
    x = inputs(seed=5)
    assert torch.equal(parts_of(q, x)[1], parts_of(k, x)[1])


def test_what_is_rounded_has_no_mean_and_less_energy_than_the_smoothed_input() -> None:
    layer = calibrate({"q": linear(96, 10)})["q"].layer
    smoothed = rotate(inputs().double() / layer.smoothing_factor.double())
    _, rounded = parts_of(layer, inputs())
    left = rounded.mean(0).abs()
    assert bool((left <= BFLOAT16_UNIT * layer.input_offset.double().abs() + 1e-4 * smoothed.std(0)).all())
    assert rounded.square().sum() < 0.85 * (smoothed - smoothed.mean(0)).square().sum()


@pytest.mark.parametrize("bias", [False, True])
def test_the_bias_gives_back_what_the_offset_takes_away(bias: bool) -> None:
    """Before anything is rounded to four bits, the layer is the linear, but for the rounding of
    `up` off the mean.
    """
    source = linear(96, 10, bias)
    named = calibrate({"q": source})["q"]
    layer, x = named.layer, inputs(seed=5)
    hidden, not_rounded = parts_of(layer, x)
    # The residual before it was rounded: what the weight has more than the branch, once deflation
    # is undone.
    weight = source.weight.double() * layer.smoothing_factor.double()
    stored = layer.branch.down.double() * layer.smoothing_factor.double()
    residual = rotate(weight - torch.linalg.solve(stored @ stored.T, stored @ weight.T).T @ stored)
    y = not_rounded @ residual.T + hidden @ layer.branch.up.double().T + layer.bias.double()
    wanted = x.double() @ source.weight.double().T + (0 if source.bias is None else source.bias.double())
    hidden_mean = inputs().double().mean(0) @ layer.branch.down.double().T
    of_up = (hidden - hidden_mean).abs() @ (layer.branch.up.double().abs() * BFLOAT16_UNIT * 1.01).T
    assert bool(((y - wanted).abs() <= of_up + 1e-4 * wanted.abs().max()).all())
    assert layer.bias.dtype == torch.float32
    unchanged = layer.bias if source.bias is None else layer.bias - source.bias
    torch.testing.assert_close(unchanged, named.bias_correction, rtol=0, atol=1e-6)


def test_without_centring_the_bias_stays_as_it_is_and_so_does_its_absence() -> None:
    recipe = DEFAULT.replace(**UNCENTRED)
    for bias in (False, True):
        source = linear(96, 10, bias)
        named = calibrate({"q": source}, recipe)["q"]
        assert named.bias_correction is None and named.layer.input_offset is None
        assert named.layer.bias is None if source.bias is None else torch.equal(named.layer.bias, source.bias)


def test_a_changed_bias_is_float32_or_by_bin_float16_and_an_unchanged_one_as_stored() -> None:
    stored, change = random(8).bfloat16(), random(8, seed=1)
    assert corrected_bias(stored, None) is stored and corrected_bias(None, None) is None
    assert torch.equal(corrected_bias(None, change), change)
    assert torch.equal(corrected_bias(stored, change), stored.float() + change)
    by_bin = torch.stack([change, 2 * change])
    assert torch.equal(corrected_bias(stored, by_bin), (stored.float() + by_bin).half())
    assert torch.equal(corrected_bias(None, 1e5 * by_bin), 1e5 * by_bin), "float16 cannot hold it"


def test_the_hessian_is_of_what_the_layer_really_rounds() -> None:
    """GPTQ's codes beat rounding on what meets them: the quantized, deflated, centred input."""
    source = linear(96, 10)
    x = inputs()
    layers = [
        calibrate({"q": source}, DEFAULT.replace(gptq=gptq, act_order=gptq), x)["q"].layer for gptq in (True, False)
    ]
    errors = []
    for layer in layers:
        _, not_rounded = parts_of(layer, x)
        rounded = quantize_activation(not_rounded, layer.format, layer.activation_scale_rule)
        weight = source.weight.double() * layer.smoothing_factor.double()
        stored = layer.branch.down.double() * layer.smoothing_factor.double()
        residual = rotate(weight - torch.linalg.solve(stored @ stored.T, stored @ weight.T).T @ stored)
        change = dequantize_residual(layer.weight_tensors, layer.format, torch.float64) - residual
        errors.append(float((rounded @ change.T).square().sum()))
    assert torch.equal(layers[0].branch.deflation, layers[1].branch.deflation)
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("parts", [2, 5])
def test_how_the_calls_are_cut_hardly_changes_what_is_shared(parts: int) -> None:
    one, other = (calibrate({"q": linear(96, 10)}, parts=n)["q"].layer for n in (1, parts))
    pairs = [
        (one.smoothing_factor, other.smoothing_factor),
        (one.input_offset, other.input_offset),
        (one.branch.down, other.branch.down),
        (one.branch.deflation, other.branch.deflation),
    ]
    for a, b in pairs:  # sums in another order may round to a neighbour in bfloat16
        torch.testing.assert_close(a.float(), b.float(), rtol=2 * BFLOAT16_UNIT, atol=2e-3)
    x, source = inputs(seed=5), linear(96, 10)
    errors = []
    for layer in (one, other):
        y = reference_of(layer, x)
        errors.append(float((y - source(x)).square().sum()))
    assert errors[0] == pytest.approx(errors[1], rel=0.03)


@pytest.mark.parametrize(
    ("changes", "phases"),
    [
        ({}, [Phase.RANGE, Phase.HESSIAN]),
        ({"gptq": False, "act_order": False}, [Phase.RANGE]),
        ({"smoothing_alpha": None, **UNCENTRED}, [Phase.RANGE, Phase.HESSIAN]),
        ({"smoothing_alpha": None, "deflation": False, **UNCENTRED}, [Phase.RANGE, Phase.HESSIAN]),
        ({"smoothing_alpha": None, "deflation": False, **UNCENTRED, "prior_fraction": 0.0}, [Phase.HESSIAN]),
    ],
)
def test_a_recipe_has_the_phases_that_it_needs(changes: dict, phases: list[Phase]) -> None:
    assert phases_of(DEFAULT.replace(**changes)) == phases
    calibrate({"q": linear(64, 10)}, DEFAULT.replace(**changes))
