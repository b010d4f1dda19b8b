"""Every spelling of a LoRA's keys means the same tensors, of every part of Wan that a LoRA may
touch.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tempoquant.errors import ModelError, SettingsError
from tempoquant.models.lora.given import _one_by_one, sampler_with
from tempoquant.models.lora.lora import Lora, LoraSum
from tempoquant.models.lora.settings import stated_steps
from tempoquant.models.wan.family import COMPONENTS, WAN
from tests.quantized_wan import tiny_wan

Tensors = dict[str, torch.Tensor]
RANK = 2
WAN_NAMES = {
    "patch_embedding": "patch_embedding", "proj_out": "head.head", "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0", "blocks.0.ffn.net.2": "blocks.0.ffn.2",
} | {
    f"blocks.0.attn{i}.{ours}": f"blocks.0.{wan}.{part}"
    for i, wan in ((1, "self_attn"), (2, "cross_attn"))
    for ours, part in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
}  # fmt: skip
PREFIXES = (
    "", "base_model.model.", "diffusion_model.", "model.diffusion_model.", "transformer.", "transformer_2.",
    "pipe.dit.",
)  # fmt: skip
FLAT_PREFIXES = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")
HALVES = (
    ("lora_A.weight", "lora_B.weight"), ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_down.weight", "lora_up.weight"), ("lora.down.weight", "lora.up.weight"),
)  # fmt: skip
SPELLINGS: dict[str, Callable[[str], str]] = {
    **{f"{prefix}DIFFUSERS": lambda name, prefix=prefix: prefix + name for prefix in PREFIXES},
    **{f"{prefix}WAN": lambda name, prefix=prefix: prefix + WAN_NAMES[name] for prefix in PREFIXES},
    **{f"{p}DIFFUSERS": lambda name, p=p: p + name.replace(".", "_") for p in FLAT_PREFIXES},
    **{f"{p}WAN": lambda name, p=p: p + WAN_NAMES[name].replace(".", "_") for p in FLAT_PREFIXES},
}


@pytest.fixture(scope="module")
def weights() -> Tensors:
    return tiny_wan(num_layers=1, dtype=torch.float32).state_dict()


def pairs(weights: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return a random down and up of every module of the denoiser that holds a product."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name.removesuffix(".weight"): tensor.shape for name, tensor in weights.items() if tensor.dim() in (2, 5)}
    return {
        name: (torch.randn(RANK, *shape[1:], generator=generator),
               torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator))
        for name, shape in shapes.items()
    }  # fmt: skip


def written(file: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    file.parent.mkdir(exist_ok=True)
    save_file(tensors, file, metadata)
    return file


def spelled(weights: Tensors, spelling: str, halves: tuple[str, str] = HALVES[0]) -> Tensors:
    spell, tensors = SPELLINGS[spelling], {}
    for name, both in pairs(weights).items():
        tensors |= {f"{spell(name)}.{half}": tensor for half, tensor in zip(halves, both, strict=True)}
    return tensors


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_means_the_same_tensors(spelling: str, weights: Tensors, tmp_path: Path) -> None:
    assert set(pairs(weights)) == set(WAN_NAMES), "every product of a denoiser has a name"
    halves = HALVES[list(SPELLINGS).index(spelling) % len(HALVES)]
    lora = Lora.load(written(tmp_path / "lora.safetensors", spelled(weights, spelling, halves)), WAN)
    lora.check_fits({name: tuple(tensor.shape) for name, tensor in weights.items()})
    assert set(lora.changes) == {f"{name}.weight" for name in WAN_NAMES}
    for name, (down, up) in pairs(weights).items():
        weight = weights[f"{name}.weight"]
        wanted = weight.double() + (up.flatten(1).double() @ down.flatten(1).double()).reshape(weight.shape)
        torch.testing.assert_close(lora.fuse(f"{name}.weight", weight).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("diffusion_model.blocks.0.self_attn.q.lokr_w1", "is a LoKr"),
        ("diffusion_model.blocks.0.self_attn.q.hada_w1_a", "is a LoHa"),
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", "is a DoRA"),
        ("diffusion_model.blocks.0.self_attn.q.lora_magnitude_vector", "is a DoRA"),
        ("diffusion_model.blocks.0.self_attn.q.lora_mid.weight", "is a LoCon with a core tensor"),
        ("transformer_2.blocks.0.attn1.to_q.alpha", "of several models"),
        ("diffusion_model.blocks.0.attn1.to_q.alpha", "states the same twice"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.other.weight", r"states the same twice|several adapters"),
        ("diffusion_model.blocks.1.self_attn.q.lora_A.other.weight", r"several adapters \(default, other\)"),
        ("diffusion_model.double_blocks.0.q.alpha", "double_blocks.* is not understood"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.bias", "is not understood"),
    ],
)
def test_what_is_no_plain_lora_of_one_expert_is_refused_by_what_it_is(
    key: str, words: str, weights: Tensors, tmp_path: Path
) -> None:
    tensors = spelled(weights, "diffusion_model.WAN", HALVES[1])
    tensors["diffusion_model.blocks.0.self_attn.q.alpha"] = torch.tensor(1.0)
    with pytest.raises(ModelError, match=words):
        Lora.load(written(tmp_path / "lora.safetensors", {**tensors, key: torch.ones(RANK)}), WAN)


def test_alpha_beside_a_file_of_peft_is_honoured(weights: Tensors, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "lora_alpha": 6, "alpha_pattern": {"self_attn.q": 1}, "use_dora": False}
    names = ("blocks.0.attn1.to_q.weight", "blocks.0.attn1.to_k.weight")
    file = written(tmp_path / "adapter_model.safetensors", spelled(weights, "base_model.model.WAN"))
    zeros = torch.zeros(128, 128)
    plain = [Lora.load(file, WAN).fuse(name, zeros) for name in names]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close([Lora.load(file, WAN).fuse(name, zeros) for name in names], [plain[0] / 2, plain[1] * 3])
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ModelError, match="is a DoRA"):
        Lora.load(file, WAN)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json states no alpha"):
        Lora.load(file, WAN)


def test_a_branch_to_an_image_that_the_expert_lacks_is_left_out(
    weights: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forms = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    tensors = spelled(weights, "diffusion_model.WAN")
    image = ("blocks.0.cross_attn.k_img", "blocks.0.cross_attn.norm_k_img", "img_emb.proj.1")
    foreign = {f"diffusion_model.{name}.diff": torch.ones(128) for name in image}
    Lora.load(written(tmp_path / "lora.safetensors", tensors | foreign), WAN).check_fits(forms)
    assert "also changes 3 tensors that other models of the family have and this one lacks" in caplog.text
    with pytest.raises(ModelError, match="another model"):
        Lora.load(written(tmp_path / "foreign.safetensors", foreign), WAN).check_fits(forms)


def test_several_loras_are_added_with_their_strengths_and_rounded_once(weights: Tensors, tmp_path: Path) -> None:
    name = "blocks.0.attn1.to_q.weight"
    down, up = pairs(weights)[name.removesuffix(".weight")]
    file = written(tmp_path / "one.safetensors", spelled(weights, "DIFFUSERS"))
    other = written(tmp_path / "two.safetensors", spelled(weights, "lora_unet_WAN"))
    both = LoraSum((Lora.load(file, WAN, 0.75), Lora.load(other, WAN, -0.5)))
    weight = weights[name].to(torch.bfloat16)
    exact = weight.double() + 0.25 * (up.double() @ down.double())
    limit = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-5
    assert bool(((both.fuse(name, weight).double() - exact).abs() <= limit).all())
    sums = (LoraSum((Lora.load(file, WAN),)), LoraSum((Lora.load(file, WAN, 0.75),)), both)
    assert len({each.sha256 for each in sums}) == 3 and sums[0].sha256 == Lora.load(file, WAN).sha256
    assert [note.endswith(" in the weights with strength 0.75") for note in both.notes] == [True, False]
    for strength in (0.0, float("nan"), float("inf")):
        with pytest.raises(ModelError, match="give a number from"):
            Lora.load(file, WAN, strength)


def test_files_are_named_alone_with_a_strength_or_in_a_row() -> None:
    file = Path("a")
    assert _one_by_one("a") == [("a", 1.0)] and _one_by_one(file) == [(file, 1.0)]
    assert _one_by_one((file, 0.5)) == [(file, 0.5)] and _one_by_one(("a", "b")) == [("a", 1.0), ("b", 1.0)]
    assert _one_by_one([("a", 2), "b"]) == [("a", 2.0), ("b", 1.0)] and _one_by_one([]) == []


@pytest.mark.parametrize(
    ("path", "metadata", "steps"),
    [
        ("a/wan_4steps_high.safetensors", {}, 4), ("Wan2.2-I2V-A14B-4steps-lora/high.safetensors", {}, 4),
        ("a/x-8-step.safetensors", {}, 8), ("a/b.safetensors", {"modelspec.title": "Lightning, 4 steps"}, 4),
        ("a/style.safetensors", {"ss_max_train_steps": "4 steps"}, None), ("a/style_2000steps.safetensors", {}, None),
        ("a/lora_24steps.safetensors", {}, None), ("a/footsteps.safetensors", {}, None), ("a/b.safetensors", {}, None),
    ],
)  # fmt: skip
def test_a_lora_is_for_few_steps_where_its_name_says_so(path: str, metadata: dict[str, str], steps: int | None) -> None:
    assert stated_steps(Path("loras") / path, metadata) == steps


def test_only_what_says_for_how_many_steps_it_is_changes_the_sampler() -> None:
    def loras(*steps: int | None) -> dict[str, LoraSum]:
        files = [LoraSum((Lora(Path("a"), "", {}, WAN.may_lack, num_steps),)) for num_steps in steps]
        return dict(zip(COMPONENTS, files, strict=False))

    distilled = {"num_steps": 4, "guidance_scale": 1.0, "flow_shift": 5.0}
    assert sampler_with(WAN, {}, {"num_steps": None}) == sampler_with(WAN, loras(None, None), {}) == {}
    assert sampler_with(WAN, loras(None), {"num_steps": 4, "flow_shift": None}) == {"num_steps": 4}
    assert sampler_with(WAN, loras(4, None), {"height": 32}) == {**distilled, "height": 32}
    assert sampler_with(WAN, loras(4, 4), {"num_steps": 6, "guidance_scale": None}) == {**distilled, "num_steps": 6}
    assert sampler_with(WAN, loras(4, 8), {"num_steps": 6})["num_steps"] == 6
    with pytest.raises(SettingsError, match=r"different numbers of steps \(4 and 8\)"):
        sampler_with(WAN, loras(4, 8), {})
