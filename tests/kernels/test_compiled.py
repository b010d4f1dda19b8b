"""Every kernel compiles for every GPU generation it is for, and on Hopper none runs out of
registers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent.parent


def table(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Return the rows of compile_all, run where Triton compiles and does not interpret."""
    file = folder / "table.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-m", "tests.kernels.compile_all", "--json", str(file), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert file.exists(), done.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    assert rows and {row["name"]: row["error"] for row in rows if row["error"]} == {}
    return rows


@pytest.mark.timeout(1200)
def test_for_hopper_every_kernel_compiles_and_spills_no_register(tmp_path: Path) -> None:
    rows = table(tmp_path, "--capability", "90")
    assert {row["name"]: row["spilled"] for row in rows if row["spilled"]} == {}
    assert {row["name"].split(":")[0] for row in rows} >= {
        "expand",
        "quantize",
        "outside",
        "fp8",
        "bf16",
        "int8",
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_for_the_other_generations_kernels_compile_and_fp8_starts_with_ada(tmp_path: Path) -> None:
    """A few kernels of each module are compiled; `python -m tests.kernels.compile_all` compiles
    all.
    """
    only = ("expand: fp8 nvfp4_m1", "expand: int8", "nvfp4_m1, rank 32", "fp8 mxfp4, rank 32", "1 tokens, rank 32")
    rows = table(tmp_path, "--capability", "80", "89", "100", "120", "--only", *only)
    assert {row["capability"] for row in rows} == {80, 89, 100, 120}
    on_ampere = [row["name"] for row in rows if row["capability"] == 80]
    assert on_ampere and not [name for name in on_ampere if "fp8" in name]
