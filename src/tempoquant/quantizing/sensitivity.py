"""The measurement of all denoisers' sensitivity on a run's calibration samples: alone, or for a
budget.
"""

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tempoquant.calibrate.freed_memory import map_large_blocks
from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.calibrate.sensitivity import MAX_SAMPLES, LinearsSensitivity, evenly_spaced, measure_denoiser
from tempoquant.calibrate.sensitivity_file import Sensitivity, measured_settings
from tempoquant.calibrate.store import SampleStore
from tempoquant.calibrate.token_chunks import TokenChunks
from tempoquant.device import compute_dtype
from tempoquant.engines import Crew
from tempoquant.errors import OutputError, RecipeError
from tempoquant.models.lora.given import LoraFiles
from tempoquant.models.lora.lora import LoraSum
from tempoquant.models.replay import ReplayedDenoiser
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.models.with_experts import ModelName
from tempoquant.output.work_folder import write_atomically
from tempoquant.placement.cpu_threads import suited_threads
from tempoquant.planning.block_costs import DenoiserCosts
from tempoquant.planning.estimate_sensitivity import states_bytes
from tempoquant.planning.run_estimate import GIB
from tempoquant.progress import SILENT, Progress
from tempoquant.quantizing.machine import Machine
from tempoquant.quantizing.run import Run, prepare_run
from tempoquant.recipe import Recipe

SENSITIVITY_NAME = "sensitivity.json"
_FOLDER = ".sensitivity"


def measure_sensitivity(
    model: ModelName,
    store: str | Path,
    work: str | Path,
    recipe: str | Path | Recipe = "default",
    *,
    lora: Mapping[str, LoraFiles] | None = None,
    machine: Machine,
    progress: Progress = SILENT,
) -> Sensitivity:
    """Measure how much each layer's rounding adds to the error of the noise prediction, at each
    rank of its branch.

    Args:
        model, recipe, lora: as for `quantize`.
        store: folder that `record` wrote.
        work: an empty or new folder for hidden states; they are removed at the end.

    Raises:
        TempoQuantError: see tempoquant.errors.
    """
    run = prepare_run(model, recipe, None, 0, store, lora, progress)
    if not run.recipe.needs_calibration:
        raise RecipeError(f"recipe {run.recipe.name} looks at no activations: choose another.")
    work = Path(work).absolute()
    _check_space(run, work, machine)
    work.mkdir(parents=True, exist_ok=True)
    with machine.engine.open(work) as crew:
        return sensitivity_of(run, Path(store).absolute(), work, machine, crew, progress)


def _check_space(run: Run, work: Path, machine: Machine) -> None:
    """Raise OutputError if the disk has no room for the hidden states of the denoisers that are
    measured at once.
    """
    assert run.store is not None
    num_samples = {
        denoiser: min(MAX_SAMPLES, len(run.store.entries(denoiser))) for denoiser in run.source.denoiser_names
    }
    costs = [
        DenoiserCosts(run.source, denoiser, run.recipe, num, machine.devices[0])
        for denoiser, num in num_samples.items()
    ]
    states, place = [states_bytes(cost) for cost in costs], work
    needed = sum(states) if machine.is_side_by_side else max(states)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(
            f"hidden states need {needed / GIB:.1f} GiB while sensitivity is measured, and the disk of {place} has "
            f"{free / GIB:.1f} GiB free: free some, write the result to another disk, or record fewer samples."
        )


def sensitivity_in(run: Run, store: Path, work: Path, machine: Machine, crew: Crew, progress: Progress) -> Sensitivity:
    """Return a run's sensitivity: from its file, or measured once and kept in its work folder.

    Raises CalibrationError for a file of another model or other settings.
    """
    given = run.sensitivity
    file = work / SENSITIVITY_NAME if given is None else given
    if not file.is_file() and given is None:
        write_atomically(file, sensitivity_of(run, store, work, machine, crew, progress).to_json())
    found = Sensitivity.load(file)
    found.require_fits(run.model_fingerprint, run.recipe, file)
    return found


def sensitivity_of(run: Run, store: Path, work: Path, machine: Machine, crew: Crew, progress: Progress) -> Sensitivity:
    """Measure all denoisers, each on the device of the worker that takes it."""
    for left in work.glob(f"*{_FOLDER}"):  # from a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    stage = MeasuringSensitivity(run.source, run.recipe, run.loras, store, work, machine.num_tokens_at_once)
    found: dict[str, list[LinearsSensitivity]] = {}
    crew.run(stage, list(run.source.denoiser_names), progress=progress, on_done=found.__setitem__)
    denoisers = {denoiser: found[denoiser] for denoiser in run.source.denoiser_names}
    return Sensitivity(denoisers, {"model": run.model_fingerprint, "recipe": measured_settings(run.recipe)})


@dataclass(frozen=True)
class MeasuringSensitivity:
    """The stage that measures denoisers' sensitivity; its items are denoisers.

    Attributes:
        source: the 16-bit pipeline.
        loras: denoiser to the LoRAs that are fused into it.
        store: folder of the calibration samples.
        work: folder for hidden states.
    """

    source: SourceModel
    recipe: Recipe
    loras: Mapping[str, LoraSum]
    store: Path
    work: Path
    num_tokens_at_once: int

    @contextlib.contextmanager
    def open(self, device: str, progress: Progress) -> Iterator[Callable[[str], list[LinearsSensitivity]]]:
        """Prepare a worker; see `Stage.open`."""
        map_large_blocks()
        with suited_threads(self.source, device):
            yield lambda denoiser: self._measure(denoiser, device, progress)

    def _measure(self, denoiser: str, device: str, progress: Progress) -> list[LinearsSensitivity]:
        # Under a unique name: a machine that was cut off may still work beside the one that took
        # over.
        folder = self.work / f"{denoiser}.{uuid.uuid4().hex[:8]}{_FOLDER}"
        model = ReplayedDenoiser(
            DenoiserWeights(self.source, denoiser, compute_dtype(device), device, self.loras.get(denoiser))
        )
        samples = evenly_spaced(SampleStore.open(self.store).samples(denoiser), self.recipe)
        try:
            folder.mkdir(parents=True)
            return measure_denoiser(
                model,
                samples,
                self.recipe,
                HiddenStates(folder / "states"),
                HiddenStates(folder / "gradients"),
                TokenChunks(self.num_tokens_at_once),
                progress,
            )
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error.strerror or error}.") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
