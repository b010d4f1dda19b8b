"""The magnitude that the blocks of each denoiser add to every token, call by call, by which a step
cache decides.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from tempoquant.hosts.diffusers.sampling import CallPosition
from tempoquant.models.families import facts_of

_TINY = 1e-8  # added to a norm before it divides, as in MagCache's own calibration


class ResidualMagnitudes:
    """Watches one generation of a pipeline, unless its family's blocks cannot be cached.

    Attributes:
        ratios: denoiser to guidance branch to a ratio for each of its steps so far, see
            `MagnitudeRatios`.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline, self._facts = pipeline, facts_of(pipeline)
        self.ratios: dict[str, dict[str, list[float]]] = {}
        self._entered: torch.Tensor | None = None
        self._norms: torch.Tensor | None = None
        self._before: dict[tuple[str, str], torch.Tensor] = {}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the denoisers' first and last blocks within this context."""
        handles = []
        for denoiser in self._facts.denoisers if self._facts.family.skippable_blocks else ():
            model = getattr(self._pipeline, denoiser.component)
            blocks = self._facts.family.blocks_of(model)
            first, last = model.get_submodule(blocks[0]), model.get_submodule(blocks[-1])
            handles.append(first.register_forward_pre_hook(self._enter))
            handles.append(last.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, _block: Any, args: tuple[Any, ...]) -> None:
        self._entered = args[0]

    def _leave(self, _block: Any, _args: tuple[Any, ...], output: torch.Tensor) -> None:
        assert self._entered is not None  # the first block has run
        self._norms = torch.linalg.vector_norm((output - self._entered).float(), dim=-1)
        self._entered = None

    def note(self, position: CallPosition) -> None:
        """Note the position of the call that has just ended."""
        if self._norms is None:
            return
        key = (position.denoiser, position.guidance_branch)
        before = self._before.get(key)
        ratio = 1.0 if before is None else float((self._norms / (before + _TINY)).mean())
        self.ratios.setdefault(key[0], {}).setdefault(key[1], []).append(ratio)
        self._before[key], self._norms = self._norms, None
