import io
import json

from rich.console import Console

from tempoquant.cli.plan_table import plan_record, plan_table
from tempoquant.planning.run_estimate import RunEstimate, StageEstimate

STAGES = (
    StageEstimate("record", 90.0, 60.0, 0.0, 1.0),
    StageEstimate("quantize high_noise", 7200.0, 6.0, 0.0, 30.0),
    StageEstimate("quantize low_noise", 3600.0, 5.0, 0.0, 38.5),
    StageEstimate("write", 30.0, 0.7, 0.0, 28.0),
)


def text_of(estimate: RunEstimate) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100).print(plan_table(estimate))
    return stream.getvalue()


def test_a_row_says_what_a_stage_needs_and_the_last_one_what_all_do():
    lines = text_of(RunEstimate(STAGES, side_by_side=False)).splitlines()
    row = next(line for line in lines if "quantize high_noise" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        "quantize high_noise", "2 h 0 min", "6.0 GiB", "30.0 GiB",
    ]  # fmt: skip
    total = [cell.strip() for cell in lines[-2].strip("│ ").split("│")]
    assert total == ["all", "3 h 2 min", "60.0 GiB", "38.5 GiB"]


def test_experts_side_by_side_take_the_time_of_the_slower_one():
    assert "2 h 2 min" in text_of(RunEstimate(STAGES, side_by_side=True))


def test_gpu_memory_has_a_column_where_a_gpu_computes():
    assert "GPU" not in text_of(RunEstimate(STAGES, side_by_side=False))
    on_gpu = (*STAGES[:1], StageEstimate("quantize high_noise", 60.0, 1.0, 23.4, 30.0))
    assert text_of(RunEstimate(on_gpu, side_by_side=False)).count("23.4 GiB") == 2


def test_a_time_that_is_unknown_is_no_number():
    unknown = RunEstimate((StageEstimate("write", None, 0.7, 0.0, 28.0),), side_by_side=False)
    assert "–" in text_of(unknown)
    assert plan_record(unknown)["total_seconds"] is None


def test_the_record_is_plain_json():
    record = json.loads(json.dumps(plan_record(RunEstimate(STAGES, side_by_side=True))))
    assert record["total_seconds"] == 7320.0 and record["peak_disk_gib"] == 38.5
    assert [stage["name"] for stage in record["stages"]] == [stage.name for stage in STAGES]
