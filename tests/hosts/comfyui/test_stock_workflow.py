"""The workflow for nvfp4 files: whole, of stock nodes, with the files that `export` writes, split
where Wan is.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tempoquant.hosts.comfyui.nvfp4_export import LORAS, MODELS
from tempoquant.models.wan.published import A14B, published_models

FILE = Path(__file__).parents[3] / "comfyui" / "example_workflows" / "wan2.2_i2v_nvfp4_stock.json"
STOCK = {
    "UNETLoader": 2, "LoraLoaderBypassModelOnly": 2, "ModelSamplingSD3": 1, "CLIPLoader": 3, "VAELoader": 1,
    "LoadImage": 2, "CLIPTextEncode": 1, "WanImageToVideo": 4, "KSamplerAdvanced": 10, "VAEDecode": 0, "CreateVideo": 1,
    "SaveVideo": 3, "MarkdownNote": 1,
}  # fmt: skip
"""Nodes that ComfyUI has without a pack, and how many values their widgets hold."""
OPTIONAL = {"clip_vision_output", "audio"}
Node = dict[str, Any]


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def nodes_of(workflow: dict[str, Any]) -> dict[int, Node]:
    return {node["id"]: node for node in workflow["nodes"]}


def feeding(workflow: dict[str, Any], node: Node, name: str) -> Node:
    """Return the node whose output an input takes."""
    link = next(each["link"] for each in node["inputs"] if each["name"] == name)
    source = next(source for number, source, *_ in workflow["links"] if number == link)
    return nodes_of(workflow)[source]


def test_every_node_is_a_stock_one_with_all_its_values(workflow):
    assert {node["type"] for node in workflow["nodes"]} == STOCK.keys()
    for node in workflow["nodes"]:
        assert len(node["widgets_values"]) == STOCK[node["type"]], node["type"]


def test_links_join_an_output_and_an_input_of_one_type_and_no_needed_input_is_free(workflow):
    nodes, taken = nodes_of(workflow), set()
    for number, source, output, target, taking, type_ in workflow["links"]:
        given, wanted = nodes[source]["outputs"][output], nodes[target]["inputs"][taking]
        assert given["type"] == wanted["type"] == type_
        assert number in given["links"] and wanted["link"] == number
        taken.add(number)
    for node in workflow["nodes"]:
        assert all(set(output["links"]) <= taken for output in node["outputs"])
        assert all(each["link"] in taken or each["name"] in OPTIONAL for each in node["inputs"]), node["type"]


@pytest.mark.parametrize(("title", "denoiser"), [("High", "high_noise"), ("Low", "low_noise")])
def test_each_sampler_has_its_denoiser_with_its_own_branch_at_strength_1(workflow, title, denoiser):
    [sampler] = [node for node in workflow["nodes"] if node.get("title", "").startswith(f"{title} noise: steps")]
    shifted = feeding(workflow, sampler, "model")
    branch = feeding(workflow, shifted, "model")
    model = feeding(workflow, branch, "model")
    assert (shifted["type"], branch["type"], model["type"]) == (
        "ModelSamplingSD3", "LoraLoaderBypassModelOnly", "UNETLoader",
    )  # fmt: skip
    assert branch["widgets_values"] == [f"tempoquant_{denoiser}_nvfp4_branch.safetensors", 1.0]
    assert model["widgets_values"] == [f"tempoquant_{denoiser}_nvfp4.safetensors", "default"]
    assert (MODELS, LORAS) == ("diffusion_models", "loras")  # where those two nodes look


def test_the_samplers_part_where_the_published_model_changes_its_denoiser(workflow):
    """ComfyUI's `simple` takes every fiftieth of 1000 shifted sigmas for 20 steps: 1 − i/20 before
    the shift.
    """
    boundary = published_models()[A14B]["index"]["boundary_ratio"]
    high, low = [node["widgets_values"] for node in workflow["nodes"] if node["type"] == "KSamplerAdvanced"]
    [shift] = {node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "ModelSamplingSD3"}
    steps = high[3]
    even = [1 - i / steps for i in range(steps)]
    noisy = [sigma for sigma in even if shift * sigma / (1 + (shift - 1) * sigma) >= boundary]
    assert (high[0], high[7:]) == ("enable", [0, len(noisy), "enable"])
    assert (low[0], low[7:]) == ("disable", [len(noisy), 10000, "disable"])
    assert high[3:7] == low[3:7] and high[6] == "simple"
