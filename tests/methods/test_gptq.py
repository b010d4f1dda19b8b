"""Laws of GPTQ: it is the textbook's, it is rounding where nothing can be gained, and it wins where
something can.
"""

from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.formats import (
    FORMATS,
    INT4,
    MXFP4,
    Format,
    ScaleRule,
    WeightScale,
    decode,
    encode,
    from_codes,
    weight_scale,
)
from tempoquant.methods import act_order, feedback_matrix, gptq, round_to_nearest

each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def correlated_inputs(in_features: int, num_tokens: int = 2000, seed: int = 0) -> torch.Tensor:
    """Make correlated features, (tokens, in) float64, as in a real layer."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(in_features) + torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    return (torch.randn(num_tokens, in_features, generator=generator) @ mixing).double()


def problem(format: Format = MXFP4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, WeightScale]:
    """Make a weight (96, 128) float64, inputs, and the weight's scales."""
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(seed + 1))
    return weight.double(), correlated_inputs(128, seed=seed), weight_scale(weight, format, ScaleRule.FLOOR)


def rounded_by_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scale: WeightScale, format: Format, **settings: int
) -> torch.Tensor:
    return gptq(weight, feedback_matrix(hessian.to(weight.dtype, copy=True), 0.01), scale, format, **settings)


def textbook_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scale: WeightScale, format: Format, damping_fraction: float,
    order: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Run algorithm 1 of arXiv 2210.17323, column by column, with the inverse that it is written
    with.

    In another order: of the same problem with its features, and the scale of each, put in that
    order.
    """
    order = torch.arange(weight.shape[1]) if order is None else order
    hessian, weight = hessian[order][:, order], weight[:, order]
    damped = hessian + damping_fraction * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    weight, codes = weight.clone(), torch.empty(weight.shape, dtype=torch.int8)
    column_scale = scale.effective.to(weight.dtype).repeat_interleave(format.group_size, dim=1)[:, order]
    for column in range(weight.shape[1]):
        codes[:, column] = encode(weight[:, column] / column_scale[:, column], format)
        rounded = decode(codes[:, column], format, weight.dtype) * column_scale[:, column]
        error = (weight[:, column] - rounded) / factor[column, column]
        weight[:, column:] -= torch.outer(error, factor[column, column:])
    return codes[:, order.argsort()]


def output_error(
    weight: torch.Tensor, codes: torch.Tensor, scale: WeightScale, x: torch.Tensor, format: Format
) -> float:
    return float(((weight - from_codes(codes, scale.effective.double(), format)) @ x.T).square().sum())


@each_format
@hypothesis.settings(max_examples=20)
@given(seed=st.integers(0, 1000), damping_fraction=st.sampled_from([0.0, 0.001, 0.01, 0.3]))
def test_the_codes_are_those_of_the_textbook(format: Format, seed: int, damping_fraction: float) -> None:
    weight, x, scale = problem(format, seed)
    hessian = x.T @ x / len(x)
    wanted = textbook_gptq(weight, hessian, scale, format, damping_fraction)
    assert torch.equal(gptq(weight, feedback_matrix(hessian, damping_fraction), scale, format, 16), wanted)


def test_the_codes_are_those_of_the_textbook_across_the_panels_of_a_wide_layer() -> None:
    in_features = 1600  # one panel of the factorization and a part of one
    x = correlated_inputs(in_features, num_tokens=2000)
    weight = torch.randn(8, in_features, generator=torch.Generator().manual_seed(1))
    scale, hessian = weight_scale(weight, MXFP4, ScaleRule.FLOOR), x.T @ x / len(x)
    wanted = textbook_gptq(weight.double(), hessian, scale, MXFP4, 0.01)
    assert torch.equal(rounded_by_gptq(weight.double(), hessian, scale, MXFP4), wanted)


@each_format
@hypothesis.settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_in_another_order_features_are_rounded_as_the_textbook_rounds_them_there(format: Format, seed: int) -> None:
    weight, x, scale = problem(format, seed)
    hessian, order = x.T @ x / len(x), torch.randperm(128, generator=torch.Generator().manual_seed(seed))
    wanted = textbook_gptq(weight, hessian, scale, format, 0.01, order)
    assert torch.equal(gptq(weight, feedback_matrix(hessian, 0.01, order), scale, format, 16), wanted)


def test_features_that_matter_most_are_rounded_first_and_equal_ones_as_they_stand() -> None:
    assert act_order(torch.tensor([1.0, 3.0, 0.0, 3.0, 2.0])).tolist() == [1, 3, 4, 0, 2]


@each_format
def test_rounding_first_what_matters_most_leaves_less_error(format: Format) -> None:
    def error(seed: int, *, is_ordered: bool) -> float:
        weight, x, scale = problem(format, seed)
        x *= torch.randn(128, generator=torch.Generator().manual_seed(seed + 2)).exp()  # some matter much more
        hessian = x[:1000].T @ x[:1000] / 1000
        order = act_order(hessian.diagonal()) if is_ordered else None
        codes = gptq(weight, feedback_matrix(hessian, 0.01, order), scale, format)
        return output_error(weight, codes, scale, x[1000:], format)

    pairs = [(error(seed, is_ordered=True), error(seed, is_ordered=False)) for seed in range(5)]
    assert all(ordered < 0.95 * plain for ordered, plain in pairs)


def test_gptq_with_an_identity_hessian_is_rounding() -> None:
    weight, _, scale = problem()
    assert torch.equal(rounded_by_gptq(weight, torch.eye(128), scale, MXFP4), round_to_nearest(weight, scale, MXFP4))


@pytest.mark.parametrize("block_size", [1, 17, 128, 1000])
def test_the_block_size_changes_nothing(block_size: int) -> None:
    weight, x, scale = problem()
    hessian = x.T @ x / len(x)
    assert torch.equal(
        rounded_by_gptq(weight, hessian, scale, MXFP4, block_size=block_size),
        rounded_by_gptq(weight, hessian, scale, MXFP4),
    )


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_gptq_beats_rounding_on_correlated_inputs_it_has_not_seen(format: Format, dtype: torch.dtype) -> None:
    weight, x, scale = problem(format)
    held_out = correlated_inputs(128, seed=0)[1000:]
    codes = rounded_by_gptq(weight.to(dtype), x[:1000].T @ x[:1000] / 1000, scale, format)
    by_gptq = output_error(weight, codes, scale, held_out, format)
    by_rounding = output_error(weight, round_to_nearest(weight, scale, format), scale, held_out, format)
    assert by_gptq < 0.8 * by_rounding


def test_a_weight_on_the_grid_stays_as_it_is() -> None:
    weight, x, scale = problem()
    codes = round_to_nearest(weight, scale, MXFP4)
    on_grid = from_codes(codes, scale.effective.double(), MXFP4)
    assert torch.equal(rounded_by_gptq(on_grid, x.T @ x, scale, MXFP4), codes)


def test_a_feature_that_is_always_zero_is_rounded_to_nearest() -> None:
    weight, x, scale = problem()
    x[:, 5] = 0
    codes = rounded_by_gptq(weight, x.T @ x / len(x), scale, MXFP4)
    assert torch.equal(codes[:, 5], round_to_nearest(weight, scale, MXFP4)[:, 5])


def test_gptq_leaves_its_arguments_alone() -> None:
    weight, x, scale = problem()
    feedback = feedback_matrix(x.T @ x, 0.01)
    before = weight.clone(), feedback.matrix.clone()
    gptq(weight, feedback, scale, MXFP4)
    assert torch.equal(weight, before[0]) and torch.equal(feedback.matrix, before[1])


def test_weights_that_share_an_input_are_rounded_alike_together_and_apart() -> None:
    weight, x, scale = problem()
    feedback = feedback_matrix(x.T @ x, 0.01)
    whole = gptq(weight, feedback, scale, MXFP4)
    top = WeightScale(scale.group[:40], scale.tensor)
    assert torch.equal(gptq(weight[:40], feedback, top, MXFP4), whole[:40])


def test_the_same_inputs_give_the_same_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 1024, generator=generator)
    x = torch.randn(2048, 1024, generator=generator)
    scale = weight_scale(weight, MXFP4, ScaleRule.FLOOR)
    assert torch.equal(rounded_by_gptq(weight, x.T @ x, scale, MXFP4), rounded_by_gptq(weight, x.T @ x, scale, MXFP4))


def test_the_worked_example_of_the_page_is_what_gptq_computes():
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
    weight = torch.tensor([[2.4, 1.4], [-1.3, 0.6]], dtype=torch.float64)
    hessian = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    feedback = feedback_matrix(hessian.clone(), damping_fraction=0.0)
    assert torch.equal(feedback.matrix, torch.tensor([[1.0, 0.8], [0.0, 1.0]], dtype=torch.float64))
    scale = WeightScale(torch.ones(2, 1), torch.ones(()))  # INT4's levels are whole numbers
    nearest = gptq(weight, feedback_matrix(torch.eye(2, dtype=torch.float64)), scale, INT4).double()
    chosen = gptq(weight, feedback, scale, INT4).double()
    for row in range(2):
        cells = [str(row + 1)]
        for codes in (nearest[row], chosen[row]):
            error = weight[row] - codes
            cells += [", ".join(f"{code:.0f}" for code in codes.tolist()), f"{error @ hessian @ error:.3f}"]
        assert f"| {' | '.join(cells)} |".replace("-", "−") in page
