"""Laws of QuantizedLinear: it is its layer, stays packed, survives casts, and has no dense weight
to read.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tempoquant.checkpoint.tensors import KEYS, entry_of, to_stored
from tempoquant.errors import CheckpointError, TempoQuantError, UnsupportedError
from tempoquant.formats import FORMATS
from tempoquant.runtime.bin_clock import BinClock
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.timesteps import TimestepBins
from tests.random_layers import BINS, random_layer, reference_of

SOURCE = nn.Linear(128, 64)
X = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(0))


EVERYTHING: dict[str, Any] = {"rank": 4, "smoothed": True, "deflated": True, "centred": True}
each_set = pytest.mark.parametrize(
    "has",
    [
        EVERYTHING,
        EVERYTHING | {"deflated": False},
        EVERYTHING | {"centred": False},
        {"rank": 0, "smoothed": False, "centred": False},
    ],
    ids=["everything", "not deflated", "not centred", "nothing"],
)


def linear(format: str = "mxfp4", bins: TimestepBins = BINS, **has: Any) -> QuantizedLinear:
    return QuantizedLinear.from_layer(random_layer(SOURCE, format, bins, **has))


@pytest.mark.parametrize("format", FORMATS)
@each_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_module_computes_what_its_layer_computes(format: str, has: dict[str, Any], dtype: torch.dtype) -> None:
    layer = random_layer(SOURCE, format, BINS, **has)
    module = QuantizedLinear.from_layer(layer)
    for timestep in (900.0, 930.0, 990.0):
        with module.at_timestep(timestep):
            y = module(X.to(dtype))
        clip_ratio = layer.clip_ratio[BINS.of(timestep)]
        wanted = reference_of(layer, X.to(dtype), clip_ratio)
        assert y.dtype == dtype and torch.equal(y, wanted)


@pytest.mark.parametrize("format", FORMATS)
@each_set
def test_a_layer_survives_being_a_module(format: str, has: dict[str, Any]) -> None:
    layer = random_layer(SOURCE, format, **has)
    again = QuantizedLinear.from_layer(layer).to_layer()
    assert entry_of(again) == entry_of(layer)
    before, after = to_stored(layer, "before"), to_stored(again, "after")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("format", FORMATS)
@each_set
def test_bytes_in_memory_are_the_bytes_of_the_layer(format: str, has: dict[str, Any]) -> None:
    module = linear(format, **has)
    layer = random_layer(SOURCE, format, BINS, **has)
    held = sum(tensor.numel() * tensor.element_size() for name, tensor in module.state_dict().items() if name != "bias")
    assert held == module.num_bytes == layer.num_bytes
    assert module.bits_per_weight == layer.bits_per_weight == 8 * held / (64 * 128)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_autocast_changes_nothing() -> None:
    module = linear(bins=TimestepBins())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(X)
    assert y.dtype == torch.float32 and torch.equal(y, module(X))


def test_dequantize_is_the_layers() -> None:
    assert torch.equal(linear().dequantize(), random_layer(SOURCE).dequantize())


def test_state_dict_is_what_a_checkpoint_stores_and_loads_back() -> None:
    module = linear("nvfp4")
    state = module.state_dict()
    assert list(state) == list(KEYS)
    empty = QuantizedLinear(module.entry, module.clock)
    empty.load_state_dict(state)
    assert all(torch.equal(tensor, empty.state_dict()[key]) for key, tensor in state.items())


@pytest.mark.parametrize("cast", ["half", "float", "double", "bfloat16"])
def test_casts_change_no_tensor(cast: str) -> None:
    module = nn.Sequential(linear("nvfp4"))
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    getattr(module, cast)()
    module.to(torch.float8_e4m3fn)
    after = module.state_dict()
    assert all(after[key].dtype == tensor.dtype and torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_module_moves_between_devices() -> None:
    module = linear().to("meta")
    assert all(tensor.device.type == "meta" for tensor in module.state_dict().values())
    assert module.weight.device.type == "meta"
    assert module.to_empty(device="cpu").up.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_the_weight_has_shape_dtype_and_device_and_nothing_else() -> None:
    weight = linear().weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((64, 128), torch.bfloat16, "cpu")
    assert (weight.ndim, weight.size(0), weight.numel(), weight.requires_grad) == (2, 64, 64 * 128, False)
    assert weight.is_floating_point() and "PackedWeight" in repr(weight)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w.data,
        lambda w: w.T,
        lambda w: w + 1,
        lambda w: w.add_(1),
        lambda w: w @ torch.ones(128, 1),
        lambda w: torch.cat([w, w]),
        lambda w: nn.functional.linear(X, w),
        lambda w: w.clone(),
        lambda w: w.detach(),
        lambda w: w.to(torch.float32),
        lambda w: w.float(),
        lambda w: w[0],
        lambda w: w.__setitem__(0, 0),
        lambda w: torch.zeros_like(w),
        lambda w: torch.zeros(64, 128).copy_(w),
        lambda w: w.numpy(),
        lambda w: w.tolist(),
        lambda w: w.norm(),
        lambda w: nn.init.zeros_(w),
    ],
)
def test_using_the_values_of_the_weight_raises_with_the_remedy(use: object) -> None:
    with pytest.raises(UnsupportedError, match=r"dequantize\(\)"):
        use(linear().weight)  # type: ignore[operator]


def test_assigning_a_weight_is_refused() -> None:
    module = linear()
    for weight in (nn.Parameter(torch.zeros(64, 128)), torch.zeros(64, 128)):
        with pytest.raises((AttributeError, KeyError)):
            module.weight = weight  # type: ignore[misc,assignment]


def test_several_bins_need_a_timestep_and_one_bin_does_not() -> None:
    with pytest.raises(TempoQuantError, match="3 timestep bins"):
        linear()(X)
    assert linear(bins=TimestepBins())(X).shape == (2, 7, 64)


def test_a_layer_needs_a_clock_with_its_bins() -> None:
    with pytest.raises(CheckpointError, match="clock"):
        QuantizedLinear.from_layer(random_layer(SOURCE), BinClock(TimestepBins()))


def test_a_copy_is_independent() -> None:
    module = linear()
    twin = copy.deepcopy(module)
    with module.at_timestep(900.0), twin.at_timestep(990.0):
        assert module.clock is not twin.clock and not torch.equal(module(X), twin(X))
    twin.packed.zero_()
    assert module.packed.any()


def test_a_module_survives_pickle() -> None:
    module = linear()
    with module.at_timestep(930.0):
        twin = pickle.loads(pickle.dumps(module))
        with twin.at_timestep(930.0):
            assert torch.equal(twin(X), module(X))


def test_repr_says_what_the_layer_is() -> None:
    text = repr(linear("nvfp4"))
    for part in ("in_features=128", "out_features=64", "format=nvfp4", "rank=4", "smoothed", "timestep_bins=3"):
        assert part in text


def test_a_meta_module_allocates_nothing() -> None:
    module = QuantizedLinear(linear().entry, BinClock(BINS), device="meta")
    assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_gradients_flow_to_the_input_through_the_branch() -> None:
    x = X.clone().requires_grad_()
    module = linear(bins=TimestepBins())
    module(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
