"""Seeded ways to damage the folder of a quantized component: its JSON, its headers, its bytes, its
files.

Each mutation changes the folder, given a random generator, and says what it did.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tempoquant.checkpoint import files

Mutation = Callable[[random.Random, Path], str]

JUNK = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**40, 0.5, -0.0, 1e308, "", "x", "../x", "\0", [], {}, [[]],
    {"x": 1},
)  # fmt: skip
# What diffusers itself reads of config.json, before any of our code runs, is its own affair: with
# 2^63 layers it would build them all. There only small junk is used.
SMALL_JUNK = (None, True, 0, -1, 1, 3, 0.5, "", "x", [], {}, [1, 2, 2])


def overwrite(path: Path, data: bytes) -> None:
    """Write a file, but never through a link that an earlier mutation made."""
    if path.is_symlink():
        path.unlink()
    path.write_bytes(data)


def mutate_json(rng: random.Random, value: Any, junk: tuple[Any, ...]) -> str:
    """Replace, remove, rename or repeat one random entry of a JSON value, in place."""
    spots = [spot for spot in _spots(value) if isinstance(spot[0], dict | list)]
    record, key, path = rng.choice(spots)
    action = rng.choice(("replace", "replace", "replace", "remove", "rename", "nudge"))
    if action == "replace":
        record[key] = rng.choice(junk)
    elif action == "remove":
        del record[key]
    elif action == "rename" and isinstance(record, dict):
        record[_mangled(rng, str(key))] = record.pop(key)
    elif isinstance(record[key], str):
        record[key] = _mangled(rng, record[key])
    elif isinstance(record[key], int | float):
        record[key] = record[key] + rng.choice((-1, 1, 0.5)) if not isinstance(record[key], bool) else not record[key]
    else:
        record[key] = rng.choice(junk)
    return f"{action} {path}"


def _spots(value: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key, f"{path}/{key}"
        yield from _spots(item, f"{path}/{key}")


def _mangled(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(("", "x", ".", "/", "../", "\0", "é", "9")) + text[at + rng.randrange(2) :]


def damage_bytes(rng: random.Random, data: bytes, first: int = 0, last: int | None = None) -> bytes:
    """Flip bits, cut, insert, or repeat bytes between two places."""
    last = len(data) if last is None else last
    at = rng.randrange(first, max(first + 1, last))
    action = rng.randrange(5)
    if action == 0:
        return data[:at]
    if action == 1:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    if action == 2:
        return data[:at] + data[at + rng.randrange(1, 9) :]
    changed = bytearray(data)
    for _ in range(1 if action == 3 else 8):
        at = rng.randrange(first, max(first + 1, last))
        if at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def mutate_config(rng: random.Random, folder: Path) -> str:
    config = json.loads((folder / files.CONFIG_NAME).read_text())
    if rng.random() < 0.1:
        what = mutate_json(rng, config, SMALL_JUNK)
    else:
        what = mutate_json(rng, config["quantization_config"], JUNK)
    overwrite(folder / files.CONFIG_NAME, json.dumps(config).encode())
    return f"config: {what}"


def mutate_config_bytes(rng: random.Random, folder: Path) -> str:
    path = folder / files.CONFIG_NAME
    data = path.read_bytes()
    # From quantization_config on: in front of it lie numbers that only diffusers reads.
    overwrite(path, damage_bytes(rng, data, data.index(b'"quantization_config"'), data.index(b'"rope_max_seq_len"')))
    return "config bytes"


def mutate_index(rng: random.Random, folder: Path) -> str:
    path = folder / files.INDEX_NAME
    if rng.random() < 0.3:
        overwrite(path, damage_bytes(rng, path.read_bytes()))
        return "index bytes"
    index = json.loads(path.read_text())
    if rng.random() < 0.5:
        name = rng.choice(sorted(index["weight_map"]))
        target = rng.choice(
            ("../outside.safetensors", str(folder.parent / "outside.safetensors"), "x.bin", "config.json")
        )
        index["weight_map"][name] = target
        what = f"{name} → {target}"
    else:
        what = mutate_json(rng, index, JUNK)
    overwrite(path, json.dumps(index).encode())
    return f"index: {what}"


def mutate_header(rng: random.Random, folder: Path) -> str:
    path = _a_weight_file(rng, folder)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        overwrite(path, damage_bytes(rng, data, 0, 8 + length))
        return "header bytes"
    header = json.loads(data[8 : 8 + length])
    what = mutate_json(rng, header, (*JUNK, "U8", "BF16", "F32", "I8", "F8_E4M3", "F4", "C64"))
    text = json.dumps(header).encode()
    overwrite(path, len(text).to_bytes(8, "little") + text + data[8 + length :])
    return f"header: {what}"


def mutate_data(rng: random.Random, folder: Path) -> str:
    path = _a_weight_file(rng, folder)
    data = path.read_bytes()
    overwrite(path, damage_bytes(rng, data, 8 + int.from_bytes(data[:8], "little")))
    return "data bytes"


def mutate_files(rng: random.Random, folder: Path) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    action = rng.choice(("remove", "empty", "link", "pickle", "swap", "folder"))
    if action == "swap":
        other = rng.choice(sorted(folder.iterdir()))
        first, second = path.read_bytes(), other.read_bytes()
        overwrite(path, second)
        overwrite(other, first)
        return f"swap {path.name}, {other.name}"
    path.unlink()
    if action == "empty":
        path.touch()
    elif action == "link":
        path.symlink_to(folder.parent / f"outside{path.suffix}")
    elif action == "pickle":
        torch.save({"a": torch.zeros(1)}, path.with_suffix(".bin"))
    elif action == "folder":
        path.mkdir()
    return f"{action} {path.name}"


def _a_weight_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


MUTATIONS: tuple[tuple[Mutation, int], ...] = (  # and how often each, relative to the others
    (mutate_config, 6),
    (mutate_config_bytes, 2),
    (mutate_index, 2),
    (mutate_header, 6),
    (mutate_data, 3),
    (mutate_files, 1),
)
