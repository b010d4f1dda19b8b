"""Generation of the missing videos of one model: each is stored whole once it is made, a failed one
is noted and skipped.

All models get the same prompt, image and clips, noise, scheduler, steps, size and post-processing.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tempoquant.acceleration.accelerate import acceleration_of
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.device import free_memory, is_device_lost
from tempoquant.engines import Crew
from tempoquant.errors import DeviceError, ModelError, OutputError, TempoQuantError
from tempoquant.evaluate.benchmark_sets import Item
from tempoquant.evaluate.environment import device_name
from tempoquant.evaluate.evaluation_folder import EvaluationFolder, Take
from tempoquant.evaluate.files import write_lossless, write_mp4, write_png, write_text
from tempoquant.evaluate.layer_maps import layer_maps
from tempoquant.evaluate.plan import Model, Plan
from tempoquant.evaluate.recorded_calls import read_calls, watched_calls, write_calls
from tempoquant.evaluate.run_costs import measuring_costs
from tempoquant.evaluate.text_embeddings import embeddings_of
from tempoquant.hosts.contents import configs_of
from tempoquant.hosts.diffusers.quiet import quiet_workers
from tempoquant.hosts.diffusers.sampling import generate_video
from tempoquant.images import first_frame
from tempoquant.kernels.dispatch import choose
from tempoquant.models.fingerprint import outline
from tempoquant.models.schedule import load_scheduler
from tempoquant.placement.cpu_threads import suited_threads
from tempoquant.placement.memory_modes import load_in_mode, remove_memory_mode
from tempoquant.progress import CombinedProgress, Progress

MAPS = "maps"
"""The item of `Generating` that is no take."""

NO_MAPS = "the layer maps of %s are missing, and the next run retries: %s"

_STEPS = "generating"

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def loaded_model(model: Model, plan: Plan, device: str, progress: Progress) -> Iterator[Any]:
    """Load a model's pipeline within this context: in the plan's memory mode, prepared, and with
    the reference's scheduler.

    Raises ModelError and CheckpointError as loading does.
    """
    on_loaded = progress.start(f"{model.label}: loading", 1)
    pipeline = load_in_mode(model.source, plan.memory, device)
    try:
        pipeline.scheduler = load_scheduler(plan.reference, plan.settings.flow_shift)
        model.make_ready(pipeline)
        on_loaded()
        with suited_threads(plan.reference, device):
            yield pipeline
    finally:
        if (in_force := acceleration_of(pipeline)) is not None:
            in_force.remove()
        remove_memory_mode(pipeline)


@dataclass(frozen=True)
class Generating:
    """The stage in which one model makes its videos, and its layer maps.

    Items are takes with their benchmark items, or MAPS. The result of a take is its manifest line;
    of MAPS it is None, or the reason why there are none.

    Attributes:
        path: of the evaluation folder.
        is_reference: whether transformer calls of its first takes are kept for the other models'
            maps.
        outline: of the model's folder as the driver sees it.
    """

    path: Path
    plan: Plan
    model: Model
    is_reference: bool
    outline: str

    @contextlib.contextmanager
    def open(self, device: str, progress: Progress) -> Iterator[Callable[[Any], Any]]:
        """Load the model; see `Stage.open`. A failure here does not count against an item.

        Raises:
            ModelError: this machine's copy of the model differs from the driver's.
        """
        quiet_workers()
        if outline(self.model.source) != self.outline:
            raise ModelError(f"{self.model.folder} differs from the one on the machine that started the run.")
        with loaded_model(self.model, self.plan, device, progress) as pipeline:
            worker = _Generator(self, device, pipeline, progress)
            yield lambda item: worker.map_layers() if item == MAPS else worker.take(*item)

    @property
    def keeps_calls_of(self) -> set[tuple[str, int]]:
        """Return ids and seeds. A quantized reference has none: maps show the distance of a linear
        from the one in 16 bits.
        """
        if not self.is_reference or configs_of(self.model.folder):
            return set()
        return self.plan.mapped_takes

    @property
    def calls_files(self) -> list[Path]:
        """Return the files of the reference's calls, from which maps are made."""
        folder = EvaluationFolder(self.path)
        files = [folder.calls(take.id, take.seed) for _, take in self.plan.takes(self.model.label)]
        return [file for file in files if file.is_file()]

    @property
    def lacks_maps(self) -> bool:
        """Return whether maps can be made and are missing; not from calls whose blocks a cache may
        skip.
        """
        if self.model.speed is not None:
            return False
        is_there = EvaluationFolder(self.path).maps(self.model.label).is_file()
        return not self.is_reference and not is_there and bool(self.calls_files) and bool(configs_of(self.model.folder))


def generate_missing(stage: Generating, crew: Crew, progress: Progress) -> None:
    """Generate every missing take of a model, and its layer maps.

    Raises:
        OutputError: a file cannot be written. Any other failure of a take is noted, and the next
            one begins.
        ModelError, CheckpointError: the model cannot be loaded.
    """
    folder, plan, label = EvaluationFolder(stage.path), stage.plan, stage.model.label
    wanted = plan.takes(label)
    done = {take for take, line in folder.takes().items() if not line.get("failed")}
    num_done = sum(take in done for _, take in wanted)
    num_steps = plan.settings.num_steps
    together = CombinedProgress(progress, f"{label}: {_STEPS}", len(wanted) * num_steps, num_done * num_steps)
    items: list[Any] = [(item, take) for item, take in wanted if take not in done]
    if stage.lacks_maps:
        items.append(MAPS)

    def note(item: Any, line: Any) -> None:
        if item == MAPS and line is not None:
            _logger.warning(NO_MAPS, label, line)
        elif item != MAPS:
            folder.note(line)
            if why := line.get("failed"):
                _logger.warning("%s, %s, seed %d failed: %s", label, line["id"], line["seed"], why)

    def lose(item: Any, why: str) -> None:
        if item == MAPS:
            _logger.warning(NO_MAPS, label, why)
        else:
            note(item, failed_line(item[1], why))

    crew.run(
        stage, items, progress=together, on_done=note, on_lost=lose,
        is_done=lambda item: folder.maps(label).is_file() if item == MAPS else folder.adopt(item[1]),
    )  # fmt: skip


def failed_line(take: Take, why: str) -> dict[str, Any]:
    """Return the manifest line of a generation that ended in an error; the next run retries it."""
    return {**take._asdict(), "failed": why}


class _Generator:
    """Does the items of `Generating` on one device."""

    def __init__(self, stage: Generating, device: str, pipeline: Any, progress: Progress) -> None:
        self._stage, self._folder, self._device = stage, EvaluationFolder(stage.path), device
        self._pipeline, self._progress = pipeline, progress
        self._keeps_calls_of = stage.keeps_calls_of

    def take(self, item: Item, take: Take) -> dict[str, Any]:
        """Generate one video; return its manifest line, which records a failure."""
        num_steps = self._stage.plan.settings.num_steps
        steps_done = _Counter(self._progress.start(f"{take.label}: {_STEPS}", num_steps))
        try:
            line = _generate(
                self._folder, self._stage.plan, item, take, self._pipeline,
                (take.id, take.seed) in self._keeps_calls_of, self._where(), steps_done,
            )  # fmt: skip
        except OutputError:
            raise
        except Exception as error:
            line = failed_line(take, _why(error))
            free_memory()
        steps_done.complete(num_steps)
        return line

    def map_layers(self) -> str | None:
        """Make the layer maps from the reference's calls; return the reason if they cannot be made.
        The videos do not depend on them.
        """
        plan, place = self._stage.plan, self._folder.maps(self._stage.model.label)
        try:
            calls = [call for file in self._stage.calls_files for call in read_calls(file)]
            maps = layer_maps(self._pipeline, plan.reference, calls, plan.bins, self._progress)
        except Exception as error:
            return _why(error)
        place.parent.mkdir(exist_ok=True)
        write_text(place, json.dumps(maps, allow_nan=False))
        return None

    def _where(self) -> dict[str, Any]:
        """Describe the device that makes a video, and its path of multiplication for each
        format.
        """
        formats = {
            entry.format.name: entry.format
            for config in configs_of(self._stage.model.folder).values()
            for entry in config.layers.values()
        }
        device = torch.device(self._device)
        backends = {name: choose(device, format).backend.value for name, format in formats.items()}
        return {"device": device_name(device), "kernels": backends}


def _generate(
    folder: EvaluationFolder,
    plan: Plan,
    item: Item,
    take: Take,
    pipeline: Any,
    keep_calls: bool,
    where: Mapping[str, Any],
    on_step: Callable[[], None],
) -> dict[str, Any]:
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
    if plan.keeps_embeddings:
        latents |= embeddings_of(pipeline, prompt.text)
    for kind in ("videos", "lossless"):
        folder.place(kind, take).parent.mkdir(parents=True, exist_ok=True)
    if prompt.image is not None:
        folder.image(item.id).parent.mkdir(exist_ok=True)
        write_png(folder.image(item.id), first_frame(prompt.image, settings.width, settings.height))
    write_mp4(folder.place("videos", take), video, settings.fps)
    write_lossless(folder.place("lossless", take), video, settings.fps)
    if calls:
        write_calls(folder.calls(take.id, take.seed), calls)
    in_force = acceleration_of(pipeline)
    speed = {} if in_force is None else {"acceleration": in_force.to_dict()}
    return folder.finish(take, latents, {**costs.record(), **where, **speed})


def _why(error: Exception) -> str:
    """Describe an error in words. Raises DeviceError if everything else on this device would fail
    too.
    """
    if isinstance(error, TempoQuantError):
        return str(error)
    why = f"{type(error).__name__}: {error}"
    if is_device_lost(error):
        raise DeviceError(f"the GPU stopped working ({why}). The same command resumes the run.") from error
    return why


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
