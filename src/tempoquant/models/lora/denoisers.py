"""LoRA files of several denoisers at once: the prefix of a key names the component of its LoRA.

A prefix that names the first component is ambiguous alone, since trainers of one denoiser write it
for any. It means the first denoiser if the same file also has another denoiser's keys. ai-toolkit
counts from transformer_1.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tempoquant.errors import ModelError
from tempoquant.models.lora.names import prefix_in
from tempoquant.timesteps import Denoiser


class Share(NamedTuple):
    """The part of a file that belongs to one denoiser.

    Attributes:
        keys: of its LoRA.
        others: names of denoisers whose LoRAs the file holds, too.
    """

    keys: list[str]
    others: tuple[str, ...]


def share_of(file: Path, keys: Iterable[str], denoisers: Sequence[Denoiser], name: str) -> Share:
    """Return the part of a file that is one denoiser's LoRA. Raises ModelError if all of it is
    other denoisers'.
    """
    found = _by_denoiser(list(keys), denoisers)
    own = [*found.get(name, []), *found.get(None, [])]
    others = tuple(each for each in found if each is not None and each != name)
    if own or not others:
        return Share(own, others)
    other = others[0]
    raise ModelError(
        f"{file} holds a LoRA of {other}, as {found[other][0][:120]} says, and none of {name}: give it as {other}."
    )


def _by_denoiser(keys: Sequence[str], denoisers: Sequence[Denoiser]) -> dict[str | None, list[str]]:
    """Group a file's keys by the denoisers of their LoRAs; None for keys that any may have."""
    found: dict[str | None, list[str]] = {}
    for key in keys:
        found.setdefault(_owner(key, denoisers), []).append(key)
    if denoisers and found.keys() <= {None, denoisers[0].name} and not _counts_from_one(keys, denoisers):
        return {None: [key for each in found.values() for key in each]}
    return found


def _owner(key: str, denoisers: Sequence[Denoiser]) -> str | None:
    parts = prefix_in(key).split(".")
    for index, denoiser in enumerate(denoisers):
        if denoiser.component in parts or _counted(denoisers, index) in parts:
            return denoiser.name
    return None


def _counted(denoisers: Sequence[Denoiser], index: int) -> str:
    """Return a denoiser's component in the naming of a trainer that counts from one."""
    return f"{denoisers[0].component}_{index + 1}"


def _counts_from_one(keys: Iterable[str], denoisers: Sequence[Denoiser]) -> bool:
    pattern = re.compile(rf"(^|\.){re.escape(_counted(denoisers, 0))}\.")
    return any(pattern.search(prefix_in(key)) for key in keys)
