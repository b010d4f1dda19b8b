"""Laws of tapes: playing one gives what its function gives, bit for bit, for the weights and inputs
of then.
"""

import copy
import dataclasses
import pickle
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from tempoquant.formats import INT4, MXFP4, NVFP4, NVFP4_M1, Format
from tempoquant.kernels import operators, tape
from tempoquant.kernels.dispatch import Backend, forced
from tempoquant.runtime.activation_bits import set_activation_bits
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.runtime.shared_input import SharedInput
from tempoquant.timesteps import TimestepBins
from tests.kernels.products import DEVICE
from tests.kernels.test_backends import BACKENDS, linear
from tests.random_layers import by_bin, random

BINS = TimestepBins((500.0,))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count in its one number how often a tape is played; on a CPU only such a test makes tapes."""
    monkeypatch.setattr(tape, "PLAYS_ON_CPU", True)
    monkeypatch.setattr(tape, "_TAPES", {})
    monkeypatch.setattr(tape, "_TRIED", set())
    count, play = [0], tape.Tape.play

    def counted(self: tape.Tape, given: object) -> object:
        count[0] += 1
        return play(self, given)  # type: ignore[arg-type]

    monkeypatch.setattr(tape.Tape, "play", counted)
    yield count


def without_tapes(module: QuantizedLinear, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(tape, "PLAYS_ON_CPU", False)
        patched.setattr("tempoquant.runtime.linear_computation.forward_by_tape", lambda *_: None)
        return module(x)


def assert_played_is_the_same(
    module: QuantizedLinear, x: torch.Tensor, played: list[int], monkeypatch: pytest.MonkeyPatch, halves: int = 2
) -> None:
    played[0] = 0
    with torch.no_grad():
        y = module(x)
    wanted = without_tapes(module, x, monkeypatch)
    assert played[0] == halves and y.dtype == wanted.dtype and torch.equal(y, wanted) and bool(y.isfinite().all())


def halves_of(backend: Backend, format: Format) -> int:
    """Return how many halves of a linear are played: the interpreter copies outside rows, and GPUs
    launch a kernel.
    """
    return 1 if backend is Backend.FP8 and format is MXFP4 and DEVICE == "cpu" else 2


@pytest.mark.parametrize(("backend", "format", "dtype"),
                         [*((*each, torch.bfloat16) for each in BACKENDS), (*BACKENDS[3], torch.float32)])  # fmt: skip
def test_a_tape_gives_what_its_layer_gives_for_other_inputs_and_other_weights(
    backend: Backend, format: Format, dtype: torch.dtype, played: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, other, halves = linear(format), linear(format), halves_of(backend, format)
    inputs = [random(1, 3, module.in_features, seed=seed).to(dtype).to(DEVICE) for seed in range(3)]
    with forced(backend), torch.no_grad():
        for x in inputs[:2]:
            module(x)
        other.load_state_dict({key: value.flip(0) if key == "bias" else value
                               for key, value in module.state_dict().items()})  # fmt: skip
        other.packed.data = other.packed.data.flip(0)  # as memory modes replace storage
        assert_played_is_the_same(other, inputs[2], played, monkeypatch, halves)  # by the tape of its kind, at once
    assert pickle.loads(pickle.dumps(module)).kind is copy.deepcopy(module).kind is module.kind


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("backend", "format"), [(Backend.FP4, NVFP4_M1), (Backend.BF16, NVFP4), (Backend.INT8, INT4)])
def test_a_tape_takes_each_bins_tensors_and_rows_of_eight_bits(
    backend: Backend, format: Format, bits: int, played: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = dataclasses.replace(linear(format).to_layer(), bins=BINS, clip_ratio=torch.tensor([0.9, 0.7]))
    module = QuantizedLinear.from_layer(by_bin(layer)).to(DEVICE)
    if bits == 8:
        set_activation_bits(module, 8, (400.0, 1000.0))
    inputs = [random(1, 3, module.in_features, seed=seed).bfloat16().to(DEVICE) for seed in range(3)]
    with forced(backend):
        with module.at_timestep(900.0), torch.no_grad():
            for x in inputs[:2]:
                module(x)
        for timestep in (100.0, 900.0):
            with module.at_timestep(timestep):
                assert_played_is_the_same(module, inputs[2], played, monkeypatch)


def test_rows_with_tensors_apart_and_gaps_have_no_tape(played: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    module = QuantizedLinear.from_layer(
        by_bin(dataclasses.replace(linear(NVFP4_M1).to_layer(), bins=BINS, clip_ratio=torch.ones(2)))
    ).to(DEVICE)
    x = random(2, 5, 2 * module.in_features).bfloat16().to(DEVICE)
    with forced(Backend.FP8), torch.no_grad():
        for at, some in ((torch.tensor([100.0, 900.0]), x[..., : module.in_features].contiguous()),
                         (torch.tensor(100.0), x[..., : module.in_features])):  # fmt: skip
            with module.at_timestep(at):
                for _ in range(3):
                    assert torch.equal(module(some), without_tapes(module, some, monkeypatch))
    assert played[0] == 0


def test_linears_that_share_an_input_play_one_half_each_but_not_for_another_backend(
    played: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = linear(MXFP4), linear(MXFP4)
    for module in (first, second):
        module.shared_input = first.shared_input or SharedInput(2)
        module.clock = first.clock
    with forced(Backend.FP8), torch.no_grad():
        for seed in range(3):
            played[0], x = 0, random(2, 5, first.in_features, seed=seed).bfloat16().to(DEVICE)
            results = first(x), second(x)
        wanted = without_tapes(first, x.clone(), monkeypatch)
        assert played[0] == 1 + 2 * (halves_of(Backend.FP8, MXFP4) - 1)
        assert all(torch.equal(y, wanted) for y in results)
        monkeypatch.setattr(second, "_fits_fp8", False)  # as a weight that spans more octaves than FP8 holds
        wanted = [without_tapes(each, x.clone(), monkeypatch) for each in (first, second)]
        for _ in range(3):
            played[0] = 0
            results = first(x), second(x)
            assert all(torch.equal(y, each) for y, each in zip(results, wanted, strict=True))
            first.shared_input.forget()
        assert played[0] == 3 + (halves_of(Backend.FP8, MXFP4) - 1)


def test_what_cannot_be_played_again_is_run_again(played: list[int]) -> None:
    """A product that is not a launch, is; a number that the host reads is not."""
    x = random(4, 16).to(DEVICE)
    for number in (1, 2, 3):
        y = x * number
        assert torch.equal(tape.taped("product", [y], lambda y=y: y @ y.T), y @ y.T)
        assert tape.taped("read", [x], lambda n=number: torch.full((1,), float(x[0, 0]) + n)) == float(x[0, 0]) + number
    assert played[0] == 2


def test_a_tensor_of_another_dtype_has_a_tape_of_its_own(played: list[int]) -> None:
    for dtype in (torch.float32, torch.float32, torch.float64, torch.float64):
        x = random(4, 16).to(dtype).to(DEVICE)
        assert tape.taped("product", [x], lambda x=x: x @ x.T).dtype == dtype
    assert played[0] == 2 and len(tape._TAPES) == 2


def test_a_linear_that_fails_leaves_no_tape(played: list[int]) -> None:
    module = linear(INT4)
    with forced(Backend.INT8), torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
        module(random(2, module.in_features + 1).bfloat16().to(DEVICE))
    assert not tape._TAPES and operators.tapes() is tape
