"""Laws of deciding between chunks and one piece: memory decides, a flag overrides, the reason says
which it was.
"""

import dataclasses

import pytest
import torch

from tempoquant.hosts.diffusers.pipeline import open_pipeline
from tempoquant.kernels.dispatch import Backend, Choice
from tempoquant.models.pipeline_configs import configs_of
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.source import SourceModel
from tempoquant.planning import chunking
from tempoquant.planning.chunking import choose_chunking, decide, kernels_of
from tempoquant.planning.memory_plan import OVERHEAD_BYTES, denoising_peak, plan_memory
from tempoquant.recipe import Recipe
from tests.quantized_wan import write_pipeline

SIZE = SamplingSettings(32, 32, 5, 2, 1.0, 3.0, 16)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return open_pipeline(write_pipeline(tmp_path_factory.mktemp("q") / "pipeline"))


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(chunking, "kernels_of", lambda configs, device, has_eight_bits: "fp8")


def test_one_piece_is_chosen_exactly_where_it_fits(source: SourceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    peak = denoising_peak(configs_of(source), SIZE, "resident", "fp8", in_chunks=False)
    on_a_gpu(monkeypatch, peak + OVERHEAD_BYTES)
    fits = choose_chunking(source, SIZE, "resident", "cuda")
    assert not fits.in_chunks and fits.reason.startswith("in one piece: predicted to take 1.0 GiB, and 1.0 GiB")
    on_a_gpu(monkeypatch, peak + OVERHEAD_BYTES - 1)
    too_large = choose_chunking(source, SIZE, "resident", "cuda")
    assert too_large.in_chunks and too_large.reason.startswith("in chunks of tokens: one piece would take")


def test_it_decides_by_what_plan_predicts(source: SourceModel) -> None:
    plan = plan_memory(configs_of(source), SIZE, Recipe.load("default")).quantized
    for mode in plan.in_one_piece:
        denoising = max(phase.peak for phase in mode.phases if "denoising" in phase.name or phase.name == "boundary")
        assert denoising_peak(configs_of(source), SIZE, mode.mode, "fp8", in_chunks=False) == denoising


@pytest.mark.parametrize("asked", [True, False])
def test_a_flag_overrides_what_memory_asks_for(
    source: SourceModel, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    on_a_gpu(monkeypatch, 0 if not asked else 2**50)
    chosen = choose_chunking(source, SIZE, "swap", "cuda", asked)
    assert chosen.in_chunks is asked and chosen.reason.endswith("the user asked for it")


def test_a_cpu_computes_in_chunks_and_a_family_without_them_in_one_piece(source: SourceModel) -> None:
    assert choose_chunking(source, SIZE, "lean", "cpu").in_chunks
    plain = dataclasses.replace(source.family, chunk_blocks=None)
    without = object.__new__(type(source))
    without.__dict__.update(source.__dict__, family=plain)
    assert choose_chunking(without, SIZE, "lean", "cpu", asked=True) == (
        False,
        "in one piece: blocks of this model have no other way",
    )


def test_more_free_memory_never_asks_for_chunks() -> None:
    decisions = [decide(2**32, free).in_chunks for free in range(0, 2**34, 2**28)]
    assert decisions == sorted(decisions, reverse=True) and len(set(decisions)) == 2


def test_linears_are_counted_as_the_device_computes_them(source: SourceModel) -> None:
    assert kernels_of(configs_of(source), "cpu") == "reference"
    sixteen_bit = dataclasses.replace(configs_of(source), quantized={})
    assert kernels_of(sixteen_bit, "cpu") == "fp8", "nothing to count"


def test_on_blackwell_nothing_is_expanded_unless_activations_have_eight_bits(
    source: SourceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunking, "choose", lambda device, format: Choice(Backend.FP4, "a Blackwell"))
    assert kernels_of(configs_of(source), "cuda") == "fp4"
    assert kernels_of(configs_of(source), "cuda", has_eight_bits=True) == "bf16", "as mxfp4's eight bits run"
