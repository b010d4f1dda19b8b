"""quantize: from a 16-bit pipeline to a 4-bit pipeline."""

import functools
from collections.abc import Mapping
from pathlib import Path

from tempoquant.device import compute_dtype, default_device
from tempoquant.hosts.model_card import model_card
from tempoquant.models.lora.given import LoraFiles
from tempoquant.models.with_experts import ModelName
from tempoquant.output.output_folder import OutputFolder
from tempoquant.placement.streaming import check_memory
from tempoquant.planning.run_estimate import RunEstimate, measure_gemm_rate
from tempoquant.progress import SILENT, CombinedProgress, Progress
from tempoquant.quantizing.budget import Budget
from tempoquant.quantizing.component import FINISHED_BLOCKS, Quantizing
from tempoquant.quantizing.machine import Machine
from tempoquant.quantizing.run import prepare_run
from tempoquant.quantizing.sensitivity import sensitivity_in
from tempoquant.quantizing.text_encoders import quantize_text_encoders
from tempoquant.recipe import Recipe


def quantize(  # noqa: PLR0913 (the public verb: the first say what to do, the last ones how)
    model: ModelName,
    output: str | Path,
    recipe: str | Path | Recipe = "default",
    calibration: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    *,
    store: str | Path | None = None,
    lora: Mapping[str, LoraFiles] | None = None,
    machine: Machine | None = None,
    budget: Budget | None = None,
    sensitivity: str | Path | None = None,
    overwrite: bool = False,
    link: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Quantize all denoisers of a pipeline and write a complete diffusers pipeline.

    Every finished block is kept in `OUTPUT.unfinished`: after Ctrl-C or a crash the same call
    resumes there, and ends with the same bytes. At most one block of the 16-bit model is in memory
    at any time.

    Args:
        model: "tiny", "tiny-outliers", a diffusers folder, or a hub id; or `WithExperts`, one of
            these with files of denoisers' weights.
        output: a folder that does not exist or is empty. A finished result of the same run is left
            unchanged.
        recipe: a built-in recipe's name, a .toml file, or a Recipe.
        calibration: jsonl of {image, prompt[, id]}, or a folder of such; None for a bundled model's
            own set.
        device: "cpu", "cuda", or "cuda:0,cuda:1" to quantize the denoisers in parallel, each in its
            own process (call from under `if __name__ == "__main__":` then); None for CUDA if there
            is a GPU.
        seed: of the calibration's noise. Same seed, machine and thread count: same bytes.
        store: folder that `record` wrote; None to record now. Prompts, seed and sampling are then
            the store's.
        lora: "high_noise" and "low_noise" to the LoRAs that are fused into the denoisers before
            they are quantized: a LoRA file, a file and its strength, or several of these. If the
            LoRAs state the number of steps they were distilled for ("4steps" in the file's or
            folder's name), calibration samples with as many, and so does the result.
        machine: further settings of this machine; its devices are used if `device` is None.
        budget: bits per weight or a size for all denoisers, in place of the recipe's rank. It is
            spent on branches and on layers in 16 bits, where the noise prediction is most sensitive
            to rounding. Layers that a rule of the recipe names stay as the rule says.
        sensitivity: file of that sensitivity, which `tempoquant sensitivity` wrote; None to measure
            it now.
        overwrite: replace the content of `output`, and another run's unfinished work.
        link: hard-link the unquantized components instead of copying them.
        progress: shows how far the job is.

    Returns:
        The output folder.

    Raises:
        TempoQuantError: see tempoquant.errors; finished blocks are kept.
    """
    machine = _machine(device, machine)
    check_memory(machine.memory, machine.devices[0])
    run = prepare_run(model, recipe, calibration, seed, store, lora, progress)
    run = run.within(budget, None if sensitivity is None else Path(sensitivity))
    folder = OutputFolder(Path(output), run.identity(machine), overwrite)
    for read in (*run.source.places, *([] if run.store is None else [run.store.folder])):
        folder.refuse_overlap(read)
    if link:
        folder.check_link(run.source)
    unfinished = folder.work
    if folder.is_finished():
        unfinished.tidy()
        return folder.path
    with unfinished.owned(overwrite) as place, machine.engine.open(place) as crew:
        work = place.absolute()  # workers may run in another folder
        run.check_space(folder, machine, link)
        targets = {name: folder.component(work, name) for name in run.source.text_components}
        here = "cpu" if machine.cluster is not None else machine.devices[0]
        quantize_text_encoders(run.source, run.recipe.text_encoder, run.texts, targets, here, progress)
        samples = run.record(work, machine, crew, progress)
        if run.budget is not None:
            assert samples is not None  # a budget needs a recipe that is calibrated
            run = run.spend(sensitivity_in(run, samples, work, machine, crew, progress))
        jobs = run.jobs(work, folder, samples, machine)
        num_blocks = {job.denoiser: run.num_blocks(job.denoiser) for job in jobs}
        finished = sum(num_blocks[job.denoiser] if job.target.is_dir() else job.journal.num_commits for job in jobs)
        blocks = CombinedProgress(progress, FINISHED_BLOCKS, sum(num_blocks.values()), finished)
        crew.run(Quantizing(machine), jobs, progress=blocks)
        card = functools.partial(model_card, source=run.source, settings=run.recipe.to_dict())
        folder.complete(work, run.source, link, card, run.sampling, progress)
        unfinished.remove()
    return folder.path


def plan(  # noqa: PLR0913 (what `quantize` takes)
    model: ModelName,
    recipe: str | Path | Recipe = "default",
    calibration: str | Path | None = None,
    device: str | None = None,
    *,
    store: str | Path | None = None,
    lora: Mapping[str, LoraFiles] | None = None,
    machine: Machine | None = None,
    budget: Budget | None = None,
    sensitivity: str | Path | None = None,
    link: bool = False,
    progress: Progress = SILENT,
) -> RunEstimate:
    """Return what `quantize` would do with the same arguments, and what it would need; nothing is
    written.

    Raises:
        TempoQuantError: as `quantize` would before it began.
    """
    machine = _machine(device, machine)
    check_memory(machine.memory, machine.devices[0])
    run = prepare_run(model, recipe, calibration, 0, store, lora, progress, identify=False)
    run = run.within(budget, None if sensitivity is None else Path(sensitivity))
    if machine.cluster is not None:  # the speed of its machines is not known here
        return run.estimate(machine, link)
    rates = {device: measure_gemm_rate(device, compute_dtype(device)) for device in dict.fromkeys(machine.devices)}
    return run.estimate(machine, link, rates)


def _machine(device: str | None, machine: Machine | None) -> Machine:
    if device is None:
        return machine or Machine((default_device(),))
    devices = tuple(device.split(","))
    return Machine(devices) if machine is None else machine.replace(devices=devices)
