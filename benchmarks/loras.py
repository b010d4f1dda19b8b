"""LoRAs loaded on a 4-bit pipeline, compared with the same LoRAs fused before quantizing: their
distance from 16 bits.

    python -m benchmarks.loras                               # tiny, rtn and the default recipe
    python -m benchmarks.loras --recipe rtn --share 0.05

The LoRAs: the bundled four-step pair, which was really trained, and random ones of every linear of
a block whose change has a given share of the weight's norm and falling singular values, as trained
ones have. SQNR of noise predictions in dB, teacher-forced on the trajectory of the 16-bit model
with the LoRA fused. Prints a table and one JSON line.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import tempoquant
from benchmarks.json_line import publish
from benchmarks.scale import commit_name, describe_machine
from tempoquant.calibrate.sample import RecordedCall
from tempoquant.evaluate.noise_prediction import call_errors, summarize
from tempoquant.hosts.diffusers.pipeline import load_pipeline, open_pipeline
from tempoquant.hosts.diffusers.sampling import predict_noise, record_trajectory
from tempoquant.models.lora.given import with_loras
from tempoquant.models.sampling_file import settings_of
from tempoquant.models.source import SourceModel
from tempoquant.prompts import Prompt
from tempoquant.recording.prompt_sets import evaluation_prompts
from tempoquant.tiny import LORA_NAME, lora_file

RANK = 8


def random_lora(source: SourceModel, denoiser: str, share: float, seed: int) -> dict[str, torch.Tensor]:
    """Return a LoRA of rank `RANK` of every linear of a denoiser's blocks, as diffusers names them.

    up · down has `share` of the weight's Frobenius norm, and singular values of about 1, 1/2, 1/3,
    …
    """
    generator = torch.Generator().manual_seed(seed)
    falling = 1.0 / torch.arange(1, RANK + 1)
    tensors = {}
    for name in source.linears(denoiser):
        weight = source.component_of(denoiser).tensors[f"{name}.weight"].read().float()
        rows, columns = weight.shape
        down = torch.randn(RANK, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, RANK, generator=generator) * falling
        up *= share * float(weight.norm() / (up @ down).norm())
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = up
    return tensors


def write_random(source: SourceModel, share: float, folder: Path) -> dict[str, Path]:
    """Write one random LoRA for each denoiser into a folder; return their files by the denoiser's
    name.
    """
    files = {}
    for seed, name in enumerate(source.denoiser_names):
        files[name] = folder / f"random-{share:g}-{name}.safetensors"
        save_file(random_lora(source, name, share, seed), files[name])
    return files


def load_adapters(pipeline: Any, files: Mapping[str, Path], strength: float, adapter: str = "lora") -> None:
    """Load a file into each denoiser of a pipeline by diffusers' own methods, with a strength."""
    for name, file in files.items():
        pipeline.load_lora_weights(
            file.parent, weight_name=file.name, adapter_name=adapter, load_into_transformer_2=name == "low_noise"
        )
    pipeline.set_adapters(adapter, strength)


def record_reference(
    files: Mapping[str, Path], strength: float, prompts: Sequence[Prompt], changes: Mapping[str, Any]
) -> list[RecordedCall]:
    """Return every call of the 16-bit model with the LoRAs fused."""
    source = with_loras(open_pipeline("tiny"), {name: (file, strength) for name, file in files.items()})
    settings = settings_of(source, changes)
    pipeline = load_pipeline(source, "cpu")
    return [call for seed, prompt in enumerate(prompts) for call in record_trajectory(pipeline, prompt, settings, seed)]


def errors_of(pipeline: Any, calls: Sequence[RecordedCall]) -> dict[str, float]:
    """Return the mean SQNR of each denoiser's noise predictions, in dB."""
    errors = call_errors(lambda sample: predict_noise(pipeline, sample), calls)
    return {each.denoiser: each.sqnr_db.mean for each in summarize(errors)}


def measure(
    recipe: str,
    files: Mapping[str, Path],
    strength: float,
    prompts: Sequence[Prompt],
    plain: Path,
    work: Path,
    changes: Mapping[str, Any],
) -> dict[str, dict[str, float]]:
    """Return the SQNR with the LoRAs fused before quantizing, with them loaded afterwards, and
    without any.

    Args:
        plain: a folder of the recipe's result without LoRAs.
        work: a new folder for the one with them.
        changes: of the reference's sampling.
    """
    calls = record_reference(files, strength, prompts, changes)
    tempoquant.quantize("tiny", work, recipe, lora={name: (file, strength) for name, file in files.items()})
    before = errors_of(load_pipeline(open_pipeline(work), "cpu"), calls)
    pipeline = load_pipeline(open_pipeline(plain), "cpu")
    without = errors_of(pipeline, calls)
    load_adapters(pipeline, files, strength)
    return {"fused before": before, "loaded after": errors_of(pipeline, calls), "without": without}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", action="append", help="recipe to measure, may be repeated (default: rtn and default)"
    )
    parser.add_argument(
        "--share",
        type=float,
        action="append",
        help="norm of a random LoRA's change, as a share of the weight's (default: 0.05 and 0.2)",
    )
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--num-steps", type=int, default=8, help="steps with random LoRAs (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append the JSON line to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    prompts, source, rows = evaluation_prompts("tiny", None, arguments.num_prompts), open_pipeline("tiny"), []
    print("| recipe | LoRAs | strength | fused before | loaded after | left out |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        pair = {name: lora_file(name) for name in source.denoiser_names}
        given: list[tuple[str, dict[str, Path], float]] = [(LORA_NAME, pair, strength) for strength in (1.0, 0.5)]
        for share in arguments.share or (0.05, 0.2):
            given.append((f"random, {100 * share:g} %", write_random(source, share, Path(folder)), 1.0))
        for recipe in arguments.recipe or ("rtn", "default"):
            plain = tempoquant.quantize("tiny", Path(folder) / recipe, recipe)
            for number, (name, files, strength) in enumerate(given):
                work = Path(folder) / f"{recipe}-{number}"
                changes = {} if files is pair else {"num_steps": arguments.num_steps}
                found = measure(recipe, files, strength, prompts, plain, work, changes)
                cells = [" / ".join(f"{value:.1f}" for value in each.values()) for each in found.values()]
                print(f"| {recipe} | {name} | {strength:g} | " + " | ".join(cells) + " |", flush=True)
                rows.append({"recipe": recipe, "loras": name, "strength": strength, **found})
    record = {
        "benchmark": "loras",
        "version": tempoquant.__version__,
        "commit": commit_name(),
        "machine": describe_machine("cpu"),
        "num_prompts": len(prompts),
        "rows": rows,
    }
    publish(record, arguments.json)


if __name__ == "__main__":
    main()
