"""Laws of a call: what it tells its layers holds in its own thread, in its own second forward, and
ends with it.
"""

import copy
import functools
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tempoquant.errors import TempoQuantError
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.runtime.activation_bits import set_activation_bits
from tempoquant.runtime.convert import install_layers
from tempoquant.runtime.shared_input import SharedInput
from tests.quantized_wan import BINS, inputs, quantize_all, run, tiny_wan

TIMESTEPS = (900.0, 990.0)


@pytest.fixture(scope="module")
def shared_model() -> Any:
    """Make one block, with eight bits in the cleanest bin."""
    model = tiny_wan(num_layers=1)
    install_layers(model, quantize_all(model), BINS)
    set_activation_bits(model, 8, (0.0, 910.0))
    return model


@pytest.fixture
def model(shared_model: Any) -> Iterator[Any]:
    yield shared_model
    assert shared_model.blocks[0].attn1.to_q.clock.call is None, "a call is over when it ends"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled blocks"])
def test_threads_that_are_in_one_model_at_once_each_have_their_own_timestep(model: Any, compiled: bool) -> None:
    expected = [run(model, timestep=timestep) for timestep in TIMESTEPS]
    torch.compiler.reset()
    if compiled:
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        run(model)
    both_in_a_call = threading.Barrier(2, timeout=60)

    def wait(*_: Any) -> None:
        both_in_a_call.wait()

    handle = model.patch_embedding.register_forward_pre_hook(wait)
    try:
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(lambda timestep: run(model, timestep=timestep), TIMESTEPS))
    finally:
        handle.remove()
        for block in model.blocks:
            block._compiled_call_impl = None
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_threads_share_no_quantized_input() -> None:
    shared, x = SharedInput(2), torch.ones(1, 4)

    def quantized(number: float) -> float:
        [made] = shared.quantized(x, lambda x: (QuantizedInput(x * number, None, None, None),))
        return float(made.values.sum())

    assert quantized(1.0) == 4.0
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(quantized, 2.0).result() == 8.0
        shared.forget()
        assert thread.submit(quantized, 3.0).result() == 8.0
    assert quantized(5.0) == 20.0


def test_a_shared_input_survives_pickle_and_copies_hold_nothing() -> None:
    shared, x = SharedInput(2), torch.ones(1, 4)
    shared.quantized(x, lambda x: (QuantizedInput(x, None, None, None),))
    for twin in (pickle.loads(pickle.dumps(shared)), copy.deepcopy(shared)):
        twice = twin.quantized(x, lambda x: (QuantizedInput(2 * x, None, None, None),))
        assert twin.num_linears == 2 and torch.equal(twice[0].values, 2 * x)


def gradient(model: Any, between: Callable[[], Any] = lambda: None) -> torch.Tensor:
    """Compute the gradient of the first timestep's output at the latents, with any action between
    forward and backward.
    """
    arguments = inputs(timestep=TIMESTEPS[0])
    latents = arguments["hidden_states"].requires_grad_()
    loss = model(**arguments)[0].float().square().sum()
    between()
    with ThreadPoolExecutor(1) as thread:  # as autograd does it on a GPU
        thread.submit(loss.backward).result()
    assert latents.grad is not None
    return latents.grad


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["diffusers' own", "not reentrant", "reentrant"])
def test_a_block_recomputed_in_the_backward_pass_has_the_timestep_of_its_first_forward(
    model: Any, use_reentrant: bool | None
) -> None:
    expected, twin = gradient(model), copy.deepcopy(model)
    function = None if use_reentrant is None else functools.partial(checkpoint, use_reentrant=use_reentrant)
    twin.enable_gradient_checkpointing(function)
    num_forwards: list[None] = []
    twin.blocks[0].register_forward_pre_hook(lambda *_: num_forwards.append(None))
    found = gradient(twin, between=lambda: run(twin, timestep=TIMESTEPS[1]))
    assert torch.equal(found, expected) and len(num_forwards) == 3, "first, between, and recomputed"
    assert torch.equal(gradient(copy.deepcopy(twin)), expected), "a copy has its own clock"


def test_a_block_recomputed_by_other_means_is_refused(model: Any) -> None:
    block = model.blocks[0]
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        with pytest.raises(TempoQuantError, match="none is current"):
            gradient(model)
    finally:
        del block.forward


def test_a_call_within_a_call_leaves_the_outer_one_its_timestep(model: Any) -> None:
    inner, outer = (run(model, timestep=timestep) for timestep in TIMESTEPS)
    results: list[torch.Tensor] = []

    def call_it(*_: Any) -> None:
        handle.remove()
        results.append(run(model, timestep=TIMESTEPS[0]))

    handle = model.blocks[0].register_forward_hook(call_it)
    assert torch.equal(run(model, timestep=TIMESTEPS[1]), outer) and torch.equal(results[0], inner)


def test_a_call_that_raises_midway_leaves_nothing_behind(model: Any) -> None:
    linear, shared, held = model.blocks[0].attn1.to_q, SharedInput(2), []

    def hold_and_raise(module: nn.Module, args: tuple[Any, ...]) -> None:
        shared.quantized(args[0], lambda x: (QuantizedInput(x, None, None, None),))
        held.append(weakref.ref(args[0]))
        raise ValueError("midway")

    handle = linear.register_forward_pre_hook(hold_and_raise)
    linear.clock.shared_inputs.append(shared)
    try:
        with pytest.raises(ValueError, match="midway"):
            run(model)
    finally:
        handle.remove()
        linear.clock.shared_inputs.remove(shared)
    gc.collect()
    assert held[0]() is None


def test_a_call_that_is_refused_ends_too(model: Any) -> None:
    with pytest.raises(ValueError, match="late"):
        model(**inputs() | {"timestep": "late"})


def test_a_call_that_another_hook_refuses_first_ends_no_call_around_it(model: Any) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("first")

    linear = model.blocks[0].attn1.to_q
    handle = model.register_forward_pre_hook(refuse, prepend=True)
    try:
        with linear.at_timestep(900.0):
            around = linear.clock.call
            with pytest.raises(ValueError, match="first"):
                run(model)
            assert linear.clock.call is around
    finally:
        handle.remove()


def test_a_call_keeps_the_activation_bits_that_it_began_with(model: Any) -> None:
    linear, x = model.blocks[0].attn1.to_q, torch.randn(1, 3, 128)
    with linear.at_timestep(900.0):
        in_eight = linear(x)
        set_activation_bits(model, 4)
        assert torch.equal(linear(x), in_eight)
    with linear.at_timestep(900.0):
        assert not torch.equal(linear(x), in_eight)
    set_activation_bits(model, 8, (0.0, 910.0))


def test_a_copy_made_during_a_call_is_in_none(model: Any) -> None:
    with model.blocks[0].attn1.to_q.at_timestep(900.0):
        assert copy.deepcopy(model).blocks[0].attn1.to_q.clock.call is None
