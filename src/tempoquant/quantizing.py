"""The two verbs: quantize a pipeline, quantize one layer."""

import dataclasses
import functools
import gc
import itertools
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from tempoquant.calibrate.linear_calibration import LinearCalibration, phases_of
from tempoquant.calibrate.sample import CalibrationSet
from tempoquant.calibrate.sequential import quantize_expert
from tempoquant.checkpoint.schema import Calibration
from tempoquant.checkpoint.writer import ComponentWriter
from tempoquant.errors import CalibrationError
from tempoquant.integrations.output_folder import OutputFolder, RunIdentity, fingerprint
from tempoquant.integrations.pipeline_folder import check_pipeline_folder, hub_id_of, resolve_model
from tempoquant.integrations.prompt_sets import calibration_prompts
from tempoquant.integrations.recording import calibration_settings, record_calibration, resolve_recipe
from tempoquant.integrations.sampling import default_settings
from tempoquant.integrations.wan import (
    EXPERT_COMPONENTS,
    WanExpert,
    check_recipe_fits,
    component_config,
    compute_dtype,
    default_device,
    load_expert,
    load_pipeline,
    stored_tensors,
)
from tempoquant.parallel import run_all
from tempoquant.progress import SILENT, Progress
from tempoquant.prompts import Prompt, provenance
from tempoquant.recipe import Recipe
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS, Expert, TimestepBins


def quantize(  # noqa: PLR0913 (the public verb: six arguments say what to do, three how)
    model: str | Path,
    output: str | Path,
    recipe: str | Path | Recipe = "paper",
    calibration: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    *,
    overwrite: bool = False,
    link: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Quantize both experts of a Wan2.2 image-to-video pipeline and write a complete diffusers pipeline.

    Args:
        model: "tiny", "tiny-outliers", a diffusers folder, or a hub id.
        output: a folder that does not exist or is empty. A finished result of the same run is left as it is.
        recipe: a built-in recipe's name, a .toml file, or a Recipe.
        calibration: jsonl of {image, prompt[, id]}, or a folder of such; None for a bundled model's own set.
        device: "cpu", "cuda", or "cuda:0,cuda:1" to give each expert its own; None for CUDA where there is one.
        seed: of the calibration's noise. Same seed, machine and thread count: same bytes.
        overwrite: replace what is in `output`.
        link: hard-link the unquantized components instead of copying them.
        progress: where to show how far the job is.

    Returns:
        The output folder.

    Raises:
        TempoQuantError: see tempoquant.errors; nothing is left behind in `output`.
    """
    recipe = Recipe.load(recipe)
    source = resolve_model(model)
    check_pipeline_folder(source)
    own_settings = default_settings(source)
    recipe = resolve_recipe(recipe, own_settings)
    check_recipe_fits(source, recipe)
    devices = (device or default_device()).split(",")
    prompts: list[Prompt] = []
    if recipe.needs_calibration:
        prompts = calibration_prompts(str(model), None if calibration is None else str(calibration), recipe.num_prompts)
    identity = RunIdentity(recipe.to_dict(), fingerprint(source), provenance(prompts), seed, version("tempoquant"))
    folder = OutputFolder(Path(output), identity)
    folder.refuse_source(source)
    if folder.is_finished(overwrite):
        return folder.path
    with folder.writing() as partial:
        samples = _record(source, prompts, recipe, devices[0], seed, progress)
        drawn = {**dataclasses.asdict(calibration_settings(recipe, own_settings)), "seed": seed}
        calibration_record = Calibration(tuple(provenance(prompts)), drawn) if prompts else None
        jobs = [
            functools.partial(_quantize_component, source, partial, expert, where, samples, recipe, calibration_record)
            for expert, where in zip(EXPERT_COMPONENTS, itertools.cycle(devices), strict=False)
        ]
        run_all(jobs, len(devices), progress)
        folder.complete(partial, source, link, hub_id_of(model))
    return folder.path


def _record(
    source: Path, prompts: list[Prompt], recipe: Recipe, device: str, seed: int, progress: Progress
) -> CalibrationSet:
    """Sample the 16-bit pipeline and let go of it before quantization begins."""
    if not prompts:
        return CalibrationSet()
    pipeline = load_pipeline(source, device)
    try:
        settings = calibration_settings(recipe, default_settings(source))
        return record_calibration(pipeline, prompts, recipe, settings, seed, progress)
    finally:
        del pipeline
        gc.collect()


def _quantize_component(
    source: Path,
    output: Path,
    expert: Expert,
    device: str,
    samples: CalibrationSet,
    recipe: Recipe,
    calibration: Calibration | None,
    progress: Progress,
) -> None:
    """Quantize one expert into `output`'s component folder."""
    transformer = load_expert(source, expert, device, compute_dtype(device))
    bins = TimestepBins.from_step_fractions(samples.timesteps(expert), recipe.bin_fractions(expert))
    biases = dict(stored_tensors(source, expert, lambda name: name.endswith(".bias")))
    notes = []
    quantized = set()
    with ComponentWriter(output / EXPERT_COMPONENTS[expert], expert=expert, bins=bins, recipe=recipe) as writer:
        for name, layer, needed_float64 in quantize_expert(
            WanExpert(transformer, expert), samples, recipe, bins, progress
        ):
            writer.add_layer(name, dataclasses.replace(layer, bias=biases.get(f"{name}.bias")))  # in its stored dtype
            quantized.add(name)
            if needed_float64:
                notes.append(f"the Hessian of {name} was positive definite in float64 only")
        for name, tensor in stored_tensors(source, expert, lambda name: name.rpartition(".")[0] not in quantized):
            writer.add_tensor(name, tensor)
        writer.finish(component_config(source, expert), calibration=calibration, notes=tuple(notes))


def quantize_linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    calibration_inputs: torch.Tensor | Mapping[int, torch.Tensor] | None,
    recipe: str | Path | Recipe = "paper",
) -> QuantizedLinear:
    """Quantize one linear layer: for notebooks, tests, and comparing methods.

    Args:
        weight: (out, in), any float dtype.
        bias: (out,) or None.
        calibration_inputs: raw inputs (tokens, in), or {timestep_bin: (tokens, in)} for bins 0 … n − 1, bin 0 the
            cleanest; then the layer's bins divide the timesteps 0 … 1000 into n equal intervals. None for a recipe
            that needs no calibration.
        recipe: as for `quantize`; its bin fractions, prompts and sampling settings play no part here.

    Returns:
        The layer, ready to be called: inside `layer.at_timestep(t)` when it has several bins.

    Raises:
        TempoQuantError: NaN or Inf, a group size that does not divide, a rank too large, a Hessian that is not
            positive definite, missing calibration inputs.
    """
    recipe = Recipe.load(recipe)
    by_bin = _inputs_by_bin(calibration_inputs, weight.shape[1], recipe)
    num_bins = max(1, len(by_bin))
    bins = TimestepBins(tuple(NUM_TRAIN_TIMESTEPS * i / num_bins for i in range(1, num_bins)))
    calibration = LinearCalibration("the layer", weight, bias, recipe.default_format, recipe, bins)
    with torch.no_grad():
        for phase in phases_of(recipe):
            for timestep_bin, inputs in by_bin.items():
                calibration.observe(phase, inputs.to(weight.device), timestep_bin)
            calibration.settle(phase)
        return QuantizedLinear.from_layer(calibration.finish(), compute_dtype=weight.dtype)


def _inputs_by_bin(
    inputs: torch.Tensor | Mapping[int, torch.Tensor] | None, in_features: int, recipe: Recipe
) -> dict[int, torch.Tensor]:
    if inputs is None:
        if recipe.needs_calibration:
            raise CalibrationError(f"recipe {recipe.name} looks at activations: give calibration_inputs.")
        return {}
    by_bin = dict(inputs) if isinstance(inputs, Mapping) else {0: inputs}
    if sorted(by_bin) != list(range(len(by_bin))) or not by_bin:
        raise CalibrationError(f"timestep bins are numbered 0, 1, … without gaps, not {sorted(by_bin)}.")
    for timestep_bin, tokens in by_bin.items():
        if tokens.shape[-1] != in_features or tokens.numel() == 0:
            raise CalibrationError(
                f"calibration inputs of bin {timestep_bin} have shape {tuple(tokens.shape)}; (tokens, {in_features}) "
                "with at least one token is wanted."
            )
    return by_bin
