"""Laws of working on tokens piece by piece."""

import logging

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tempoquant.calibrate.linear_calibration import InputCalibration
from tempoquant.calibrate.phases import Phase
from tempoquant.calibrate.token_chunks import TokenChunks
from tempoquant.methods import HessianAccumulator
from tempoquant.recipe import Recipe
from tempoquant.timesteps import TimestepBins


@hypothesis.given(num_tokens=st.integers(0, 3000), at_once=st.integers(1, 4000))
def test_every_token_comes_once_and_in_order(num_tokens: int, at_once: int) -> None:
    x, seen = torch.arange(num_tokens).unsqueeze(1), []
    TokenChunks(at_once).each(x, seen.append)
    assert torch.equal(torch.cat([torch.zeros(0, 1, dtype=x.dtype), *seen]), x)
    assert all(piece.shape[0] <= at_once for piece in seen)


def test_pieces_get_smaller_when_memory_runs_out_and_nothing_is_seen_twice(caplog: pytest.LogCaptureFixture) -> None:
    chunks, seen = TokenChunks(8192), []

    def work(piece: torch.Tensor) -> None:
        if piece.shape[0] > 1500:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(piece)

    x = torch.arange(10_000).unsqueeze(1)
    with caplog.at_level(logging.WARNING):
        chunks.each(x, work)
        chunks.each(x, work)
    assert torch.equal(torch.cat(seen), torch.cat([x, x]))
    assert chunks.num_tokens == 1024
    assert [record.message for record in caplog.records] == [
        f"the GPU ran out of memory; continuing with {number} tokens at a time" for number in (4096, 2048, 1024)
    ]


def test_memory_that_is_too_small_for_the_smallest_piece_is_an_error() -> None:
    def work(piece: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        TokenChunks(8192).each(torch.zeros(10_000, 1), work)


def test_statistics_are_the_same_after_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The piece that failed has left nothing behind."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(64, 32)
    x = torch.randint(-4, 5, (4096, 64), generator=generator).float()  # sums of small integers are exact in any order

    def layer(chunks: TokenChunks) -> torch.Tensor:
        recipe = Recipe.load("paper").replace(rank=0, clip_ratios=())
        calibration = InputCalibration({"it": linear}, recipe.default_format, recipe, TimestepBins(), [1], chunks)
        with torch.no_grad():
            for phase in Phase:
                calibration.observe(phase, x, 0)
                calibration.end_phase(phase)
            return calibration.finish()[0].layer.packed

    wanted = layer(TokenChunks(256))
    add = HessianAccumulator.add

    def failing(accumulator: HessianAccumulator, rounded: torch.Tensor) -> None:
        if rounded.shape[0] > 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        add(accumulator, rounded)

    monkeypatch.setattr(HessianAccumulator, "add", failing)
    assert torch.equal(layer(TokenChunks(4096)), wanted)
