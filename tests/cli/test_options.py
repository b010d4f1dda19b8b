"""The text that a user may write behind --activation-bits."""

import math

import pytest
import typer

from tempoquant.cli.options import ActivationBits, parse_activation_bits


@pytest.mark.parametrize(
    ("text", "bits", "timesteps"),
    [("4", 4, None), ("8", 8, None), ("8@0-500", 8, (0.0, 500.0)), ("8@417.5-1000", 8, (417.5, math.inf))],
)
def test_bits_and_timesteps_are_read(text: str, bits: int, timesteps: tuple[float, float] | None) -> None:
    assert parse_activation_bits(text) == ActivationBits(bits, timesteps)


@pytest.mark.parametrize(
    "text", ["", "6", "16", "8@", "8@5", "8@500-100", "8@5-5", "4@0-500", "8@0-1001", "8@-1-5", "8 @0-5"]
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"4, 8 or 8@LOW-HIGH|LOW below HIGH"):
        parse_activation_bits(text)


def test_it_is_written_as_it_was_given() -> None:
    assert [str(parse_activation_bits(text)) for text in ("8", "8@0-500")] == ["8", "8@0-500"]
