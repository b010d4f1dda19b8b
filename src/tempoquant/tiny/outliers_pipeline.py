"""The pipeline folder of `tiny-outliers`, written once into the user's cache."""

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from tempoquant.errors import ModelError, OutputError
from tempoquant.tiny import outliers

EXPERT_FOLDERS = ("transformer", "transformer_2")


def write_tiny_outliers(folder: Path, source: Path) -> Path:
    """Write the complete pipeline folder: both experts planted, everything else copied.

    Args:
        folder: appears all at once, or not at all; an existing one is left unchanged.
        source: a pipeline folder with transformer/, transformer_2/ and text_encoder/.

    Raises:
        ModelError: `source` lacks a part. OutputError: the folder cannot be written.
    """
    folder, source = Path(folder), Path(source)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, unfinished, ignore=lambda _, names: {n for n in names if n in EXPERT_FOLDERS})
        for expert in EXPERT_FOLDERS:
            _write_expert(unfinished / expert, source / expert, _rough_text_states(source))
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster, and wrote the same bytes
            if not folder.is_dir():
                raise
    except FileNotFoundError as error:
        raise ModelError(f"{source} is not a complete pipeline folder: {error.filename} is missing.") from error
    except OSError as error:
        raise OutputError(f"{folder} cannot be written ({error}): free space there, or name another folder.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write_expert(folder: Path, source: Path, text_states: Tensor) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    state_dict = {
        name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    planted = {
        n: t.contiguous() for n, t in outliers.plant_outliers(state_dict, config, text_states=text_states).items()
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in planted.items()},
        folder / "diffusion_pytorch_model.safetensors",
        {"format": "pt"},
    )


def _rough_text_states(source: Path) -> Tensor:
    """Return one row per token of the vocabulary, the end token first: its embedding under the
    encoder's last norm.

    Running the encoder would need transformers. These rows only choose a direction; equality does
    not rest on them.
    """
    encoder = source / "text_encoder"
    end_token = json.loads((encoder / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    weights = load_file(encoder / "model.safetensors")
    states = functional.rms_norm(weights["shared.weight"].double(), weights["shared.weight"].shape[1:])
    states = states * weights["encoder.final_layer_norm.weight"].double()
    return torch.cat([states[end_token : end_token + 1], states[:end_token], states[end_token + 1 :]])


def outliers_folder(source: Path | None = None) -> Path:
    """Return the folder of `tiny-outliers`, made on the first call in the user's cache
    ($XDG_CACHE_HOME or ~/.cache).

    Its name holds a hash of the source (None: the bundled model) and of the code that plants, so
    that it is never stale. Safe to call from many processes. Raises ModelError and OutputError as
    `write_tiny_outliers` does.
    """
    source = Path(__file__).parent / "weights" if source is None else source
    digest = hashlib.sha256(Path(__file__).read_bytes() + Path(outliers.__file__).read_bytes())
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        digest.update(file.relative_to(source).as_posix().encode() + b"\0" + file.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "tempoquant" / f"tiny-outliers-{digest.hexdigest()[:16]}"
    return folder if folder.is_dir() else write_tiny_outliers(folder, source)
