"""Laws of quantized text encoders: plain libraries load them, and what they lose and take is what
is said of them.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import UMT5EncoderModel

from tempoquant.errors import ModelError, RecipeError, UnsupportedError
from tempoquant.hosts import text_encoders
from tempoquant.hosts.contents import contents_of
from tempoquant.hosts.diffusers.sampling import generate_video
from tempoquant.hosts.text_encoders import linear_bytes, quantized_encoder, save_quantized
from tempoquant.models.component_files import Component
from tempoquant.models.pipeline_configs import read_configs
from tempoquant.models.source import SourceModel
from tempoquant.models.text_encoders import parameter_of
from tempoquant.models.text_encoders import text_encoders as encoders_of
from tempoquant.placement import quantized_encoder as streaming
from tempoquant.placement.memory_modes import load_in_mode
from tempoquant.planning.generation_memory import text_encoder_bytes
from tempoquant.quantizing import quantize
from tempoquant.recipe import Recipe
from tempoquant.sqnr import sqnr_db
from tests import hunyuan_pipelines, ltx2_pipelines, minimax_pipeline
from tests.recorded import PROMPTS, SETTINGS

FORMATS = [
    pytest.param(name, marks=pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"{package} is missing"))
    for name, package in text_encoders.NEEDS.items()
]
LEAST_DB = {"int8": 30.0, "nf4": 12.0}
RTN = Recipe.load("rtn")
SOURCE_FOLDER = SourceModel.open("tiny").folder


@pytest.fixture(scope="module", params=FORMATS)
def made(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("text") / request.param
    return request.param, quantize("tiny", folder, RTN.replace(text_encoder=request.param), device="cpu")


def test_plain_diffusers_loads_it_and_makes_the_video_of_our_loader_in_every_mode(made):
    _, folder = made
    plain = WanImageToVideoPipeline.from_pretrained(folder)
    expected = generate_video(plain, PROMPTS[0], SETTINGS, 0)
    for mode in ("lean", "disk"):
        pipeline = load_in_mode(SourceModel.open(folder), mode, "cpu")
        assert (generate_video(pipeline, PROMPTS[0], SETTINGS, 0) == expected).all(), mode


def test_a_folder_says_what_its_embeddings_lost_and_takes_what_a_plan_counts(made):
    format, folder = made
    [found] = contents_of(folder).text_encoders
    assert (found.component, found.format, found.needs) == ("text_encoder", format, text_encoders.NEEDS[format])
    assert found.num_texts == 4 and found.embedding_sqnr_db["prompt_embeds"] > LEAST_DB[format]
    assert format in (folder / "README.md").read_text() and json.loads((folder / "model_index.json").read_text())
    configs = read_configs(str(folder))
    assert configs.text_encoder_format == format
    forms = SourceModel.open(folder).components["text_encoder"].forms.items()
    kept = sum(torch.Size(form.shape).numel() for name, (_, form) in forms
               if form.dtype == torch.float32 and parameter_of(name) == name)  # fmt: skip
    counted = text_encoder_bytes(configs, format).weights  # what is kept is stored in 32 bits here, and counted in 16
    assert found.num_bytes - 16_000 < counted + 2 * kept <= found.num_bytes  # with a header


def test_the_same_bytes_every_time(made, tmp_path):
    format, folder = made
    save_quantized(SourceModel.open("tiny").components["text_encoder"], format, tmp_path / "again")
    for file in (tmp_path / "again").glob("*.safetensors"):
        assert file.read_bytes() == (folder / "text_encoder" / file.name).read_bytes()


def test_blocks_are_on_the_device_one_at_a_time(made, monkeypatch):
    moves = []
    monkeypatch.setattr(streaming, "move", lambda modules, device: moves.append((tuple(modules), device.type)))
    pipeline = load_in_mode(SourceModel.open(made[1]), "lean", "cpu")
    blocks = list(pipeline.text_encoder.encoder.block)
    moves.clear()
    pipeline.encode_prompt("a", max_sequence_length=8, do_classifier_free_guidance=False)
    of_blocks = [modules[0] for modules, _ in moves if modules[0] in blocks]
    assert of_blocks == [block for block in blocks for _ in range(2)]  # there, and back, before the next


def test_an_encoder_that_starts_on_the_gpu_looks_rows_up_on_the_host(monkeypatch):
    """Fake tensors know devices, and need none."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.norm = nn.Embedding(8, 4), nn.LayerNorm(4)
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.rows(ids)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    class Stream:
        device = torch.device("cuda:0")

    monkeypatch.setattr(streaming, "move", move_fakes)
    with FakeTensorMode(), torch.no_grad():
        model = Encoder()
        move_fakes([model], Stream.device)
        streaming.stream_quantized_blocks(model, list(model.blocks), model.rows.weight, Stream())
        assert model(torch.zeros(1, 3, dtype=torch.long, device="cpu")).device == Stream.device
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def move_fakes(modules, device: torch.device) -> None:
    """Move modules as `streaming.move` does: fake tensors keep their device, so others take their
    places.
    """
    for module in (each for root in modules for each in root.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to(device)))


@pytest.mark.parametrize("mode", ["lean", "disk"])
def test_what_bitsandbytes_quantized_is_loaded_to_the_cpu_and_not_to_the_current_gpu(mode, tmp_path, monkeypatch):
    folder = shutil.copytree(SOURCE_FOLDER, tmp_path / "nf4")
    config = folder / "text_encoder" / "config.json"
    section = {"quantization_config": {"quant_method": "bitsandbytes"}}
    config.unlink()
    config.write_text(json.dumps(json.loads((SOURCE_FOLDER / "text_encoder" / "config.json").read_text()) | section))
    places = []

    def load(*_: object, device_map: object = None, **_others: object) -> None:
        places.append(device_map)
        raise OSError("far enough")

    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", load)
    with pytest.raises(ModelError, match="far enough"):
        load_in_mode(SourceModel.open(folder), mode, "cpu")
    assert places == [{"": "cpu"}]


def encoders() -> dict[str, nn.Module]:
    hunyuan = hunyuan_pipelines.text_to_video().components
    return {
        "umt5": UMT5EncoderModel.from_pretrained(SOURCE_FOLDER / "text_encoder"),
        "qwen2.5": hunyuan["text_encoder"], "byt5": hunyuan["text_encoder_2"],
        "gemma3": ltx2_pipelines.text_encoder(), "qwen3": minimax_pipeline._text_encoder(),
    }  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_every_familys_encoders_are_saved_and_loaded_by_plain_transformers(format, tmp_path):
    for name, model in encoders().items():
        model.save_pretrained(tmp_path / name)
        component = Component(tmp_path / name, "transformers", type(model).__name__)
        save_quantized(component, format, tmp_path / f"{name}-{format}")
        loaded = type(model).from_pretrained(tmp_path / f"{name}-{format}").eval()
        linears = linear_bytes(model, format)
        if format == "int8" or all(each.in_features % 64 == 0 for each in linears):  # a group of NF4
            ids = torch.arange(3, 15)[None] % model.get_input_embeddings().num_embeddings
            with torch.no_grad():
                expected, found, direct = (
                    each(input_ids=ids, output_hidden_states=True).hidden_states[-1]
                    for each in (model, loaded, quantized_encoder(component, format))
                )
            assert torch.equal(found, direct), name
            assert sqnr_db(expected, found) > LEAST_DB[format] - 6, name
        counted = sum(linears.values())
        stored = Component(tmp_path / f"{name}-{format}", "transformers", type(model).__name__).forms
        parts = [form for key, (_, form) in stored.items() if parameter_of(key) != key or form.dtype == torch.uint8]
        size = sum(form.dtype.itemsize * torch.Size(form.shape).numel() for form in parts)
        assert abs(counted - size) <= 0.01 * counted, name


def test_a_missing_package_is_named_with_its_install_line_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(text_encoders.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UnsupportedError, match=r"need torchao.*pip install 'tempoquant\[text-encoder\]'"):
        quantize("tiny", tmp_path / "out", RTN.replace(text_encoder="int8"), device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_nf4_computes_in_the_dtype_of_its_linears_whatever_norms_are_stored_in(dtypes, tmp_path, monkeypatch):
    of_linears, of_norms = dtypes
    model = UMT5EncoderModel.from_pretrained(SOURCE_FOLDER / "text_encoder").to(of_linears)
    model.encoder.final_layer_norm.to(of_norms)
    model.save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(text_encoders, "require_quantizer", lambda _format: None)
    monkeypatch.setattr(text_encoders, "_settings", lambda _format, dtypes: asked.append(set(dtypes)))
    quantized_encoder(Component(tmp_path, "transformers", "UMT5EncoderModel"), "nf4")
    assert asked == [{of_linears}]


def test_formats_that_are_none_and_pipelines_whose_encoders_are_unknown_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="text_encoder"):
        RTN.replace(text_encoder="int3")
    assert list(encoders_of(SourceModel.open("tiny"))) == ["text_encoder"]
