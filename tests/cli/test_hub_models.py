"""Every command that takes a model takes the hub id of one: a table over the whole command line."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tempoquant.cli import app
from tempoquant.cli.source_options import places_of
from tests.cli.typed import run
from tests.hub_server import HubServer, point_here, serve
from tests.quantized_wan import tiny_pipeline

QUANTIZED, SOURCE, MISSING = "someone/quantized", "someone/source", "nobody/nothing"
ASIDE = {"demo", "doctor", "report", "publish"}
"""Commands that take bundled models alone, evaluations, or a folder that is to be uploaded."""

COMMANDS = {
    "plan": ("plan", "MODEL", "--size", "32x32", "--frames", "5"),
    "inspect": ("inspect", "MODEL", "--verify"),
    "export": ("export", "MODEL", "--to", "comfyui", "-o", "OUT"),
    "generate": ("generate", "MODEL", "--prompt", "a cat walks", "--image", "IMAGE", "--size", "16x16", "--frames", "5",
                 "--steps", "2", "-o", "OUT.mp4"),
    "quantize": ("quantize", "MODEL", "-o", "OUT", "--recipe", "rtn"),
    "record": ("record", "MODEL", "-o", "OUT", "--calibration", "PROMPTS", "--prompts", "1", "--steps", "2", "--size",
               "16x16", "--frames", "5"),
    "sensitivity": ("sensitivity", "MODEL", "--store", "STORE"),
    "compare": ("compare", "tiny", "MODEL", "--samples", "1"),
    "evaluate": ("evaluate", "tiny", "MODEL", "--benchmark", "tiny", "-o", "OUT"),
}  # fmt: skip
RUN = {"plan": QUANTIZED, "inspect": QUANTIZED, "export": QUANTIZED, "generate": QUANTIZED, "quantize": SOURCE}
"""Commands that are run whole here. The others open models by the same function."""


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def hub(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with serve() as found:
        found.add(QUANTIZED, files_of(pipeline))
        source = tmp_path_factory.mktemp("source") / "model"
        tiny_pipeline().save_pretrained(source)
        found.add(SOURCE, files_of(source))
        yield found


@pytest.fixture(autouse=True)
def here(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    point_here(monkeypatch, hub, tmp_path / "cache")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat walks", "image": "first.png"}\n')
    return tmp_path


def typed(command: str, model: str, here: Path, image: Path) -> list[str]:
    names = {"MODEL": model, "OUT": str(here / "out"), "OUT.mp4": str(here / "out.mp4"), "IMAGE": str(image),
             "PROMPTS": str(here / "prompts.jsonl"), "STORE": str(here / "store")}  # fmt: skip
    return [names.get(word, word) for word in COMMANDS[command]]


def test_the_table_has_every_command() -> None:
    assert {each.name for each in app.registered_commands} - ASIDE == set(COMMANDS)


@pytest.mark.parametrize("command", RUN)
def test_a_command_takes_a_hub_id(command: str, hub: HubServer, here: Path, image: Path) -> None:
    result = run(*typed(command, RUN[command], here, image))
    assert result.exit_code == 0, result.output
    assert any(f"/{RUN[command]}" in each for each in hub.requests)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_that_a_hub_id_is_missing(command: str, here: Path, image: Path) -> None:
    result = run(*typed(command, MISSING, here, image))
    assert result.exit_code == 1, result.output
    assert f"{MISSING} is neither a folder here nor could it be fetched" in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_a_network_says_what_the_cache_lacks(
    command: str, here: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run(*typed(command, MISSING, here, image))
    assert result.exit_code == 1, result.output
    assert "nor whole in the hub's cache" in " ".join(result.stderr.split())


def test_two_models_of_one_name_are_told_apart_by_their_owners() -> None:
    assert places_of("someone/model@v1") == ("someone", "model@v1")
    assert places_of("elsewhere/model") == ("elsewhere", "model")
