"""Measure what 4-bit weights of modulation cost on tiny random pipelines, in dB of SQNR.

python -m tests.modulation_in_four_bits flux qwen_image minimax_h3
"""

import sys
import tempfile
from pathlib import Path

from tempoquant.models.with_experts import GenericModel, ModelName
from tempoquant.prompts import Prompt
from tests import image_pipelines, minimax_pipeline
from tests.models.made import DEFAULT, make

OURS = DEFAULT.replace(samples_per_denoiser=4)
NEAREST = {"gptq": False, "act_order": False}
MODULATION = {"modulation_format": "nvfp4_m1"}
RECIPES = [
    OURS.replace(name="16-bit modulation"),
    OURS.replace(name="4-bit", **MODULATION),
    OURS.replace(name="all to nearest, 16-bit modulation", **NEAREST),
    OURS.replace(name="all to nearest, 4-bit", **NEAREST, **MODULATION),
]


def measure(name: str, folder: Path) -> None:
    """Write a pipeline, quantize it with each recipe, and print a line for each."""
    model: ModelName
    if name == "minimax_h3":
        model = minimax_pipeline.write(folder / "source")
    else:
        model = GenericModel(image_pipelines.write(folder / "source", name))
    (folder / "prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog walks"}\n')
    made = make(folder, model, Prompt("held out", None, "a bird walks"), folder / "prompts.jsonl", RECIPES)
    for compared in made.evidence.comparison.models:
        files = (made.folders[compared.label] / "transformer").glob("*.safetensors")
        size = sum(file.stat().st_size for file in files)
        print(f"{name}, {compared.label}: {compared.denoiser_sqnr_db('transformer').mean:.2f} dB, {size:,} bytes")


if __name__ == "__main__":
    for each in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as work:
            measure(each, Path(work))
