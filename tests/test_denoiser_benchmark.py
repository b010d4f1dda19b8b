"""The benchmark on a pretrained denoiser: layers as matrices, bins, rows. Here weights are random
and fields small.
"""

import contextlib
import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks.denoiser import results, samples, unet
from benchmarks.denoiser.__main__ import main
from benchmarks.denoiser.layers import as_matrix, kind_of, matrix_of, quantized_layers, tokens_of
from benchmarks.denoiser.measure import errors_of_layers, errors_of_network
from benchmarks.denoiser.results import RowFiles, combine
from benchmarks.denoiser.rows import FIGURE, Row, all_rows, select
from benchmarks.denoiser.samples import NUM_SIGMAS, SIGMAS, Samples, by_bin, take, timestep_of
from benchmarks.denoiser.table import PANELS, kind_table, sigma_table
from benchmarks.denoiser.unet import Denoiser, hold_to_onnx_runtime
from tempoquant import quantize_linear
from tempoquant.errors import ModelError, RecipeError
from tempoquant.recipe import Recipe

ROW = Row("a row", Recipe.load("paper"), 2)
FIELD = 16  # the smallest that can be halved four times


class Exact(nn.Linear):
    """Stands for a quantized layer without any error, and notes the timesteps it is called at."""

    def __init__(self, layer: nn.Module) -> None:
        matrix = matrix_of(layer)
        super().__init__(matrix.shape[1], matrix.shape[0])
        self.weight, self.bias = nn.Parameter(matrix), layer.bias
        self.timestep, self.seen = None, []

    @contextlib.contextmanager
    def at_timestep(self, timestep: float) -> Iterator[None]:
        self.timestep = timestep
        yield
        self.timestep = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.timestep)
        return super().forward(x)


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def held_out(denoiser: Denoiser) -> Samples:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "FIELD", FIELD)
        return take(denoiser, 1, 8, seed=1)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_by_patches_is_the_convolution(kernel: int):
    generator = torch.Generator().manual_seed(0)
    convolution = nn.Conv2d(4, 6, kernel, padding=kernel // 2).requires_grad_(False)
    for parameter in convolution.parameters():  # small whole numbers: every sum is exact
        parameter.copy_(torch.randint(-9, 10, parameter.shape, generator=generator))
    x = torch.randint(-9, 10, (2, 4, 5, 7), generator=generator).float()
    assert torch.equal(as_matrix(convolution, Exact(convolution))(x), convolution(x))
    tokens = tokens_of(convolution, x)
    wanted = convolution(x).permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.equal(tokens @ matrix_of(convolution).T + convolution.bias, wanted)


def test_nearly_all_weights_are_quantized_and_groups_divide_every_layer(denoiser: Denoiser):
    layers = dict(quantized_layers(denoiser))
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    assert parameters == 10_456_545  # as the ONNX file has them
    assert sum(layer.weight.numel() for layer in layers.values()) / parameters == pytest.approx(0.9445, abs=1e-4)
    kinds = [kind_of(name) for name in layers]
    counts = {"skip": 28, "embedding": 55, "attention": 56, "convolution": 68}
    assert {kind: kinds.count(kind) for kind in kinds} == counts
    for row in all_rows():
        for layer in layers.values():
            shape = matrix_of(layer).shape
            recipe = row.recipe_of(shape)
            recipe.default_format.num_groups(shape[1])
            assert (recipe.rank > 0) == (row.recipe.rank > 0) and recipe.rank <= min(shape)


def test_a_network_whose_layers_are_exact_has_no_error_and_each_call_its_timestep(
    denoiser: Denoiser, held_out: Samples
):
    layers = {name: Exact(layer) for name, layer in quantized_layers(denoiser)}
    network, denoised = errors_of_network(denoiser, layers, held_out)
    assert max(network + denoised) < 1e-4 and len(network) == len(denoised) == NUM_SIGMAS
    timesteps = [timestep_of(index) for index in range(NUM_SIGMAS)]
    assert all(layer.seen == timesteps for layer in layers.values())
    assert max(max(errors) for errors in errors_of_layers(denoiser, layers, held_out).values()) < 1e-4
    name = "model.output_blocks.24.0.skip_connection"
    layers[name].weight = nn.Parameter(1.5 * layers[name].weight)
    assert min(errors_of_network(denoiser, layers, held_out)[0]) > 1e-3
    assert errors_of_layers(denoiser, layers, held_out)[name] == pytest.approx([0.5] * NUM_SIGMAS, rel=1e-3)


def test_layers_are_given_tokens_of_their_width_at_every_sigma(denoiser: Denoiser, held_out: Samples):
    for name, layer in quantized_layers(denoiser):
        assert len(held_out.tokens[name]) == NUM_SIGMAS
        num_tokens = {tokens.shape for tokens in held_out.tokens[name]}
        [(count, width)] = num_tokens
        assert width == matrix_of(layer).shape[1] and 1 <= count <= 8
        if kind_of(name) == "embedding":
            assert len(held_out.tokens[name][0].unique(dim=0)) == 8  # difficulties, not one field's eight times


@pytest.mark.parametrize("num_bins", range(1, NUM_SIGMAS + 1))
def test_a_layer_runs_at_a_sigma_in_the_bin_that_this_sigma_calibrated(num_bins: int):
    tokens = [torch.full((2, 32), float(1 + index)) for index in range(NUM_SIGMAS)]
    inputs = by_bin(tokens, num_bins)
    layer = quantize_linear(torch.ones(4, 32), None, inputs, "rtn")
    for index in range(NUM_SIGMAS):
        timestep_bin = layer.clock.bins.of(timestep_of(index))
        assert (inputs[timestep_bin] == 1 + index).any()
    assert sum(len(found) for found in inputs.values()) == 2 * NUM_SIGMAS


def test_rows_have_names_of_their_own_and_the_figure_shows_some_of_them():
    labels = [row.label for row in all_rows()]
    assert len(set(labels)) == len(labels) and set(FIGURE) < set(labels)
    assert [row.label for row in select(all_rows(), ["paper, o*", "rtn"])] == ["rtn", "paper, one clip ratio"]
    with pytest.raises(RecipeError, match="no row is called 'theirs'; rows are rtn; "):
        select(all_rows(), ["rtn", "theirs"])


def test_a_result_stands_for_the_same_recipe_and_the_same_committed_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def files(commit: str) -> RowFiles:
        monkeypatch.setattr(results, "commit", lambda: commit)
        return RowFiles(tmp_path / "results")

    assert files("a").load(ROW, 0) is None and not any(tmp_path.iterdir())
    files("a").save(ROW, 0, {"network": [0.5]})
    assert files("a").load(ROW, 0)["network"] == [0.5]
    assert files("a").load(ROW, 1) is None
    rounded = ROW.recipe.replace(gptq=False, act_order=False)
    for other in (ROW._replace(num_bins=3), ROW._replace(rank=2), ROW._replace(recipe=rounded)):
        assert files("a").load(other, 0) is None
    assert files("b").load(ROW, 0) is None and files("b").load(ROW, 0, of_any_sources=True) is not None
    files("a+").save(ROW, 0, {"network": [0.25]})  # sources with changes are never known to be the same
    assert files("a+").load(ROW, 0) is None


def record(network: float, layer: float) -> dict[str, Any]:
    skip, convolution = ("model.output_blocks.0.0.skip_connection", "model.middle_block.0.in_layers.2")
    embedding, attention = ("model.middle_block.0.emb_layers.1", "model.middle_block.1.qkv")
    layers = {skip: [layer, 0.5], convolution: [0.1, 0.1], embedding: [0.0, 0.0], attention: [0.0, 0.2]}
    return {
        "network": [network] * NUM_SIGMAS, "denoised": [0.0] * NUM_SIGMAS, "layers": layers, "bits_per_weight": 5.0,
        "seconds": 1.0, "commit": "a",
    }  # fmt: skip


def text_of(result: dict[str, Any]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*(sigma_table([result], what) for what in PANELS), kind_table([result]))
    return console.export_text()


def test_a_row_shows_mean_and_deviation_over_seeds_and_its_worst_layer():
    result = combine(ROW, [record(0.11, 0.3), record(0.33, 0.5)])
    assert result["network"] == {"mean": pytest.approx(0.22), "deviation": pytest.approx(0.22 / 2**0.5), "n": 2}
    at_each = [(0.3 + 0.5) / 2 + 0.1, 0.5 + 0.1 + 0.2]  # over four layers and two seeds
    assert [found["mean"] for found in result["single_layer_at_each_sigma"]] == pytest.approx([e / 4 for e in at_each])
    assert result["worst_layer"] == {"name": "model.output_blocks.0.0.skip_connection", "error": pytest.approx(0.45)}
    text = text_of(result)
    assert text.count("22.0") == NUM_SIGMAS + 1 and "22.0 ± 15.6" in text and "n = 2" in text
    assert all(f"{sigma:.2g}" in text for sigma in SIGMAS)
    assert "45.0 ± 7.1" in text and "output_blocks.0.0.skip_connection" in text
    alone = text_of(combine(ROW, [record(0.07, 0.3)]))
    assert alone.count("7.0") == NUM_SIGMAS + 1 and "7.0 ±" not in alone  # one seed has no deviation


def test_at_the_least_sigma_the_denoised_field_is_the_noisy_one(denoiser: Denoiser):
    noisy, sigma = torch.rand(1, 1, 8, 8), torch.tensor([SIGMAS[0]])
    assert torch.equal(denoiser.denoised(torch.full_like(noisy, 1e6), noisy, sigma), noisy)


@pytest.mark.parametrize("names", [[], ["a.onnx", "b.onnx"]])
def test_a_wheel_without_one_onnx_file_is_refused(names: list[str], tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        for name in ["METADATA", *names]:
            archive.writestr(name, "")
    with pytest.raises(ModelError, match=f"some.whl holds {len(names)} ONNX files, not one"):
        unet.onnx_file(tmp_path / "some.whl")


def test_a_norm_is_found_by_the_name_of_its_node():
    nodes = {
        "/model/input_blocks.5/input_blocks.5.0/in_layers.0/Mul": "model.input_blocks.5.0.in_layers.0",
        "/model/middle_block/middle_block.0/in_layers/in_layers.0/Mul": "model.middle_block.0.in_layers.0",
        "/model/input_blocks.11/input_blocks.11.1/norm/Add": "model.input_blocks.11.1.norm",
        "/model/out/out.0/Add": "model.out.0",
    }
    assert {node: unet._module_of(node) for node in nodes} == nodes


def test_a_port_that_differs_at_one_sigma_is_refused(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch):
    wrong_by = torch.zeros(3)

    class Session:
        def __init__(self, model: bytes, providers: list[str]) -> None: ...

        def run(self, _: None, inputs: dict[str, Any]) -> list[Any]:
            arguments = [torch.from_numpy(inputs[name]) for name in ("noisy", "sigma", "difficulty")]
            return [(denoiser(*arguments) + wrong_by[:, None, None, None]).numpy()]

    monkeypatch.setattr(unet, "FIELD", FIELD)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    assert hold_to_onnx_runtime(denoiser, b"", SIGMAS[:3]) < unet.TOLERANCE
    wrong_by[1] = 2 * unet.TOLERANCE
    with pytest.raises(ModelError, match=r"differs from ONNX Runtime by 0\.0002 at sigma 0\.00909"):
        hold_to_onnx_runtime(denoiser, b"", SIGMAS[:3])
    wrong_by[1] = float("nan")
    with pytest.raises(ModelError, match="by nan"):
        hold_to_onnx_runtime(denoiser, b"", SIGMAS[:3])


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["no.whl"], r"no\.whl is not a wheel: `make bench-denoiser` fetches it"),
        (["no.whl", "--report"], "has no finished row yet"),
        (["no.whl", "--seeds", "0"], "at least one seed is needed, not 0"),
        (
            ["no.whl", "--report", "--json", "nowhere/line.json"],
            "nowhere/line.json cannot be written: there is no folder",
        ),
        (["no.whl", "--report", "--rows", "theirs"], "no row is called 'theirs'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(words: list[str], sentence: str, tmp_path: Path):
    with pytest.raises(SystemExit, match=sentence):
        main([*words, "--work", str(tmp_path / "work")])
    assert not any(tmp_path.iterdir())
