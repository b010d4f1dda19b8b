"""Laws of the schedule: known without a model, falling, and the one that the pipeline then
follows.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

from tempoquant.errors import ModelError
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import record_trajectory
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.schedule import flow_shift_of, sampling_steps, shifted
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.family import COMPONENTS
from tests.recorded import PROMPTS, SETTINGS, SOURCE, TINY


def with_scheduler(folder: Path, scheduler: Any, /, **changes: object) -> SourceModel:
    """Return the bundled pipeline with another scheduler, and with changes of its
    model_index.json.
    """
    folder.mkdir(exist_ok=True)
    for component in TINY.iterdir():
        if component.is_dir() and component.name != "scheduler":
            (folder / component.name).symlink_to(component)
    index = json.loads((TINY / "model_index.json").read_text())
    index |= {"scheduler": ["diffusers", type(scheduler).__name__], **changes}
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler.save_pretrained(folder / "scheduler")
    return SourceModel.open(folder)


SCHEDULERS = [
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    FlowMatchEulerDiscreteScheduler(),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=["UniPC", "Euler"])
def test_timesteps_are_a_thousand_times_the_share_of_noise_and_fall(tmp_path, scheduler):
    steps = sampling_steps(with_scheduler(tmp_path, scheduler), _with(10, 5.0))
    timesteps = [float(step.timestep) for step in steps]
    assert len(steps) == 10 and timesteps == sorted(timesteps, reverse=True)
    assert timesteps == pytest.approx([1000 * step.sigma for step in steps], abs=1.0)  # UniPC's are whole numbers
    denoisers = [step.denoiser for step in steps]
    assert denoisers == sorted(denoisers, key=list(COMPONENTS).index)


def _with(num_steps: int, flow_shift: float | None) -> SamplingSettings:
    return dataclasses.replace(SETTINGS, num_steps=num_steps, flow_shift=flow_shift)


def test_a_larger_flow_shift_moves_steps_to_the_high_noise_expert(tmp_path):
    source = with_scheduler(tmp_path, SCHEDULERS[0])
    counts = [sum(s.denoiser == "high_noise" for s in sampling_steps(source, _with(40, shift))) for shift in (3.0, 5.0)]
    assert counts[0] < counts[1] == 15


def test_a_timestep_on_the_boundary_belongs_to_high_noise(tmp_path):
    timestep = float(sampling_steps(with_scheduler(tmp_path / "a", SCHEDULERS[0]), _with(4, 5.0))[1].timestep)
    other = with_scheduler(tmp_path / "b", SCHEDULERS[0], boundary_ratio=timestep / 1000)
    at_boundary = sampling_steps(other, _with(4, 5.0))
    assert [step.denoiser for step in at_boundary[1:3]] == ["high_noise", "low_noise"]


def test_the_pipeline_takes_the_steps_of_the_schedule():
    calls = record_trajectory(load_pipeline(SOURCE, "cpu"), PROMPTS[0], SETTINGS, 0)
    steps = sampling_steps(SOURCE, SETTINGS)
    assert [(c.sample.step_index, c.sample.guidance_branch) for c in calls] == [
        (index, branch) for index in range(4) for branch in ("conditional", "unconditional")
    ]
    for call in calls:
        step = steps[call.sample.step_index]
        assert (call.sample.denoiser, call.sample.timestep) == (step.denoiser, float(step.timestep))
        assert call.sample.inputs["timestep"].dtype == step.timestep.dtype


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (["diffusers", "NoSuchScheduler"], "scheduler is a NoSuchScheduler, which the diffusers installed here does"),
        (["diffusers", "WanTransformer3DModel"], "scheduler has no weights"),
        (["diffusers", "VaeImageProcessor"], "scheduler does not load as a VaeImageProcessor"),
        ([None, None], r"names no scheduler in its model_index\.json"),
    ],
)
def test_a_scheduler_that_does_not_load_is_named(tmp_path, scheduler, words):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=words):
        sampling_steps(with_scheduler(tmp_path, SCHEDULERS[0], scheduler=scheduler), _with(4, 5.0))


FLOW_SCHEDULERS = [
    UniPCMultistepScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, DEISMultistepScheduler,
    SASolverScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler,
]  # fmt: skip
WANS = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def timesteps_of(scheduler) -> list[float]:
    scheduler.set_timesteps(6)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("kind", FLOW_SCHEDULERS)
def test_a_flow_shift_reaches_a_scheduler_that_took_the_place_of_another(kind):
    argument = "shift" if kind.__name__.startswith("FlowMatch") else "flow_shift"
    swapped = kind.from_config(WANS.config)  # what guides to Wan do: the config keeps UniPC's flow_shift
    asked = shifted(swapped, 12.0)
    assert type(asked) is kind and flow_shift_of(asked) == 12.0
    assert timesteps_of(asked) == timesteps_of(kind.from_config(WANS.config, **{argument: 12.0}))
    assert timesteps_of(asked) != timesteps_of(swapped)
    assert shifted(asked, 12.0) is asked and shifted(asked, None) is asked


def test_a_shift_that_was_set_by_hand_is_seen():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_shift(3.0)  # leaves the config as it was
    assert timesteps_of(shifted(scheduler, 1.0)) == timesteps_of(FlowMatchEulerDiscreteScheduler(shift=1.0))


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (LCMScheduler.from_config(WANS.config), "LCMScheduler has no flow shift: leave --flow-shift out"),
        (UniPCMultistepScheduler.from_config(WANS.config, use_flow_sigmas=False), "UniPC.* moves no timestep"),
        (UniPCMultistepScheduler.from_config(WANS.config, use_beta_sigmas=True), "UniPC.* moves no timestep"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "Euler.*: set use_dynamic_shifting to false"),
        (UniPCMultistepScheduler.from_config(WANS.config, use_dynamic_shifting=True), "set use_dynamic_shifting"),
    ],
    ids=["none", "no flow sigmas", "other sigmas", "dynamic Euler", "dynamic UniPC"],
)
def test_a_scheduler_that_no_flow_shift_reaches_is_refused_by_its_name(scheduler, words):
    with pytest.raises(ModelError, match=words):
        shifted(scheduler, 12.0)


def test_a_flow_shift_that_does_nothing_may_stay_what_it_is():
    scheduler = UniPCMultistepScheduler(flow_shift=5.0)
    assert shifted(scheduler, 5.0) is scheduler


def test_the_shift_that_a_sampling_file_leaves_open_is_the_one_its_scheduler_uses(tmp_path):
    source = with_scheduler(tmp_path, FlowMatchEulerDiscreteScheduler.from_config(WANS.config, shift=3.0))
    (source.folder / "sampling.json").write_text('{"flow_shift": null}')
    assert default_settings(source).flow_shift == 3.0
    assert sampling_steps(source, _with(6, None)) == sampling_steps(source, _with(6, 3.0))
