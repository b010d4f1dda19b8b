"""The example workflows through a running ComfyUI server, with the bundled model in place of the
big one.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tempoquant.hosts.comfyui.export import export
from tempoquant.models.source import SourceModel
from tempoquant.quantizing import quantize
from tempoquant.recipe import Recipe
from tests.hosts.comfyui.real import dense, import_comfyui, needs_comfyui
from tests.hosts.comfyui.server import ROOT, Server, serving
from tests.hosts.comfyui.tiny_nodes import TinyDecode, TinyLatents, TinyTask

pytestmark = [needs_comfyui, pytest.mark.slow, pytest.mark.timeout(1500)]

SEED, CFG, SHIFT = 7, 2.5, 5.0
TINY = ("CLIPLoader", "CLIPTextEncode", "VAELoader", "LoadImage")
RANK = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return ComfyUI's folders with a quantized folder, its export, and LoRAs by the workflow's
    names.
    """
    base = tmp_path_factory.mktemp("server")
    folder = quantize("tiny", base / "models/tempoquant/tiny_4bit", Recipe.load("rtn"))
    export(folder, base / "models/diffusion_models/wan2.2_i2v_4bit")
    (base / "models/loras").mkdir()
    for name in ("high", "low"):
        lora = {"diffusion_model.blocks.1.ffn.0.lora_A.weight": torch.randn(RANK, 256) * 0.02,
                "diffusion_model.blocks.1.ffn.0.lora_B.weight": torch.randn(1024, RANK) * 0.02}  # fmt: skip
        save_file(lora, base / f"models/loras/wan2.2_i2v_lightx2v_4steps_lora_v1_{name}_noise.safetensors")
    return base


@pytest.fixture(scope="module")
def server(base: Path) -> Any:
    with serving(base) as running:
        yield running


def tiny_prompt(server: Server, name: str) -> dict[str, Any]:
    """Return an example workflow whose texts, image, latents and frames are the bundled model's."""
    workflow = json.loads((ROOT / f"comfyui/example_workflows/{name}.json").read_text(encoding="utf-8"))
    prompt = server.prompt_of(workflow)
    by_kind = {node["class_type"]: key for key, node in prompt.items()}
    prompt[by_kind["WanImageToVideo"]] = {"class_type": "TinyTask", "inputs": {"index": 0}}
    decode = prompt[by_kind["VAEDecode"]]
    decode.update(class_type="TinyDecode", inputs={"samples": decode["inputs"]["samples"]})
    for key in [key for key, node in prompt.items() if node["class_type"] in TINY]:
        del prompt[key]
    for key, node in list(prompt.items()):
        if node["class_type"] == "KSamplerAdvanced":
            node["inputs"].update(cfg=CFG, noise_seed=SEED)
            prompt[f"latents {key}"] = {"class_type": "TinyLatents", "inputs": {"model": node["inputs"]["model"]}}
            node["inputs"]["model"] = [f"latents {key}", 0]
    frames = {"images": [by_kind["VAEDecode"], 0], "filename_prefix": name}
    prompt["frames"] = {"class_type": "SaveImage", "inputs": frames}
    model = {"model": [by_kind["TempoQuantExpertsLoader"], 0]}
    return {**prompt, "info": {"class_type": "TempoQuantInfo", "inputs": model}}


def frames_of(base: Path, history: dict[str, Any]) -> np.ndarray:
    """Return the frames that a prompt saved: (frames, height, width, 3) uint8."""
    assert history["status"]["status_str"] == "success", history["status"]["messages"]
    images = history["outputs"]["frames"]["images"]
    return np.stack([np.asarray(Image.open(base / "output" / image["filename"])) for image in images])


def in_16_bits() -> np.ndarray:
    """Return the same video by ComfyUI's sampler and classes in 16 bits, in this process."""
    import_comfyui()
    import nodes
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    root, sampling = SourceModel.open("tiny").folder, nodes.KSamplerAdvanced()
    positive, negative, latent = TinyTask().go(0)
    for component, (begin, end) in {"transformer": (0, 8), "transformer_2": (8, 10000)}.items():
        [model] = ModelSamplingSD3().patch(TinyLatents().go(dense(root / component))[0], SHIFT)
        is_first = component == "transformer"
        [latent] = sampling.sample(
            model, "enable" if is_first else "disable", SEED, 20, CFG, "euler", "simple", positive, negative, latent,
            begin, end, "enable" if is_first else "disable",
        )  # fmt: skip
    return (TinyDecode().go(latent)[0].numpy() * 255).clip(0, 255).astype(np.uint8)


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    """Compute the PSNR of two videos."""
    return float(10 * np.log10(255**2 / np.square(one.astype(float) - other.astype(float)).mean()))


def test_the_20_step_workflow_makes_the_video_that_16_bits_make(server: Server, base: Path) -> None:
    history = server.run(tiny_prompt(server, "wan2.2_i2v_20_steps"))
    frames = frames_of(base, history)
    assert frames.shape == (17, 64, 64, 3)
    assert list((base / "output/video").glob("tempoquant*.mp4"))
    [info] = history["outputs"]["info"]["text"]
    assert info.startswith("high_noise from") and "900 to 1000" in info and "recipe rtn" in info
    with torch.inference_mode():
        reference = in_16_bits()
    level = psnr_db(frames, reference)
    print(f"PSNR of the workflow's video to 16 bits: {level:.1f} dB")
    assert level > 30


def test_the_4_step_workflow_runs_with_its_loras_and_they_matter(server: Server, base: Path) -> None:
    prompt = tiny_prompt(server, "wan2.2_i2v_4_steps_lora")
    with_loras = frames_of(base, server.run(prompt))
    loaders = [node["inputs"] for node in prompt.values() if node["class_type"] == "LoraLoaderModelOnly"]
    assert len(loaders) == 2
    for loader in loaders:
        loader["strength_model"] = 0.0
    without = frames_of(base, server.run(prompt))
    assert with_loras.shape == without.shape == (17, 64, 64, 3) and (with_loras != without).any()


def test_a_folder_of_both_makes_the_same_video_as_its_files(server: Server, base: Path) -> None:
    prompt = tiny_prompt(server, "wan2.2_i2v_20_steps")
    [loader] = [node["inputs"] for node in prompt.values() if node["class_type"] == "TempoQuantExpertsLoader"]
    of_files = frames_of(base, server.run(prompt))
    loader.update(high_noise="tiny_4bit", low_noise="tiny_4bit")
    assert np.array_equal(frames_of(base, server.run(prompt)), of_files)


def test_a_wrong_model_is_one_sentence_in_the_nodes_error(server: Server) -> None:
    inputs = {"model": "tiny_4bit", "denoiser": "the only one", "dtype": "default"}
    prompt = {"1": {"class_type": "TempoQuantLoader", "inputs": inputs},
              "2": {"class_type": "TempoQuantInfo", "inputs": {"model": ["1", 0]}}}  # fmt: skip
    history = server.run(prompt)
    [error] = [message[1] for message in history["status"]["messages"] if message[0] == "execution_error"]
    assert error["exception_message"].strip().endswith("holds high_noise and low_noise: name the one to load.")
