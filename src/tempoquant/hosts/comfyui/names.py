"""Tensor names in ComfyUI and back, by the family's layout."""

from tempoquant.errors import ModelError
from tempoquant.models.comfyui_layout import ComfyLayout
from tempoquant.models.families import family_of_denoiser
from tempoquant.models.family import Config, ModelFamily


def family_in_comfyui(config: Config, where: str) -> tuple[ModelFamily, ComfyLayout]:
    """Return the family of a denoiser's config.json and its layout. Raises ModelError if ComfyUI
    cannot run it.
    """
    class_name = str(config.get("_class_name"))
    family = family_of_denoiser(class_name)
    if family is None or family.comfyui is None:
        raise ModelError(f"{where} is a {class_name}, which TempoQuant does not run in ComfyUI: use it with diffusers.")
    return family, family.comfyui


def comfy_module(module: str, family: ModelFamily) -> str:
    """Return ComfyUI's name of a module (or parameter) of a denoiser. Raises ModelError for an
    unknown name.
    """
    found = family.original_name(module)
    if found is None:
        raise ModelError(f"{module} has no place in ComfyUI's model: this denoiser does not run there.")
    return found


def comfy_tensor(name: str, family: ModelFamily) -> str:
    """Return ComfyUI's name of a tensor. Raises ModelError for an unknown name."""
    if family.is_parameter(name):
        return comfy_module(name, family)
    module, _, leaf = name.rpartition(".")
    return f"{comfy_module(module, family)}.{leaf}"


def own_tensor(key: str, family: ModelFamily) -> str | None:
    """Return diffusers' name of a tensor by ComfyUI's name; None for an unknown name."""
    whole = family.own_name(key)
    if whole is not None and family.is_parameter(whole):
        return whole
    module, _, leaf = key.rpartition(".")
    own = family.own_name(module)
    return None if own is None or family.is_parameter(own) else f"{own}.{leaf}"
