import math
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from tempoquant import quantizing
from tempoquant.errors import OutputError
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.planning import run_estimate as module
from tempoquant.planning.block_costs import DenoiserCosts
from tempoquant.planning.run_estimate import RunEstimate, StageEstimate, check_disk, estimate, measure_gemm_rate
from tempoquant.recipe import LayerRule, Recipe
from tempoquant.timesteps import TimestepBins
from tests.quantized_wan import quantize_all, tiny_pipeline, tiny_wan, write_component
from tests.recorded import SOURCE, TINY

GIB = 2**30
PAPER = Recipe.load("paper").replace(
    rank=4, num_prompts=2, num_steps=4, num_frames=5, height=32, width=32, guidance_scale=2.5, flow_shift=5.0,
    samples_per_denoiser=6,
)  # fmt: skip
ALL_SIX = dict.fromkeys(COMPONENTS, 6)


def costs(recipe: Recipe = PAPER, num_samples: int = 6, device: str = "cpu") -> DenoiserCosts:
    return DenoiserCosts(SOURCE, "high_noise", recipe, num_samples, device)


def estimate_of(recipe: Recipe = PAPER, **changes) -> RunEstimate:
    arguments = {"devices": ("cpu",), "num_samples": ALL_SIX, "records": True, "link": False,
                 "hidden_ram_bytes": 2 * GIB, "gemm_rates": {"cpu": 1e11}}  # fmt: skip
    return estimate(SOURCE, recipe, **{**arguments, **changes})


def by_name(run: RunEstimate) -> dict[str, StageEstimate]:
    return {stage.name: stage for stage in run.stages}


def test_a_video_of_480p_and_81_frames_has_32760_tokens():
    assert costs(PAPER.replace(num_frames=81, height=480, width=832)).num_tokens == 32_760
    assert costs(Recipe.load("rtn")).num_tokens == 0


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.load("rtn"),
        Recipe.load("rtn").replace(format="nvfp4", rank=4),
        Recipe.load("rtn").replace(format="int4", layers=(LayerRule("*.ffn.*", "16bit"),)),
        Recipe.load("rtn").replace(layers=(LayerRule("low_noise.*.ffn.*", rank=8), LayerRule("*.to_q", "int4", 3))),
    ],
    ids=["mxfp4", "nvfp4 with a branch", "int4 but for the wide layers", "ranks by layer"],
)
def test_the_size_of_a_quantized_component_is_known_before_it_is_written(recipe, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    quantizing.quantize(tmp_path / "model", tmp_path / "out", recipe, device="cpu")
    for denoiser, component in (("high_noise", "transformer"), ("low_noise", "transformer_2")):
        written = sum(file.stat().st_size for file in (tmp_path / "out" / component).glob("*.safetensors"))
        foreseen = DenoiserCosts(SourceModel.open(tmp_path / "model"), denoiser, recipe, 0, "cpu").output_bytes
        num_tensors = 200  # whose headers differ by some tens of bytes from what is reckoned
        assert abs(foreseen - written) < 64 * num_tensors


@pytest.mark.parametrize("name", ["default", "mxfp4", "int4"])
@pytest.mark.parametrize("by_bin", [{}, {"centred_by_bin": True}, {"centred_by_bin": True, "deflated_by_bin": True}])
def test_the_size_foreseen_counts_deflation_offset_and_a_wider_bias(name, by_bin, tmp_path, monkeypatch):
    monkeypatch.setattr("tempoquant.recipe.MOST_BY_BIN", math.inf)  # however narrow the layers
    recipe = Recipe.load(name).replace(
        rank=4, centring_by_bin="centred_by_bin" in by_bin, deflation_by_bin="deflated_by_bin" in by_bin
    )
    tiny_pipeline().save_pretrained(tmp_path / "model")
    num_bins = len(recipe.bin_fractions_of("high_noise")) + 1
    model, bins = tiny_wan(num_layers=1), TimestepBins(tuple(100.0 * i for i in range(1, num_bins)))
    layers = quantize_all(model, recipe.format, rank=4, bins=bins, **by_bin)
    folder = write_component(tmp_path / "component", model, layers, bins)
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    foreseen = DenoiserCosts(SourceModel.open(tmp_path / "model"), "high_noise", recipe, 0, "cpu").output_bytes
    assert abs(foreseen - written) < 64 * 200  # tensors, as above
    without = recipe.replace(deflation=False, centring=False, centring_by_bin=False, deflation_by_bin=False)
    plain = DenoiserCosts(SourceModel.open(tmp_path / "model"), "high_noise", without, 0, "cpu").output_bytes
    linears = list(layers.values())
    inputs, outputs = sum(x.in_features for x in linears), sum(x.out_features for x in linears)
    centred, deflated = (num_bins if key in by_bin else 1 for key in ("centred_by_bin", "deflated_by_bin"))
    branch = 2 * 4 * (inputs + outputs) * deflated - 2 * 4 * outputs
    headers = (
        foreseen - plain - (branch + 2 * inputs * centred + (2 if centred > 1 else 4) * outputs * centred - 2 * outputs)
    )
    assert 0 < headers < 2 * 300 * len(linears)


def test_hidden_states_are_those_of_all_samples_before_two_blocks():
    cost = costs()
    assert cost.hidden_bytes == 2 * 6 * cost.num_tokens * cost.width * 4
    assert costs(device="cuda").hidden_bytes == cost.hidden_bytes // 2  # bfloat16
    assert costs(Recipe.load("rtn")).hidden_bytes == 0


def test_a_linked_component_takes_no_disk():
    copied, linked = by_name(estimate_of()), by_name(estimate_of(link=True))
    others = sum(
        file.stat().st_size
        for name in ("vae", "text_encoder", "tokenizer", "scheduler")
        for file in (TINY / name).rglob("*")
        if file.is_file()
    )
    assert copied["write"].disk_gib - linked["write"].disk_gib == pytest.approx(others / GIB)
    assert copied["record"] == linked["record"]


def test_only_calls_that_there_are_count():
    # Two steps of each denoiser, two prompts, two guidance branches: eight calls at most.
    assert estimate_of(num_samples=dict.fromkeys(COMPONENTS, 10_000)) == estimate_of(
        num_samples=dict.fromkeys(COMPONENTS, 8)
    )
    assert estimate_of(num_samples=dict.fromkeys(COMPONENTS, 7)) != estimate_of(
        num_samples=dict.fromkeys(COMPONENTS, 8)
    )


def test_the_stages_are_those_of_the_run():
    assert list(by_name(estimate_of())) == ["record", "quantize high_noise", "quantize low_noise", "write"]
    assert next(iter(by_name(estimate_of(records=False)))) == "quantize high_noise"


def test_two_devices_share_the_time_and_add_their_memory():
    alone = estimate_of()
    together = estimate_of(devices=("cpu", "cpu"))
    first, second = by_name(alone)["quantize high_noise"], by_name(alone)["quantize low_noise"]
    recording, shared = by_name(alone)["record"], by_name(together)["record"]
    assert shared.peak_memory_gib == 2 * recording.peak_memory_gib
    assert shared.seconds < recording.seconds  # each reads the model, and makes one of the two videos
    saved = min(first.seconds, second.seconds) + recording.seconds - shared.seconds
    assert alone.total_seconds - together.total_seconds == pytest.approx(saved)
    assert together.peak_memory_gib >= first.peak_memory_gib + second.peak_memory_gib - 1e-9
    hidden_gib = costs().hidden_bytes / GIB  # of the other denoiser
    low_noise = by_name(alone)["quantize low_noise"].disk_gib
    assert by_name(together)["quantize low_noise"].disk_gib - low_noise == pytest.approx(hidden_gib)


def test_a_leaner_residency_takes_less_memory_to_record():
    peaks = [by_name(estimate_of(memory=memory))["record"].peak_memory_gib for memory in ("resident", "disk")]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[1]
    on_gpu = {"devices": ("cuda",), "gemm_rates": {"cuda": 1e14}}
    peaks = [by_name(estimate_of(memory=m, **on_gpu))["record"].peak_gpu_gib for m in ("resident", "swap", "disk")]
    assert peaks == sorted(peaks, reverse=True)


def test_without_a_rate_no_time_is_named_and_the_rest_is_the_same():
    run = estimate_of(gemm_rates=None)
    assert run.total_seconds is None and all(stage.seconds is None for stage in run.stages)
    assert run.peak_disk_gib == estimate_of().peak_disk_gib


def test_a_gpu_takes_the_computing_off_the_memory():
    cpu = by_name(estimate_of())["quantize high_noise"]
    gpu = by_name(estimate_of(devices=("cuda",), gemm_rates={"cuda": 1e14}))["quantize high_noise"]
    assert cpu.peak_gpu_gib == 0 < gpu.peak_gpu_gib
    assert gpu.peak_memory_gib < cpu.peak_memory_gib


@pytest.mark.parametrize("change", [{"gptq": False}, {"clip_ratios": ()}, {"rank": 0}, {"share_smoothing": True}])
def test_less_work_takes_less_time(change):
    assert estimate_of(PAPER.replace(**change)).total_seconds < estimate_of().total_seconds


def test_quantized_block_inputs_cost_another_pass():
    more = costs(PAPER.replace(block_inputs="quantized")).operations().forward
    assert more == pytest.approx(1.5 * costs().operations().forward)


def test_a_disk_with_too_little_room_is_refused_with_the_figures_and_the_remedy(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    asked: list[Path] = []

    def disk_usage(path):
        asked.append(Path(path))
        return usage(0, 0, 10 * GIB)

    monkeypatch.setattr(module.shutil, "disk_usage", disk_usage)
    folder = tmp_path / "not" / "yet" / "there"
    check_disk(folder, 10 * GIB)
    check_disk(folder, 12 * GIB, already_there_bytes=2 * GIB)
    with pytest.raises(OutputError, match=r"there needs 12\.5 GiB more and its disk has 10\.0 GiB free: .*--link"):
        check_disk(folder, 25 * GIB // 2)
    assert set(asked) == {tmp_path}


def test_the_disk_of_a_real_folder_is_asked(tmp_path):
    check_disk(tmp_path, 0)
    with pytest.raises(OutputError):
        check_disk(tmp_path, 2 * shutil.disk_usage(tmp_path).total)


def test_the_rate_of_products_is_measured_in_about_the_time_given():
    rate = measure_gemm_rate("cpu", torch.float32, seconds=0.01)
    assert 1e8 < rate < 1e15
