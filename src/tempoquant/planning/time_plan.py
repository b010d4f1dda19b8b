"""The predicted time of a video on a GPU, by part: counted work at the GPU's rates.

Nothing is run. Each kernel takes its roofline (`planning.work`), kernels follow each other, and
weights are copied beside them where a memory mode lets them. Datasheet rates are not reached:
docs/speed.md says by how much.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from tempoquant.acceleration.attention import Candidate, candidates
from tempoquant.acceleration.choices import Choices
from tempoquant.acceleration.speeds import Speed
from tempoquant.planning.call_work import CALL_PARTS, OUTSIDE, CallSettings, works_of_call
from tempoquant.planning.gpus import Gpu, Operand
from tempoquant.planning.memory_plan import ModePlan
from tempoquant.planning.places import Places
from tempoquant.planning.traced_video import CallCounts, TracedVideo, counts_of
from tempoquant.planning.work import MEMORY, TENSOR_CORES, TRANSFERS, Work, seconds_of

SAMPLER, WAITING = "guidance and sampler", "waiting for weights"
STEP_PARTS = (*CALL_PARTS, SAMPLER, WAITING)
TEXT, IMAGE, DENOISING, DECODING = "text encoding", "image encoding", "denoising", "video decoding"
SIXTEEN_BIT = "16-bit"

DISK_BYTES_PER_S = 3.5e9
"""Of a disk: an NVMe SSD on four lanes of PCIe 3. An assumption."""


@dataclass(frozen=True)
class Part:
    """One part of a step, or one phase of a video.

    Attributes:
        operations: counted.
        num_bytes: moved in the GPU's memory; in "waiting for weights", copied to it.
        by_limit: seconds by the resource that sets them, predicted.
    """

    name: str
    operations: float
    num_bytes: float
    by_limit: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Return the seconds of the part."""
        return sum(self.by_limit.values())

    @property
    def limit(self) -> str:
        """Return the resource that sets most of its seconds."""
        return max(self.by_limit, key=lambda limit: self.by_limit[limit])


@dataclass(frozen=True)
class VideoTime:
    """A video at one speed.

    Attributes:
        label: "16-bit", or the speed.
        mode: the memory mode, and whether blocks compute in chunks of tokens.
        attention: diffusers' backend, which is supposed to be installed, and what its products
            multiply.
        is_compiled: whether blocks are.
        counts: calls of each denoiser.
        skipping: where the number of skipped ones is from, a sentence.
        step: the parts of a step, a mean over the video.
        phases: the video's: texts, image, all steps, decoding.
    """

    label: str
    mode: ModePlan
    attention: Candidate
    is_compiled: bool
    counts: Mapping[str, CallCounts]
    skipping: str
    step: tuple[Part, ...]
    phases: tuple[Part, ...]

    @property
    def whole_step(self) -> Part:
        """Return the sum of a step's parts."""
        return together("a step", self.step)

    @property
    def whole(self) -> Part:
        """Return the sum of the video's phases."""
        return together("a video", self.phases)


def together(name: str, parts: Iterable[Part]) -> Part:
    """Return parts as one."""
    listed = list(parts)
    limits = dict.fromkeys(limit for part in listed for limit in part.by_limit)
    by_limit = {limit: sum(part.by_limit.get(limit, 0.0) for part in listed) for limit in limits}
    operations, num_bytes = (sum(getattr(part, key) for part in listed) for key in ("operations", "num_bytes"))
    return Part(name, operations, num_bytes, by_limit)


def video_time(video: TracedVideo, gpu: Gpu, mode: ModePlan, speed: Speed | None) -> VideoTime:
    """Predict a video on a GPU.

    Args:
        mode: where weights are meanwhile.
        speed: of the quantized model; None for the 16-bit one, every step computed, nothing
            compiled.
    """
    family, asked = video.configs.family, speed or "exact"
    attention = candidates(asked, gpu.capability, family)[0]
    has_plain_blocks = not mode.in_chunks
    is_compiled, _ = Choices(asked).compiling("cuda", mode.mode, has_plain_blocks)
    calls = {}
    for name, traced in video.denoisers.items():
        layers = None if speed is None else video.layers[name]
        entries = {} if layers is None else layers.entries
        products = cast(tuple[Operand, Operand], attention.products)
        settings = CallSettings(entries, products, is_compiled, mode.in_chunks, video.shares_inputs)
        works = works_of_call(traced, settings, gpu)
        calls[name] = tuple(_part(part, works[part], gpu) for part in CALL_PARTS)
    counts, skipping = counts_of(video, asked)
    denoising = _denoising(video, gpu, mode, calls, counts)
    step = tuple(_times(part, 1 / video.size.num_steps) for part in denoising)
    others = video.others
    text_bytes = others.text_bytes if speed is None else others.quantized_text_bytes
    phases = _phases(video, gpu, together(DENOISING, denoising), text_bytes)
    return VideoTime(speed or SIXTEEN_BIT, mode, attention, is_compiled, counts, skipping, step, phases)


def _denoising(
    video: TracedVideo,
    gpu: Gpu,
    mode: ModePlan,
    calls: Mapping[str, Sequence[Part]],
    counts: Mapping[str, CallCounts],
) -> list[Part]:
    """Return the parts of all steps of a video."""
    parts = []
    for index, name in enumerate(CALL_PARTS):
        times = {
            denoiser: each.computed + (each.skipped if name == OUTSIDE else 0.0) for denoiser, each in counts.items()
        }
        parts.append(together(name, (_times(calls[denoiser][index], times[denoiser]) for denoiser in calls)))
    works = [*video.others.stepping, *(video.others.guiding if video.num_branches > 1 else ())]
    parts.append(_times(_part(SAMPLER, works, gpu), video.size.num_steps))
    seconds = {denoiser: sum(part.seconds for part in each) for denoiser, each in calls.items()}
    return [*parts, _waiting(gpu, mode, seconds, counts)]


def _waiting(gpu: Gpu, mode: ModePlan, seconds: Mapping[str, float], counts: Mapping[str, CallCounts]) -> Part:
    """Return the wait for weights that are not there yet: copies before the first step, and what
    outlasts the calls beside it.
    """
    if mode.places.from_disk:
        return _reading(gpu, mode.places, seconds, counts)
    places, rate = mode.places, gpu.pcie_bytes_per_s
    copied, waited = float(places.copied_first), places.copied_first / rate
    names = list(seconds)
    for index, name in enumerate(names):
        computed = counts[name].computed
        each_call = places.copied_each_call[index]
        copied += computed * each_call
        waited += computed * max(0.0, each_call / rate - seconds[name])
        if index and computed:
            once = places.copied_between[index - 1]
            copied += once
            waited += max(0.0, once / rate - seconds[names[index - 1]])
    return Part(WAITING, 0.0, copied, {TRANSFERS: waited})


def _reading(gpu: Gpu, places: Places, seconds: Mapping[str, float], counts: Mapping[str, CallCounts]) -> Part:
    """Return the wait for weights that come from files: of blocks what outlasts a call, and all of
    what lies in none, at a denoiser's first call.
    """
    copied = waited = 0.0
    rests = (places.copied_first, *places.copied_between)
    for index, (name, computed) in enumerate((name, counts[name].computed) for name in seconds):
        if not computed:
            continue
        copied += rests[index] + computed * places.copied_each_call[index]
        waited += _read_seconds(gpu, rests[index], places.read_first[index])
        call = _read_seconds(gpu, places.copied_each_call[index], places.read_each_call[index])
        waited += computed * max(0.0, call - seconds[name])
    return Part(WAITING, 0.0, copied, {TRANSFERS: waited})


def _read_seconds(gpu: Gpu, copied: int, read: int) -> float:
    """Return the seconds until bytes are on the device: it reads and copies at once."""
    return max(copied / gpu.pcie_bytes_per_s, read / DISK_BYTES_PER_S)


def _phases(video: TracedVideo, gpu: Gpu, denoising: Part, text_bytes: int) -> tuple[Part, ...]:
    others, num_texts = video.others, video.num_branches
    autoencoder = others.autoencoder_bytes / gpu.pcie_bytes_per_s
    text = _times(_part(TEXT, others.text, gpu), num_texts)
    copying = num_texts * text_bytes / gpu.pcie_bytes_per_s
    if copying > text.seconds:  # a block is copied while another one computes
        text = Part(TEXT, text.operations, text.num_bytes, {TRANSFERS: copying})
    phases = [text]
    if others.encoding:
        phases.append(_copied_first(_part(IMAGE, others.encoding, gpu), autoencoder))
    return (*phases, denoising, _copied_first(_part(DECODING, others.decoding, gpu), autoencoder))


def _copied_first(part: Part, seconds: float) -> Part:
    return Part(part.name, part.operations, part.num_bytes, {**part.by_limit, TRANSFERS: seconds})


def _part(name: str, works: Iterable[Work], gpu: Gpu) -> Part:
    listed = list(works)
    seconds = seconds_of(listed, gpu)
    return Part(
        name,
        sum(work.num_operations for work in listed),
        sum(work.bytes_moved for work in listed),
        {TENSOR_CORES: seconds.multiplying, MEMORY: seconds.moving},
    )


def _times(part: Part, times: float) -> Part:
    by_limit = {limit: times * seconds for limit, seconds in part.by_limit.items()}
    return Part(part.name, times * part.operations, times * part.num_bytes, by_limit)
