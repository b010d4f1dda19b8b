"""The node pack without ComfyUI: its nodes, and that the example workflows name nothing that is not
there.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tempoquant.hosts.comfyui.split import split_step

ROOT = Path(__file__).parents[3]
PACK = ROOT / "comfyui"
WORKFLOWS = sorted(PACK.glob("example_workflows/*_step*.json"))  # the third has none of our nodes: test_stock_workflow
SCHEDULERS = ["simple", "normal"]
OF_COMFYUI = {
    "ModelSamplingSD3", "CLIPLoader", "CLIPTextEncode", "VAELoader", "LoadImage", "WanImageToVideo", "KSamplerAdvanced",
    "VAEDecode", "CreateVideo", "SaveVideo", "LoraLoaderModelOnly",
}  # fmt: skip


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Return the pack's nodes beside the little of ComfyUI that they need before they run."""
    folders: dict[str, list[str]] = {"diffusion_models": [str(tmp_path)]}
    folder_paths: Any = ModuleType("folder_paths")
    folder_paths.models_dir = str(tmp_path / "models")
    folder_paths.get_folder_paths = folders.__getitem__
    folder_paths.add_model_folder_path = lambda name, path: folders.setdefault(name, []).append(path)
    samplers: Any = ModuleType("comfy.samplers")
    samplers.KSampler = SimpleNamespace(SCHEDULERS=SCHEDULERS)
    comfy: Any = ModuleType("comfy")
    comfy.samplers = samplers
    for module in (folder_paths, comfy, samplers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.syspath_prepend(str(ROOT))
    import comfyui

    assert comfyui.NODE_CLASS_MAPPINGS.keys() == comfyui.NODE_DISPLAY_NAME_MAPPINGS.keys()
    return dict(comfyui.NODE_CLASS_MAPPINGS)


def test_every_node_says_what_comfyui_asks(nodes: dict[str, Any]) -> None:
    for name, node in nodes.items():
        taken = node.INPUT_TYPES()["required"]
        function = getattr(node, node.FUNCTION)
        assert taken and set(taken) <= set(function.__code__.co_varnames[1 : function.__code__.co_argcount]), name
        assert node.CATEGORY == "TempoQuant" and node.DESCRIPTION and node.RETURN_TYPES
        assert len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) == len(node.RETURN_TYPES)


def test_a_model_that_is_gone_is_named(nodes: dict[str, Any]) -> None:
    with pytest.raises(FileNotFoundError, match="gone is no longer in ComfyUI's models/tempoquant"):
        nodes["TempoQuantLoader"]().load("gone", "the only one", "default")


def test_the_workflows_name_nodes_inputs_and_outputs_that_exist(nodes: dict[str, Any]) -> None:
    assert [file.stem for file in WORKFLOWS] == ["wan2.2_i2v_20_steps", "wan2.2_i2v_4_steps_lora"]
    for file in WORKFLOWS:
        workflow = json.loads(file.read_text(encoding="utf-8"))
        kinds = {node["type"] for node in workflow["nodes"]}
        assert kinds <= OF_COMFYUI | nodes.keys() and {"TempoQuantExpertsLoader", "TempoQuantSplitStep"} <= kinds
        links = {link[0]: link for link in workflow["links"]}
        for node in workflow["nodes"]:
            assert all(each["link"] in links for each in node["inputs"] if each.get("link") is not None)
            if (kind := nodes.get(node["type"])) is not None:
                taken = kind.INPUT_TYPES()["required"]
                assert [each["name"] for each in node["inputs"]] == [*taken]
                assert [each["type"] for each in node["outputs"]] == [*kind.RETURN_TYPES]
                widgets = [name for name, (form, *_) in taken.items() if form != "MODEL"]
                assert len(node["widgets_values"]) == len(widgets)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_both_samplers_of_a_workflow_run_the_steps_that_the_split_step_counts(file: Path) -> None:
    workflow = json.loads(file.read_text(encoding="utf-8"))
    by_id = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (by_id[link[1]], link[2]) for link in workflow["links"]}
    samplers = [node for node in workflow["nodes"] if node["type"] == "KSamplerAdvanced"]
    wired = [
        {each["name"]: (links[each["link"]][0]["type"], links[each["link"]][1])
         for each in node["inputs"] if each.get("link") is not None} for node in samplers
    ]  # fmt: skip
    for inputs, limit in zip(wired, ("end_at_step", "start_at_step"), strict=True):
        assert inputs[limit] == ("TempoQuantSplitStep", 0) and inputs["steps"] == ("TempoQuantSplitStep", 1)
        assert inputs["model"] == ("ModelSamplingSD3", 0)
    assert wired[1]["latent_image"] == ("KSamplerAdvanced", 0)
    [split] = [node for node in workflow["nodes"] if node["type"] == "TempoQuantSplitStep"]
    scheduler, steps = split["widgets_values"]
    assert all(scheduler in node["widgets_values"] for node in samplers)
    timesteps = [1000 * 5 * t / (1 + 4 * t) for t in (1 - i / steps for i in range(steps))]
    assert split_step(timesteps, 900.0) == {20: 8, 4: 2}[steps]


def test_the_registrys_metadata_names_files_that_are_there() -> None:
    project = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert (PACK / project["tool"]["comfy"]["Icon"]).is_file() and project["tool"]["comfy"]["PublisherId"]
    assert project["project"]["version"] == package["project"]["version"]
    assert project["project"]["dependencies"] == (PACK / "requirements.txt").read_text(encoding="utf-8").split()
    assert project["project"]["license"]["text"] == package["project"]["license"]


def test_the_pack_is_imported_without_comfyui_and_without_torch() -> None:
    """ComfyUI imports every pack at its start, and shows the error of one that cannot be
    imported.
    """
    program = "import sys, comfyui; print(*{'torch', 'comfy', 'folder_paths', 'diffusers'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []
