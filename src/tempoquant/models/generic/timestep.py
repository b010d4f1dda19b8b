"""Detection, in two steps of a denoiser, of its timestep argument and the timestep's unit."""

from typing import NamedTuple

import torch

from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.errors import ModelError
from tempoquant.models.generic.hollow import Seen

_NAMES = ("timestep", "timesteps", "t")
_COUNTS = ((1.0, 0.0), (1000.0, 0.0), (-1000.0, 1000.0))  # scale, offset
_TOLERANCE = 8.0  # of timesteps in bfloat16, 0 … 1000


class Timestep(NamedTuple):
    """A denoiser's timestep argument.

    Attributes:
        argument: its name.
        scale, offset: see `ModelCall`.
    """

    argument: str
    scale: float
    offset: float

    def call(self, shared_inputs: tuple[tuple[str, ...], ...]) -> ModelCall:
        """Return how the denoiser is called."""
        return ModelCall(self.argument, self.scale, shared_inputs, self.offset)


def timestep_in(seen: Seen, class_name: str) -> Timestep:
    """Return the argument that follows the scheduler's timesteps in two steps.

    Raises:
        ModelError: none does.
    """
    first, second = (step[0] for step in seen.calls[:2])
    names = [name for name, value in first.items() if isinstance(value, torch.Tensor)]
    for name in sorted(names, key=lambda each: _NAMES.index(each) if each in _NAMES else len(_NAMES)):
        told = [(float(call[name].float().min()), float(call[name].float().max())) for call in (first, second)]
        for scale, offset in _COUNTS:
            counted = [max(scale * value + offset for value in pair) for pair in told]
            differences = [abs(a - b) for a, b in zip(counted, seen.timesteps[:2], strict=True)]
            if max(differences) <= _TOLERANCE:
                return Timestep(name, scale, offset)
    raise ModelError(
        f"no argument of a {class_name}'s denoiser follows the scheduler's timesteps ({seen.timesteps[:2]}), counted "
        "0 … 1000, 0 … 1 or 1 … 0: it needs a model family of its own, see CONTRIBUTING.md."
    )
