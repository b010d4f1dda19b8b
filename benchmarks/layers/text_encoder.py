"""The text encoder: all-MiniLM-L6-v2 (384 features), the linears of two blocks, with many tokens to
calibrate on.
"""

from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.layers.layer import PARTS, Layer, reading, texts

LINEARS = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
BLOCKS = (2, 3)
WINDOW = 128  # tokens of one call
NUM_WINDOWS = {"fit": 40, "test": 16}


@torch.no_grad()
def text_encoder(folder: Path) -> dict[str, Layer]:
    """Run the text through a BERT (config.json, model.safetensors, a tokenizer); return the inputs
    of the chosen linears.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    names = [f"encoder.layer.{block}.{linear}" for block in BLOCKS for linear in LINEARS]
    seen = {}
    for part in PARTS:
        chosen = [piece for text in texts(part) for piece in _pieces(text)][: NUM_WINDOWS[part]]
        encoded = tokenizer(chosen, truncation=True, max_length=WINDOW, return_tensors="pt")
        with reading(model, names) as seen[part]:
            model(**encoded)
    return {name: Layer(model.get_submodule(name), *(torch.cat(seen[part][name]) for part in PARTS)) for name in names}


def _pieces(text: str) -> list[str]:
    """Return pieces long enough to fill a window, and not much longer."""
    length = 8 * WINDOW
    return [text[start : start + length] for start in range(0, len(text) - length + 1, length)]
