"""LTX-2: quantized, loaded by plain diffusers, generated with, and compared with what it was
quantized from.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplePipeline, LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES, STAGE_2_DISTILLED_SIGMA_VALUES

from tempoquant.calibrate.store import bins_of
from tempoquant.hosts.contents import configs_of
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import generate_video, predict_noise, record_trajectory
from tempoquant.models.ltx2.family import LTX2
from tempoquant.models.ltx2.pipelines import DISTILLED_SIGMAS
from tempoquant.models.replay import ReplayedDenoiser
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.schedule import sampling_steps
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.prompts import Prompt
from tempoquant.recording.plan import ModelIdentity, RecordingPlan
from tempoquant.recording.record import record_into
from tempoquant.runtime.convert import quantized_linears
from tests.conditioned import prompts_for
from tests.ltx2_pipelines import PIPELINES, write
from tests.models.made import DEFAULT as EIGHT_SAMPLES
from tests.models.made import PAPER, RTN, Made, make

MARGIN_DB = 3.0
DEFAULT = EIGHT_SAMPLES.replace(samples_per_denoiser=4)
LATER = ("ltx2_with_image", "ltx23")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] if name in LATER else []) for name in PIPELINES]
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    source = SourceModel.open(write(folder / "source", request.param))
    *_, held_out = prompts_for(source, folder / "prompts")
    return make(folder, source.folder, held_out, folder / "prompts", (RTN, DEFAULT, PAPER))


def test_the_default_recipe_is_nearer_to_16_bits_than_rounding(made: Made) -> None:
    errors = {model.label: model.denoiser_sqnr_db("transformer").mean for model in made.evidence.comparison.models}
    assert errors["default"] > errors["rtn"] + MARGIN_DB
    assert errors["paper"] > errors["rtn"]


def test_every_linear_of_both_streams_has_four_bits_but_the_gates_of_heads(made: Made) -> None:
    for folder in made.folders.values():
        layers = configs_of(folder)["transformer"].layers
        assert layers.keys() == made.source.linears("transformer").keys()
        assert len(layers) == 2 * 28  # four attentions of four linears in each stream or between them, and two nets


def test_plain_diffusers_loads_it_and_makes_the_same_video(made: Made) -> None:
    kind = getattr(diffusers, made.source.index.class_name)
    pipeline = kind.from_pretrained(made.folders["default"], dtype=torch.float32)
    video = generate_video(pipeline, made.prompt, default_settings(made.source), 0)
    expected = made.evidence.videos["default"][0]
    assert video.shape == expected.shape == (9, 64, 64, 3)
    assert np.abs(video.astype(int) - expected).mean() < 1
    linears = quantized_linears(pipeline.transformer)
    first = "transformer_blocks.0"
    assert linears[f"{first}.attn1.to_q"].shared_input is linears[f"{first}.attn1.to_v"].shared_input is not None
    assert linears[f"{first}.attn2.to_q"].shared_input is None  # its text is another input


def test_a_row_alone_answers_what_it_answered_in_the_batch(made: Made) -> None:
    pipeline = load_pipeline(made.source, "cpu")
    branches = [call.sample.guidance_branch for call in made.calls]
    assert branches == ["unconditional", "conditional"] * 4
    for call in made.calls:
        torch.testing.assert_close(predict_noise(pipeline, call.sample), call.noise_prediction)


def test_block_by_block_the_model_computes_both_streams_as_at_once(made: Made) -> None:
    call = made.calls[1]
    model = ReplayedDenoiser(DenoiserWeights(made.source, "transformer", torch.float32, "cpu"))
    carried: list[torch.Tensor] = []
    with torch.no_grad(), model.running([call.sample]):
        for index in range(model.num_blocks):
            with model.block(index):
                carried = model.run_block(index, call.sample, carried)
        assert len(carried) == 2
        torch.testing.assert_close(model.finish(call.sample, carried), call.noise_prediction)


def test_sizes_are_planned_with_the_inputs_that_calls_have(made: Made) -> None:
    source, settings = made.source, default_settings(made.source)
    latents = source.geometry.latents(settings.height, settings.width, settings.num_frames)
    example = source.family.example_inputs(source.index, source.first.config, latents)
    inputs = made.calls[0].sample.inputs
    assert example.keys() == inputs.keys()
    for name, value in example.items():
        if isinstance(value, torch.Tensor) and "audio_hidden" not in name and "audio_coords" not in name:
            assert value.shape == inputs[name].shape, name  # the audio is as long as the video at 24 frames a second


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return SourceModel.open(write(tmp_path_factory.mktemp("ltx2") / "source", "ltx2"))


def test_the_schedule_is_the_one_that_the_pipeline_takes(source: SourceModel) -> None:
    settings = default_settings(source)
    pipeline = load_pipeline(source, "cpu")
    record_trajectory(pipeline, Prompt("a", None, "a cat"), settings.replace(guidance_scale=1.0), 0)
    steps = sampling_steps(source, settings)
    assert [float(step.timestep) for step in steps] == [float(t) for t in pipeline.scheduler.timesteps]


def test_bins_of_a_distilled_schedule_of_eight_steps_hold_its_own_timesteps(
    tmp_path: Path, source: SourceModel
) -> None:
    assert list(DISTILLED_SIGMAS) == DISTILLED_SIGMA_VALUES
    distilled = _distilled(source, tmp_path / "distilled")
    settings = default_settings(distilled)
    timesteps = [float(step.timestep) for step in sampling_steps(distilled, settings)]
    assert timesteps == pytest.approx([1000 * sigma for sigma in DISTILLED_SIGMAS])
    plan = RecordingPlan([Prompt("a", None, "a cat")], settings, 8)
    store = record_into(distilled, tmp_path / "store", plan, model=ModelIdentity("none"), device="cpu")
    assert [entry.timestep for entry in store.entries("transformer")] == timesteps
    assert store.settings == settings.to_dict()
    bins = bins_of(store, PAPER, "transformer")
    assert bins.num_bins == 3 and {bins.of(t) for t in timesteps} == {0, 1, 2}


def _distilled(source: SourceModel, folder: Path) -> SourceModel:
    """Return the same pipeline as its publisher distils it: eight steps of its own, not shifted,
    without guidance.
    """
    pipeline = load_pipeline(source, "cpu")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline.save_pretrained(folder)
    settings = default_settings(source).to_dict() | {
        "num_steps": 8, "guidance_scale": 1.0, "sigmas": list(DISTILLED_SIGMAS),
    }  # fmt: skip
    (folder / "sampling.json").write_text(json.dumps(settings))
    return SourceModel.open(folder)


@pytest.mark.slow
def test_a_second_stage_refines_the_upsampled_latents_with_the_quantized_denoiser(made: Made) -> None:
    if made.source.index.class_name != "LTX2Pipeline":
        pytest.skip("the second stage is the text-to-video pipeline's")
    pipeline = diffusers.LTX2Pipeline.from_pretrained(made.folders["default"], dtype=torch.float32)
    settings: dict[str, Any] = {"frame_rate": 8.0, "guidance_scale": 1.0, "num_frames": 9}
    first = pipeline(
        "a cat", height=64, width=64, num_inference_steps=2, output_type="latent", return_dict=False, **settings
    )
    torch.manual_seed(5)
    upsampler = LTX2LatentUpsamplerModel(in_channels=16, mid_channels=32, num_blocks_per_stage=1)
    larger = LTX2LatentUpsamplePipeline(vae=pipeline.vae, latent_upsampler=upsampler)(
        latents=first[0], height=64, width=64, output_type="latent", return_dict=False
    )[0]
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    clock = next(iter(quantized_linears(pipeline.transformer).values())).clock
    seen: list[int] = []
    pipeline.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda *_: seen.append(int(clock.call.bins.max()))
    )
    frames = pipeline(
        "a cat", height=128, width=128, latents=larger, audio_latents=first[1], noise_scale=0.909375,
        sigmas=STAGE_2_DISTILLED_SIGMA_VALUES, num_inference_steps=3, output_type="np", **settings,
    ).frames  # fmt: skip
    assert frames.shape == (1, 9, 128, 128, 3) and np.isfinite(frames).all()
    timesteps = [1000 * sigma for sigma in STAGE_2_DISTILLED_SIGMA_VALUES]
    assert list(dict.fromkeys(seen)) == [clock.bins.of(t) for t in timesteps]  # guided in three ways


def test_names_of_the_original_release_are_found() -> None:
    assert LTX2.own_name("transformer_blocks.3.attn1.q_norm") == "transformer_blocks.3.attn1.norm_q"
    assert LTX2.own_name("audio_adaln_single.linear") == "audio_time_embed.linear"
    assert LTX2.own_name("transformer_blocks.3.audio_ff.net.0.proj") == "transformer_blocks.3.audio_ff.net.0.proj"
    assert LTX2.own_name("vae.decoder") is None
