"""Threads that share models whose weights come and go are in them one after the other."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.family import COMPONENTS, WAN
from tempoquant.placement import host_copies
from tempoquant.placement.denoiser_swap import DenoiserSwap, Placed
from tempoquant.placement.host_copies import SideStream
from tempoquant.placement.memory_modes import set_memory_mode
from tempoquant.placement.one_at_a_time import Turn, one_at_a_time

HIGH, LOW = COMPONENTS
TIMESTEP = torch.tensor([500.0])
BRIEFLY_S = 0.2


class TwoBlocks(nn.Module):
    """Two linears, the second one after `pause`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.pause: Callable[[], None] = lambda: None

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden_states = self.blocks[0](hidden_states)
        self.pause()
        return self.blocks[1](hidden_states)


def test_a_second_thread_waits_until_the_first_is_out_of_its_expert(monkeypatch):
    monkeypatch.setattr(host_copies, "to_device", lambda host, _device: host.clone())
    denoisers, x = {HIGH: TwoBlocks(), LOW: TwoBlocks()}, torch.randn(1, 2)
    expected = denoisers[LOW](x, timestep=TIMESTEP)
    placed = {name: Placed.of(WAN, model) for name, model in denoisers.items()}
    swap = DenoiserSwap(placed, SideStream(torch.device("cpu")), lambda denoiser, *_: denoiser)
    undo = one_at_a_time(Turn(), denoisers.values(), ())
    found: list[torch.Tensor] = []
    other = threading.Thread(target=lambda: found.append(denoisers[LOW](x, timestep=TIMESTEP)), daemon=True)

    def come_in() -> None:
        other.start()
        other.join(BRIEFLY_S)
        assert other.is_alive() and all(swap.on_device(HIGH)) and not any(swap.on_device(LOW))

    denoisers[HIGH].pause = come_in
    denoisers[HIGH](x, timestep=TIMESTEP)
    other.join(20)
    assert torch.equal(found[0], expected) and all(swap.on_device(LOW))
    undo.close()
    assert not any(model._forward_hooks for model in denoisers.values() if swap.remove() is None)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_call_that_ends_by_an_error_lets_the_next_one_in(error):
    model, turn, x = TwoBlocks(), Turn(), torch.randn(1, 2)
    expected = model(x, TIMESTEP)
    one_at_a_time(turn, [model], ())

    def stop() -> None:
        raise error

    def interrupted() -> None:
        model.pause = stop
        with pytest.raises(error):
            model(x, TIMESTEP)
        model.pause = lambda: None

    ended = threading.Thread(target=interrupted)
    ended.start()
    ended.join(20)
    assert torch.equal(model(x, TIMESTEP), expected)
    interrupted()
    assert torch.equal(model(x, TIMESTEP), expected)


@pytest.mark.parametrize("mode", ["resident", "swap", "lean"])
def test_every_model_of_a_pipeline_is_behind_the_same_door(mode):
    pipeline = load_pipeline(SourceModel.open("tiny"), "cpu")
    in_force = set_memory_mode(pipeline, mode, "cpu")
    tokens = torch.ones(1, 4, dtype=torch.int64)
    others = [threading.Thread(target=call, daemon=True) for call in (
        lambda: pipeline.text_encoder(tokens),
        lambda: pipeline.vae.decode(torch.zeros(1, 16, 1, 2, 2)),
        lambda: pipeline.vae.encode(torch.zeros(1, 3, 1, 16, 16)),
    )]  # fmt: skip

    def come_in(*_: object) -> None:
        for other in others:
            other.start()
        others[0].join(BRIEFLY_S)
        assert all(other.is_alive() for other in others)

    handle = pipeline.transformer.blocks[0].register_forward_pre_hook(come_in)
    pipeline.transformer(torch.zeros(1, 36, 1, 2, 2), torch.tensor([999.0]), torch.zeros(1, 4, 128))
    handle.remove()
    for other in others:
        other.join(20)
        assert not other.is_alive()
    in_force.remove()
    assert "decode" not in vars(pipeline.vae) and "encode" not in vars(pipeline.vae)
