"""The loader of TempoQuant components in diffusers: `register()` adds a quantizer, and plain
`from_pretrained` works.

diffusers has no entry point for quantizers, so registering adds to its two dictionaries. Loading
follows the steps of `ModelMixin.from_pretrained`: it turns config.json into a TempoQuantConfig,
checks the files' headers against it (`maybe_update_loaded_keys`), replaces linears and compares the
model's tensors with the files' (`_process_model_before_weight_loading`), and takes each tensor
uncast from the file (`create_quantized_param`).
"""

import re
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from tempoquant.checkpoint import files
from tempoquant.checkpoint.checks import damaged
from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.checkpoint.reader import check_forms
from tempoquant.checkpoint.schema import QUANT_METHOD, ComponentConfig
from tempoquant.checkpoint.tensors import StoredAs, check_form, check_values, stored_as
from tempoquant.errors import UnsupportedError
from tempoquant.hosts.diffusers.saving import guard_saving, require_weights
from tempoquant.hosts.diffusers.whole_or_not import guard_adapters
from tempoquant.models.families import family_of_denoiser
from tempoquant.models.sampling_file import take_sampling_along
from tempoquant.runtime.convert import quantized_linears, replace_linears
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.runtime.share_inputs import share_inputs


class QuantMethod(str, Enum):
    """The name of our method, as an Enum: diffusers reads `quant_method.value`."""

    TEMPOQUANT = QUANT_METHOD


class TempoQuantConfig(QuantizationConfigMixin):
    """The `quantization_config` that diffusers passes around.

    Attributes:
        component: the checked content.
    """

    def __init__(self, component: ComponentConfig) -> None:
        self.quant_method = QuantMethod.TEMPOQUANT  # type: ignore[assignment]
        self.component = component

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Parse a config. Raises CheckpointError for any config that this version does not
        write.
        """
        config = cls(ComponentConfig.from_dict(dict(config_dict), "quantization_config in config.json"))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the content for save_pretrained: everything but the hashes of weight files, which
        it is about to rewrite.
        """
        return self.component.to_dict(with_hashes=False)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class TempoQuantQuantizer(DiffusersQuantizer):
    """Loads a quantized component into QuantizedLinears."""

    use_keep_in_fp32_modules = True  # norms and modulation as in an unquantized model of diffusers
    is_serializable = True
    is_trainable = True  # a LoRA on top, not the 4-bit layers themselves: `runtime.straight_through`
    is_compileable = True

    def __init__(self, quantization_config: TempoQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise UnsupportedError(
                "TempoQuant does not quantize while loading: run tempoquant.quantize first, then load the folder it "
                "writes, without quantization_config."
            )
        self.component = quantization_config.component
        self.compute_dtype = torch.float32
        self.loaded_keys: set[str] = set()
        self.folder: Path | None = None
        guard_adapters()
        guard_saving()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise UnsupportedError for weights left on the disk, since diffusers casts them."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UnsupportedError(
                "a 4-bit component does not load with parts of its device_map on the disk: load it to the CPU, then "
                "enable_group_offload(offload_to_disk_path=…)."
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self.compute_dtype = torch_dtype or torch.float32  # diffusers' own default
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Compare the files' headers with the config, before a byte of a quantized tensor is
        used.
        """
        paths = [files.require_safe(Path(file)) for file in checkpoint_files]
        files.require_inside(paths[0].parent / files.CONFIG_NAME, paths[0].parent)
        forms = {name: form for name, (_, form) in files.read_forms(paths).items()}
        if set(forms) != set(loaded_keys):
            odd = sorted(set(forms) ^ set(loaded_keys))[0]
            raise damaged(f"{paths[0].parent}: tensor {odd} is either missing or not in the index")
        check_forms(forms, self.component)
        self.loaded_keys, self.folder = set(loaded_keys), paths[0].parent
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Replace the linears. Raises CheckpointError for a missing or unknown tensor, where
        diffusers only warns.
        """
        call = self.call_of(model)
        replace_linears(model, self.component.layers, self.component.bins, self.compute_dtype, call)
        wanted = set(model.state_dict())
        if missing := sorted(wanted - self.loaded_keys):
            raise damaged(f"the weights lack {missing[0]}")
        ignored = model._keys_to_ignore_on_load_unexpected or []
        unknown = sorted(self.loaded_keys - wanted)
        unknown = [key for key in unknown if not any(re.search(pattern, key) for pattern in ignored)]
        if unknown:
            raise damaged(f"the weights hold {unknown[0]}, which the model that config.json describes does not have")
        if self.folder is not None:
            take_sampling_along(model, self.folder)

    def call_of(self, model: nn.Module) -> ModelCall:
        """Return how the model is called: by the checkpoint, or for an old checkpoint by its
        family.
        """
        if self.component.call is not None:
            return self.component.call
        family = family_of_denoiser(type(model).__name__)
        return ModelCall() if family is None else family.call

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Return True: we place every tensor, since also the 16-bit ones need fresh memory, see
        `create_quantized_param`.
        """
        return True

    def check_quantized_param_shape(self, param_name: str, current: torch.Tensor, loaded: torch.Tensor) -> bool:
        """Raise for a shape that differs; diffusers calls this only then."""
        found, wanted = list(loaded.shape), list(current.shape)
        raise damaged(f"{param_name} is {found} in the file, but {wanted} in the model that config.json describes")

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Place one tensor: of a quantized layer as stored, whatever dtype the user asked for; else
        as diffusers cast it.
        """
        layer_name, _, key = param_name.rpartition(".")
        entry = self.component.layers.get(layer_name)
        # Tensors may be mapped from the file. Copies make results independent of their alignment in
        # it.
        value = (param_value if entry is None else state_dict[param_name]).clone()
        if entry is not None:
            wanted = stored_as(entry, self.component.bins.num_bins)[key]
            check_form(StoredAs(value.dtype, tuple(value.shape)), wanted, param_name)
            check_values(key, value, entry, param_name)
        set_module_tensor_to_device(model, param_name, target_device, value=value, dtype=value.dtype)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Let linears that read one input quantize it once; look up facts that a compiled graph
        cannot compute.
        """
        share_inputs(model, self.call_of(model).sharing_an_input(self.component.layers))
        for linear in quantized_linears(model).values():
            linear.settle()
        return model

    def _dequantize(self, model: Any) -> Any:
        """Replace every QuantizedLinear by an nn.Linear of its effective weight, in the dtype of
        loading.

        The config loses its quantization, so that the model is saved as what it is now. Raises
        UnsupportedError if weights are offloaded; the model is then unchanged.
        """
        require_weights(model, "dequantized")
        for name, linear in quantized_linears(model).items():
            model.set_submodule(name, _dense(linear))
        left = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = FrozenDict(left)  # register_to_config can only add
        return model


def _dense(linear: QuantizedLinear) -> nn.Linear:
    dense = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    dense.weight = nn.Parameter(linear.dequantize().to(linear.compute_dtype), requires_grad=False)
    if (bias := linear.to_layer().effective_bias()) is not None:
        dense.bias = nn.Parameter(bias.to(linear.compute_dtype), requires_grad=False)
    return dense


def register() -> None:
    """Register the quantizer with diffusers. A second call changes nothing."""
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = TempoQuantQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = TempoQuantConfig
