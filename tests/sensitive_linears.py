"""Measure in which linears of tiny random pipelines rounding adds error to the noise prediction.

python -m tests.sensitive_linears hunyuan_video15 minimax_h3 ltx2 flux qwen_image z_image
"""

import contextlib
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from tempoquant import Recipe
from tempoquant.engines import Local
from tempoquant.models.fingerprint import fingerprint
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.source import SourceModel
from tempoquant.models.with_experts import GenericModel, ModelName
from tempoquant.prompts import Prompt
from tempoquant.quantizing import measure_sensitivity
from tempoquant.quantizing.machine import Machine
from tempoquant.recording.plan import ModelIdentity, RecordingPlan
from tempoquant.recording.record import record
from tests import hunyuan_pipelines, image_pipelines, ltx2_pipelines, minimax_pipeline

CPU = ("cpu",)
PROMPTS = (Prompt("0", None, "a cat"), Prompt("1", None, "a dog walks"))
NUM_SAMPLES = 8


def written(name: str, folder: Path) -> ModelName:
    """Write a pipeline into `folder`."""
    if name == "hunyuan_video15":
        return hunyuan_pipelines.write(folder, "text_to_video")
    if name == "minimax_h3":
        return minimax_pipeline.write(folder)
    if name == "ltx2":
        return ltx2_pipelines.write(folder, name)
    return GenericModel(image_pipelines.write(folder, name))


def shares(name: str, work: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return each linear's share of the error at rank 0, summed over blocks, and each block's."""
    model = written(name, work / "source")
    source = SourceModel.open(model)
    plan = RecordingPlan(PROMPTS, default_settings(source), NUM_SAMPLES)
    record(source, work / "store", plan, model=ModelIdentity(fingerprint(source)), engine=Local(CPU))
    recipe = Recipe.load("default").replace(rank=4, num_prompts=len(PROMPTS), samples_per_denoiser=NUM_SAMPLES)
    found = measure_sensitivity(model, work / "store", work / "states", recipe, machine=Machine(CPU))
    by_linear: dict[str, float] = defaultdict(float)
    by_block: dict[str, float] = defaultdict(float)
    for group in found.denoisers["transformer"]:
        for layer, measured in group.items():
            blocks, number, linear = layer.split(".", 2)
            by_linear[linear if name != "flux" else f"{blocks}: {linear}"] += measured.errors[0]
            by_block[f"{blocks}.{number}"] += measured.errors[0]
    total = sum(by_block.values())
    linears, blocks_of = ({key: e / total for key, e in by.items()} for by in (by_linear, by_block))
    return linears, blocks_of


if __name__ == "__main__":
    for each in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as texts:
            if each == "hunyuan_video15":
                texts.enter_context(hunyuan_pipelines.short_texts())
            for what in shares(each, Path(folder)):
                falling = sorted(what.items(), key=lambda entry: -entry[1])
                print(f"{each}: " + ", ".join(f"{key} {share:.1%}" for key, share in falling), flush=True)
