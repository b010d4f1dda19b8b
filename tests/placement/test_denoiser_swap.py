"""Laws of foreseeing who is called next, and of copying beside the computation."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tempoquant.models.wan.family import COMPONENTS, WAN
from tempoquant.placement import host_copies
from tempoquant.placement.denoiser_swap import DenoiserSwap, Placed, next_denoiser
from tempoquant.placement.host_copies import HostCopy, PinnedSlabs, SideStream, Slot, slab_bytes
from tempoquant.timesteps import Denoiser

HIGH, LOW = COMPONENTS
DENOISERS = (Denoiser(HIGH, "transformer", (900.0, 1000.0)), Denoiser(LOW, "transformer_2", (0.0, 900.0)))
TIMESTEPS = [999.0, 950.0, 900.0, 600.0, 300.0]  # the boundary of 0.9 belongs to high noise


@pytest.mark.parametrize(
    ("denoiser", "timestep", "num_calls", "num_branches", "follows"),
    [
        (HIGH, 999.0, 1, 1, HIGH),
        (HIGH, 900.0, 1, 1, LOW),
        (HIGH, 900.0, 1, 2, HIGH),  # the same step without the prompt
        (HIGH, 900.0, 2, 2, LOW),
        (HIGH, 900.0, 4, 2, LOW),  # a second generation at the same timestep
        (LOW, 600.0, 2, 2, LOW),
        (LOW, 300.0, 1, 2, LOW),
        (LOW, 300.0, 2, 2, None),
        (HIGH, 901.0, 1, 1, HIGH),  # no timestep of the loop: somebody else's call
    ],
)
def test_who_follows(denoiser, timestep, num_calls, num_branches, follows):
    assert next_denoiser(TIMESTEPS, DENOISERS, num_branches)(denoiser, timestep, num_calls) == follows


class ThreeBlocks(nn.Module):
    """Three blocks of one linear, and one outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.head = nn.Linear(2, 2)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.head(hidden_states)


@pytest.mark.parametrize("foresee", [lambda *_: HIGH, lambda *_: LOW, lambda *_: None])
def test_foreseeing_wrongly_never_changes_a_result(foresee, monkeypatch):
    monkeypatch.setattr(host_copies, "to_device", lambda host, _device: host.clone())
    denoisers = {HIGH: ThreeBlocks(), LOW: ThreeBlocks()}
    x, timestep = torch.randn(1, 2), torch.tensor([500.0])
    expected = {denoiser: model(x, timestep) for denoiser, model in denoisers.items()}
    placed = {denoiser: Placed.of(WAN, model) for denoiser, model in denoisers.items()}
    swap = DenoiserSwap(placed, SideStream(torch.device("cpu")), foresee)
    for denoiser in (HIGH, HIGH, LOW, HIGH, LOW, LOW):
        assert torch.equal(denoisers[denoiser](x, timestep=timestep), expected[denoiser])
    assert len(swap.on_device(LOW)) == 4  # what is in no block, and three blocks
    swap.remove()
    assert not any(swap.on_device(HIGH)) and not any(swap.on_device(LOW))


class FakeCuda:
    """The part of torch.cuda that a side stream uses, recorded."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.num_events = 0
        self.current, self.side = (
            SimpleNamespace(
                wait_event=lambda event, name=name: self.log.append(f"{name} waits for {event}"),
                record_event=lambda name=name: self.event(name),
            )
            for name in ("computing", "copying")
        )

    def Stream(self, _device: torch.device) -> SimpleNamespace:
        return self.side

    def current_stream(self, _device: torch.device) -> SimpleNamespace:
        return self.current

    @contextmanager
    def stream(self, _stream: SimpleNamespace):
        self.log.append("copy")
        yield

    def event(self, name: str) -> str:
        self.num_events += 1
        return f"{name} {self.num_events}"


def test_copies_wait_for_the_memory_and_computing_waits_for_the_copies(monkeypatch):
    """Two parts take turns in one slot; a copy waits for the mark of computing alone, not for all
    that was asked.
    """
    fake = FakeCuda()
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(SideStream, "reserve", lambda _self, num_bytes: torch.empty(num_bytes, dtype=torch.uint8))
    stream = SideStream(torch.device("cuda"))
    slot = Slot(stream)
    first, second = (HostCopy([torch.ones(2)], stream, slot) for _ in range(2))
    first.bring()
    first.bring()  # is on its way already
    first.wait()
    first.leave()
    second.bring()
    second.give_back()
    assert fake.log == [
        "copying waits for computing 1", "copy",  # the memory was just taken
        "computing waits for copying 2",
        "copying waits for computing 3", "copy",  # the first part was computed with
        "computing waits for copying 4",  # before the memory is another's
    ]  # fmt: skip


def test_slabs_hold_tensors_as_they_were_without_overlap(monkeypatch):
    monkeypatch.setattr(host_copies, "SLAB_BYTES", 2**12)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    tensors = [torch.randn(n).to(d) for n in (3, 700, 1, 5000) for d in (torch.float32, torch.bfloat16, torch.uint8)]
    slabs = PinnedSlabs()
    held = [slabs.hold(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, held, strict=True):
        assert torch.equal(tensor, copy) and copy.dtype == tensor.dtype and copy.data_ptr() != tensor.data_ptr()
    storages = {copy.untyped_storage().data_ptr(): copy.untyped_storage().nbytes() for copy in held}
    assert sum(storages.values()) == slab_bytes(tensor.nbytes for tensor in tensors)
    assert all(size & (size - 1) == 0 for size in storages.values())
