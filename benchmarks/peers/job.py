"""Write the inputs of every peer: the model's folder, calibration calls, held-out calls and
held-out generations.

    python -m benchmarks.peers.job WORK --model tiny-outliers --prompts 8

Files only, so that a peer needs nothing of TempoQuant: WORK/job.json (written last), and
safetensors files in WORK/calibration/DENOISER, WORK/held_out/DENOISER and WORK/generations.
"""

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from safetensors.torch import save_file

from benchmarks.quality.task import EVALUATION_SEED
from tempoquant.calibrate.sample import RecordedCall
from tempoquant.calibrate.store import SampleStore
from tempoquant.cli.progress import RichProgress
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import CallPosition, sample_latents, sample_of, watching_trajectory
from tempoquant.images import first_frame
from tempoquant.models.fingerprint import fingerprint
from tempoquant.models.guidance import prediction_of
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.progress import Progress
from tempoquant.prompts import Prompt
from tempoquant.recipe import Recipe
from tempoquant.recording.plan import ModelIdentity, RecordingPlan, default_samples_per_denoiser
from tempoquant.recording.prompt_sets import calibration_prompts, evaluation_prompts
from tempoquant.recording.record import record_into

STORE = "store"
"""The store in WORK from which the calibration files are copied, for our own rows."""


@dataclasses.dataclass(frozen=True)
class Request:
    """The sources of a job; the same request leaves a finished job unchanged.

    Attributes:
        model: a bundled model, a folder, or a hub id.
        num_prompts: held out; of each, every transformer call and one generation.
        num_calls: calibration calls of each denoiser, spread over prompts and timesteps; None for
            recording's default (all calls, for a bundled model).
        seed: of the calibration's noise.
        calibration, held_out: prompt files; None for the built-in sets of a bundled model.
    """

    model: str = "tiny-outliers"
    num_prompts: int = 8
    num_calls: int | None = None
    seed: int = 0
    calibration: str | None = None
    held_out: str | None = None


def write_job(work: Path, request: Request, progress: Progress) -> None:
    """Write WORK, unless it holds this job already. Raises ValueError if it holds another."""
    file = work / "job.json"
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8"))["request"] != dataclasses.asdict(request):
            raise ValueError(f"{work} has another job: remove it, or name another folder.")
        return
    source = SourceModel.open(request.model)
    settings = default_settings(source)
    _write_calibration(work, source, settings, request, progress)
    held_out = _write_held_out(work, source, settings, request, progress)
    job = {
        "request": dataclasses.asdict(request),
        "model": str(source.folder.resolve()),
        "settings": settings.to_dict(),
        "seed": request.seed,
        "held_out": held_out,
    }
    file.write_text(json.dumps(job, indent=1), encoding="utf-8")


def _write_calibration(
    work: Path, source: SourceModel, settings: SamplingSettings, request: Request, progress: Progress
) -> None:
    """Write samples as the `paper` recipe records them, in the order in which it reads them."""
    prompts = calibration_prompts(request.model, request.calibration, Recipe.load("paper").num_prompts)
    num_calls = request.num_calls or default_samples_per_denoiser(settings, source.geometry)
    plan = RecordingPlan(prompts, settings, num_calls, request.seed)
    identity = ModelIdentity(fingerprint(source))
    store = record_into(source, work / STORE, plan, model=identity, device="cpu", progress=progress)
    write_store(store, work / "calibration")


def write_store(store: SampleStore, folder: Path) -> None:
    """Write every sample of a store as one file, in its order."""
    for denoiser in COMPONENTS:
        for index, sample in enumerate(store.samples(denoiser)):
            _write(folder / denoiser / f"{index:04}.safetensors", sample.inputs)


def _write_held_out(
    work: Path, source: SourceModel, settings: SamplingSettings, request: Request, progress: Progress
) -> dict[str, list[str]]:
    """Generate with the 16-bit pipeline; return per denoiser the prompt of each call, by the number
    of its file.
    """
    pipeline = load_pipeline(source, "cpu")
    prompts = evaluation_prompts(request.model, request.held_out, request.num_prompts)
    advance = progress.start("Held-out generations", len(prompts) * settings.num_steps)
    written: Counter[str] = Counter()
    prompt_ids: dict[str, list[str]] = {denoiser: [] for denoiser in COMPONENTS}
    for index, prompt in enumerate(prompts):
        calls, generation = _generate(pipeline, prompt, settings, EVALUATION_SEED + index, advance)
        _write(work / "generations" / f"{index:04}.safetensors", generation)
        for call in calls:
            denoiser = call.sample.denoiser
            file = work / "held_out" / denoiser / f"{written[denoiser]:04}.safetensors"
            _write(file, {**call.sample.inputs, "noise_prediction": call.noise_prediction})
            written[denoiser] += 1
            prompt_ids[denoiser].append(prompt.id)
    return prompt_ids


def _generate(
    pipeline: WanImageToVideoPipeline, prompt: Prompt, settings: SamplingSettings, seed: int, on_step: Any
) -> tuple[list[RecordedCall], dict[str, torch.Tensor]]:
    """Generate once: return its transformer calls, and everything to repeat it, with its final
    latents.
    """
    conditional, unconditional = pipeline.encode_prompt(prompt.text, "", device=torch.device("cpu"))
    texts = {"prompt_embeds": conditional, "negative_prompt_embeds": unconditional}
    calls: list[RecordedCall] = []

    def keep(position: CallPosition, inputs: dict[str, Any], output: Any) -> None:
        calls.append(RecordedCall(sample_of(prompt, position, inputs), prediction_of(output).cpu()))

    with watching_trajectory(pipeline, keep) as step_done:

        def after_step() -> None:
            step_done()
            on_step()

        final = sample_latents(pipeline, prompt, settings, seed, texts, on_step=after_step)
    image = first_frame(prompt.image, settings.width, settings.height)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    # The first call's input begins with the noise itself; the mask and the encoded image follow.
    initial = calls[0].sample.inputs["hidden_states"][:, : final.shape[1]]
    return calls, {
        **texts,
        "image": pixels.permute(2, 0, 1)[None],
        "initial_latents": initial.float(),
        "final_latent": final.float().cpu(),
    }


def _write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file)


def request_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that make a Request."""
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--model", default=Request.model)
    parser.add_argument("--prompts", type=int, default=Request.num_prompts, help="held-out prompts")
    parser.add_argument(
        "--calls", type=int, help="calibration calls of each denoiser; the default is what `record` keeps"
    )
    parser.add_argument("--seed", type=int, default=Request.seed, help="seed of the calibration's noise")
    parser.add_argument("--calibration", help="jsonl of {image, prompt}; not needed for a bundled model")
    parser.add_argument("--samples-from", help="jsonl of held-out {image, prompt}; not needed for a bundled model")


def request_of(arguments: argparse.Namespace) -> Request:
    """Return the Request of the options."""
    return Request(
        arguments.model,
        arguments.prompts,
        arguments.calls,
        arguments.seed,
        arguments.calibration,
        arguments.samples_from,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    request_arguments(parser)
    arguments = parser.parse_args()
    with RichProgress() as progress:
        write_job(arguments.work, request_of(arguments), progress)


if __name__ == "__main__":
    main()
