"""Laws of an exported pipeline: complete or absent, the same again, honest about what it does not
carry.
"""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tempoquant.checkpoint import read_layer, verify_hashes
from tempoquant.checkpoint.files import INDEX_NAME, WEIGHTS_NAME
from tempoquant.checkpoint.manifest import read_manifest, verify_manifest
from tempoquant.errors import CheckpointError, ModelError, OutputError, UnsupportedError
from tempoquant.hosts.contents import config_of, configs_of, contents_of
from tempoquant.hosts.diffusers.pipeline import load_pipeline, open_pipeline
from tempoquant.hosts.nunchaku import export as nunchaku_export
from tempoquant.hosts.nunchaku.config import ExportedConfig
from tempoquant.hosts.nunchaku.export import export
from tempoquant.hosts.nunchaku.reader import ExportedComponent
from tests import quantized_wan
from tests.hosts.nunchaku.test_config import each_format
from tests.random_layers import random_layer

COMPONENTS = ("transformer", "transformer_2")
OTHERS = ("vae", "text_encoder", "tokenizer", "scheduler", "model_index.json")
NAMES = [f"blocks.0.{linear}" for linear in quantized_wan.BLOCK_LINEARS]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("quantized") / "nvfp4", "nvfp4")


@pytest.fixture(scope="module")
def exported(quantized: Path) -> Path:
    return export(quantized, quantized.with_name("exported"))


def write(folder: Path, format: str, **kwargs: object) -> Path:
    """Write a quantized pipeline whose layers can be exported unless `kwargs` say otherwise."""
    return quantized_wan.write_pipeline(folder, format, **{"deflated": False, "centred": False, **kwargs})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_that_is_no_transformer_is_as_it_was(quantized, exported):
    before, after = contents(quantized), contents(exported)
    kept = [name for name in before if name.split("/")[0] in OTHERS]
    assert len(kept) > len(OTHERS)
    assert all(after[name] == before[name] for name in kept)
    assert {name.split("/")[0] for name in after} == {*OTHERS, *COMPONENTS, "README.md", "tempoquant.json"}


@pytest.mark.parametrize("component", COMPONENTS)
def test_layers_come_back_from_the_files_as_they_were(quantized, exported, component):
    found = dict(ExportedComponent(exported / component).layers())
    assert sorted(found) == sorted(NAMES)
    for name, layer in found.items():
        source = read_layer(quantized / component, name)
        assert torch.equal(layer.packed, source.packed) and torch.equal(layer.scale, source.scale)


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_rest_is_stored_as_diffusers_will_cast_it(quantized, exported, component):
    before, after = (load_file(folder / component / WEIGHTS_NAME) for folder in (quantized, exported))
    rest = [name for name in before if name.rpartition(".")[0] not in NAMES]
    assert {before[name].dtype for name in rest} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(after[name], before[name].to(torch.bfloat16)) for name in rest)


def test_the_manifest_and_both_configs_say_that_clip_ratios_are_not_carried(exported):
    assert read_manifest(exported).run["clip_ratios_carried"] is False
    verify_manifest(exported)
    for component in COMPONENTS:
        config = json.loads((exported / component / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "nunchaku_lite"
        assert config["tempoquant"]["clip_ratios_carried"] is False
        verify_hashes(exported / component, config_of(exported / component))
    [note] = [note for note in contents_of(exported).denoisers[0].notes if "clip ratios" in note]
    assert note == "exported to nunchaku-lite: clip ratios are not carried (10 of 10 layers had one other than 1)"


def test_contents_count_what_the_export_stores(exported):
    for denoiser in contents_of(exported).denoisers:
        tensors = load_file(exported / denoiser.component / WEIGHTS_NAME)
        stored = sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in tensors.items()
            if name.rpartition(".")[0] in NAMES and not name.endswith(".bias")
        )
        weights = sum(2 * tensor.numel() for name, tensor in tensors.items() if name.endswith(".qweight"))
        assert denoiser.bits_per_weight == pytest.approx(8 * stored / weights, rel=1e-12)
        assert (denoiser.num_layers, denoiser.num_16bit_linears, dict(denoiser.ranks)) == (10, 0, {16: 10})
        assert [(each.clip_ratio_min, each.clip_ratio_max) for each in denoiser.bins] == [(1.0, 1.0)]


def test_calibration_is_carried_so_that_no_prompt_of_it_is_compared_on(exported):
    assert all(isinstance(config, ExportedConfig) for config in configs_of(exported).values())
    assert contents_of(exported).calibration_prompt_ids == (quantized_wan.PROMPT["id"],)


def test_a_tensor_that_diffusers_passes_over_is_left_out(exported, quantized, tmp_path):
    source = Path(shutil.copytree(quantized, tmp_path / "quantized"))
    file = source / "transformer" / WEIGHTS_NAME
    save_file({**load_file(file), "blocks.0.attn2.norm_added_q.weight": torch.ones(128)}, file)
    again = export(source, tmp_path / "out")
    assert (
        load_file(again / "transformer" / WEIGHTS_NAME).keys()
        == load_file(exported / "transformer" / WEIGHTS_NAME).keys()
    )


def test_a_tensor_that_the_model_does_not_have_is_refused(quantized, tmp_path):
    source = Path(shutil.copytree(quantized, tmp_path / "quantized"))
    file = source / "transformer" / WEIGHTS_NAME
    save_file({**load_file(file), "blocks.0.attn2.strange.weight": torch.ones(128)}, file)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn2\.strange"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@each_format
def test_an_export_generates_nearly_what_its_source_does_without_clip_ratios(format, tmp_path):
    """The two differ in how activations are rounded, and in clip ratios, which this source has none
    of.
    """
    source = write(tmp_path / "quantized", format)
    for component in COMPONENTS:
        file = source / component / WEIGHTS_NAME
        tensors = load_file(file)
        ones = torch.ones(quantized_wan.BINS.num_bins).view(torch.uint8)
        save_file({k: ones.clone() if k.endswith(".clip_ratio") else v for k, v in tensors.items()}, file)
    latents = [
        quantized_wan.generate(load_pipeline(open_pipeline(folder), "cpu"))
        for folder in (source, export(source, tmp_path / "x"))
    ]
    relative = float((latents[1] - latents[0]).square().sum() / latents[0].square().sum())
    assert 0 < relative < 1e-2


def test_the_same_export_again_is_left_as_it_is_and_another_is_not_overwritten(quantized, exported, tmp_path):
    file = exported / "transformer" / WEIGHTS_NAME
    before = (file.stat().st_ino, file.stat().st_mtime_ns)
    assert export(quantized, exported) == exported
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == before
    other = write(tmp_path / "int4", "int4")
    with pytest.raises(OutputError, match="different source"):
        export(other, exported)
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    export(other, copy, overwrite=True)
    assert config_of(copy / "transformer").layers[NAMES[0]].format.name == "int4"


def test_a_folder_with_something_else_in_it_is_refused(quantized, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        export(quantized, tmp_path / "out")
    with pytest.raises(OutputError, match="overlap"):
        export(quantized, quantized / "inside")


@pytest.mark.parametrize(
    ("format", "kwargs", "words"),
    [
        ("int4", {"deflated": True}, "deflation = true"),
        ("nvfp4", {"centred": True}, "centring = true"),
        ("nvfp4", {"centred": True, "centred_by_bin": True}, "centring_by_bin = true"),
        ("mxfp4", {}, "mxfp4"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name_before_anything_is_written(tmp_path, format, kwargs, words):
    source = write(tmp_path / "quantized", format, **kwargs)
    with pytest.raises(UnsupportedError) as caught:
        export(source, tmp_path / "out")
    assert words in str(caught.value)
    assert "blocks.0.attn1.to_k of high_noise" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]


def test_mixed_formats_are_refused(tmp_path):
    source = write(tmp_path / "quantized", "int4")
    model = quantized_wan.tiny_pipeline().transformer
    layers = quantized_wan.quantize_all(model, "int4", deflated=False, centred=False)
    layers[NAMES[3]] = random_layer(model.get_submodule(NAMES[3]), "nvfp4", deflated=False, centred=False)
    shutil.rmtree(source / "transformer")
    quantized_wan.write_component(source / "transformer", model, layers)
    with pytest.raises(UnsupportedError, match="one format for all layers"):
        export(source, tmp_path / "out")


def test_a_layer_kept_in_16_bits_stays_so_and_is_no_target(tmp_path):
    source = write(tmp_path / "quantized", "int4")
    model = quantized_wan.tiny_pipeline().transformer
    layers = quantized_wan.quantize_all(model, "int4", deflated=False, centred=False)
    del layers[NAMES[9]]
    shutil.rmtree(source / "transformer")
    quantized_wan.write_component(source / "transformer", model, layers)
    component = export(source, tmp_path / "out") / "transformer"
    config = json.loads((component / "config.json").read_text())["quantization_config"]
    assert sorted(config["svdq_w4a4"]["targets"]) == sorted(layers)
    stored = load_file(component / WEIGHTS_NAME)
    assert torch.equal(stored[f"{NAMES[9]}.weight"], model.get_submodule(NAMES[9]).weight)
    assert contents_of(component.parent).denoisers[0].num_16bit_linears == 1


def test_what_is_not_a_quantized_pipeline_is_refused(exported, tmp_path):
    with pytest.raises(UnsupportedError, match="an export already"):
        export(exported, tmp_path / "out")
    quantized_wan.tiny_pipeline().save_pretrained(tmp_path / "16bit")
    with pytest.raises(CheckpointError, match="not quantized"):
        export(tmp_path / "16bit", tmp_path / "out")
    with pytest.raises(ModelError):
        export(tmp_path / "nothing", tmp_path / "out")


def test_after_an_interruption_the_same_call_goes_on_and_ends_with_the_same_bytes(
    quantized, exported, tmp_path, monkeypatch
):
    iter_layers = nunchaku_export.iter_layers

    def interrupted(folder):
        if folder.name == "transformer":
            yield from iter_layers(folder)
            return
        yield next(iter_layers(folder))
        raise KeyboardInterrupt

    monkeypatch.setattr(nunchaku_export, "iter_layers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(quantized, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    finished = tmp_path / "out.unfinished" / "result" / "transformer" / WEIGHTS_NAME
    inode = finished.stat().st_ino
    monkeypatch.setattr(nunchaku_export, "iter_layers", iter_layers)
    export(quantized, tmp_path / "out")
    assert (tmp_path / "out" / "transformer" / WEIGHTS_NAME).stat().st_ino == inode
    assert contents(tmp_path / "out") == contents(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_layer_is_in_memory_at_a_time_and_shards_bound_the_rest(quantized, exported, tmp_path, monkeypatch):
    iter_layers, alive, most = nunchaku_export.iter_layers, weakref.WeakSet(), []

    def watched(folder):
        for name, layer in iter_layers(folder):
            alive.add(layer)
            most.append(len(alive))
            yield name, layer
            del layer

    monkeypatch.setattr(nunchaku_export, "iter_layers", watched)
    monkeypatch.setattr(nunchaku_export, "MAX_SHARD_BYTES", 100_000)
    sharded = export(quantized, tmp_path / "out")
    assert len(most) == 2 * len(NAMES)
    assert max(most) <= 2  # this one, and the one before, until its name is taken by this
    index = json.loads((sharded / "transformer" / INDEX_NAME).read_text())
    assert len(set(index["weight_map"].values())) > 2
    moved = next(iter(index["weight_map"]))
    other = next(name for name in index["weight_map"].values() if name != index["weight_map"][moved])
    lying = {**index, "weight_map": {**index["weight_map"], moved: other}}
    single = load_file(exported / "transformer" / WEIGHTS_NAME)
    assert set(index["weight_map"]) == set(single)
    layers = ExportedComponent(sharded / "transformer").layers()
    for (name, layer), (_, wanted) in zip(layers, ExportedComponent(exported / "transformer").layers(), strict=True):
        assert torch.equal(layer.packed, wanted.packed), name
    (sharded / "transformer" / INDEX_NAME).write_text(json.dumps(lying))
    with pytest.raises(CheckpointError, match="does not list the tensors"):
        ExportedComponent(sharded / "transformer")


@pytest.mark.parametrize("where", ["rank", "targets", "precision", "section"])
def test_a_config_that_contradicts_itself_is_refused(exported, tmp_path, where):
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    file = copy / "transformer" / "config.json"
    config = json.loads(file.read_text())
    section = config["quantization_config"]["svdq_w4a4"]
    if where == "section":
        del config["quantization_config"]["tempoquant"]
    else:
        section[where] = {"rank": 32, "targets": section["targets"][:-1], "precision": "int4"}[where]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another program" if where == "section" else "contradicts itself"):
        contents_of(copy)


def test_others_are_linked_on_request(quantized, tmp_path):
    linked = export(quantized, tmp_path / "out", link=True)
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (linked / vae).samefile(quantized / vae)
