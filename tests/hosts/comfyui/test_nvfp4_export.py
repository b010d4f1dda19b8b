"""Laws of an export for ComfyUI: its names, its bytes as ComfyUI's library reads them, complete or
absent, refusals.
"""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from tempoquant.checkpoint import read_layer
from tempoquant.checkpoint.files import WEIGHTS_NAME
from tempoquant.checkpoint.manifest import read_manifest, verify_manifest
from tempoquant.errors import CheckpointError, ModelError, OutputError, UnsupportedError
from tempoquant.hosts.comfyui import nvfp4_export
from tempoquant.hosts.comfyui.nvfp4_export import export
from tempoquant.hosts.nunchaku.export import export as export_to_nunchaku
from tempoquant.kernels.reference import dequantize_residual
from tempoquant.models.families import family_of_denoiser
from tests import quantized_wan
from tests.hosts.comfyui.kitchen import decoded
from tests.wan_files import wan_name

COMPONENTS = {"high_noise": "transformer", "low_noise": "transformer_2"}
NAMES = [f"blocks.0.{linear}" for linear in quantized_wan.BLOCK_LINEARS]
Tensors = dict[str, torch.Tensor]


def write(folder: Path, format: str = "nvfp4", **kwargs: object) -> Path:
    """Write a quantized pipeline whose layers can be exported unless `kwargs` say otherwise."""
    return quantized_wan.write_pipeline(folder, format, **{"deflated": False, "centred": False, **kwargs})


def files_of(output: Path, denoiser: str) -> tuple[Path, Path]:
    return (
        output / "diffusion_models" / f"tempoquant_{denoiser}_nvfp4.safetensors",
        output / "loras" / f"tempoquant_{denoiser}_nvfp4_branch.safetensors",
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def layer_of(tensors: Tensors, name: str) -> Tensors:
    prefix = f"{wan_name(name)}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


class AsComfyUIComputes(nn.Module):
    """f(x) + up · (down · x), of exported tensors."""

    def __init__(self, tensors: Tensors, lora: Tensors, name: str) -> None:
        super().__init__()
        self.layer, key = layer_of(tensors, name), f"diffusion_model.{wan_name(name)}"
        self.weight = decoded(self.layer, len(self.layer["bias"]))
        self.up, self.down = lora[f"{key}.lora_up.weight"].float(), lora[f"{key}.lora_down.weight"].float()
        self.factor = lora[f"{key}.alpha"].item() / len(self.down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = functional.linear(x * self.layer["pre_quant_scale"], self.weight, self.layer["bias"].float())
        return f + self.factor * functional.linear(functional.linear(x, self.down), self.up)


class WithDequantizedWeight(nn.Module):
    """Our layer with 4-bit weights and 16-bit activations."""

    def __init__(self, component: Path, name: str) -> None:
        super().__init__()
        layer = read_layer(component, name)
        self.weight, self.bias = layer.dequantize(), layer.bias.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("quantized") / "nvfp4")


@pytest.fixture(scope="module")
def exported(quantized: Path) -> Path:
    output = quantized.with_name("exported")
    export(quantized, output)
    return output


def test_the_folder_holds_a_model_and_a_branch_for_each_denoiser_and_nothing_else(exported):
    wanted = {file.relative_to(exported).as_posix() for name in COMPONENTS for file in files_of(exported, name)}
    assert contents(exported).keys() == wanted | {"README.md", "tempoquant.json"}
    verify_manifest(exported)
    assert read_manifest(exported).run["export_target"] == "comfyui-nvfp4"
    for name in wanted:
        assert f"`{name}`" in (exported / "README.md").read_text()


@pytest.mark.parametrize("denoiser", COMPONENTS)
def test_names_are_the_original_release_s_and_each_4_bit_layer_is_marked(quantized, exported, denoiser):
    model, lora = (load_file(file) for file in files_of(exported, denoiser))
    state = load_file(quantized / COMPONENTS[denoiser] / WEIGHTS_NAME)
    rest = {wan_name(name) for name in state if name.rpartition(".")[0] not in NAMES}
    keys = ("weight", "weight_scale", "weight_scale_2", "pre_quant_scale", "comfy_quant", "bias")
    assert model.keys() == rest | {f"{wan_name(name)}.{key}" for name in NAMES for key in keys}
    assert {"blocks.0.self_attn.q.weight", "head.modulation", "patch_embedding.weight"} <= model.keys()
    assert lora.keys() == {
        f"diffusion_model.{wan_name(name)}.{key}"
        for name in NAMES
        for key in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    for name in state:
        if wan_name(name) in rest:
            assert model[wan_name(name)].dtype == state[name].dtype and torch.equal(model[wan_name(name)], state[name])


@pytest.mark.parametrize("denoiser", COMPONENTS)
def test_comfy_kitchen_decodes_from_the_files_what_the_checkpoint_holds(quantized, exported, denoiser):
    tensors = load_file(files_of(exported, denoiser)[0])
    for name in NAMES:
        source = read_layer(quantized / COMPONENTS[denoiser], name)
        found = decoded(layer_of(tensors, name), source.out_features)
        assert torch.equal(found, dequantize_residual(source.weight_tensors, source.format))


@pytest.mark.parametrize("denoiser", COMPONENTS)
def test_a_model_of_the_files_predicts_what_ours_does_in_16_bit_activations(quantized, exported, denoiser):
    component = quantized / COMPONENTS[denoiser]
    tensors, lora = (load_file(file) for file in files_of(exported, denoiser))
    outputs = []
    for make in (lambda name: WithDequantizedWeight(component, name), lambda n: AsComfyUIComputes(tensors, lora, n)):
        model = getattr(quantized_wan.tiny_pipeline(), COMPONENTS[denoiser]).float()
        for name in NAMES:
            model.set_submodule(name, make(name))
        outputs.append(quantized_wan.run(model, torch.float32))
    error = (outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum()
    assert 0 < float(error) < 1e-10  # −100 dB: other sums in float32, nothing else


def test_the_files_say_where_they_come_from(exported):
    for denoiser in COMPONENTS:
        for file in files_of(exported, denoiser):
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
            record = json.loads(metadata["tempoquant"])
            assert metadata.keys() == {"format", "tempoquant"}  # ComfyUI takes "config" for a model's
            assert (record["denoiser"], record["clip_ratios_carried"]) == (denoiser, False)
            assert record["recipe"]["name"] == "test" and record["calibration"]["prompts"] == [quantized_wan.PROMPT]


def test_what_was_written_is_counted(quantized, exported):
    for each in export(quantized, exported):
        model, lora = (load_file(file) for file in files_of(exported, each.denoiser))
        stored = sum(t.nbytes for name in NAMES for key, t in layer_of(model, name).items() if key != "bias")
        weights = sum(2 * model[f"{wan_name(name)}.weight"].numel() for name in NAMES)
        branches = sum(tensor.nbytes for tensor in lora.values())
        assert each.bits_per_weight == pytest.approx(8 * (stored + branches) / weights, rel=1e-12)
        assert (each.num_layers, each.num_clipped) == (10, 10)
        assert each.num_bytes == sum(file.stat().st_size for file in files_of(exported, each.denoiser))


def test_without_branches_there_is_no_lora(tmp_path):
    results = export(write(tmp_path / "quantized", rank=0), tmp_path / "out")
    assert [each.branch_file for each in results] == [None, None]
    assert not (tmp_path / "out" / "loras").exists() and "| none |" in (tmp_path / "out" / "README.md").read_text()


def test_a_layer_kept_in_16_bits_stays_so_and_is_not_marked(tmp_path):
    source = write(tmp_path / "quantized")
    model = quantized_wan.tiny_pipeline().transformer
    layers = quantized_wan.quantize_all(model, "nvfp4", deflated=False, centred=False)
    del layers[NAMES[9]]
    shutil.rmtree(source / "transformer")
    quantized_wan.write_component(source / "transformer", model, layers)
    export(source, tmp_path / "out")
    found = layer_of(load_file(files_of(tmp_path / "out", "high_noise")[0]), NAMES[9])
    assert found.keys() == {"weight", "bias"} and torch.equal(found["weight"], model.get_submodule(NAMES[9]).weight)


def test_the_same_export_again_is_left_as_it_is_and_another_is_not_overwritten(quantized, exported, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in exported.rglob("*")}
    export(quantized, exported)
    assert {file: file.stat().st_mtime_ns for file in exported.rglob("*")} == before
    other = write(tmp_path / "other", rank=2)
    with pytest.raises(OutputError, match="different source"):
        export(other, exported)
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    export(other, copy, overwrite=True)
    assert files_of(copy, "high_noise")[1].stat().st_size < files_of(exported, "high_noise")[1].stat().st_size


@pytest.mark.parametrize(
    ("format", "kwargs", "words"),
    [
        ("nvfp4", {"deflated": True}, "deflation = true"),
        ("nvfp4", {"centred": True}, "centring = true"),
        ("nvfp4", {"rotated": True}, "rotation = true"),
        ("nvfp4_m1", {}, "is in nvfp4_m1"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name_before_anything_is_written(tmp_path, format, kwargs, words):
    source = write(tmp_path / "quantized", format, **kwargs)
    with pytest.raises(UnsupportedError) as caught:
        export(source, tmp_path / "out")
    assert words in str(caught.value) and "--recipe comfyui_nvfp4" in str(caught.value)
    assert "blocks.0.attn1.to_k of high_noise" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]


def test_what_is_not_a_quantized_pipeline_is_refused(quantized, tmp_path):
    export_to_nunchaku(quantized, tmp_path / "nunchaku")
    with pytest.raises(UnsupportedError, match="an export already"):
        export(tmp_path / "nunchaku", tmp_path / "out")
    quantized_wan.tiny_pipeline().save_pretrained(tmp_path / "16bit")
    with pytest.raises(CheckpointError, match="not quantized"):
        export(tmp_path / "16bit", tmp_path / "out")
    with pytest.raises(ModelError):
        export(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(OutputError, match="overlap"):
        export(quantized, quantized / "inside")


def test_a_tensor_that_is_missing_or_strange_is_named(quantized, tmp_path):
    """ComfyUI ignores both silently."""
    source = Path(shutil.copytree(quantized, tmp_path / "quantized"))
    file = source / "transformer" / WEIGHTS_NAME
    whole = load_file(file)
    save_file({**whole, "blocks.0.attn2.strange.weight": torch.ones(128)}, file)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn2\.strange"):
        export(source, tmp_path / "out")
    del whole["scale_shift_table"]
    save_file(whole, file)
    with pytest.raises(CheckpointError, match=r"lacks .*scale_shift_table"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_family_whose_names_comfyui_does_not_share_is_refused(quantized, tmp_path, monkeypatch):
    family = family_of_denoiser("WanTransformer3DModel")
    monkeypatch.setitem(family.__dict__, "original_name", lambda _name: None)
    with pytest.raises(UnsupportedError, match=r"of high_noise has no name in ComfyUI .* family wan: load the folder"):
        export(quantized, tmp_path / "out")


def test_after_an_interruption_the_same_call_goes_on_and_ends_with_the_same_bytes(
    quantized, exported, tmp_path, monkeypatch
):
    iter_layers = nvfp4_export.iter_layers

    def interrupted(folder):
        if folder.name == "transformer":
            yield from iter_layers(folder)
            return
        yield next(iter_layers(folder))
        raise KeyboardInterrupt

    monkeypatch.setattr(nvfp4_export, "iter_layers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(quantized, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    finished = files_of(tmp_path / "out.unfinished" / "result", "high_noise")[0]
    inode = finished.stat().st_ino
    monkeypatch.setattr(nvfp4_export, "iter_layers", iter_layers)
    export(quantized, tmp_path / "out")
    assert files_of(tmp_path / "out", "high_noise")[0].stat().st_ino == inode
    assert contents(tmp_path / "out") == contents(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_layer_is_in_memory_at_a_time(quantized, tmp_path, monkeypatch):
    iter_layers, alive, most = nvfp4_export.iter_layers, weakref.WeakSet(), []

    def watched(folder):
        for name, layer in iter_layers(folder):
            alive.add(layer)
            most.append(len(alive))
            yield name, layer
            del layer

    monkeypatch.setattr(nvfp4_export, "iter_layers", watched)
    export(quantized, tmp_path / "out")
    assert len(most) == 2 * len(NAMES)
    assert max(most) <= 2  # this one, and the one before, until its name is taken by this
