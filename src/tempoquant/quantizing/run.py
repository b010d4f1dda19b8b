"""A planned run: every input is found, checked and resolved before any work begins."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tempoquant.calibrate.sensitivity_file import Sensitivity
from tempoquant.calibrate.store import SampleStore
from tempoquant.calibrate.store_index import INDEX_NAME
from tempoquant.checkpoint.files import sha256_of
from tempoquant.device import compute_dtype
from tempoquant.engines import Crew
from tempoquant.errors import CalibrationError, RecipeError
from tempoquant.models.fingerprint import fingerprint
from tempoquant.models.lora.given import LoraFiles, load_loras, sampler_with, sampler_words
from tempoquant.models.lora.lora import LoraSum
from tempoquant.models.prompt_needs import require_needed
from tempoquant.models.recipe_fit import check_recipe_fits
from tempoquant.models.sampling_file import default_settings, warn_of_published
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.source import SourceModel
from tempoquant.models.with_experts import ModelName
from tempoquant.output.output_folder import OutputFolder, RunIdentity
from tempoquant.planning.estimate_sensitivity import with_sensitivity
from tempoquant.planning.run_estimate import RunEstimate, check_disk, estimate
from tempoquant.progress import Progress
from tempoquant.prompts import Prompt, provenance
from tempoquant.quantizing.budget import Budget, BudgetPlan
from tempoquant.quantizing.component import ComponentJob
from tempoquant.quantizing.coverage import check_coverage, planned, stored
from tempoquant.quantizing.machine import Machine
from tempoquant.quantizing.text_encoders import check_text_encoders
from tempoquant.recipe import Recipe
from tempoquant.recording.plan import (
    ModelIdentity,
    RecordingPlan,
    calibration_settings,
    resolve_recipe,
    stored_settings,
)
from tempoquant.recording.prompt_sets import calibration_prompts
from tempoquant.recording.record import record_into

_logger = logging.getLogger(__name__)

_STORE = "store"
_SAMPLER = ("num_steps", "guidance_scale", "flow_shift")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of `quantize`.

    Attributes:
        source: the 16-bit pipeline.
        recipe: resolved: every setting is filled in.
        settings: the sampling settings of calibration.
        prompts: to record; none if a store is given, or none is needed.
        store: the given sample store.
        loras: denoiser's name to the LoRAs that are fused into it.
        seed: of the calibration's noise.
        model_fingerprint: of the source's files.
        budget: decides ranks and 16-bit layers, or None.
        sensitivity: file that decides how it is spent; None to measure it.
    """

    source: SourceModel
    recipe: Recipe
    settings: SamplingSettings
    prompts: Sequence[Prompt]
    store: SampleStore | None
    loras: Mapping[str, LoraSum]
    seed: int
    model_fingerprint: str
    budget: Budget | None = None
    sensitivity: Path | None = None

    def within(self, budget: Budget | None, sensitivity: Path | None) -> "Run":
        """Return the same run with a budget. Raises TempoQuantError if it does not fit recipe,
        model, or file.
        """
        if budget is None:
            if sensitivity is not None:
                raise RecipeError("a sensitivity file is there to spend a budget by: give one of those too.")
            return self
        BudgetPlan(self.source, self.recipe, budget)
        if sensitivity is not None:
            found = Sensitivity.load(sensitivity)
            if self.model_fingerprint:
                found.require_fits(self.model_fingerprint, self.recipe, sensitivity)
        return dataclasses.replace(self, budget=budget, sensitivity=sensitivity)

    def spend(self, sensitivity: Sensitivity) -> "Run":
        """Return the run with the recipe that the budget buys. Raises RecipeError if nothing is
        left to quantize.
        """
        assert self.budget is not None
        recipe = BudgetPlan(self.source, self.recipe, self.budget).spend(sensitivity)
        check_recipe_fits(self.source, recipe)
        return dataclasses.replace(self, recipe=recipe)

    def identity(self, machine: Machine) -> RunIdentity:
        """Return the facts that make another run the same."""
        dtypes = sorted({str(compute_dtype(device)).removeprefix("torch.") for device in machine.devices})
        if self.store is None:
            prompts, store, seed = provenance(self.prompts), None, self.seed
        else:
            prompts, store, seed = self.store.prompts, self.store.digest, self.store.provenance["seed"]
        hashes = {denoiser: lora.sha256 for denoiser, lora in self.loras.items()}
        return RunIdentity(
            self.recipe.to_dict(), self.model_fingerprint, prompts, store, seed, " and ".join(dtypes), hashes,
            version("tempoquant"), self._budget_identity,
        )  # fmt: skip

    @property
    def _budget_identity(self) -> dict[str, Any] | None:
        if self.budget is None:
            return None
        return {**self.budget.to_dict(), "sensitivity": self.sensitivity and sha256_of(self.sensitivity)}

    @property
    def sampling(self) -> dict[str, Any] | None:
        """Return the sampling settings of the result if fused LoRAs or the store's samples depart
        from the source; else None.
        """
        own = default_settings(self.source)
        if self.store is not None:
            settings = self.settings
            if self.loras and self.store.provenance["from_latents"]:  # nobody sampled: the LoRAs decide
                settings = settings.replace(**sampler_with(self.source.family, self.loras, {}))
        elif self.loras:
            settings = own.replace(**{key: getattr(self.settings, key) for key in _SAMPLER})
        else:
            return None
        return None if settings == own else settings.to_dict()

    @property
    def texts(self) -> list[str]:
        """Return the prompts that the run calibrates on."""
        if self.store is not None:
            return [prompt["prompt"] for prompt in self.store.prompts]
        return [prompt.text for prompt in self.prompts]

    def num_blocks(self, denoiser: str) -> int:
        """Return the number of blocks of a denoiser."""
        return len(self.source.blocks(denoiser))

    @property
    def records(self) -> bool:
        """Return whether this run records samples of its own."""
        return bool(self.prompts)

    def record(self, work: Path, machine: Machine, crew: Crew, progress: Progress) -> Path | None:
        """Return the folder of the calibration samples, recorded now unless they were given; None
        without calibration.
        """
        if self.store is not None:
            return self.store.folder.absolute()
        if not self.records:
            return None
        if (work / _STORE / INDEX_NAME).is_file():  # of this very run: the work folder belongs to no other
            try:
                SampleStore.open(work / _STORE)
            except CalibrationError as error:
                raise CalibrationError(f"{error} (Remove {work / _STORE} for that.)") from error
            return work / _STORE
        assert self.recipe.samples_per_denoiser is not None  # resolve_recipe filled it in
        plan = RecordingPlan(self.prompts, self.settings, self.recipe.samples_per_denoiser, self.seed, self.loras)
        model = ModelIdentity(self.model_fingerprint, self.source.hub_id, self.source.revision)
        record_into(
            self.source, work / _STORE, plan, model=model, device=machine.devices[0], memory=machine.memory,
            crew=crew, progress=progress,
        )  # fmt: skip
        return work / _STORE

    def jobs(self, work: Path, folder: OutputFolder, store: Path | None, machine: Machine) -> list[ComponentJob]:
        """Return one job for each denoiser."""
        return [
            ComponentJob(
                self.source, each.name, self.recipe, store, self.loras.get(each.name), work,
                folder.component(work, each.component), machine.devices[0],
            )
            for each in self.source.denoisers
        ]  # fmt: skip

    def estimate(self, machine: Machine, link: bool, gemm_rates: Mapping[str, float] | None = None) -> RunEstimate:
        """Estimate memory and disk of the whole run, and its time if GEMM rates are known."""
        wanted = self.recipe.samples_per_denoiser or 0
        names = self.source.denoiser_names
        num_samples = {name: wanted if self.store is None else len(self.store.entries(name)) for name in names}
        devices = machine.devices if machine.cluster is None else machine.devices * len(names)  # as many as workers
        planned = estimate(
            self.source, self.recipe, devices=devices, num_samples=num_samples, records=self.records,
            link=link, hidden_ram_bytes=machine.hidden_ram_bytes, memory=machine.memory, gemm_rates=gemm_rates,
        )  # fmt: skip
        if self.budget is None or self.sensitivity is not None:
            return planned
        return with_sensitivity(planned, self.source, self.recipe, devices, num_samples, gemm_rates)

    def check_space(self, folder: OutputFolder, machine: Machine, link: bool) -> None:
        """Raise OutputError if the disk cannot hold the files still to be written."""
        there = sum(file.stat().st_size for file in folder.work.path.rglob("*") if file.is_file())
        check_disk(folder.path, round(self.estimate(machine, link).peak_disk_gib * 2**30), there)


def prepare_run(
    model: ModelName,
    recipe: str | Path | Recipe,
    calibration: str | Path | None,
    seed: int,
    store: str | Path | None,
    lora: Mapping[str, LoraFiles] | None,
    progress: Progress,
    identify: bool = True,
) -> Run:
    """Find, check and resolve all inputs of a run.

    Args:
        identify: whether to read the whole model for its fingerprint; a run that is only planned
            needs none.

    Raises TempoQuantError for everything that would fail later.
    """
    recipe = Recipe.load(recipe)
    source = SourceModel.open(model)
    loras = load_loras(source, lora or {})
    own, given = default_settings(source), {key: getattr(recipe, key) for key in _SAMPLING}
    if loras:
        sampler = sampler_with(source.family, loras, {key: getattr(recipe, key) for key in _SAMPLER})
        own, given = own.replace(**sampler), {**given, **sampler}
        if store is None:
            _logger.warning(
                "with LoRAs in the weights, calibration samples with %s; so will the result", sampler_words(sampler)
            )
    opened = None if store is None else SampleStore.open(Path(store))
    if opened is not None and calibration is not None:
        raise CalibrationError("the sample store has prompts of its own: leave --calibration or --store out.")
    prompts: list[Prompt] = []
    if opened is not None:
        recipe, settings = _as_stored(recipe, opened)
    else:
        recipe = resolve_recipe(recipe, own, source.geometry)
        settings = calibration_settings(recipe, own)
        if recipe.needs_calibration:
            source.geometry.require(settings)
            warn_of_published(source, settings, given)
            path = None if calibration is None else str(calibration)
            prompts = calibration_prompts(str(model), path, recipe.num_prompts)
            require_needed(source, prompts)
    check_recipe_fits(source, recipe)
    check_text_encoders(source, recipe.text_encoder)
    if recipe.needs_calibration:
        check_coverage(recipe, planned(source, recipe, settings, prompts) if opened is None else stored(opened))
    identified = fingerprint(source, progress) if identify or opened is not None else ""
    if opened is not None:
        _require_same_model(opened, identified, loras)
    return Run(source, recipe, settings, prompts, opened, loras, seed, identified)


_SAMPLING = ("num_steps", "flow_shift", "guidance_scale", "height", "width", "num_frames")


def _as_stored(recipe: Recipe, store: SampleStore) -> tuple[Recipe, SamplingSettings]:
    """Return the recipe with the store's settings filled in. Raises CalibrationError if the two
    differ.
    """
    if not recipe.needs_calibration:
        raise CalibrationError(f"recipe {recipe.name} looks at no activations: leave the sample store out.")
    settings = stored_settings(store)
    recorded: dict[str, Any] = {key: getattr(settings, key) for key in _SAMPLING}
    for key, value in recorded.items():
        if getattr(recipe, key) not in (None, value):
            raise CalibrationError(
                f"the sample store was recorded with {key} = {value}, the recipe asks for {getattr(recipe, key)}: "
                "record again, or leave that setting out."
            )
    num_samples = max(len(store.entries(denoiser)) for denoiser in store.denoisers)
    if recipe.samples_per_denoiser is not None and recipe.samples_per_denoiser < num_samples:
        raise CalibrationError(
            f"the sample store holds {num_samples} samples of a denoiser, the recipe asks for "
            f"{recipe.samples_per_denoiser}: record again, or leave that setting out."
        )
    return recipe.replace(**recorded, samples_per_denoiser=num_samples, num_prompts=len(store.prompts)), settings


def _require_same_model(store: SampleStore, identified: str, loras: Mapping[str, LoraSum]) -> None:
    """Raise CalibrationError if the samples come from another model, or from other LoRAs."""
    if store.provenance["model"]["fingerprint"] != identified:
        raise CalibrationError(
            f"the samples in {store.folder} were recorded from another model: record samples of this one."
        )
    hashes = {denoiser: lora.sha256 for denoiser, lora in loras.items()}
    if not store.provenance["from_latents"] and store.provenance["loras"] != hashes:
        raise CalibrationError(
            f"the samples in {store.folder} were recorded with other LoRAs than --lora names: give the same to both."
        )
