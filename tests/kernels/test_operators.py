"""The operators keep their word to torch: schema, fake kernels, and graphs that are compiled
once.
"""

import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from tempoquant.formats import INT4, MXFP4, NVFP4_M1, Format, ScaleRule
from tempoquant.kernels import operators
from tempoquant.kernels.dispatch import Backend, forced
from tempoquant.kernels.input_gradient import _input_gradient, gradient_tensors
from tempoquant.runtime.activation_bits import set_activation_bits
from tempoquant.runtime.bin_clock import BinClock
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.runtime.share_inputs import share_inputs
from tempoquant.timesteps import TimestepBins
from tests.kernels.products import DEVICE, generator, whole_numbers
from tests.kernels.test_backends import each_backend, linear
from tests.random_layers import random

CHECKS = ("test_schema", "test_faketensor")


@each_backend
@pytest.mark.parametrize("eight_bits", [False, True], ids=["4 bits", "8 bits"])
def test_an_operator_returns_what_its_fake_kernel_says(backend, format, eight_bits):
    module = linear(format)
    transform, weight = module.input_transform(), module.weight_tensors()
    x = random(6, 3 * format.group_size).bfloat16().to(DEVICE)
    flags = torch.tensor([True, False], device=DEVICE) if eight_bits else None
    source = operators.Source(x, ScaleRule.CEIL, torch.ones(1, device=DEVICE), flags)
    if backend is Backend.FP4 and eight_bits:
        backend = Backend(operators.eight_bit_backend(format))
    quantized = operators.quantize_input(source, transform, format, backend.value)
    torch.library.opcheck(
        operators._quantize_input,
        (x, quantized.hidden, transform.smoothing_factor, transform.deflation, transform.input_offset,
         source.clip_ratio, flags),
        {"rotated": transform.rotated, "format": format.name, "rule": "ceil", "backend": backend.value},
        test_utils=CHECKS,
    )  # fmt: skip
    torch.library.opcheck(
        operators._multiply,
        (*quantized, *weight), {"format": format.name, "dtype": torch.bfloat16, "backend": backend.value},
        test_utils=CHECKS[1:] if backend in (Backend.FP4, Backend.FP8) else CHECKS,  # FP8 cannot be compared on a CPU
    )  # fmt: skip


class Attention(nn.Module):
    """Two linears that read one input, called as a transformer is."""

    def __init__(self, format: Format) -> None:
        super().__init__()
        layer = linear(format).to_layer()
        edges = TimestepBins((500.0,))
        layer = dataclasses.replace(layer, bins=edges, clip_ratio=torch.tensor([0.7, 0.9], device=DEVICE))
        clock = BinClock(edges)
        self.to_q, self.to_k = (QuantizedLinear.from_layer(layer, clock) for _ in range(2))
        clock.attach(self)
        assert share_inputs(self, [("to_q", "to_k")]) == 1

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.to_q(x) * self.to_k(x).float().tanh()


@pytest.mark.parametrize(("backend", "format"), [(Backend.FP8, NVFP4_M1), (Backend.FP8, MXFP4), (Backend.INT8, INT4)])
def test_a_compiled_model_gives_the_same_and_is_not_compiled_again_over_changing_bins(backend, format):
    torch.compiler.reset()
    model = Attention(format)
    set_activation_bits(model, 8, (400.0, 600.0))
    x = random(1, 4, 3 * format.group_size).bfloat16().to(DEVICE)
    with forced(backend), torch.no_grad():
        wanted = [model(x, torch.tensor([timestep])) for timestep in (100.0, 450.0, 550.0, 900.0)]
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(x, torch.tensor([200.0]))
        with torch.compiler.set_stance("fail_on_recompile"):
            for timestep, y in zip((100.0, 450.0, 550.0, 900.0), wanted, strict=True):
                torch.testing.assert_close(compiled(x, torch.tensor([timestep])), y)
    assert not torch.equal(wanted[0], wanted[1]) and not torch.equal(wanted[2], wanted[3])


@each_backend
def test_a_linear_trains_with_the_value_of_its_kernels_and_the_dequantized_gradient(backend, format):
    module = linear(format)
    x = random(2, 3, 3 * format.group_size).bfloat16().to(DEVICE)
    grad_y = random(2, 3, module.out_features, seed=1).bfloat16().to(DEVICE)
    with forced(backend):
        wanted = module(x)
        y = module(x.requires_grad_())
    y.backward(grad_y)
    assert torch.equal(y, wanted) and torch.equal(x.grad, grad_y @ module.dequantize().bfloat16())


def test_a_compiled_linear_trains_as_one_that_is_not():
    torch.compiler.reset()
    module = linear(NVFP4_M1)
    x = random(2, 3, 3 * NVFP4_M1.group_size).bfloat16().to(DEVICE).requires_grad_()
    with forced(Backend.FP8):
        module(x).sum().backward()
        wanted, x.grad = x.grad, None
        torch.compile(module, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert torch.equal(x.grad, wanted)


def test_the_operator_of_the_gradient_returns_what_its_fake_kernel_says():
    tensors = gradient_tensors(linear(NVFP4_M1).input_transform(), linear(NVFP4_M1).weight_tensors())
    grad_y = random(2, 3, tensors.packed.shape[0]).bfloat16().to(DEVICE)
    torch.library.opcheck(
        _input_gradient, (grad_y, *tensors), {"rotated": True, "format": NVFP4_M1.name}, test_utils=CHECKS
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_the_branch_reads_is_rounded_to_bfloat16_once(dtype):
    x = whole_numbers(5, 48, largest=50, seed=1).to(dtype).to(DEVICE)
    down = whole_numbers(3, 48, largest=50, seed=2).to(torch.bfloat16).to(DEVICE)
    assert torch.equal(
        operators.branch_hidden(x, down).cpu(), (x.cpu().double() @ down.cpu().double().T).to(torch.bfloat16)
    )


def test_what_float16_holds_beyond_bfloat16_reaches_the_branch():
    x = (1 + torch.rand(4, 64, generator=generator(1)) / 64).half().to(DEVICE)
    down = torch.zeros(1, 64, dtype=torch.bfloat16)
    down[0, 0], down[0, 1] = 1.0, -1.0
    wanted = (x[:, :1].double() - x[:, 1:2].double()).cpu().to(torch.bfloat16)
    assert torch.equal(operators.branch_hidden(x, down.to(DEVICE)).cpu(), wanted)
