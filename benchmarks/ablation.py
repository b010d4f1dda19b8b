"""What each step of the published recipe is worth: teacher-forced SQNR of the noise prediction, per expert, held out.

    python -m benchmarks.ablation                                    # tiny-outliers, MXFP4, ranks 2 and 16
    python -m benchmarks.ablation --format nvfp4 --model tiny --json
    python -m benchmarks.ablation --variants                         # the paper recipe, calibrated otherwise

Every row quantizes both experts from the same calibration samples and is judged on the same recorded trajectories of
prompts and seeds that calibration never saw. Rank 2 is the share of the width that rank 32 has in the 14B model.
"""

import argparse
import copy
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tempoquant
from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.calibrate.sample import RecordedCall
from tempoquant.calibrate.sequential import quantize_expert
from tempoquant.calibrate.store import SampleStore
from tempoquant.cli.progress import RichProgress
from tempoquant.evaluate.noise_prediction import CallError, call_errors, summarize
from tempoquant.integrations.expert_weights import EXPERT_COMPONENTS, ExpertWeights
from tempoquant.integrations.output_folder import fingerprint
from tempoquant.integrations.pipeline_folder import resolve_model
from tempoquant.integrations.prompt_sets import calibration_prompts, evaluation_prompts
from tempoquant.integrations.recording import record_into
from tempoquant.integrations.recording_plan import ModelIdentity, RecordingPlan, default_samples_per_expert
from tempoquant.integrations.sampling import default_settings, predict_noise, record_trajectory
from tempoquant.integrations.wan import WanExpert, load_pipeline
from tempoquant.recipe import Recipe
from tempoquant.runtime.convert import install_layers
from tempoquant.timesteps import Expert, TimestepBins

EVALUATION_SEED = 1_000_000  # calibration draws from seeds above 2^40


def rows(ranks: list[int], format: str) -> Iterator[tuple[str, Recipe]]:
    """The published recipe built up a step at a time."""
    paper = Recipe.load("paper").replace(format=format)
    yield "round to nearest", Recipe.load("rtn").replace(format=format)
    yield "smoothing", Recipe.load("svdquant").replace(format=format, rank=0)
    for rank in ranks:
        yield f"+ branch = SVDQuant, rank {rank}", Recipe.load("svdquant").replace(format=format, rank=rank)
        yield f"+ GPTQ, rank {rank}", paper.replace(rank=rank, clip_ratios=())
        yield f"+ clip search = paper, rank {rank}", paper.replace(rank=rank)


def variants(ranks: list[int], format: str) -> Iterator[tuple[str, Recipe]]:
    """The paper recipe, and changes to how it is calibrated."""
    for rank in ranks:
        paper = Recipe.load("paper").replace(format=format, rank=rank)
        yield f"paper, rank {rank}", paper
        yield "statistics of both guidance branches", paper.replace(statistics_branches="both")
        yield "blocks calibrated on quantized inputs", paper.replace(block_inputs="quantized")
        yield "smoothing shared by q, k and v", paper.replace(share_smoothing=True)
        yield "clip search on 4096 tokens a bin", paper.replace(clip_search_tokens_per_bin=4096)
        yield "clip search on 64 tokens a bin", paper.replace(clip_search_tokens_per_bin=64)


def measure(pipeline: Any, folder: Path, recipe: Recipe, store: SampleStore, held_out: list[RecordedCall]) -> Any:
    """Quantize both experts by a recipe; (errors of the held-out calls, bits a weight, seconds to quantize)."""
    originals = {component: getattr(pipeline, component) for component in EXPERT_COMPONENTS.values()}
    start, num_bytes, num_weights = time.perf_counter(), 0, 0
    try:
        for expert, component in EXPERT_COMPONENTS.items():
            bins = TimestepBins.from_step_fractions(store.schedule(expert), recipe.bin_fractions(expert))
            samples = store.samples(expert)
            model = WanExpert(ExpertWeights(folder, expert, torch.float32, "cpu"))
            with tempfile.TemporaryDirectory() as scratch:
                blocks = quantize_expert(model, samples, recipe, bins, HiddenStates(Path(scratch)))
                layers = {named.name: named.layer for block in blocks for named in block.layers}
            num_bytes += sum(layer.num_bytes for layer in layers.values())
            num_weights += sum(layer.in_features * layer.out_features for layer in layers.values())
            quantized = copy.deepcopy(originals[component])
            install_layers(quantized, layers, bins)
            setattr(pipeline, component, quantized)
        seconds = time.perf_counter() - start
        errors = call_errors(lambda sample: predict_noise(pipeline, sample), held_out)
    finally:
        for component, original in originals.items():
            setattr(pipeline, component, original)
    return errors, 8 * num_bytes / num_weights, seconds


def row_of(errors: list[CallError], bins: dict[Expert, TimestepBins]) -> dict[str, Any]:
    """SQNR per expert and per timestep bin: mean over prompts and standard error."""
    found = {}
    for result in summarize(errors, bins):
        key = result.expert.value + ("" if result.bin_index is None else f" bin {result.bin_index}")
        summary = result.sqnr_db
        found[key] = {"mean": summary.mean, "standard_error": summary.standard_error, "n": summary.num_values}
    return found


def print_table(results: list[dict[str, Any]], title: str) -> None:
    columns = list(results[0]["sqnr_db"])
    table = Table(title=title)
    for heading in ("", "bits", *columns, "s"):
        table.add_column(heading, justify="left" if not heading else "right")
    for result in results:
        cells = [f"{c['mean']:.2f} ± {c['standard_error'] or 0:.2f}" for c in result["sqnr_db"].values()]
        table.add_row(result["row"], f"{result['bits_per_weight']:.2f}", *cells, f"{result['seconds']:.0f}")
    Console(width=180).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-outliers")
    parser.add_argument("--format", default="mxfp4")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--variants", action="store_true", help="changes to the calibration instead of the steps")
    parser.add_argument("--samples", type=int, default=8, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration's noise")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of the table")
    arguments = parser.parse_args()
    folder = resolve_model(arguments.model)
    pipeline, own = load_pipeline(folder), default_settings(folder)
    paper = Recipe.load("paper")
    progress = RichProgress()
    with progress, tempfile.TemporaryDirectory() as scratch:
        prompts = calibration_prompts(arguments.model, None, paper.num_prompts)
        recorded = RecordingPlan(prompts, own, default_samples_per_expert(own), arguments.seed)
        model = ModelIdentity(fingerprint(folder))
        store = record_into(folder, Path(scratch) / "store", recorded, model=model, device="cpu", progress=progress)
        held_out: list[RecordedCall] = []
        for offset, prompt in enumerate(evaluation_prompts(arguments.model, None, arguments.samples)):
            held_out += record_trajectory(pipeline, prompt, own, EVALUATION_SEED + offset)
        bins = {e: TimestepBins.from_step_fractions(store.schedule(e), paper.bin_fractions(e)) for e in Expert}
        results = []
        todo = list((variants if arguments.variants else rows)(arguments.ranks, arguments.format))
        advance = progress.start("Rows", len(todo))
        for name, recipe in todo:
            errors, bits, seconds = measure(pipeline, folder, recipe, store, held_out)
            results.append({"row": name, "bits_per_weight": bits, "seconds": seconds, "sqnr_db": row_of(errors, bins)})
            advance()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    record = {"benchmark": "ablation", **vars(arguments), "version": tempoquant.__version__, "commit": commit,
              "machine": machine, "results": results}  # fmt: skip
    if not arguments.json:
        what = "SQNR of the noise prediction, dB (higher is better)"
        print_table(results, f"{arguments.model}, {arguments.format}: {what}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
