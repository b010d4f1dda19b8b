"""Denoisers and timestep bins."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.errors import RecipeError
from tempoquant.timesteps import Denoiser, TimestepBins, denoiser_at

edges = st.lists(st.integers(0, 1000), max_size=6, unique=True).map(lambda e: tuple(float(x) for x in sorted(e)))


def schedule(num_steps: int, flow_shift: float) -> list[float]:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
    scheduler.set_timesteps(num_steps)
    return [float(t) for t in scheduler.timesteps]


def two_denoisers(boundary: float) -> tuple[Denoiser, Denoiser]:
    return Denoiser("noisy", "first", (boundary, 1000.0)), Denoiser("clean", "second", (0.0, boundary))


@pytest.mark.parametrize("boundary", [900.0, 875.0])
def test_the_boundary_timestep_belongs_to_the_noisier_denoiser(boundary: float):
    found = {t: denoiser_at(two_denoisers(boundary), t).name for t in (boundary, boundary - 1, 1000, 0)}
    assert found == {boundary: "noisy", boundary - 1: "clean", 1000: "noisy", 0: "clean"}


def test_a_single_denoiser_runs_at_every_timestep():
    assert denoiser_at([Denoiser("transformer", "transformer")], 0.0).timesteps == (0.0, 1000.0)


@given(timestep=st.floats(0, 1000, width=32), boundary=st.sampled_from([875.0, 900.0]))
def test_every_timestep_lies_in_the_range_of_the_denoiser_that_runs_there(timestep: float, boundary: float):
    low, high = denoiser_at(two_denoisers(boundary), timestep).timesteps
    assert low <= timestep <= high


@given(edges=edges, timestep=st.floats(0, 1000, width=32))
def test_a_bin_holds_its_lower_edge_and_not_its_upper(edges: tuple[float, ...], timestep: float):
    bin_index = TimestepBins(edges).of(timestep)
    bounded = (-torch.inf, *edges, torch.inf)
    assert bounded[bin_index] <= timestep < bounded[bin_index + 1]


@given(edges=edges)
def test_every_edge_belongs_to_the_upper_bin(edges: tuple[float, ...]):
    bins = TimestepBins(edges)
    assert [bins.of(edge) for edge in edges] == list(range(1, bins.num_bins))


@given(edges=edges, timesteps=st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=9))
def test_a_tensor_of_timesteps_is_binned_as_each_of_them(edges: tuple[float, ...], timesteps: list[float]):
    bins = TimestepBins(edges)
    together = bins.of_tensor(torch.tensor(timesteps).reshape(1, -1))
    assert together.shape == (1, len(timesteps)) and together.dtype == torch.int64
    assert together.flatten().tolist() == [bins.of(timestep) for timestep in timesteps]


def test_integer_timesteps_as_schedulers_make_them_are_binned():
    assert TimestepBins((500.0,)).of_tensor(torch.tensor([499, 500])).tolist() == [0, 1]


def test_no_edges_are_one_bin():
    assert TimestepBins().num_bins == 1 and TimestepBins().of(1000) == 0


@pytest.mark.parametrize("wrong", [(600.0, 300.0), (300.0, 300.0), (-1.0,), (1000.5,), (float("nan"),)])
def test_wrong_edges_are_refused(wrong: tuple[float, ...]):
    with pytest.raises(RecipeError, match="edges must"):
        TimestepBins(wrong)


@pytest.mark.parametrize("num_steps", [4, 8, 20, 40, 50])
@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("name", ["noisy", "clean"])
@pytest.mark.parametrize("fractions", [(0.33, 0.66), (0.2, 0.7), (0.5,), (0.1, 0.2, 0.3, 0.4)])
def test_edges_reproduce_membership_by_step_position(num_steps, flow_shift, name, fractions):
    """Steps share a bin exactly when no fraction f has i / n < f ≤ j / n; else the earlier is in
    the noisier one.
    """
    own = [t for t in schedule(num_steps, flow_shift) if denoiser_at(two_denoisers(900.0), t).name == name]
    bins = TimestepBins.from_step_fractions(own, fractions)
    found = [bins.of(t) for t in own]
    for i in range(len(own)):
        for j in range(i + 1, len(own)):
            separated = any(i / len(own) < fraction <= j / len(own) for fraction in fractions)
            assert (found[i] > found[j]) == separated and found[i] >= found[j]


def test_an_edge_lies_halfway_between_the_steps_it_separates():
    assert TimestepBins.from_step_fractions([900, 700, 400, 100], (0.5,)).edges == (550.0,)


def test_schedules_too_short_to_separate_make_fewer_bins_and_none_makes_one():
    assert TimestepBins.from_step_fractions([900], (0.33, 0.66)).num_bins == 1
    assert TimestepBins.from_step_fractions([900, 800], (0.33, 0.66)).num_bins == 2
    assert TimestepBins.from_step_fractions([], (0.33,)).num_bins == 1


def test_repeated_timesteps_are_not_separated():
    assert TimestepBins.from_step_fractions([900, 900, 900], (0.5,)).num_bins == 1


def test_rising_timesteps_are_refused():
    with pytest.raises(RecipeError, match="fall"):
        TimestepBins.from_step_fractions([100, 200], (0.5,))


@pytest.mark.parametrize(
    ("timesteps", "edges"),
    [
        ([50, 150, 250, 350], (100, 200, 300)),
        ([50, 250, 350], (100, 300)),
        ([50], ()),
        ([350], ()),
        ([50, 60, 350], (100,)),
        ([150, 250], (200,)),
        ([], ()),
    ],
)
def test_a_bin_without_samples_joins_a_neighbour(timesteps: list[float], edges: tuple[float, ...]) -> None:
    assert TimestepBins((100, 200, 300)).joined(timesteps).edges == edges
