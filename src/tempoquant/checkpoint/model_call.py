"""ModelCall: how the runtime must call the model whose linears it replaces.

The checkpoint stores it, so a model loads without its family.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tempoquant.checkpoint.checks import check_keys, check_name, require

_MAX_GROUPS = 1000


@dataclass(frozen=True)
class ModelCall:
    """The way to call a denoiser.

    Attributes:
        timestep_argument: the name of the timestep in its forward.
        timestep_scale, timestep_offset: argument · scale + offset is 0 clean … 1000 noise. The
            scale is negative if the model takes the cleanness of its latents.
        shared_inputs: groups of linears, by their names in a block, that read one tensor.
        one_row: whether the argument holds the timesteps of parts of one row of the batch, and not
            one of each row.
    """

    timestep_argument: str = "timestep"
    timestep_scale: float = 1.0
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    timestep_offset: float = 0.0
    one_row: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the inverse of `from_dict`."""
        return {
            "timestep_argument": self.timestep_argument,
            "timestep_scale": self.timestep_scale,
            "shared_inputs": [list(group) for group in self.shared_inputs],
            **({"timestep_offset": self.timestep_offset} if self.timestep_offset else {}),
            **({"one_row": True} if self.one_row else {}),
        }

    @classmethod
    def from_dict(cls, record: Any) -> "ModelCall":
        """Check and parse a record. Raises CheckpointError that names the key."""
        required = {"timestep_argument", "timestep_scale", "shared_inputs"}
        check_keys(record, required, optional={"timestep_offset", "one_row"})
        offset, one_row = record.get("timestep_offset", 0.0), record.get("one_row", False)
        argument, scale, groups = record["timestep_argument"], record["timestep_scale"], record["shared_inputs"]
        is_name = isinstance(argument, str) and argument.isidentifier()
        require(is_name, "timestep_argument", "is the name of an argument", argument)
        is_scale = type(scale) in (int, float) and 0 < abs(scale) < math.inf
        require(is_scale, "timestep_scale", "is a finite number other than 0", scale)
        is_offset = type(offset) in (int, float) and abs(offset) < math.inf
        require(is_offset, "timestep_offset", "is a finite number", offset)
        require(isinstance(one_row, bool), "one_row", "is true or false", one_row)
        is_list = isinstance(groups, list) and len(groups) <= _MAX_GROUPS
        require(is_list, "shared_inputs", f"is a list of at most {_MAX_GROUPS}", groups)
        for group in groups:
            is_group = isinstance(group, list) and 1 < len(group) <= _MAX_GROUPS
            require(is_group, "shared_inputs", "holds lists of two linears or more", group)
            for name in group:
                check_name(name)
        return cls(argument, float(scale), tuple(tuple(group) for group in groups), float(offset), one_row)

    def sharing_an_input(self, linears: Iterable[str]) -> list[tuple[str, ...]]:
        """Return the groups of linears, by their full names, that read one tensor; absent linears
        are left out.
        """
        found: dict[tuple[str, int], list[str]] = {}
        for name in linears:
            for number, group in enumerate(self.shared_inputs):
                for own in group:
                    if name.endswith(f".{own}"):
                        found.setdefault((name.removesuffix(own), number), []).append(name)
        return [tuple(group) for group in found.values() if len(group) > 1]

    def timesteps(self, arguments: Mapping[str, Any]) -> Any:
        """Return a call's timestep, 0 clean … 1000 noise, in the shape that it was given."""
        return self.timestep(arguments[self.timestep_argument])

    def timestep(self, argument: Any) -> Any:
        """Convert a timestep argument to 0 clean … 1000 noise; return the argument itself if it is
        that already.

        If all timesteps belong to one row, return the noisiest, (1,).
        """
        scaled = argument if self.timestep_scale == 1 else argument * self.timestep_scale
        noise = scaled + self.timestep_offset if self.timestep_offset else scaled
        return noise.reshape(-1).amax().reshape(1) if self.one_row else noise
