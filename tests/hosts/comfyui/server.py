"""A running ComfyUI server with the node pack, and workflows as its frontend sends them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.hosts.comfyui.real import COMFYUI_PATH

ROOT = Path(__file__).parents[3]
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


class Server:
    """A server's address, and its requests."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> Any:
        """Return a JSON answer."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=60) as answer:
            return json.load(answer)

    def run(self, prompt: dict[str, Any], timeout_s: float = 600) -> dict[str, Any]:
        """Queue a prompt and wait for its history."""
        body = json.dumps({"prompt": prompt}).encode()
        request = urllib.request.Request(f"{self.url}/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:2000]) from error
        until = time.monotonic() + timeout_s
        while number not in (history := self.get(f"history/{number}")):
            assert time.monotonic() < until, "the prompt did not end"
            time.sleep(0.5)
        return history[number]

    def prompt_of(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Return the frontend's request for a saved workflow: widgets by name, links by node and
        output.
        """
        links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
        prompt = {}
        for node in workflow["nodes"]:
            taken = self.get(f"object_info/{node['type']}")[node["type"]]["input"]
            linked = {each["name"]: links[each["link"]] for each in node["inputs"] if each.get("link") is not None}
            values, inputs = iter(node.get("widgets_values") or ()), {}
            for name, (form, *options) in {**taken["required"], **taken.get("optional", {})}.items():
                if isinstance(form, list) or form in WIDGETS:
                    inputs[name] = next(values)
                    more = options[0] if options else {}
                    if more.get("control_after_generate") or more.get("image_upload"):
                        next(values)
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": {**inputs, **linked}}
        return prompt


@contextlib.contextmanager
def serving(base: Path) -> Iterator[Server]:
    """Serve models, nodes and outputs below `base`, with this pack and the nodes of tests."""
    for name in (
        "custom_nodes",
        "input",
        "output",
        "user",
        "models/diffusion_models",
        "models/tempoquant",
        "models/loras",
    ):
        (base / name).mkdir(parents=True, exist_ok=True)
    for name, target in (("comfyui-tempoquant", ROOT / "comfyui"), ("tiny", Path(__file__).parent / "tiny_nodes")):
        (base / "custom_nodes" / name).symlink_to(target)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch", "--disable-api-nodes",
                 "--base-directory", str(base), "--database-url", "sqlite:///:memory:"]  # fmt: skip
    log = (base / "server.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "main.py", *arguments], cwd=COMFYUI_PATH, stdout=log, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    server = Server(port)
    try:
        for _ in range(180):
            assert process.poll() is None, (base / "server.log").read_text()
            with contextlib.suppress(OSError):
                server.get("object_info/TempoQuantInfo")
                break
            time.sleep(1)
        yield server
    finally:
        process.terminate()
        process.wait(30)
        log.close()
