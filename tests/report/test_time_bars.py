"""Bars of predicted times: each is as long as its seconds, and the page says them in words too."""

import json

import pytest

from tempoquant.errors import EvaluationError
from tempoquant.report.build import build_report
from tempoquant.report.time_bars import BAR, GAP, LEFT, RIGHT, SEGMENTS, WIDTH, times_of
from tests.report.test_build import write_document


def part(name: str, seconds: float) -> dict:
    return {"name": name, "seconds": seconds}


def video(label: str, linears: float, sampler: float, texts: float) -> dict:
    denoising = 10 * (linears + sampler)
    return {
        "label": label,
        "skipping": f"{label} <computes> every step.",
        "video_seconds": denoising + texts,
        "step": [part("linears", linears), part("elementwise", 0.0), part("guidance and sampler", sampler)],
        "phases": [part("text encoding", texts), part("denoising", denoising)],
    }


def record(*gpus: dict) -> dict:
    time = {"num_steps": 10, "calls_a_step": 2, "gpus": list(gpus)}
    return {"model": "a model", "height": 64, "width": 96, "num_frames": 9, "time": time}


KIND = "predicted from datasheet rates; nothing was run"
GPU = {
    "gpu": "One & Only",
    "kind": KIND,
    "does_not_fit": {},
    "videos": [video("16-bit", 3.0, 0.5, 5.0), video("fast", 1.0, 0.5, 5.0)],
}
SMALL = {"gpu": "Small", "kind": KIND, "does_not_fit": {"16-bit": "no mode fits."}, "videos": []}


def test_a_bar_is_as_long_as_its_seconds_and_its_parts_fill_it():
    times = times_of(record(GPU, SMALL))
    [figure] = times.figures
    slow, fast = figure.bars
    assert [each.seconds for each in (slow, fast)] == [40.0, 20.0]
    for bar in (slow, fast):
        assert sum(each.seconds for each in bar.segments) == pytest.approx(bar.seconds)
        assert sum(each.width for each in bar.segments) == pytest.approx((WIDTH - LEFT - RIGHT) * bar.seconds / 40)
        for before, after in zip(bar.segments, bar.segments[1:], strict=False):
            assert after.x == pytest.approx(before.x + before.width) and after.index > before.index
        assert [each.name for each in bar.segments] == ["linears", *SEGMENTS[-2:]]
    assert fast.y - slow.y == BAR + GAP and figure.height == fast.y + BAR + GAP
    assert times.notes[-1] == "no mode fits." and len(times.notes) == 3


def test_the_page_shows_where_time_goes_and_texts_stay_texts(evaluation, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(record(GPU)))
    build_report([evaluation], tmp_path / "report.html", budget_mib=0, times=file)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"a model, 64 × 96, 9 frames, 10 steps of 2 calls. Nothing was run: {KIND}." in page
    assert "One &amp; Only, predicted. 16-bit: 40 s, of which linears 30 s" in page
    assert page.count('<rect class="segment m1"') == 2 and "&lt;computes&gt;" in page


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"time": {}}', json.dumps(record({"gpu": "x"}))])
def test_another_file_is_refused_before_anything_is_written(text, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(text)
    folder = write_document(tmp_path / "out", {})
    with pytest.raises(EvaluationError, match="is not what `tempoquant plan MODEL --time --json` prints"):
        build_report([folder], tmp_path / "report.html", times=file)
    assert not (tmp_path / "report.html").exists()
