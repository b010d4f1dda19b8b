"""Runs exported files in ComfyUI itself, on a CPU; `test_nvfp4_core.py` starts it with ComfyUI's
folder in the path.

    python run_core.py MODEL BRANCH USER INPUTS OUTPUTS

Loads MODEL as the node UNETLoader does and the LoRA BRANCH as LoraLoaderBypassModelOnly does, calls
the denoiser once on the tensors of INPUTS, and writes to OUTPUTS what came out; also with the LoRA
USER, by bypass and in the weights.
"""

import sys
from pathlib import Path

MODEL, BRANCH, USER, INPUTS, OUTPUTS = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


@torch.no_grad()
def predict(model) -> torch.Tensor:
    """Return the denoiser's answer, with what was injected into it."""
    comfy.model_management.load_models_gpu([model])
    given = load_file(INPUTS)
    model.inject_model()
    try:
        return model.model.diffusion_model(given["hidden_states"], given["timestep"], given["encoder_hidden_states"])
    finally:
        model.eject_model()


def bypassing(model, file: str):
    """Return the model with a LoRA beside its linears."""
    return comfy.sd.load_bypass_lora_for_models(model, None, comfy.utils.load_torch_file(file, safe_load=True), 1.0, 0)[
        0
    ]


def ordinary(model, file: str):
    """Return the model with a LoRA in its weights."""
    lora = comfy.utils.load_torch_file(file, safe_load=True)
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]


loaded = comfy.sd.load_diffusion_model(MODEL)
print(loaded.model.get_dtype(), loaded.model.manual_cast_dtype, Path(comfy.__path__[0]).parent)
made = {
    "branch": bypassing(loaded, BRANCH),
    "nothing": loaded,
    "user": bypassing(loaded, USER),
    "branch, then user": bypassing(bypassing(loaded, BRANCH), USER),
    "branch and ordinary user": ordinary(bypassing(loaded, BRANCH), USER),
}
save_file({name: predict(model).float().contiguous() for name, model in made.items()}, OUTPUTS)
