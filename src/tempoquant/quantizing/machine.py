"""How this machine does the work: nothing here changes what a run means, and nothing of it is stored."""

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
    """How a run uses its machine.

    Attributes:
        devices: one for all denoisers, or one for each, which are then quantized side by side. On a cluster, one as its
            workers name it.
        memory: where the 16-bit pipeline lives while it records: "resident", "swap" or "disk".
        hidden_ram_gib: hidden states in RAM, up to this much for each denoiser; beyond it they are mapped from files.
        num_tokens_at_once: tokens that statistics are gathered from at once.
        cluster: where workers are, if not here.

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
            raise SettingsError(f"at least one token is worked on at once, not {self.num_tokens_at_once}.")

    @property
    def engine(self) -> Engine:
        """Where the work runs."""
        return self.cluster or Local(self.devices)

    @property
    def is_side_by_side(self) -> bool:
        """Whether all denoisers are worked on at once."""
        return self.cluster is not None or len(self.devices) > 1

    @property
    def hidden_ram_bytes(self) -> int:
        """`hidden_ram_gib` in bytes."""
        return round(self.hidden_ram_gib * 2**30)

    def replace(self, **changes: Any) -> "Machine":
        """A copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)
