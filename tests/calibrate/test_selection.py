"""Laws of which calls are kept: evenly over steps, then prompts, then guidance branches."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tempoquant.calibrate.selection import Call, select_calls

COUNTS = {
    "num_steps": st.integers(1, 40),
    "num_prompts": st.integers(1, 20),
    "num_branches": st.sampled_from([1, 2]),
    "num_wanted": st.integers(1, 200),
}


def spread(counts: Counter, keys: int) -> int:
    """Return the largest difference between the counts of `keys` values."""
    found = [counts[key] for key in range(keys)]
    return max(found) - min(found)


@given(**COUNTS)
def test_as_many_calls_as_are_wanted_or_all_there_are(num_steps, num_prompts, num_branches, num_wanted):
    calls = select_calls(num_steps, num_prompts, num_branches, num_wanted)
    assert len(calls) == len(set(calls)) == min(num_wanted, num_steps * num_prompts * num_branches)
    assert all(call.step < num_steps and call.prompt < num_prompts and call.branch < num_branches for call in calls)


@given(**COUNTS)
def test_no_step_has_two_calls_more_than_another(num_steps, num_prompts, num_branches, num_wanted):
    calls = select_calls(num_steps, num_prompts, num_branches, num_wanted)
    assert spread(Counter(call.step for call in calls), num_steps) <= 1


@given(**COUNTS)
def test_prompts_and_branches_get_their_even_share(num_steps, num_prompts, num_branches, num_wanted):
    calls = select_calls(num_steps, num_prompts, num_branches, num_wanted)
    assert spread(Counter(call.prompt for call in calls), num_prompts) <= 1
    assert spread(Counter(call.branch for call in calls), num_branches) <= 1 + num_wanted // (num_prompts * 2)


def test_fewer_calls_than_steps_lie_evenly_along_the_trajectory():
    assert [call.step for call in select_calls(25, 12, 2, 5)] == [2, 7, 12, 17, 22]


def test_one_call_a_step_changes_prompt_and_branch_each_time():
    assert select_calls(4, 3, 2, 4) == [Call(0, 0, 0), Call(1, 1, 1), Call(2, 2, 0), Call(3, 0, 1)]
