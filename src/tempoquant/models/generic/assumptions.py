"""The assumptions of the generic family about one pipeline: plain values, printed, and stored in
the result's config.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from tempoquant.calibrate.sample import GuidanceBranch
from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.errors import ModelError

CONFIG_KEY = "_generic_family"
"""The key in a denoiser's config.json; diffusers keeps keys that begin with an underscore, without
a warning.
"""

_BRANCHES = ("conditional", "unconditional")


@dataclass(frozen=True, eq=False)
class Assumptions:
    """The facts observed of one pipeline.

    Attributes:
        pipeline, transformer: classes.
        component: the denoiser's.
        block_lists: in the order in which they run.
        call: how the denoiser takes its timestep, and which linears of a block read one tensor.
        kept: linears of a block that stay in 16 bits, and why.
        text_linears: linears of a block that read fewer than half as many tokens as others.
        text_tokens: the most that these read.
        width: features of a token.
        guidance_calls, guidance_rows: see `Guidance`.
        guidance_argument: the pipeline's name of its guidance scale.
        guided_above: the guidance scale above which there are two branches; None if there are never
            two.
        text_inputs: inputs that were the same in two steps.
        exact_inputs: inputs in float32 while the denoiser computed in 16 bits.
        pixels, frames: in one latent.
        is_image: whether the pipeline makes images.
        latent_channels: of the autoencoder.
        defaults: of `SamplingSettings`, from the pipeline's own.
        brief_components: models beside the denoiser and the autoencoder.
    """

    pipeline: str
    transformer: str
    component: str
    block_lists: tuple[str, ...]
    call: ModelCall
    kept: Mapping[str, str]
    text_linears: tuple[str, ...]
    text_tokens: int
    width: int
    guidance_calls: tuple[GuidanceBranch, ...]
    guidance_rows: tuple[GuidanceBranch, ...]
    guidance_argument: str
    guided_above: float | None
    text_inputs: tuple[str, ...]
    exact_inputs: tuple[str, ...]
    pixels: int
    frames: int
    is_image: bool
    latent_channels: int
    defaults: Mapping[str, Any]
    brief_components: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the inverse of `from_dict`."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {**plain, "call": self.call.to_dict(), "kept": dict(self.kept), "defaults": dict(self.defaults)}

    @classmethod
    def from_dict(cls, record: Any, place: str) -> "Assumptions":
        """Parse the result of `to_dict`. Raises ModelError, naming the place, for anything else."""
        names = {each.name for each in dataclasses.fields(cls)}
        if not isinstance(record, dict) or record.keys() != names:
            raise ModelError(f"{place} lacks the generic family's assumptions: quantize the model again.")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
        known = {*values["guidance_calls"], *values["guidance_rows"]} <= {*_BRANCHES}
        texts = all(isinstance(values[name], str) for name in ("pipeline", "transformer", "component"))
        if not known or not texts or not str(values["component"]).isidentifier():
            raise ModelError(f"{place} contradicts the generic family's assumptions: quantize the model again.")
        return cls(**cast(dict[str, Any], {**values, "call": ModelCall.from_dict(record["call"])}))

    def words(self) -> list[str]:
        """Return sentences for people."""
        call, kept = self.call, sorted({*self.kept.values()})
        reasons = [f"{', '.join(n for n, why in self.kept.items() if why == reason)}: {reason}" for reason in kept]
        two = f"two branches above a {self.guidance_argument} of {self.guided_above}"
        rows = f"rows of one call, {' then '.join(self.guidance_rows)}"
        calls = f"calls, {' then '.join(self.guidance_calls)}"
        offset = f" {call.timestep_offset:+g}" if call.timestep_offset else ""
        return [
            f"blocks: {', '.join(self.block_lists)} of {self.transformer}, in this order",
            f"timestep: {call.timestep_argument} · {call.timestep_scale:g}{offset} is 0 clean … 1000 noise",
            *(f"{' and '.join(group)} read one tensor" for group in call.shared_inputs),
            *(f"16 bits: {words}" for words in reasons),
            "guidance: "
            + ("one branch" if self.guided_above is None else f"{two}, as {rows if self.guidance_rows else calls}"),
            f"the same at every step: {', '.join(self.text_inputs) or 'nothing'}",
            f"{'an image' if self.is_image else 'a video'} of {self.pixels} pixels a latent, two by two a token",
        ]
