"""Laws of quantizing a whole pipeline, on the bundled model with very few steps."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

import tempoquant
from tempoquant import Recipe
from tempoquant.checkpoint.journal import Commit, Journal
from tempoquant.engines import Local
from tempoquant.errors import CalibrationError, ModelError, OutputError, RecipeError, TempoQuantError
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import generate_video
from tempoquant.models.fingerprint import fingerprint
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.source import SourceModel
from tempoquant.prompts import Prompt
from tempoquant.recording.plan import ModelIdentity, RecordingPlan
from tempoquant.recording.record import record
from tempoquant.tiny import weights_folder
from tempoquant.tiny.sets import evaluation_items

SOURCE = SourceModel.open("tiny")

QUICK = Recipe.load("paper").replace(num_prompts=1, num_steps=4, rank=2, height=32, width=32, num_frames=5)


def held_out() -> Prompt:
    item = evaluation_items(1)[0]
    return Prompt(item.id, item.image, item.prompt)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tempoquant.quantize("tiny", tmp_path_factory.mktemp("quantize") / "quick", QUICK)


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def all_tensors(component: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in component.glob("*.safetensors") for name, tensor in load_file(file).items()}


def tensors_of(pipeline: WanImageToVideoPipeline) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for name in ("transformer", "transformer_2")
            for key, value in getattr(pipeline, name).state_dict().items()}  # fmt: skip


def test_plain_diffusers_runs_what_quantize_wrote(quantized: Path) -> None:
    pipeline = WanImageToVideoPipeline.from_pretrained(quantized, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompt = held_out()
    frames = pipeline(image=prompt.image, prompt=prompt.text, height=64, width=64, num_frames=5,
                      num_inference_steps=2, output_type="np").frames  # fmt: skip
    assert frames.shape == (1, 5, 64, 64, 3)
    assert type(pipeline.transformer.blocks[0].ffn.net[2]).__name__ == "QuantizedLinear"


def test_the_same_seed_gives_the_same_bytes(quantized: Path, tmp_path: Path) -> None:
    again = tempoquant.quantize("tiny", tmp_path / "elsewhere", QUICK)
    assert all_bytes(again) == all_bytes(quantized)


def test_another_seed_gives_other_codes(quantized: Path, tmp_path: Path) -> None:
    other = tempoquant.quantize("tiny", tmp_path / "other", QUICK, seed=1)
    weights = "transformer/diffusion_pytorch_model-00001-of-00005.safetensors"
    assert (other / weights).read_bytes() != (quantized / weights).read_bytes()


def test_what_was_not_quantized_is_as_it_was(quantized: Path) -> None:
    source, result = all_bytes(weights_folder()), all_bytes(quantized)
    for name, content in source.items():
        if not name.startswith("transformer") and name != "README.md":  # the result has a model card of its own
            assert result[name] == content
    for component in ("transformer", "transformer_2"):
        before, after = all_tensors(weights_folder() / component), all_tensors(quantized / component)
        untouched = {key for key in before if key in after and not key.endswith(".bias")}
        assert "proj_out.weight" in untouched and "blocks.0.norm2.weight" in untouched
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in untouched)


def test_a_saved_pipeline_holds_the_same_tensors_as_the_loaded_one(quantized: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(SourceModel.open(quantized), "cpu", torch.bfloat16)
    before = tensors_of(pipeline)
    pipeline.save_pretrained(tmp_path)
    after = tensors_of(load_pipeline(SourceModel.open(tmp_path), "cpu", torch.bfloat16))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in before)


def test_one_expert_loads_beside_a_16_bit_partner(quantized: Path) -> None:
    denoiser = WanTransformer3DModel.from_pretrained(quantized, subfolder="transformer", dtype=torch.bfloat16)
    pipeline = WanImageToVideoPipeline.from_pretrained(weights_folder(), transformer=denoiser, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    video = generate_video(
        pipeline, held_out(), default_settings(SourceModel.open(quantized)).replace(num_steps=3, num_frames=5), 0
    )
    assert video.shape == (5, 64, 64, 3)


def test_a_finished_identical_run_is_left_alone_and_another_is_refused(quantized: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized, tmp_path / "copy"))
    before = (folder / "transformer" / "config.json").stat().st_mtime_ns
    assert tempoquant.quantize("tiny", folder, QUICK) == folder
    assert (folder / "transformer" / "config.json").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="different seed"):
        tempoquant.quantize("tiny", folder, QUICK, seed=5)
    with pytest.raises(OutputError, match="different recipe and prompts"):
        tempoquant.quantize("tiny", folder, "rtn")
    assert tempoquant.quantize("tiny", folder, "rtn", overwrite=True) == folder
    assert json.loads((folder / "tempoquant.json").read_text())["run"]["recipe"]["name"] == "rtn"
    assert not list(tmp_path.glob(".copy*"))


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="not empty"):
        tempoquant.quantize("tiny", tmp_path, "rtn")
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["Ctrl-C", "full disk"]
)
def test_an_interrupted_run_goes_on_where_it_was(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    add, calls = Journal.add, itertools.count()

    def interrupted(journal: Journal, number: int, commit: Commit) -> None:
        if next(calls) == 2:
            raise error
        add(journal, number, commit)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", interrupted)
        with pytest.raises((KeyboardInterrupt, OutputError)):
            tempoquant.quantize("tiny", tmp_path / "out", QUICK)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.unfinished"]
    assert all_bytes(tempoquant.quantize("tiny", tmp_path / "out", QUICK)) == all_bytes(quantized)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_unfinished_work_of_another_run_is_refused_and_the_difference_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("tempoquant.quantizing.run.record_into", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tempoquant.quantize("tiny", tmp_path / "out", QUICK)
    with pytest.raises(OutputError, match=r"unfinished work of another run \(different seed\)"):
        tempoquant.quantize("tiny", tmp_path / "out", QUICK, seed=1)
    assert tempoquant.quantize("tiny", tmp_path / "out", "rtn", overwrite=True) == tmp_path / "out"


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_second_run_on_the_same_work_is_refused_while_the_first_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*_: object, **__: object) -> None:
        with pytest.raises(OutputError, match=rf"another process \(number {os.getpid()}\) is working in"):
            tempoquant.quantize("tiny", tmp_path / "out", QUICK)
        raise KeyboardInterrupt

    monkeypatch.setattr("tempoquant.quantizing.run.record_into", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        tempoquant.quantize("tiny", tmp_path / "out", QUICK)


def test_two_devices_quantize_the_experts_in_two_processes_to_the_same_bytes(tmp_path: Path) -> None:
    """The same samples, and as many threads for each process as the one had."""
    settings = default_settings(SOURCE).replace(height=32, width=32, num_frames=5, num_steps=4)
    identity = ModelIdentity(fingerprint(SOURCE))
    record(
        SOURCE,
        tmp_path / "store",
        RecordingPlan([held_out()], settings, 6),
        model=identity,
        engine=Local(("cpu",)),
    )
    before, results = torch.get_num_threads(), []
    for num_threads, device in ((1, "cpu"), (2, "cpu,cpu")):
        torch.set_num_threads(num_threads)
        try:
            results.append(
                tempoquant.quantize("tiny", tmp_path / device, QUICK.replace(num_steps=None), device=device,
                                    store=tmp_path / "store")
            )  # fmt: skip
        finally:
            torch.set_num_threads(before)
    assert all_bytes(results[0]) == all_bytes(results[1])
    assert (
        default_settings(SourceModel.open(results[0])) == settings != default_settings(SOURCE)
    )  # the store's, remembered


def test_an_error_in_one_of_two_processes_is_raised_here(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.1.attn2.to_k.weight"][3, 3] = torch.nan

    with pytest.raises(ModelError, match=r"blocks\.1\.attn2\.to_k\.weight"):
        tempoquant.quantize(damaged(tmp_path, spoil), tmp_path / "out", "rtn", device="cpu,cpu")


def damaged(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    folder = Path(shutil.copytree(weights_folder(), tmp_path / "damaged"))
    file = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


def test_a_weight_with_nan_stops_the_run_and_is_named(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.1.attn2.to_k.weight"][3, 3] = torch.nan

    with pytest.raises(ModelError, match=r"blocks\.1\.attn2\.to_k\.weight in .* holds NaN"):
        tempoquant.quantize(damaged(tmp_path, spoil), tmp_path / "out", "rtn")
    assert not (tmp_path / "out").exists()


def test_a_truncated_model_is_refused(tmp_path: Path) -> None:
    folder = damaged(tmp_path, lambda tensors: None)
    file = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        tempoquant.quantize(folder, tmp_path / "out", "rtn")


def test_a_model_with_missing_weights_is_refused(tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["blocks.1.attn2.to_k.weight"]

    with pytest.raises(ModelError, match=r"blocks\.1\.attn2\.to_k\.weight"):
        tempoquant.quantize(damaged(tmp_path, drop), tmp_path / "out", "rtn")


def test_a_quantized_model_is_not_quantized_again(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="already quantized"):
        tempoquant.quantize(quantized, tmp_path / "twice", "rtn")


def test_a_folder_needs_prompts_to_calibrate_on(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no built-in prompts"):
        tempoquant.quantize(weights_folder(), tmp_path / "out", "paper")


def test_an_unknown_recipe_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="paper, rtn, svdquant"):
        tempoquant.quantize("tiny", tmp_path / "out", "papre")


def test_every_error_is_a_tempoquant_error() -> None:
    assert issubclass(RecipeError, TempoQuantError) and issubclass(OutputError, TempoQuantError)


def test_linked_components_are_the_same_files(tmp_path: Path) -> None:
    source = Path(shutil.copytree(weights_folder(), tmp_path / "source"))
    linked = tempoquant.quantize(source, tmp_path / "linked", "rtn", link=True)
    copied = tempoquant.quantize(source, tmp_path / "copied", "rtn")
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (linked / name).samefile(source / name) and not (copied / name).samefile(source / name)
    assert all_bytes(linked) == all_bytes(copied)
