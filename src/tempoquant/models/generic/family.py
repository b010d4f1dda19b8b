"""A model family from assumptions; also from those that a quantized pipeline stores in its
config.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from tempoquant.models.family import Config, ModelFamily, PipelineIndex
from tempoquant.models.generic.assumptions import CONFIG_KEY, Assumptions
from tempoquant.models.generic.first_call import guided, inputs_at, schedule_of
from tempoquant.models.generic.linears import MODULATION
from tempoquant.models.geometry import LatentGeometry
from tempoquant.models.guidance import Guidance
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.small_files import read_object
from tempoquant.prompts import Prompt
from tempoquant.timesteps import Denoiser

TOKEN_STEP = 2
"""Latents of a row, or column, in one token, as in FLUX, Qwen-Image and Z-Image."""


def family_from(assumed: Assumptions) -> ModelFamily:
    """Return the family of one pipeline."""
    return ModelFamily(
        name="generic",
        pipelines=frozenset({assumed.pipeline}),
        transformers=frozenset({assumed.transformer}),
        denoisers=partial(_denoisers, assumed),
        block_lists=assumed.block_lists,
        call=assumed.call,
        text_linears=frozenset(assumed.text_linears),
        text_tokens=assumed.text_tokens,
        geometry=partial(_geometry, assumed),
        width=partial(_width, assumed),
        latent_channels=partial(_latent_channels, assumed),
        autoencoder="vae",
        autoencoder_channels=partial(_latent_channels, assumed),
        text_encoder="text_encoder",
        image_encoder="image_encoder",
        text_encoder_blocks="",
        brief_components=assumed.brief_components,
        text_components=frozenset(),
        encoded_text=_left_to_the_pipeline,
        title=_title,
        shortened=_as_long_as_it_is,
        published_models=dict,
        published=partial(_published, assumed),
        distilled={"guidance_scale": 1.0},
        example_inputs=partial(_example_inputs, assumed),
        exact_inputs=frozenset(assumed.exact_inputs),
        text_inputs=frozenset(assumed.text_inputs),
        takes_image=_no_image,
        arguments=partial(_arguments, assumed),
        own_name=_same_name,
        guidance=Guidance(assumed.guidance_calls, assumed.guidance_rows),
        num_branches=partial(_num_branches, assumed),
        kept_in_16_bits=frozenset(name for name, why in assumed.kept.items() if why != MODULATION),
        modulation=frozenset(name for name, why in assumed.kept.items() if why == MODULATION),
        set_timesteps=partial(_set_timesteps, assumed),
        stored={CONFIG_KEY: assumed.to_dict()},
    )


def stored_family(index: PipelineIndex) -> ModelFamily | None:
    """Return the family that a quantized pipeline stores in its denoiser's config; None for
    none.
    """
    for component in index.components:
        file = index.folder / component / "config.json"
        if file.is_file() and (family := family_in(read_object(file), str(file))) is not None:
            return family
    return None


def family_in(config: Mapping[str, Any], place: str) -> ModelFamily | None:
    """Return the family that a denoiser's config stores; None for none. Raises ModelError, naming
    the place, if it is damaged.
    """
    record = config.get(CONFIG_KEY)
    return None if record is None else family_from(Assumptions.from_dict(record, place))


def _denoisers(assumed: Assumptions, index: PipelineIndex) -> tuple[Denoiser, ...]:
    return (Denoiser("transformer", assumed.component),)


def _geometry(assumed: Assumptions, denoiser: Config, autoencoder: Config) -> LatentGeometry:
    return LatentGeometry(assumed.pixels, assumed.frames, (1, TOKEN_STEP, TOKEN_STEP), is_image=assumed.is_image)


def _width(assumed: Assumptions, denoiser: Config) -> int:
    return assumed.width


def _latent_channels(assumed: Assumptions, config: Config) -> int:
    return assumed.latent_channels


def _left_to_the_pipeline(pipeline: Any, text: str, num_tokens: int, device: torch.device) -> dict[str, Any]:
    """Return the text itself: it is unknown how a pipeline takes embeddings, so it encodes texts as
    it runs.
    """
    return {"prompt": text}


def _title(index: PipelineIndex) -> str:
    return f"{index.class_name}, by the generic family"


def _as_long_as_it_is(denoiser: Config, num_blocks: int) -> dict[str, Any]:
    return dict(denoiser)


def _published(assumed: Assumptions, index: PipelineIndex) -> tuple[str, SamplingSettings]:
    return f"{index.class_name}'s own defaults", SamplingSettings.from_dict(assumed.defaults)


def _no_image(index: PipelineIndex) -> bool:
    return False


def _same_name(name: str) -> str | None:
    return name


def _num_branches(assumed: Assumptions, index: PipelineIndex, settings: SamplingSettings) -> int:
    return 1 if assumed.guided_above is None or settings.guidance_scale <= assumed.guided_above else 2


def _arguments(
    assumed: Assumptions, index: PipelineIndex, prompt: Prompt, settings: SamplingSettings
) -> dict[str, Any]:
    return guided(assumed.guidance_argument, settings.guidance_scale)


def _example_inputs(
    assumed: Assumptions, index: PipelineIndex, denoiser: Config, latents: tuple[int, int, int]
) -> dict[str, Any]:
    """Return the inputs of the pipeline's own first call at this size; none for no frames."""
    frames, rows, columns = latents
    if not frames:
        return {}
    settings = SamplingSettings.from_dict(assumed.defaults).replace(
        num_frames=assumed.frames * (frames - 1) + 1, height=rows * assumed.pixels, width=columns * assumed.pixels
    )
    return inputs_at(index, assumed, settings)


def _set_timesteps(
    assumed: Assumptions,
    index: PipelineIndex,
    scheduler: Any,
    settings: SamplingSettings,
    latents: tuple[int, int, int],
) -> None:
    """Let the pipeline itself set a scheduler, since only it knows how."""
    timesteps, sigmas = schedule_of(index, assumed, settings, scheduler)
    scheduler.timesteps, scheduler.sigmas = timesteps.clone(), sigmas.clone()
