"""Settings of the machine that do the work: they do not change a run's result, and are not
stored.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tempoquant.calibrate.hidden_states import DEFAULT_RAM_BYTES
from tempoquant.calibrate.token_chunks import DEFAULT_TOKENS
from tempoquant.engines import Engine, Local, RayCluster
from tempoquant.errors import SettingsError
from tempoquant.placement.modes import RecordingMemory


@dataclass(frozen=True)
class Machine:
    """The way a run uses its machine.

    Attributes:
        devices: one for all denoisers, or one for each, which are then quantized in parallel. On a
            cluster, one device, by its name on the workers.
        memory: where the 16-bit pipeline is held while it records: "resident", "swap" or "disk".
        hidden_ram_gib: RAM for the hidden states of each denoiser; the rest is mapped from files.
        num_tokens_at_once: tokens that statistics process at once.
        cluster: the cluster of workers; None for this machine.

    Raises:
        SettingsError: a value makes no sense.
    """

    devices: tuple[str, ...]
    memory: RecordingMemory = "resident"
    hidden_ram_gib: float = DEFAULT_RAM_BYTES / 2**30
    num_tokens_at_once: int = DEFAULT_TOKENS
    cluster: RayCluster | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.devices) <= 2:
            raise SettingsError(f"give one device, or one for each denoiser, not {', '.join(self.devices)!r}.")
        if not 0 <= self.hidden_ram_gib < math.inf:
            raise SettingsError(f"hidden states cannot have {self.hidden_ram_gib} GiB of RAM.")
        if self.num_tokens_at_once < 1:
            raise SettingsError(f"at least one token is processed at once, not {self.num_tokens_at_once}.")

    @property
    def engine(self) -> Engine:
        """Return the engine that runs the work."""
        return self.cluster or Local(self.devices)

    @property
    def is_side_by_side(self) -> bool:
        """Return whether all denoisers are quantized in parallel."""
        return self.cluster is not None or len(self.devices) > 1

    @property
    def hidden_ram_bytes(self) -> int:
        """Return `hidden_ram_gib` in bytes."""
        return round(self.hidden_ram_gib * 2**30)

    def replace(self, **changes: Any) -> "Machine":
        """Return a copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)
