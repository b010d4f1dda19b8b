"""Laws of spending a budget: never exceeded, monotone, and next to the best that every combination
could do.
"""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.errors import RecipeError
from tempoquant.methods.allocation import Option, allocate, lower_hull

options = st.builds(Option, st.integers(0, 30), st.integers(0, 40).map(float))
layers = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=4)


def total(chosen: list[int], of: list[list[Option]]) -> Option:
    picked = [each[index] for each, index in zip(of, chosen, strict=True)]
    return Option(sum(option.num_bytes for option in picked), sum(option.error for option in picked))


def cheapest(of: list[list[Option]]) -> int:
    return sum(min(option.num_bytes for option in each) for each in of)


@given(layers, st.integers(0, 60))
def test_the_budget_is_never_exceeded_and_the_best_is_at_most_one_step_better(of, extra):
    budget = cheapest(of) + extra
    found = total(allocate(of, budget), of)
    assert found.num_bytes <= budget
    every = (total(list(chosen), of) for chosen in itertools.product(*(range(len(each)) for each in of)))
    best = min(choice.error for choice in every if choice.num_bytes <= budget)
    hulls = [[each[index] for index in lower_hull(each)] for each in of]
    steps = [one.error - other.error for hull in hulls for one, other in itertools.pairwise(hull)]
    assert best <= found.error <= best + max(steps, default=0.0)


@given(layers, st.integers(0, 60), st.integers(0, 10))
def test_more_budget_never_leaves_more_error(of, extra, more):
    budget = cheapest(of) + extra
    assert total(allocate(of, budget + more), of).error <= total(allocate(of, budget), of).error


@given(layers)
def test_a_budget_for_everything_leaves_the_least_error_of_all(of):
    found = total(allocate(of, 30 * len(of)), of)
    assert found.error == sum(min(option.error for option in each) for each in of)


@given(layers)
def test_nothing_beyond_the_cheapest_buys_the_best_of_the_cheapest(of):
    found = total(allocate(of, cheapest(of)), of)
    assert found.num_bytes == cheapest(of)
    least = [min(each) for each in of]
    assert found.error == sum(option.error for option in least)


def test_bytes_go_where_they_take_off_most():
    steep, flat = [Option(0, 100.0), Option(10, 10.0)], [Option(0, 100.0), Option(10, 90.0)]
    assert allocate([flat, steep], 10) == [0, 1]


def test_a_budget_below_the_cheapest_is_refused_with_both_numbers():
    with pytest.raises(RecipeError, match="budget is 9 bytes, and the cheapest choice for every layer takes 10"):
        allocate([[Option(4, 1.0)], [Option(6, 1.0), Option(7, 0.0)]], 9)
