"""Every Wan pipeline: quantized, loaded by plain diffusers, and compared with what it was quantized
from.
"""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from tempoquant.hosts.contents import configs_of
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import generate_video, predict_noise
from tempoquant.models.pipeline_configs import published_models, read_configs
from tempoquant.models.replay import ReplayedDenoiser
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.planning.memory_plan import plan_memory
from tempoquant.quantizing import quantize
from tempoquant.recipe import Recipe
from tests.conditioned import prompts_for
from tests.models.made import DEFAULT, RTN, Made, make
from tests.wan_pipelines import PIPELINES, write

MARGIN_DB = 3.0  # the least of any pipeline is 3.3


@pytest.fixture(scope="module", params=list(PIPELINES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    source = SourceModel.open(write(folder / "source", request.param))
    *_, held_out = prompts_for(source, folder / "prompts")
    return make(folder, source.folder, held_out, folder / "prompts", (RTN, DEFAULT))


def test_the_default_recipe_is_nearer_to_16_bits_than_rounding(made: Made):
    errors = {
        model.label: {each.denoiser: each.sqnr_db.mean for each in model.noise_prediction if each.bin_index is None}
        for model in made.evidence.comparison.models
    }
    assert list(errors["default"]) == list(errors["rtn"]) == list(made.source.denoiser_names)
    for name, rounded in errors["rtn"].items():
        assert errors["default"][name] > rounded + MARGIN_DB


def test_every_linear_of_a_block_has_four_bits_and_no_other(made: Made):
    for folder in made.folders.values():
        configs = configs_of(folder)
        assert list(configs) == list(made.source.denoiser_names)
        for name, config in configs.items():
            assert config.layers.keys() == made.source.linears(name).keys()


def test_plain_diffusers_loads_it_and_makes_the_same_video(made: Made):
    kind = getattr(diffusers, made.source.index.class_name)
    pipeline = kind.from_pretrained(made.folders["default"], dtype=torch.float32)
    video = generate_video(pipeline, made.prompt, default_settings(made.source), 0)
    expected = made.evidence.videos["default"][0]
    assert video.shape == expected.shape
    assert np.abs(video.astype(int) - expected).mean() < 1


def test_a_call_that_is_made_again_answers_what_it_answered(made: Made):
    pipeline = load_pipeline(made.source, "cpu")
    assert made.calls
    for call in made.calls:
        assert torch.equal(predict_noise(pipeline, call.sample), call.noise_prediction)


def test_block_by_block_the_model_computes_what_it_computes_at_once(made: Made):
    for name in made.source.denoiser_names:
        call = next(call for call in made.calls if call.sample.denoiser == name)
        model = ReplayedDenoiser(DenoiserWeights(made.source, name, torch.float32, "cpu"))
        carried: list[torch.Tensor] = []
        with torch.no_grad(), model.running([call.sample]):
            for index in range(model.num_blocks):
                with model.block(index):
                    carried = model.run_block(index, call.sample, carried)
            torch.testing.assert_close(model.finish(call.sample, carried), call.noise_prediction)


def test_sizes_are_planned_with_the_inputs_that_calls_have(made: Made):
    source, settings = made.source, default_settings(made.source)
    latents = source.geometry.latents(settings.height, settings.width, settings.num_frames)
    example = source.family.example_inputs(source.index, source.first.config, latents)
    inputs = made.calls[0].sample.inputs
    assert example.keys() == inputs.keys()
    for name, tensor in example.items():
        if name != "encoder_hidden_states_image":  # the real encoder looks at more patches
            assert tensor.shape == inputs[name].shape, name


def test_a_quantized_text_to_video_folder_also_changes_videos(tmp_path: Path):
    source = write(tmp_path / "source", "wan21_t2v")
    folder = quantize(source, tmp_path / "rtn", Recipe.load("rtn"))
    pipeline = diffusers.WanVideoToVideoPipeline.from_pretrained(folder)
    frames = [np.full((32, 32, 3), shade, np.uint8) for shade in (0, 50, 100, 150, 200)]
    video = [diffusers.utils.numpy_to_pil(frame / 255.0)[0] for frame in frames]
    found = pipeline(video, "a cat", height=32, width=32, num_inference_steps=4, output_type="np").frames
    assert found.shape == (1, 5, 32, 32, 3) and np.isfinite(found).all()


WAN_MODELS = [name for name, configs in published_models().items() if configs.family.name.startswith("wan")]
SLOW = {name for name in WAN_MODELS if "vace" in name}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in WAN_MODELS]
)
def test_every_published_model_can_be_planned(name: str):
    configs = read_configs(name)
    _, size = configs.family.published(configs.index)
    found = plan_memory(configs, size, Recipe.load("default"))
    assert found.reduction("resident") > 0.3 and found.quantized.disk < found.sixteen_bit.disk
