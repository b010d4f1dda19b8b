"""NVIDIA Model Optimizer: its max calibration and its SVDQuant (AWQ-lite smoothing, SVD, max
calibration).

Its fake quantization of blocks with dynamic scales is a CUDA kernel. Everything here runs without a
GPU, so that one function is replaced by `fake_quantize`, which is checked against modelopt's own
storage classes before it is used.
"""

import copy

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor
from torch import Tensor, nn

from benchmarks.peers.rows import Row
from benchmarks.peers.wan_peer import LINEARS, Quantized, Storage, Task, block_linears, replay, run_peer

_NOTE = "its CUDA fake-quantization kernel replaced by a PyTorch equivalent"
_SVDQUANT_NOTE = f"{_NOTE}; branch rounded to bfloat16, smoothing in float32"
_E2M1_MAX, _E4M3_MAX = 6.0, 448.0
_SMALLEST_E4M3 = 2.0**-9


def quantize(task: Task) -> Quantized:
    """Run `mtq.quantize` on the block linears; all calibration calls are replayed whenever it
    asks.
    """
    model, row = task.model, task.row
    check_fake_quantize()
    tensor_quant.dynamic_block_quantize_op = fake_quantize
    shapes = [(linear.out_features, linear.in_features) for linear in block_linears(model).values()]
    mtq.quantize(model, config_of(row), forward_loop=lambda m: replay(m, task.calls))
    # The rounded weights replace the weights, once and not in every call; the branch stays
    # separate.
    mtq.fold_weight(model, keep_attrs=True)
    storage, num_branches = Storage(), 0
    for name, shape in zip(block_linears(model), shapes, strict=True):
        linear = model.get_submodule(name)
        smoothing = linear.input_quantizer.pre_quant_scale
        num_branches += _round_branch(linear.weight_quantizer)
        storage.add(
            shape,
            row,
            rank=row.rank or 0,
            per_input=0 if smoothing is None else 8 * smoothing.element_size(),
            once=64 if row.format == "nvfp4" else 0,  # a float32 scale for the weight, another for the activations
        )
    if num_branches != (len(shapes) if row.rank else 0):
        raise RuntimeError(f"{num_branches} of {len(shapes)} linears have a branch")
    return Quantized(model, storage, _SVDQUANT_NOTE if row.rank else _NOTE)


def config_of(row: Row) -> dict[str, object]:
    """Return modelopt's preset for the format, restricted to the block linears, and the algorithm
    of the row.
    """
    preset = {"nvfp4": mtq.NVFP4_DEFAULT_CFG, "mxfp4": mtq.MXFP4_DEFAULT_CFG}[row.format]
    format_cfg = next(entry["cfg"] for entry in preset["quant_cfg"] if entry.get("cfg"))
    entries: list[dict[str, object]] = [{"quantizer_name": "*", "enable": False}]
    entries += [
        {"quantizer_name": f"blocks.*.{linear}.{which}_quantizer", "cfg": copy.deepcopy(format_cfg)}
        for linear in LINEARS
        for which in ("weight", "input")
    ]
    algorithm = "max" if row.rank is None else {"method": "svdquant", "lowrank": row.rank}
    return {"quant_cfg": entries, "algorithm": algorithm}


def fake_quantize(
    inputs: Tensor,
    block_size: int,
    amax: Tensor | None,
    num_bits: int,
    exponent_bits: int,
    scale_num_bits: int,
    scale_exponent_bits: int,
) -> Tensor:
    """Round to E2M1 with a scale a block of the last dimension: E4M3 under a global scale, or E8M0
    rounded up.
    """
    if (num_bits, exponent_bits) != (4, 2):
        raise NotImplementedError(f"{num_bits} bits with {exponent_bits} of exponent")
    blocks = inputs.float().unflatten(-1, (-1, block_size))
    ideal = blocks.abs().amax(dim=-1, keepdim=True) / _E2M1_MAX
    if (scale_num_bits, scale_exponent_bits) == (9, 8):  # modelopt counts a sign bit, which E8M0 lacks
        scale = torch.exp2(torch.ceil(torch.log2(ideal).clamp(min=-127)))
    else:
        if amax is None:
            raise ValueError("NVFP4 wants a calibrated maximum")
        global_scale = amax.float().amax() / (_E2M1_MAX * _E4M3_MAX)
        in_fp8 = torch.where(ideal == 0, 1.0, ideal / global_scale).clamp(_SMALLEST_E4M3, _E4M3_MAX)
        scale = in_fp8.to(torch.float8_e4m3fn).float() * global_scale
    scaled = blocks / scale
    magnitude = scaled.abs().clamp(max=_E2M1_MAX)
    # Neighbours lie 0.5, 1 and 2 apart. torch.round takes ties to even, which here is the even
    # mantissa.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = torch.round(magnitude / step) * step
    return (torch.copysign(rounded, scaled) * scale).flatten(-2).to(inputs.dtype)


def check_fake_quantize() -> None:
    """Raise RuntimeError unless `fake_quantize` equals the unpacked content of modelopt's packed
    tensors.
    """
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(64, 256, generator=generator) * torch.randn(64, 1, generator=generator).exp()
    packed, scale, global_scale = NVFP4QTensor.quantize(tensor.clone(), 16)
    theirs = packed.dequantize(torch.float32, scale=scale, double_scale=global_scale, block_sizes={-1: 16})
    ours = fake_quantize(tensor, 16, tensor.abs().amax(), 4, 2, 8, 4)
    packed, scale = MXFP4QTensor.quantize(tensor.clone(), 32)
    theirs_mx = packed.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})
    ours_mx = fake_quantize(tensor, 32, None, 4, 2, 9, 8)
    for name, a, b in (("NVFP4", ours, theirs), ("MXFP4", ours_mx, theirs_mx)):
        if not torch.allclose(a, b, rtol=1e-5, atol=0):
            raise RuntimeError(f"{name}: fake_quantize differs from modelopt's own by {float((a - b).abs().max())}")


def _round_branch(quantizer: nn.Module) -> int:
    """Keep the branch in the 16 bits that it is counted with; return 1 if there is one."""
    found = 0
    for name in ("_svdquant_lora_a", "_svdquant_lora_b"):
        factor = getattr(quantizer, name, None)
        if factor is not None:
            factor.copy_(factor.bfloat16().float())
            found = 1
    return found


if __name__ == "__main__":
    run_peer(quantize, ["nvidia-modelopt"])
