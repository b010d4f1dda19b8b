"""Laws of an exported layer: what is carried bit for bit, what is rounded and by how much, what is
refused by name.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.checkpoint.tensors import StoredAs, entry_of
from tempoquant.errors import CheckpointError, UnsupportedError
from tempoquant.formats import FORMATS, ScaleRule
from tempoquant.hosts.nunchaku.config import (
    BINS,
    common_format,
    common_rank,
    exported_entry,
    from_target,
    require_exportable,
    target_forms,
    to_target,
)
from tempoquant.layer import QuantizedLayer
from tempoquant.recipe import Recipe
from tests.random_layers import random_layer

RANK = 16
BF16_ROUNDING = 2.0**-8  # the largest relative error of rounding to eight significant bits

each_format = pytest.mark.parametrize("format", ["int4", "nvfp4"])


def layer(format: str = "int4", bias: bool = True, shape: tuple[int, int] = (256, 128), **kwargs) -> QuantizedLayer:
    """Make a layer that can be exported, with three bins of random clip ratios; shape is (out,
    in).
    """
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    return random_layer(linear, format, **{"deflated": False, "centred": False, **kwargs})


def entry(**changes: object) -> LayerEntry:
    return replace(entry_of(layer()), **changes)


@each_format
def test_codes_scales_smoothing_and_branch_come_back_bit_for_bit(format):
    before = layer(format)
    after = from_target(to_target(before, RANK), before.format)
    assert torch.equal(after.packed, before.packed)
    assert torch.equal(after.scale, before.scale)
    assert torch.equal(after.smoothing_factor, before.smoothing_factor)
    assert torch.equal(after.branch.up[:, :4], before.branch.up)
    assert torch.equal(after.branch.down[:4], before.branch.down)


@each_format
def test_a_lower_rank_is_padded_with_zeros_that_add_nothing(format):
    branch = from_target(to_target(layer(format), 32), FORMATS[format]).branch
    assert branch.rank == 32
    assert not branch.up[:, 4:].any() and not branch.down[4:].any()


def test_the_tensor_scale_and_the_bias_are_rounded_to_bfloat16_and_no_further():
    before = layer("nvfp4")
    after = from_target(to_target(before, RANK), before.format)
    assert after.tensor_scale != before.tensor_scale  # or this test would say nothing
    assert abs(after.tensor_scale / before.tensor_scale - 1) <= BF16_ROUNDING
    assert torch.equal(after.bias, before.bias.to(torch.bfloat16))


@each_format
def test_the_exported_layer_stands_for_the_same_weight(format):
    before = layer(format)
    after = from_target(to_target(before, RANK), before.format)
    weight, branch = before.dequantize(), before.branch.product()
    float32_sums = 64 * torch.finfo(torch.float32).eps * weight.abs().max()
    allowed = float32_sums + (BF16_ROUNDING * (weight - branch).abs() if format == "nvfp4" else 0)
    assert bool(((after.dequantize() - weight).abs() <= allowed).all())


def test_a_layer_with_neither_smoothing_nor_branch_nor_bias_gets_ones_and_zeros_and_no_bias():
    before = layer(smoothed=False, rank=0, bias=False)
    tensors = to_target(before, RANK)
    assert "bias" not in tensors
    after = from_target(tensors, before.format)
    assert bool((after.smoothing_factor == 1).all())
    assert not after.branch.product().any()
    assert torch.equal(after.dequantize(), before.dequantize())


@each_format
@pytest.mark.parametrize("bias", [True, False])
def test_tensors_have_the_forms_that_are_promised(format, bias):
    before = layer(format, bias)
    exported = exported_entry(entry_of(before), RANK)
    found = {key: StoredAs(t.dtype, tuple(t.shape)) for key, t in to_target(before, RANK).items()}
    assert found == target_forms(exported)
    assert exported == entry_of(from_target(to_target(before, RANK), before.format))


def test_no_clip_ratio_is_carried():
    before = layer()
    assert bool((before.clip_ratio != 1).all())
    after = from_target(to_target(before, RANK), before.format)
    assert after.bins == BINS and after.clip_ratio.tolist() == [1.0]


def test_column_scales_of_another_program_are_refused():
    tensors = to_target(layer("nvfp4"), RANK)
    tensors["wcscales"] = tensors["wcscales"] * 2
    with pytest.raises(CheckpointError, match="wcscales"):
        from_target(tensors, FORMATS["nvfp4"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"deflated": True}, "deflation = true"),
        ({"centred": True}, "centring = true"),
        ({"centred": True, "centred_by_bin": True}, "centring_by_bin = true"),
        ({"deflated": True, "deflated_by_bin": True}, "deflation_by_bin = true"),
        ({"activation_scale_rule": ScaleRule.LEAST_ERROR}, "activation_scale_rule"),
        ({"format": FORMATS["mxfp4"]}, "mxfp4"),
        ({"format": FORMATS["nvfp4_m1"]}, "nvfp4_m1"),
        ({"in_features": 2048, "out_features": 2048, "rank": 1025}, "rank 1025"),
    ],
)
def test_what_the_target_cannot_hold_is_refused_with_the_layer_the_setting_and_the_remedy(changes, words):
    with pytest.raises(UnsupportedError) as caught:
        require_exportable("blocks.3.ffn.net.2", entry(**changes))
    assert "blocks.3.ffn.net.2" in str(caught.value)
    assert words in str(caught.value)
    assert "nunchaku_int4" in str(caught.value)


@pytest.mark.parametrize(("out_features", "in_features"), [(192, 128), (128, 192)])
def test_a_shape_of_broken_tiles_is_refused_by_name(out_features, in_features):
    odd = entry(out_features=out_features, in_features=in_features)
    with pytest.raises(UnsupportedError, match=rf"blocks\.0\.x is {out_features} × {in_features}.* 16 bits"):
        require_exportable("blocks.0.x", odd)


@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.CEIL])
def test_both_rules_that_follow_from_amax_can_be_exported(rule):
    require_exportable("blocks.0.x", entry(activation_scale_rule=rule))


@pytest.mark.parametrize("name", ["nunchaku_int4", "nunchaku_nvfp4"])
def test_layers_of_the_built_in_recipes_for_it_can_be_exported_as_they_are_at_any_size_of_wan(name):
    recipe = Recipe.load(name)
    for out_features, in_features in ((5120, 5120), (13824, 5120), (5120, 13824)):
        layer_entry = LayerEntry(
            recipe.default_format, ScaleRule(recipe.activation_scale_rule), in_features, out_features, recipe.rank,
            recipe.smoothing_alpha is not None, "bfloat16", recipe.deflation, recipe.centring,
        )  # fmt: skip
        require_exportable("blocks.0.x", layer_entry)
        assert common_rank({"blocks.0.x": layer_entry}) == recipe.rank
    assert not recipe.clip_ratios


@pytest.mark.parametrize("name", ["default", "int4", "nvfp4", "mxfp4", "paper"])
def test_other_recipes_are_refused(name):
    recipe = Recipe.load(name)
    other = entry(
        format=recipe.default_format, activation_scale_rule=ScaleRule(recipe.activation_scale_rule),
        deflated=recipe.deflation, centred=recipe.centring,
    )  # fmt: skip
    with pytest.raises(UnsupportedError):
        require_exportable("blocks.0.x", other)


@pytest.mark.parametrize(("ranks", "common"), [((0, 0), 16), ((2, 16), 16), ((17, 4), 32), ((32, 0), 32), ((33,), 48)])
def test_the_common_rank_is_the_largest_in_whole_tiles(ranks, common):
    assert common_rank({f"blocks.{i}.x": entry(rank=rank) for i, rank in enumerate(ranks)}) == common


def test_mixed_formats_are_refused_with_a_layer_of_each():
    mixed = {"blocks.0.x": entry(), "blocks.1.y": entry(format=FORMATS["nvfp4"])}
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.x is in int4 and blocks\.1\.y in nvfp4"):
        common_format(mixed)
    with pytest.raises(UnsupportedError, match="no 4-bit layer"):
        common_format({})
