"""One 16-bit expert's weights, read from its files tensor by tensor: cast, used, dropped, never all at once."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from torch import nn

from tempoquant.checkpoint.files import open_weights, read_forms, weight_files
from tempoquant.checkpoint.tensors import StoredAs
from tempoquant.errors import CheckpointError, ModelError
from tempoquant.integrations.pipeline_folder import read_json
from tempoquant.timesteps import Expert

if TYPE_CHECKING:
    from tempoquant.integrations.lora import LoraSum

EXPERT_COMPONENTS = {Expert.HIGH_NOISE: "transformer", Expert.LOW_NOISE: "transformer_2"}
_BLOCKS = "blocks."


class ExpertWeights:
    """The files of one expert, sharded or not, in whatever float dtype they are stored.

    Args:
        folder: of the pipeline.
        dtype: to compute in; modules that diffusers keeps in float32 stay there.
        device: where tensors go.
        lora: LoRAs that are added to the weights, in float32, as they are read.

    Raises:
        ModelError: files are missing, damaged or pickled, or a LoRA is for another model.
    """

    def __init__(
        self, folder: Path, expert: Expert, dtype: torch.dtype, device: str, lora: "LoraSum | None" = None
    ) -> None:
        self.expert, self.dtype, self.device = expert, dtype, device
        self.component = folder / EXPERT_COMPONENTS[expert]
        self._lora = lora
        self._forms = expert_forms(folder, expert)
        if lora is not None:
            lora.check_fits({name: form.shape for name, (_, form) in self._forms.items()})

    def __contains__(self, name: str) -> bool:
        return name in self._forms

    def config(self) -> dict[str, Any]:
        """The expert's config.json."""
        return dict(read_json(self.component / "config.json"))

    def empty_model(self) -> WanTransformer3DModel:
        """The expert with parameters on the meta device. Raises ModelError when the files lack one, or differ."""
        try:
            with init_empty_weights(include_buffers=False):
                model = WanTransformer3DModel.from_config(self.config())
        except (TypeError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{self.component} does not describe a WanTransformer3DModel: {error}") from error
        for name, tensor in model.state_dict().items():
            if name not in self._forms:
                raise ModelError(f"{self.component} lacks weight {name}: fetch the model again.")
            if self._forms[name][1].shape != tuple(tensor.shape):
                raise ModelError(
                    f"{name} in {self.component} is {list(self._forms[name][1].shape)}, "
                    f"but {list(tensor.shape)} in the model that config.json describes: fetch the model again."
                )
        for module in model.modules():  # buffers that no file holds, such as the rotary embedding's tables
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(self.device), persistent=name not in _not_saved(module))
        return model.eval().requires_grad_(False)

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Read every weight of a module of `empty_model()`.

        Args:
            module: the model itself with the prefix "", for all that lies outside the blocks; or one block.
            prefix: of the module's names in the expert, such as "blocks.3.".
        """
        for name in _own_names(module, prefix):
            _put(module, name, self.read(prefix + name).to(self.device, self.dtype_of(prefix + name)))

    def release(self, module: nn.Module, prefix: str) -> None:
        """Let go of what `fill` read."""
        state = module.state_dict()
        for name in _own_names(module, prefix):
            _put(module, name, torch.empty_like(state[name], device="meta"))

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype a weight computes in: float32 for norms and modulation, as in a model that diffusers loads."""
        kept = any(part in name.split(".") for part in WanTransformer3DModel._keep_in_fp32_modules)
        return torch.float32 if kept else self.dtype

    def read(self, name: str) -> torch.Tensor:
        """One weight, in memory of its own, in its stored dtype, the LoRAs in it. Raises ModelError for NaN and Inf."""
        file, form = self._forms[name]
        try:
            # Opened anew each time: what a mapping has touched counts as memory in use until it is closed.
            with open_weights(file) as tensors:
                tensor = tensors.get_tensor(name).clone()
        except (CheckpointError, SafetensorError, OSError) as error:
            raise ModelError(f"{name} cannot be read from {file} ({error}): fetch the model again.") from error
        if form.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ModelError(f"{name} in {file} is {form.dtype}: start from weights in bfloat16, float16 or float32.")
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name} in {file} holds NaN or Inf: the model file is damaged.")
        return tensor if self._lora is None else self._lora.fuse(name, tensor)

    def stored(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the weights whose names are wanted, by name, as `read` gives them."""
        for name in sorted(filter(wanted, self._forms)):
            yield name, self.read(name)


def expert_forms(folder: Path, expert: Expert) -> Mapping[str, tuple[Path, StoredAs]]:
    """File, dtype and shape of every weight of an expert, from the headers. Raises ModelError."""
    component = folder / EXPERT_COMPONENTS[expert]
    try:
        return read_forms(weight_files(component))
    except CheckpointError as error:
        raise ModelError(f"{component} is not a readable 16-bit expert: {error}") from error


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace one parameter or buffer. (accelerate's way empties the GPU's cache after each.)"""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _own_names(module: nn.Module, prefix: str) -> list[str]:
    names = list(module.state_dict())
    return names if prefix else [name for name in names if not name.startswith(_BLOCKS)]


def _not_saved(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set
