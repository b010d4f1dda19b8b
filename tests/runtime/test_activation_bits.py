"""Laws of W4A8: eight bits where they were asked for, four elsewhere, and nothing is stored."""

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from tempoquant.errors import RecipeError, TempoQuantError, UnsupportedError
from tempoquant.runtime.activation_bits import set_activation_bits
from tempoquant.runtime.convert import install_layers, quantized_linears
from tempoquant.timesteps import TimestepBins
from tests.quantized_wan import BINS, inputs, quantize_all, run, tiny_wan
from tests.random_layers import reference_of

each_bins = pytest.mark.parametrize("bins", [TimestepBins(), BINS], ids=["one bin", "three bins"])


def quantized(bins: TimestepBins, format: str = "mxfp4") -> Any:
    model = tiny_wan(0, num_layers=1)
    install_layers(model, quantize_all(model, format, bins=bins), bins)
    return model


@each_bins
def test_eight_bits_hold_inside_the_interval_and_four_outside(bins: TimestepBins) -> None:
    model = quantized(bins)
    in_four = {t: run(model, timestep=t) for t in (910.0, 930.0, 990.0)}
    set_activation_bits(model, 8)
    in_eight = {t: run(model, timestep=t) for t in in_four}
    assert all(not torch.equal(in_eight[t], in_four[t]) for t in in_four)
    set_activation_bits(model, 8, (910.0, 930.0))
    for timestep, wanted in ((910.0, in_eight), (930.0, in_four), (990.0, in_four)):
        assert torch.equal(run(model, timestep=timestep), wanted[timestep])
    set_activation_bits(model, 4)
    assert all(torch.equal(run(model, timestep=t), y) for t, y in in_four.items())


@each_bins
def test_rows_of_a_batch_have_the_bits_of_their_own_timesteps(bins: TimestepBins) -> None:
    model = quantized(bins)
    set_activation_bits(model, 8, (920.0, 940.0))
    linear = model.blocks[0].ffn.net[2]
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0))
    layer = linear.to_layer()
    with linear.at_timestep(torch.tensor([910.0, 930.0, 990.0])):
        y = linear(x)
    for row, timestep in enumerate((910.0, 930.0, 990.0)):
        clip_ratio = layer.clip_ratio[bins.of(timestep)]
        wanted = reference_of(layer, x[row], clip_ratio, row == 1)
        torch.testing.assert_close(y[row], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "nvfp4_m1", "int4"])
def test_eight_bits_are_nearer_to_the_16_bit_input_than_four(format: str) -> None:
    model = quantized(TimestepBins(), format)
    x = torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(0))
    linear = model.blocks[0].attn1.to_q
    exact = x @ linear.dequantize().T + linear.to_layer().effective_bias()
    in_four = (linear(x) - exact).norm()
    set_activation_bits(model, 8)
    with linear.at_timestep(0.0):
        assert (linear(x) - exact).norm() < 0.3 * in_four


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_is_not_compiled_again_when_the_bits_change(backend: str) -> None:
    torch.compiler.reset()
    model = quantized(BINS)
    set_activation_bits(model, 8, (0.0, 930.0))
    wanted = {t: run(model, timestep=t) for t in (900.0, 925.0, 935.0, 990.0)}
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), torch.compiler.set_stance(skip_guard_eval_unsafe=False):
        compiled(**inputs(timestep=900.0))
        with torch.compiler.set_stance("fail_on_recompile"):
            for timestep, y in wanted.items():
                torch.testing.assert_close(compiled(**inputs(timestep=timestep))[0], y, rtol=2e-2, atol=2e-2)


def test_a_pipeline_passes_it_on_to_its_experts() -> None:
    class Pipeline:
        components: ClassVar[dict[str, Any]] = {
            "transformer": quantized(BINS),
            "transformer_2": quantized(BINS),
            "scheduler": object(),
        }

    set_activation_bits(Pipeline(), 8, (0.0, 500.0))
    for name in ("transformer", "transformer_2"):
        clocks = {linear.clock.eight_bit_timesteps for linear in quantized_linears(Pipeline.components[name]).values()}
        assert clocks == {(0.0, 500.0)}


@pytest.mark.parametrize(
    ("bits", "timesteps"), [(6, None), (16, None), (4, (0.0, 1.0)), (8, (5.0, 5.0)), (8, (-1.0, 5.0))]
)
def test_other_bits_and_empty_intervals_are_refused(bits: int, timesteps: Any) -> None:
    with pytest.raises(RecipeError, match="bits"):
        set_activation_bits(quantized(TimestepBins()), bits, timesteps)


def test_a_16_bit_model_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no 4-bit linear"):
        set_activation_bits(nn.Linear(4, 4), 8)


def test_a_layer_alone_needs_a_timestep() -> None:
    model = quantized(TimestepBins())
    set_activation_bits(model, 8, (0.0, 500.0))
    with pytest.raises(TempoQuantError, match="eight bits at some timesteps"):
        model.blocks[0].attn1.to_q(torch.randn(1, 3, 128))
