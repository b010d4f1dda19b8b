"""auto-round: rounding to nearest, and its SVDQuant (smoothing search, SVD, rounding of the
residual).

auto-round calibrates a diffusion model by calling its pipeline with prompts. Here the pipeline is
one that answers each "prompt", a number, by replaying the recorded call of that number, so that the
samples are the same for all peers.
"""

from collections.abc import Sequence

import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.transforms.svdquant import SVDQuantConfig, SVDQuantLinear
from auto_round.wrapper import WrapperWALayer
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from benchmarks.peers.wan_peer import Quantized, Storage, Task, block_linears, run_peer

_SMOOTHING_CALLS = 32  # of each layer; its default is 128, and its search tries 39 candidates on every one
_SVDQUANT_NOTE = f"smoothing searched on {_SMOOTHING_CALLS} calls a layer; branch in bfloat16, smoothing in float32"
_NVFP4_NOTE = "simulated in memory: the activations' global scale is each call's; what it exports stores one"


class ReplayPipeline(DiffusionPipeline):
    """A pipeline of one transformer, whose prompts are numbers of recorded calls."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)
        self.calls: Sequence[dict[str, Tensor]] = ()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], **_settings: object) -> None:
        """Replay calls; auto-round's guidance and steps are in the recorded calls already."""
        for prompt in prompts:
            self.transformer(**self.calls[int(prompt)], return_dict=False)


def quantize(task: Task) -> Quantized:
    """Quantize in place; linears become auto-round's own modules, which quantize their inputs."""
    model, row, calls = task.model, task.row, task.calls
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in block_linears(model).items()}
    pipeline = ReplayPipeline(model)
    pipeline.calls = calls
    algorithms: list[object] = [RTNConfig(disable_opt_rtn=True)]
    if row.rank is not None:
        # Float32 while it works, as the model is; the branch is rounded to its 16 bits at the end.
        smoothing = {"smooth_enabled": True, "smooth_max_calibration_calls": _SMOOTHING_CALLS}
        algorithms.insert(0, SVDQuantConfig(rank=row.rank, low_rank_dtype="float32", **smoothing))
    rounder = AutoRound(
        pipeline,
        scheme=row.format.upper(),
        alg_configs=algorithms,
        dataset=[([index], [str(index)]) for index in range(len(calls))],
        nsamples=len(calls),
        batch_size=1,
        calib_num_inference_steps=1,
        device_map="cpu",
        low_cpu_mem_usage=False,
        enable_torch_compile=False,
        amp=False,
    )
    quantized, _ = rounder.quantize()
    storage = Storage()
    for name, shape in shapes.items():
        module = quantized.get_submodule(name)
        _require_quantized_inputs(name, module)
        rank = per_input = 0
        if isinstance(module, SVDQuantLinear):
            rank, per_input = module.lora_down.out_features, 8 * module.smooth.element_size()
            for factor in (module.lora_down, module.lora_up):
                factor.weight.data = factor.weight.data.bfloat16().float()
        storage.add(shape, row, rank=rank, per_input=per_input, once=64 if row.format == "nvfp4" else 0)
    if row.format == "nvfp4":
        return Quantized(quantized, storage, _NVFP4_NOTE, batched=False)
    return Quantized(quantized, storage, _SVDQUANT_NOTE if row.rank else "")


def _require_quantized_inputs(name: str, module: nn.Module) -> None:
    inner = module.residual_linear if isinstance(module, SVDQuantLinear) else module
    if not isinstance(inner, WrapperWALayer):
        raise RuntimeError(f"{name} is left as {type(inner).__name__}, which does not quantize its inputs")


if __name__ == "__main__":
    run_peer(quantize, ["auto-round"])
