"""The sensitivity of all denoisers as a JSON file: measured once for many budgets.

    {"tempoquant_sensitivity": 1,
     "measured": {"model": fingerprint, "recipe": {…}},
     "experts": {"high_noise": [{"blocks.0.attn1.to_q": {"gain": g, "errors": {"0": e, …}}, …}, …],
                 …}}

Linears that get one rank together form one object of the list. Numbers read back exactly.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempoquant.calibrate.sensitivity import LayerSensitivity, LinearsSensitivity
from tempoquant.errors import CalibrationError
from tempoquant.recipe import Recipe

_VERSION_KEY, _VERSION = "tempoquant_sensitivity", 1
_SETTINGS = (
    "format",
    "layers",
    "keep_16bit_blocks",
    "weight_scale_rule",
    "activation_scale_rule",
    "smoothing_alpha",
    "smoothing_statistic",
    "deflation",
    "rotation",
    "prior_fraction",
    "centring",
    "share_smoothing",
    "statistics_branches",
)
"""Settings that the errors depend on. The rank is not one: several ranks are measured, whatever the
recipe's own is.
"""


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of all denoisers.

    Attributes:
        denoisers: the linears that can be given a rank, see `measure_denoiser`.
        measured: the model and settings of the measurement.
    """

    denoisers: Mapping[str, Sequence[LinearsSensitivity]]
    measured: Mapping[str, Any]

    def require_fits(self, model_fingerprint: str, recipe: Recipe, file: Path) -> None:
        """Raise CalibrationError, naming `file`, if the sensitivity belongs to another model or
        other settings.
        """
        if self.measured.get("model") != model_fingerprint:
            raise CalibrationError(
                f"{file} was measured on another model: measure this one with tempoquant sensitivity."
            )
        wanted, found = measured_settings(recipe), self.measured.get("recipe", {})
        different = [key for key in _SETTINGS if wanted.get(key) != found.get(key)]
        if different:
            raise CalibrationError(
                f"{file} was measured with a recipe of other {' and '.join(different)}: measure this recipe with "
                "tempoquant sensitivity."
            )

    def to_json(self) -> str:
        """Return the file's text."""
        denoisers = {
            denoiser: [
                {
                    name: {"gain": layer.gain, "errors": {str(rank): error for rank, error in layer.errors.items()}}
                    for name, layer in linears.items()
                }
                for linears in groups
            ]
            for denoiser, groups in self.denoisers.items()
        }
        return json.dumps({_VERSION_KEY: _VERSION, "measured": self.measured, "experts": denoisers}, indent=1) + "\n"

    @classmethod
    def load(cls, file: Path) -> "Sensitivity":
        """Read a file that `to_json` made. Raises CalibrationError for anything else."""
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if record[_VERSION_KEY] != _VERSION:
                raise ValueError(f"version {record[_VERSION_KEY]!r} is unknown")
            denoisers = {name: [_linears(group) for group in groups] for name, groups in record["experts"].items()}
            if not denoisers:
                raise ValueError("it names no denoiser")
            return cls(denoisers, dict(record["measured"]))
        except OSError as error:
            raise CalibrationError(f"sensitivity file {file} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(
                f"{file} is not a sensitivity file ({error}): make one with tempoquant sensitivity."
            ) from error


def measured_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe that its errors depend on, as plain values."""
    plain = recipe.to_dict()
    return {key: plain[key] for key in _SETTINGS if key in plain}


def _linears(record: Mapping[str, Any]) -> LinearsSensitivity:
    linears = {
        name: LayerSensitivity(_number(layer["gain"]), {int(rank): _number(e) for rank, e in layer["errors"].items()})
        for name, layer in record.items()
    }
    ranks = [set(layer.errors) for layer in linears.values()]
    if not linears or any(each != ranks[0] or 0 not in each for each in ranks):
        raise ValueError("linears that belong together must have errors at the same ranks, 0 among them")
    return linears


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no error power")
    return float(value)
