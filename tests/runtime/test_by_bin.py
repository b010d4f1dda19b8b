"""Laws of tensors by timestep bin: a layer is, in each bin, the layer of that bin alone."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tempoquant.errors import TempoQuantError
from tempoquant.formats import FORMATS
from tempoquant.layer import QuantizedLayer
from tempoquant.runtime.convert import install_layers
from tempoquant.runtime.linear import QuantizedLinear
from tests.quantized_wan import BINS, inputs, quantize_all, run, tiny_wan
from tests.random_layers import by_bin, random_layer, reference_of

SOURCE = nn.Linear(128, 64)
X = torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(0))
TIMESTEPS = (990.0, 900.0, 930.0)  # bins 2, 0, 1
HAS = {"centred": {"deflated": False}, "deflated": {"centred": False}, "both": {}}  # by bin
each_has = pytest.mark.parametrize("has", HAS.values(), ids=HAS)


def plain_layer(format: str, centred: bool = True, **_: Any) -> QuantizedLayer:
    return random_layer(SOURCE, format, BINS, centred=centred)


def layer_by_bin(format: str = "mxfp4", spread: float = 1.0, **has: Any) -> QuantizedLayer:
    return by_bin(plain_layer(format, **has), spread=spread, **has)


@each_has
@pytest.mark.parametrize("format", FORMATS)
def test_where_all_bins_are_equal_the_layer_computes_what_the_plain_one_does(format: str, has: dict[str, Any]) -> None:
    plain = QuantizedLinear.from_layer(plain_layer(format, **has))
    equal = QuantizedLinear.from_layer(layer_by_bin(format, spread=0.0, **has))
    for timestep in TIMESTEPS:
        with plain.at_timestep(timestep), equal.at_timestep(timestep):
            assert torch.equal(equal(X), plain(X))


@each_has
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_each_bin_a_layer_is_the_layer_of_that_bin(has: dict[str, Any], dtype: torch.dtype) -> None:
    layer, x = layer_by_bin(**has), X.to(dtype)
    module = QuantizedLinear.from_layer(layer)
    results = []
    for timestep in TIMESTEPS:
        alone = layer.at_bin(BINS.of(timestep))
        wanted = reference_of(alone, x, alone.clip_ratio)
        with module.at_timestep(timestep):
            results.append(module(x))
        assert torch.equal(results[-1], wanted) and torch.equal(QuantizedLinear.from_layer(alone)(x), wanted)
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


@each_has
def test_rows_in_different_bins_are_to_the_last_bit_what_each_is_alone(has: dict[str, Any]) -> None:
    module = QuantizedLinear.from_layer(layer_by_bin(**has))
    module.clock.eight_bit_timesteps = (0.0, 910.0)
    with module.at_timestep(torch.tensor(TIMESTEPS)):
        together = module(X)
    for row, timestep in enumerate(TIMESTEPS):
        with module.at_timestep(timestep):
            assert torch.equal(together[row : row + 1], module(X[row : row + 1]))


def test_one_timestep_serves_every_row() -> None:
    module = QuantizedLinear.from_layer(layer_by_bin())
    with module.at_timestep(930.0):
        together = module(X)
    with module.at_timestep(torch.tensor([930.0] * 3)):
        torch.testing.assert_close(module(X), together, rtol=1e-5, atol=1e-5)  # sums of other heights, in float32


def test_a_layer_with_one_bin_may_say_by_bin() -> None:
    layer = QuantizedLinear.from_layer(by_bin(random_layer(SOURCE, bins=BINS).at_bin(1)))
    assert torch.equal(layer(X), QuantizedLinear.from_layer(layer.to_layer().at_bin(0))(X))


def test_gradients_flow_to_each_row_through_its_own_branch() -> None:
    module, x = QuantizedLinear.from_layer(layer_by_bin()), X.clone().requires_grad_()
    with module.at_timestep(torch.tensor(TIMESTEPS)):
        module(x).sum().backward()
    for row, timestep in enumerate(TIMESTEPS):
        alone = X[row : row + 1].clone().requires_grad_()
        with module.at_timestep(timestep):
            module(alone).sum().backward()
        assert x.grad is not None and alone.grad is not None and torch.equal(x.grad[row : row + 1], alone.grad)


def test_a_layer_outside_of_a_call_is_refused() -> None:
    with pytest.raises(TempoQuantError, match="none is current"):
        QuantizedLinear.from_layer(layer_by_bin())(X)


@pytest.fixture(scope="module")
def model() -> Any:
    """Make one block whose layers all have tensors by bin."""
    model = tiny_wan(num_layers=1)
    install_layers(model, quantize_all(model, centred_by_bin=True, deflated_by_bin=True), BINS)
    return model


def test_rows_of_a_model_with_their_own_timesteps_equal_separate_calls(model: Any) -> None:
    arguments = inputs(batch=3, timestep=torch.tensor(TIMESTEPS))
    with torch.no_grad():
        together = model(**arguments)[0].float()
        for row in range(3):
            own = {key: value[row : row + 1] for key, value in arguments.items() if isinstance(value, torch.Tensor)}
            alone = model(**own, return_dict=False)[0].float()
            # The 16-bit rest may sum a larger batch in another order, and a number near a tie round
            # the other way.
            assert (together[row] - alone[0]).norm() < 0.01 * alone.norm()


def test_a_compiled_model_gives_the_same_and_is_not_compiled_again_over_changing_bins(model: Any) -> None:
    wanted = {timestep: run(model, timestep=timestep) for timestep in TIMESTEPS}
    compiled = copy.deepcopy(model)
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.compile(backend="eager", fullgraph=True)
        assert all(torch.equal(run(compiled, timestep=timestep), y) for timestep, y in wanted.items())
    torch.compiler.reset()
