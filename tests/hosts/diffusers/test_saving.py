"""A 4-bit model is saved so that it loads again and computes the same, or not a file is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from peft import LoraConfig

import tempoquant
from tempoquant.errors import ModelError, OutputError, TempoQuantError, UnsupportedError
from tempoquant.hosts.diffusers.loader import register
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.source import SourceModel
from tests.quantized_wan import generate, load, run, write_pipeline

register()
SETTINGS = {"height": 64, "width": 64, "num_frames": 5, "num_steps": 4, "guidance_scale": 1.0, "flow_shift": None}
CPU = torch.device("cpu")
ADAPTER = LoraConfig(r=2, target_modules=["to_q"])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a quantized pipeline of four steps."""
    folder = write_pipeline(tmp_path_factory.mktemp("pipeline") / "quantized")
    (folder / "sampling.json").write_text(json.dumps(SETTINGS))
    return folder


def settings_of(folder: Path) -> SamplingSettings:
    return default_settings(SourceModel.open(folder, weights=False))  # which finds no files of a variant


def load_all(folder: Path, **kwargs: Any) -> Any:
    return WanImageToVideoPipeline.from_pretrained(folder, dtype=torch.bfloat16, **kwargs)


def offloaded_to_disk(model: Any, place: Path) -> None:
    model.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1,
        offload_to_disk_path=str(place),
    )  # fmt: skip


@pytest.mark.parametrize("kwargs", [{}, {"max_shard_size": "20KB"}, {"variant": "x"},
                                    {"variant": "x", "max_shard_size": "20KB"}])  # fmt: skip
def test_a_pipeline_saved_again_samples_and_computes_as_before(
    kwargs: dict[str, Any], pipeline: Path, tmp_path: Path
) -> None:
    pipe = load_all(pipeline)
    pipe.save_pretrained(tmp_path / "once", **kwargs)
    variant = {key: value for key, value in kwargs.items() if key == "variant"}
    load_all(tmp_path / "once", **variant).save_pretrained(tmp_path / "twice")
    assert settings_of(pipeline) == SamplingSettings(**{**SETTINGS, "flow_shift": 5.0}, fps=16)  # type: ignore[arg-type]
    assert settings_of(tmp_path / "once") == settings_of(tmp_path / "twice") == settings_of(pipeline)
    assert torch.equal(generate(load_all(tmp_path / "twice")), generate(pipe))


def test_a_dequantized_pipeline_is_saved_as_a_16_bit_one(pipeline: Path, tmp_path: Path) -> None:
    pipe = load_all(pipeline)
    for model in (pipe.transformer, pipe.transformer_2):
        model.dequantize()
    pipe.save_pretrained(tmp_path / "dense")
    assert settings_of(tmp_path / "dense") == settings_of(pipeline)
    again = load_all(tmp_path / "dense")
    for name in ("transformer", "transformer_2"):
        assert "quantization_config" not in json.loads((tmp_path / "dense" / name / "config.json").read_text())
        wanted, found = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert found["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    once_more = tempoquant.quantize(tmp_path / "dense", tmp_path / "quantized", "rtn")
    assert (once_more / "sampling.json").is_file() and settings_of(once_more) == settings_of(pipeline)


REFUSED: dict[str, tuple[Callable[[Any, Path], Any], dict[str, Any], str]] = {
    "adapter": (lambda model, _: model.add_adapter(ADAPTER, "x"), {}, r"LoRA adapters in it \(x\)"),
    "pickle": (lambda model, _: None, {"safe_serialization": False}, "as safetensors only"),
    "flashpack": (lambda model, _: None, {"use_flashpack": True}, "as safetensors only"),
    "meta": (lambda model, _: accelerate.cpu_offload(model, CPU), {}, "are offloaded"),
    "disk": (offloaded_to_disk, {}, "are offloaded"),
    "a layer that was replaced": (
        lambda model, _: model.set_submodule("blocks.0.attn1.to_q", torch.nn.Linear(128, 128)),
        {},
        "no longer has the 4-bit layers",
    ),
    "dequantized, adapter": (lambda model, _: model.dequantize().add_adapter(ADAPTER, "x"), {}, "LoRA adapters in it"),
    "dequantized, pickle": (lambda model, _: model.dequantize(), {"safe_serialization": False}, "as safetensors only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_load_again_is_refused_before_a_file_is_written(
    case: str, pipeline: Path, tmp_path: Path
) -> None:
    change, kwargs, words = REFUSED[case]
    model = load(pipeline / "transformer")
    change(model, tmp_path / "place")
    with pytest.raises(UnsupportedError, match=words):
        model.save_pretrained(tmp_path / "saved", **kwargs)
    assert not (tmp_path / "saved").exists()


def test_a_pipeline_with_one_unfit_component_writes_none(pipeline: Path, tmp_path: Path) -> None:
    pipe = load_all(pipeline)
    pipe.transformer_2.add_adapter(ADAPTER, "x")
    with pytest.raises(UnsupportedError, match="save them with save_lora_adapter"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(generate(load_all(tmp_path / "saved")), generate(load_all(pipeline)))


@pytest.mark.parametrize("dequantized", [False, True])
def test_saving_where_weights_lie_is_refused_and_leaves_them(dequantized: bool, pipeline: Path, tmp_path: Path) -> None:
    files = {file: file.read_bytes() for file in pipeline.rglob("*") if file.is_file()}
    pipe = load_all(pipeline)
    if dequantized:
        pipe.transformer.dequantize()
    with pytest.raises(OutputError, match="holds weights already"):
        pipe.save_pretrained(pipeline)
    with pytest.raises(OutputError, match="holds weights already"):
        pipe.transformer.save_pretrained(pipeline / "transformer")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        pipe.transformer.save_pretrained(tmp_path / "file")
    assert {file: file.read_bytes() for file in pipeline.rglob("*") if file.is_file()} == files


def test_offloaded_weights_are_not_dequantized(pipeline: Path) -> None:
    model = load(pipeline / "transformer")
    before = run(model)
    accelerate.cpu_offload(model, CPU)
    with pytest.raises(UnsupportedError, match="cannot be dequantized"):
        model.dequantize()
    assert torch.equal(run(model), before)


def test_experts_that_disagree_about_sampling_are_refused(pipeline: Path, tmp_path: Path) -> None:
    load_all(pipeline).save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "transformer_2" / "config.json"
    record = json.loads(config.read_text())
    config.write_text(json.dumps({**record, "_sampling": {**SETTINGS, "num_steps": 8}}))
    with pytest.raises(ModelError, match="say different things about sampling"):
        settings_of(tmp_path / "saved")
    config.write_text(json.dumps({**record, "_sampling": 4}))
    with pytest.raises(TempoQuantError, match="not a valid sampling file"):
        settings_of(tmp_path / "saved")
