"""Runs on HunyuanVideo-1.5 and MiniMax-H3 that are killed end with the bytes of those that were
not.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests import hunyuan_pipelines, minimax_pipeline

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, signal, sys
from pathlib import Path
from tempoquant import Recipe
from tempoquant.quantizing import quantize
from tests.hunyuan_pipelines import short_texts

class Killing:
    def __init__(self, after): self.left = after
    def start(self, description, total, done=0):
        return self.advance if description.startswith("Blocks finished") else lambda: None
    def advance(self):
        self.left -= 1
        if not self.left: os.kill(os.getpid(), signal.SIGKILL)

source, output, after = sys.argv[1:]
recipe = Recipe.load("default").replace(rank=4, num_prompts=2, samples_per_denoiser=4)
prompts = Path(source).parent / "prompts.jsonl"
with short_texts():
    quantize(source, output, recipe, calibration=prompts, device="cpu", progress=Killing(int(after)))
"""


def _run(source: Path, output: Path, kill_after: int) -> int:
    """Quantize in a process of its own; the process's return code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(source), str(output), str(kill_after)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=280, check=False).returncode


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "write",
    [partial(hunyuan_pipelines.write, name="text_to_video"), minimax_pipeline.write],
    ids=["HunyuanVideo-1.5", "MiniMax-H3"],
)
def test_a_killed_run_ends_as_the_undisturbed_one(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    source = write(tmp_path / "source")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog walks"}\n')
    assert _run(source, tmp_path / "whole", 0) == 0
    assert _run(source, tmp_path / "killed", 1) == -9
    assert not (tmp_path / "killed").exists() or not any((tmp_path / "killed").iterdir())
    assert _run(source, tmp_path / "killed", 0) == 0
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")
