"""8-bit attention's plain PyTorch model beside PyPI's sageattention (Triton), run by Triton's
interpreter.

    # pure Triton; its interpreter asks for the older numpy
    pip install --no-deps sageattention==1.0.6 "numpy<2.4"
    TRITON_INTERPRET=1 python -m benchmarks.attention_numerics

Queries, keys and values are random, with keys that share a large mean as in video models. Each row
gives the error of the kernel and of the model against exact attention, and of the two against each
other, in dB of SQNR. The kernel sums PV in FP16, and the model does not, so the two differ by about
that error.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.json_line import publish
from tempoquant.evaluate.eight_bit_attention import eight_bit_attention
from tempoquant.sqnr import sqnr_db

SHAPES = ((2, 128, 64), (1, 320, 64), (1, 256, 128), (1, 200, 64))  # heads, tokens, features
KEY_MEAN = 4.0


def kernel_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compute sageattention's `sageattn` without its check that tensors are on a GPU, (1, heads,
    tokens, features).
    """
    from sageattention.attn_qk_int8_per_block import forward
    from sageattention.quant_per_block import per_block_int8

    smooth = key - key.mean(dim=2, keepdim=True)
    q_int8, q_scale, k_int8, k_scale = per_block_int8(query, smooth, sm_scale=query.shape[-1] ** -0.5)
    return forward(q_int8, k_int8, value.half(), q_scale, k_scale, output_dtype=torch.float32)


def row(num_heads: int, num_tokens: int, num_features: int) -> dict[str, Any]:
    """Measure one shape."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, num_heads, num_tokens, num_features) for _ in range(3))
    key = key + KEY_MEAN * torch.randn(1, num_heads, 1, num_features)
    exact = functional.scaled_dot_product_attention(query.double(), key.double(), value.double()).float()
    model = eight_bit_attention(query, key, value)
    kernel = kernel_attention(query, key, value)
    return {
        "heads": num_heads,
        "tokens": num_tokens,
        "features": num_features,
        "kernel_db": sqnr_db(exact, kernel),
        "model_db": sqnr_db(exact, model),
        "fp8_model_db": sqnr_db(exact, eight_bit_attention(query, key, value, values_in="fp8")),
        "kernel_against_model_db": sqnr_db(model, kernel),
    }


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for shape in SHAPES:
        publish(row(*shape), arguments.json)


if __name__ == "__main__":
    main()
