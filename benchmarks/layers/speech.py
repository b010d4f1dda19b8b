"""Speech out of text, by espeak-ng: Python's documentation, read aloud by several voices in a room
with some noise.
"""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.io import wavfile
from scipy.signal import resample_poly

from benchmarks.layers.layer import PARTS, texts

PROGRAM = "espeak-ng"
VOICES = ("en", "en-us", "en-gb", "en+f3", "en+m4")
SAMPLING_RATE = 16_000  # Hz, Whisper's
NUM_CLIPS = 9
NUM_WORDS = 60  # less than the half minute that Whisper hears, at the slowest of the speeds below
SLOWEST, FASTER = 150, 10  # words a minute of the first clip, and how many more each next one has
NOISE = 0.002  # standard deviation; full scale is 1
SENTENCE = re.compile(r"(?<!\S)[A-Z][a-z]*[a-z ,\n-]*\.(?!\S)")  # without code and markup, which nobody reads aloud


class Clip(NamedTuple):
    """Sound at 16 kHz, (samples,) float32 in −1 … 1, and its words."""

    sound: np.ndarray
    words: str


def require_espeak() -> str:
    """Return the version of espeak-ng. Raises SystemExit, with the line that installs it, if there
    is none.
    """
    if shutil.which(PROGRAM) is None:
        raise SystemExit(f"Speech needs {PROGRAM}, which is not on the path: apt-get install {PROGRAM}.")
    return subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout.split("  ")[0]


def clips(part: str) -> list[Clip]:
    """Make a clip from each of the part's first topics with enough text, each with its own voice
    and speed.
    """
    prose = [" ".join(SENTENCE.findall(text)).split() for text in texts(part)]
    long = [words for words in prose if len(words) >= NUM_WORDS]
    room = np.random.default_rng(PARTS.index(part))
    spoken = []
    for index, words in enumerate(long[:NUM_CLIPS]):
        said = " ".join(words[:NUM_WORDS])
        sound = _speak(said, VOICES[index % len(VOICES)], SLOWEST + FASTER * index)
        spoken.append(Clip((sound + room.normal(0, NOISE, len(sound))).astype(np.float32), said))
    return spoken


def _speak(words: str, voice: str, words_per_minute: int) -> np.ndarray:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "speech.wav"
        command = [PROGRAM, "-v", voice, "-s", str(words_per_minute), "-w", str(file), "--stdin"]
        done = subprocess.run(command, input=words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{PROGRAM} cannot speak as {voice}: {done.stderr.strip()}")
        rate, samples = wavfile.read(file)
    return resample_poly(samples / 2**15, SAMPLING_RATE, rate)
