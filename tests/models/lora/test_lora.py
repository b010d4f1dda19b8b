"""A LoRA fused tensor by tensor gives what diffusers gives; impossible ones are refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from tempoquant.errors import ModelError
from tempoquant.models.lora.lora import Lora
from tempoquant.models.wan.family import WAN
from tests.quantized_wan import BLOCK_LINEARS, tiny_pipeline, tiny_wan

Tensors = dict[str, torch.Tensor]
RANK = 4
WAN_LINEARS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
               "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2")  # fmt: skip
IN_BLOCK = dict(zip(WAN_LINEARS, BLOCK_LINEARS, strict=True))
WAN_NAMES = {f"blocks.{i}.{wan}": f"blocks.{i}.{ours}" for i in range(2) for wan, ours in IN_BLOCK.items()}
OUTSIDE = {
    "head.head": "proj_out", "time_projection.1": "condition_embedder.time_proj",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
}  # fmt: skip
QUERY = "blocks.0.attn1.to_q.weight"


@pytest.fixture(scope="module")
def weights() -> Tensors:
    """Return the tensors of a random denoiser of two blocks, in float32."""
    return tiny_wan(dtype=torch.float32).state_dict()


def random(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(*shape)


def pairs(weights: Tensors, modules: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return a random down (rank, in) and up (out, rank) for each module of the denoiser."""
    torch.manual_seed(3)
    shapes = {module: weights[f"{module}.weight"].shape for module in modules}
    return {module: (random(RANK, shape[1]), random(shape[0], RANK)) for module, shape in shapes.items()}


def in_diffusers_names(weights: Tensors, prefix: str = "transformer.") -> Tensors:
    tensors = {}
    for i, (module, (down, up)) in enumerate(pairs(weights, [*WAN_NAMES.values(), *OUTSIDE.values()]).items()):
        extra = i % 3  # modules of different ranks keep the factor 1
        tensors[f"{prefix}{module}.lora_A.weight"] = torch.cat([down, down[:extra]])
        tensors[f"{prefix}{module}.lora_B.weight"] = torch.cat([up, up[:, :extra]], 1)
    return tensors


def with_biases_and_a_convolution(weights: Tensors) -> Tensors:
    modules = list(WAN_NAMES.values())[:5]
    tensors = {f"transformer.{m}.lora_B.bias": random(*weights[f"{m}.bias"].shape) for m in modules}
    tensors["transformer.patch_embedding.lora_A.weight"] = random(RANK, 36, 1, 2, 2)
    tensors["transformer.patch_embedding.lora_B.weight"] = random(128, RANK, 1, 1, 1)
    return in_diffusers_names(weights) | tensors


def in_wan_names(weights: Tensors, down_name: str, up_name: str, alpha: float | None, biases: bool = False) -> Tensors:
    names = WAN_NAMES | ({} if alpha else OUTSIDE)  # diffusers knows no alpha outside of blocks
    tensors = {}
    for i, (wan, (down, up)) in enumerate(zip(names, pairs(weights, list(names.values())).values(), strict=True)):
        tensors[f"diffusion_model.{wan}.{down_name}.weight"] = down
        tensors[f"diffusion_model.{wan}.{up_name}.weight"] = up
        if alpha:
            tensors[f"diffusion_model.{wan}.alpha"] = torch.tensor(alpha + i)
        if biases:
            tensors[f"diffusion_model.{wan}.diff_b"] = random(up.shape[0])
    return tensors


def with_a_whole_head(weights: Tensors) -> Tensors:
    """Write the head as a difference, as in LightX2V's distilled LoRAs."""
    head = {"diff": random(*weights["proj_out.weight"].shape), "diff_b": random(*weights["proj_out.bias"].shape)}
    tensors = in_wan_names(weights, "lora_down", "lora_up", 8.0, biases=True)
    return tensors | {f"diffusion_model.head.head.{stored}": tensor for stored, tensor in head.items()}


def in_kohya_names(weights: Tensors) -> Tensors:
    tensors = in_wan_names(weights, "lora_down", "lora_up", 2.0)
    split = {key: re.fullmatch(r"diffusion_model\.(.*?)(\.lora.*|\.alpha)", key) for key in tensors}
    return {f"lora_unet_{found[1].replace('.', '_')}{found[2]}": tensors[key] for key, found in split.items() if found}


FORMATS: dict[str, Callable[[Tensors], Tensors]] = {
    "diffusers": in_diffusers_names,
    "diffusers, biases, convolution": with_biases_and_a_convolution,
    "Wan, A and B": lambda weights: in_wan_names(weights, "lora_A", "lora_B", None),
    "Wan, A and B, biases": lambda weights: in_wan_names(weights, "lora_A", "lora_B", None, biases=True),
    "Wan, alpha": lambda weights: in_wan_names(weights, "lora_down", "lora_up", 8.0),
    "Wan, alpha, biases, head": with_a_whole_head,
    "kohya": in_kohya_names,
}


def write(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None, name: str = "lora") -> Path:
    save_file(tensors, folder / f"{name}.safetensors", metadata)
    return folder / f"{name}.safetensors"


def fuse_all(lora: Lora, weights: Tensors) -> Tensors:
    lora.check_fits({name: tuple(tensor.shape) for name, tensor in weights.items()})
    return {name: lora.fuse(name, tensor) for name, tensor in weights.items()}


def fused_by_diffusers(file: Path) -> Tensors:
    pipeline = tiny_pipeline()
    pipeline.transformer = tiny_wan(dtype=torch.float32)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    pipeline.fuse_lora(components=["transformer"])
    state = pipeline.transformer.state_dict()
    return {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if ".lora_" not in name}


def assert_same(ours: Tensors, theirs: Tensors, unchanged: Tensors) -> None:
    """Assert equality to rounding of float32 sums near 1, and that diffusers changed a value."""
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(theirs[name], tensor) for name, tensor in unchanged.items())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_fused_as_diffusers_fuses_it(format: str, weights: Tensors, tmp_path: Path) -> None:
    file = write(tmp_path, FORMATS[format](weights))
    assert_same(fuse_all(Lora.load(file, WAN), weights), fused_by_diffusers(file), weights)


SETTINGS = [
    {"lora_alpha": 12},
    {"lora_alpha": 12, "use_rslora": True},
    {"lora_alpha": 3, "alpha_pattern": {"to_q": 9, r"blocks\.1\..*": 5}, "rank_pattern": {"to_k": 6}},
    {"lora_alpha": 3, "lora_bias": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_alpha_that_diffusers_saved_is_honoured(settings: dict[str, Any], weights: Tensors, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = tiny_wan(dtype=torch.float32)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.2"]
    model.add_adapter(LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False, **settings))
    layers, config = get_peft_model_state_dict(model), model.peft_config["default"].to_dict()
    WanImageToVideoPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=config)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert_same(fuse_all(Lora.load(file, WAN), weights), fused_by_diffusers(file), weights)


def test_the_prefix_of_the_second_expert_means_the_same_as_that_of_the_first(weights: Tensors, tmp_path: Path) -> None:
    first = fuse_all(Lora.load(write(tmp_path, in_diffusers_names(weights)), WAN), weights)
    second = fuse_all(Lora.load(write(tmp_path, in_diffusers_names(weights, "transformer_2.")), WAN), weights)
    assert all(torch.equal(first[name], second[name]) for name in weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_sum_is_rounded_once(dtype: torch.dtype, weights: Tensors, tmp_path: Path) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in in_diffusers_names(weights).items()}
    weight = weights[QUERY].to(dtype)
    fused = Lora.load(write(tmp_path, tensors), WAN).fuse(QUERY, weight)
    prefix = "transformer." + QUERY.removesuffix("weight")
    up, down = tensors[f"{prefix}lora_B.weight"].double(), tensors[f"{prefix}lora_A.weight"].double()
    exact = weight.double() + up @ down
    assert fused.dtype == dtype
    limit = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6  # half a unit of the dtype, and float32's own rounding
    assert bool(((fused.double() - exact).abs() <= limit).all())


def test_differences_of_norms_and_modulations_are_added_under_diffusers_names(weights: Tensors, tmp_path: Path) -> None:
    wan = in_wan_names(weights, "lora_down", "lora_up", 8.0)
    targets = {
        "blocks.1.norm3.diff": "blocks.1.norm2.weight", "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "blocks.1.self_attn.norm_q.diff": "blocks.1.attn1.norm_q.weight",
        "blocks.1.cross_attn.norm_k.diff": "blocks.1.attn2.norm_k.weight",
        "blocks.0.diff_m": "blocks.0.scale_shift_table", "blocks.1.modulation.diff": "blocks.1.scale_shift_table",
        "head.diff_m": "scale_shift_table", "patch_embedding.diff": "patch_embedding.weight",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias", "blocks.0.self_attn.q.diff": QUERY,
    }  # fmt: skip
    tensors = {f"diffusion_model.{key}": random(*weights[name].shape) for key, name in targets.items()}
    before = fuse_all(Lora.load(write(tmp_path, wan), WAN), weights)
    after = fuse_all(Lora.load(write(tmp_path, wan | tensors), WAN), weights)
    for key, name in targets.items():
        before[name] = before[name] + tensors[f"diffusion_model.{key}"]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_twice_the_alpha_adds_twice_as_much(weights: Tensors, tmp_path: Path) -> None:
    tensors = in_wan_names(weights, "lora_down", "lora_up", 8.0)
    nothing = torch.zeros_like(weights[QUERY])
    once = Lora.load(write(tmp_path, tensors), WAN).fuse(QUERY, nothing)
    tensors["diffusion_model.blocks.0.self_attn.q.alpha"] *= 2
    assert torch.equal(Lora.load(write(tmp_path, tensors), WAN).fuse(QUERY, nothing), 2 * once)


def test_a_tensor_that_the_lora_does_not_change_is_returned_itself(weights: Tensors, tmp_path: Path) -> None:
    lora = Lora.load(write(tmp_path, in_kohya_names(weights)), WAN)
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    fused = fuse_all(lora, weights)
    changed = {name for name in weights if fused[name] is not weights[name]}
    assert changed == {f"{module}.weight" for module in WAN_NAMES.values()}
    assert all(torch.equal(weights[name], copies[name]) for name in weights)


Q = "diffusion_model.blocks.0.self_attn.q"
NAN, INF = torch.tensor(float("nan")), torch.tensor(float("inf"))
REFUSED: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "NaN": ({f"{Q}.lora_up.weight": NAN.expand(128, RANK).clone()}, "q.lora_up.weight holds NaN"),
    "infinite difference": ({f"{Q}.diff_b": INF.expand(128).clone()}, "q.diff_b holds NaN or Inf"),
    "NaN as alpha": ({f"{Q}.alpha": NAN}, "q.alpha is not one finite number"),
    "alphas": ({f"{Q}.alpha": torch.ones(2)}, "q.alpha is not one finite number"),
    "integers": ({f"{Q}.diff_b": torch.ones(128, dtype=torch.int8)}, "q.diff_b is stored as I8"),
    "no up": ({f"{Q}.lora_up.weight": None}, "without the whole pair"),
    "only alpha": ({f"{Q}.lora_up.weight": None, f"{Q}.lora_down.weight": None}, "q.alpha without the whole pair"),
    "other rank": (
        {f"{Q}.lora_up.weight": torch.ones(128, RANK + 1)},
        "the ranks of .*q.lora_down.*, 4 × 128, .* differ",
    ),
    "scalar": ({f"{Q}.lora_down.weight": torch.tensor(1.0)}, "the ranks of"),
    "twice": ({f"{Q}.lora_A.weight": torch.ones(RANK, 128)}, "states the same twice"),
    "DoRA": ({f"{Q}.dora_scale": torch.ones(128)}, "is a DoRA .*q.dora_scale"),
    "no part of Wan": (
        {"diffusion_model.blocks.0.self_attn.x.alpha": INF},
        "self_attn.x.alpha, which is not understood",
    ),
    "text encoder": (
        {"text_encoder.q.lora_A.weight": torch.ones(4, 4)},
        "of several models .*text_encoder",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_added_as_a_whole_is_refused(case: str, weights: Tensors, tmp_path: Path) -> None:
    changes, words = REFUSED[case]
    tensors = {**in_wan_names(weights, "lora_down", "lora_up", 8.0), **changes}
    file = write(tmp_path, {key: tensor for key, tensor in tensors.items() if tensor is not None})
    with pytest.raises(ModelError, match=words):
        Lora.load(file, WAN)


def test_a_file_that_is_no_whole_lora_is_refused(weights: Tensors, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no LoRA file"):
        Lora.load(tmp_path / "lora.safetensors", WAN)
    (tmp_path / "lora.ckpt").touch()
    with pytest.raises(ModelError, match="never unpickles"):
        Lora.load(tmp_path / "lora.ckpt", WAN)
    for tensors in (weights, {}, {"transformer." + name: tensor for name, tensor in weights.items()}):
        with pytest.raises(ModelError, match="holds no LoRA"):
            Lora.load(write(tmp_path, tensors), WAN)
    file = write(tmp_path, in_kohya_names(weights))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        Lora.load(file, WAN)


@pytest.mark.parametrize(
    "config", ["{", "[]", "{}", {"lora_alpha": "x"}, {"lora_alpha": 1, "use_dora": True},
               {"lora_alpha": 1, "alpha_pattern": {"(": 1}}, {"lora_alpha": float("nan")}]
)  # fmt: skip
def test_metadata_that_cannot_be_honoured_is_refused(config: Any, weights: Tensors, tmp_path: Path) -> None:
    text = config if isinstance(config, str) else json.dumps({f"transformer.{key}": v for key, v in config.items()})
    with pytest.raises(ModelError, match=r"states (no|an) alpha|is a DoRA"):
        Lora.load(write(tmp_path, in_diffusers_names(weights), {"lora_adapter_metadata": text}), WAN)


def test_alpha_in_both_places_is_refused(weights: Tensors, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="states alpha twice"):
        Lora.load(
            write(tmp_path, in_kohya_names(weights), {"lora_adapter_metadata": '{"transformer.lora_alpha": 1}'}), WAN
        )


def test_a_lora_for_another_model_is_refused_by_a_name(weights: Tensors, tmp_path: Path) -> None:
    lora = Lora.load(write(tmp_path, in_kohya_names(weights)), WAN)
    other = tiny_wan(width=64).state_dict()
    with pytest.raises(ModelError, match=r"blocks.* × .*, but the denoiser's has .*another model"):
        lora.check_fits({name: tuple(tensor.shape) for name, tensor in other.items()})
    with pytest.raises(ModelError, match=f"{QUERY} as a tensor of shape 128 × 128, but the denoiser's has 64 × 64"):
        lora.fuse(QUERY, other[QUERY])
    with pytest.raises(ModelError, match=r"that the denoiser does not have, such as blocks\.1"):
        lora.check_fits({name: tuple(tensor.shape) for name, tensor in weights.items() if "blocks.1" not in name})


def test_a_sum_that_overflows_and_a_file_that_was_replaced_are_refused(weights: Tensors, tmp_path: Path) -> None:
    lora = Lora.load(write(tmp_path, {f"{Q}.diff": torch.full((128, 128), 6e4)}), WAN)
    with pytest.raises(ModelError, match=r"overflows torch\.float16"):
        lora.fuse(QUERY, weights[QUERY].half() + 1e4)
    write(tmp_path, in_diffusers_names(weights))
    with pytest.raises(ModelError, match="was changed after it was loaded"):
        lora.fuse(QUERY, weights[QUERY])
