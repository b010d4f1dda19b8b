"""Damages a quantized component in seeded ways, and loads each result through our reader and
through diffusers.

    python -m tests.fuzz_checkpoint --mutations 10000 --seed 0
    python -m tests.fuzz_checkpoint --only 1234 --seed 0      # one case again, with its traceback

The law: a damaged component is refused, with a TempoQuantError wherever our code is what refuses
it, or it loads into a whole model (a flipped code is a valid code; only hashes can tell). Nothing
else happens: no other exception out of our code, no hang, no crash, nothing opened by our reader or
written by anyone outside the folder.
"""

import argparse
import collections
import faulthandler
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.utils import logging

from tempoquant.checkpoint import check_tensors, files, verify_hashes
from tempoquant.errors import TempoQuantError
from tempoquant.hosts.diffusers.loader import register
from tempoquant.runtime.convert import quantized_linears
from tests.checkpoint_damage import MUTATIONS, Mutation, mutate_index
from tests.quantized_wan import quantize_all, tiny_wan, write_component
from tests.random_layers import by_bin

SECONDS_PER_CASE = 20
SOURCE = Path(files.__file__).parents[1]


@dataclass
class Outcome:
    """The outcome of one case: "loaded" or "refused by …", and a violation of the law, or None."""

    reader: str
    diffusers: str
    violation: str | None = None


class TimeIsUp(BaseException):
    """A case took too long. A BaseException, so that nobody's `except Exception` swallows it."""


class Fuzzer:
    """A pristine component (one file) and its sharded twin, and a place to damage copies of
    them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        model = tiny_wan(num_layers=1, width=64)
        layers = quantize_all(model, "mixed", rank=2)
        layers |= {name: by_bin(layer) for name, layer in layers.items() if ".attn2." in name}
        whole = write_component(root / "pristine" / "whole", model, layers)
        sharded = write_component(root / "pristine" / "sharded", model, layers, max_shard_bytes=60_000)
        self.pristine = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (whole, sharded)]
        self.work = root / "work" / "component"
        self.work.mkdir(parents=True)
        shutil.copy(whole / files.WEIGHTS_NAME, self.work.parent / "outside.safetensors")
        shutil.copy(whole / files.CONFIG_NAME, self.work.parent / "outside.json")
        self.outside = self._snapshot()

    def case(self, seed: int, number: int) -> tuple[str, Outcome]:
        """Run one case, which depends on nothing but its seed and number."""
        rng = random.Random(f"{seed}/{number}")
        mutate = rng.choices([f for f, _ in MUTATIONS], [weight for _, weight in MUTATIONS])[0]
        contents = self.pristine[1 if mutate is mutate_index else rng.randrange(2)]
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for name, data in contents.items():
            (self.work / name).write_bytes(data)
        what = " and ".join(self._try(mutate, rng) for _ in range(rng.choice((1, 1, 1, 2))))
        with time_limit():
            return what, self.look()

    def _try(self, mutate: Mutation, rng: random.Random) -> str:
        try:
            return mutate(rng, self.work)
        except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
            return f"{mutate.__name__} after the first one: {type(error).__name__}"  # what it reads is damaged already

    def look(self) -> Outcome:
        """Load the content of the work folder in both ways."""
        outcome = Outcome("loaded", "loaded")
        with recorded_opens() as opened:
            try:
                check_tensors(self.work)
                outcome.reader = "refused by its hash"
                verify_hashes(self.work)
                outcome.reader = "loaded"
            except TempoQuantError:
                outcome.reader = "refused" if outcome.reader == "loaded" else outcome.reader
            except Exception:
                outcome.violation = "the reader raised:\n" + traceback.format_exc()
        if elsewhere := [path for path in opened if not path.resolve().is_relative_to(self.work.resolve())]:
            outcome.violation = f"the reader opened {elsewhere[0]}"
        try:
            model = WanTransformer3DModel.from_pretrained(self.work, dtype=torch.bfloat16)
            outcome.violation = outcome.violation or self._incomplete(model)
            outcome.diffusers = "loaded" if quantized_linears(model) else "not taken for quantized"
        except TempoQuantError:
            outcome.diffusers = "refused"
        except Exception as error:
            outcome.diffusers = f"refused by diffusers ({type(error).__name__})"
            frames = traceback.extract_tb(error.__traceback__)
            if any(Path(frame.filename).is_relative_to(SOURCE) for frame in frames):
                outcome.violation = "the loader raised:\n" + traceback.format_exc()
        if self._snapshot() != self.outside:
            outcome.violation = "something outside the folder was written"
        return outcome

    def _incomplete(self, model: Any) -> str | None:
        """Return the defect of a model that did load. A model that lost its quantization_config may
        have any.
        """
        linears = quantized_linears(model)
        for name, linear in linears.items():
            linear.check(name)
        left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        return f"{left[0]} was left on the meta device" if left and linears else None

    def _snapshot(self) -> list[tuple[str, int, int]]:
        """Return the content around the work folder; pristine files are in memory, so only their
        folder's name counts.
        """
        stats = [(path, path.lstat()) for folder in (self.root, self.work.parent) for path in sorted(folder.iterdir())]
        return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats if path.suffix] + [
            (str(path), 0, 0) for path, _ in stats
        ]


@contextmanager
def recorded_opens() -> Iterator[list[Path]]:
    """Record every weight file that our reader opens."""
    opened: list[Path] = []
    real = files.safe_open

    def recording(path: Path, **kwargs: Any) -> Any:
        opened.append(Path(path))
        return real(path, **kwargs)

    files.safe_open = recording  # type: ignore[assignment]
    try:
        yield opened
    finally:
        files.safe_open = real


@contextmanager
def time_limit(seconds: int = SECONDS_PER_CASE) -> Iterator[None]:
    """Raise TimeIsUp in whatever takes longer; end the process if even that does not get
    through.
    """

    def ring(*_: Any) -> None:
        raise TimeIsUp(f"longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def fuzz(numbers: range, seed: int, verbose: bool = False) -> tuple[collections.Counter[str], list[str]]:
    """Run cases; returns how often each outcome occurred, and a description of every violation."""
    register()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    counts: collections.Counter[str] = collections.Counter()
    violations = []
    with tempfile.TemporaryDirectory() as root:
        fuzzer = Fuzzer(Path(root))
        for number in numbers:
            what = ""
            try:
                what, outcome = fuzzer.case(seed, number)
            except TimeIsUp as error:
                outcome = Outcome("hung", "hung", str(error))
            counts[f"reader {outcome.reader}, diffusers {outcome.diffusers}"] += 1
            if outcome.violation is not None:
                violations.append(f"case {number} ({what}): {outcome.violation}")
            if verbose and (number + 1) % 1000 == 0:
                print(f"{number + 1} cases, {len(violations)} violations", flush=True)
    return counts, violations


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this one case")
    arguments = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    numbers = range(arguments.mutations) if arguments.only is None else range(arguments.only, arguments.only + 1)
    start = time.monotonic()
    counts, violations = fuzz(numbers, arguments.seed, verbose=True)
    for outcome, count in counts.most_common():
        print(f"{count:8d}  {outcome}")
    print("\n".join(violations[:20]))
    print(f"{len(numbers)} cases in {time.monotonic() - start:.0f} s: {len(violations)} violations of the law.")
    return 1 if violations else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
