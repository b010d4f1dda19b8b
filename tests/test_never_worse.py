"""Laws of our recipes in every format: on inputs unlike calibration's, they are not worse than
rounding.

Small layers, GELU-like and Gaussian inputs, each fault of calibration in a few draws. On held-out
tokens the error is at most half a decibel above that of rounding to nearest in the same format,
over all tokens and in the worst token. Over all tokens, full recipes meet the same bound against
the published recipe. Recipes for other engines' kernels, which subtract nothing from the input, are
compared with rounding only.
"""

import functools
import math
from collections.abc import Callable

import pytest
import torch

from tempoquant.formats import FORMATS
from tempoquant.quantizing.linear import quantize_linear
from tempoquant.recipe import Recipe

IN, OUT, NUM_TOKENS, RANK = 128, 96, 384, 4
DRAWS = 4
ALLOWED_DB = 0.5
Tokens = torch.Tensor
Fault = Callable[[Tokens, Tokens, Tokens, float], None]
"""What is wrong with calibration's tokens, the held-out ones or the weight, changed in place; the
float is the typical magnitude of the inputs. Feature 5 is the one it happens to.
"""


def silent_then_ordinary(calibration: Tokens, held_out: Tokens, weight: Tokens, size: float) -> None:
    held_out[:, 5] = size * held_out[:, 5] / held_out[:, 5].square().mean().sqrt()
    calibration[:, 5] *= 1e-4


def zero_then_ordinary(calibration: Tokens, held_out: Tokens, weight: Tokens, size: float) -> None:
    silent_then_ordinary(calibration, held_out, weight, size)
    calibration[:, 5] = 0


def silent_but_in_one_token(calibration: Tokens, held_out: Tokens, weight: Tokens, size: float) -> None:
    calibration[:, 5] *= 1e-4
    held_out[:, 5] *= 1e-4
    held_out[7, 5] = size


def loud_in_one_percent_of_tokens(calibration: Tokens, held_out: Tokens, weight: Tokens, size: float) -> None:
    for tokens in (calibration, held_out):
        tokens[::100, 5] = 5000 * size


def one_token_loud_in_calibration(calibration: Tokens, held_out: Tokens, weight: Tokens, size: float) -> None:
    calibration[11] *= 100


def one_token_loud_afterwards(calibration: Tokens, held_out: Tokens, weight: Tokens, size: float) -> None:
    held_out[11] *= 100


def constant_feature(calibration: Tokens, held_out: Tokens, weight: Tokens, size: float) -> None:
    calibration[:, 5] = held_out[:, 5] = 3 * size


def constant_that_turns(calibration: Tokens, held_out: Tokens, weight: Tokens, size: float) -> None:
    calibration[:, 5], held_out[:, 5] = 3 * size, -3 * size


def loud_feature_without_weight(calibration: Tokens, held_out: Tokens, weight: Tokens, size: float) -> None:
    weight[:, 5] = 0
    calibration[:, 5] *= 100
    held_out[:, 5] *= 100


def nothing(calibration: Tokens, held_out: Tokens, weight: Tokens, size: float) -> None:
    pass


FAULTS: dict[str, tuple[Fault, int]] = {  # and on how many tokens it is calibrated
    "nothing wrong": (nothing, NUM_TOKENS),
    "a feature silent in calibration": (silent_then_ordinary, NUM_TOKENS),
    "a feature zero in calibration": (zero_then_ordinary, NUM_TOKENS),
    "a feature silent but in one token": (silent_but_in_one_token, NUM_TOKENS),
    "a feature of 5000 times the magnitude": (loud_in_one_percent_of_tokens, NUM_TOKENS),
    "one loud token in calibration": (one_token_loud_in_calibration, NUM_TOKENS),
    "one loud token afterwards": (one_token_loud_afterwards, NUM_TOKENS),
    "a constant feature": (constant_feature, NUM_TOKENS),
    "a constant that turns": (constant_that_turns, NUM_TOKENS),
    "a loud feature without weight": (loud_feature_without_weight, NUM_TOKENS),
    "a handful of tokens": (nothing, 8),
    "one token": (nothing, 1),
}
OTHER_ENGINES = {"int4": ("nunchaku_int4",), "nvfp4": ("nunchaku_nvfp4", "comfyui_nvfp4")}
each_fault = pytest.mark.parametrize("fault", FAULTS)
each_format = pytest.mark.parametrize("format", FORMATS)


def layer(fault: str, is_gelu: bool, draw: int) -> tuple[Tokens, Tokens, Tokens]:
    """Return weight (out, in), calibration tokens and held-out ones (tokens, in)."""
    generator = torch.Generator().manual_seed(draw)
    mixing = torch.eye(IN) + 0.5 * torch.randn(IN, IN, generator=generator) / IN**0.5
    x = torch.randn(2 * NUM_TOKENS, IN, generator=generator) @ mixing
    x = x * torch.exp(0.8 * torch.randn(IN, generator=generator))
    x = torch.nn.functional.gelu(x) if is_gelu else x
    weight = torch.randn(OUT, IN, generator=generator) / IN**0.5
    calibration, held_out = x.split(NUM_TOKENS)
    change, num_tokens = FAULTS[fault]
    change(calibration, held_out, weight, float(x.square().mean().sqrt()))
    return weight, calibration[:num_tokens], held_out


def errors_db(recipe: Recipe, fault: str, is_gelu: bool, draw: int) -> tuple[float, float]:
    """Compute error over signal on held-out tokens, over all of them and in the worst one."""
    weight, calibration, held_out = layer(fault, is_gelu, draw)
    y, wanted = quantize_linear(weight, None, calibration, recipe)(held_out), held_out @ weight.T
    errors, powers = (y - wanted).square().sum(1), wanted.square().sum(1)
    return 10 * math.log10(errors.sum() / powers.sum()), 10 * math.log10((errors / powers).max())


@functools.cache
def mean_errors_db(recipe: str, format: str, fault: str, is_gelu: bool) -> tuple[float, float]:
    chosen = Recipe.load(recipe).replace(format=format)
    chosen = chosen.replace(rank=RANK) if chosen.rank else chosen
    over_all, worst = zip(*(errors_db(chosen, fault, is_gelu, draw) for draw in range(DRAWS)), strict=True)
    return sum(over_all) / DRAWS, sum(worst) / DRAWS


@each_format
@each_fault
@pytest.mark.parametrize("is_gelu", [False, True], ids=["gaussian", "gelu"])
def test_no_recipe_of_ours_is_worse_than_rounding_or_the_published_one(format: str, fault: str, is_gelu: bool) -> None:
    rounding, published = (mean_errors_db(name, format, fault, is_gelu) for name in ("rtn", "paper"))
    for name in ("default", *OTHER_ENGINES.get(format, ())):
        over_all, worst = mean_errors_db(name, format, fault, is_gelu)
        assert over_all <= rounding[0] + ALLOWED_DB and worst <= rounding[1] + ALLOWED_DB, name
        assert name != "default" or over_all <= published[0] + ALLOWED_DB


@each_format
@pytest.mark.parametrize("is_gelu", [False, True], ids=["gaussian", "gelu"])
@pytest.mark.parametrize("changes", [{}, {"deflation_by_bin": True}], ids=["default", "deflation by bin"])
def test_a_quiet_timestep_bin_beside_a_loud_one_is_not_worse_than_rounding(
    format: str, is_gelu: bool, changes: dict[str, bool]
) -> None:
    weight, calibration, held_out = layer("nothing wrong", is_gelu, 0)
    sizes, half = {0: 0.01, 1: 10.0}, NUM_TOKENS // 2
    by_bin = {number: calibration[number * half :][:half] * size for number, size in sizes.items()}
    worst = []
    for recipe in (Recipe.load("rtn"), Recipe.load("default").replace(rank=RANK, **changes)):
        quantized = quantize_linear(weight, None, by_bin, recipe.replace(format=format))
        for number, size in sizes.items():
            x = held_out * size
            with quantized.at_timestep(250.0 + 500 * number):
                errors = (quantized(x) - x @ weight.T).square().sum(1) / (x @ weight.T).square().sum(1)
            worst.append((10 * float(errors.mean().log10()), 10 * float(errors.max().log10())))
    for rounding, ours in zip(worst[:2], worst[2:], strict=True):
        assert ours[0] <= rounding[0] and ours[1] <= rounding[1] + ALLOWED_DB
