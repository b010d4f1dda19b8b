"""Laws of the clock: every row runs with the clip ratio of its own timestep; models do not share
clocks.
"""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.errors import ModelError, UnsupportedError
from tempoquant.formats import FORMATS
from tempoquant.runtime.bin_clock import BinClock
from tempoquant.runtime.convert import install_layers, quantized_linears
from tempoquant.timesteps import TimestepBins
from tests.quantized_wan import BINS, inputs, quantize_all, run, tiny_wan

TIMESTEPS = (900.0, 930.0, 990.0)  # one in each bin


def quantized(seed: int = 0, format: str = "mixed", bins: TimestepBins = BINS) -> Any:
    model = tiny_wan(seed, num_layers=1)
    install_layers(model, quantize_all(model, format, bins=bins), bins)
    return model


def row(arguments: dict[str, Any], i: int) -> dict[str, Any]:
    return {key: value[i : i + 1] if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}


def test_each_bin_gives_another_result_and_one_bin_the_same() -> None:
    model = quantized()
    # The model itself sees the timestep: hold it, and move only the edges around it.
    results = []
    for edges in ((917.5, 958.25), (100.0, 958.25), (100.0, 200.0)):
        for linear in quantized_linears(model).values():
            linear.clock.bins = TimestepBins(edges)
        results.append(run(model, timestep=910.0))
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


def test_rows_with_their_own_timesteps_equal_separate_calls() -> None:
    model = quantized()
    arguments = inputs(batch=3, timestep=torch.tensor(TIMESTEPS))
    with torch.no_grad():
        together = model(**arguments)[0].float()
        for i in range(3):
            alone = model(**row(arguments, i))[0].float()
            difference = (together[i] - alone[0]).norm() / alone.norm()
            assert difference < 0.01  # matrix products may sum a larger batch in another order, in bfloat16


def current(clock: BinClock) -> list[int] | None:
    return None if clock.call is None or clock.call.bins is None else clock.call.bins.tolist()


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_a_layer_with_their_own_timesteps_equal_separate_calls(format: str) -> None:
    linear = quantized(format=format).blocks[0].ffn.net[2]
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0))
    with linear.at_timestep(torch.tensor(TIMESTEPS)):
        together = linear(x)
    for i, timestep in enumerate(TIMESTEPS):
        with linear.at_timestep(timestep):
            torch.testing.assert_close(together[i], linear(x)[i], rtol=1e-5, atol=1e-5)
            other = linear(x)[(i + 1) % 3]
        assert (together[(i + 1) % 3] - other).norm() > 1e-3 * other.norm(), "bins make a difference"


def test_one_timestep_serves_every_row() -> None:
    model = quantized()
    linear = model.blocks[0].attn1.to_q
    x = torch.randn(3, 5, 128)
    with linear.at_timestep(930.0):
        expected = linear(x)
    with linear.at_timestep(torch.tensor([930.0, 931.0, 932.0])):
        assert torch.equal(linear(x), expected)


def test_the_timestep_may_be_positional() -> None:
    model = quantized()
    arguments = inputs(timestep=930.0)
    by_name = run(model, timestep=930.0)
    run(model, timestep=990.0)
    with torch.no_grad():
        latents, timestep, text = (arguments.pop(key) for key in ("hidden_states", "timestep", "encoder_hidden_states"))
        assert torch.equal(model(latents, timestep, text, **arguments)[0], by_name)


def test_an_edge_belongs_to_the_noisier_bin() -> None:
    clock = BinClock(BINS)
    for timestep, expected in ((0.0, 0), (917.4, 0), (917.5, 1), (958.25, 2), (1000.0, 2)):
        with clock.at(timestep):
            assert current(clock) == [expected]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float32])
def test_the_timesteps_dtype_does_not_matter(dtype: torch.dtype) -> None:
    clock = BinClock(BINS)
    with clock.at(torch.tensor([918, 959, 917], dtype=dtype)):
        assert current(clock) == [1, 2, 0]


def test_a_row_with_a_timestep_for_each_token_is_at_its_noisiest() -> None:
    by_token = torch.tensor([[0.0, 918.0, 918.0], [0.0, 0.0, 917.0]])
    clock = BinClock(BINS)
    with clock.at(by_token):
        assert current(clock) == [1, 0]


def test_a_model_may_count_its_timesteps_in_another_unit_and_by_another_name() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> list[int]:
            return current(clock)

    clock, model = BinClock(BINS, ModelCall("t", 1000.0)), Model()
    clock.attach(model)
    assert model(torch.ones(1), torch.tensor([0.95])) == [1] and model(torch.ones(1), t=torch.tensor([0.97])) == [2]


def test_rows_and_timesteps_that_do_not_match_are_refused() -> None:
    model = quantized()
    linear = model.blocks[0].attn2.to_k
    for shape in ((3, 5, 128), (2, 128), (128,), (1, 5, 128)):
        timesteps = torch.tensor([900.0, 990.0])
        with linear.at_timestep(timesteps), pytest.raises(UnsupportedError, match="2 timesteps do not match"):
            linear(torch.randn(shape))


def test_what_a_call_tells_goes_to_a_device_once() -> None:
    clock, x = BinClock(BINS), torch.zeros(1, 4, 8, device="meta")
    clock.eight_bit_timesteps = (0.0, 950.0)
    with clock.at(930.0):
        first = clock.rows(x), clock.eight_bits(x)
        assert clock.call is not None and first[0] is clock.call.bins and clock.call.is_eight is not None
        assert clock.rows(x) is first[0] and clock.call.is_eight.device == x.device
    assert clock.call is None


def test_two_models_in_turn_do_not_disturb_each_other() -> None:
    high, low = quantized(0), quantized(1, "nvfp4", TimestepBins((500.0,)))
    alone = [run(high, timestep=930.0), run(low, timestep=600.0)]
    run(high, timestep=930.0)
    run(low, timestep=100.0)
    assert torch.equal(run(high, timestep=930.0), alone[0]) and torch.equal(run(low, timestep=600.0), alone[1])


def test_a_copy_has_a_clock_of_its_own_shared_by_its_layers() -> None:
    model = quantized()
    run(model, timestep=900.0)
    twin = copy.deepcopy(model)
    run(twin, timestep=990.0)
    clocks = [{id(linear.clock) for linear in quantized_linears(m).values()} for m in (model, twin)]
    assert len(clocks[0]) == len(clocks[1]) == 1 and clocks[0] != clocks[1]
    assert torch.equal(run(twin, timestep=930.0), run(model, timestep=930.0))


def test_a_model_without_a_timestep_is_refused() -> None:
    with pytest.raises(ModelError, match="timestep"):
        BinClock(BINS).attach(nn.Linear(4, 4))


@pytest.mark.parametrize(("scope", "backend"), [("model", "eager"), ("blocks", "aot_eager")])
def test_compiled_code_is_not_compiled_again_when_the_bin_changes(scope: str, backend: str) -> None:
    model = quantized()
    expected = [run(model, timestep=timestep) for timestep in TIMESTEPS]
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            compile_it = model.compile if scope == "model" else model.compile_repeated_blocks
            compile_it(backend=backend, fullgraph=True)
            found = [run(model, timestep=timestep) for timestep in TIMESTEPS]
    finally:
        torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
