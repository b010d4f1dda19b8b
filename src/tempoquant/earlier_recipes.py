"""Keys of earlier recipes: old names, and the settings that replaced them."""

from collections.abc import Mapping
from typing import Any

from tempoquant.layer_rule import require


def in_current_words(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return settings with current names in place of those of older recipes and checkpoints.

    `samples_per_expert` is now `samples_per_denoiser`. A key for each of Wan2.2's experts is now an
    entry of `bin_fractions`; if only one of the two keys is given, the other expert has one bin, as
    before.
    """
    settings = _renamed(settings, "samples_per_expert", "samples_per_denoiser")
    old = {name: key for name in ("high_noise", "low_noise") if (key := f"bin_fractions_{name}") in settings}
    if not old:
        return settings
    require("bin_fractions" not in settings, f"bin_fractions replaces {' and '.join(old.values())}: give it alone")
    high, low = (settings[old[name]] if name in old else [] for name in ("high_noise", "low_noise"))
    same = isinstance(high, list | tuple) and isinstance(low, list | tuple) and list(high) == list(low)
    others = {key: value for key, value in settings.items() if key not in old.values()}
    return {**others, "bin_fractions": high if same else {"high_noise": high, "low_noise": low}}


def _renamed(settings: Mapping[str, Any], old: str, new: str) -> Mapping[str, Any]:
    if old not in settings:
        return settings
    require(new not in settings, f"{new} replaces {old}: give it alone")
    return {new if key == old else key: value for key, value in settings.items()}
