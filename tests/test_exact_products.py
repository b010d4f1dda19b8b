"""Laws of exact products: no switch of the user's reaches them, and they leave every switch as it
was.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tempoquant import exact_products
from tempoquant.exact_products import exact_linear
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.timesteps import TimestepBins
from tests.random_layers import random_layer

CUDA = torch.backends.cuda.matmul


@pytest.fixture(params=["high", "medium"])
def allowed(request: Any) -> Iterator[str]:
    """Allow float32 products of fewer bits."""
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


def test_what_the_user_allows_does_not_reach_the_reference(allowed: str) -> None:
    generator = torch.Generator().manual_seed(0)
    module = QuantizedLinear.from_layer(random_layer(nn.Linear(512, 512), "nvfp4_m1", TimestepBins()))
    x = torch.randn(1, 300, 512, generator=generator)
    found = module(x)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, module(x)) and torch.equal(compiled, found)


def test_the_users_switches_are_as_they_were(allowed: str) -> None:
    names = [(owner, name) for owner, name, _ in exact_products._SWITCHES]
    before = [getattr(*each) for each in names]
    exact_linear(torch.ones(2, 2), torch.ones(2, 2))
    assert [getattr(*each) for each in names] == before
    assert torch.get_float32_matmul_precision() == allowed and CUDA.allow_tf32
    with pytest.raises(RuntimeError):
        exact_linear(torch.ones(2, 2), torch.ones(2, 3))
    assert CUDA.allow_tf32


def test_a_thread_that_leaves_does_not_switch_off_what_another_still_needs(
    allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_is_in, second_left = threading.Event(), threading.Event()
    linear = functional.linear
    seen: list[bool] = []

    def slow(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        if len(x) == 1:
            first_is_in.set()
            assert second_left.wait(30)
            seen.append(CUDA.fp32_precision == "ieee")
        return linear(x, weight, bias)

    monkeypatch.setattr(exact_products.functional, "linear", slow)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(exact_linear, torch.ones(1, 2), torch.ones(2, 2))
        assert first_is_in.wait(30)
        exact_linear(torch.ones(2, 2), torch.ones(2, 2))
        second_left.set()
        first.result()
    assert seen == [True] and CUDA.allow_tf32


def test_a_gradient_flows_through_an_exact_product() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(2, 4)
    exact_linear(x, weight).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, weight.sum(0).expand(3, 4))
