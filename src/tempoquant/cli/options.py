"""Options that several commands share, written once."""

import math
import re
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class FrameSize:
    """The size of a video's frames, in pixels."""

    height: int
    width: int


def parse_size(text: str) -> FrameSize:
    """Read a text such as "480x832". Raises typer.BadParameter for anything else."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not HEIGHTxWIDTH, such as 480x832.")
    return FrameSize(int(parts[0]), int(parts[1]))


@dataclass(frozen=True)
class ActivationBits:
    """The activation bits of 4-bit linears: `bits` at these timesteps (low, high), four at the
    others; None for all timesteps.
    """

    bits: int
    timesteps: tuple[float, float] | None

    def __str__(self) -> str:
        return f"{self.bits}" if self.timesteps is None else "{}@{:g}-{:g}".format(self.bits, *self.timesteps)


def parse_activation_bits(text: str) -> ActivationBits:
    """Read "4", "8" or "8@LOW-HIGH", timesteps from 0 to 1000. Raises typer.BadParameter for
    anything else.
    """
    found = re.fullmatch(r"(4|8)(?:@(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?))?", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not 4, 8 or 8@LOW-HIGH, such as 8@0-500.")
    bits, low, high = found.groups()
    if low is not None and (bits == "4" or not float(low) < float(high) <= 1000):
        raise typer.BadParameter(f"{text!r}: timesteps go with 8 bits, LOW below HIGH, from 0 to 1000.")
    # The last timestep is the noisiest, and belongs to an interval that ends with it.
    end = None if low is None else float(high) if float(high) < 1000 else math.inf
    return ActivationBits(int(bits), None if end is None else (float(low), end))


def check_frames(frames: int | None) -> int | None:
    """Check that a number of frames is 4·k + 1, as Wan's autoencoder makes; the pipeline would
    round others. Raises BadParameter.
    """
    if frames is not None and frames % 4 != 1:
        raise typer.BadParameter(f"{frames} is not of the form 4·k + 1: take {frames // 4 * 4 + 1}.")
    return frames


def check_device(name: str | None) -> str | None:
    """Return the name of a device that this machine has. Raises typer.BadParameter for any
    other.
    """
    if name is None:
        return None
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(f"{name!r} is not a device: give cpu, cuda or cuda:0.") from error
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r} is not supported: give cpu, cuda or cuda:0.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"there is no {name} here: {torch.cuda.device_count()} CUDA device(s) found.")
    return name


def check_devices(names: str | None) -> str | None:
    """Check several names, separated by commas, as `check_device` does."""
    return names and ",".join(str(check_device(name)) for name in names.split(","))


class MemoryMode(str, Enum):
    """The places of a pipeline's weights while it generates; `placement.modes` describes each."""

    RESIDENT = "resident"
    SWAP = "swap"
    LEAN = "lean"
    DISK = "disk"


class RecordingMode(str, Enum):
    """The places of the 16-bit pipeline's weights while it records; `placement.modes` describes
    each.
    """

    RESIDENT = "resident"
    SWAP = "swap"
    DISK = "disk"


class TextEncoder(str, Enum):
    """The storage formats of text encoders' linears, as in `recipe.TextEncoderFormat`."""

    AS_IT_IS = "16bit"
    INT8 = "int8"
    NF4 = "nf4"


def sampling_changes(
    size: FrameSize | None,
    frames: int | None,
    steps: int | None,
    guidance_scale: float | None,
    flow_shift: float | None,
) -> dict[str, Any]:
    """Return the flags' sampling settings, by the names of `SamplingSettings`; None for the model's
    own.
    """
    return {
        "height": size and size.height,
        "width": size and size.width,
        "num_frames": frames,
        "num_steps": steps,
        "guidance_scale": guidance_scale,
        "flow_shift": flow_shift,
    }


Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="tiny, tiny-outliers, a diffusers folder, or a hub id; or give --base."),
]
Calibration = Annotated[
    str | None,
    typer.Option(metavar="FILE|FOLDER", help="A jsonl file of {prompt, image}; bundled models have their own."),
]
SamplesPerDenoiser = Annotated[
    int | None,
    typer.Option(
        "--samples-per-denoiser",
        "--samples-per-expert",
        min=1,
        help="Transformer calls to keep of each denoiser; default: about a million video tokens.",
    ),
]
GuidanceScale = Annotated[float | None, typer.Option(min=1e-6, help="Scale of classifier-free guidance; 1 for none.")]
RecordingMemory = Annotated[
    RecordingMode,
    typer.Option(
        "--memory",
        help="The 16-bit pipeline: all on the device, one model at a time, or one block at a time from its file.",
    ),
]
GenerationMemory = Annotated[
    MemoryMode,
    typer.Option(
        "--memory",
        help="On the device: all denoisers, the running one, or its running block; disk reads that block from its "
        "file (docs/memory.md).",
    ),
]
InChunks = Annotated[
    bool | None,
    typer.Option(
        "--in-chunks/--in-one-piece",
        help="Compute blocks in chunks of tokens, or all at once; default: by the GPU's free memory.",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same result.")]
Size = Annotated[
    FrameSize | None,
    typer.Option("--size", metavar="HxW", parser=parse_size, help="Height × width, such as 480x832."),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps.")]
Frames = Annotated[int | None, typer.Option(min=1, callback=check_frames, help="Frames of the video, 4·k + 1.")]
FlowShift = Annotated[float | None, typer.Option(min=1e-6, help="Flow shift of the scheduler.")]
Device = Annotated[
    str | None, typer.Option(callback=check_device, help="cpu, cuda, cuda:1 …; default: CUDA if there is a GPU.")
]
Activations = Annotated[
    ActivationBits | None,
    typer.Option(
        "--activation-bits",
        metavar="4|8|8@LOW-HIGH",
        parser=parse_activation_bits,
        help="Bits of activations: 8 for W4A8 (as fast on FP8 and INT8 hardware), at some or all timesteps.",
    ),
]
Folder = Annotated[
    str, typer.Argument(metavar="DIR", help="A quantized pipeline: a folder or hub id (org/name, org/name@revision).")
]
