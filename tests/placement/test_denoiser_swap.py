"""Laws of foreseeing who is called next, and of copying beside the computation."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tempoquant.models.wan.family import COMPONENTS, WAN
from tempoquant.placement import host_copies
from tempoquant.placement.denoiser_swap import DenoiserSwap, Placed, next_denoiser
from tempoquant.placement.host_copies import HostCopy, PinnedSlabs, SideStream, slab_bytes
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
    """What of torch.cuda a side stream asks for, written down."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.num_marks = 0
        self.current = SimpleNamespace(wait_event=lambda mark: self.log.append(f"compute waits for {mark}"))
        self.side = SimpleNamespace(
            wait_stream=lambda other: self.log.append("copy waits for compute" if other is self.current else "?"),
            record_event=self.mark,
        )

    def Stream(self, _device: torch.device) -> SimpleNamespace:
        return self.side

    def current_stream(self, _device: torch.device) -> SimpleNamespace:
        return self.current

    @contextmanager
    def stream(self, _stream: SimpleNamespace):
        self.log.append("copy")
        yield

    def mark(self) -> str:
        self.num_marks += 1
        return f"mark {self.num_marks}"


def test_copies_wait_for_the_memory_and_computing_waits_for_the_copies(monkeypatch):
    fake = FakeCuda()
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _tensor, stream: fake.log.append("kept for the copy"))
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device: empty_like(tensor))
    stream = SideStream(torch.device("cuda"))
    first, second = (HostCopy([torch.ones(2)], stream) for _ in range(2))
    first.bring()
    second.bring()
    copied = ["copy waits for compute", "copy", "kept for the copy"]
    assert fake.log == 2 * copied
    first.bring()  # is on its way already
    first.wait()
    second.wait()
    assert fake.log == 2 * copied + ["compute waits for mark 1", "compute waits for mark 2"]


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
