"""Laws of the kernels' arithmetic in plain PyTorch: where it is our own linear's, and where and how
it differs.
"""

import pytest
import torch

from tempoquant.errors import UnsupportedError
from tempoquant.formats import FORMATS, ScaleRule
from tempoquant.formats import quantize_activation as our_quantize_activation
from tempoquant.hosts.nunchaku.config import from_target, to_target
from tempoquant.hosts.nunchaku.linear import NunchakuLinear, nunchaku_linear, quantize_activation
from tempoquant.runtime.activation_bits import set_activation_bits
from tests.hosts.nunchaku.test_config import RANK, each_format, layer

INT4, NVFP4 = FORMATS["int4"], FORMATS["nvfp4"]


def exported(format: str):
    before = layer(format)
    return from_target(to_target(before, RANK), before.format)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@each_format
def test_codes_follow_from_the_scale_before_it_is_rounded_and_products_take_the_rounded_one(format):
    """Element by element, as the kernels' source says."""
    x, fmt = inputs(2, 64), FORMATS[format]
    levels = torch.tensor([*(-level for level in reversed(fmt.levels)), *fmt.levels])
    found = quantize_activation(x, fmt)
    for row in range(2):
        for start in range(0, 64, fmt.group_size):
            group = x[row, start : start + fmt.group_size]
            wanted = group.abs().max() * torch.tensor(1 / fmt.top_level)
            stored = wanted.to(torch.float8_e4m3fn if format == "nvfp4" else torch.bfloat16).float()
            nearest = levels[((group / wanted)[:, None] - levels).abs().argmin(-1)]
            assert torch.equal(found[row, start : start + fmt.group_size], nearest * stored)


@each_format
def test_where_the_scale_survives_its_rounding_the_kernels_do_what_we_do(format):
    fmt = FORMATS[format]
    x = inputs(4, 128)
    x[:, :: fmt.group_size] = 4 * fmt.top_level  # scale 4 in every group
    assert torch.equal(quantize_activation(x, fmt), our_quantize_activation(x, fmt, ScaleRule.CEIL))


def test_in_nvfp4_the_kernels_round_worse_than_we_do():
    x = inputs(64, 1024)
    errors = [
        float((rounded - x).square().sum())
        for rounded in (quantize_activation(x, NVFP4), our_quantize_activation(x, NVFP4, ScaleRule.CEIL))
    ]
    assert errors[0] > errors[1]


@each_format
def test_groups_of_zeros_stay_zero_and_nan_stays_visible(format):
    x = inputs(3, 128)
    x[0] = 0
    x[1, 5] = torch.nan
    rounded = quantize_activation(x, FORMATS[format])
    assert not rounded[0].any()
    assert bool(rounded[1, : FORMATS[format].group_size].isnan().all())
    assert bool(rounded[2].isfinite().all())


def test_groups_too_small_for_an_e4m3_scale_become_zero_and_too_large_ones_saturate():
    x = torch.full((2, 16), 2.0**-12)
    x[1] = 4 * 6 * 448.0
    rounded = quantize_activation(x, NVFP4)
    assert not rounded[0].any()
    assert bool((rounded[1] == 6 * 448).all())


@each_format
def test_an_exported_layer_computes_smoothing_the_residual_the_branch_and_the_bias(format):
    """The inputs need no rounding, so the layer is its effective weight."""
    after = exported(format)
    levels = torch.tensor([0.0, 1.0, -2.0, 3.0]).repeat(64)[: after.in_features]
    levels[:: after.format.group_size] = after.format.top_level  # so that the scale is 1
    x = (levels * after.smoothing_factor.float()).expand(2, -1)
    found = nunchaku_linear(x, after.input_transform, after.weight_tensors, after.format)
    wanted = x.double() @ after.dequantize().double().T + after.bias.double()
    assert float((found - wanted).abs().max()) <= 256 * torch.finfo(torch.float32).eps * float(wanted.abs().max())


def test_activations_of_eight_bits_are_refused():
    module = NunchakuLinear.from_layer(exported("int4"))
    set_activation_bits(module, 8)
    with pytest.raises(UnsupportedError, match="4-bit activations only"):
        module(inputs(1, 2, module.in_features))


@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_module_computes_the_function_whatever_the_timestep(format, dtype):
    after = exported(format)
    module = NunchakuLinear.from_layer(after)
    x = inputs(2, 5, after.in_features).to(dtype)
    y = module(x)
    assert y.dtype == dtype and y.shape == (2, 5, after.out_features)
    assert torch.equal(y, nunchaku_linear(x, after.input_transform, after.weight_tensors, after.format))
