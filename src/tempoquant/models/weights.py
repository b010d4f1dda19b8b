"""One 16-bit denoiser's weights, read from its files tensor by tensor: cast, used, dropped, never
all at once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import nn

from tempoquant.models.source import SourceModel

if TYPE_CHECKING:
    from tempoquant.models.lora.lora import LoraSum


class DenoiserWeights:
    """The files of one denoiser, sharded or not, in any stored float dtype.

    Args:
        source: the pipeline.
        denoiser: its name.
        dtype: of the computation; modules that diffusers keeps in float32 stay there.
        device: the place of tensors.
        lora: LoRAs that are added to the weights, in float32, as they are read; by default the
            source's own.

    Raises:
        ModelError: the denoiser is quantized, or a LoRA is for another model.
    """

    def __init__(
        self, source: SourceModel, denoiser: str, dtype: torch.dtype, device: str, lora: "LoraSum | None" = None
    ) -> None:
        self.denoiser, self.dtype, self.device = denoiser, dtype, device
        self.family, self.blocks = source.family, source.blocks(denoiser)
        self._component = source.component_of(denoiser)
        self._component.require_16_bit()
        self._lora = lora = lora or source.loras.get(denoiser)
        self._forms = self._component.forms
        if lora is not None:
            lora.check_fits({name: form.shape for name, (_, form) in self._forms.items()})

    def __contains__(self, name: str) -> bool:
        return name in self._forms

    @property
    def notes(self) -> tuple[str, ...]:
        """Return a checkpoint's notes about the origin of the weights."""
        return (*self._component.notes, *(() if self._lora is None else self._lora.notes))

    def config(self) -> dict[str, Any]:
        """Return a copy of the denoiser's config.json, with the family's additions."""
        return {**self._component.config, **self.family.stored}

    def empty_model(self) -> Any:
        """Return the denoiser with the files' parameters on the meta device, as `SourceModel`
        checks them.
        """
        kind: Any = self._component.kind
        with init_empty_weights(include_buffers=False):
            model = kind.from_config(self.config())
        for module in model.modules():  # buffers outside the files, such as the rotary embedding's tables
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(self.device), persistent=name not in _not_saved(module))
        return model.eval().requires_grad_(False)

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Read every weight of a module of `empty_model()`.

        Args:
            module: the model itself with the prefix "", for everything outside the blocks; or one
                block.
            prefix: of the module's names in the denoiser, such as "blocks.3.".
        """
        for name in self._own_names(module, prefix):
            put_tensor(module, name, self.read(prefix + name).to(self.device, self.dtype_of(prefix + name)))

    def read_part(self, module: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
        """Return what `fill` would put into a module, on the host, by the module's own names."""
        names = self._own_names(module, prefix)
        return {name: self.read(prefix + name).to(self.dtype_of(prefix + name)) for name in names}

    def put_part(self, module: nn.Module, _prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put what `read_part` returned into its module, on the device."""
        for name, tensor in tensors.items():
            put_tensor(module, name, tensor.to(self.device))

    def release(self, module: nn.Module, prefix: str) -> None:
        """Release the weights that were put into a module."""
        release_tensors(module, self._own_names(module, prefix))

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the compute dtype of a weight: float32 for norms and modulation, as in a model
        that diffusers loads.
        """
        in_float32: list[str] = getattr(self._component.kind, "_keep_in_fp32_modules", None) or []
        kept = any(part in name.split(".") for part in in_float32)
        return torch.float32 if kept else self.dtype

    def read(self, name: str) -> torch.Tensor:
        """Read one weight into fresh memory, as `StoredTensor.read` returns it, with the LoRAs in
        it. Raises ModelError.
        """
        tensor = self._component.tensors[name].read()
        return tensor if self._lora is None else self._lora.fuse(name, tensor)

    def whole_model(self) -> Any:
        """Return the denoiser with all its weights, on its device."""
        model = self.empty_model()
        self.fill(model, "")
        for block in self.blocks:
            self.fill(model.get_submodule(block), f"{block}.")
        return model

    def stored(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of the wanted weights, by name, as `read` returns them."""
        for name in sorted(filter(wanted, self._forms)):
            yield name, self.read(name)

    def _own_names(self, module: nn.Module, prefix: str) -> list[str]:
        names = list(module.state_dict())
        return names if prefix else [name for name in names if self.family.block_of(name) is None]


def release_tensors(module: nn.Module, names: Iterable[str]) -> None:
    """Leave parameters and buffers of a module on the meta device."""
    state = module.state_dict()
    for name in names:
        put_tensor(module, name, torch.empty_like(state[name], device="meta"))


def put_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace one parameter or buffer. (accelerate's function empties the GPU's cache after
    each.)
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _not_saved(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set
