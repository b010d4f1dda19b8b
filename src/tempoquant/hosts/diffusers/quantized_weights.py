"""One 4-bit denoiser's weights, read from its files block by block: a part at a time, where
`loader` loads everything.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from tempoquant.checkpoint.files import open_weights
from tempoquant.checkpoint.tensors import check_values
from tempoquant.hosts.diffusers.loader import TempoQuantConfig, TempoQuantQuantizer
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import put_tensor, release_tensors
from tempoquant.runtime.convert import quantized_linears
from tempoquant.runtime.share_inputs import share_inputs


class QuantizedWeights:
    """The files of one denoiser that TempoQuant quantized.

    A block's tensors are checked when they are first put into it, as they are where all are loaded
    at once.

    Args:
        source: the pipeline.
        denoiser: its name.
        dtype: that what is not quantized computes in; modules that diffusers keeps in float32 stay
            there.
        device: where tensors go.

    Raises:
        CheckpointError: the files contradict the config.
    """

    def __init__(self, source: SourceModel, denoiser: str, dtype: torch.dtype, device: str) -> None:
        self._component = source.component_of(denoiser)
        self._source, self._family, self._dtype, self._device = source, source.family, dtype, device
        self._forms, self._entries = self._component.forms, self._component.quantization.layers
        self._quantizer = TempoQuantQuantizer(TempoQuantConfig(self._component.quantization), pre_quantized=True)
        self._quantizer.compute_dtype = dtype
        self._seen: set[str] = set()
        self._groups: list[tuple[str, ...]] = []
        self.blocks = source.blocks(denoiser)

    def empty_model(self) -> Any:
        """Return the denoiser with its 4-bit linears, parameters on the meta device. Raises
        CheckpointError.
        """
        kind: Any = self._component.kind
        config = {key: value for key, value in self._component.config.items() if key != "quantization_config"}
        with init_empty_weights(include_buffers=False):
            model = kind.from_config(config)
        model.register_to_config(quantization_config=self._quantizer.quantization_config)
        files = [str(file) for file in self._component.weight_files]
        self._quantizer.maybe_update_loaded_keys(list(self._forms), files)
        self._quantizer.preprocess_model(model)
        model.hf_quantizer = self._quantizer
        self._groups = self._quantizer.call_of(model).sharing_an_input(self._entries)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                persistent = name not in module._non_persistent_buffers_set
                module.register_buffer(name, buffer.to(self._device), persistent=persistent)
        return model.eval().requires_grad_(False)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is held in: as stored in 4-bit layers, else what it
        computes in.
        """
        stored = self._forms[name][1].dtype
        if name.rpartition(".")[0] in self._entries or not stored.is_floating_point:
            return stored
        in_float32: list[str] = getattr(self._component.kind, "_keep_in_fp32_modules", None) or []
        return torch.float32 if any(part in name.split(".") for part in in_float32) else self._dtype

    def read_part(self, module: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
        """Return a part's tensors on the host, in memory of their own; its files are open
        meanwhile.
        """
        names = [prefix + name for name in self._own_names(module, prefix)]
        found: dict[str, torch.Tensor] = {}
        for file in dict.fromkeys(self._forms[name][0] for name in names):
            with open_weights(file) as tensors:
                for name in (each for each in names if self._forms[each][0] == file):
                    # Copies make results independent of how the file happens to align them.
                    value = tensors.get_tensor(name).clone().to(self.dtype_of(name))
                    found[name.removeprefix(prefix)] = value
        return found

    def put_part(self, module: nn.Module, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put a part's tensors into its module, on the device. Raises CheckpointError for values no
        layer can have.
        """
        is_new = prefix not in self._seen
        for name, tensor in tensors.items():
            layer, _, key = (prefix + name).rpartition(".")
            if is_new and (entry := self._entries.get(layer)) is not None:
                check_values(key, tensor, entry, prefix + name)
            put_tensor(module, name, tensor.to(self._device))
        if is_new:
            self._settle(module, prefix)
            self._seen.add(prefix)

    def release(self, module: nn.Module, prefix: str) -> None:
        """Let go of what was put into a module."""
        release_tensors(module, self._own_names(module, prefix))

    def _settle(self, module: nn.Module, prefix: str) -> None:
        """Look up the facts about the numbers of a layer, once: see `TempoQuantQuantizer`."""
        own = [[name.removeprefix(prefix) for name in group] for group in self._groups if group[0].startswith(prefix)]
        share_inputs(module, own if prefix else [])
        for linear in quantized_linears(module).values():
            if not linear.packed.is_meta:
                linear.settle()

    def _own_names(self, module: nn.Module, prefix: str) -> list[str]:
        names = list(module.state_dict())
        return names if prefix else [name for name in names if self._family.block_of(name) is None]
