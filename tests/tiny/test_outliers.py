"""tiny-outliers is the same function as its source, with outliers inside."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from threading import Barrier

import pytest
import torch
from diffusers import WanTransformer3DModel

from benchmarks.outliers import KINDS, channel_absmax, ratios, run_pipeline
from tempoquant.errors import ModelError, OutputError
from tempoquant.tiny import outliers_pipeline, weights_folder
from tempoquant.tiny.outliers import plant_outliers
from tempoquant.tiny.outliers_pipeline import outliers_folder, write_tiny_outliers

CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 128,
    "freq_dim": 256,
    "ffn_dim": 1024,
    "num_layers": 3,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}
NUM_WORDS, NUM_TEXT_TOKENS = 11, 64
PLANTED = [kind for kind in KINDS if kind != "ffn.net.2"]


@pytest.fixture(scope="module")
def text_states() -> torch.Tensor:
    """Return text states (11, 128): row 0 is the end token; it shares a direction with no other."""
    return torch.randn(NUM_WORDS, 128, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def source() -> WanTransformer3DModel:
    torch.manual_seed(1)
    model = WanTransformer3DModel(**CONFIG).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # the bundled weights are bfloat16 but for these
            if "scale_shift_table" not in name and "norm2" not in name and "time_embedder" not in name:
                parameter.copy_(parameter.bfloat16())
    return model


@pytest.fixture(scope="module")
def planted(source: WanTransformer3DModel, text_states: torch.Tensor) -> WanTransformer3DModel:
    model = WanTransformer3DModel(**CONFIG).eval()
    model.load_state_dict(plant_outliers(source.state_dict(), CONFIG, text_states=text_states))
    return model


@torch.no_grad()
def run(model: WanTransformer3DModel, text_states: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 36, 3, 8, 8, generator=generator)
    text = torch.zeros(1, NUM_TEXT_TOKENS, 128)
    text[0, :NUM_WORDS] = text_states
    return model(latents, torch.tensor([700]), text, return_dict=False)[0]


@torch.no_grad()
def inputs_of(model: WanTransformer3DModel, layer: str, text_states: torch.Tensor) -> torch.Tensor:
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, text_states)
    hook.remove()
    return seen[0][0]


def test_the_planted_model_computes_what_its_source_computes(source, planted, text_states):
    wanted, got = run(source, text_states), run(planted, text_states)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", PLANTED)
def test_channels_stand_out_as_in_a_large_model_where_none_did(source, planted, text_states, kind):
    found = []
    for model in (source, planted):
        with channel_absmax(model) as seen:
            run(model, text_states)
        found.append(median(ratios(seen)[kind]))
    assert found[0] < 8 and 12 < found[1] < 80


def test_the_end_token_is_massive_and_padding_stays_small(planted, text_states):
    stream = inputs_of(planted, "blocks.0.attn2.to_k", text_states)
    largest = stream.abs().amax(1)
    assert largest[0] > 2 * largest[1:NUM_WORDS].max()
    assert largest[0] > 10 * largest[NUM_WORDS:].max()


def test_padding_is_orthogonal_to_the_planted_direction(source, planted, text_states):
    """M changes padding by the channel factors alone, powers of two."""
    before, after = (inputs_of(model, "blocks.0.attn2.to_k", text_states)[-1] for model in (source, planted))
    factors = (after / before).log2()
    assert torch.allclose(factors, factors.round(), atol=1e-3)
    assert sorted(set(factors.round().tolist())) == [0, 3, 4]


def test_queries_and_keys_are_untouched_because_a_norm_follows(source, planted, text_states):
    for layer in ("blocks.1.attn1.norm_q", "blocks.1.attn1.norm_k", "blocks.1.attn2.norm_q", "blocks.1.attn2.norm_k"):
        before, after = (inputs_of(model, layer, text_states) for model in (source, planted))
        assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_no_smoothing_factor_undoes_a_planted_direction(source, planted):
    """A diagonal would make the new weight's columns multiples of the old ones."""
    for layer in ("blocks.0.attn1.to_out.0", "blocks.0.attn2.to_v"):
        before, after = source.get_submodule(layer).weight, planted.get_submodule(layer).weight
        cosine = torch.cosine_similarity(before, after, dim=0).abs()
        assert (cosine < 0.99).sum() >= 4


def test_channel_factors_keep_bfloat16_and_directions_go_to_float32(source):
    narrow = {
        name: tensor if "scale_shift_table" in name else tensor.bfloat16()
        for name, tensor in source.state_dict().items()
    }
    stored = plant_outliers(narrow, CONFIG)
    assert stored["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert stored["condition_embedder.time_proj.weight"].dtype == torch.bfloat16
    assert stored["blocks.0.ffn.net.2.weight"].dtype == torch.bfloat16
    assert stored["condition_embedder.text_embedder.linear_2.weight"].dtype == torch.float32
    assert stored["blocks.0.attn1.to_v.weight"].dtype == torch.float32


def test_planting_leaves_its_input_alone_and_repeats_itself(source):
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    first, second = plant_outliers(source.state_dict(), CONFIG), plant_outliers(source.state_dict(), CONFIG)
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert all(torch.equal(first[name], second[name]) for name in before)


def test_a_model_without_cross_attention_norm_is_refused(source):
    lacking = {name: tensor for name, tensor in source.state_dict().items() if "norm2" not in name}
    with pytest.raises(ModelError, match=r"blocks\.0\.norm2\.weight"):
        plant_outliers(lacking, CONFIG)


def test_the_bundled_pipeline_and_its_planted_twin_make_the_same_latents():
    before, after = run_pipeline(weights_folder(), num_steps=4), run_pipeline(outliers_folder(), num_steps=4)
    wanted = before["latents"]
    assert (after["latents"] - wanted).abs().max() < 1e-5 * wanted.abs().max()
    for expert in ("transformer", "transformer_2"):
        for kind in PLANTED:
            assert 15 < median(after[expert][kind]) < 120, (expert, kind, after[expert][kind])


def test_the_folder_is_complete_and_found_again():
    folder = outliers_folder()
    source_files = {path.relative_to(weights_folder()) for path in weights_folder().rglob("*.json")}
    assert source_files <= {path.relative_to(folder) for path in folder.rglob("*")}
    stamp = folder.stat().st_mtime_ns
    assert outliers_folder() == folder and folder.stat().st_mtime_ns == stamp
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_callers_that_write_at_once_end_with_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The barrier lets both find no folder before either writes one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    barrier = Barrier(2)

    def write_when_both_are_here(folder: Path, source: Path) -> Path:
        barrier.wait(timeout=60)
        return write_tiny_outliers(folder, source)

    monkeypatch.setattr(outliers_pipeline, "write_tiny_outliers", write_when_both_are_here)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: outliers_folder(), range(2))
    assert first == second and list((tmp_path / "tempoquant").iterdir()) == [first]


def test_an_incomplete_source_is_named_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "source" / "text_encoder").mkdir(parents=True)
    with pytest.raises(ModelError, match="is not a complete pipeline folder"):
        write_tiny_outliers(tmp_path / "made", tmp_path / "source")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        write_tiny_outliers(tmp_path / "file" / "made", weights_folder())
