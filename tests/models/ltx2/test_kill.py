"""Runs on LTX-2 and by the generic family that are killed end with the bytes of those that were
not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, signal, sys
from pathlib import Path
from tempoquant import Recipe
from tempoquant.models.with_experts import GenericModel
from tempoquant.quantizing import quantize

class Killing:
    def __init__(self, after): self.left = after
    def start(self, description, total, done=0):
        return self.advance if description.startswith("Blocks finished") else lambda: None
    def advance(self):
        self.left -= 1
        if not self.left: os.kill(os.getpid(), signal.SIGKILL)

source, output, family, after = sys.argv[1:]
recipe = Recipe.load("default").replace(rank=4, num_prompts=2, samples_per_denoiser=4)
model = GenericModel(source) if family == "generic" else source
prompts = Path(source).parent / "prompts.jsonl"
quantize(model, output, recipe, calibration=prompts, device="cpu", progress=Killing(int(after)))
"""


def _run(source: Path, output: Path, family: str, kill_after: int) -> int:
    """Quantize in a process of its own; the process's return code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(source), str(output), family, str(kill_after)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=280, check=False).returncode


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("module", "name", "family"), [("ltx2", "ltx2", ""), ("image", "flux", "generic")])
def test_a_killed_run_ends_as_the_undisturbed_one(tmp_path: Path, module: str, name: str, family: str) -> None:
    from tests import image_pipelines, ltx2_pipelines

    source = {"ltx2": ltx2_pipelines, "image": image_pipelines}[module].write(tmp_path / "source", name)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog walks"}\n')
    assert _run(source, tmp_path / "whole", family, 0) == 0
    assert _run(source, tmp_path / "killed", family, 1) == -9
    assert not (tmp_path / "killed").exists() or not any((tmp_path / "killed").iterdir())
    assert _run(source, tmp_path / "killed", family, 0) == 0
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")
