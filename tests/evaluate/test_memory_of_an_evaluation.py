"""Memory modes of an evaluation: the same numbers in each, and models that leave nothing behind."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tempoquant.evaluate.benchmark_sets import load_benchmark
from tempoquant.evaluate.evaluation import evaluate
from tempoquant.evaluate.evaluation_folder import read_latents
from tempoquant.evaluate.files import read_lossless
from tempoquant.evaluate.generation import loaded_model
from tempoquant.evaluate.layer_maps import layer_maps
from tempoquant.evaluate.plan import Model, Plan
from tempoquant.evaluate.request import Request
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import generate_video, predict_noise, record_trajectory
from tempoquant.models.denoiser_inputs import on_device
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.placement.memory_modes import load_in_mode, set_memory_mode
from tempoquant.placement.modes import MEMORY_MODES
from tempoquant.progress import SILENT
from tempoquant.quantizing import quantize
from tempoquant.timesteps import TimestepBins
from tests.placement.test_memory_modes import hooked
from tests.recorded import CPU, PROMPTS, SETTINGS, SOURCE

STEPS = SETTINGS.replace(num_steps=2)
BINS = dict.fromkeys(COMPONENTS, TimestepBins())


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    return SourceModel.open(quantize("tiny", tmp_path_factory.mktemp("models") / "rtn", "rtn", device="cpu"))


@pytest.fixture(scope="module")
def evaluated(rounded, tmp_path_factory):
    """Return by mode the content of evaluation.json, and its folder."""
    found = {}
    for mode in MEMORY_MODES:
        benchmark = load_benchmark("tiny", None, 1.0, 1)
        request = Request(Model("16-bit", SOURCE), [Model("rtn", rounded)], benchmark, STEPS, limit=1, memory=mode)
        out = tmp_path_factory.mktemp("evaluation") / mode
        found[mode] = SimpleNamespace(record=evaluate(request, out, CPU), out=out, item=benchmark.items[0])
    return found


@pytest.mark.parametrize("label", ["16-bit", "rtn"])
def test_every_mode_gives_the_latents_and_frames_of_a_pipeline_without_one(evaluated, rounded, label):
    """The bundled model's tokens are one chunk, and its frames one tile: the same products in the
    same order.
    """
    pipeline = load_pipeline(SOURCE if label == "16-bit" else rounded, "cpu")
    latents = []
    item = next(iter(evaluated.values())).item
    frames = generate_video(
        pipeline, item.prompt(), STEPS, 0, on_latents=lambda _, found: latents.append(found.clone())
    )
    for found in evaluated.values():
        [latent_file] = (found.out / "latents" / label).iterdir()
        [frame_file] = (found.out / "lossless" / label).iterdir()
        assert torch.equal(read_latents(latent_file)["low_noise bin 0"], latents[-1])
        assert np.array_equal(read_lossless(frame_file), frames)


def test_every_mode_gives_the_same_metrics_maps_and_recorded_calls(evaluated):
    first, *others = evaluated.values()
    assert set(first.record["models"][1]["maps"]) == {"high_noise", "low_noise"}
    [calls] = [file.read_bytes() for file in (first.out / "calls").iterdir()]
    for other in others:
        for key in ("items", "summary", "notes"):
            assert other.record[key] == first.record[key]
        assert other.record["models"][1]["maps"] == first.record["models"][1]["maps"]
        assert [file.read_bytes() for file in (other.out / "calls").iterdir()] == [calls]


def test_the_record_and_the_identity_name_the_mode(evaluated):
    for mode, found in evaluated.items():
        assert found.record["settings"]["memory"] == mode
        assert json.loads((found.out / "settings.json").read_text())["memory"] == mode


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_a_released_model_has_no_mode_and_no_hook_left(mode):
    plan = Plan.of(SOURCE, (), (0,), STEPS, "cpu", mode)
    with loaded_model(Model("16-bit", SOURCE), plan, "cpu", SILENT) as pipeline:
        assert pipeline._tempoquant_memory_mode.mode == mode
    assert hooked(pipeline) == []
    assert pipeline._tempoquant_memory_mode is None


def test_inputs_go_where_the_expert_computes_though_its_weights_wait_elsewhere():
    model = load_pipeline(SOURCE, "cpu").transformer
    inputs = {"hidden_states": torch.zeros(2, dtype=torch.float64), "timestep": torch.zeros(1, dtype=torch.float64)}
    placed = on_device(model, SOURCE.family, inputs, torch.device("meta"))
    assert {tensor.device.type for tensor in placed.values()} == {"meta"}
    assert placed["hidden_states"].dtype == torch.float32
    assert placed["timestep"].dtype == torch.float64
    assert {tensor.device.type for tensor in on_device(model, SOURCE.family, inputs).values()} == {"cpu"}


def repeat(pipeline, call):
    return predict_noise(pipeline, call)


def map_layers(pipeline, call):
    return layer_maps(pipeline, SOURCE, [call], BINS)


@pytest.mark.parametrize("run", [repeat, map_layers])
@pytest.mark.parametrize("mode", ["resident", "swap"])  # in "lean" diffusers moves them, and knows no meta device
def test_a_recorded_call_is_repeated_on_the_device_of_the_mode(rounded, run, mode):
    """PyTorch's meta device in a GPU's place: the denoiser is asked, and what it is given is
    already there.
    """
    [call, *_] = [call.sample for call in record_trajectory(load_pipeline(SOURCE, "cpu"), PROMPTS[0], STEPS, 0)]
    pipeline = load_pipeline(rounded, "cpu")
    set_memory_mode(pipeline, mode, "meta")
    seen = []

    def look(_module, _args, inputs):
        seen.extend(value.device.type for value in inputs.values() if isinstance(value, torch.Tensor))
        raise InterruptedError

    pipeline.transformer.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    with pytest.raises(InterruptedError):
        run(pipeline, call)
    assert seen == ["meta"] * len(call.inputs)


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_maps_of_a_loaded_model_need_no_generation_before(mode, rounded):
    """The evaluation was interrupted between the last video and the maps."""
    calls = [call.sample for call in record_trajectory(load_pipeline(SOURCE, "cpu"), PROMPTS[0], STEPS, 0)]
    plain = layer_maps(load_pipeline(rounded, "cpu"), SOURCE, calls, BINS)
    assert layer_maps(load_in_mode(rounded, mode, "cpu"), SOURCE, calls, BINS) == plain
