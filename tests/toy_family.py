"""A model family that nobody planned for: one denoiser of two streams, a timestep for each token,
no image, and names of its own for everything. `installed` makes it known, as CONTRIBUTING.md says;
nothing in the package knows it.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional

from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.models import families
from tempoquant.models.family import Config, ModelFamily, PipelineIndex
from tempoquant.models.geometry import LatentGeometry
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.timesteps import Denoiser
from tests.quantized_wan import text_models
from tests.wan_pipelines import autoencoder

CHANNELS, WIDTH, WORD_DIM = 16, 128, 64


class Pair(nn.Module):
    """A block: picture tokens and word tokens attend to all of both; each stream is answered."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.see_q, self.see_k, self.see_v = (nn.Linear(width, width) for _ in range(3))
        self.say_q, self.say_k, self.say_v = (nn.Linear(width, width) for _ in range(3))
        self.see_out, self.say_out = nn.Linear(width, width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, seen: torch.Tensor, said: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = functional.layer_norm(seen, seen.shape[-1:]) * gain, functional.layer_norm(said, said.shape[-1:])
        query, key, value = (
            torch.cat([see(x), say(y)], 1).unflatten(-1, (2, -1)).transpose(1, 2)
            for see, say in ((self.see_q, self.say_q), (self.see_k, self.say_k), (self.see_v, self.say_v))
        )
        answer = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        seen = seen + self.see_out(answer[:, : seen.shape[1]])
        said = said + self.say_out(answer[:, seen.shape[1] :])
        x = functional.layer_norm(seen, seen.shape[-1:]) * gain
        return seen + self.narrow(functional.gelu(self.widen(x))), said


class ToyDenoiser(ModelMixin, ConfigMixin):
    """Predicts the flow; `noise_level` is 0 … 1, one for each token."""

    @register_to_config
    def __init__(self, channels: int = CHANNELS, width: int = WIDTH, depth: int = 2, word_dim: int = WORD_DIM) -> None:
        super().__init__()
        self.enter, self.read = nn.Linear(channels, width), nn.Linear(word_dim, width)
        self.pairs = nn.ModuleList(Pair(width) for _ in range(depth))
        self.leave = nn.Linear(width, channels)

    def forward(
        self, picture: torch.Tensor, noise_level: torch.Tensor, words: torch.Tensor, return_dict: bool = True
    ) -> Any:
        seen, said = self.enter(picture.flatten(2).transpose(1, 2)), self.read(words)
        for pair in self.pairs:
            seen, said = pair(seen, said, 1 + noise_level.unsqueeze(-1).to(seen.dtype))
        flow = self.leave(seen + said.mean(1, keepdim=True)).transpose(1, 2).reshape(picture.shape)
        return {"flow": flow} if return_dict else (flow,)


class ToyPipeline(DiffusionPipeline):
    """Text to video, with guidance."""

    def __init__(self, words: Any, lexicon: Any, codec: Any, mind: ToyDenoiser, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(words=words, lexicon=lexicon, codec=codec, mind=mind, scheduler=scheduler)
        self._guidance_scale, self._interrupt = 1.0, False

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    def encode_prompt(self, prompt: str, max_sequence_length: int, device: Any, **_: Any) -> tuple[torch.Tensor, None]:
        tokens = self.lexicon(prompt, padding="max_length", max_length=max_sequence_length, return_tensors="pt")
        return self.words(tokens.input_ids.to(device)).last_hidden_state, None

    @torch.no_grad()
    def __call__(
        self, prompt: str | None = None, negative_prompt: str = "", height: int = 32, width: int = 32,
        num_frames: int = 5, num_inference_steps: int = 4, guidance_scale: float = 1.0, generator: Any = None,
        prompt_embeds: Any = None, negative_prompt_embeds: Any = None, output_type: str = "np",
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> Any:  # fmt: skip
        device, self._guidance_scale, self._interrupt = self._execution_device, guidance_scale, False
        texts = [
            self.encode_prompt(text or "", 8, device)[0] if embedding is None else embedding
            for text, embedding in ((prompt, prompt_embeds), (negative_prompt, negative_prompt_embeds))
        ]
        shape = (1, CHANNELS, (num_frames - 1) // 4 + 1, height // 8, width // 8)
        latents = torch.randn(shape, generator=generator).to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for index, t in enumerate(self.scheduler.timesteps):
            if self._interrupt:
                continue
            level = (t / 1000).expand(1, latents[0, 0].numel()).clone()
            flows = [
                self.mind(
                    picture=latents.to(self.mind.dtype), noise_level=level, words=text.to(self.mind.dtype),
                    return_dict=False,
                )[0]
                for text in texts[: 1 + self.do_classifier_free_guidance]
            ]  # fmt: skip
            flow = flows[0] if len(flows) == 1 else flows[1] + guidance_scale * (flows[0] - flows[1])
            latents = self.scheduler.step(flow.float(), t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, index, t, {"latents": latents})["latents"]
        if output_type == "latent":
            return SimpleNamespace(frames=latents)
        video = self.codec.decode(latents.to(self.codec.dtype)).sample
        return SimpleNamespace(frames=(video / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).float().cpu().numpy())


def _denoisers(index: PipelineIndex) -> tuple[Denoiser, ...]:
    return (Denoiser("transformer", "mind"),)


def _inputs(index: PipelineIndex, config: Config, latents: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    num_tokens = latents[0] * latents[1] * latents[2]
    return {
        "picture": torch.empty(1, config["channels"], *latents, device="meta", dtype=torch.bfloat16),
        "noise_level": torch.empty(1, num_tokens, device="meta"),
        "words": torch.empty(1, 8, config["word_dim"], device="meta", dtype=torch.bfloat16),
    }


SETTINGS = SamplingSettings(32, 32, 5, 4, 2.0, 3.0, 8)
TOY = ModelFamily(
    name="toy",
    pipelines=frozenset({"ToyPipeline"}),
    transformers=frozenset({"ToyDenoiser"}),
    denoisers=_denoisers,
    block_lists=("pairs",),
    call=ModelCall("noise_level", 1000.0, (("see_q", "see_k", "see_v"), ("say_q", "say_k", "say_v"))),
    text_linears=frozenset({"say_q", "say_k", "say_v", "say_out"}),
    text_tokens=8,
    geometry=lambda denoiser, codec: LatentGeometry(8, 4, (1, 1, 1)),
    width=lambda denoiser: int(denoiser["width"]),
    latent_channels=lambda denoiser: int(denoiser["channels"]),
    autoencoder="codec",
    text_encoder="words",
    image_encoder="none",
    text_encoder_blocks="encoder.block",
    text_components=frozenset({"words", "lexicon"}),
    title=lambda index: "toy pipeline",
    shortened=lambda denoiser, num_blocks: {**denoiser, "depth": min(num_blocks, denoiser["depth"])},
    published_models=dict,
    published=lambda index: ("Toy", SETTINGS),
    distilled={},
    example_inputs=_inputs,
    text_inputs=frozenset({"words"}),
    takes_image=lambda index: False,
    arguments=lambda index, prompt, settings: {},
    own_name=lambda name: name,
)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Install the classes in diffusers, and the family in TempoQuant, within this context."""
    for kind, module in ((ToyDenoiser, "diffusers.models.toy"), (ToyPipeline, "diffusers.pipelines.toy")):
        kind.__module__ = module
        setattr(diffusers, kind.__name__, kind)
    families.FAMILIES.append(TOY)
    try:
        yield
    finally:
        families.FAMILIES.remove(TOY)
        for kind in (ToyDenoiser, ToyPipeline):
            delattr(diffusers, kind.__name__)


def write(folder: Path) -> Path:
    """Write a random pipeline of the family."""
    lexicon, words = text_models()
    torch.manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ToyPipeline(words, lexicon, autoencoder(), ToyDenoiser(depth=3).eval(), scheduler).save_pretrained(folder)
    return folder
