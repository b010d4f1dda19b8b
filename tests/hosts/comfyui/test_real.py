"""Inside a real ComfyUI: the bundled model in four bits answers there what it answers in
diffusers.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tempoquant.calibrate.sample import RecordedCall
from tempoquant.hosts.comfyui.export import export
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import record_trajectory
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.source import SourceModel
from tempoquant.prompts import Prompt
from tempoquant.quantizing import quantize
from tempoquant.recipe import Recipe
from tempoquant.runtime.convert import quantized_linears
from tempoquant.tiny.sets import evaluation_items
from tests.hosts.comfyui.real import dense, load, needs_comfyui, on_device, predict, sqnr_db
from tests.quantized_wan import write_pipeline
from tests.wan_files import wan_name

pytestmark = [needs_comfyui, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def calls() -> list[RecordedCall]:
    """Return every fourth step of one generation in 16 bits, both branches of guidance."""
    source = SourceModel.open("tiny")
    [item] = evaluation_items(1)
    made = record_trajectory(
        load_pipeline(source, "cpu"), Prompt(item.id, item.image, item.prompt), default_settings(source), 0
    )
    return [call for call in made if call.sample.step_index % 4 == 0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the bundled model by two recipes."""
    root = tmp_path_factory.mktemp("comfyui")
    return {name: quantize("tiny", root / name, Recipe.load(name)) for name in ("rtn", "default")}


@pytest.fixture(scope="module", params=["folder", "files"])
def places(request: pytest.FixtureRequest, folders: dict[str, Path]) -> dict[str, dict[str, Path]]:
    """Return by recipe and denoiser the place that ComfyUI loads."""
    names = ("high_noise", "low_noise")
    if request.param == "folder":
        return {recipe: dict.fromkeys(names, folder) for recipe, folder in folders.items()}
    made = {recipe: export(folder, folder.with_name(f"{recipe}_files")) for recipe, folder in folders.items()}
    return {recipe: {name: out / f"{name}.safetensors" for name in names} for recipe, out in made.items()}


def answers(patchers: dict[str, Any], calls: list[RecordedCall]) -> list[torch.Tensor]:
    return [predict(patchers[call.sample.denoiser], call.sample.inputs) for call in calls]


@torch.no_grad()
def diffusers_answers(folder: str | Path, calls: list[RecordedCall]) -> list[torch.Tensor]:
    pipeline = load_pipeline(SourceModel.open(folder), "cpu")
    kinds = {"high_noise": pipeline.transformer, "low_noise": pipeline.transformer_2}
    return [kinds[call.sample.denoiser](**call.sample.inputs, return_dict=False)[0] for call in calls]


def test_16_bits_agree_with_diffusers_in_every_call(calls: list[RecordedCall]) -> None:
    root = SourceModel.open("tiny").folder
    models = {"high_noise": dense(root / "transformer"), "low_noise": dense(root / "transformer_2")}
    found = answers(models, calls)
    assert min(sqnr_db(each, call.noise_prediction) for each, call in zip(found, calls, strict=True)) > 110


def test_rounded_to_nearest_calls_are_those_of_diffusers_but_where_a_rounding_flips(
    places: Any, calls: list[RecordedCall], folders: Any
) -> None:
    """A number that lies on the edge between two codes in float32 may fall to either side: then a
    call shows it.
    """
    models = {name: load(place, name) for name, place in places["rtn"].items()}
    found, wanted = answers(models, calls), diffusers_answers(folders["rtn"], calls)
    levels = [sqnr_db(one, other) for one, other in zip(found, wanted, strict=True)]
    print("rtn against diffusers, dB:", [round(level, 1) for level in levels])
    assert sum(level >= 100 for level in levels) >= 0.8 * len(levels) and min(levels) > 40


def test_every_linear_gives_the_same_bits_for_the_input_that_diffusers_gives_it(
    places: Any, calls: list[RecordedCall], folders: Any
) -> None:
    call = calls[0]
    pipeline = load_pipeline(SourceModel.open(folders["default"]), "cpu")
    theirs = {wan_name(f"{name}.weight"): linear for name, linear in quantized_linears(pipeline.transformer).items()}
    patcher = load(places["default"]["high_noise"], "high_noise")
    ours = quantized_linears(patcher.model.diffusion_model)
    assert {name.removesuffix(".weight") for name in theirs} == ours.keys() and len(ours) == 40
    same = []

    def compare(name: str) -> Any:
        def hook(module: Any, args: Any, y: torch.Tensor) -> None:
            with ours[name].clock.at(call.sample.inputs["timestep"]):
                same.append(torch.equal(ours[name](args[0]), y))

        return hook

    for name, linear in theirs.items():
        linear.register_forward_hook(compare(name.removesuffix(".weight")))
    with torch.no_grad():
        pipeline.transformer(**call.sample.inputs)
    assert len(same) == 40 and all(same)


def test_the_default_recipe_is_as_near_to_16_bits_as_in_diffusers(
    places: Any, calls: list[RecordedCall], folders: Any
) -> None:
    """Rounding flips at ties, so calls are not equal; how far they are from 16 bits is."""
    models = {name: load(place, name) for name, place in places["default"].items()}
    found, wanted = answers(models, calls), diffusers_answers(folders["default"], calls)
    reference = [call.noise_prediction for call in calls]
    ours, theirs = ([sqnr_db(one, call) for one, call in zip(made, reference, strict=True)] for made in (found, wanted))
    print("default: distance to 16 bits here and in diffusers, dB:", [(round(a, 2), round(b, 2)) for a, b in
                                                                      zip(ours, theirs, strict=True)])  # fmt: skip
    assert abs(sum(ours) - sum(theirs)) / len(ours) < 0.1
    assert sum(ours) / len(ours) > 15


def test_sizes_are_the_packed_ones_and_what_is_streamed_answers_the_same(
    places: Any, calls: list[RecordedCall]
) -> None:
    call = next(each for each in calls if each.sample.denoiser == "high_noise")
    patcher = load(places["default"]["high_noise"], "high_noise")
    stored = sum(tensor.nbytes for tensor in patcher.model.diffusion_model.parameters())
    assert stored <= patcher.model_size() < stored + 2**16  # and the sampler's table of sigmas
    wanted = predict(on_device(patcher), call.sample.inputs)
    assert patcher.loaded_size() == patcher.model_size()
    patcher.detach()
    assert torch.equal(predict(on_device(patcher, lowvram_bytes=2**20), call.sample.inputs), wanted)
    assert 0 < patcher.loaded_size() <= 2**20 and patcher.model.model_lowvram
    streamed = [m for m in patcher.model.modules() if hasattr(m, "entry") and m.comfy_cast_weights]
    assert len(streamed) > 10
    patcher.partially_load(patcher.load_device, 2**30)
    assert not any(m.comfy_cast_weights for m in streamed)
    freed = patcher.partially_unload(torch.device("cpu"), 2**20)
    assert freed >= 2**20 and any(m.comfy_cast_weights for m in streamed)
    assert torch.equal(predict(patcher, call.sample.inputs), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_dtypes_and_batches_run(places: Any, calls: list[RecordedCall], dtype: torch.dtype) -> None:
    """Against float32 they are as far off as diffusers in the same dtype: rounding flips, in
    both.
    """
    call = next(each for each in calls if each.sample.denoiser == "low_noise")
    inputs = {key: torch.cat([value, value]) for key, value in call.sample.inputs.items()}
    exact = predict(load(places["rtn"]["low_noise"], "low_noise"), inputs)
    assert torch.equal(exact[0], exact[1])
    half = predict(load(places["rtn"]["low_noise"], "low_noise", dtype), inputs, dtype)
    assert half.isfinite().all() and sqnr_db(half, exact) > 15


def test_activation_bits_hold_for_one_clone_and_its_timesteps(places: Any, calls: list[RecordedCall]) -> None:
    from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

    from tempoquant.hosts.comfyui.sampling import with_activation_bits

    call = next(each for each in calls if each.sample.denoiser == "high_noise")
    patcher = load(places["rtn"]["high_noise"], "high_noise")
    four = predict(patcher, call.sample.inputs)

    def by(clone: Any) -> torch.Tensor:
        options = {"wrappers": clone.wrappers}
        run = WrapperExecutor.new_executor(
            lambda: predict(clone, call.sample.inputs), get_all_wrappers(WrappersMP.APPLY_MODEL, options)
        )
        return run.execute()

    eight, none = with_activation_bits(patcher, 8, 0, 1000), with_activation_bits(patcher, 8, 0, 100)
    assert sqnr_db(by(eight), call.noise_prediction) > sqnr_db(four, call.noise_prediction) + 3
    assert torch.equal(by(none), four) and torch.equal(by(with_activation_bits(eight, 4, 0, 1000)), four)
    assert torch.equal(by(patcher), four)


def test_the_split_step_is_where_the_boundary_lies(places: Any) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    from tempoquant.hosts.comfyui.sampling import split_step_of

    for name in ("high_noise", "low_noise"):
        [shifted] = ModelSamplingSD3().patch(load(places["rtn"][name], name), 5.0)
        assert split_step_of(shifted, "simple", 20) == 8 and split_step_of(shifted, "simple", 4) == 2


def test_every_format_and_every_tensor_has_its_place(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "mixed", "mixed")
    for name in ("high_noise", "low_noise"):
        patcher = load(folder, name)
        linears = [m for m in patcher.model.modules() if hasattr(m, "entry")]
        assert len({linear.entry.format.name for linear in linears}) > 3 and not any(
            parameter.is_meta for parameter in patcher.model.parameters()
        )
