"""One denoiser: its blocks are quantized in order, and each is committed once it is finished."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from tempoquant.calibrate.corrected_bias import corrected_bias
from tempoquant.calibrate.freed_memory import map_large_blocks
from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.calibrate.sequential import QuantizedBlock, quantize_denoiser
from tempoquant.calibrate.store import SampleStore, bins_of
from tempoquant.calibrate.token_chunks import TokenChunks
from tempoquant.checkpoint.journal import Journal
from tempoquant.checkpoint.schema import Calibration
from tempoquant.checkpoint.writer import ComponentWriter
from tempoquant.device import compute_dtype
from tempoquant.errors import OutputError
from tempoquant.models.lora.lora import LoraSum
from tempoquant.models.replay import ReplayedDenoiser
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.placement.cpu_threads import suited_threads
from tempoquant.progress import SILENT, Progress
from tempoquant.quantizing.machine import Machine
from tempoquant.recipe import Recipe
from tempoquant.timesteps import TimestepBins

FINISHED_BLOCKS = "Blocks finished"
_DYING_S = 120.0
"""A killed worker ends soon; the lock of a lost machine lasts as long as its lease (NFS: 90 s)."""


@dataclasses.dataclass(frozen=True)
class ComponentJob:
    """The work on one denoiser, in plain values, so that it can be sent to another process.

    Attributes:
        source: the 16-bit pipeline.
        denoiser: the denoiser's name.
        recipe: resolved.
        store: folder of the calibration samples; None for a recipe that needs none.
        lora: the LoRAs that are fused into the weights, or None.
        work: folder of unfinished work.
        target: the final folder of the component.
        device: where to compute.
    """

    source: SourceModel
    denoiser: str
    recipe: Recipe
    store: Path | None
    lora: LoraSum | None
    work: Path
    target: Path
    device: str

    @property
    def journal(self) -> Journal:
        """Return the journal of this component."""
        return Journal(self.work / f"{self.denoiser}.journal")


def quantize_component(
    job: ComponentJob,
    machine: Machine,
    progress: Progress = SILENT,
    on_block: Callable[[QuantizedBlock], None] = lambda block: None,
) -> None:
    """Quantize one denoiser, or the rest of it. `on_block` is called with each block once it is
    committed.

    Raises:
        TempoQuantError: see tempoquant.errors; finished blocks stay in the work folder.
    """
    try:
        owned = FileLock(job.work / f"{job.denoiser}.lock", timeout=_DYING_S).acquire()
    except Timeout as error:
        raise OutputError(f"another process is still quantizing {job.denoiser} in {job.work}: stop it.") from error
    with owned:
        if job.target.is_dir():
            job.journal.remove()
        else:
            map_large_blocks()
            with suited_threads(job.source, job.device):
                _Component(job, machine, progress).quantize(on_block)
        shutil.rmtree(_hidden(job), ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Quantizing:
    """The stage that quantizes denoisers; its items are jobs, which run on the worker's device."""

    machine: Machine

    @contextlib.contextmanager
    def open(self, device: str, progress: Progress) -> Iterator[Callable[[ComponentJob], None]]:
        """Prepare a worker; see `Stage.open`."""
        yield lambda job: quantize_component(dataclasses.replace(job, device=device), self.machine, progress)


def _hidden(job: ComponentJob) -> Path:
    return job.work / f"{job.denoiser}.hidden"


class _Component:
    """The denoiser's files and samples, and everything that follows from them."""

    def __init__(self, job: ComponentJob, machine: Machine, progress: Progress) -> None:
        self._job, self._machine, self._progress = job, machine, progress
        self._weights = DenoiserWeights(job.source, job.denoiser, compute_dtype(job.device), job.device, job.lora)
        self._store = None if job.store is None else SampleStore.open(job.store)
        self._bins = TimestepBins() if self._store is None else bins_of(self._store, job.recipe, job.denoiser)

    def quantize(self, on_block: Callable[[QuantizedBlock], None]) -> None:
        job = self._job
        model = ReplayedDenoiser(self._weights)
        with ComponentWriter(
            job.target,
            denoiser=job.denoiser,
            bins=self._bins,
            recipe=job.recipe,
            call=job.source.family.call,
            journal=job.journal,
        ) as writer:
            done = writer.num_commits
            advance = self._progress.start(FINISHED_BLOCKS, model.num_blocks, done)
            if done < model.num_blocks:
                for block in self._blocks(model, done):
                    self._commit(writer, block)
                    advance()
                    on_block(block)
                    del block  # otherwise its layers would stay in memory until the next block is done
            for name, tensor in self._weights.stored(lambda name: job.source.family.block_of(name) is None):
                writer.add_tensor(name, tensor)
            writer.finish(
                self._weights.config(),
                calibration=self._calibration(),
                notes=self._weights.notes,
                magnitude_ratios=None if self._store is None else self._store.magnitude_ratios(job.denoiser),
            )

    def _blocks(self, model: ReplayedDenoiser, done: int) -> Iterator[QuantizedBlock]:
        samples = [] if self._store is None else self._store.samples(self._job.denoiser)
        states = HiddenStates(_hidden(self._job), self._machine.hidden_ram_bytes)
        states.keep_only(done)
        chunks = TokenChunks(self._machine.num_tokens_at_once)
        return quantize_denoiser(
            model, samples, self._job.recipe, self._bins, states, done, chunks=chunks, progress=self._progress
        )

    def _commit(self, writer: ComponentWriter, block: QuantizedBlock) -> None:
        """Commit a block whole: its 4-bit layers, and its other tensors as the files have them."""
        for named in block.layers:
            stored = self._weights.read(f"{named.name}.bias") if f"{named.name}.bias" in self._weights else None
            bias = corrected_bias(stored, named.bias_correction)
            writer.add_layer(named.name, dataclasses.replace(named.layer, bias=bias))
        own, family = self._weights.blocks[block.index], self._job.source.family
        rest = self._weights.stored(
            lambda name: family.block_of(name) == own and name.rpartition(".")[0] not in writer.layers
        )
        for name, tensor in rest:
            writer.add_tensor(name, tensor)
        notes = tuple(
            f"the Hessian of {named.name} was positive definite in float64 only"
            for named in block.layers
            if named.needed_float64
        )
        seen = {named.name: named.hardly_seen for named in block.layers if named.hardly_seen is not None}
        writer.commit(notes, seen)

    def _calibration(self) -> Calibration | None:
        if self._store is None:
            return None
        drawn = {key: self._store.provenance[key] for key in ("seed", "from_latents", "compute_dtype")}
        return Calibration(tuple(self._store.prompts), {**self._store.settings, **drawn})
