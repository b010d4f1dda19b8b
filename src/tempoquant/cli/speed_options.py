"""Options of commands that generate: the speed, and its means."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tempoquant.acceleration.choices import Choices
    from tempoquant.models.source import SourceModel


class SpeedName(str, Enum):
    """The speeds of `tempoquant.accelerate`; docs/speed.md gives the cost of each."""

    EXACT = "exact"
    FAST = "fast"
    FASTEST = "fastest"


class CacheOption(str, Enum):
    """The step caches, and none."""

    NONE = "none"
    MAGCACHE = "magcache"
    FIRSTBLOCK = "firstblock"
    TAYLORSEER = "taylorseer"


SpeedOption = Annotated[
    SpeedName | None,
    typer.Option(
        "--speed",
        help="exact: every step, 16-bit attention; fast, fastest: steps left out, 8-bit attention (docs/speed.md).",
        show_default=False,
    ),
]
AttentionOption = Annotated[
    str | None,
    typer.Option("--attention", metavar="NAME", help="Attention backend of diffusers; `tempoquant doctor` lists them."),
]
CacheName = Annotated[CacheOption | None, typer.Option("--cache", help="Step cache; default: the speed's own.")]
CompileOption = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile", help="Compile blocks with torch.compile; default: where it helps.", show_default=False
    ),
]


def choices_of(
    speed: SpeedName | None, attention: str | None, cache: CacheOption | None, compile: bool | None
) -> "Choices | None":
    """Return the options' choices; None without any, which leaves a pipeline as it is. Raises
    SettingsError.
    """
    from tempoquant.acceleration.choices import Choices

    if speed is None and attention is None and cache is None and compile is None:
        return None
    return Choices((speed or SpeedName.EXACT).value, attention, None if cache is None else cache.value, compile)


def check_choices(choices: "Choices", source: "SourceModel", memory: str, device: str, in_chunks: bool) -> None:
    """Refuse impossible choices before a weight is loaded.

    Args:
        in_chunks: whether blocks will compute a chunk of tokens at a time.

    Raises:
        UnsupportedError: the model, memory mode or machine does not support them.
        SettingsError: diffusers has no such attention backend.
    """
    import torch

    from tempoquant.acceleration.accelerate import require_recorded
    from tempoquant.acceleration.attention import capability_of, choose_attention
    from tempoquant.acceleration.step_cache import require_cacheable_family

    choices.require_possible(memory, in_chunks)
    choose_attention(choices.speed, source.family, capability_of(torch.device(device)), choices.attention)
    if choices.cache is not None:
        require_cacheable_family(source.family, source.index)
        configs = {name: source.component_of(name) for name in source.denoiser_names}
        found = {name: each.quantization.magnitude_ratios for name, each in configs.items() if each.is_ours}
        require_recorded(choices.cache, source.denoiser_names, {k: v for k, v in found.items() if v is not None})
