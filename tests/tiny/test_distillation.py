"""The teacher is the shipped pipeline, and the student samples as the pipeline does with four
steps.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from safetensors.torch import load_file
from torch import nn

from tempoquant.sqnr import sqnr_db
from tempoquant.tiny import weights_folder
from tempoquant.tiny.sets import CALIBRATION_SEED_BASE, calibration_items
from training import teacher
from training.architecture import EXPERTS
from training.distill import ALPHA, RANK, TARGETS, load_student, sample
from training.lora_files import files_of, write_loras
from training.teacher import load_denoiser, write_shard


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Make one held-out clip, of a teacher with five steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(teacher.SAMPLING, "num_steps", 5)
        path = tmp_path_factory.mktemp("teacher") / "shard.safetensors"
        write_shard(path, CALIBRATION_SEED_BASE, 1, {expert: load_denoiser(expert) for expert in EXPERTS})
    return load_file(path)


@torch.no_grad()
def test_the_teachers_answer_is_what_the_pipeline_samples_from_the_same_noise(shard: dict[str, torch.Tensor]) -> None:
    pipeline = WanImageToVideoPipeline.from_pretrained(weights_folder(), dtype=torch.float32)
    [item] = calibration_items(1)
    latents = pipeline(
        item.image, item.prompt, height=64, width=64, num_frames=17, num_inference_steps=5,
        guidance_scale=teacher.SAMPLING["guidance_scale"], latents=shard["noise"], output_type="latent",
    ).frames  # fmt: skip
    assert sqnr_db(latents, shard["answer"]) > 25, "the teacher computes in bfloat16"


def test_a_new_student_is_the_shipped_model_and_only_its_loras_train(shard: dict[str, torch.Tensor]) -> None:
    student = load_student()
    plain = {expert: load_denoiser(expert) for expert in EXPERTS}
    assert all(map(torch.equal, sample(student, shard, backward=False), sample(plain, shard, backward=False)))
    sample(student, shard, backward=True)
    for denoiser in student.values():
        trained = {name for name, tensor in denoiser.model.named_parameters() if tensor.grad is not None}
        assert trained == {name for name, _ in denoiser.model.named_parameters() if ".lora_" in name}
        assert len(trained) == 4 * 10 * 2 and len(TARGETS) == 6  # four projections of two attentions, two of the ffn


def test_a_student_that_answers_as_the_teacher_has_no_loss(shard: dict[str, torch.Tensor]) -> None:
    class Oracle:
        def velocity(self, latents: torch.Tensor, timestep: float, clips: dict[str, torch.Tensor]) -> torch.Tensor:
            sigma = float(teacher.load_sampler(4).sigmas[list(teacher.load_sampler(4).timesteps).index(timestep)])
            return (latents - clips["answer"]) / sigma

    found = sample({expert: Oracle() for expert in EXPERTS}, shard, backward=False)
    assert found.losses.tolist() == [0.0] * 4
    torch.testing.assert_close(found.latents, shard["answer"], rtol=0, atol=1e-4)


def test_a_file_holds_what_was_trained(tmp_path: Path) -> None:
    student = load_student()
    model = nn.ModuleDict({expert: denoiser.model for expert, denoiser in student.items()})
    adapters = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items() if ".lora_" in name}
    write_loras(adapters, ALPHA, tmp_path)
    files = files_of(adapters, ALPHA)
    down = adapters["low_noise.blocks.2.ffn.net.2.lora_A.default.weight"]
    assert torch.equal(
        load_file(tmp_path / "low_noise_model.safetensors")["diffusion_model.blocks.2.ffn.2.lora_down.weight"],
        down.bfloat16(),
    )
    assert down.shape[0] == RANK and {*files} == {*EXPERTS}
