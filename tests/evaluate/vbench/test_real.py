"""VBench itself, in its own environment: temporal flickering needs no weights, and all of its code
has to import.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.vbench_flickering import TOLERANCE, compare, made_clips
from tempoquant.evaluate.evaluation_folder import EvaluationFolder, Take
from tempoquant.evaluate.metrics.video_metrics import temporal_flickering
from tempoquant.evaluate.vbench.dimensions import DIMENSIONS
from tempoquant.evaluate.vbench.scores import score_missing
from tempoquant.evaluate.vbench.settings import VBenchSettings, check_vbench, runner_command, runner_environment
from tempoquant.progress import SILENT
from tests.evaluate.real_vbench import vbench_python
from tests.evaluate.vbench_folder import LABELS, noise, plan_of, write_takes

ROOT = Path(__file__).parents[3]
TEXTS = {name: f"A picture of {name}." for name in ("rain", "snow", "fog")}
FLICKERING = ("temporal_flickering",)


@pytest.fixture(scope="module")
def settings():
    return VBenchSettings(vbench_python(), FLICKERING)


@pytest.fixture(scope="module")
def vbench(settings):
    return check_vbench(settings, "cpu")


def test_the_pinned_version_is_what_answers(vbench):
    assert vbench.versions["vbench"] == "0.1.5" and vbench.device == "cpu"


def test_the_code_of_every_dimension_can_be_imported(settings, tmp_path):
    """overall_consistency looks for its vocabulary when it is imported, and would download it."""
    for weight in DIMENSIONS["overall_consistency"].weights:
        weight.place(tmp_path).parent.mkdir(parents=True, exist_ok=True)
        weight.place(tmp_path).touch()
    environment = runner_environment(VBenchSettings(settings.python, FLICKERING, tmp_path), "cpu")
    done = subprocess.run(
        runner_command(settings, "check", *DIMENSIONS), env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["dimensions"] == {}


def test_our_flickering_of_frames_is_vbenchs_of_the_same_frames(vbench):
    generator = np.random.default_rng(1)
    walk = np.cumsum(generator.normal(0, 3, (9, 48, 80, 3)), axis=0) + 128
    clips = {**made_clips(), "random walk": walk.clip(0, 255).astype(np.uint8)}
    rows = {row.clip: row for row in compare(vbench, clips)}
    assert [row.clip for row in rows.values() if abs(row.lossless - row.ours) > TOLERANCE] == []
    # Against formulas that agree on everything: these clips differ, and H.264 is not lossless.
    assert rows["still gradient"].ours == 1.0 and 0.6 < rows["uniform noise"].ours < 0.7
    assert abs(rows["uniform noise"].h264 - rows["uniform noise"].ours) > 1e-3


def test_flickering_is_scored_through_the_whole_adapter(vbench, tmp_path):
    folder = write_takes(tmp_path / "out", list(TEXTS), noise)
    scores, failures = score_missing(folder, plan_of(TEXTS), LABELS, vbench, SILENT)
    assert failures == []
    found = scores["temporal_flickering"]
    assert set(found) == {Take(label, id, 0) for label in LABELS for id in TEXTS}
    for take, score in found.items():
        assert score == pytest.approx(temporal_flickering(noise(take)), abs=0.1)  # H.264 smooths noise
        assert 0.5 < score < 1
    assert len(set(found.values())) == len(found)


def test_weights_that_are_no_weights_fail_with_vbenchs_own_reason_and_download_nothing(settings, tmp_path):
    weight = DIMENSIONS["dynamic_degree"].weights[0]
    weight.place(tmp_path).parent.mkdir(parents=True)
    weight.place(tmp_path).write_bytes(b"no weights")
    broken = check_vbench(VBenchSettings(settings.python, ("dynamic_degree",), tmp_path), "cpu")
    folder = write_takes(tmp_path / "out", ["rain"], noise)
    scores, failures = score_missing(folder, plan_of({"rain": "Rain."}), LABELS, broken, SILENT)
    assert scores == {"dynamic_degree": {}}
    assert [failure.take for failure in failures] == [None] and "pickl" in failures[0].why.lower()


def test_a_killed_run_scores_the_rest_and_nothing_twice(settings, tmp_path):
    """Killed after two of six scores, in a process of its own."""
    write_takes(tmp_path / "out", list(TEXTS), noise)
    program = f"{sys.executable} -m tests.evaluate.vbench.test_real {tmp_path / 'out'}".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([*program, "2"], cwd=ROOT, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    scores = tmp_path / "out" / "vbench" / "scores.jsonl"
    first = scores.read_text()
    assert len(first.splitlines()) == 2
    subprocess.run([*program, "100"], cwd=ROOT, env=environment, check=True)
    lines = scores.read_text().splitlines()
    assert scores.read_text().startswith(first) and len(lines) == len(set(lines)) == 6


def _score_and_die(out: Path, num_scores: int) -> None:
    """Score everything in a folder of `write_takes`; SIGKILL after so many scores."""

    class Counting:
        def start(self, description, total, done=0):
            return self.count

        def count(self):
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)

    counting = Counting()
    counting.left = num_scores
    vbench = check_vbench(VBenchSettings(vbench_python(), FLICKERING), "cpu")
    score_missing(EvaluationFolder(out), plan_of(TEXTS), LABELS, vbench, counting)


if __name__ == "__main__":
    _score_and_die(Path(sys.argv[1]), int(sys.argv[2]))
