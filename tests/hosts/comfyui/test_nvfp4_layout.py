"""Laws of a layer in ComfyUI's nvfp4: its bytes by the published formula, what its library reads,
what is refused.
"""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.checkpoint.tensors import StoredAs, entry_of
from tempoquant.errors import UnsupportedError
from tempoquant.formats import FORMATS, NVFP4, ScaleRule, pack, scale_to_bytes
from tempoquant.hosts.comfyui.nvfp4_layout import (
    block_scales,
    branch_forms,
    branch_tensors,
    layer_forms,
    layer_tensors,
    num_replacing_bytes,
    require_exportable,
    swap_nibbles,
)
from tempoquant.kernels.reference import dequantize_residual
from tempoquant.layer import QuantizedLayer
from tempoquant.recipe import Recipe
from tests.hosts.comfyui.kitchen import decoded, kitchen
from tests.random_layers import random, random_layer

UNIT_FLOAT32, UNIT_BF16 = 2.0**-24, 2.0**-8  # the largest relative errors of rounding to 24 and to 8 significant bits
SHAPES = [(256, 128), (40, 48), (1, 16), (130, 208), (128, 64)]
"""(out, in): neither side need fill a tile of 128 rows by 4 groups, nor the rows one of 16."""

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def layer(shape: tuple[int, int] = (256, 128), bias: bool = True, **kwargs: object) -> QuantizedLayer:
    """Make a layer that can be exported, with three bins of random clip ratios; shape is (out,
    in).
    """
    torch.manual_seed(0)
    chosen = {"deflated": False, "centred": False, "rank": min(4, *shape), **kwargs}
    return random_layer(nn.Linear(shape[1], shape[0], bias=bias), "nvfp4", **chosen)


def entry(**changes: object) -> LayerEntry:
    return replace(entry_of(layer()), **changes)


def residual(layer: QuantizedLayer) -> torch.Tensor:
    """Return our own runtime's reading of codes and scales: (out, in) float32."""
    return dequantize_residual(layer.weight_tensors, layer.format)


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (128, 4), (129, 5), (40, 3), (300, 17)])
def test_every_scale_lies_where_the_manual_of_cublas_says_and_zeros_between(rows: int, groups: int) -> None:
    scale = torch.randint(1, 256, (rows, groups), generator=torch.Generator().manual_seed(rows)).to(torch.uint8)
    stored = block_scales(scale)
    tile_columns = -(-groups // 4)
    assert stored.shape == (128 * -(-rows // 128), 4 * tile_columns)
    flat, seen = stored.flatten(), torch.zeros(stored.numel(), dtype=torch.bool)
    for row in range(rows):
        for group in range(groups):
            tile = (row // 128) * tile_columns + group // 4
            place = 512 * tile + 16 * (row % 32) + 4 * (row % 128 // 32) + group % 4
            assert flat[place] == scale[row, group]
            seen[place] = True
    assert int(seen.sum()) == rows * groups and not flat[~seen].any()


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (128, 4), (129, 5), (300, 17)])
def test_comfy_kitchen_blocks_scales_alike_and_finds_them_again(rows: int, groups: int) -> None:
    scale = torch.randint(0, 256, (rows, groups), generator=torch.Generator().manual_seed(rows)).to(torch.uint8)
    stored = block_scales(scale)
    assert torch.equal(stored, kitchen().to_blocked(scale, flatten=False))
    assert torch.equal(kitchen().from_blocked(stored, rows, groups), scale)


def test_the_even_feature_is_in_the_high_half_of_a_byte() -> None:
    codes = torch.tensor([[1, 2, -3, 7]], dtype=torch.int8)  # E2M1 has −3 as 0b1011
    assert swap_nibbles(pack(codes, NVFP4)).tolist() == [[0x12, 0xB7]]


@each_shape
def test_comfy_kitchen_decodes_our_codes_and_scales_to_the_last_bit(shape: tuple[int, int]) -> None:
    before = layer(shape)
    assert torch.equal(decoded(layer_tensors(before), shape[0]), residual(before))


def test_scales_from_the_smallest_to_the_largest_and_rows_of_zeros_are_decoded_too() -> None:
    """E4M3's smallest number is a subnormal; a group of zeros has scale 1."""
    numbers = torch.arange(1, 0x7F, dtype=torch.uint8)  # all positive ones: 0x7F is NaN
    scale = numbers.repeat(6)[: 36 * 20].view(36, 20)
    codes = torch.randint(-7, 8, (36, 320), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    codes[3], codes[17:19] = 0, 0
    scale[3], scale[17:19] = (scale_to_bytes(torch.ones(1, 1), NVFP4) for _ in range(2))
    before = replace(
        layer((36, 320)), packed=pack(codes, NVFP4), scale=scale, tensor_scale=torch.tensor(2.0**-20 / 3)
    )  # fmt: skip
    found = decoded(layer_tensors(before), 36)
    assert torch.equal(found, residual(before))
    assert not found[3].any() and bool(found[0].any()) and float(scale.view(torch.float8_e4m3fn).float().min()) == 2**-9


@each_shape
def test_in_bfloat16_a_decoded_weight_is_three_roundings_away_at_most(shape: tuple[int, int]) -> None:
    """ComfyUI without tensor cores for FP4 rounds the tensor's scale, its product with a group's,
    and the weight.
    """
    before = layer(shape)
    found, exact = decoded(layer_tensors(before), shape[0], torch.bfloat16).float(), residual(before)
    assert not torch.equal(found, exact)
    assert bool(((found - exact).abs() <= ((1 + UNIT_BF16) ** 3 - 1) * exact.abs()).all())


@each_shape
def test_weight_branch_and_input_scale_make_our_layer_on_any_input(shape: tuple[int, int]) -> None:
    """f(x) + up · (down · x) of the exported tensors, in 16-bit activations, is the layer's
    effective weight on x.
    """
    before = layer(shape)
    tensors, branch = layer_tensors(before), branch_tensors(before)
    x = random(50, shape[1])
    y = functional.linear(x * tensors["pre_quant_scale"], decoded(tensors, shape[0]), tensors["bias"])
    down, up = branch["lora_down.weight"].float(), branch["lora_up.weight"].float()
    y = y + branch["alpha"].item() / len(down) * functional.linear(functional.linear(x, down), up)
    wanted = functional.linear(x.double(), before.dequantize().double(), before.bias.double())
    terms = functional.linear(x.abs(), before.dequantize().abs()) + functional.linear(
        functional.linear(x.abs(), down.abs()), up.abs()
    )
    assert bool(((y - wanted).abs() <= 4 * (shape[1] + 8) * UNIT_FLOAT32 * (terms + 1)).all())


def test_the_input_is_multiplied_with_what_ours_is_divided_by() -> None:
    before = layer()
    product = layer_tensors(before)["pre_quant_scale"].double() * before.smoothing_factor.double()
    assert bool(((product - 1).abs() <= UNIT_FLOAT32).all())
    assert "pre_quant_scale" not in layer_tensors(layer(smoothed=False))


def test_codes_scales_bias_and_branch_are_carried_bit_for_bit() -> None:
    before = layer()
    tensors, branch = layer_tensors(before), branch_tensors(before)
    assert torch.equal(swap_nibbles(tensors["weight"]), before.packed)
    assert torch.equal(tensors["weight_scale_2"], before.tensor_scale) and torch.equal(tensors["bias"], before.bias)
    assert torch.equal(branch["lora_up.weight"], before.branch.up)
    assert torch.equal(branch["lora_down.weight"], before.branch.down)
    assert json.loads(bytes(tensors["comfy_quant"].tolist())) == {"format": "nvfp4"}


@each_shape
@pytest.mark.parametrize("kwargs", [{}, {"smoothed": False, "rank": 0, "bias": False}], ids=["all", "bare"])
def test_the_announced_forms_are_those_of_the_tensors(shape: tuple[int, int], kwargs: dict[str, object]) -> None:
    before = layer(shape, **kwargs)
    for forms, tensors in (
        (layer_forms(entry_of(before)), layer_tensors(before)),
        (branch_forms(entry_of(before)), branch_tensors(before)),
    ):
        assert forms == {key: StoredAs(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    stored = {**layer_tensors(before), **branch_tensors(before)}
    stored.pop("bias", None)
    assert num_replacing_bytes(entry_of(before)) == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": FORMATS["nvfp4_m1"]}, "is in nvfp4_m1, and comfyui-nvfp4 has nvfp4 only"),
        ({"format": FORMATS["int4"]}, "is in int4"),
        ({"deflated": True}, "deflation = true"),
        ({"deflated": True, "deflated_by_bin": True}, "deflation_by_bin = true"),
        ({"centred": True}, "centring = true"),
        ({"centred": True, "centred_by_bin": True}, "centring_by_bin = true"),
        ({"rotated": True}, "rotation = true"),
        ({"activation_scale_rule": ScaleRule.LEAST_ERROR}, 'activation_scale_rule = "least_error"'),
    ],
)
def test_a_layer_that_cannot_be_held_is_named_with_the_setting_and_the_recipe(changes, words) -> None:
    with pytest.raises(UnsupportedError, match=f"^blocks.0.x .*{re.escape(words)}.*--recipe comfyui_nvfp4"):
        require_exportable("blocks.0.x", entry(**changes))


def test_what_the_recipe_for_it_makes_can_be_held() -> None:
    recipe = Recipe.load("comfyui_nvfp4")
    assert recipe.format == "nvfp4" and recipe.activation_scale_rule == "ceil" and recipe.clip_ratios == ()
    assert not (recipe.deflation or recipe.centring or recipe.rotation)
    require_exportable("blocks.0.x", entry())
