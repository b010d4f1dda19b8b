"""Linears of other projects and plain PyTorch beside ours: the computation of each, or the reason
for its absence.

Each row is a function from a 16-bit linear to a module that takes the same input. Only plain
dequantization rounds activations to four bits; the error column gives each one's loss against the
16-bit result.
"""

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import nn

Forward = Callable[[torch.Tensor], torch.Tensor]
MAX_ERROR = 0.3  # of a four-bit weight against 16 bits: about 0.1; anything wrong has 1 or more


class Peer(NamedTuple):
    """A way to run a linear with few bits.

    Attributes:
        package: the package that it needs, None for none.
    """

    name: str
    package: str | None
    prepare: Callable[[nn.Linear], Forward]

    @property
    def label(self) -> str:
        """Return its name with its version, for tables."""
        return self.name if self.package is None or self.missing else f"{self.name} ({version(self.package)})"

    @property
    def missing(self) -> str | None:
        """Return the reason why there is no row, as a sentence, or None."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed"


def _bitsandbytes_nf4(linear: nn.Linear) -> Forward:
    import bitsandbytes

    module = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
    )
    module.weight = bitsandbytes.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
    module.bias = linear.bias
    return module.to(linear.weight.device)


def _torchao_fp8(linear: nn.Linear) -> Forward:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    holder = nn.Sequential(linear)
    quantize_(holder, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return torch.compile(holder)  # as its authors do: eager rounds the input in many passes


PEERS = (
    Peer("bitsandbytes NF4, 16-bit activations", "bitsandbytes", _bitsandbytes_nf4),
    Peer("torchao FP8, dynamic by row", "torchao", _torchao_fp8),
)
