"""The program that calls VBench: the interpreter of VBench's own environment runs it, and nothing
imports it.

    python -I runner.py check                  the content of this environment, as one JSON object
    python -I runner.py check DIMENSION …      the same, with import errors of a dimension's code
    python -I runner.py score                  a JSON object on stdin, answers as JSON lines

    stdin of `score`: {"dimension": …, "device": "cpu"|"cuda", "videos": [VIDEO, …]},
                      where VIDEO is {"video": path, "prompt": …, "image": path}
    answers: {"video": number, "score": 0.97} or {"video": number, "why": …},
             and {"why": …} if nothing can be scored

The option -I ensures that neither the folder of this file nor PYTHONPATH hides a library.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

LOADERS = {
    "subject_consistency": ("torch.hub.load",),
    "background_consistency": ("clip.load",),
    "temporal_flickering": (),
    "motion_smoothness": ("MotionSmoothness",),
    "dynamic_degree": ("DynamicDegree",),
    "aesthetic_quality": ("get_aesthetic_model", "clip.load"),
    "imaging_quality": ("MUSIQ",),
    "overall_consistency": ("SimpleTokenizer", "ViCLIP"),
    "i2v_subject": ("torch.hub.load",),
    "i2v_background": ("dreamsim",),
}
"""The loaders of a dimension's weights, by name in the dimension's module."""

Say = Callable[[Mapping[str, Any]], None]

_kept_libraries: list[Any] = []  # torch removes operators when the library that declared them is collected


class NotLoaded(Exception):
    """The weights of a dimension cannot be loaded: no video can be scored."""


def main(arguments: Sequence[str]) -> int:
    """Run the command line."""
    # VBench's prints are no answer: they go to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def say(answer: Mapping[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    if arguments[:1] == ["check"]:
        say(check(arguments[1:]))
    elif list(arguments) == ["score"]:
        job = json.load(sys.stdin)
        try:
            score(job["dimension"], job["device"], job["videos"], say)
        except NotLoaded as error:
            say({"why": str(error)})
    else:
        sys.exit(__doc__)
    return 0


def check(dimensions: Sequence[str]) -> dict[str, Any]:
    """Return versions, whether there is a GPU, and by dimension the import error of its code; "why"
    without VBench.
    """
    found: dict[str, Any] = {"python": platform.python_version()}
    try:
        declare_missing_operators()
        importlib.import_module("vbench")
        for name in ("vbench", "torch"):
            found[name] = importlib.metadata.version(name)
        found["cuda"] = importlib.import_module("torch").cuda.is_available()
    except Exception as error:
        return {**found, "why": _sentence(error)}
    found["dimensions"] = {}
    for dimension in dimensions:
        try:
            _module_of(dimension)
        except Exception as error:
            found["dimensions"][dimension] = _sentence(error)
    return found


def score(dimension: str, device: str, videos: Sequence[Mapping[str, str]], say: Say) -> None:
    """Score videos one by one, as VBench's custom_input mode does; a failure gives its reason.

    VBench's functions load their weights at every call. Here each loader works once, and then
    returns the same object.

    Raises:
        NotLoaded: the code or the weights of the dimension cannot be loaded.
    """
    try:
        declare_missing_operators()
        module = _module_of(dimension)
        parts = importlib.import_module(f"{_package_of(dimension)}.utils").init_submodules([dimension], local=True)
        for loader in LOADERS[dimension]:
            _load_once(module, loader)
        compute = getattr(module, f"compute_{dimension}")
    except Exception as error:
        raise NotLoaded(_sentence(error)) from error
    with tempfile.TemporaryDirectory() as scratch:
        for number, video in enumerate(videos):
            try:
                # For a single video, VBench's mean is its score, and always in VBench's unit. In
                # the list of single videos beside it, imaging quality is a hundred times as large.
                value = float(compute(_info_of(dimension, video, scratch), device, parts[dimension])[0])
                if not math.isfinite(value):
                    raise ValueError(f"VBench's score is {value}")
            except NotLoaded:
                raise
            except Exception as error:
                say({"video": number, "why": _sentence(error)})
            else:
                say({"video": number, "score": value})


def _info_of(dimension: str, video: Mapping[str, str], scratch: str) -> str:
    """Write VBench's own description of one video of the user's to a file."""
    vbench = importlib.import_module("vbench").VBench("cpu", None, scratch)
    file = str(
        vbench.build_full_info_json(video["video"], "video", [dimension], [video["prompt"]], mode="custom_input")
    )
    if _package_of(dimension) != "vbench":
        # Joined to the folder of VBench-I2V's own images, where an absolute path stays as it is.
        with open(file, encoding="utf-8") as stream:
            [described] = json.load(stream)
        with open(file, "w", encoding="utf-8") as stream:
            json.dump([{**described, "image_name": video["image"]}], stream)
    return file


def _load_once(module: Any, loader: str) -> None:
    *parents, name = loader.split(".")
    owner = functools.reduce(getattr, parents, module)
    original = getattr(owner, name)
    kept: list[Any] = []

    def load(*arguments: Any, **named: Any) -> Any:
        if not kept:
            try:
                kept.append(original(*arguments, **named))
            except Exception as error:
                raise NotLoaded(_sentence(error)) from error
        return kept[0]

    setattr(owner, name, load)


def declare_missing_operators() -> None:
    """Declare torchvision's operators, so that it can be imported if its compiled part does not fit
    torch, as with PyPI's and a CPU torch.

    torchvision 0.28 declares its own `nms` and `qnms` to torch at import, which fails if its
    library did not load. VBench's dimensions use only its transforms, which are Python; a call of
    either operator would still fail.
    """
    import torch

    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        for library in Path(found.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        declared = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_libraries.append(declared)


def _module_of(dimension: str) -> Any:
    return importlib.import_module(f"{_package_of(dimension)}.{dimension}")


def _package_of(dimension: str) -> str:
    return "vbench2_beta_i2v" if dimension.startswith("i2v_") else "vbench"


def _sentence(error: BaseException) -> str:
    """Write an error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
