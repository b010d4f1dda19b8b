"""Transformer calls of the reference, kept in a file: what layer maps repeat with each model."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.evaluate.files import whole_file
from tempoquant.hosts.diffusers.sampling import CallPosition, sample_of, watching_trajectory
from tempoquant.models.families import facts_of
from tempoquant.prompts import Prompt


@contextlib.contextmanager
def watched_calls(
    pipeline: Any, prompt: Prompt, steps: set[int], calls: list[CalibrationSample]
) -> Iterator[Callable[[], None]]:
    """Within this context, the conditional calls of one generation at some steps are appended to `calls`.

    Yields what the generation has to call after each step.
    """

    family = facts_of(pipeline).family

    def observe(position: CallPosition, inputs: dict[str, Any], _output: Any) -> None:
        if position.step_index in steps and position.guidance_branch == "conditional":
            calls.append(sample_of(family, prompt, position, inputs))

    with watching_trajectory(pipeline, observe) as step_done:
        yield step_done


def write_calls(file: Path, calls: Sequence[CalibrationSample]) -> None:
    """Keep transformer calls of one generation."""
    tensors = {
        f"{index}.{key}": value.clone().contiguous()
        for index, call in enumerate(calls)
        for key, value in call.inputs.items()
    }
    described = [
        {"prompt_id": call.prompt_id, "expert": call.denoiser, "timestep": call.timestep,
         "step_index": call.step_index, "guidance_branch": call.guidance_branch}
        for call in calls
    ]  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as temporary:
        save_file(tensors, temporary, metadata={"calls": json.dumps(described)})


def read_calls(file: Path) -> list[CalibrationSample]:
    """What `write_calls` kept."""
    with safe_open(file, framework="pt") as stored:
        described: list[Mapping[str, Any]] = json.loads(stored.metadata()["calls"])
        names = list(stored.keys())
        return [
            CalibrationSample(
                call["prompt_id"], call["expert"], call["timestep"], call["step_index"],
                call["guidance_branch"],
                {name.partition(".")[2]: stored.get_tensor(name) for name in names if name.split(".")[0] == str(index)},
            )
            for index, call in enumerate(described)
        ]  # fmt: skip
