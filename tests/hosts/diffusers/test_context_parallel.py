"""A quantized denoiser computes the same when two processes share its tokens (Ulysses attention,
gloo).
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.quantized_wan import load, quantize_all, run, tiny_wan, write_component

ROOT = Path(__file__).parents[3]

PROCESS = """
import sys
from unittest import mock

import torch
from diffusers import ContextParallelConfig
from safetensors.torch import save_file

from tempoquant.hosts.diffusers.loader import register
from tests.quantized_wan import load, run

register()
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = load(sys.argv[1])
with mock.patch("torch.accelerator.device_count", lambda: 2):  # diffusers maps ranks to devices, also on a CPU
    model.set_attention_backend("native")
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
y = run(model, timestep=930.0)
if rank == 0:
    save_file({"y": y.contiguous()}, sys.argv[2])
torch.distributed.destroy_process_group()
"""


def test_two_processes_that_share_the_tokens_give_the_result_of_one(tmp_path: Path) -> None:
    model = tiny_wan(num_layers=1)
    folder = write_component(tmp_path / "component", model, quantize_all(model, "mixed", centred_by_bin=True))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
                   "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}  # fmt: skip
    command = [sys.executable, "-c", PROCESS, str(folder), str(tmp_path / "y.safetensors")]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)[-3000:]
    alone = run(load(folder), timestep=930.0)
    together = load_file(tmp_path / "y.safetensors")["y"]
    # Attention sums in another order, in bfloat16, and a number near a tie may round the other way
    # after it.
    assert float((together - alone).float().norm() / alone.float().norm()) < 0.01
