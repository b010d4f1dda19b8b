"""Measuring both experts' sensitivity on a run's calibration samples: by itself, or on the way to a budget."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from tempoquant.calibrate.freed_memory import map_large_blocks
from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.calibrate.sensitivity import MAX_SAMPLES, LinearsSensitivity, measure_expert, spread_out
from tempoquant.calibrate.sensitivity_file import Sensitivity, measured_settings
from tempoquant.calibrate.store import SampleStore
from tempoquant.calibrate.token_chunks import TokenChunks
from tempoquant.errors import OutputError, RecipeError
from tempoquant.integrations.block_costs import ExpertCosts
from tempoquant.integrations.estimate import GIB
from tempoquant.integrations.estimate_sensitivity import states_bytes
from tempoquant.integrations.expert_weights import ExpertWeights
from tempoquant.integrations.wan import WanExpert, compute_dtype
from tempoquant.integrations.work_folder import write_atomically
from tempoquant.progress import SILENT, Progress
from tempoquant.quantizing.machine import Machine
from tempoquant.quantizing.run import Run, prepare_run
from tempoquant.recipe import Recipe
from tempoquant.timesteps import Expert

SENSITIVITY_NAME = "sensitivity.json"


def measure_sensitivity(
    model: str | Path,
    store: str | Path,
    work: str | Path,
    recipe: str | Path | Recipe = "default",
    *,
    lora: Mapping[str, str | Path] | None = None,
    machine: Machine,
    progress: Progress = SILENT,
) -> Sensitivity:
    """How much each layer's rounding adds to the error of the noise prediction, at each rank of its branch.

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
    _check_space(run, Path(work), machine)
    return sensitivity_of(run, Path(store), Path(work), machine, progress)


def _check_space(run: Run, work: Path, machine: Machine) -> None:
    """Raise OutputError when the disk has no room for the hidden states of one expert; those of two never meet."""
    assert run.store is not None
    num_samples = {expert: min(MAX_SAMPLES, len(run.store.entries(expert))) for expert in Expert}
    costs = [
        ExpertCosts(run.source, expert, run.recipe, num, machine.devices[0]) for expert, num in num_samples.items()
    ]
    needed, place = max(states_bytes(cost) for cost in costs), work.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(
            f"hidden states need {needed / GIB:.1f} GiB while sensitivity is measured, and the disk of {place} has "
            f"{free / GIB:.1f} GiB free: free some, write the result to another disk, or record fewer samples."
        )


def sensitivity_in(run: Run, store: Path, work: Path, machine: Machine, progress: Progress) -> Sensitivity:
    """A run's sensitivity: of the file it was given, or else measured once and kept in its work folder.

    Raises CalibrationError for a file of another model or other settings.
    """
    given = run.sensitivity
    file = work / SENSITIVITY_NAME if given is None else given
    if not file.is_file() and given is None:
        write_atomically(file, sensitivity_of(run, store, work, machine, progress).to_json())
    found = Sensitivity.load(file)
    found.require_fits(run.model_fingerprint, run.recipe, file)
    return found


def sensitivity_of(run: Run, store: Path, work: Path, machine: Machine, progress: Progress) -> Sensitivity:
    """Measure both experts, one after the other, each on its device."""
    map_large_blocks()
    devices = dict(zip(Expert, machine.devices * 2, strict=False))
    experts = {expert: _measure(run, expert, devices[expert], store, work, machine, progress) for expert in Expert}
    return Sensitivity(experts, {"model": run.model_fingerprint, "recipe": measured_settings(run.recipe)})


def _measure(
    run: Run, expert: Expert, device: str, store: Path, work: Path, machine: Machine, progress: Progress
) -> list[LinearsSensitivity]:
    folder = work / f"{expert.value}.sensitivity"
    lora = run.loras.get(expert)
    model = WanExpert(ExpertWeights(run.source, expert, compute_dtype(device), device, lora))
    samples = spread_out(SampleStore.open(store).samples(expert), run.recipe)
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir(parents=True)
        return measure_expert(
            model, samples, run.recipe, HiddenStates(folder / "states"), HiddenStates(folder / "gradients"),
            TokenChunks(machine.num_tokens_at_once), progress,
        )  # fmt: skip
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
