r"""Quality against skipped work: every step cache at several settings, on the bundled model.

    python -m benchmarks.step_caching --num-items 12 --json runs/step_caching.jsonl --figure \
        docs/step_caching.png

Magnitude ratios are recorded on calibration prompts. Then held-out items are generated without a
cache and with each. A row gives the share of denoiser calls that skipped their blocks, processor
seconds of denoising, processor and wall seconds of a whole video (texts, denoisers, autoencoder),
SQNR of the final latent against the same model without a cache, and the share of videos that follow
their prompt. Rows of an earlier run in the file of --json are not measured again.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.json_line import publish
from benchmarks.scale import commit_name, describe_machine
from tempoquant.acceleration import accelerate
from tempoquant.acceleration.cache_settings import CacheSettings
from tempoquant.acceleration.speeds import DEFAULTS
from tempoquant.checkpoint.magnitude_ratios import MagnitudeRatios
from tempoquant.evaluate.metrics.prompt_adherence import check_prompt
from tempoquant.evaluate.metrics.statistics import mean_interval
from tempoquant.hosts.diffusers.pipeline import load_pipeline, open_pipeline
from tempoquant.hosts.diffusers.residual_magnitudes import ResidualMagnitudes
from tempoquant.hosts.diffusers.sampling import CallPosition, generate_video, sample_latents, watching_trajectory
from tempoquant.models.families import facts_of
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.schedule import sampling_steps
from tempoquant.models.source import SourceModel
from tempoquant.placement.cpu_threads import suited_threads
from tempoquant.prompts import Prompt
from tempoquant.sqnr import sqnr_db
from tempoquant.tiny.sets import calibration_items, evaluation_items

NUM_RECORDED = 4
MAGCACHE = (
    (0.03, 2, 0.2),
    (0.06, 2, 0.2),
    (0.12, 2, 0.2),
    (0.12, 4, 0.2),
    (0.12, 4, 0.1),
    (0.16, 5, 0.1),
    (0.2, 5, 0.1),
    (0.24, 4, 0.1),
    (0.48, 8, 0.05),
)
FIRST_BLOCK = (0.03, 0.08, 0.12, 0.2)
TAYLORSEER = (2, 3, 4)
TIMES = ("denoising_s", "processor_s", "seconds")


def candidates() -> list[CacheSettings]:
    """Return every cache, from careful to bold."""
    return [
        *(CacheSettings("magcache", *each) for each in MAGCACHE),
        *(CacheSettings("firstblock", threshold) for threshold in FIRST_BLOCK),
        *(CacheSettings("taylorseer", interval=interval) for interval in TAYLORSEER),
    ]


def recorded(pipeline: Any, source: SourceModel, settings: SamplingSettings) -> dict[str, MagnitudeRatios]:
    """Return the magnitude ratios of calibration prompts, as `tempoquant record` stores them."""
    found = []
    for index, item in enumerate(calibration_items(NUM_RECORDED)):
        magnitudes = ResidualMagnitudes(pipeline)

        def note(position: CallPosition, _inputs: Any, _output: Any, magnitudes: Any = magnitudes) -> None:
            magnitudes.note(position)

        with magnitudes.watched(), watching_trajectory(pipeline, note) as step_done:
            prompt = Prompt(item.id, item.image, item.prompt)
            texts = {"prompt": prompt.text, "negative_prompt": ""}
            sample_latents(pipeline, prompt, settings, 2**31 + index, texts, on_step=step_done)
        found.append(magnitudes.ratios)
    steps = sampling_steps(source, settings)
    means = {}
    for name in source.denoiser_names:
        timesteps = [float(step.timestep) for step in steps if step.denoiser == name]
        mean = MagnitudeRatios.mean_of((prompt[name] for prompt in found), timesteps)
        assert mean is not None
        means[name] = mean
    return means


def generate(pipeline: Any, settings: SamplingSettings, num_items: int) -> list[dict[str, Any]]:
    """Generate each held-out item: return its final latent, its seconds, and whether it follows its
    prompt.
    """
    results = []
    begins: list[float] = []
    models = [getattr(pipeline, each.component) for each in facts_of(pipeline).denoisers]
    handles = [model.register_forward_pre_hook(lambda *_: begins.append(time.process_time())) for model in models]
    for index, item in enumerate(evaluation_items(num_items)):
        latents: list[tuple[float, torch.Tensor]] = []
        begins.clear()
        wall, used = time.perf_counter(), time.process_time()
        video = generate_video(
            pipeline,
            Prompt(item.id, item.image, item.prompt),
            settings,
            index,
            on_latents=lambda _timestep, found, latents=latents: latents.append((time.process_time(), found)),
        )
        seconds, processor = time.perf_counter() - wall, time.process_time() - used
        shown = check_prompt(np.asarray(video), item.prompt)
        results.append(
            {
                "latent": latents[-1][1].float().clone(),
                "seconds": seconds,
                "processor_s": processor,
                "denoising_s": latents[-1][0] - begins[0],
                "followed": shown.motion_followed,
                "kept": shown.appearance_kept,
            }
        )
    for handle in handles:
        handle.remove()
    return results


def row(name: str, results: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make a row of a run beside the same items without a cache."""
    decibels = [sqnr_db(one["latent"], other["latent"]) for one, other in zip(against, results, strict=True)]
    is_same = all(map(np.isinf, decibels))
    interval = None if is_same else mean_interval(decibels)
    medians = {key: statistics.median(each[key] for each in results) for key in TIMES}
    before = {key: statistics.median(each[key] for each in against) for key in TIMES}
    return {
        "cache": name,
        "num_items": len(results),
        **medians,
        "times_as_fast": {key: before[key] / medians[key] for key in TIMES},
        "final_latent_db": None if interval is None else interval.mean,
        "final_latent_db_95": None if interval is None else [interval.low, interval.high],
        "followed_percent": 100 * statistics.mean(each["followed"] for each in results),
        "kept_percent": 100 * statistics.mean(each["kept"] for each in results),
    }


def main() -> None:
    """Measure what the file does not hold yet, print every row, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="16-bit or quantized; of the bundled world")
    parser.add_argument("--num-items", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    done = _rows(arguments.json, arguments.model, arguments.num_items)
    left = [each for each in candidates() if str(each) not in done]
    if left:
        source = open_pipeline(arguments.model)
        settings = default_settings(source)
        pipeline = load_pipeline(source, "cpu")
        about = {"model": arguments.model, "commit": commit_name(), "machine": describe_machine("cpu")}
        with suited_threads(source, "cpu"):
            ratios = recorded(pipeline, source, settings)
            plain = generate(pipeline, settings, arguments.num_items)
            if "none" not in done:
                publish({**about, "skipped_percent": 0.0, **row("none", plain, plain)}, arguments.json)
            for each in left:
                in_force = accelerate(pipeline, "exact", cache=each, magnitude_ratios=ratios)
                found = row(str(each), generate(pipeline, settings, arguments.num_items), plain)
                counts = in_force.cache.counts.values()
                skipped = sum(count.skipped for count in counts)
                share = 100 * skipped / (skipped + sum(count.computed for count in counts))
                in_force.remove()
                publish({**about, "skipped_percent": share, **found}, arguments.json)
        done = _rows(arguments.json, arguments.model, arguments.num_items)
    if arguments.figure is not None:
        draw(list(done.values()), arguments.figure)


def _rows(file: Path | None, model: str, num_items: int) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file is not None and file.exists() else []
    return {line["cache"]: line for line in lines if line["model"] == model and line["num_items"] == num_items}


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the final latent's SQNR against the share of skipped calls, a line for each cache."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, mark in (("magcache", "o"), ("firstblock", "s"), ("taylorseer", "^")):
        line = sorted(
            (each for each in rows if each["cache"].startswith(name) and each["final_latent_db"] is not None),
            key=lambda each: each["skipped_percent"],
        )
        axes.plot(
            [each["skipped_percent"] for each in line],
            [each["final_latent_db"] for each in line],
            mark + "-",
            label=name,
        )
    by_name = {each["cache"]: each for each in rows}
    for speed, defaults in DEFAULTS.items():
        if (own := by_name.get(str(defaults.cache))) is not None and own["final_latent_db"] is not None:
            place = (own["skipped_percent"], own["final_latent_db"])
            axes.annotate(speed, place, xytext=(6, 6), textcoords="offset points")
    axes.set_xlabel("denoiser calls whose blocks are left out, %")
    axes.set_ylabel("final latent against no cache, SQNR in dB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
