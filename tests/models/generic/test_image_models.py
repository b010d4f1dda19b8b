"""Image models that no family covers: quantized by the generic one, loaded by plain diffusers, and
compared.
"""

import diffusers
import numpy as np
import pytest
import torch

from tempoquant.calibrate.arguments import tensors_in
from tempoquant.hosts.contents import configs_of
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import generate_video, predict_noise, record_trajectory
from tempoquant.models.generic.assumptions import CONFIG_KEY
from tempoquant.models.generic.published import PUBLISHED
from tempoquant.models.pipeline_configs import read_configs
from tempoquant.models.replay import ReplayedDenoiser
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.schedule import sampling_steps
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.models.with_experts import GenericModel
from tempoquant.planning.memory_plan import plan_memory
from tempoquant.planning.run_estimate import estimate
from tempoquant.prompts import Prompt
from tempoquant.runtime.convert import quantized_linears
from tests.image_pipelines import PIPELINES, write
from tests.models.made import DEFAULT as EIGHT_SAMPLES
from tests.models.made import RTN as WITH_16_BIT_MODULATION
from tests.models.made import Made, make

RTN = WITH_16_BIT_MODULATION.replace(modulation_format="nvfp4_m1")
DEFAULT = EIGHT_SAMPLES.replace(samples_per_denoiser=4)
PROMPTS = '{"prompt": "a cat"}\n{"prompt": "a dog walks"}\n'
HELD_OUT = Prompt("held out", None, "a bird walks")


@pytest.fixture(scope="module", params=list(PIPELINES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made(name: str, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(name)
    model = GenericModel(write(folder / "source", name))
    (folder / "prompts.jsonl").write_text(PROMPTS)
    return make(folder, model, HELD_OUT, folder / "prompts.jsonl", (RTN, DEFAULT))


def test_the_default_recipe_is_nearer_to_16_bits_than_rounding(made: Made) -> None:
    errors = {model.label: model.denoiser_sqnr_db("transformer").mean for model in made.evidence.comparison.models}
    assert errors["default"] > errors["rtn"] + 2


def test_every_linear_has_four_bits_and_modulations_weights_where_a_recipe_says_so(made: Made, name: str) -> None:
    modulated = {
        "flux": {"norm1.linear", "norm1_context.linear", "norm.linear"},
        "qwen_image": {"img_mod.1", "txt_mod.1"},
        "z_image": {"adaLN_modulation.0"},
    }[name]
    assert modulated == made.source.family.modulation
    modulation, others = (found("transformer").keys() for found in (made.source.modulation, made.source.linears))
    layers = {recipe: configs_of(folder)["transformer"].layers for recipe, folder in made.folders.items()}
    assert layers["default"] and layers["default"].keys() == others
    assert layers["rtn"].keys() == others | modulation
    assert {name for name, entry in layers["rtn"].items() if entry.weights_alone} == modulation


def test_plain_diffusers_loads_it_and_makes_the_same_image(made: Made) -> None:
    kind = getattr(diffusers, made.source.index.class_name)
    pipeline = kind.from_pretrained(made.folders["default"], dtype=torch.float32)
    image = generate_video(pipeline, HELD_OUT, default_settings(made.source), 0)
    expected = made.evidence.videos["default"][0]
    assert image.shape == expected.shape == (1, 64, 64, 3)
    assert np.abs(image.astype(int) - expected).mean() < 1
    linears = quantized_linears(pipeline.transformer)
    bins = configs_of(made.folders["default"])["transformer"].bins
    seen: list[int] = []
    clock = next(iter(linears.values())).clock
    next(iter(linears.values())).register_forward_pre_hook(lambda *_: seen.append(int(clock.call.bins.max())))
    generate_video(pipeline, HELD_OUT, default_settings(made.source), 0)
    assert sorted(set(seen)) == list(range(bins.num_bins)) and seen == sorted(seen, reverse=True)


def test_what_was_assumed_is_kept_in_the_result_and_opens_it_again(made: Made) -> None:
    opened = SourceModel.open(made.folders["default"])
    assert opened.family.name == "generic"
    assert opened.family.stored == made.source.family.stored
    kept = opened.first.config[CONFIG_KEY]
    assert kept["call"] == configs_of(made.folders["default"])["transformer"].call.to_dict()


def test_what_is_said_of_the_published_model_is_observed_of_the_small_one(made: Made) -> None:
    source, of_size = made.source, {"kept", "text_tokens", "width", "latent_channels"}
    (published,) = (each for each in PUBLISHED if each.pipelines == source.family.pipelines)
    said, seen = (
        {k: v for k, v in each.stored[CONFIG_KEY].items() if k not in of_size} for each in (published, source.family)
    )
    assert said == seen and published.modulation == source.family.modulation
    latents = source.geometry.latents(64, 64, 1)
    said, seen = (
        {
            k: [each.shape for each in tensors_in(v)]
            for k, v in family.example_inputs(source.index, source.first.config, latents).items()
            if tensors_in(v)
        }
        for family in (published, source.family)
    )
    texts = {"encoder_hidden_states", "txt_ids", "cap_feats"}  # of as many rows as the prompt has
    assert {k: v for k, v in said.items() if k not in texts} == {k: v for k, v in seen.items() if k not in texts}
    assert said.keys() == seen.keys()


def test_a_quantized_image_model_can_be_planned(made: Made) -> None:
    found = plan_memory(read_configs(str(made.folders["rtn"])), default_settings(made.source), DEFAULT)
    assert found.quantized.label == "rtn" and found.reduction("swap") > 0


def test_the_schedule_is_the_one_that_the_pipeline_takes(made: Made) -> None:
    settings = default_settings(made.source)
    pipeline = load_pipeline(made.source, "cpu")
    record_trajectory(pipeline, HELD_OUT, settings, 0)
    steps = sampling_steps(made.source, settings)
    assert [float(step.timestep) for step in steps] == [float(t) for t in pipeline.scheduler.timesteps]
    told = sorted({call.sample.timestep for call in made.calls}, reverse=True)
    assert told == [float(step.timestep) for step in steps]


def test_guidance_has_the_branches_that_the_pipeline_computes(made: Made, name: str) -> None:
    branches = [call.sample.guidance_branch for call in made.calls]
    expected = {"flux": ["conditional"], "qwen_image": ["conditional", "unconditional"]}
    assert branches == expected.get(name, ["conditional", "unconditional"]) * 4
    texts = {"flux": "encoder_hidden_states", "qwen_image": "encoder_hidden_states", "z_image": "cap_feats"}
    assert texts[name] in made.source.family.text_inputs


def test_block_by_block_the_model_computes_what_it_computes_at_once(made: Made) -> None:
    pipeline, call = load_pipeline(made.source, "cpu"), made.calls[0]
    torch.testing.assert_close(predict_noise(pipeline, call.sample), call.noise_prediction)
    model = ReplayedDenoiser(DenoiserWeights(made.source, "transformer", torch.float32, "cpu"))
    carried: list[torch.Tensor] = []
    with torch.no_grad(), model.running([call.sample]):
        for index in range(model.num_blocks):
            with model.block(index):
                carried = model.run_block(index, call.sample, carried)
        torch.testing.assert_close(model.finish(call.sample, carried), call.noise_prediction)


def test_a_run_is_planned_with_the_inputs_that_calls_have(made: Made) -> None:
    source, settings = made.source, default_settings(made.source)
    latents = source.geometry.latents(settings.height, settings.width, settings.num_frames)
    example = source.family.example_inputs(source.index, source.first.config, latents)
    assert example.keys() == made.calls[0].sample.inputs.keys()
    recipe = DEFAULT.replace(height=64, width=64, num_frames=1, num_steps=4, guidance_scale=2.5)
    found = estimate(
        source, recipe, devices=["cpu"], num_samples={"transformer": 4}, records=True, link=False, hidden_ram_bytes=0
    )
    assert found.peak_disk_gib > 0
