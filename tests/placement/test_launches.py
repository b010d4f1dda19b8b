"""Launches a block, counted as calls of the two operators: what memory modes and chunks add, and
what they do not.
"""

import functools
from collections import Counter
from typing import Any

import pytest
import torch

from tempoquant.kernels import operators
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.reference import dequantize_residual, round_input
from tempoquant.models.wan import chunked_blocks
from tempoquant.models.wan.family import WAN
from tempoquant.placement.memory_modes import set_memory_mode
from tempoquant.runtime.convert import install_layers
from tempoquant.runtime.share_inputs import share_inputs
from tests.quantized_wan import BINS, generate, quantize_all, tiny_pipeline

CALLS = 4
"""Two steps with guidance; each expert has one block."""
SHARED = ("smoothing_factor", "down", "deflation", "input_offset", "clip_ratio")


def pipeline() -> Any:
    """Return both experts quantized, and linears that read one input alike, as calibration makes
    them.
    """
    made = tiny_pipeline()
    for model in (made.transformer, made.transformer_2):
        layers = quantize_all(model)
        install_layers(model, layers, BINS)
        groups = WAN.call.sharing_an_input(layers)
        for first, *others in groups:
            for other in others:
                for key in SHARED:
                    setattr(model.get_submodule(other), key, getattr(model.get_submodule(first), key))
        assert share_inputs(model, groups) == 3
    return made


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of each operator; they compute in plain PyTorch."""
    noted: Counter[str] = Counter()

    def quantize_input(source: Any, transform: Any, format: Any, backend: str) -> QuantizedInput:
        noted["quantize"] += 1
        raw = source.x.float()
        return QuantizedInput(round_input(transform(raw), format, source.rule), None, transform.hidden(raw), None)

    def multiply(quantized: Any, weight: Any, format: Any, dtype: torch.dtype, backend: str) -> torch.Tensor:
        noted["multiply"] += 1
        y = quantized.values @ dequantize_residual(weight, format).T
        y = y if quantized.hidden is None else y + quantized.hidden @ weight.up.float().T
        return (y if weight.bias is None else y + weight.bias.float()).to(dtype)

    monkeypatch.setattr(operators, "backend_of", lambda *_: "bf16")
    monkeypatch.setattr(operators, "quantize_input", quantize_input)
    monkeypatch.setattr(operators, "multiply", multiply)
    return noted


@pytest.mark.parametrize("mode", ["resident", "swap", "lean"])
@pytest.mark.parametrize("num_chunks", [None, 1, 2], ids=["one piece", "one chunk", "two chunks"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_block_launches_ten_products_and_seven_quantizations_and_chunks_repeat_all_but_the_texts(
    launches: Counter[str], monkeypatch: pytest.MonkeyPatch, mode: Any, num_chunks: int | None, context: Any
) -> None:
    """A video of two tokens: q, k and v of a token are quantized once, keys and values of the text
    once a call.
    """
    size = {None: 2, 1: 2, 2: 1}[num_chunks]
    small = functools.partial(chunked_blocks.chunk_blocks, num_tokens=size)
    monkeypatch.setattr(chunked_blocks, "chunk_blocks", small)
    made = pipeline()
    in_force = set_memory_mode(made, mode, "cpu", in_chunks=num_chunks is not None)
    with context():
        generate(made)
    chunks = num_chunks or 1
    assert launches == {"quantize": CALLS * (6 * chunks + 1), "multiply": CALLS * (8 * chunks + 2)}
    in_force.remove()
