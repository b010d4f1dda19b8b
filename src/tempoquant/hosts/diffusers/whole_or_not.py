"""Operations of diffusers and peft on layers apply to the whole of a 4-bit model, or not at all.

A LoRA that also changes 16-bit layers would be fused into those before a 4-bit layer refuses it,
and could not be removed again. A LoRA that peft cannot start on a 4-bit layer (DoRA, PiSSA) would
stay in the layers before it. Neither library offers a check before, so `ask_first` wraps four of
their methods. Models without 4-bit layers are unaffected.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from diffusers.utils import USE_PEFT_BACKEND
from torch import nn

from tempoquant.errors import UnsupportedError
from tempoquant.runtime.convert import quantized_linears
from tempoquant.runtime.linear import QuantizedLinear


def ask_first(owner: type, verb: str, ask: Callable[[Mapping[str, Any]], None]) -> None:
    """Make a method of another library's class call `ask` with its arguments by name, and then do
    its own work.
    """
    method = getattr(owner, verb)
    signature = inspect.signature(method)

    @functools.wraps(method)
    def asking(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        ask(given.arguments)
        return method(*args, **kwargs)

    setattr(owner, verb, asking)


@functools.cache
def guard_adapters() -> None:
    """Refuse fusing, and impossible adapters, before anything changes. A second call changes
    nothing.
    """
    if not USE_PEFT_BACKEND:
        return
    from diffusers.loaders.lora_base import LoraBaseMixin
    from diffusers.loaders.peft import PeftAdapterMixin
    from peft.tuners.tuners_utils import BaseTuner

    def ask_pipeline(given: Mapping[str, Any]) -> None:
        for component in given["components"] or ():
            _refuse_fusing(getattr(given["self"], component, None), given["adapter_names"])

    ask_first(LoraBaseMixin, "fuse_lora", ask_pipeline)
    ask_first(PeftAdapterMixin, "fuse_lora", lambda given: _refuse_fusing(given["self"], given["adapter_names"]))
    BaseTuner.inject_adapter = _inject_whole(BaseTuner.inject_adapter)
    PeftAdapterMixin.add_adapter = _forget_refused(PeftAdapterMixin.add_adapter)


def adapters_of(model: nn.Module) -> list[str]:
    """Return the names of the adapters that peft has put into a model, sorted."""
    return sorted({name for layer in _tuner_layers(model).values() for name in layer._get_available_adapters()})


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return every layer that peft has wrapped, by name."""
    if not USE_PEFT_BACKEND:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _refuse_fusing(model: Any, adapter_names: list[str] | None) -> None:
    if isinstance(model, nn.Module):
        for layer in _tuner_layers(model).values():
            _refuse_merging(layer, layer.active_adapters if adapter_names is None else adapter_names)


def _refuse_merging(layer: Any, adapter_names: Iterable[str]) -> None:
    """Raise UnsupportedError if an adapter would be merged into a 4-bit layer."""
    wanted = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
    found = sorted(wanted & layer._get_available_adapters())
    if found and isinstance(layer.get_base_layer(), QuantizedLinear):
        raise UnsupportedError(
            f"adapter {found[0]!r} changes 4-bit layers, which have no dense weight to fuse it into: keep LoRA "
            "adapters loaded instead of fusing them, or quantize again with the LoRA (--lora) in the weights."
        )


def _merge(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Run `merge` of a 16-bit layer beside 4-bit ones that hold the same adapter: all of them are
    asked first.
    """
    for sibling in layer.four_bit_siblings:
        _refuse_merging(sibling, layer.active_adapters if adapter_names is None else adapter_names)
    type(layer).merge(layer, safe_merge=safe_merge, adapter_names=adapter_names)


def _inject_whole(inject: Callable[..., None]) -> Callable[..., None]:
    """Wrap peft's injection of an adapter into a model, so that it is removed again if a 4-bit
    layer refuses it.
    """

    @functools.wraps(inject)
    def whole(tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        before = _tuner_layers(model)
        had = {name for name, layer in before.items() if adapter_name in layer._get_available_adapters()}
        changed = _what_may_change(model, tuner.peft_config[adapter_name])
        try:
            inject(tuner, model, adapter_name, *args, **kwargs)
        except UnsupportedError as error:
            for name, layer in _tuner_layers(model).items():
                if name not in before:
                    model.set_submodule(name, layer.get_base_layer())
                elif name not in had and adapter_name in layer._get_available_adapters():
                    layer.delete_adapter(adapter_name)
            for parameter, value in changed:
                parameter.data = value
            raise UnsupportedError(
                f"adapter {adapter_name!r} would begin from the dense weights of 4-bit layers, which have none (DoRA, "
                "or init_lora_weights by a decomposition): use a plain LoRA."
            ) from error
        layers = list(_tuner_layers(model).values())
        four_bit = tuple(layer for layer in layers if isinstance(layer.get_base_layer(), QuantizedLinear))
        for layer in layers if four_bit else ():
            if layer not in four_bit:
                layer.four_bit_siblings = four_bit  # in a tuple: not as submodules
                layer.merge = MethodType(_merge, layer)

    return whole


def _what_may_change(model: nn.Module, config: Any) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Copy a 4-bit model's 16-bit weights if an adapter's initialization may change them
    (PiSSA).
    """
    linears = quantized_linears(model).values()
    if not linears or not isinstance(getattr(config, "init_lora_weights", None), str):
        return []
    packed = {id(parameter) for linear in linears for parameter in linear.parameters()}
    return [(p, p.detach().clone()) for p in model.parameters() if id(p) not in packed]


def _forget_refused(add: Callable[..., None]) -> Callable[..., None]:
    """Wrap diffusers' `add_adapter`, so that a refused adapter is not listed."""

    @functools.wraps(add)
    def whole(model: Any, adapter_config: Any, adapter_name: str = "default") -> None:
        loaded, before = model._hf_peft_config_loaded, set(getattr(model, "peft_config", ()))
        try:
            add(model, adapter_config, adapter_name)
        except UnsupportedError:
            model._hf_peft_config_loaded = loaded
            if adapter_name not in before:
                getattr(model, "peft_config", {}).pop(adapter_name, None)
            raise

    return whole
