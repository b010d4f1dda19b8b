import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.report.charts import APART, HEIGHT, TOP, WIDTH, charts_of, interval_of_mean, nice_ticks
from tests.report.evaluation_folder import PLAIN, REFERENCE, TUNED

LABELS = [REFERENCE, PLAIN, TUNED]
numbers = st.floats(-1e6, 1e6).map(lambda value: round(value, 4))


def row(label: str, mean: float, **more) -> dict:
    absent = {"low": None, "high": None, "reference_mean": None, "difference": None}
    return {"label": label, "metric": "psnr_db", "mean": mean, **absent, **more}


@given(numbers, numbers)
def test_ticks_are_even_steps_that_enclose_the_values(one, other):
    low, high = min(one, other), max(one, other)
    ticks = nice_ticks(low, high, 4)
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    tolerance = 1e-6 * max(abs(low), abs(high), 1.0)
    assert ticks[0] <= low + tolerance and ticks[-1] >= high - tolerance
    assert min(steps) > 0
    assert max(steps) - min(steps) <= tolerance
    assert 2 <= len(ticks) <= 8


@given(st.lists(st.tuples(st.floats(2, 8), st.floats(0, 60)), min_size=2, max_size=2))
def test_more_is_drawn_higher_and_further_right_and_inside(pairs):
    bits = dict(zip(LABELS[1:], (pair[0] for pair in pairs), strict=True))
    summary = [row(label, pair[1]) for label, pair in zip(LABELS[1:], pairs, strict=True)]
    (chart,) = charts_of(LABELS, bits, summary)
    first, second = chart.points
    (one_bits, one), (other_bits, other) = pairs
    if abs(one - other) > 1e-6:
        assert (first.y < second.y) == (one > other)
    if abs(first.x - second.x) > APART + 1e-6:
        assert (first.x < second.x) == (one_bits < other_bits)
    assert all(0 < point.x < WIDTH and TOP - 1e-6 <= point.y < HEIGHT for point in chart.points)


def test_models_of_the_same_bits_stand_apart_around_their_place():
    summary = [row(PLAIN, 20.0), row(TUNED, 20.0)]
    (chart,) = charts_of(LABELS, {PLAIN: 4.25, TUNED: 4.25}, summary)
    first, second = chart.points
    (alone,) = charts_of(LABELS, {PLAIN: 4.25}, summary[:1])
    assert second.x - first.x == pytest.approx(APART)
    assert (first.x + second.x) / 2 == pytest.approx(alone.points[0].x)


def test_the_interval_of_a_difference_moves_to_the_mean():
    assert interval_of_mean(row(PLAIN, 0.9, low=0.8, high=0.95)) == (0.8, 0.95)
    moved = interval_of_mean(row(PLAIN, 0.9, low=-0.2, high=0.05, difference=-0.1, reference_mean=1.0))
    assert moved == pytest.approx((0.8, 1.05))
    assert interval_of_mean(row(PLAIN, 0.9)) is None


def test_a_model_without_bits_or_mean_is_not_drawn():
    assert charts_of(LABELS, {PLAIN: None}, [row(PLAIN, 20.0)]) == []
    assert charts_of(LABELS, {PLAIN: 4.0}, [{**row(PLAIN, 0.0), "mean": None}]) == []
