"""Laws of GPTQ and of its Hessian."""

import pytest
import torch

from tempoquant.errors import HessianError
from tempoquant.formats import FORMATS, MXFP4, Format, ScaleRule, WeightScale, from_codes, weight_scale
from tempoquant.methods import HessianAccumulator, gptq, round_to_nearest


def correlated_inputs(in_features: int, num_tokens: int = 2000, seed: int = 0) -> torch.Tensor:
    """(tokens, in) float64, features that lean on each other as in a real layer."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(in_features) + torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    return (torch.randn(num_tokens, in_features, generator=generator) @ mixing).double()


def problem(format: Format = MXFP4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, WeightScale]:
    """A weight (96, 128) float64, inputs, and the weight's scales."""
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(seed + 1))
    return weight.double(), correlated_inputs(128, seed=seed), weight_scale(weight, format, ScaleRule.FLOOR)


def output_error(
    weight: torch.Tensor, codes: torch.Tensor, scale: WeightScale, x: torch.Tensor, format: Format
) -> float:
    return float(((weight - from_codes(codes, scale.effective.double(), format)) @ x.T).square().sum())


def test_gptq_with_an_identity_hessian_is_rounding() -> None:
    weight, _, scale = problem()
    assert torch.equal(gptq(weight, torch.eye(128), scale, MXFP4).codes, round_to_nearest(weight, scale, MXFP4))


@pytest.mark.parametrize("block_size", [1, 17, 128, 1000])
def test_the_block_size_changes_nothing(block_size: int) -> None:
    weight, x, scale = problem()
    hessian = x.T @ x / len(x)
    assert torch.equal(
        gptq(weight, hessian, scale, MXFP4, block_size=block_size).codes, gptq(weight, hessian, scale, MXFP4).codes
    )


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_gptq_beats_rounding_on_correlated_inputs_it_has_not_seen(format: Format) -> None:
    weight, x, scale = problem(format)
    held_out = correlated_inputs(128, seed=0)[1000:]
    hessian = x[:1000].T @ x[:1000] / 1000
    by_gptq = output_error(weight, gptq(weight, hessian, scale, format).codes, scale, held_out, format)
    by_rounding = output_error(weight, round_to_nearest(weight, scale, format), scale, held_out, format)
    assert by_gptq < 0.8 * by_rounding


def test_a_weight_on_the_grid_stays_as_it_is() -> None:
    weight, x, scale = problem()
    codes = round_to_nearest(weight, scale, MXFP4)
    on_grid = from_codes(codes, scale.effective.double(), MXFP4)
    assert torch.equal(gptq(on_grid, x.T @ x, scale, MXFP4).codes, codes)


def test_a_feature_that_is_always_zero_is_rounded_to_nearest() -> None:
    weight, x, scale = problem()
    x[:, 5] = 0
    codes = gptq(weight, x.T @ x / len(x), scale, MXFP4).codes
    assert torch.equal(codes[:, 5], round_to_nearest(weight, scale, MXFP4)[:, 5])


def test_gptq_leaves_its_arguments_alone() -> None:
    weight, x, scale = problem()
    hessian = x.T @ x
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, scale, MXFP4)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_a_bad_hessian_raises_and_names_the_remedy() -> None:
    weight, _, scale = problem()
    with pytest.raises(HessianError, match="more tokens, or raise damping_fraction"):
        gptq(weight, -torch.eye(128), scale, MXFP4)
    with pytest.raises(HessianError, match="NaN"):
        gptq(weight, torch.full((128, 128), torch.nan), scale, MXFP4)


def test_a_hessian_that_only_float64_can_factor_is_retried_and_reported() -> None:
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(128, 128, generator=generator, dtype=torch.float64)).Q
    eigenvalues = torch.logspace(0, -9, 128, dtype=torch.float64)
    hessian = basis * eigenvalues @ basis.T
    weight, _, scale = problem()
    result = gptq(weight.float(), hessian, scale, MXFP4, damping_fraction=1e-12)
    assert result.needed_float64
    assert not gptq(weight.float(), hessian, scale, MXFP4, damping_fraction=0.01).needed_float64


def test_the_hessian_does_not_depend_on_batching() -> None:
    x = correlated_inputs(64).float()
    whole, parts = HessianAccumulator(64), HessianAccumulator(64)
    whole.add(x)
    for part in x.reshape(8, 5, 50, 64):
        parts.add(part)
    assert parts.num_tokens == whole.num_tokens == 2000
    torch.testing.assert_close(parts.hessian, whole.hessian, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.hessian.double(), x.double().T @ x.double() / 2000, rtol=1e-4, atol=1e-4)


def test_a_hessian_without_tokens_is_an_error() -> None:
    with pytest.raises(HessianError, match="no token"):
        _ = HessianAccumulator(8).hessian
