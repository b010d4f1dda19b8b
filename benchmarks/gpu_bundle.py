"""A folder for a GPU machine without package registries: `benchmarks.gpu_first_day` and its
requirements.

    python -m benchmarks.gpu_bundle build/gpu-bundle

The machine has Python 3.12 on x86-64, PyTorch, Triton, transformers and pytest. The folder holds
wheels of this project and of its other requirements (in the versions installed here), the
benchmarks, and the tests. There, `sh run.sh [SECONDS]` installs the wheels into the folder and runs
all steps; results are appended to first_day.jsonl.
"""

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST_BYTES = 60 * 10**6
CARRIED = (
    "diffusers",
    "tomli-w",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "ftfy",
    "wcwidth",
    "importlib-metadata",
)
"""imageio-ffmpeg is left out, which is large and only writes videos."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
COPIED = ("benchmarks", "tests", "pyproject.toml")

RUN = """#!/bin/sh
# Installs the carried wheels into this folder and runs every step; the same command goes on where it was cut.
set -e
cd "$(dirname "$0")"
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target site wheels/*.whl
export PYTHONPATH="$PWD/site:$PWD"
exec python3 -m benchmarks.gpu_first_day --json "${2:-first_day.jsonl}" --seconds "${1:-560}"
"""


def build(folder: Path) -> int:
    """Make the folder anew; return its bytes. Raises subprocess.CalledProcessError if pip fails."""
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(wheels), str(ROOT)], check=True)
    platforms = [flag for platform in PLATFORMS for flag in ("--platform", platform)]
    subprocess.run(
        [
            *pip,
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version",
            "3.12",
            "--implementation",
            "cp",
            *platforms,
            "-d",
            str(wheels),
            *[f"{name}=={importlib.metadata.version(name)}" for name in CARRIED],
        ],
        check=True,
    )
    copy_files(folder)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def copy_files(folder: Path) -> None:
    """Copy the files outside packages: benchmarks, tests, and the script that runs them."""
    for name in COPIED:
        place = ROOT / name
        if place.is_dir():
            shutil.copytree(place, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(place, folder / name)
    (folder / "run.sh").write_text(RUN, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    num_bytes = build(arguments.folder)
    print(f"{arguments.folder}: {num_bytes / 1e6:.1f} MB; at most {MOST_BYTES / 1e6:.0f} MB are allowed.")
    return 0 if num_bytes < MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
