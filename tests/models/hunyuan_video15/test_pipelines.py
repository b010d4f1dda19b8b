"""Both HunyuanVideo-1.5 pipelines: quantized, loaded by plain diffusers, and compared with what
they were quantized from.
"""

from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.guiders import SkipLayerGuidance

from tempoquant.errors import ModelError, SettingsError
from tempoquant.hosts.contents import configs_of
from tempoquant.hosts.diffusers.guiders import use_guidance_scale
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import generate_video, predict_noise
from tempoquant.models.pipeline_configs import published_models, read_configs
from tempoquant.models.replay import ReplayedDenoiser
from tempoquant.models.sampling_file import default_settings, published_settings
from tempoquant.models.schedule import sampling_steps
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.placement.memory_modes import load_in_mode
from tempoquant.placement.streaming import loaded_pipeline
from tempoquant.planning.memory_plan import plan_memory
from tempoquant.recipe import Recipe
from tests.conditioned import prompts_for
from tests.hunyuan_pipelines import PIPELINES, SIZE, short_texts, write
from tests.models.made import DEFAULT, PAPER, RTN, Made, make

MARGIN_DB = 3.0
MODULATION = ("norm1.linear", "norm1_context.linear")


QUICK = "text_to_video"  # the other has the same denoiser, and an image's tokens in the same stream
EACH = [pytest.param(name, marks=[] if name == QUICK else [pytest.mark.slow]) for name in PIPELINES]


@pytest.fixture(scope="module", params=EACH)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp(request.param)
    with short_texts():
        source = SourceModel.open(write(folder / "source", request.param))
        *_, held_out = prompts_for(source, folder / "prompts")
        yield make(folder, source.folder, held_out, folder / "prompts", (RTN, PAPER, DEFAULT))


def test_both_recipes_are_nearer_to_16_bits_than_rounding(made: Made):
    rtn, paper, default = (model.denoiser_sqnr_db("transformer").mean for model in made.evidence.comparison.models)
    assert default > rtn + MARGIN_DB and paper > rtn


def test_linears_of_both_streams_have_four_bits_and_modulation_and_refiner_have_not(made: Made):
    for folder in made.folders.values():
        (config,) = configs_of(folder).values()
        assert config.layers.keys() == made.source.linears("transformer").keys()
        assert len(config.layers) == 2 * 12
        assert not [name for name in config.layers if name.endswith(MODULATION) or "refiner" in name]
        assert f"transformer_blocks.1.{MODULATION[1]}.weight" in SourceModel.open(folder).forms("transformer")


def test_plain_diffusers_loads_it_and_makes_the_same_video(made: Made):
    kind = getattr(diffusers, made.source.index.class_name)
    pipeline = kind.from_pretrained(made.folders["default"], dtype=torch.float32)
    video = generate_video(pipeline, made.prompt, default_settings(made.source), 0)
    expected = made.evidence.videos["default"][0]
    assert video.shape == expected.shape == (5, SIZE, SIZE, 3)
    assert np.abs(video.astype(int) - expected).mean() < 1


def test_a_frugal_mode_makes_the_same_video(made: Made):
    for mode in ("lean", "disk"):
        pipeline = load_in_mode(SourceModel.open(made.folders["default"]), mode, "cpu")
        video = generate_video(pipeline, made.prompt, default_settings(made.source), 0)
        assert np.abs(video.astype(int) - made.evidence.videos["default"][0]).mean() < 1


def test_the_guider_tells_the_branches_of_each_step_and_the_scheduler_its_end(made: Made):
    steps = sampling_steps(made.source, default_settings(made.source))
    found = [(call.sample.step_index, call.sample.guidance_branch, call.sample.timestep) for call in made.calls]
    expected = [(index, branch, float(step.timestep)) for index, step in enumerate(steps)
                for branch in ("conditional", "unconditional")]  # fmt: skip
    assert found == expected
    one, other = (call.sample.inputs["encoder_attention_mask"].sum() for call in made.calls[:2])
    assert one > other  # the empty text has fewer words


def test_a_call_that_is_made_again_answers_what_it_answered(made: Made):
    pipeline = load_pipeline(made.source, "cpu")
    for call in made.calls[:2]:
        assert torch.equal(predict_noise(pipeline, call.sample), call.noise_prediction)


def test_block_by_block_the_model_computes_what_it_computes_at_once(made: Made):
    call = made.calls[0]
    model = ReplayedDenoiser(DenoiserWeights(made.source, "transformer", torch.float32, "cpu"))
    carried: list[torch.Tensor] = []
    with torch.no_grad(), model.running([call.sample]):
        for index in range(model.num_blocks):
            with model.block(index):
                carried = model.run_block(index, call.sample, carried)
            assert len(carried) == 2  # both streams
        torch.testing.assert_close(model.finish(call.sample, carried), call.noise_prediction)


def test_recording_from_the_disk_makes_the_calls_that_recording_in_memory_makes(made: Made):
    texts = [made.prompt.text, ""]
    with loaded_pipeline(made.source, "cpu", "disk", texts) as loaded:
        assert loaded.pipeline.text_encoder is None and loaded.pipeline.text_encoder_2 is None
        found = loaded.texts(made.prompt.text)
        assert found["prompt_embeds_2"].shape == found["negative_prompt_embeds_2"].shape
        inputs = made.calls[0].sample.inputs
        assert torch.equal(found["prompt_embeds"].to(inputs["encoder_hidden_states"]), inputs["encoder_hidden_states"])


def test_sizes_are_planned_with_the_inputs_that_calls_have(made: Made):
    source, settings = made.source, default_settings(made.source)
    latents = source.geometry.latents(settings.height, settings.width, settings.num_frames)
    example = source.family.example_inputs(source.index, source.first.config, latents)
    inputs = made.calls[0].sample.inputs
    assert example.keys() == inputs.keys()
    for name, tensor in example.items():
        is_short = name in source.family.text_inputs  # here, and nowhere else
        assert tensor.shape[2 if is_short else 0 :] == inputs[name].shape[2 if is_short else 0 :], name


def test_image_to_video_refuses_a_size_that_the_pipeline_would_not_make(tmp_path: Path):
    source = SourceModel.open(write(tmp_path / "source", "image_to_video"))
    with pytest.raises(SettingsError, match=r"of pictures of 16 × 16 .* it makes videos of 32 × 32"):
        source.geometry.require(default_settings(source).replace(height=16, width=16))


def test_a_folder_without_settings_samples_as_its_own_configs_say(tmp_path: Path):
    folder = write(tmp_path / "source", "text_to_video")
    (folder / "sampling.json").unlink()
    (folder / "guider" / "guider_config.json").write_text(
        '{"_class_name": "ClassifierFreeGuidance", "guidance_scale": 1.0}'
    )
    settings = published_settings(SourceModel.open(folder))
    assert (settings.height, settings.width, settings.guidance_scale, settings.flow_shift) == (480, 848, 1.0, 5.0)


@pytest.mark.parametrize(
    ("guider", "problem"),
    [
        (ClassifierFreeGuidance(stop=0.5), "guides some steps only"),
        (ClassifierFreeGuidance(use_original_formulation=True), "counts its scale from 0"),
        (SkipLayerGuidance(skip_layer_guidance_layers=[1]), "whose calls TempoQuant cannot tell apart"),
    ],
    ids=["some steps", "original formulation", "skipped layers"],
)
def test_a_guider_whose_calls_are_others_is_refused(guider: object, problem: str):
    class Pipeline:
        pass

    pipeline = Pipeline()
    pipeline.guider = guider  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=problem):
        use_guidance_scale(pipeline, 6.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in published_models() if name.startswith("hunyuanvideo")])
def test_every_published_model_can_be_planned(name: str):
    configs = read_configs(name)
    _, size = configs.family.published(configs.index)
    found = plan_memory(configs, size, Recipe.load("default"))
    assert found.reduction("resident") > 0.2 and found.quantized.disk < found.sixteen_bit.disk
