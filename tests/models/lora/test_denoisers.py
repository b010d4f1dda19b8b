"""One file with the LoRAs of all denoisers is split by denoiser; one of the other denoiser alone is
refused.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tempoquant.errors import ModelError
from tempoquant.models.lora.given import load_loras
from tempoquant.models.lora.lora import Lora
from tempoquant.models.wan.family import WAN
from tempoquant.timesteps import Denoiser
from tests.recorded import SOURCE

HIGH, LOW = "high_noise", "low_noise"
MODULES = ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2")
WAN_MODULES = ("blocks.0.self_attn.q", "blocks.1.ffn.2")
SPLIT = [
    ("transformer.", "transformer_2."), ("transformer_1.", "transformer_2."),
    ("base_model.model.transformer.", "base_model.model.transformer_2."), ("diffusion_model.transformer_1.",
     "diffusion_model.transformer_2."),
]  # fmt: skip


def lora(prefix: str, value: float, modules: tuple[str, ...] = MODULES) -> dict[str, torch.Tensor]:
    """Write a LoRA of rank 1, in each module the same number everywhere."""
    forms = {name: form.shape for name, (_, form) in SOURCE.forms(HIGH).items()}
    found = {}
    for module, own in zip(modules, MODULES, strict=True):
        rows, columns = forms[f"{own}.weight"]
        found[f"{prefix}{module}.lora_A.weight"] = torch.full((1, columns), value)
        found[f"{prefix}{module}.lora_B.weight"] = torch.ones(rows, 1)
    return found


def written(file: Path, *parts: dict[str, torch.Tensor]) -> Path:
    save_file({key: tensor for part in parts for key, tensor in part.items()}, file)
    return file


def added(file: Path, name: str) -> float:
    """Return a file's change of every weight of one denoiser's modules."""
    found = load_loras(SOURCE, {name: file})[name]
    forms = {key: form.shape for key, (_, form) in SOURCE.forms(name).items()}
    values = {found.fuse(f"{module}.weight", torch.zeros(forms[f"{module}.weight"])).unique() for module in MODULES}
    assert all(each.numel() == 1 for each in values)
    [value] = {float(each) for each in values}
    return value


@pytest.mark.parametrize("modules", [MODULES, WAN_MODULES])
@pytest.mark.parametrize(("first", "second"), SPLIT)
def test_a_file_of_both_experts_is_split_by_expert(
    first: str, second: str, modules: tuple[str, ...], tmp_path: Path
) -> None:
    file = written(tmp_path / "both.safetensors", lora(first, 2.0, modules), lora(second, 3.0, modules))
    assert (added(file, HIGH), added(file, LOW)) == (2.0, 3.0)


def test_a_file_for_both_says_nothing_and_for_one_that_a_half_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(tmp_path / "both.safetensors", lora("transformer.", 2.0), lora("transformer_2.", 3.0))
    load_loras(SOURCE, {HIGH: file, LOW: (file, 0.5)})
    assert caplog.text == ""
    load_loras(SOURCE, {LOW: file})
    assert "both.safetensors holds a LoRA of high_noise, too: given as low_noise, that is left out" in caplog.text


@pytest.mark.parametrize(
    ("prefix", "name", "other"), [("transformer_2.", HIGH, LOW), ("transformer_1.", LOW, HIGH),
                                  ("pipe.transformer_2.", HIGH, LOW)]
)  # fmt: skip
def test_a_file_of_the_other_expert_is_refused_with_its_name(
    prefix: str, name: str, other: str, tmp_path: Path
) -> None:
    file = written(tmp_path / "one.safetensors", lora(prefix, 1.0))
    words = (
        rf"one\.safetensors holds a LoRA of {other}, as {prefix}blocks.* says, and none of {name}: give it as {other}"
    )
    with pytest.raises(ModelError, match=words):
        load_loras(SOURCE, {name: file})
    assert added(file, other) == 1.0


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", ""])
def test_a_prefix_that_trainers_write_for_any_expert_fits_both(prefix: str, tmp_path: Path) -> None:
    file = written(tmp_path / "any.safetensors", lora(prefix, 1.0))
    assert added(file, HIGH) == added(file, LOW) == 1.0


def test_what_is_of_two_experts_is_of_no_single_denoiser(tmp_path: Path) -> None:
    file = written(tmp_path / "both.safetensors", lora("transformer.", 2.0), lora("transformer_2.", 3.0))
    with pytest.raises(ModelError, match="of several models"):
        Lora.load(file, WAN, 1.0, (Denoiser("transformer", "transformer"),), "transformer")


def test_a_file_without_any_key_is_no_lora(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no LoRA"):
        load_loras(SOURCE, {HIGH: written(tmp_path / "none.safetensors")})
