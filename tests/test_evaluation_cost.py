"""Laws of the plans for one machine and for many, and that the pages show what the commands
print.
"""

import itertools
import re
from pathlib import Path

import pytest

from benchmarks.evaluation_cost import SCORE_S, WRITE_S, text_of
from benchmarks.evaluation_operations import video_cost
from benchmarks.evaluation_scaling import Cluster, ModelLoad, model_loads, scale_plan, storage_gib
from benchmarks.evaluation_stages import (
    LATENT_BINS,
    LOAD_BYTES_PER_S,
    NUM_CALIBRATION_PROMPTS,
    PUBLISHED,
    Evaluated,
    model_gib,
    stages,
    take_bytes,
)
from benchmarks.hollow_pipeline import write_hollow_pipeline
from benchmarks.reproduce_plan import PUBLISHED as PROTOCOL
from benchmarks.scoring_time import scoring_row
from tempoquant.evaluate.plan import Plan
from tempoquant.models.pipeline_configs import read_configs
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.published import A14B
from tempoquant.planning.memory_plan import plan_memory
from tempoquant.recipe import Recipe

DOCS = Path(__file__).parent.parent / "docs"
CPU_S = (WRITE_S, SCORE_S)
WHAT = Evaluated(180, 3)


@pytest.mark.parametrize(("page", "table"), [("reproduce", "one-machine"), ("many_machines", "many-machines")])
def test_a_page_shows_what_the_command_prints(page, table):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- python -m benchmarks\.evaluation_cost {table} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert shown is not None and shown[1].strip() == text_of(table)


def test_the_plans_settings_are_those_of_the_script():
    words = dict(zip(PROTOCOL.sampling[::2], PROTOCOL.sampling[1::2], strict=True))
    assert words["--size"] == f"{PUBLISHED.height}x{PUBLISHED.width}"
    numbers = (PUBLISHED.num_frames, PUBLISHED.num_steps, PUBLISHED.flow_shift, PUBLISHED.guidance_scale)
    assert tuple(float(words[f"--{name}"]) for name in ("frames", "steps", "flow-shift", "guidance-scale")) == numbers
    assert PROTOCOL.num_calibrated == NUM_CALIBRATION_PROMPTS


def test_the_hollow_pipeline_has_the_real_one_s_size_and_takes_no_disk(tmp_path: Path):
    files = list(write_hollow_pipeline(tmp_path / "model").rglob("*.safetensors"))
    plan = plan_memory(read_configs(A14B), PUBLISHED, Recipe.load("paper"))
    headers = 2**20  # of a few thousand tensors
    assert 0 <= sum(file.stat().st_size for file in files) - plan.sixteen_bit.disk < headers
    assert sum(512 * file.stat().st_blocks for file in files) < 2**23


def test_a_take_has_a_latent_for_each_bin_of_the_published_steps(tmp_path: Path):
    model = write_hollow_pipeline(tmp_path / "model")
    plan = Plan.of(SourceModel.open(model), (), (42,), PUBLISHED, "cpu")
    assert len(plan.bin_names) == LATENT_BINS
    assert take_bytes(PUBLISHED)["latents"] == LATENT_BINS * 16 * 16 * 60 * 104 * 4


def test_files_of_a_take_are_no_larger_than_planned():
    found, planned = scoring_row(64, 96, 5), take_bytes(PUBLISHED.replace(height=64, width=96, num_frames=5))
    assert found["lossless_bytes"] < planned["lossless"] == found["raw_bytes"]
    assert found["latents_bytes"] == planned["latents"]
    assert found["score_s"] > 0 and found["write_s"] > 0


def test_recording_block_by_block_trades_hours_for_memory():
    record = stages(Evaluated(1), SCORE_S)[0]
    assert record.gpu_gib["resident"] > record.gpu_gib["swap"] > record.gpu_gib["lean"]
    assert record.hours["resident"] == record.hours["swap"] < record.hours["lean"]


def test_generating_takes_as_long_as_its_videos():
    by_name = {stage.name: stage for stage in stages(Evaluated(7, 2), SCORE_S)}
    cost = video_cost(PUBLISHED)
    assert by_name["generate, 16-bit"].hours["swap"] == pytest.approx(14 * cost.seconds_16bit / 3600)
    assert by_name["generate, `paper`"].hours["swap"] == pytest.approx(14 * cost.seconds_4bit / 3600)
    assert by_name["measure, one core"].hours["swap"] == pytest.approx(2 * 14 * SCORE_S / 3600)


def test_a_cluster_counted_by_hand():
    """Five videos of one 16-bit and one 4-bit model on two GPUs of one node: three rounds, the last
    with one idle.
    """
    loads = [ModelLoad("16-bit", 20 * 10**9, 0, 0), ModelLoad("ours", 0, round(7 * LOAD_BYTES_PER_S), 0)]
    plan = scale_plan(Evaluated(5), Cluster(2), loads, (1.0, 2.0))
    cost = video_cost(PUBLISHED)
    seconds = cost.seconds_16bit + cost.seconds_4bit + 2.0
    assert plan.load * 3600 == pytest.approx(10 + 7)  # 20 GB at 2 GB/s, and casting
    assert plan.generate * 3600 == pytest.approx(2.5 * seconds)
    assert (plan.generate + plan.tail) * 3600 == pytest.approx(3 * seconds)
    assert (plan.measure_alone * 3600, plan.measure_spread * 3600) == (pytest.approx(10.0), pytest.approx(6.0))


def test_more_gpus_are_never_slower_but_for_the_shared_folder():
    loads = model_loads(WHAT)
    plans = [scale_plan(WHAT, Cluster(gpus), loads, CPU_S) for gpus in (1, 2, 8, 64, 540)]
    for fewer, more in itertools.pairwise(plans):
        assert more.generate + more.tail < fewer.generate + fewer.tail
        assert more.measure_alone == fewer.measure_alone and more.load >= fewer.load


def test_more_gpus_than_videos_do_nothing():
    plans = [scale_plan(WHAT, Cluster(gpus), model_loads(WHAT), CPU_S) for gpus in (540, 1080)]
    assert plans[0].generate + plans[0].tail == pytest.approx(plans[1].generate + plans[1].tail)


def test_storage_is_takes_times_files():
    assert sum(storage_gib(WHAT, 3).values()) == pytest.approx(1620 * sum(take_bytes(PUBLISHED).values()) / 2**30)
    assert 117 < model_gib() < 118
