"""Laws of predicted times: operations are PyTorch's and the closed forms', and parts sum to the
whole.
"""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.evaluation_operations import attention_operations, linear_operations
from tempoquant.acceleration.speeds import SPEEDS
from tempoquant.checkpoint.magnitude_ratios import MagnitudeRatios
from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.formats import NVFP4_M1, ScaleRule
from tempoquant.kernels.dispatch import Backend
from tempoquant.models.pipeline_configs import PipelineConfigs, read_configs
from tempoquant.models.wan.pipelines import I2V_A14B
from tempoquant.models.wan.published import A14B
from tempoquant.planning import time_plan
from tempoquant.planning.call_work import CALL_PARTS, CROSS, LINEARS, SELF, CallSettings, trace_denoiser, works_of_call
from tempoquant.planning.generation_memory import empty_denoiser, text_encoder_bytes
from tempoquant.planning.gpus import GPUS, measured
from tempoquant.planning.linear_stages import Size, multiplying, quantizing_input
from tempoquant.planning.memory_plan import MemoryPlan, ModePlan, plan_memory
from tempoquant.planning.other_work import _of_frames, merged, other_work
from tempoquant.planning.time_plan import DENOISING, WAITING, VideoTime, video_time
from tempoquant.planning.traced_video import TracedVideo, counts_of, trace_video
from tempoquant.planning.traced_work import fused_bytes, trace
from tempoquant.planning.work import MEMORY, TENSOR_CORES, TRANSFERS, Work
from tempoquant.recipe import Recipe
from tests.recorded import TINY

H100 = GPUS["H100 SXM"]
SMALL = I2V_A14B.replace(height=64, width=64, num_frames=9, num_steps=20)
RECIPE = Recipe.load("tiny")
OTHERS = (
    "wan2.2-ti2v-5b",
    "wan2.2-animate-14b",
    "wan2.1-vace-1.3b",
    "ltx-2",
    "hunyuanvideo-1.5-480p-i2v",
    "minimax-h3",
)


@pytest.fixture(scope="module")
def configs() -> PipelineConfigs:
    return read_configs(str(TINY))


@pytest.fixture(scope="module")
def video(configs) -> TracedVideo:
    return trace_video(configs, SMALL, RECIPE)


@pytest.fixture(scope="module")
def plan(configs) -> MemoryPlan:
    return plan_memory(configs, SMALL, RECIPE)


def modes_of(plan: MemoryPlan) -> list[ModePlan]:
    return [*plan.quantized.modes, *plan.quantized.in_one_piece]


def one_block(configs: PipelineConfigs, name: str) -> PipelineConfigs:
    described = configs.models[name]
    config = configs.family.shortened(described.config, 1)
    return dataclasses.replace(configs, models={**configs.models, name: described._replace(config=config)})


def test_operations_of_a_14b_block_are_those_of_the_closed_form_and_of_pytorchs_counter():
    configs, tokens = one_block(read_configs(A14B), "transformer"), 32_760
    traced = trace_denoiser(configs, "high_noise", I2V_A14B)
    works = works_of_call(traced, CallSettings({}), H100)
    counted = {part: sum(work.num_operations for work in works[part]) for part in works}
    assert counted[LINEARS] == linear_operations(tokens)
    assert counted[SELF] == 4.0 * tokens * tokens * 5120
    assert counted[SELF] + counted[CROSS] == attention_operations(tokens)
    model, family = empty_denoiser(configs, "high_noise"), configs.family
    inputs = family.example_inputs(configs.index, configs.denoiser("high_noise").config, (21, 60, 104))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        family.trace(model, inputs)
    assert sum(counted.values()) == counter.get_total_flops()


def test_attention_to_as_many_text_tokens_as_there_are_queries_is_cross_attention():
    configs = one_block(read_configs("wan2.1-t2v-1.3b"), "transformer")
    size = I2V_A14B.replace(height=128, width=256, num_frames=13)  # 4 × 8 × 16 = 512 tokens
    kinds = [each.kind for each in trace_denoiser(configs, "transformer", size).found]
    assert (kinds.count("self-attention"), kinds.count("cross-attention")) == (1, 1)


class Chain(nn.Module):
    """A product, three elementwise operations, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Linear(64, 64, bias=False, device="meta") for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(functional.gelu(y) * y + 1)


def test_neighbours_in_one_kernel_read_what_is_outside_once_and_write_what_is_used_after():
    model, x = Chain(), torch.empty(10, 64, device="meta")
    found = trace(model, lambda: model(x))
    assert [each.kind for each in found] == ["linear", "other", "other", "other", "linear"]
    size = 10 * 64 * 4
    assert [each.num_bytes for each in found[1:4]] == [2 * size, 3 * size, 2 * size]
    assert fused_bytes(found)[1:4] == [size, 0, size]
    assert fused_bytes(found)[0] == found[0].num_bytes == 2 * size + 64 * 64 * 4


def test_latent_frames_beyond_the_steady_ones_are_extrapolated_to_a_hundredth():
    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1).eval()

    def decode(frames: int) -> None:
        vae.decode(torch.empty(1, 4, frames, 8, 8, device="meta"))

    def encode(frames: int) -> None:
        vae.encode(torch.empty(1, 3, 4 * frames - 3, 64, 64, device="meta"))

    for compute in (decode, encode):
        whole = merged(trace(vae, lambda compute=compute: compute(6)))
        from_few = _of_frames(vae, compute, 6, 2)
        for total in ("num_operations", "bytes_moved"):
            expected = sum(getattr(work, total) for work in whole)
            assert sum(getattr(work, total) for work in from_few) == pytest.approx(expected, rel=0.01)


def test_a_kernel_takes_the_longer_of_its_products_and_its_bytes():
    gpu = dataclasses.replace(H100, bytes_per_s=2.0, rates={"bf16": 4.0, "fp8": 8.0})
    assert Work.of("bf16", 8.0, 2.0).seconds(gpu) == (2.0, 0.0)
    assert Work.of("fp8", 8.0, 6.0).repeated(3).seconds(gpu) == (0.0, 9.0)
    assert Work((("bf16", 4.0), ("fp8", 8.0)), 1.0).seconds(gpu).total == 2.0
    assert (
        Work.of("bf16", 8.0, 2.0).seconds(gpu).limit == TENSOR_CORES and Work.moving(1.0).seconds(gpu).limit == MEMORY
    )


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_parts_sum_to_the_whole_and_a_faster_speed_takes_no_longer(gpu, video, plan):
    for mode in modes_of(plan):
        times = [video_time(video, gpu, mode, speed) for speed in SPEEDS]
        for each in (*times, video_time(video, gpu, mode, None)):
            check_sums(each, video)
        for slower, faster in itertools.pairwise(times):
            assert slower.whole.seconds > faster.whole.seconds
            for before, after in zip(slower.step[:-1], faster.step[:-1], strict=True):
                assert before.seconds >= after.seconds * (1 - 1e-12)  # but waiting


def check_sums(found: VideoTime, video: TracedVideo) -> None:
    [denoising] = [phase for phase in found.phases if phase.name == DENOISING]
    assert denoising.seconds == pytest.approx(found.whole_step.seconds * video.size.num_steps)
    assert denoising.operations == pytest.approx(sum(part.operations for part in found.step) * video.size.num_steps)
    assert found.whole.seconds == pytest.approx(sum(phase.seconds for phase in found.phases))
    assert all(min(part.by_limit.values()) >= -1e-12 for part in (*found.step, *found.phases))
    calls = sum(each.computed + each.skipped for each in found.counts.values())
    assert calls == pytest.approx(video.size.num_steps * video.num_branches)


def test_copies_that_calls_do_not_hide_are_waited_for(video, plan):
    """The link is so slow that nothing else counts."""
    slow = dataclasses.replace(H100, pcie_bytes_per_s=1e3)  # slower than the disk
    for mode in plan.quantized.in_one_piece:
        found = video_time(video, slow, mode, "exact")
        [waiting] = [part for part in found.step if part.name == WAITING]
        counts, places = found.counts.values(), mode.places
        copied = places.copied_first + sum(places.copied_between) * (len(counts) - 1)
        copied += sum(each.computed * size for each, size in zip(counts, places.copied_each_call, strict=True))
        assert waiting.num_bytes * video.size.num_steps == pytest.approx(copied)
        assert waiting.seconds * video.size.num_steps == pytest.approx(copied / 1e3, rel=1e-3)
        assert found.whole_step.limit == (MEMORY if mode.mode == "resident" else TRANSFERS)


def test_disk_mode_reads_a_model_in_the_dtype_that_its_files_have(configs, video, monkeypatch):
    """A disk so slow that nothing else counts; blocks are read in each call, all else once."""
    monkeypatch.setattr(time_plan, "DISK_BYTES_PER_S", 1e3)
    size = sum(part.nbytes for part in empty_denoiser(configs, "high_noise").state_dict().values())
    components = [denoiser.component for denoiser in configs.denoisers]
    waits = {}
    for wide in (1, 2):
        stored = dataclasses.replace(configs, disk_bytes=dict.fromkeys(components, wide * size))
        models = plan_memory(stored, SMALL, RECIPE)
        [mode] = [each for each in models.sixteen_bit.in_one_piece if each.mode == "disk"]
        [part] = [part for part in video_time(video, H100, mode, None).step if part.name == WAITING]
        counts, places = counts_of(video, "exact")[0].values(), mode.places
        read = sum(places.read_first)
        read += sum(each.computed * blocks for each, blocks in zip(counts, places.read_each_call, strict=True))
        waits[wide] = part.seconds * SMALL.num_steps
        assert waits[wide] == pytest.approx(read / 1e3, rel=1e-3)
        both = zip(places.read_first, places.read_each_call, strict=True)
        assert [sum(each) for each in both] == pytest.approx([wide * size] * 2, abs=2)
        [foreseen] = [each for each in models.quantized.in_one_piece if each.mode == "disk"]
        assert foreseen.places.read_each_call == foreseen.places.copied_each_call, "its files are not there yet"
    assert waits[2] == pytest.approx(2 * waits[1], rel=1e-3)


def test_chunks_expand_each_weight_again_and_multiply_as_much(video, plan):
    """48 tokens make one chunk; for more chunks, a linear reads its weight for each."""
    chunked = next(iter(video.denoisers.values()))
    assert set(chunked.calls_in_chunks.values()) == {1}
    layers = next(iter(video.layers.values())).entries
    in_four = dataclasses.replace(chunked, calls_in_chunks=dict.fromkeys(chunked.calls_in_chunks, 4))
    whole, four = (
        works_of_call(each, CallSettings(layers, in_chunks=True), H100)[LINEARS] for each in (chunked, in_four)
    )
    assert sum(w.num_operations for w in four) == pytest.approx(sum(w.num_operations for w in whole))
    assert sum(w.bytes_moved for w in four) > sum(w.bytes_moved for w in whole)


def test_recorded_ratios_say_which_calls_are_skipped(video):
    configs = video.configs
    assert all(each.skipped == 0.35 * (each.computed + each.skipped) for each in counts_of(video, "fast")[0].values())
    ratios = MagnitudeRatios((1000.0, 0.0), {"conditional": (1.0, 1.0), "unconditional": (1.0, 1.0)})

    class Quantized:
        magnitude_ratios = ratios

    quantized = dict.fromkeys(video.denoisers, Quantized())
    known = dataclasses.replace(video, configs=dataclasses.replace(configs, quantized=quantized))
    counts, sentence = counts_of(known, "fast")
    assert "recorded of this model" in sentence
    # Nothing changes, so two of three are skipped after the first two steps, of 8 and of 12 by two
    # branches.
    assert [(each.computed, each.skipped) for each in counts.values()] == [(8, 8), (10, 14)]
    few, sentence = counts_of(dataclasses.replace(video, size=SMALL.replace(num_steps=4)), "fastest")
    assert not any(each.skipped for each in few.values()) and "fewer than 20 steps" in sentence


def test_a_linear_whose_weight_alone_has_four_bits_multiplies_in_16():
    entry = LayerEntry(NVFP4_M1, ScaleRule.CEIL, 64, 128, 0, False, None, weights_alone=True)
    size = Size(10, 64, 128)
    assert quantizing_input(entry, size, Backend.FP4) == []
    expanding, product = multiplying(entry, size, Backend.FP4)
    assert product.operations == (("bf16", 2.0 * 10 * 64 * 128),)
    assert expanding.num_bytes == (0.5 + 1 / 16 + 2) * 64 * 128


def test_a_text_encoder_in_fewer_bits_is_copied_there_and_back(configs, video, plan):
    texts = {format: other_work(configs, SMALL, format) for format in ("16bit", "int8", "nf4")}
    held = {format: text_encoder_bytes(configs, format).weights for format in texts}
    for format, others in texts.items():
        one_way, times = others.text_bytes - (held["16bit"] - held[format]), 1 if format == "16bit" else 2
        assert others.quantized_text_bytes == times * one_way and others.text_bytes == texts["16bit"].text_bytes
    slow = dataclasses.replace(H100, pcie_bytes_per_s=1e6)
    for others in texts.values():
        found = video_time(dataclasses.replace(video, others=others), slow, plan.quantized.in_one_piece[0], "exact")
        assert found.phases[0].seconds == pytest.approx(2 * others.quantized_text_bytes / 1e6)


def test_measured_rates_take_the_place_of_the_datasheets_and_scale_what_was_not_measured():
    found = measured(H100, "mine", 3e12, H100.rates["bf16"] / 2, 1.5e15)
    assert (found.bytes_per_s, found.rates["fp8"], found.rates["bf16"]) == (3e12, 1.5e15, H100.rates["bf16"] / 2)
    assert found.rates["int8"] == H100.rates["int8"] / 2 and found.source == "rates measured on mine"


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_family_is_traced_and_counted_as_pytorch_counts_it(name):
    configs = read_configs(name)
    size, recipe = configs.family.published(configs.index)[1], Recipe.load("default")
    video = trace_video(configs, size, recipe)
    mode = plan_memory(configs, size, recipe).quantized.in_one_piece[0]
    check_sums(video_time(video, GPUS["B200"], mode, "fast"), video)
    denoiser = configs.denoisers[0].name
    model, latents = (
        empty_denoiser(configs, denoiser),
        configs.geometry.latents(size.height, size.width, size.num_frames),
    )
    inputs = configs.family.example_inputs(configs.index, configs.denoiser(denoiser).config, latents)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        configs.family.trace(model, inputs)
    assert sum(each.operations for each in video.denoisers[denoiser].found) == counter.get_total_flops()


@pytest.mark.slow
def test_the_document_shows_what_is_predicted():
    """The table of docs/speed.md: A14B on an H100 with everything on the GPU."""
    configs, recipe = read_configs(A14B), Recipe.load("default")
    video, plan = trace_video(configs, I2V_A14B, recipe), plan_memory(configs, I2V_A14B, recipe)
    times = [video_time(video, H100, plan.sixteen_bit.in_one_piece[0], None)]
    times += [video_time(video, H100, plan.quantized.in_one_piece[0], speed) for speed in SPEEDS]
    text = (Path(__file__).parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")
    rows = {name: [f"{time.step[index].seconds:.2f} " for time in times] for index, name in enumerate(CALL_PARTS[:4])}
    rows["a step"] = [f"{time.whole_step.seconds:.2f} " for time in times]
    rows["a video"] = [f"{time.whole.seconds:.0f} " for time in times]
    for name, cells in rows.items():
        [row] = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        for cell, shown in zip(cells, row.split("|")[2:], strict=False):
            assert shown.strip(" ").startswith(cell.strip())
