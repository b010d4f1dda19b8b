"""The stages of workers that record calibration samples: they sample prompts, or noise clips, one
prompt after the other.

Each finished prompt is on disk once its item is done.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tempoquant.calibrate.store_writer import StoreWriter
from tempoquant.errors import ModelError
from tempoquant.hosts.diffusers.quiet import quiet_workers
from tempoquant.hosts.diffusers.residual_magnitudes import ResidualMagnitudes
from tempoquant.hosts.diffusers.sampling import CallPosition, sample_latents, sample_of, watching_trajectory
from tempoquant.models.schedule import sampling_steps
from tempoquant.models.source import SourceModel
from tempoquant.placement.modes import RecordingMemory
from tempoquant.placement.streaming import LoadedPipeline, encode_texts, loaded_autoencoder, loaded_pipeline
from tempoquant.progress import Progress
from tempoquant.recording.from_latents import noised_samples
from tempoquant.recording.plan import CALIBRATION_NOISE, Calls, RecordingPlan

SAMPLING, NOISING = "Recording calibration samples", "Encoding clips"
"""Descriptions of progress; a unit is a step or a clip."""


class ToRecord(NamedTuple):
    """An item of a recording.

    Attributes:
        prompt_index: in the plan.
        calls: of the transformer, those to keep.
    """

    prompt_index: int
    calls: Calls


@dataclass(frozen=True)
class SamplingPrompts:
    """The stage that runs the pipeline for each prompt, up to its last wanted step.

    Attributes:
        source: the 16-bit pipeline.
        folder: of the store.
        indices: of all remaining prompts, for every worker: their texts may be encoded first.
    """

    source: SourceModel
    folder: Path
    plan: RecordingPlan
    memory: RecordingMemory
    indices: tuple[int, ...]

    @contextlib.contextmanager
    def open(self, device: str, progress: Progress) -> Iterator[Callable[[ToRecord], None]]:
        """Load the pipeline; see `Stage.open`. Raises as `loaded_pipeline`."""
        quiet_workers()
        on_loaded = progress.start("Loading the 16-bit pipeline", 1)
        writer = StoreWriter(self.folder, self.source.family.text_inputs)
        with loaded_pipeline(
            self.source, device, self.memory, _texts(self.plan, self.indices), self.plan.loras
        ) as loaded:
            on_loaded()

            def sample(item: ToRecord) -> None:
                num_steps = 1 + max(step for step, _ in item.calls)
                advance = progress.start(SAMPLING, num_steps)
                magnitudes = _sample_prompt(loaded, self.plan, item, writer, advance)
                writer.commit(item.prompt_index, magnitudes.ratios)

            yield sample


@dataclass(frozen=True)
class NoisingClips:
    """The stage that noises each prompt's clip to its wanted timesteps. Attributes are as above."""

    source: SourceModel
    folder: Path
    plan: RecordingPlan
    indices: tuple[int, ...]

    @contextlib.contextmanager
    def open(self, device: str, progress: Progress) -> Iterator[Callable[[ToRecord], None]]:
        """Load the text encoder first, then the autoencoder alone; see `Stage.open`."""
        quiet_workers()
        plan, writer = self.plan, StoreWriter(self.folder, self.source.family.text_inputs)
        on_encoded = progress.start("Encoding texts", 1)
        embeddings = encode_texts(self.source, _texts(plan, self.indices), device)
        on_encoded()
        steps = sampling_steps(self.source, plan.settings)
        with loaded_autoencoder(self.source, device) as pipeline:

            def noise(item: ToRecord) -> None:
                on_noised = progress.start(NOISING, 1)
                prompt, seed = plan.prompts[item.prompt_index], CALIBRATION_NOISE + plan.seed + item.prompt_index
                texts = {"conditional": _only(embeddings[prompt.text]), "unconditional": _only(embeddings[""])}
                for sample in noised_samples(
                    pipeline, self.source.family, prompt, plan.settings, seed, steps, item.calls, texts
                ):
                    writer.add(item.prompt_index, sample)
                writer.commit(item.prompt_index)
                on_noised()

            yield noise


def _only(embedding: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the one tensor that encodes a text, in pipelines whose clips are noised."""
    (tensor,) = embedding.values()
    return tensor


def _texts(plan: RecordingPlan, indices: tuple[int, ...]) -> list[str]:
    """Return the texts of prompts, each with the negative one."""
    return [text for index in indices for text in (plan.prompts[index].text, "")]


def _sample_prompt(
    loaded: LoadedPipeline,
    plan: RecordingPlan,
    item: ToRecord,
    writer: StoreWriter,
    advance: Callable[[], None],
) -> ResidualMagnitudes:
    prompt, pipeline = plan.prompts[item.prompt_index], loaded.pipeline
    left = set(item.calls)

    magnitudes = ResidualMagnitudes(pipeline)

    def keep(position: CallPosition, inputs: dict[str, Any], _output: Any) -> None:
        magnitudes.note(position)
        call = (position.step_index, position.guidance_branch)
        if call in left:
            writer.add(item.prompt_index, sample_of(prompt, position, inputs))
            left.remove(call)

    with magnitudes.watched(), watching_trajectory(pipeline, keep) as step_done:

        def after_step() -> None:
            step_done()
            advance()
            pipeline._interrupt = not left  # the pipeline's own way to end early

        seed = CALIBRATION_NOISE + plan.seed + item.prompt_index
        sample_latents(pipeline, prompt, plan.settings, seed, loaded.texts(prompt.text), on_step=after_step)
    if left:
        raise ModelError(
            f"the pipeline did not make the calls {sorted(left)} of prompt {prompt.id!r}: its scheduler takes other "
            "steps when it runs; use UniPCMultistepScheduler."
        )
    return magnitudes
