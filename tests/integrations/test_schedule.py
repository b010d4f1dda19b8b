"""Laws of the schedule: known without a model, falling, and the one that the pipeline then follows."""

import json
from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from tempoquant.errors import ModelError
from tempoquant.integrations.sampling import record_trajectory
from tempoquant.integrations.schedule import sampling_steps
from tempoquant.integrations.wan import load_pipeline
from tempoquant.timesteps import Expert
from tests.recorded import PROMPTS, SETTINGS, TINY


def write_folder(folder: Path, scheduler: object, boundary_ratio: float = 0.9) -> Path:
    """What the schedule depends on, and no more."""
    index = {"boundary_ratio": boundary_ratio, "scheduler": ["diffusers", type(scheduler).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler.save_pretrained(folder / "scheduler")  # type: ignore[attr-defined]
    return folder


SCHEDULERS = [
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    FlowMatchEulerDiscreteScheduler(),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=["UniPC", "Euler"])
def test_timesteps_are_a_thousand_times_the_share_of_noise_and_fall(tmp_path, scheduler):
    steps = sampling_steps(write_folder(tmp_path, scheduler), 10, 5.0)
    timesteps = [float(step.timestep) for step in steps]
    assert len(steps) == 10 and timesteps == sorted(timesteps, reverse=True)
    assert timesteps == pytest.approx([1000 * step.sigma for step in steps], abs=1.0)  # UniPC's are whole numbers
    experts = [step.expert for step in steps]
    assert experts == sorted(experts, key=list(Expert).index)


def test_a_larger_flow_shift_moves_steps_to_the_high_noise_expert(tmp_path):
    folder = write_folder(tmp_path, SCHEDULERS[0])
    counts = [sum(s.expert is Expert.HIGH_NOISE for s in sampling_steps(folder, 40, shift)) for shift in (3.0, 5.0)]
    assert counts[0] < counts[1] == 15


def test_a_timestep_on_the_boundary_belongs_to_high_noise(tmp_path):
    timestep = float(sampling_steps(write_folder(tmp_path, SCHEDULERS[0]), 4, 5.0)[1].timestep)
    at_boundary = sampling_steps(write_folder(tmp_path, SCHEDULERS[0], timestep / 1000), 4, 5.0)
    assert [step.expert for step in at_boundary[1:3]] == [Expert.HIGH_NOISE, Expert.LOW_NOISE]


def test_the_pipeline_takes_the_steps_of_the_schedule():
    calls = record_trajectory(load_pipeline(TINY, "cpu"), PROMPTS[0], SETTINGS, 0)
    steps = sampling_steps(TINY, SETTINGS.num_steps, SETTINGS.flow_shift)
    assert [(c.sample.step_index, c.sample.guidance_branch) for c in calls] == [
        (index, branch) for index in range(4) for branch in ("conditional", "unconditional")
    ]
    for call in calls:
        step = steps[call.sample.step_index]
        assert (call.sample.expert, call.sample.timestep) == (step.expert, float(step.timestep))
        assert call.sample.inputs["timestep"].dtype == step.timestep.dtype


@pytest.mark.parametrize("name", ["NoSuchScheduler", "WanTransformer3DModel"])
def test_a_scheduler_that_does_not_load_is_named(tmp_path, name):
    write_folder(tmp_path, SCHEDULERS[0])
    (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.9, "scheduler": ["diffusers", name]}))
    with pytest.raises(ModelError, match=f"scheduler does not load as a {name}"):
        sampling_steps(tmp_path, 4, 5.0)
