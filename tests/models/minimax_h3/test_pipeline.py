"""MiniMax-H3's modular pipeline: recorded, quantized, loaded by plain diffusers, and compared with
16 bits.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import MiniMaxH3ModularPipeline

from tempoquant.checkpoint import read_config
from tempoquant.errors import ModelError, SettingsError
from tempoquant.evaluate.plan import Plan
from tempoquant.evaluate.run_costs import PHASES, RunCosts, measuring_costs
from tempoquant.hosts.contents import configs_of
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import generate_video, predict_noise, record_trajectory, sample_latents
from tempoquant.models.pipeline_configs import read_configs
from tempoquant.models.prompt_needs import require_texts_alone
from tempoquant.models.replay import ReplayedDenoiser
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.schedule import sampling_steps
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.placement.memory_modes import load_in_mode
from tempoquant.placement.streaming import loaded_pipeline
from tempoquant.planning.memory_plan import plan_memory
from tempoquant.prompts import Prompt
from tempoquant.runtime.convert import quantized_linears
from tests.conditioned import prompts_for
from tests.minimax_pipeline import NUM_FRAMES, SIZE, write
from tests.models.made import DEFAULT as WITH_16_BIT_MODULATION
from tests.models.made import PAPER, RTN, Made, make

MARGIN_DB = 3.0
TEXT_ALONE = Prompt("text alone", None, "a bird walks")
DEFAULT = WITH_16_BIT_MODULATION.replace(modulation_format="nvfp4_m1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("minimax")
    source = SourceModel.open(write(folder / "source"))
    *_, held_out = prompts_for(source, folder / "prompts")
    return make(folder, source.folder, held_out, folder / "prompts", (RTN, PAPER, DEFAULT))


def test_both_recipes_are_nearer_to_16_bits_than_rounding(made: Made):
    rtn, paper, default = (model.denoiser_sqnr_db("transformer").mean for model in made.evidence.comparison.models)
    assert default > rtn + MARGIN_DB and paper > rtn


def test_linears_of_blocks_have_four_bits_and_modulations_weights_where_a_recipe_says_so(made: Made):
    own = {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"}
    for name, folder in made.folders.items():
        (config,) = configs_of(folder).values()
        wanted = own | ({"adaln_proj.linear"} if name == "default" else set())
        assert config.layers.keys() == {f"transformer_blocks.{i}.{name}" for i in range(2) for name in wanted}
        alone = {layer for layer, entry in config.layers.items() if entry.weights_alone}
        assert alone == {layer for layer in config.layers if layer.endswith("adaln_proj.linear")}


def test_a_quantized_folder_is_a_modular_pipeline_without_the_other_tasks_denoiser(made: Made):
    folder = made.folders["default"]
    assert (folder / "modular_model_index.json").is_file() and not (folder / "transformer_ref").exists()
    assert "transformer_ref" not in made.source.components


def test_plain_diffusers_loads_it_and_makes_the_same_video_at_the_bins_of_the_video(made: Made):
    pipeline = MiniMaxH3ModularPipeline.from_pretrained(str(made.folders["default"]), workflow="fl2va")
    pipeline.load_components(dtype={"default": torch.float32})
    layer = quantized_linears(pipeline.transformer)["transformer_blocks.0.attn.to_q"]
    assert layer.clock.bins == read_config(made.folders["default"] / "transformer").bins
    seen: list[int] = []
    layer.register_forward_pre_hook(lambda *_: seen.append(int(layer.clock.call.bins)))
    video = generate_video(pipeline, made.prompt, default_settings(made.source), 0)
    expected = made.evidence.videos["default"][0]
    assert video.shape == expected.shape == (NUM_FRAMES, SIZE, SIZE, 3)
    assert np.abs(video.astype(int) - expected).mean() < 1
    steps = sampling_steps(made.source, default_settings(made.source))
    assert seen == [layer.clock.bins.of(float(step.timestep)) for step in steps]
    assert len(set(seen)) > 1


def test_each_call_has_the_timestep_of_the_video_which_is_the_noisiest(made: Made):
    steps = sampling_steps(made.source, default_settings(made.source))
    assert [call.sample.timestep for call in made.calls] == [float(step.timestep) for step in steps]
    told = made.calls[1].sample.inputs["timestep"]
    assert len(told) == 3  # the sound's too, and the first frame's, which is nearly clean
    assert float(told.max()) > 0.99
    assert made.calls[1].sample.timestep == pytest.approx(1000 * (1 - float(told.min())), rel=1e-6)


def test_a_call_that_is_made_again_answers_what_it_answered(made: Made):
    pipeline = load_pipeline(made.source, "cpu")
    for call in made.calls:  # in recording, later steps write into the latents that earlier calls were given
        assert torch.equal(predict_noise(pipeline, call.sample), call.noise_prediction)


def test_block_by_block_the_model_computes_what_it_computes_at_once(made: Made):
    call = made.calls[1]
    model = ReplayedDenoiser(DenoiserWeights(made.source, "transformer", torch.float32, "cpu"))
    carried: list[torch.Tensor] = []
    with torch.no_grad(), model.running([call.sample]):
        for index in range(model.num_blocks):
            with model.block(index):
                carried = model.run_block(index, call.sample, carried)
        torch.testing.assert_close(model.finish(call.sample, carried), call.noise_prediction)


def test_where_the_parts_are_changes_nothing_but_memory(made: Made):
    settings, latents = default_settings(made.source), []
    for memory in ("resident", "disk"):
        with loaded_pipeline(made.source, "cpu", memory, [TEXT_ALONE.text, ""]) as loaded:
            texts = loaded.texts(TEXT_ALONE.text)
            latents.append(sample_latents(loaded.pipeline, TEXT_ALONE, settings, 0, texts))
    torch.testing.assert_close(latents[1], latents[0])
    for mode in ("lean", "disk"):
        pipeline = load_in_mode(SourceModel.open(made.folders["default"]), mode, "cpu")
        video = generate_video(pipeline, made.prompt, settings, 0)
        assert np.abs(video.astype(int) - made.evidence.videos["default"][0]).mean() < 1


def test_sizes_are_planned_with_the_inputs_that_calls_have(made: Made):
    source, settings = made.source, default_settings(made.source)
    latents = source.geometry.latents(settings.height, settings.width, settings.num_frames)
    example = source.family.example_inputs(source.index, source.first.config, latents)
    inputs = record_trajectory(load_pipeline(source, "cpu"), TEXT_ALONE, settings, 0)[1].sample.inputs
    assert example.keys() == inputs.keys()
    for name in ("hidden_states", "audio_hidden_states", "timestep", "video_indices", "audio_indices"):
        assert example[name].shape == inputs[name].shape, name
    assert plan_memory(read_configs(str(source.folder)), settings, DEFAULT).reduction("resident") > 0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_frames": 125}, r"num_frames is 17k \+ 5"),
        ({"num_frames": 22}, "of 5 to 15 seconds"),
        ({"guidance_scale": 2.0}, "guidance_scale is 1"),
        ({"fps": 16}, "fps is 24"),
    ],
    ids=["frames", "too short", "guidance", "fps"],
)
def test_settings_that_the_pipeline_does_not_take_are_refused(made: Made, changes: dict[str, float], problem: str):
    with pytest.raises(SettingsError, match=problem):
        made.source.geometry.require(default_settings(made.source).replace(**changes))


def test_an_evaluation_times_its_phases_and_leaves_nothing_on_it(made: Made, monkeypatch: pytest.MonkeyPatch):
    settings, entered = default_settings(made.source), []
    original = RunCosts.enter
    monkeypatch.setattr(RunCosts, "enter", lambda self, phase: (entered.append(phase), original(self, phase))[1])
    pipeline = load_pipeline(made.source, "cpu")
    models = (pipeline.vae, pipeline.transformer, pipeline.text_encoder.model)
    before = [set(vars(each)) for each in models]
    with measuring_costs(pipeline) as costs:
        generate_video(pipeline, made.prompt, settings, 0, on_step=costs.step)
    phases = list(dict.fromkeys(phase for phase in entered if phase))
    assert phases == list(PHASES)
    assert costs.seconds_per_step is not None and 0 < costs.seconds_per_step < 60
    assert costs._num_steps == len(Plan.of(made.source, [], [0], settings, "cpu").steps) == settings.num_steps - 1
    assert before == [set(vars(each)) for each in models]


def test_texts_are_not_encoded_ahead_where_the_text_encoder_looks_at_an_image(made: Made):
    require_texts_alone(made.source, [TEXT_ALONE])
    with pytest.raises(SettingsError, match=r"looks at the image of prompt 'prompt-2'.*choose resident"):
        require_texts_alone(made.source, [TEXT_ALONE, made.prompt])


def test_a_modular_folder_that_lacks_a_component_is_refused_by_its_name(made: Made, tmp_path: Path):
    for entry in made.source.folder.iterdir():
        if entry.name != "audio_vae":
            (tmp_path / entry.name).symlink_to(entry)
    with pytest.raises(ModelError, match="has no folder audio_vae"):
        load_pipeline(SourceModel.open(tmp_path), "cpu")


def test_a_modular_index_with_another_subfolder_is_refused(made: Made, tmp_path: Path):
    for entry in made.source.folder.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    index = tmp_path / "modular_model_index.json"
    values = json.loads(index.read_text())
    values["vae"][2]["subfolder"] = "../vae"
    index.unlink()
    index.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"component vae of .* lies in its subfolder '../vae'"):
        SourceModel.open(tmp_path)
