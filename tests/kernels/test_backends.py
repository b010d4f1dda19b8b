"""Every backend computes what the reference defines: a whole linear, with everything that it may
have, on each.
"""

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tempoquant.errors import UnsupportedError
from tempoquant.formats import FORMATS, INT4, MXFP4, NVFP4_M1, Format, ScaleRule
from tempoquant.kernels import operators
from tempoquant.kernels.dispatch import Backend, forced
from tempoquant.kernels.reference import dequantize_residual, round_input
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.runtime.shared_input import SharedInput
from tempoquant.timesteps import TimestepBins
from tests.kernels.products import DEVICE
from tests.random_layers import by_bin, random, random_layer, random_linear

BACKENDS = [
    (Backend.FP4, MXFP4),
    (Backend.FP4, NVFP4_M1),
    *((Backend.FP8, format) for format in FORMATS.values() if format.is_fp8_exact),
    *((Backend.BF16, format) for format in FORMATS.values()),
    (Backend.INT8, INT4),
]
each_backend = pytest.mark.parametrize(
    ("backend", "format"), BACKENDS, ids=[f"{b.value}-{f.name}" for b, f in BACKENDS]
)
BFLOAT16_UNIT = 2.0**-8  # twice its rounding error


def linear(format: Format, rule: ScaleRule = ScaleRule.LEAST_ERROR, bias: bool = True, **has: Any) -> QuantizedLinear:
    source = random_linear(3 * format.group_size, 16)
    if not bias:
        source.bias, has["centred"] = None, False  # which needs one
    layer = random_layer(source, format, TimestepBins(), rule=rule, **{"rank": 3, "size": 0.3} | has)
    return QuantizedLinear.from_layer(layer).to(DEVICE)


def by_definition(module: QuantizedLinear, x: torch.Tensor, eight_bits: bool = False) -> torch.Tensor:
    """Compute the reference's formula in float64, with h as the kernels round it."""
    transform, weight, entry = module.input_transform(), module.weight_tensors(), module.entry
    hidden = None if transform.down is None else (x.float() @ transform.down.float().T).bfloat16().float()
    z = transform.quantizer_input(x.float(), hidden)
    clip_ratio = module.to_layer().clip_ratio
    rounded = round_input(z, entry.format, entry.activation_scale_rule, clip_ratio, eight_bits).double()
    y = rounded @ dequantize_residual(weight, entry.format, torch.float64).T
    if hidden is not None and weight.up is not None:
        y = y + hidden.double() @ weight.up.double().T
    return y if weight.bias is None else y + weight.bias.double()


def relative(error: torch.Tensor, y: torch.Tensor) -> float:
    return float(error.double().norm() / y.double().norm())


@each_backend
@pytest.mark.parametrize("rule", [ScaleRule.CEIL, ScaleRule.LEAST_ERROR])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_linear_is_the_reference_up_to_the_rounding_of_its_output(
    backend: Backend, format: Format, rule: ScaleRule, dtype: torch.dtype
) -> None:
    module = linear(format, rule, deflated=False)
    x = random(2, 9, 3 * format.group_size).to(dtype).to(DEVICE)
    wanted = by_definition(module, x)
    with forced(backend):
        y = module(x)
    # INT4 in bfloat16 rounds both operands; elsewhere only y is rounded, and h may fall on the
    # other side of a tie.
    rounds_operands = format is INT4 and backend is Backend.BF16
    allowed = BFLOAT16_UNIT if dtype == torch.bfloat16 or rounds_operands else 1e-3
    assert y.dtype == dtype and y.shape == wanted.shape and relative(y - wanted, wanted) < allowed


@each_backend
@pytest.mark.parametrize("rotated", [False, True])
def test_a_deflated_linear_rounds_nearly_every_number_as_the_reference(
    backend: Backend, format: Format, rotated: bool
) -> None:
    """The sum h · deflationᵀ has another order, so that a few numbers near a tie round the other
    way.
    """
    module = linear(format, rotated=rotated)
    x = random(2, 33, 3 * format.group_size).bfloat16().to(DEVICE)
    wanted = by_definition(module, x)
    with forced(backend):
        assert relative(module(x) - wanted, wanted) < 2 * BFLOAT16_UNIT


@each_backend
@pytest.mark.parametrize("has", [{"smoothed": False}, {"rank": 0}, {"centred": False}, {"bias": False}], ids=str)
def test_whatever_a_linear_lacks_is_left_out(backend: Backend, format: Format, has: dict[str, Any]) -> None:
    module = linear(format, ScaleRule.CEIL, **has)
    x = random(1, 5, 3 * format.group_size).bfloat16().to(DEVICE)
    wanted = by_definition(module, x)
    with forced(backend):
        assert relative(module(x) - wanted, wanted) < 2 * BFLOAT16_UNIT


@each_backend
def test_eight_bits_are_the_references_eight_bits(backend: Backend, format: Format) -> None:
    module = linear(format, deflated=False)
    module.clock.eight_bit_timesteps = (0.0, 500.0)
    x = random(2, 5, 3 * format.group_size).bfloat16().to(DEVICE)
    with forced(backend), module.at_timestep(torch.tensor([100.0, 900.0])):
        y = module(x)
    for row, eight_bits in enumerate((True, False)):
        wanted = by_definition(module, x[row], eight_bits)
        assert relative(y[row] - wanted, wanted) < BFLOAT16_UNIT


@each_backend
def test_shared_inputs_give_the_same_result(backend: Backend, format: Format) -> None:
    one, other = linear(format), linear(format)
    x = random(1, 7, 3 * format.group_size).bfloat16().to(DEVICE)
    with forced(backend):
        alone = [one(x), other(x)]
        one.shared_input = other.shared_input = SharedInput(2)
        assert all(torch.equal(a, b) for a, b in zip(alone, [one(x), other(x)], strict=True))


@pytest.mark.parametrize(("backend", "format"), [(Backend.FP8, MXFP4), (Backend.BF16, NVFP4_M1), (Backend.INT8, INT4)])
def test_rows_of_a_batch_are_computed_with_the_tensors_of_their_own_bins(backend: Backend, format: Format) -> None:
    layer, bins = linear(format).to_layer(), TimestepBins((500.0,))
    layer = by_bin(dataclasses.replace(layer, bins=bins, clip_ratio=torch.tensor([0.9, 0.7])), seed=1)
    module = QuantizedLinear.from_layer(layer).to(DEVICE)
    x = random(2, 5, 3 * format.group_size).bfloat16().to(DEVICE)
    with forced(backend):
        with module.at_timestep(torch.tensor([900.0, 100.0])):
            y = module(x)
        for row, timestep_bin in enumerate((1, 0)):
            alone = QuantizedLinear.from_layer(layer.at_bin(timestep_bin)).to(DEVICE)
            assert torch.equal(y[row : row + 1], alone(x[row : row + 1]))


@each_backend
def test_no_tokens_and_strided_tokens_are_fine(backend: Backend, format: Format) -> None:
    module = linear(format)
    x = random(4, 6, 3 * format.group_size).bfloat16().to(DEVICE)
    with forced(backend):
        assert module(x[:0]).shape == (0, 6, module.out_features)
        assert torch.equal(module(x[:, ::2]), module(x[:, ::2].contiguous()))
        turned = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(module(turned), module(x))


@each_backend
def test_a_bad_activation_makes_its_token_nan_and_no_other(backend: Backend, format: Format) -> None:
    module = linear(format, deflated=False)
    x = random(1, 5, 3 * format.group_size).bfloat16().to(DEVICE)
    x[0, 2, 3] = torch.nan
    with forced(backend):
        assert module(x)[0].isnan().all(-1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_tokens_outside_fp8_go_through_bfloat16(dtype: torch.dtype) -> None:
    """Groups 2^20 apart: relative to the largest, FP8 has no numbers for the smallest."""
    module = linear(MXFP4, ScaleRule.CEIL, deflated=False, centred=False, bias=False)
    x = random(1, 40, 3 * MXFP4.group_size)
    x[0, ::7, : MXFP4.group_size] *= 2.0**-20
    x[0, 3] = 0
    x = x.to(dtype).to(DEVICE)
    source = operators.Source(x[0], ScaleRule.CEIL, torch.ones(1, device=DEVICE), None)
    quantized = operators.quantize_input(source, module.input_transform(), MXFP4, Backend.FP8.value)
    assert quantized.outside is not None and quantized.outside.nonzero().flatten().tolist() == list(range(0, 40, 7))
    wanted = by_definition(module, x)
    with forced("fp8"):
        y = module(x)
    assert relative((y - wanted)[0, ::7], wanted[0, ::7]) < 2 * BFLOAT16_UNIT
    assert relative(y - wanted, wanted) < 2 * BFLOAT16_UNIT


def test_an_mxfp4_weight_outside_fp8_takes_bf16_and_others_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    original = operators._kernels_of
    monkeypatch.setattr("tempoquant.runtime.linear_computation.forward_by_tape", lambda *_: None)
    monkeypatch.setattr(operators, "_kernels_of", lambda backend: taken.append(backend) or original(backend))
    module = linear(MXFP4, ScaleRule.CEIL)
    x = random(1, 3, 3 * MXFP4.group_size).bfloat16().to(DEVICE)
    with forced("fp8"):
        module(x)
        assert set(taken) == {"fp8"} and module.fits_fp8
        taken.clear()
        wide = linear(MXFP4, ScaleRule.CEIL)
        wide.scale.data = wide.scale.clone()
        wide.scale.data[0, 0] -= 20
        wide.load_state_dict(wide.state_dict())  # other numbers are asked anew
        wanted = by_definition(wide, x)
        assert relative(wide(x) - wanted, wanted) < 2 * BFLOAT16_UNIT
        assert set(taken) == {"bf16"} and not wide.fits_fp8


def test_a_backend_that_does_not_suit_a_format_is_refused() -> None:
    module = linear(INT4)
    x = random(1, 3, 3 * INT4.group_size)
    with forced("fp8"), pytest.raises(UnsupportedError, match="no FP8 numbers"):
        module(x.to(DEVICE))
    with forced("int8"), pytest.raises(UnsupportedError, match="no integers"):
        linear(NVFP4_M1)(random(1, 3, 48).to(DEVICE))
