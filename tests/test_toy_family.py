"""A new model is one value: the toy family is quantized, loaded, generated with, compared and
planned for.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import tempoquant
from tempoquant.checkpoint import read_config
from tempoquant.evaluate.compare import Task, compare
from tempoquant.hosts.diffusers.pipeline import open_pipeline
from tempoquant.hosts.diffusers.sampling import generate_video
from tempoquant.models.pipeline_configs import read_configs
from tempoquant.models.sampling_file import default_settings
from tempoquant.planning.gpus import GPUS
from tempoquant.planning.memory_plan import plan_memory
from tempoquant.planning.time_plan import video_time
from tempoquant.planning.traced_video import trace_video
from tempoquant.prompts import Prompt
from tempoquant.recipe import Recipe
from tempoquant.runtime.convert import quantized_linears
from tests import toy_family
from tests.test_house_rules import PACKAGE

PROMPTS = '{"prompt": "a cat", "image": "frame.png"}\n{"prompt": "cat walks", "image": "frame.png"}\n'
RECIPE = Recipe.load("default").replace(rank=4, num_prompts=2, samples_per_denoiser=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a folder with the 16-bit pipeline, and two that were quantized from it."""
    place = tmp_path_factory.mktemp("toy")
    with toy_family.installed():
        source = toy_family.write(place / "source")
        Image.new("RGB", (32, 32), (200, 50, 0)).save(place / "frame.png")
        (place / "prompts.jsonl").write_text(PROMPTS)
        tempoquant.quantize(source, place / "rtn", "rtn")
        tempoquant.quantize(source, place / "ours", RECIPE, calibration=place / "prompts.jsonl")
        yield place


def test_plain_diffusers_loads_it_and_its_layers_know_the_time_and_share_their_inputs(folder: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder / "ours")
    linears = quantized_linears(pipeline.mind)
    assert len(linears) == 3 * 10
    assert linears["pairs.0.see_q"].shared_input is linears["pairs.0.see_v"].shared_input is not None
    assert linears["pairs.0.see_q"].clock.bins == read_config(folder / "ours" / "mind").bins
    seen: list[float] = []
    clock = linears["pairs.0.see_q"].clock
    linears["pairs.0.see_q"].register_forward_pre_hook(lambda *_: seen.append(float(clock.call.bins)))
    pipeline("a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent")
    assert len(set(seen)) > 1 and seen == sorted(seen, reverse=True)


def test_it_generates_and_is_nearer_to_16_bits_than_rounding_is(folder: Path) -> None:
    source = open_pipeline(folder / "source")
    settings = default_settings(source)
    prompt = Prompt("held out", Image.new("RGB", (32, 32)), "a cat walks")
    models = {label: open_pipeline(folder / label) for label in ("rtn", "ours")}
    found = compare(source, models, Task([prompt], settings, num_trajectories=1))
    rtn, ours = (model.denoiser_sqnr_db("transformer").mean for model in found.comparison.models)
    assert ours > rtn + 2
    assert found.videos["ours"][0].shape == (5, 32, 32, 3)


def test_a_plan_needs_its_configs_alone(folder: Path) -> None:
    plan = plan_memory(read_configs(str(folder / "source")), toy_family.SETTINGS, RECIPE)
    assert [phase.name for phase in plan.quantized.modes[0].phases] == ["text encoding", "denoising", "video decoding"]
    assert plan.reduction("resident") > 0


def test_its_time_is_predicted_from_its_configs_too(folder: Path) -> None:
    configs = read_configs(str(folder / "source"))
    video, plan = (planned(configs, toy_family.SETTINGS, RECIPE) for planned in (trace_video, plan_memory))
    found = video_time(video, GPUS["H100 SXM"], plan.quantized.in_one_piece[0], "fast")
    operations = {part.name: part.operations for part in found.step}
    assert operations["linears"] > 0 and operations["self-attention"] > 0
    assert operations["cross-attention"] == 0, "its two streams attend to both"


def test_a_quantized_one_generates_through_our_loader_as_through_diffusers(folder: Path) -> None:
    from tempoquant.placement.memory_modes import load_in_mode

    pipeline = load_in_mode(open_pipeline(folder / "ours"), "lean", "cpu")
    prompt = Prompt("a", Image.new("RGB", (32, 32)), "a cat")
    video = generate_video(pipeline, prompt, toy_family.SETTINGS, seed=0)
    plain = DiffusionPipeline.from_pretrained(folder / "ours")
    expected = plain(
        "a cat", guidance_scale=2.0, num_inference_steps=4, generator=torch.Generator("cpu").manual_seed(0)
    ).frames[0]
    assert abs(video / 255 - expected).max() < 0.01


def test_nothing_in_the_package_knows_it() -> None:
    words = ("Toy", "noise_level", "lexicon")
    assert [path for path in PACKAGE if any(word in path.read_text(encoding="utf-8") for word in words)] == []
