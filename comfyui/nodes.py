"""The nodes: their names and inputs. The package does their work, in `tempoquant.hosts.comfyui`."""

from pathlib import Path
from typing import Any

_CATEGORY = "TempoQuant"
_ANY = "the only one"
_DTYPES = ("default", "bfloat16", "float16", "float32")
_FOLDERS = ("tempoquant", "diffusion_models")


def _models() -> dict[str, Path]:
    """Return every model in ComfyUI's folders `models/tempoquant` and `models/diffusion_models`, by
    name.
    """
    import folder_paths

    from tempoquant.hosts.comfyui.listing import list_models

    own = str(Path(folder_paths.models_dir) / _FOLDERS[0])
    folder_paths.add_model_folder_path(_FOLDERS[0], own)  # does nothing the second time
    return list_models(root for name in _FOLDERS for root in folder_paths.get_folder_paths(name))


def _place(name: str) -> Path:
    models = _models()
    if name not in models:
        raise FileNotFoundError(f"{name} is no longer in ComfyUI's models/tempoquant or models/diffusion_models.")
    return models[name]


def _model_input(tooltip: str) -> tuple[list[str], dict[str, Any]]:
    return list(_models()), {"tooltip": f"{tooltip}, in models/tempoquant or models/diffusion_models."}


def _dtype_input() -> tuple[tuple[str, ...], dict[str, Any]]:
    return _DTYPES, {
        "tooltip": "What everything but the 4-bit products computes in; default: bfloat16 on a GPU that has it."
    }


def _load(stored: Any, dtype: str) -> Any:
    import torch

    from tempoquant.hosts.comfyui.loader import load_model

    return load_model(stored, None if dtype == "default" else getattr(torch, dtype))


class LoadModel:
    """A node that loads one denoiser."""

    CATEGORY, FUNCTION = _CATEGORY, "load"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "Load one denoiser that TempoQuant quantized: an exported file, or one of a folder."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the node's inputs for ComfyUI."""
        return {
            "required": {
                "model": _model_input("A folder that `tempoquant quantize` wrote, or a file of `tempoquant export`"),
                "denoiser": (
                    (_ANY, "high_noise", "low_noise"),
                    {"tooltip": "Of a folder with two experts, which one."},
                ),
                "dtype": _dtype_input(),
            }
        }

    def load(self, model: str, denoiser: str, dtype: str) -> tuple[Any]:
        """Load a denoiser: return (MODEL,)."""
        from tempoquant.hosts.comfyui.stored import open_denoiser

        return (_load(open_denoiser(_place(model), None if denoiser == _ANY else denoiser), dtype),)


class LoadExperts:
    """A node that loads both experts of a model that has two."""

    CATEGORY, FUNCTION = _CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("MODEL", "MODEL"), ("high_noise", "low_noise")
    DESCRIPTION = "Load both experts of a model such as Wan2.2-A14B: the same folder twice, or a file of each."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the node's inputs for ComfyUI."""
        return {
            "required": {
                "high_noise": _model_input("The expert of the first steps: its file, or a folder with both"),
                "low_noise": _model_input("The expert of the last steps: its file, or a folder with both"),
                "dtype": _dtype_input(),
            }
        }

    def load(self, high_noise: str, low_noise: str, dtype: str) -> tuple[Any, Any]:
        """Load both experts: return (MODEL, MODEL)."""
        from tempoquant.hosts.comfyui.experts import open_experts

        first, second = open_experts(_place(high_noise), _place(low_noise))
        return _load(first, dtype), _load(second, dtype)


class SplitStep:
    """A node that computes the step at which the second expert takes over."""

    CATEGORY, FUNCTION = _CATEGORY, "split"
    RETURN_TYPES, RETURN_NAMES = ("INT", "INT"), ("split_step", "steps")
    DESCRIPTION = (
        "The step at which the low-noise expert takes over, from the model's boundary and the sampler's sigmas: "
        "end_at_step of the first KSampler (Advanced), and start_at_step of the second."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the node's inputs for ComfyUI."""
        import comfy.samplers

        tooltip = {"tooltip": "Either expert, after ModelSamplingSD3: the shift moves the step."}
        return {
            "required": {
                "model": ("MODEL", tooltip),
                "scheduler": (comfy.samplers.KSampler.SCHEDULERS, {"tooltip": "The samplers' own."}),
                "steps": ("INT", {"default": 20, "min": 2, "max": 10000, "tooltip": "Of both samplers together."}),
            }
        }

    def split(self, model: Any, scheduler: str, steps: int) -> tuple[int, int]:
        """Return (split_step, steps)."""
        from tempoquant.hosts.comfyui.sampling import split_step_of

        return split_step_of(model, scheduler, steps), steps


class ActivationBits:
    """A node that gives activations eight bits instead of four."""

    CATEGORY, FUNCTION = _CATEGORY, "widen"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "Give activations eight bits instead of four (W4A8) at some timesteps: nearer to 16 bits."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the node's inputs for ComfyUI."""
        range_of = {"min": 0.0, "max": 1000.0, "step": 1.0}
        return {
            "required": {
                "model": ("MODEL",),
                "bits": (("8", "4"),),
                "from_timestep": ("FLOAT", {"default": 0.0, **range_of, "tooltip": "0 is clean, 1000 is noise."}),
                "to_timestep": ("FLOAT", {"default": 1000.0, **range_of, "tooltip": "Four bits from here on."}),
            }
        }

    def widen(self, model: Any, bits: str, from_timestep: float, to_timestep: float) -> tuple[Any]:
        """Return a clone of the model with wider activations: (MODEL,)."""
        from tempoquant.hosts.comfyui.sampling import with_activation_bits

        return (with_activation_bits(model, int(bits), from_timestep, to_timestep),)


class Info:
    """A node that describes a model."""

    CATEGORY, FUNCTION, OUTPUT_NODE = _CATEGORY, "tell", True
    RETURN_TYPES = ("STRING",)
    DESCRIPTION = "What a model of TempoQuant is: its recipe, bits, size, LoRAs, and what runs it on this machine."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the node's inputs for ComfyUI."""
        return {"required": {"model": ("MODEL",)}}

    def tell(self, model: Any) -> dict[str, Any]:
        """Return (STRING,), and the same for the console."""
        from tempoquant.hosts.comfyui.about import about

        text = about(model)
        print(text)
        return {"ui": {"text": [text]}, "result": (text,)}


NODE_CLASS_MAPPINGS = {
    "TempoQuantLoader": LoadModel,
    "TempoQuantExpertsLoader": LoadExperts,
    "TempoQuantSplitStep": SplitStep,
    "TempoQuantActivationBits": ActivationBits,
    "TempoQuantInfo": Info,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TempoQuantLoader": "Load TempoQuant Diffusion Model",
    "TempoQuantExpertsLoader": "Load TempoQuant Experts",
    "TempoQuantSplitStep": "TempoQuant Split Step",
    "TempoQuantActivationBits": "TempoQuant Activation Bits",
    "TempoQuantInfo": "TempoQuant Info",
}
