"""A linear inside ComfyUI computes what it computes elsewhere, plus what LoRAs add, exactly."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tempoquant.errors import UnsupportedError
from tempoquant.hosts.comfyui.adapters import BiasChange, LoraBranch, Patch, addition_to_bias, addition_to_weight
from tempoquant.hosts.comfyui.linear import ComfyLinear
from tempoquant.runtime.bin_clock import BinClock
from tempoquant.runtime.convert import quantized_linears, replace_linears
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.timesteps import TimestepBins
from tests.random_layers import random_layer

OUT, IN, RANK = 96, 128, 4
SHAPE = (OUT, IN)


def linear() -> ComfyLinear:
    torch.manual_seed(0)
    layer = random_layer(nn.Linear(IN, OUT), "int4", seed=0, bins=TimestepBins())
    made = ComfyLinear.from_layer(layer, BinClock(TimestepBins()), torch.float32)
    assert isinstance(made, ComfyLinear)
    return made


def lora(seed: int = 1, alpha: float | None = 2.0, **other: Any) -> Any:
    """Make a weight adapter as ComfyUI makes one: up, down, alpha, core, DoRA's scale, another
    shape.
    """
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(OUT, RANK, generator=generator), torch.randn(RANK, IN, generator=generator)
    weights = (up, down, alpha, other.get("core"), other.get("dora_scale"), other.get("reshape"))
    return SimpleNamespace(name=other.get("name", "lora"), weights=weights)


def test_it_is_the_same_linear() -> None:
    x = torch.randn(2, 3, IN)
    assert torch.equal(linear()(x), QuantizedLinear.from_layer(linear().to_layer())(x))


def test_what_is_streamed_gives_the_same_result_and_stays_where_it_was() -> None:
    made, x = linear(), torch.randn(2, 3, IN)
    wanted = made(x)
    made.comfy_cast_weights = True
    assert torch.equal(made(x), wanted)
    twin = made.on(torch.device("meta"))
    assert {parameter.device.type for parameter in twin.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in made.parameters()} == {"cpu"}
    assert twin.clock is made.clock and made.on(torch.device("cpu")) is made


def test_its_state_names_a_weight_without_size_for_lora_nodes_to_find() -> None:
    model = nn.ModuleDict({"q": linear()})
    state = model.state_dict()
    assert state["q.weight"].numel() == 0
    assert sum(tensor.nbytes for tensor in state.values()) == sum(p.nbytes for p in model.parameters())
    model.load_state_dict({name: tensor for name, tensor in state.items() if name != "q.weight"}, assign=True)


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_a_branch_adds_strength_times_alpha_by_rank_times_the_product(alpha: float | None) -> None:
    made, x, adapter = linear(), torch.randn(2, 3, IN, dtype=torch.float64), lora(alpha=alpha)
    plain = made(x)
    made.weight_function = [addition_to_weight("q", SHAPE, Patch(adapter, 0.7), torch.float64)]
    up, down = (tensor.double() for tensor in adapter.weights[:2])
    scale = 0.7 * (1.0 if alpha is None else alpha / RANK)
    torch.testing.assert_close(made(x) - plain, scale * x @ (up @ down).T, rtol=1e-10, atol=1e-10)
    made.weight_function = []
    assert torch.equal(made(x), plain)


def test_several_additions_are_all_added_and_counted() -> None:
    made, x, difference = linear(), torch.randn(1, 5, IN), torch.randn(OUT)
    plain = made(x)
    first, second = (addition_to_weight("q", SHAPE, Patch(lora(seed), 1.0), torch.float32) for seed in (1, 2))
    bias = addition_to_bias("q", OUT, Patch(("diff", (difference,)), 0.5), torch.float32)
    made.weight_function, made.bias_function = [first, second], [bias]
    want = plain + 0.5 * difference
    for adapter in (lora(1), lora(2)):
        want = want + 0.5 * x @ (adapter.weights[0] @ adapter.weights[1]).T
    torch.testing.assert_close(made(x), want)
    assert isinstance(first, LoraBranch) and isinstance(bias, BiasChange)
    assert first.move_to(torch.device("cpu")) == 4 * RANK * (OUT + IN) and bias.move_to(torch.device("cpu")) == 4 * OUT


REFUSED = {
    "a whole difference ('diff')": Patch(("diff", (torch.zeros(SHAPE),)), 1.0),
    "a loha is no plain LoRA": Patch(lora(name="loha"), 1.0),
    "DoRA scales the rows": Patch(lora(dora_scale=torch.ones(OUT, 1)), 1.0),
    "a LoRA with a core tensor": Patch(lora(core=torch.ones(1)), 1.0),
    "merging models": Patch(lora(), 1.0, strength_model=0.5),
    "a change of a part of its weight": Patch(lora(), 1.0, offset=(0, 0, 4)),
    "it is for another model": Patch(SimpleNamespace(name="lora", weights=(
        torch.zeros(OUT, 2), torch.zeros(2, IN + 1), None, None, None, None)), 1.0),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_added_is_refused_with_the_reason_and_the_way_out(reason: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        addition_to_weight("blocks.0.q", SHAPE, REFUSED[reason], torch.float32)
    text = str(error.value)
    assert text.startswith("blocks.0.q has four bits and cannot be changed: ") and reason in text and "--lora" in text


@pytest.mark.parametrize("value", [("diff", (torch.zeros(OUT + 1),)), ("set", (torch.zeros(OUT),)), lora()])
def test_a_bias_takes_differences_of_its_shape_only(value: Any) -> None:
    with pytest.raises(UnsupportedError, match="no plain difference"):
        addition_to_bias("q", OUT, Patch(value, 1.0), torch.float32)


def test_a_function_of_somebody_else_on_its_weight_is_refused_when_it_runs() -> None:
    made = linear()
    made.weight_function = [lambda weight: weight]
    with pytest.raises(UnsupportedError, match="function would change the weight"):
        made(torch.randn(1, 2, IN))


def test_a_model_takes_the_kind_of_linear_that_its_host_wants() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(IN, OUT)

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.q(x)

    model = Model()
    replace_linears(model, {"q": linear().entry}, TimestepBins(), kind=ComfyLinear)
    assert isinstance(quantized_linears(model)["q"], ComfyLinear)
