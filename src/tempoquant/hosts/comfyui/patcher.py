"""TempoQuantPatcher: ComfyUI's ModelPatcher, which adds LoRAs beside 4-bit layers and never merges
them.

Additions are among the patcher's weight wrappers: ComfyUI hands those to the layers when it loads a
model, moves them, counts their bytes, and removes them again.
"""

import uuid
from collections.abc import Mapping
from typing import Any

import comfy.model_patcher

from tempoquant.errors import UnsupportedError
from tempoquant.hosts.comfyui.adapters import Patch, addition_to_bias, addition_to_weight
from tempoquant.hosts.comfyui.linear import ComfyLinear


class TempoQuantPatcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's handle of a model with 4-bit layers."""

    def add_patches(
        self, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        """Accept a LoRA node's patches; returns the accepted keys, as ComfyUI's own method does.

        Raises UnsupportedError, with the reason, for patches that cannot be added beside a 4-bit
        layer; nothing is accepted then.
        """
        linears = self._linears()
        wrappers: dict[str, list[Any]] = {}
        rest: dict[Any, Any] = {}
        taken = []
        for given, value in patches.items():
            key, offset, function = (*((given,) if isinstance(given, str) else given), None, None)[:3]
            module, _, leaf = key.rpartition(".")
            if module not in linears or leaf not in ("weight", "bias"):
                rest[given] = value
                continue
            patch = Patch(value, strength_patch, strength_model, offset, function)
            wrappers.setdefault(key, []).append(_addition(module, linears[module], leaf, patch))
            taken.append(given)
        found: list[Any] = super().add_patches(rest, strength_patch, strength_model)
        for key, additions in wrappers.items():
            self.weight_wrapper_patches[key] = [*self.weight_wrapper_patches.get(key, []), *additions]
        self.patches_uuid = uuid.uuid4()
        return [*found, *taken]

    def add_weight_wrapper(self, name: str, function: Any) -> None:
        """Add a wrapper as ComfyUI's own method does. Raises UnsupportedError for a 4-bit layer."""
        self._refuse([name], "a wrapper of its weight needs one that is dense")
        super().add_weight_wrapper(name, function)

    def add_hook_patches(self, hook: Any, patches: Mapping[Any, Any], *args: Any, **kwargs: Any) -> Any:
        """Add patches as ComfyUI's own method does. Raises UnsupportedError for a 4-bit layer:
        hooks merge at every change of strength.
        """
        self._refuse(
            [key if isinstance(key, str) else key[0] for key in patches],
            "a LoRA with a schedule is merged at every change of its strength; use Load LoRA instead",
        )
        return super().add_hook_patches(hook, patches, *args, **kwargs)

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        **more: Any,
    ) -> None:
        """Load as ComfyUI's own method does. Raises UnsupportedError if it would merge patches, as
        for saving and extracting.
        """
        if force_patch_weights:
            raise UnsupportedError(
                "a 4-bit model cannot be saved, merged or compared by ComfyUI, which would merge LoRAs into its "
                "weights first: copy its file instead, and keep LoRAs loaded."
            )
        super().load(device_to, lowvram_model_memory, force_patch_weights, full_load, **more)

    @property
    def num_additions(self) -> int:
        """Return the number of LoRA branches and bias changes beside 4-bit layers."""
        return sum(len(additions) for additions in self.weight_wrapper_patches.values())

    def _linears(self) -> dict[str, ComfyLinear]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, ComfyLinear)}

    def _refuse(self, keys: list[str], why: str) -> None:
        linears = self._linears()
        for key in keys:
            if key.rpartition(".")[0] in linears:
                raise UnsupportedError(f"{key.rpartition('.')[0]} has four bits and cannot be changed: {why}.")


def _addition(name: str, linear: ComfyLinear, leaf: str, patch: Patch) -> Any:
    if leaf == "bias":
        return addition_to_bias(name, linear.out_features, patch, linear.compute_dtype)
    return addition_to_weight(name, (linear.out_features, linear.in_features), patch, linear.compute_dtype)
