"""The step at which the second expert takes over is the one at which diffusers changes over."""

import pytest

from tempoquant.errors import SettingsError
from tempoquant.hosts.comfyui.split import boundary_of, split_step
from tempoquant.timesteps import Denoiser, denoiser_at

EXPERTS = (Denoiser("noisy", "a", (900.0, 1000.0)), Denoiser("clean", "b", (0.0, 900.0)))


def shifted(num_steps: int, shift: float) -> list[float]:
    """Return timesteps of ComfyUI's scheduler `simple` for a flow with a shift, without the
    last.
    """
    steps = [1 - i / num_steps for i in range(num_steps)]
    return [1000 * shift * t / (1 + (shift - 1) * t) for t in steps]


@pytest.mark.parametrize("num_steps", [4, 8, 20, 40])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_every_step_runs_the_expert_that_its_timestep_belongs_to(num_steps: int, shift: float) -> None:
    timesteps = shifted(num_steps, shift)
    split = split_step(timesteps, 900.0)
    names = [denoiser_at(EXPERTS, t).name for t in timesteps]
    assert names == ["noisy"] * split + ["clean"] * (num_steps - split)


def test_the_boundary_itself_is_high_noise_and_wan_at_20_steps_splits_at_8() -> None:
    assert split_step([1000.0, 900.0, 899.9], 900.0) == 2
    assert split_step(shifted(20, 5.0), 900.0) == 8


def test_either_expert_knows_the_boundary_and_a_single_denoiser_has_none() -> None:
    assert [boundary_of(each.timesteps, each.name) for each in EXPERTS] == [900.0, 900.0]
    with pytest.raises(SettingsError, match="transformer runs at all timesteps"):
        boundary_of((0.0, 1000.0), "transformer")


def test_timesteps_that_rise_are_refused() -> None:
    with pytest.raises(SettingsError, match="must fall"):
        split_step([10.0, 20.0], 15.0)
