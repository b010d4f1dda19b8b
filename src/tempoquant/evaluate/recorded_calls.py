"""Transformer calls of the reference in a file, which layer maps repeat with each model."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from tempoquant.calibrate.arguments import OUTLINE_KEY, put_together, take_apart
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.evaluate.files import whole_file
from tempoquant.hosts.diffusers.sampling import CallPosition, sample_of, watching_trajectory
from tempoquant.prompts import Prompt


@contextlib.contextmanager
def watched_calls(
    pipeline: Any, prompt: Prompt, steps: set[int], calls: list[CalibrationSample]
) -> Iterator[Callable[[], None]]:
    """Append the conditional calls of one generation at some steps to `calls`, within this context.

    Yields a function that the generation must call after each step.
    """

    def observe(position: CallPosition, inputs: dict[str, Any], _output: Any) -> None:
        if position.step_index in steps and position.guidance_branch == "conditional":
            calls.append(sample_of(prompt, position, inputs))

    with watching_trajectory(pipeline, observe) as step_done:
        yield step_done


def write_calls(file: Path, calls: Sequence[CalibrationSample]) -> None:
    """Write transformer calls of one generation."""
    tensors, outline = take_apart({str(index): dict(call.inputs) for index, call in enumerate(calls)})
    described = [
        {
            "prompt_id": call.prompt_id,
            "expert": call.denoiser,
            "timestep": call.timestep,
            "step_index": call.step_index,
            "guidance_branch": call.guidance_branch,
        }
        for call in calls
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as temporary:
        save_file(
            {key: value.clone().contiguous() for key, value in tensors.items()},
            temporary,
            # One key: safetensors writes several in an order that changes from file to file.
            metadata={"calls": json.dumps({"calls": described, OUTLINE_KEY: outline})},
        )


def read_calls(file: Path) -> list[CalibrationSample]:
    """Read the calls that `write_calls` wrote."""
    with safe_open(file, framework="pt") as stored:
        found = json.loads(stored.metadata()["calls"])
        found = found if isinstance(found, dict) else {"calls": found}  # a list in files of older versions
        described: list[Mapping[str, Any]] = found["calls"]
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
        inputs = put_together(tensors, found.get(OUTLINE_KEY) or _of_tensors(tensors))
        return [
            CalibrationSample(
                call["prompt_id"],
                call["expert"],
                call["timestep"],
                call["step_index"],
                call["guidance_branch"],
                inputs[str(index)],
            )
            for index, call in enumerate(described)
        ]


def _of_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the outline of calls with tensors alone, which are named by a call's index and an
    argument.
    """
    outline: dict[str, Any] = {}
    for name in tensors:
        index, _, argument = name.partition(".")
        outline.setdefault(index, {"dict": {}})["dict"][argument] = {"tensor": name}
    return outline
