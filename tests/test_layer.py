"""QuantizedLayer: counted to the bit; and, run alone as a module, aware of the timestep."""

from typing import Any

import pytest
import torch

from tempoquant.checkpoint.tensors import entry_of, num_replacing_bytes
from tempoquant.errors import CheckpointError, TempoQuantError
from tempoquant.formats import FORMATS, MXFP4, Format
from tempoquant.kernels.reference import dequantize_residual
from tempoquant.layer import LowRankBranch, QuantizedLayer
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.timesteps import TimestepBins
from tests.random_layers import by_bin, random, random_layer, random_linear, reference_of

THREE_BINS = TimestepBins((300.0, 600.0))
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def layer_of(format: Format | str = MXFP4, out_features: int = 8, in_features: int = 128, **has: Any) -> QuantizedLayer:
    """Make a random layer of one timestep bin; `has` as for `random_layer`."""
    return random_layer(random_linear(in_features, out_features), format, **{"bins": TimestepBins()} | has)


@pytest.mark.parametrize(
    ("name", "bits_per_code_and_scale"), [("mxfp4", 4.25), ("int4", 4.25), ("nvfp4", 4.5), ("nvfp4_m1", 4.5)]
)
@pytest.mark.parametrize(("rank", "deflated"), [(0, False), (16, False), (16, True)])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("bins", [TimestepBins(), THREE_BINS], ids=["one bin", "three bins"])
def test_bits_per_weight_count_everything_that_replaces_the_weight(
    name, bits_per_code_and_scale, rank, deflated, centred, smoothed, bins
):
    out_features, in_features = 96, 256
    layer = layer_of(
        name, out_features, in_features, rank=rank, smoothed=smoothed, bins=bins, deflated=deflated, centred=centred
    )
    extra_bits = 16 * rank * (out_features + in_features) + 32 * bins.num_bins
    extra_bits += 16 * rank * in_features if deflated else 0
    extra_bits += 16 * in_features * (smoothed + centred)
    extra_bits += 32 if FORMATS[name].has_tensor_scale else 0
    wanted = bits_per_code_and_scale + extra_bits / (out_features * in_features)
    assert layer.bits_per_weight == pytest.approx(wanted, rel=1e-12)


def test_of_tensors_by_bin_all_count_but_the_bias_that_was_there_before():
    plain = layer_of(MXFP4, 96, 256, rank=16, bins=THREE_BINS)
    centred, both = by_bin(plain, deflated=False), by_bin(plain)
    assert centred.num_bytes - plain.num_bytes == 2 * (2 * 256 + 4 * 96)
    assert both.num_bytes - centred.num_bytes == 2 * 2 * 16 * (256 + 96)
    assert all(num_replacing_bytes(entry_of(each), 3) == each.num_bytes for each in (plain, centred, both))


def test_the_layer_of_a_bin_shares_memory_and_has_one_bin():
    layer = by_bin(layer_of(bins=THREE_BINS))
    for i in range(3):
        one = layer.at_bin(i)
        assert one.bins == TimestepBins() and one.clip_ratio.tolist() == [layer.clip_ratio[i]]
        assert one.packed is layer.packed and one.bias.data_ptr() == layer.bias[i].data_ptr()
        assert torch.equal(layer.dequantize(i), one.dequantize())
        assert torch.equal(layer.effective_bias(i), one.effective_bias())


def test_weight_and_bias_that_differ_by_bin_are_their_mean_when_none_is_named():
    plain = layer_of(bins=THREE_BINS)
    centred, both = by_bin(plain, deflated=False), by_bin(plain)
    assert torch.equal(centred.dequantize(), plain.dequantize()), "centring leaves the weight alone"
    torch.testing.assert_close(both.dequantize(), torch.stack([both.dequantize(i) for i in range(3)]).mean(0))
    torch.testing.assert_close(both.effective_bias(), torch.stack([both.effective_bias(i) for i in range(3)]).mean(0))
    with pytest.raises(CheckpointError, match="differ by timestep bin: ask for"):
        _ = centred.weight_tensors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_offset": torch.zeros(3, 128)}, "input offset and bias are by timestep bin together"),
        ({"bias": torch.zeros(3, 8)}, "input offset and bias are by timestep bin together"),
        ({"bias": torch.zeros(2, 8), "input_offset": torch.zeros(2, 128)}, "is of 2 bins, not 3"),
        ({"branch": LowRankBranch(torch.zeros(3, 8, 4), torch.zeros(4, 128), torch.zeros(3, 128, 4))},
         "deflation by timestep bin needs an input offset by timestep bin"),
    ],
)  # fmt: skip
def test_tensors_by_bin_that_do_not_fit_together_are_refused(changes, words):
    layer = layer_of(bins=THREE_BINS)
    with pytest.raises(CheckpointError, match=words):
        QuantizedLayer(**{**vars(layer), **changes})


@pytest.mark.parametrize("deflation", [None, torch.zeros(128, 4), torch.zeros(2, 128, 4)])
def test_up_and_deflation_are_by_bin_together(deflation):
    with pytest.raises(CheckpointError, match="up and deflation are by timestep bin together"):
        LowRankBranch(torch.zeros(3, 8, 4), torch.zeros(4, 128), deflation)


def test_shapes_are_read_off_the_packed_weight():
    layer = layer_of(out_features=8, in_features=128, rank=4)
    assert (layer.out_features, layer.in_features, layer.rank) == (8, 128, 4)
    assert layer_of(rank=0).rank == 0


@each_format
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_calling_a_layer_is_the_reference_kernel(format: Format, deflated: bool, centred: bool):
    layer = layer_of(format, deflated=deflated, centred=centred)
    x = random(3, 128)
    assert torch.equal(QuantizedLinear.from_layer(layer)(x), reference_of(layer, x, layer.clip_ratio[0]))


@each_format
def test_a_full_rank_branch_over_an_empty_residual_reproduces_a_16_bit_linear(format: Format):
    """up · down = W · I, both exact in bfloat16, and the residual is all zeros."""
    weight = random(16, 128, seed=4).bfloat16()
    nothing = random_linear(128, 16)
    nothing.weight.zero_()
    empty = random_layer(nothing, format, TimestepBins(), smoothed=False, centred=False)
    layer = QuantizedLayer(**{**vars(empty), "branch": LowRankBranch(weight, torch.eye(128).bfloat16())})
    x = random(5, 128).double()
    y = reference_of(layer, x)
    torch.testing.assert_close(y, x @ weight.double().T + layer.bias.double(), rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.dequantize(), weight.float())


@each_format
def test_the_effective_weight_is_what_unrounded_inputs_meet(format: Format):
    """16-bit activations would give x · dequantize()ᵀ: residual over smoothing factor, plus
    branch.
    """
    layer = layer_of(format, deflated=False)
    plain = QuantizedLayer(**{**vars(layer), "branch": None, "smoothing_factor": None})
    residual = plain.dequantize() / layer.smoothing_factor.float()
    assert torch.equal(layer.dequantize(), residual + layer.branch.product())


@each_format
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_with_unrounded_inputs_a_layer_is_its_effective_weight_and_bias(format, smoothed, deflated, centred, rotated):
    layer = layer_of(format, smoothed=smoothed, deflated=deflated, centred=centred, rotated=rotated)
    x, transform, weight = random(5, 128).double(), layer.input_transform, layer.weight_tensors
    not_rounded = transform(x)
    y = not_rounded @ dequantize_residual(weight, format, torch.float64).T
    y = y + transform.hidden(x) @ weight.up.double().T
    found = x @ layer.dequantize().double().T + layer.effective_bias().double()
    terms = 128 * 2.0**-24  # a product's float32 rounding, relative to the terms it adds
    size = float(dequantize_residual(weight, format).abs().sum(1).max() * (1 + not_rounded.abs().max()) * 40)
    torch.testing.assert_close(found, y + layer.bias.double(), rtol=0, atol=terms * size)
    assert torch.equal(layer.effective_bias(), layer.bias) is not centred


def test_a_layer_without_a_bias_has_no_effective_one():
    assert QuantizedLayer(**{**vars(layer_of(centred=False)), "bias": None}).effective_bias() is None


def test_an_input_offset_needs_a_bias():
    with pytest.raises(CheckpointError, match="offset needs a bias"):
        QuantizedLayer(**{**vars(layer_of()), "bias": None})


def test_a_deflation_has_the_shape_of_down_turned():
    with pytest.raises(CheckpointError, match=r"deflation is \(4, 128\)"):
        LowRankBranch(torch.zeros(8, 4), torch.zeros(4, 128), torch.zeros(4, 128))


def test_a_layer_with_several_bins_refuses_to_run_without_a_timestep():
    layer = QuantizedLinear.from_layer(layer_of(bins=THREE_BINS))
    with pytest.raises(TempoQuantError, match=r"3 timestep bins.*at_timestep"):
        layer(random(2, 128))


def test_a_layer_with_one_bin_runs_with_and_without_a_timestep():
    layer, x = QuantizedLinear.from_layer(layer_of()), random(2, 128)
    with layer.at_timestep(500.0):
        inside = layer(x)
    assert torch.equal(inside, layer(x))


@pytest.mark.parametrize(
    ("timestep", "bin_index"),
    [(0, 0), (299.9, 0), (300, 1), (300.0, 1), (599.9, 1), (600, 2), (1000, 2)],
)
def test_the_clip_ratio_is_that_of_the_timesteps_bin_and_an_edge_belongs_to_the_upper_one(timestep, bin_index):
    layer, x = QuantizedLinear.from_layer(layer_of(bins=THREE_BINS)), random(2, 128)
    with layer.at_timestep(timestep):
        got = layer(x)
    stored = layer.to_layer()
    alone = [reference_of(stored, x, ratio) for ratio in stored.clip_ratio]
    assert torch.equal(got, alone[bin_index])
    assert not torch.equal(alone[0], alone[2])


def test_timesteps_nest_and_end_even_after_an_exception():
    layer, x = QuantizedLinear.from_layer(layer_of(bins=THREE_BINS)), random(2, 128)
    with layer.at_timestep(100):
        clean = layer(x)
        with pytest.raises(ZeroDivisionError), layer.at_timestep(900):
            raise ZeroDivisionError
        assert torch.equal(layer(x), clean)
    with pytest.raises(TempoQuantError):
        layer(x)


def test_a_timestep_given_to_one_layer_does_not_reach_another():
    layer, other = (QuantizedLinear.from_layer(layer_of(bins=THREE_BINS)) for _ in range(2))
    with layer.at_timestep(100), pytest.raises(TempoQuantError, match="at_timestep"):
        other(random(2, 128))


def test_clip_ratios_and_bins_must_agree():
    layer = layer_of()
    with pytest.raises(CheckpointError, match="3 bins need as many clip ratios, not 1"):
        QuantizedLayer(**{**vars(layer), "bins": THREE_BINS})


def test_branch_ranks_must_agree():
    with pytest.raises(CheckpointError, match=r"ranks differ.*\(8, 4\).*\(5, 128\)"):
        LowRankBranch(torch.zeros(8, 4), torch.zeros(5, 128))


def test_a_layer_cannot_be_changed():
    with pytest.raises(AttributeError):
        layer_of().bias = None
