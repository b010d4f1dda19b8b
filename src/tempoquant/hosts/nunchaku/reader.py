"""Reading of an exported component: its layers in our form, checked, and the whole denoiser in our
own modules.

Plain diffusers loads exports with its own kernels, on CUDA. This reader serves machines without
them, and measurements.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError

from tempoquant.checkpoint import files, read_model_config
from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.checkpoint.tensors import StoredAs, check_form, check_presence, to_stored
from tempoquant.errors import CheckpointError
from tempoquant.hosts.empty_model import empty_model
from tempoquant.hosts.nunchaku.config import BINS, exported_config, from_target, target_forms
from tempoquant.hosts.nunchaku.linear import NunchakuLinear
from tempoquant.layer import QuantizedLayer
from tempoquant.runtime.convert import replace_linears


class ExportedComponent:
    """The files of one exported denoiser, their headers checked against the config and the model it
    describes.

    Raises CheckpointError for a tensor that is missing, unknown, or of another dtype or shape; its
    methods do so for content that no export writes.

    Attributes:
        config: the component's content, in our terms.
    """

    def __init__(self, folder: Path) -> None:
        model_config = read_model_config(folder)
        self.config = exported_config(model_config, str(folder / files.CONFIG_NAME))
        self._model_config = {key: value for key, value in model_config.items() if key != "quantization_config"}
        self._forms = files.component_forms(folder)
        model = empty_model(self._model_config, self.config.layers, str(folder))
        self._rest = check_names({name: form for name, (_, form) in self._forms.items()}, self.config.layers, model)

    def layer(self, name: str) -> QuantizedLayer:
        """Return one layer, with every tensor of it checked."""
        entry = self.config.layers[name]
        layer = from_target({key: self._read(f"{name}.{key}") for key in target_forms(entry)}, entry.format)
        to_stored(layer, name)  # for its checks
        return layer

    def layers(self) -> Iterator[tuple[str, QuantizedLayer]]:
        """Yield (name, layer) of every 4-bit layer, by name, one in memory at a time."""
        for name in sorted(self.config.layers):
            yield name, self.layer(name)

    def load(self, dtype: torch.dtype) -> Any:
        """Load the denoiser on the CPU: 4-bit layers as NunchakuLinears, everything else in
        `dtype`, as diffusers casts it.
        """
        model = empty_model(self._model_config, {}, "config.json")
        clock = replace_linears(model, self.config.layers, BINS, dtype)
        for name, layer in self.layers():
            model.set_submodule(name, NunchakuLinear.from_layer(layer, clock, dtype))
        for name in self._rest:
            set_module_tensor_to_device(model, name, "cpu", value=self._read(name), dtype=dtype)
        return model.eval().requires_grad_(False)

    def _read(self, name: str) -> torch.Tensor:
        file, _ = self._forms[name]
        with files.open_weights(file) as weights:
            try:
                return weights.get_tensor(name).clone()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read ({error}); fetch it again.") from error


def check_names(forms: Mapping[str, StoredAs], layers: Mapping[str, LayerEntry], model: Any) -> list[str]:
    """Check strictly, as diffusers does not: every tensor of the model is there, and no other.

    Args:
        forms: of all tensors of an exported component.
        layers: its exported entries.
        model: unchanged, as `empty_model` makes it.

    Returns:
        The names of the 16-bit rest.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another dtype or shape.
    """
    found: dict[str, dict[str, StoredAs]] = {name: {} for name in layers}
    rest: dict[str, StoredAs] = {}
    for tensor_name, form in forms.items():
        layer_name, _, key = tensor_name.rpartition(".")
        found.get(layer_name, rest)[key if layer_name in found else tensor_name] = form
    for name, entry in layers.items():
        wanted = target_forms(entry)
        check_presence(set(found[name]), set(wanted), name)
        for key, form in found[name].items():
            check_form(form, wanted[key], f"{name}.{key}")
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in layers
    }
    check_presence(set(rest), set(shapes), "the model")
    for name, form in rest.items():
        check_form(form, StoredAs(torch.bfloat16, shapes[name]), name)
    return sorted(rest)
