"""The names of memory modes: the places of a pipeline's weights while it generates, and while it
records.

A name that both have means the same in both: *resident* keeps everything on the device; *swap*
keeps one model there and the others in host memory; *disk* reads a block's weights from their file
when it runs, and neither RAM nor the device ever holds a whole denoiser. Generating alone has
*lean*: weights wait in page-locked host memory, and a block is copied before it runs.
"""

from typing import Literal, get_args

Memory = Literal["resident", "swap", "lean", "disk"]
MEMORY_MODES: tuple[Memory, ...] = get_args(Memory)
WITH_WEIGHTS: tuple[Memory, ...] = ("resident", "swap", "lean")
"""Modes in which the denoisers' weights are in memory, so that they can be set on a pipeline that
is loaded.
"""
RecordingMemory = Literal["resident", "swap", "disk"]
RECORDING_MODES: tuple[RecordingMemory, ...] = get_args(RecordingMemory)

WHILE_RECORDING: dict[Memory, RecordingMemory] = {
    "resident": "resident",
    "swap": "swap",
    "lean": "disk",
    "disk": "disk",
}
"""The recording mode for a machine with a given mode of generating."""
