"""Observation of a pipeline in a few hollow steps, and the assumptions that follow."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tempoquant.calibrate.arguments import tensors_in
from tempoquant.calibrate.sample import GuidanceBranch
from tempoquant.errors import ModelError
from tempoquant.models.generic.assumptions import Assumptions
from tempoquant.models.generic.first_call import guided
from tempoquant.models.generic.hollow import DTYPE, Seen, load_hollow, run_hollow
from tempoquant.models.generic.linears import linears_of
from tempoquant.models.generic.static import denoiser_of
from tempoquant.models.generic.timestep import timestep_in
from tempoquant.models.guidance import Guidance, Part
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights

_SIDE = 256
"""Pixels; twice that in the step that shows which linears read the text alone."""
_SCALE = 2.0
_PIXELS = ("vae_scale_factor_spatial", "vae_scale_factor", "vae_spatial_compression_ratio")
_FRAMES = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
_DEFAULT_SIDE, _DEFAULT_STEPS, _DEFAULT_FRAMES = 1024, 30, 81
_ORDERS: tuple[tuple[GuidanceBranch, ...], ...] = (("conditional", "unconditional"), ("unconditional", "conditional"))


def observe(source: SourceModel) -> Assumptions:
    """Run a pipeline without its blocks' weights, and return the assumptions about it.

    Args:
        source: 16-bit, with its lists of blocks.

    Raises:
        ModelError: the generic family cannot run it; the message says why.
    """
    pipeline = _Pipeline(source)
    first, other, larger = pipeline.run(2), pipeline.run(1, prompt="b"), pipeline.run(1, scale=1.0, side=2 * _SIDE)
    name = source.index.class_name
    guidance = _guidance(first, other, name)
    parts = [_parts(guidance, step) for step in first.calls]
    timestep = timestep_in(first, name)
    rows = [_num_rows(seen.calls[0][0]) for seen in (first, larger)]
    linears = linears_of(pipeline.blocks, first.inputs, larger.inputs, *rows)
    return Assumptions(
        pipeline=name,
        transformer=pipeline.kind.__name__,
        component=pipeline.component,
        block_lists=_in_order(first.blocks, source.family.block_lists, pipeline.kind.__name__),
        call=timestep.call(linears.together),
        kept=linears.kept,
        text_linears=linears.of_text,
        text_tokens=linears.text_tokens,
        width=linears.width,
        guidance_calls=guidance.calls,
        guidance_rows=guidance.rows,
        guidance_argument=pipeline.guidance_argument,
        guided_above=_guided_above(parts[0], larger),
        text_inputs=_unchanged(parts, timestep.argument),
        exact_inputs=_exact(parts[0][0], timestep.argument),
        latent_channels=_channels(pipeline.loaded.vae),
        **pipeline.facts(),
    )


class _Pipeline:
    """A pipeline that is observed: with a hollow denoiser, and settings of its own."""

    def __init__(self, source: SourceModel) -> None:
        self.component, self.kind, config = denoiser_of(source.index)
        self.loaded, self.blocks = _hollow(source, self.component)
        taken = inspect.signature(type(self.loaded).__call__).parameters
        if "callback_on_step_end" not in taken:
            raise ModelError(
                f"a {source.index.class_name} tells nobody when a step ends (callback_on_step_end), which the generic "
                "family goes by: it needs a model family of its own."
            )
        own = "true_cfg_scale" in taken and not config.get("guidance_embeds")
        self.guidance_argument = "true_cfg_scale" if own else "guidance_scale"
        self.is_video = "num_frames" in taken
        self.pixels, self.frames = _latent_size(self.loaded)
        self.defaults = _defaults(self.loaded, taken, self.guidance_argument, self.pixels, self.is_video)

    def run(self, num_steps: int, prompt: str = "a", scale: float = _SCALE, side: int = _SIDE) -> Seen:
        """Generate for so many steps of four, hollow: a square of `side` pixels, and few frames."""
        num_frames = 2 * self.frames + 1 if self.is_video else 1
        settings = self.defaults.replace(height=side, width=side, num_frames=num_frames, num_steps=4)
        given = guided(self.guidance_argument, scale)
        return run_hollow(self.loaded, self.component, settings, given, self.blocks, num_steps, prompt)

    def facts(self) -> dict[str, Any]:
        """Return what is known of it before any run, by the names in `Assumptions`."""
        return {
            "pixels": self.pixels,
            "frames": self.frames,
            "is_image": not self.is_video,
            "defaults": self.defaults.to_dict(),
            "brief_components": tuple(
                name
                for name, each in self.loaded.components.items()
                if isinstance(each, nn.Module) and name not in (self.component, "vae")
            ),
        }


def _guided_above(parts: list[Part], unguided: Seen) -> float | None:
    """Return the scale above which there are two branches; None if there never are two.

    Args:
        parts: of a step with guidance.
        unguided: with a scale of 1.
    """
    if len(parts) != 2:
        return None
    return 0.0 if len(unguided.calls[0]) * _num_rows(unguided.calls[0][0]) == 2 else 1.0


def _hollow(source: SourceModel, component: str) -> tuple[Any, dict[str, nn.Module]]:
    for name in ("vae", "text_encoder", "scheduler"):
        if name not in source.components:
            raise ModelError(
                f"{source.folder} has no {name}, which the generic family looks for: it needs a model family of its "
                "own, see CONTRIBUTING.md."
            )
    weights = DenoiserWeights(source, source.denoiser_names[0], DTYPE, "cpu")
    model = weights.empty_model()
    weights.fill(model, "")
    blocks = {name: model.get_submodule(name) for name in weights.blocks}
    for name, block in blocks.items():
        for own, parameter in block.named_parameters():
            parameter.data = parameter.data.to(weights.dtype_of(f"{name}.{own}"))
    return load_hollow(source.index, component, model), blocks


def _latent_size(pipeline: Any) -> tuple[int, int]:
    """Return the pixels, and frames, of one latent, as the pipeline reports them."""
    found = [getattr(pipeline, name, None) for name in _PIXELS]
    pixels = next((each for each in found if isinstance(each, int)), None)
    if pixels is None:
        raise ModelError(
            f"a {type(pipeline).__name__} does not say how many pixels a latent stands for (vae_scale_factor): it "
            "needs a model family of its own, see CONTRIBUTING.md."
        )
    return pixels, next((int(getattr(pipeline, name)) for name in _FRAMES if hasattr(pipeline, name)), 1)


def _defaults(
    pipeline: Any, taken: Mapping[str, inspect.Parameter], argument: str, pixels: int, is_video: bool
) -> SamplingSettings:
    def default(name: str, otherwise: Any) -> Any:
        value = taken[name].default if name in taken else None
        return value if isinstance(value, int | float) and value > 0 else otherwise

    size = getattr(pipeline, "default_sample_size", None)
    side = size * pixels if isinstance(size, int) else _DEFAULT_SIDE
    return SamplingSettings(
        int(default("height", side)),
        int(default("width", side)),
        int(default("num_frames", _DEFAULT_FRAMES)) if is_video else 1,
        int(default("num_inference_steps", _DEFAULT_STEPS)),
        float(default(argument, 1.0)),
        None,
        24 if is_video else 1,
    )


def _num_rows(call: Mapping[str, Any]) -> int:
    latents = next(iter(call.values()))
    return len(latents) if isinstance(latents, list) else int(latents.shape[0])


def _guidance(first: Seen, other: Seen, class_name: str) -> Guidance:
    """Return the guidance branches: the one that differs between two prompts is conditional."""
    num_calls, num_rows = len(first.calls[0]), _num_rows(first.calls[0][0])
    if num_calls * num_rows == 1:
        return Guidance()
    if (num_calls, num_rows) not in ((1, 2), (2, 1)):
        raise ModelError(
            f"a {class_name} calls its denoiser {num_calls} times a step with {num_rows} rows, of which the generic "
            "family makes no guidance: it needs a model family of its own, see CONTRIBUTING.md."
        )
    for order in _ORDERS:
        guidance = Guidance(rows=order) if num_rows == 2 else Guidance(calls=order)
        sides = [{part.branch: part for part in _parts(guidance, seen.calls[0])} for seen in (first, other)]
        changed = [name for name in order if not _same(*(side[name].arguments for side in sides))]
        if changed == ["conditional"]:
            return guidance if num_rows == 1 else Guidance(calls=("conditional",), rows=order)
    raise ModelError(
        f"two prompts change both branches of guidance of a {class_name}, or none, so they cannot be distinguished: "
        "it needs a model family of its own, see CONTRIBUTING.md."
    )


def _parts(guidance: Guidance, step: list[dict[str, Any]]) -> list[Part]:
    return [part for number, call in enumerate(step) for part in guidance.parts(call, None, number)]


def _same(one: Any, other: Any) -> bool:
    """Return whether all tensors in two structures are equal."""
    a, b = tensors_in(one), tensors_in(other)
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _unchanged(steps: list[list[Part]], timestep: str) -> tuple[str, ...]:
    """Return names of arguments with tensors that were the same in both steps, in every branch."""
    latents = next(iter(steps[0][0].arguments))
    names = [name for name, value in steps[0][0].arguments.items() if tensors_in(value)]
    pairs = list(zip(*steps, strict=False))
    return tuple(
        name
        for name in names
        if name not in (latents, timestep) and all(_same(a.arguments[name], b.arguments[name]) for a, b in pairs)
    )


def _exact(part: Part, timestep: str) -> tuple[str, ...]:
    return tuple(
        name
        for name, value in part.arguments.items()
        if name != timestep and any(each.dtype == torch.float32 for each in tensors_in(value))
    )


def _in_order(blocks: list[str], lists: tuple[str, ...], class_name: str) -> tuple[str, ...]:
    """Return the lists in the order in which they ran. Raises ModelError if blocks ran in another
    one.
    """
    found = tuple(dict.fromkeys(name.rpartition(".")[0] for name in blocks))
    in_order = sorted(blocks, key=lambda name: (found.index(name.rpartition(".")[0]), int(name.rpartition(".")[2])))
    if in_order != blocks:
        raise ModelError(
            f"a {class_name} does not run its lists of blocks ({', '.join(lists)}) one after the other, each from its "
            "first block to its last: it needs a model family of its own, see CONTRIBUTING.md."
        )
    return found


def _channels(autoencoder: Any) -> int:
    config = autoencoder.config
    return int(config.get("latent_channels") or config.get("z_dim") or 0)
