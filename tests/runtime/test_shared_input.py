"""Laws of shared inputs: quantized once by those that may share, again where sharing would be
wrong, and let go of.
"""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from tempoquant.formats import FORMATS
from tempoquant.kernels import operators
from tempoquant.kernels.dispatch import Backend, Choice
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.reference import dequantize_residual, round_input
from tempoquant.runtime.convert import install_layers, quantized_linears
from tempoquant.runtime.share_inputs import share_inputs
from tempoquant.runtime.shared_input import SharedInput
from tempoquant.timesteps import TimestepBins
from tests.quantized_wan import BINS, inputs, quantize_all, run, tiny_wan

GROUPS = [("blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_v"),
          ("blocks.0.attn2.to_k", "blocks.0.attn2.to_v")]  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make linears take a backend of two halves in plain PyTorch; record each quantized input."""
    noted: list[Any] = []

    def quantize_input(source, transform, format, backend):  # type: ignore[no-untyped-def]
        noted.append(source.x.shape)
        raw, rule = source.x.float(), source.rule
        hidden = transform.hidden(raw)
        return QuantizedInput(round_input(transform(raw), format, rule), None, hidden, None)

    def multiply(quantized, weight, format, dtype, backend):  # type: ignore[no-untyped-def]
        y = quantized.values @ dequantize_residual(weight, format).T
        if quantized.hidden is not None:
            y = y + quantized.hidden @ weight.up.float().T
        return (y if weight.bias is None else y + weight.bias.float()).to(dtype)

    monkeypatch.setattr(operators, "backend_of", lambda *_: "bf16")
    monkeypatch.setattr(operators, "quantize_input", quantize_input)
    monkeypatch.setattr(operators, "multiply", multiply)
    return noted


def quantized(alike: bool = True, bins: TimestepBins | None = None, **has: bool) -> Any:
    bins = bins or TimestepBins()
    model = tiny_wan(0, num_layers=1)
    layers = quantize_all(model, "mxfp4", bins=bins, **has)
    install_layers(model, layers, bins)
    if alike:
        for first, *others in GROUPS:
            for other in others:
                for key in ("smoothing_factor", "down", "deflation", "input_offset", "clip_ratio"):
                    setattr(model.get_submodule(other), key, getattr(model.get_submodule(first), key))
    return model


def test_linears_of_one_input_quantize_it_once_with_the_same_result(calls: list[Any]) -> None:
    model = quantized()
    apart = run(model)
    assert len(calls) == 10
    calls.clear()
    assert share_inputs(model, GROUPS) == 3
    assert torch.equal(run(model), apart) and len(calls) == 7


def test_rows_with_tensors_of_their_own_bins_are_shared_row_by_row(calls: list[Any]) -> None:
    model = quantized(bins=BINS, centred_by_bin=True, deflated_by_bin=True)
    rows = {"batch": 2, "timestep": torch.tensor([900.0, 990.0])}
    apart = run(model, **rows)
    assert len(calls) == 2 * 10
    calls.clear()
    assert share_inputs(model, GROUPS) == 3
    assert torch.equal(run(model, **rows), apart) and len(calls) == 2 * 7
    k = model.blocks[0].attn1.to_k
    k.input_offset = nn.Parameter(k.input_offset + 1, requires_grad=False)
    assert share_inputs(model, GROUPS) == 1, "another offset in some bin is another input"


def test_linears_that_quantize_differently_do_not_share(calls: list[Any]) -> None:
    model = quantized(alike=False)
    apart = run(model)
    calls.clear()
    assert share_inputs(model, GROUPS) == 0
    assert torch.equal(run(model), apart) and len(calls) == 10


def test_another_format_or_a_linear_in_16_bits_leaves_the_others_sharing(calls: list[Any]) -> None:
    model = quantized()
    model.blocks[0].attn1.to_v = nn.Linear(128, 128, dtype=torch.bfloat16)
    assert share_inputs(model, GROUPS) == 2


def test_an_input_changed_in_place_is_quantized_again(calls: list[Any]) -> None:
    model = quantized()
    share_inputs(model, GROUPS)
    q, k, x = model.blocks[0].attn1.to_q, model.blocks[0].attn1.to_k, torch.randn(1, 3, 128)
    q(x)
    with torch.no_grad():
        x.mul_(2)
    y = k(x)
    k.shared_input = None
    assert torch.equal(y, k(x)) and len(calls) == 3


def test_an_equal_tensor_is_not_the_same_one(calls: list[Any]) -> None:
    model = quantized()
    share_inputs(model, GROUPS)
    x = torch.randn(1, 3, 128)
    model.blocks[0].attn1.to_q(x)
    model.blocks[0].attn1.to_k(x.clone())
    assert len(calls) == 2


def test_in_inference_mode_a_call_of_the_model_shares_with_the_same_result(calls: list[Any]) -> None:
    model = quantized()
    with torch.inference_mode():
        apart = run(model)
        calls.clear()
        assert share_inputs(model, GROUPS) == 3
        assert torch.equal(run(model), apart) and len(calls) == 7
        calls.clear()
        assert torch.equal(run(model), apart) and len(calls) == 7, "the next call begins anew"


def test_in_inference_mode_nothing_is_shared_outside_of_a_call_because_changes_are_not_counted(
    calls: list[Any],
) -> None:
    model = quantized()
    share_inputs(model, GROUPS)
    with torch.inference_mode():
        x = torch.randn(1, 3, 128)
        model.blocks[0].attn1.to_q(x)
        x.mul_(2)
        y = model.blocks[0].attn1.to_k(x)
        assert torch.equal(y, model.blocks[0].attn1.to_k(x.clone()))


def test_the_last_linear_lets_go_of_the_input() -> None:
    shared, x = SharedInput(3), torch.randn(2, 4)
    held = weakref.ref(x)
    for _ in range(3):
        shared.quantized(x, lambda x: (QuantizedInput(x, None, None, None),))
    del x
    gc.collect()
    assert held() is None


def test_a_call_lets_go_of_what_a_skipped_linear_left(calls: list[Any]) -> None:
    model = quantized()
    share_inputs(model, GROUPS)
    x = torch.randn(1, 3, 128)
    held = weakref.ref(x)
    model.blocks[0].attn1.to_q(x)
    del x
    run(model)
    gc.collect()
    assert held() is None


def test_a_copy_shares_among_its_own_linears(calls: list[Any]) -> None:
    model = quantized()
    share_inputs(model, GROUPS)
    twin = copy.deepcopy(model)
    mine, its = ({id(linear.shared_input) for linear in quantized_linears(m).values()} for m in (model, twin))
    assert (mine & its) <= {id(None)}
    calls.clear()
    assert torch.equal(run(twin), run(model)) and len(calls) == 14


@pytest.mark.parametrize("bins", [TimestepBins(), BINS], ids=["one bin", "three bins"])
def test_a_compiled_model_shares_too_and_is_not_compiled_again(bins: TimestepBins) -> None:
    """The real operators run, whose fake kernels count how many of each a graph has."""
    torch.compiler.reset()
    model = quantized(bins=bins)
    share_inputs(model, GROUPS)
    graphs: list[Any] = []

    def look(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(operators, "_kernels_of", _plain_kernels)
        patch.setattr(operators, "choose", lambda device, format: Choice(Backend.BF16, ""))
        compiled = torch.compile(model, backend=look, fullgraph=True)
        wanted = {t: run(model, timestep=t) for t in (900.0, 930.0, 990.0)}
        compiled(**inputs(timestep=910.0))
        num_graphs = len(graphs)  # with several bins the clock's own is one more
        for timestep, y in wanted.items():
            assert torch.equal(compiled(**inputs(timestep=timestep))[0], y)
    assert len(graphs) == num_graphs
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("quantize_input" in target for target in targets) == 7
    assert sum("tempoquant.multiply" in target for target in targets) == 10


class _plain_kernels:
    """The bf16 backend in plain PyTorch, behind the operators."""

    def __init__(self, backend: str) -> None:
        assert backend == Backend.BF16

    @staticmethod
    def quantize_input(x, hidden, transform, format, rule, clip_ratio, eight_bits):  # type: ignore[no-untyped-def]
        z = transform.quantizer_input(x.float(), None if hidden is None else hidden.float())
        return QuantizedInput(round_input(z, format, rule, clip_ratio).bfloat16(), None, None, None)

    @staticmethod
    def multiply(quantized, weight, format, dtype):  # type: ignore[no-untyped-def]
        y = quantized.values.float() @ dequantize_residual(weight, format).T
        if quantized.hidden is not None:
            y = y + quantized.hidden.float() @ weight.up.float().T
        return (y if weight.bias is None else y + weight.bias.float()).to(dtype)


def test_every_format_is_known_to_the_operators() -> None:
    assert all(operators.get_format(name) is format for name, format in FORMATS.items())
