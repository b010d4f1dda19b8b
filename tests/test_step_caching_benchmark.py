"""Laws of the benchmark of caches: rows compare with the same items, and are not measured twice."""

import json

import pytest
import torch

from benchmarks.step_caching import _rows, candidates, draw, row
from tempoquant.acceleration.speeds import DEFAULTS


def results(factor: float, seconds: float) -> list[dict[str, object]]:
    return [
        {"latent": factor * torch.arange(1.0, 9.0), "seconds": seconds, "processor_s": seconds, "denoising_s": seconds,
         "followed": True, "kept": index > 0}
        for index in range(5)
    ]  # fmt: skip


def test_a_run_that_changed_nothing_has_no_decibels_and_a_tenth_of_error_has_20():
    plain = results(1.0, 4.0)
    assert row("none", plain, plain)["final_latent_db"] is None
    found = row("other", results(1.1, 2.0), plain)
    assert found["final_latent_db"] == pytest.approx(20.0, abs=1e-4)
    assert found["times_as_fast"] == {"denoising_s": 2.0, "processor_s": 2.0, "seconds": 2.0}
    assert (found["followed_percent"], found["kept_percent"]) == (100, 80)


def test_every_speed_with_a_cache_is_among_the_candidates():
    caches = {defaults.cache for defaults in DEFAULTS.values() if defaults.cache is not None}
    assert caches <= set(candidates())


def test_rows_of_another_model_or_count_are_measured_again_and_the_rest_is_drawn(tmp_path):
    file = tmp_path / "rows.jsonl"
    common = {"final_latent_db": 50.0, "skipped_percent": 40.0}
    lines = [{"model": model, "num_items": count, "cache": str(DEFAULTS["fast"].cache), **common}
             for model, count in (("tiny", 6), ("other", 6), ("tiny", 7))]  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = _rows(file, "tiny", 6)
    assert found == {str(DEFAULTS["fast"].cache): lines[0]}
    pytest.importorskip("matplotlib")
    draw(list(found.values()), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
