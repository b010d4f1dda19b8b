"""Generates what is missing: one model's videos, each kept whole as soon as it is made, a failed one noted and passed.

All models get the same image, prompt, noise, scheduler, steps, size and post-processing.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch

from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.errors import OutputError, TempoQuantError
from tempoquant.evaluate.benchmark_sets import Item
from tempoquant.evaluate.evaluation_folder import EvaluationFolder, Take
from tempoquant.evaluate.files import write_lossless, write_mp4, write_png
from tempoquant.evaluate.plan import Model, Plan
from tempoquant.evaluate.recorded_calls import watched_calls, write_calls
from tempoquant.evaluate.run_costs import measuring_costs
from tempoquant.integrations.memory_modes import load_in_mode, remove_memory_mode
from tempoquant.integrations.residency import free_memory
from tempoquant.integrations.sampling import first_frame, generate_video
from tempoquant.integrations.schedule import load_scheduler
from tempoquant.progress import Progress

NUM_MAPPED = 2
"""The reference's calls of so many items are kept: what single layers do differs little between items."""

_logger = logging.getLogger(__name__)


class LoadedOnDemand:
    """A model's pipeline, loaded when it is first asked for: in the plan's memory mode, prepared, and with the
    reference's scheduler."""

    def __init__(self, model: Model, plan: Plan, progress: Progress) -> None:
        self._model, self._plan, self._progress = model, plan, progress
        self._pipeline: Any = None

    def __call__(self) -> Any:
        """The pipeline. Raises ModelError and CheckpointError as loading does."""
        if self._pipeline is None:
            on_loaded = self._progress.start(f"{self._model.label}: loading", 1)
            pipeline = load_in_mode(self._model.folder, self._plan.memory, self._plan.device)
            pipeline.scheduler = load_scheduler(self._plan.reference, self._plan.settings.flow_shift)
            self._model.prepare(pipeline)
            self._pipeline = pipeline
            on_loaded()
        return self._pipeline

    def release(self) -> None:
        """Let go of it, and give its memory back."""
        remove_memory_mode(self._pipeline)
        self._pipeline = None
        free_memory()


def generate_missing(
    folder: EvaluationFolder,
    plan: Plan,
    model: Model,
    pipeline: Callable[[], Any],
    keep_calls: bool,
    progress: Progress,
) -> None:
    """Generate every take of a model that is not there yet.

    Args:
        pipeline: gives the loaded pipeline; not called where nothing is missing.
        keep_calls: whether to keep transformer calls of the first items, for the layer maps.

    Raises:
        OutputError: a file cannot be written. Whatever else goes wrong is noted, and the next take begins.
    """
    wanted = plan.takes(model.label)
    done = {take for take, line in folder.takes().items() if not line.get("failed")}
    num_done = sum(take in done for _, take in wanted)
    on_step = progress.start(
        f"{model.label}: generating", len(wanted) * plan.settings.num_steps, num_done * plan.settings.num_steps
    )
    mapped = {(item.id, take.seed) for item, take in wanted[:NUM_MAPPED]} if keep_calls else set()
    for item, take in wanted:
        if take in done:
            continue
        running = pipeline()
        steps_done = _Counter(on_step)
        try:
            _generate(folder, plan, item, take, running, (take.id, take.seed) in mapped, steps_done)
        except OutputError:
            raise
        except Exception as error:
            why = str(error) if isinstance(error, TempoQuantError) else f"{type(error).__name__}: {error}"
            _logger.warning("%s, %s, seed %d failed: %s", take.label, take.id, take.seed, why)
            folder.fail(take, why)
            free_memory()
        steps_done.complete(plan.settings.num_steps)


def _generate(
    folder: EvaluationFolder, plan: Plan, item: Item, take: Take, pipeline: Any, keep_calls: bool, on_step: "_Counter"
) -> None:
    prompt, settings = item.prompt(), plan.settings
    latents: dict[str, torch.Tensor] = {}
    calls: list[CalibrationSample] = []

    def on_latents(timestep: float, found: torch.Tensor) -> None:
        latents[plan.bin_name(timestep)] = found.detach().to("cpu", torch.float32, copy=True).contiguous()

    with contextlib.ExitStack() as stack:
        costs = stack.enter_context(measuring_costs(pipeline))
        watched = stack.enter_context(watched_calls(pipeline, prompt, plan.mapped_steps, calls)) if keep_calls else None

        def after_step() -> None:
            costs.step()
            if watched is not None:
                watched()
            on_step()

        video = generate_video(pipeline, prompt, settings, take.seed, on_step=after_step, on_latents=on_latents)
    for kind in ("videos", "lossless"):
        folder.place(kind, take).parent.mkdir(parents=True, exist_ok=True)
    folder.image(item.id).parent.mkdir(exist_ok=True)
    write_png(folder.image(item.id), first_frame(prompt, settings))
    write_mp4(folder.place("videos", take), video, settings.fps)
    write_lossless(folder.place("lossless", take), video, settings.fps)
    if calls:
        write_calls(folder.calls(take.id, take.seed), calls)
    folder.finish(take, latents, costs.record())


class _Counter:
    """Passes steps on, and makes up for those that a failed generation did not take."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self._on_step, self._count = on_step, 0

    def __call__(self) -> None:
        self._count += 1
        self._on_step()

    def complete(self, total: int) -> None:
        for _ in range(total - self._count):
            self()
