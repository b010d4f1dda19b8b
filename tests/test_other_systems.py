"""Windows and macOS, as far as Linux can stand in: what they lack is taken away first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import builtins, contextlib, importlib, io, os, pkgutil, platform, signal, sys
from pathlib import Path

system, folder = sys.argv[1], Path(sys.argv[2])
# Other people's code knows these systems: it is imported before they are pretended.
import diffusers, filelock, huggingface_hub, imageio, multiprocessing.connection, scipy.linalg, skimage, torch
with contextlib.suppress(ModuleNotFoundError):
    import ray, ray._private.worker, ray.util.state
import torch._dynamo, torch._inductor, torch.utils.cpp_extension, transformers, typer
from tests.quantized_wan import tiny_pipeline
tiny_pipeline().save_pretrained(folder / "model")
platform.uname()

NOT_THERE = {"triton"}
LACKS = ["sched_getaffinity", "memfd_create", "posix_fadvise", "posix_fallocate"]
if system == "win32":
    NOT_THERE |= {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"}
    LACKS += ["fork", "sysconf", "getuid", "geteuid", "uname", "pread", "pwrite", "chown", "getpgid",
              "killpg", "setsid", "nice", "mkfifo", "fchmod", "getloadavg", "sync"]
    for name in ("SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1"):
        delattr(signal, name)
for name in LACKS:
    if hasattr(os, name):
        delattr(os, name)
for name in NOT_THERE:
    sys.modules[name] = None  # to import it raises ModuleNotFoundError
sys.platform = system
platform.system = lambda: {"win32": "Windows", "darwin": "Darwin"}[system]
plain_open = io.open


def without_proc(file, *arguments, **named):
    if str(file).startswith(("/proc", "/sys", "/dev/shm")):
        raise FileNotFoundError(2, "there is no such folder on this system", str(file))
    return plain_open(file, *arguments, **named)


builtins.open = io.open = without_proc

import tempoquant
for module in pkgutil.walk_packages(tempoquant.__path__, "tempoquant."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            optional = {"triton": "kernels.", "ray": "engines.ray_", "comfy": "hosts.comfyui."}
            place = optional.get(error.name.partition(".")[0])
            assert place and module.name.startswith(f"tempoquant.{place}"), f"{module.name}: {error}"

from typer.testing import CliRunner
from tempoquant.cli import app


def run(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exit_code:
        raise SystemExit(f"{words[0]}: {done.output}\\n{done.exception!r}")
    return done.stdout


for name, text in (("seen", "a cat walks"), ("unseen", "a cat")):
    (folder / f"{name}.jsonl").write_text(f'{{"prompt": "{text}", "image": "{name}.png"}}\\n')
from PIL import Image
Image.new("RGB", (16, 16), "red").save(folder / "seen.png")
Image.new("RGB", (16, 16), "blue").save(folder / "unseen.png")
run("quantize", folder / "model", "-o", folder / "out", "--calibration", folder / "seen.jsonl", "--num-prompts", 1,
    "--steps", 2, "--frames", 5, "--size", "16x16", "--rank", 2, "--json-log", folder / "log.jsonl")
run("inspect", folder / "out", "--verify")
run("compare", folder / "model", folder / "out", "--samples-from", folder / "unseen.jsonl", "--samples", 1,
    "--steps", 2, "--frames", 5, "--size", "32x32")
assert run("doctor")
run("export", folder / "out", "--to", "comfyui", "-o", folder / "comfyui")
print("all used")
"""


@pytest.mark.parametrize("system", ["win32", pytest.param("darwin", marks=pytest.mark.slow)])
def test_everything_imports_and_the_reference_runs_without_what_another_system_lacks(
    system: str, tmp_path: Path
) -> None:
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, system, str(tmp_path)], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("all used\n"), done.stdout + done.stderr
