"""The plan command: tables for people, values for programs, and refusals."""

import io
import json

import pytest
from rich.console import Console

from tempoquant.cli.memory_table import Machine, recommendation
from tempoquant.cli.time_table import predicted_from, seconds, time_tables
from tempoquant.models.pipeline_configs import published_models, read_configs
from tempoquant.models.wan.pipelines import I2V_A14B
from tempoquant.planning.gpus import GPUS
from tempoquant.planning.measured_rates import measured_gpu
from tempoquant.planning.memory_plan import plan_memory
from tempoquant.recipe import Recipe
from tempoquant.report.time_bars import times_of
from tests.cli.typed import assert_refused, run, split


def test_plan_prints_every_phase_of_every_mode_and_recommends_one():
    result = run("plan", "tiny", *split("--size 64x64 --frames 9 --recipe tiny --gpu-gib 4"))
    assert result.exit_code == 0, result.output
    for words in ("text encoding", "high-noise denoising", "video decoding", "resident", "swap", "lean", "predicted",
                  "on a GPU of 4.0 GiB: --memory resident"):  # fmt: skip
        assert words in result.stdout


def test_plan_as_json_adds_up():
    result = run("plan", "tiny", *split("--size 64x64 --frames 9 --recipe tiny --gpu-gib 4 --json"))
    record = json.loads(result.stdout)
    assert (record["height"], record["num_frames"], record["kind"]) == (64, 9, "predicted")
    assert [model["label"] for model in record["models"]] == ["16-bit", "tiny"]
    for model in record["models"]:
        assert model["recommended"] == "resident"
        for mode in model["modes"]:
            peaks = {phase["name"]: phase["weights_bytes"] + phase["activations_bytes"] for phase in mode["phases"]}
            assert mode["peak_bytes"] == max(peaks.values()) == peaks[mode["deciding_phase"]]
    by_mode = [{mode["mode"]: mode["peak_bytes"] for mode in model["modes"]} for model in record["models"]]
    for mode, reduction in record["reduction"].items():
        assert reduction == pytest.approx(1 - by_mode[1][mode] / by_mode[0][mode])


SMALL = "--size 64x64 --frames 9 --recipe tiny"


def test_ram_decides_with_the_gpu_and_what_fits_nowhere_exits_with_1():
    result = run("plan", "tiny", *split(f"{SMALL} --time --gpu h100 --gpu-gib 4 --ram-gib 4"))
    assert result.exit_code == 0 and "on a GPU of 4.0 GiB and 4.0 GiB of RAM: --memory resident" in result.stdout
    assert "H100 SXM: predicted from datasheet rates; nothing was run" in " ".join(result.stdout.split())
    refused = run("plan", "tiny", *split(f"{SMALL} --ram-gib 2 --json"))
    record = json.loads(refused.stdout)
    assert refused.exit_code == 1 and record["ram_bytes"] == 2 * 2**30
    assert [each.get("recommended") for each in record["models"]] == [None, None]


@pytest.fixture(scope="module")
def timed() -> dict:
    """Return the predicted times of all GPUs in the table."""
    result = run("plan", "tiny", *split(f"{SMALL} --time --steps 5 --json"))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def text_of(record: dict) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=160)
    for table in time_tables(record):
        console.print(table)
    return stream.getvalue()


def test_the_times_in_the_table_are_those_of_the_json(timed):
    time = timed["time"]
    assert (time["num_steps"], time["calls_a_step"]) == (5, 2)
    [gpu] = [each for each in time["gpus"] if each["gpu"] == "RTX 4090"]
    assert [video["label"] for video in gpu["videos"]] == ["16-bit", "exact", "fast", "fastest"]
    shown = text_of({**timed, "time": {**time, "gpus": [gpu]}})
    assert gpu["kind"] == "predicted from datasheet rates; nothing was run" and gpu["kind"] in " ".join(shown.split())
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in shown.splitlines()]
    by_name = {row[0]: row[1:] for row in cells if len(row) == 5}
    for key, total, name in (("step", "step_seconds", "a step, mean"), ("phases", "video_seconds", "a video")):
        for index, video in enumerate(gpu["videos"]):
            assert by_name[name][index].startswith(seconds(video[total]))
            assert sum(part["seconds"] for part in video[key]) == pytest.approx(video[total])
            assert sum(part["share"] for part in video[key]) == pytest.approx(1)


def test_all_known_gpus_are_compared_and_the_report_reads_what_was_printed(timed):
    shown = text_of(timed)
    for gpu, figure in zip(timed["time"]["gpus"], times_of(timed).figures, strict=True):
        [row] = [line for line in shown.splitlines() if line.startswith(f"│ {gpu['gpu']} ")]
        assert figure.title == gpu["gpu"] in GPUS
        for bar, video in zip(figure.bars, gpu["videos"], strict=True):
            assert seconds(video["video_seconds"]) in row
            assert sum(each.seconds for each in bar.segments) == pytest.approx(video["video_seconds"]) == bar.seconds


def test_rates_that_were_measured_replace_the_datasheets(tmp_path):
    file = tmp_path / "first_day.jsonl"
    peaks = {"bytes_per_s": 3e12, "bf16_flops": 6e14, "fp8_flops": 1.2e15}
    steps = {"versions": {"gpu": "NVIDIA H100 80GB HBM3", "capability": [9, 0]}, "peaks": peaks}
    lines = [json.dumps({"step": step, "status": "done", "result": result}) for step, result in steps.items()]
    file.write_text("\n".join([*lines, '{"step": "cut o']))
    gpu = measured_gpu(file)
    assert (gpu.bytes_per_s, gpu.rates["bf16"], gpu.memory_gib) == (3e12, 6e14, 80)
    assert predicted_from(gpu.source) == "predicted from rates measured on NVIDIA H100 80GB HBM3; nothing was run"
    file.write_text("\n".join(lines).replace("H100 80GB HBM3", "H100 PCIe"))
    assert_refused(run("plan", "tiny", "--time", "--rates", file), 1, "say with --gpu which card stands for")
    assert measured_gpu(file, GPUS["H100 SXM"]).name == "NVIDIA H100 PCIe"
    file.write_text(lines[0])
    assert_refused(run("plan", "tiny", "--time", "--rates", file), 1, "holds no rates of a GPU")


def test_a_sentence_says_what_is_missing_of_which_memory():
    plan = plan_memory(read_configs("tiny"), I2V_A14B.replace(height=64, width=64, num_frames=9), Recipe.load("tiny"))
    said = recommendation(plan.quantized, Machine(2**30, 2**31))
    assert "no mode fits; " in said and " of the GPU in " in said
    assert " of RAM (3.0 GiB are reserved for the system)" in said


def test_a_gpu_that_multiplies_four_bits_expands_nothing_and_an_old_one_multiplies_two_bytes():
    flags = split("--size 64x64 --frames 9 --recipe tiny --json")
    records = [json.loads(run("plan", "tiny", *flags, "--compute-capability", each).stdout)
               for each in ("12.0", "9.0", "8.0")]  # fmt: skip
    assert [record["kernels"] for record in records] == ["fp4", "fp8", "bf16"]
    peaks = [next(phase["activations_bytes"] for phase in record["models"][1]["modes"][0]["phases"]
                  if phase["name"] == "high-noise denoising") for record in records]  # fmt: skip
    assert peaks[0] <= peaks[1] <= peaks[2]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("tiny --steps 4", 2, "--steps: these options need --time"),
        ("tiny --time --gpu voodoo", 1, "give one of RTX 3090"),
        ("tiny --time --compute-capability 7.5", 1, "no GPU of compute capability 7.5"),
        ("tiny --time --gpu h100 --compute-capability 9.0", 2, "both name a GPU"),
        ("tiny --time --rates nowhere.jsonl", 2, "does not exist"),
        ("nowhere", 1, "there is no model folder"),
        ("tiny --size 65x64", 1, "is a multiple of 16"),
        ("tiny --frames 8", 2, "is not of the form"),
        ("tiny --recipe unheard-of", 1, "unheard-of"),
        ("tiny --gpu-gib 0", 2, "gpu-gib"),
        ("tiny --compute-capability 12", 1, "no GPU of compute capability 12"),
    ],
)
def test_plan_refuses(flags, code, words):
    assert_refused(run("plan", *split(flags)), code, words)


@pytest.mark.parametrize(
    ("head_dim", "words"),
    [
        (
            12,
            "blocks.0.attn1.to_q of transformer has in_features = 24, which groups of 16 (nvfp4_m1) do not divide",
        ),
        (8, "rank 32 exceeds the smaller side of blocks.0.attn1.to_q of transformer, 16 × 16."),
    ],
)
def test_a_layer_that_no_recipe_fits_is_named_with_its_remedy(head_dim, words, tmp_path):
    for component, config in published_models()["wan2.1-t2v-1.3b"].models.items():
        (tmp_path / component).mkdir(exist_ok=True)
        changes = {"attention_head_dim": head_dim, "num_attention_heads": 2} if component == "transformer" else {}
        (tmp_path / component / "config.json").write_text(json.dumps({**config.config, **changes}))
    named = {name: model[:2] for name, model in published_models()["wan2.1-t2v-1.3b"].models.items()}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **named}))
    assert_refused(run("plan", tmp_path), 1, words)
