"""torchao's 4-bit inference formats, computed by its emulation: no calibration but NVFP4's static
activation scale.
"""

import torch
from torch import nn
from torchao.prototype.mx_formats.inference_workflow import (
    MXDynamicActivationMXWeightConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
)
from torchao.quantization import quantize_
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from benchmarks.peers.wan_peer import Quantized, Storage, Task, block_linears, replay, run_peer

_BF16_NOTE = "block linears compute in bfloat16, the only dtype torchao's MX path takes; all else in float32"


def quantize(task: Task) -> Quantized:
    """Convert weights to MXFP4 or NVFP4; each call quantizes activations."""
    model, row = task.model, task.row
    linears = block_linears(model)
    storage = Storage()
    for linear in linears.values():
        storage.add((linear.out_features, linear.in_features), row, once=64 if row.format == "nvfp4" else 0)

    def is_target(_module: nn.Module, name: str) -> bool:
        return name in linears

    if row.format == "mxfp4":
        for linear in linears.values():
            linear.to(torch.bfloat16)
        fp4 = torch.float4_e2m1fn_x2
        config = MXDynamicActivationMXWeightConfig(
            activation_dtype=fp4, weight_dtype=fp4, kernel_preference=KernelPreference.EMULATED
        )
        quantize_(model, config, is_target)
        for name in linears:
            _compute_in_bfloat16(model.get_submodule(name))
        return Quantized(model, storage, _BF16_NOTE)
    quantize_(model, NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False, step="prepare"), is_target)
    replay(model, task.calls)
    quantize_(model, NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False, step="convert"), is_target)
    return Quantized(model, storage)


def _compute_in_bfloat16(linear: nn.Module) -> None:
    linear.register_forward_pre_hook(lambda _module, args: (args[0].to(torch.bfloat16),))
    linear.register_forward_hook(lambda _module, args, output: output.to(torch.float32))


if __name__ == "__main__":
    run_peer(quantize, ["torchao"])
