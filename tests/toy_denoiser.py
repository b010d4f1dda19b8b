"""A toy denoiser of three blocks, and calls of it, for tests of calibration without files."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from tempoquant.calibrate.denoiser_model import Carried
from tempoquant.calibrate.sample import CalibrationSample, GuidanceBranch

WIDTH = 64


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = (nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH),
                                         nn.Linear(2 * WIDTH, WIDTH))  # fmt: skip

    def forward(self, hidden: torch.Tensor, *, shift: float) -> torch.Tensor:
        shifted = hidden + shift
        return hidden + self.down(torch.relu(self.up(shifted)) * self.gate(shifted))


class ToyTransformer:
    """Three blocks; the first block's input is the sample's own, shifted by its timestep."""

    denoiser = "low_noise"
    num_blocks = 3

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(self.num_blocks))
        self.in_memory: set[int] = set()
        self.let_go_of: list[tuple[int, tuple[str, ...]]] = []
        self.modulating: list[str] = []

    def running(self, samples: Sequence[CalibrationSample]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def run_block(self, index: int, sample: CalibrationSample, carried: Carried) -> list[torch.Tensor]:
        hidden = carried[0] if index else sample.inputs["hidden"]
        return [self.blocks[index](hidden, shift=sample.timestep / 1000)]

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        assert not self.in_memory, "two blocks at once"
        self.in_memory.add(index)
        yield self.blocks[index]
        self.in_memory.remove(index)

    def let_go(self, index: int, linears: Sequence[str]) -> None:
        self.let_go_of.append((index, tuple(linears)))

    def shared_inputs(self, index: int) -> list[tuple[str, ...]]:
        return [("up", "gate")] if self.modulating else [("up", "gate"), ("down",)]

    def modulation(self, index: int) -> list[str]:
        return self.modulating

    def name_of(self, index: int, linear: str) -> str:
        return f"blocks.{index}.{linear}"


def sample(timestep: float, seed: int, branch: GuidanceBranch = "conditional") -> CalibrationSample:
    hidden = torch.randn(1, 50, WIDTH, generator=torch.Generator().manual_seed(seed))
    return CalibrationSample(f"prompt-{seed}", "low_noise", timestep, 0, branch, {"hidden": hidden})


def samples() -> list[CalibrationSample]:
    return [sample(timestep, seed) for seed, timestep in enumerate((100.0, 400.0, 600.0, 800.0))]
