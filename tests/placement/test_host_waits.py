"""A call of a denoiser reads no number from the device, in any memory mode: the host launches and
does not wait.
"""

import functools
import traceback
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode

from tempoquant.models.host_timesteps import HostTimesteps
from tempoquant.models.wan.family import WAN
from tempoquant.placement.memory_modes import set_memory_mode
from tempoquant.runtime.activation_bits import set_activation_bits
from tests.placement.test_launches import CALLS, launches, pipeline
from tests.quantized_wan import generate, tiny_pipeline

__all__ = ["launches"]  # a fixture

_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default,
          torch.ops.aten.is_nonzero.default, torch.ops.aten.item.default}  # fmt: skip
_METHODS = ("tolist", "cpu", "numpy")


class Reads(TorchDispatchMode):
    """Notes where the host asks for a tensor's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def note(self) -> None:
        self.places.append("".join(traceback.format_stack(limit=8)[:-2]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self.note()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Collect the places that read in each call of a denoiser, hooks included."""
    calls: list[list[str]] = []
    running: list[Reads] = []
    plain = WanTransformer3DModel.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Reads() as noted:
            calls.append(noted.places)
            running.append(noted)
            try:
                return plain(self, *args, **kwargs)
            finally:
                running.pop()

    def noting(self: torch.Tensor, method: Any, *args: Any, **kwargs: Any) -> Any:
        if running:
            running[-1].note()
        return method(self, *args, **kwargs)

    monkeypatch.setattr(WanTransformer3DModel, "__call__", call)
    for name in _METHODS:
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, functools.partialmethod(noting, method))
    return calls


@pytest.mark.parametrize("mode", ["resident", "swap", "lean"])
@pytest.mark.parametrize("in_chunks", [True, False], ids=["chunks", "one piece"])
@pytest.mark.usefixtures("launches")
def test_no_call_waits_but_a_swaps_first_which_reads_the_schedule(
    mode: Any, in_chunks: bool, reads: list[list[str]]
) -> None:
    made = pipeline()
    for model in (made.transformer, made.transformer_2):
        set_activation_bits(model, 8, (0.0, 500.0))
    in_force = set_memory_mode(made, mode, "cpu", in_chunks=in_chunks)
    reads.clear()  # of calls that the mode itself made
    with torch.no_grad():
        generate(made)
    in_force.remove()
    assert len(reads) == CALLS
    first, *others = reads
    assert not any(others), others
    assert bool(first) == (mode == "swap"), first


def test_a_timestep_is_told_by_its_place_in_the_schedule_and_else_read() -> None:
    made = tiny_pipeline()
    timesteps = HostTimesteps(made, WAN)
    for num_steps in (3, 5):  # a new video has a new schedule
        made.scheduler.set_timesteps(num_steps)
        schedule = made.scheduler.timesteps
        assert timesteps.schedule() == schedule.tolist()
        for place, timestep in enumerate(schedule):
            for told in (timestep, timestep.expand(2), timestep[None].clone(), schedule[place : place + 1]):
                with Reads() as reads:
                    found = timesteps.of({"timestep": told})
                assert found == float(timestep)
                shares = told.untyped_storage().data_ptr() == schedule.untyped_storage().data_ptr()
                assert bool(reads.places) != shares
    schedule[1] += 1
    assert timesteps.of({"timestep": schedule[1]}) == float(schedule[1]), "a schedule that is changed is read again"
    assert timesteps.of({"timestep": schedule[:2]}) == float(schedule[0]), "the noisiest of several"


def test_reads_are_noticed(reads: list[list[str]], launches: Counter[str]) -> None:
    made = pipeline()
    made.transformer.register_forward_pre_hook(
        lambda _module, _args, inputs: inputs["timestep"].tolist() and None, with_kwargs=True
    )
    with torch.no_grad():
        generate(made)
    assert any(reads) and launches
