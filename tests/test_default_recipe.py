"""The purpose of the default recipe: less error than the paper's at equal rank, wherever the input
lies.
"""

import pytest
import torch

from tempoquant import QuantizedLinear, Recipe, quantize_linear
from tempoquant.errors import RecipeError
from tempoquant.formats import FORMATS
from tests.test_quantize_linear import error_db, layer_problem, recipe

each_format = pytest.mark.parametrize("format", FORMATS)


@each_format
@pytest.mark.parametrize("seed", range(3))
def test_the_default_recipe_beats_the_papers_at_equal_rank_on_held_out_inputs(format: str, seed: int) -> None:
    weight, bias, x, held_out = layer_problem(seed)
    default, paper = (
        error_db(quantize_linear(weight, bias, x, recipe(name, format=format)), weight, bias, held_out)
        for name in ("default", "paper")
    )
    assert default < paper - 0.5


@each_format
@pytest.mark.parametrize(
    ("without", "least_gain_db"),
    [
        ({"deflation": False}, 0.3),
        ({"gptq": False, "act_order": False}, 0.1),
        ({"act_order": False}, 0.1),
        ({"rotation": False}, 0.1),
        ({"rank": 0, "deflation": False}, 1.0),
    ],
    ids=["deflation", "GPTQ", "act-order", "rotation", "the branch"],
)
def test_each_part_of_the_default_recipe_gains(format: str, without: dict[str, object], least_gain_db: float) -> None:
    weight, bias, x, held_out = layer_problem()
    whole, less = (
        error_db(quantize_linear(weight, bias, x, recipe("default", format=format, **changes)), weight, bias, held_out)
        for changes in ({}, without)
    )
    assert whole < less - least_gain_db


@pytest.mark.parametrize(
    "format", ["mxfp4", "nvfp4", "nvfp4_m1"]
)  # with even levels, as in int4, clipping gains little
@pytest.mark.parametrize("rule", ["weight_scale_rule", "activation_scale_rule"])
def test_scales_of_least_error_gain_over_those_that_amax_asks_for(format: str, rule: str) -> None:
    weight, bias, x, held_out = layer_problem()
    least, amax = (
        error_db(quantize_linear(weight, bias, x, recipe("default", format=format, **changes)), weight, bias, held_out)
        for changes in ({}, {rule: "ceil"})
    )
    assert least < amax - 0.05


@pytest.mark.parametrize("seed", range(3))
def test_int4_clips_little_where_features_are_large_in_input_and_weight_alike(seed: int) -> None:
    weight, bias, x, held_out = layer_problem(seed)
    least, amax = (
        error_db(quantize_linear(weight, bias, x, recipe("default", format="int4", **changes)), weight, bias, held_out)
        for changes in ({}, {"activation_scale_rule": "ceil"})
    )
    assert least < amax + 0.2  # clipping by 15 and 30 percent loses twice that here


def shifted_error(x: torch.Tensor, held_out: torch.Tensor, shift: torch.Tensor, settings: Recipe) -> float:
    """Return decibels of the output without the shift, which would otherwise hide the error."""
    weight, bias, *_ = layer_problem()
    layer: QuantizedLinear = quantize_linear(weight, bias, x + shift, settings)
    error = layer(held_out + shift).double() - (held_out + shift).double() @ weight.double().T - bias.double()
    return float(10 * torch.log10(error.square().sum() / (held_out @ weight.T).double().square().sum()))


@each_format
@pytest.mark.parametrize("branch", [{}, {"rank": 0, "deflation": False}], ids=["branch", "no branch"])
def test_a_centred_layer_does_not_feel_a_constant_that_is_added_to_its_input(
    format: str, branch: dict[str, object]
) -> None:
    _, _, x, held_out = layer_problem()
    shift = 3 * x.std(0) * torch.randn(x.shape[1], generator=torch.Generator().manual_seed(5)).sign()
    centred, uncentred = (
        recipe("default", format=format, centring=c, centring_by_bin=c, **branch) for c in (True, False)
    )
    still = shifted_error(x, held_out, torch.zeros(()), centred)
    # The offset is a bfloat16: three standard deviations are known to 1 % of one.
    assert shifted_error(x, held_out, shift, centred) == pytest.approx(still, abs=0.1)
    assert shifted_error(x, held_out, shift, uncentred) > still + (0.1 if not branch else 1.0)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_without_a_bias_is_quantized_too(bias: bool) -> None:
    weight, some, x, held_out = layer_problem()
    given = some if bias else None
    layer = quantize_linear(weight, given, x, recipe("default"))
    assert layer.bias is not None and layer.bias.dtype == torch.float32
    assert error_db(layer, weight, some if bias else torch.zeros(96), held_out) < -20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_weight_and_bias_may_be_of_half_precision(dtype: torch.dtype) -> None:
    weight, bias, x, held_out = (tensor.to(dtype) for tensor in layer_problem())
    layer = quantize_linear(weight, bias, x, recipe("default"))
    assert layer(held_out).dtype == dtype
    assert error_db(layer, weight.float(), bias.float(), held_out.float()) < -20


def test_a_rank_that_is_too_large_is_named() -> None:
    weight, bias, x, _ = layer_problem()
    for rank in (97, 129):
        with pytest.raises(RecipeError, match=rf"rank {rank} exceeds the smaller side"):
            quantize_linear(weight, bias, x, recipe("default", rank=rank))
