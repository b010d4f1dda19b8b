"""Allocation of a byte budget to layers (ours): the least total error within the budget.

Each layer has a few options, with more bytes and less error. Only the options on the lower convex
hull of its (bytes, error) points can help a sum; along each hull every further byte removes less
error. Taking the steps of all layers in the order of error removed per byte is then optimal for the
bytes spent (Lagrange: Everett 1963; for rate and distortion Shoham and Gersho 1988). The loss
against the optimum of the budget is less than the one step that no longer fits.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from tempoquant.errors import RecipeError


class Option(NamedTuple):
    """One option for a layer.

    Attributes:
        num_bytes: the bytes that it stores.
        error: the error that it leaves, 0 or more, in a unit that all layers share and that adds up
            over them.
    """

    num_bytes: int
    error: float


class _Step(NamedTuple):
    """A step from one option of a layer's hull to the next."""

    gain_per_byte: float
    layer: int
    option: int
    num_bytes: int


def allocate(layers: Sequence[Sequence[Option]], budget_bytes: int) -> list[int]:
    """Choose an option for each layer so that the errors' sum is small and the bytes' sum within
    the budget.

    More budget never leaves more error. If the best step does not fit, a later step of another
    layer still may.

    Args:
        layers: the options of each layer, at least one.
        budget_bytes: for all layers together.

    Returns:
        For each layer the index of its option.

    Raises:
        RecipeError: even the cheapest options together exceed the budget.
    """
    hulls = [lower_hull(options) for options in layers]
    chosen = [hull[0] for hull in hulls]
    spent = sum(options[index].num_bytes for options, index in zip(layers, chosen, strict=True))
    if spent > budget_bytes:
        raise RecipeError(f"the budget is {budget_bytes} bytes, and the cheapest choice for every layer takes {spent}.")
    steps = [step for number, hull in enumerate(hulls) for step in _steps(number, layers[number], hull)]
    closed: set[int] = set()
    for step in sorted(steps, key=lambda step: (-step.gain_per_byte, step.layer, step.num_bytes)):
        if step.layer in closed:
            continue
        if spent + step.num_bytes > budget_bytes:
            closed.add(step.layer)  # its later steps begin where this one ends
            continue
        spent += step.num_bytes
        chosen[step.layer] = step.option
    return chosen


def lower_hull(options: Sequence[Option]) -> list[int]:
    """Return the indices of the options on the lower convex hull of (bytes, error), by rising bytes
    and falling error.

    The first is the cheapest option; among equally cheap ones, the one with the least error.
    """
    order = sorted(range(len(options)), key=lambda index: options[index])
    hull: list[int] = []
    for index in order:
        if hull and options[index].error >= options[hull[-1]].error:
            continue
        while len(hull) > 1 and _slope(options, hull[-2], hull[-1]) >= _slope(options, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _slope(options: Sequence[Option], one: int, other: int) -> float:
    """Compute the error added per byte (so negative) from one option to a dearer one."""
    return (options[other].error - options[one].error) / (options[other].num_bytes - options[one].num_bytes)


def _steps(layer: int, options: Sequence[Option], hull: Sequence[int]) -> list[_Step]:
    return [
        _Step(-_slope(options, one, other), layer, other, options[other].num_bytes - options[one].num_bytes)
        for one, other in itertools.pairwise(hull)
    ]
