"""An environment with a `vbench` made here, for what needs VBench's weights; tests of the real one
are elsewhere.

Its packages have the names, files and functions of VBench 0.1.5 that the runner calls. A video's
score is its size in bytes over a thousand; what a prompt says happens to its video.
"""

import os
import subprocess
import sys
from pathlib import Path

from tempoquant.evaluate.vbench.dimensions import DIMENSIONS

FAILS, NO_NUMBER, DIES = "this one fails", "this one has no score", "this one kills its process"
LOADED = "loaded.txt"
"""In the cache: a line for every time that weights were loaded."""

_TORCH = """
class cuda:
    @staticmethod
    def is_available(): return False
class hub:
    @staticmethod
    def load(**details):
        from vbench.utils import note_loading
        note_loading("hub " + details["repo_or_dir"])
"""
_VBENCH = """
import json, os
print("VBench prints what it likes")
class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.output_path = output_path
    def build_full_info_json(self, videos_path, name, dimension_list, prompt_list=[], mode="vbench_standard"):
        assert mode == "custom_input" and os.path.isfile(videos_path)
        file = os.path.join(self.output_path, name + "_full_info.json")
        with open(file, "w") as stream:
            json.dump([{"prompt_en": prompt_list[0], "dimension": dimension_list, "video_list": [videos_path]}], stream)
        return file
"""
_UTILS = """
import json, os
CACHE_DIR = os.environ["VBENCH_CACHE_DIR"]
def note_loading(what):
    with open(os.path.join(CACHE_DIR, "loaded.txt"), "a") as stream:
        stream.write(what + "\\n")
    if os.path.exists(os.path.join(CACHE_DIR, "unreadable")):
        raise OSError("the weights are unreadable")
def init_submodules(dimensions, local=False):
    assert local
    return {dimension: {"repo_or_dir": dimension} for dimension in dimensions}
def scored(json_dir):
    [info] = json.load(open(json_dir))
    if info["prompt_en"] == "this one fails": raise ValueError("a frame is missing")
    if info["prompt_en"] == "this one has no score": return float("nan"), []
    if info["prompt_en"] == "this one kills its process": os._exit(7)
    if "image_name" in info: assert os.path.isabs(info["image_name"]), info
    assert ("image_name" in info) == info["dimension"][0].startswith("i2v_")
    [video] = info["video_list"]
    score = os.path.getsize(video) / 1000
    return score, [{"video_path": video, "video_results": 100 * score}]
"""
_DIMENSION = """
import torch
from vbench.utils import note_loading, scored
def loader(*arguments, **named): note_loading("{name}")
class clip:
    load = staticmethod(loader)
MotionSmoothness = DynamicDegree = get_aesthetic_model = MUSIQ = SimpleTokenizer = ViCLIP = loader
def compute_{name}(json_dir, device, submodules_list, **kwargs):
    assert device == "cpu"
    {load}
    return scored(json_dir)
"""
_LOADS = {
    "subject_consistency": "torch.hub.load(**submodules_list)",
    "i2v_subject": "torch.hub.load(**submodules_list)",
    "background_consistency": "clip.load('ViT-B-32.pt', device=device)",
    "motion_smoothness": "MotionSmoothness('AMT-S.yaml', device)",
    "dynamic_degree": "DynamicDegree({}, device)",
    "aesthetic_quality": "get_aesthetic_model('reader'), clip.load('ViT-L-14.pt', device=device)",
    "imaging_quality": "MUSIQ(pretrained_model_path='musiq')",
    "overall_consistency": "ViCLIP(tokenizer=SimpleTokenizer('bpe'), **submodules_list)",
}
"""How VBench's code loads, so that a loader under another name would load for every video."""


def make_environment(folder: Path, without: str | None = None) -> Path:
    """Make one and return its interpreter; `without` is a dimension whose code cannot be
    imported.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    for name, version in (("vbench", "0.1.5"), ("torch", "2.0")):
        _write(packages / f"{name}-{version}.dist-info" / "METADATA", f"Name: {name}\nVersion: {version}\n")
    _write(packages / "torch.py", _TORCH)
    _write(packages / "vbench" / "__init__.py", _VBENCH)
    _write(packages / "vbench2_beta_i2v" / "__init__.py", "")
    for package in ("vbench", "vbench2_beta_i2v"):
        _write(packages / package / "utils.py", _UTILS if package == "vbench" else "from vbench.utils import *")
    for name in DIMENSIONS:
        package = "vbench2_beta_i2v" if name.startswith("i2v_") else "vbench"
        code = "import dreamsim" if name == without else _DIMENSION.format(name=name, load=_LOADS.get(name, "pass"))
        _write(packages / package / f"{name}.py", code)
    return folder / "bin" / "python"


def make_weights(cache: Path) -> None:
    """Write a file for every one that VBench needs; torch's hub folder must be inside `cache`."""
    for dimension in DIMENSIONS.values():
        for weight in dimension.weights:
            assert cache in weight.place(cache).parents, "TORCH_HOME points somewhere else"
            if not os.path.splitext(weight.path)[1]:
                _write(weight.place(cache) / "hubconf.py", weight.path)
            else:
                _write(weight.place(cache), weight.path)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
