"""A guard of `save_pretrained`: a model from a 4-bit folder is saved so that it loads again, or
nothing is written.

diffusers writes config.json before it looks at the weights, and a pipeline's text encoder before
its denoisers. So both are checked here first. A dequantized model is checked too, since the same
can go wrong.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tempoquant.checkpoint.files import WEIGHTS_STEM
from tempoquant.checkpoint.reader import check_forms
from tempoquant.checkpoint.schema import QUANT_METHOD
from tempoquant.checkpoint.tensors import StoredAs
from tempoquant.errors import CheckpointError, OutputError, UnsupportedError
from tempoquant.hosts.diffusers.whole_or_not import adapters_of, ask_first


@functools.cache
def guard_saving() -> None:
    """Check models and pipelines before they are saved. A second call changes nothing."""
    from diffusers import DiffusionPipeline
    from diffusers.models.modeling_utils import ModelMixin

    def ask_pipeline(given: Mapping[str, Any]) -> None:
        for name in given["self"].config:
            folder = Path(given["save_directory"]) / name
            _refuse_saving(vars(given["self"]).get(name), {**given, "save_directory": folder})

    ask_first(ModelMixin, "save_pretrained", lambda given: _refuse_saving(given["self"], given))
    ask_first(DiffusionPipeline, "save_pretrained", ask_pipeline)


def _refuse_saving(model: Any, given: Mapping[str, Any]) -> None:
    """Raise TempoQuantError for a model that would not load again; `given` are the arguments of
    `save_pretrained`.
    """
    model = getattr(model, "_orig_mod", model)  # as diffusers unwraps a compiled one
    if getattr(model, "quantization_method", None) != QUANT_METHOD:
        return
    if not given["safe_serialization"] or given.get("use_flashpack"):
        raise UnsupportedError(
            "a component of TempoQuant is saved as safetensors only: leave safe_serialization and use_flashpack as "
            "they are."
        )
    if names := adapters_of(model):
        raise UnsupportedError(
            f"a model with LoRA adapters in it ({', '.join(names)}) cannot be saved so that it loads again: save them "
            "with save_lora_adapter, take them out with unload_lora, and save the model then."
        )
    require_weights(model, "saved")
    if getattr(model, "hf_quantizer", None) is not None:
        _require_own_layers(model)
    _require_room(Path(given["save_directory"]))


def require_weights(model: nn.Module, what: str) -> None:
    """Raise UnsupportedError if some weights are not in memory, so that the model cannot be
    `what`.
    """
    from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook

    offloading = _get_top_level_group_offload_hook(model)
    on_disk = offloading is not None and offloading.config.offload_to_disk_path is not None
    if on_disk or any(tensor.is_meta for tensor in model.state_dict().values()):
        raise UnsupportedError(
            f"some weights of the model are offloaded, so it cannot be {what}: load it again without offloading."
        )


def _require_own_layers(model: Any) -> None:
    """Raise UnsupportedError unless the model has the 4-bit layers of its config, which loading
    demands.
    """
    forms = {name: StoredAs(tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    try:
        check_forms(forms, model.hf_quantizer.component)
    except CheckpointError as error:
        raise UnsupportedError(
            f"the model no longer has the 4-bit layers that it was loaded with, so it cannot be saved ({error})."
        ) from error


def _require_room(folder: Path) -> None:
    """Raise OutputError if the folder holds other weights: half of them would stay, or the model be
    read during writing.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: give a folder.")
    if there := sorted(folder.glob(f"{WEIGHTS_STEM}*")):
        raise OutputError(f"{folder} holds weights already ({there[0].name}): save to a new folder.")
