"""What we know about Wan2.2-I2V in diffusers: which component is which expert, where its linears are, how it loads."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from safetensors import SafetensorError
from torch import nn

from tempoquant.calibrate.capture import first_call
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.calibrate.sequential import BlockCall
from tempoquant.checkpoint.files import open_weights, read_forms, weight_files
from tempoquant.errors import CheckpointError, ModelError, RecipeError
from tempoquant.integrations.pipeline_folder import check_pipeline_folder, read_json
from tempoquant.recipe import KEEP_16BIT, Recipe
from tempoquant.timesteps import Expert

EXPERT_COMPONENTS = {Expert.HIGH_NOISE: "transformer", Expert.LOW_NOISE: "transformer_2"}

_LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


def default_device() -> str:
    """CUDA when there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(device: str) -> torch.dtype:
    """bfloat16 on a GPU; float32 on the CPU, where it is the faster one and costs no accuracy."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_pipeline(folder: Path, device: str | None = None, dtype: torch.dtype | None = None) -> WanImageToVideoPipeline:
    """Load a two-expert Wan image-to-video pipeline, 16-bit or quantized.

    Raises:
        ModelError: the folder is no such pipeline, lacks a weight, or would need unpickling.
        CheckpointError: a quantized component is damaged.
    """
    check_pipeline_folder(folder)
    device = device or default_device()
    try:
        pipeline = WanImageToVideoPipeline.from_pretrained(
            folder, dtype=dtype or compute_dtype(device), use_safetensors=True, local_files_only=True
        )
    except _LOADING_ERRORS as error:
        raise ModelError(f"{folder} does not load as a WanImageToVideoPipeline: {error}") from error
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            _require_complete(component, folder / name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def load_expert(folder: Path, expert: Expert, device: str, dtype: torch.dtype) -> WanTransformer3DModel:
    """One 16-bit expert, ready to be calibrated.

    Raises:
        ModelError: its files are damaged, pickled, or of another class.
    """
    component = EXPERT_COMPONENTS[expert]
    try:
        transformer = WanTransformer3DModel.from_pretrained(
            folder, subfolder=component, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except _LOADING_ERRORS as error:
        raise ModelError(f"{folder / component} does not load as a WanTransformer3DModel: {error}") from error
    _require_complete(transformer, folder / component)
    return transformer.to(device)


def _require_complete(model: nn.Module, folder: Path) -> None:
    """Raise ModelError when the files lack a weight: diffusers only warns, and transformers makes up random values."""
    stored: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with open_weights(file) as weights:
            stored.update(weights.keys())
    state = model.state_dict()
    shared = {tensor.data_ptr() for name, tensor in state.items() if name in stored}  # tied weights are stored once
    missing = [n for n, t in state.items() if n not in stored and (t.is_meta or t.data_ptr() not in shared)]
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} weight(s), such as {missing[0]}: fetch the model again.")


def component_config(folder: Path, expert: Expert) -> dict[str, Any]:
    """An expert's config.json as it is in the folder."""
    return dict(read_json(folder / EXPERT_COMPONENTS[expert] / "config.json"))


def check_recipe_fits(folder: Path, recipe: Recipe) -> None:
    """Read the experts' headers, and refuse before any work what would fail after hours of it.

    Raises:
        RecipeError: a group size that does not divide, a rank too large, a layer pattern that matches nothing, or a
            recipe that leaves every layer in 16 bits.
        ModelError: the experts' weights are missing or damaged, or already quantized.
    """
    unused = set(recipe.layers)
    num_quantized = 0
    for expert, component in EXPERT_COMPONENTS.items():
        if "quantization_config" in component_config(folder, expert):
            raise ModelError(f"{folder / component} is already quantized: start from the 16-bit model.")
        shapes = _linear_shapes(folder / component)
        num_blocks = 1 + max((int(name.split(".")[1]) for name in shapes), default=-1)
        for name, (out_features, in_features) in shapes.items():
            unused -= {rule for rule in recipe.layers if rule.matches(name, expert)}
            format = recipe.format_of(name, expert, int(name.split(".")[1]), num_blocks)
            if format is None:
                continue
            num_quantized += 1
            format.num_groups(in_features, f"{name} of {expert.value}")
            if recipe.rank > min(out_features, in_features):
                raise RecipeError(
                    f"rank {recipe.rank} exceeds the smaller side of {name}, {out_features} × {in_features}."
                )
    if unused:
        raise RecipeError(f"the layer pattern {next(iter(unused)).pattern!r} matches no layer of {folder.name}.")
    if not num_quantized:
        raise RecipeError(f"this recipe keeps every layer in {KEEP_16BIT}: there is nothing to quantize.")


def _linear_shapes(component: Path) -> dict[str, tuple[int, int]]:
    """Name to (out, in) of every linear of the blocks: their only weights of two dimensions."""
    try:
        forms = read_forms(weight_files(component))
    except CheckpointError as error:
        raise ModelError(f"{component} is not a readable 16-bit expert: {error}") from error
    return {
        name.removesuffix(".weight"): (form.shape[0], form.shape[1])
        for name, (_, form) in forms.items()
        if name.startswith("blocks.") and name.endswith(".weight") and len(form.shape) == 2
    }


def stored_tensors(folder: Path, expert: Expert, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an expert's files whose names are wanted, in the dtype they are stored in.

    Raises:
        ModelError: one holds NaN or Inf.
    """
    component = folder / EXPERT_COMPONENTS[expert]
    for file in weight_files(component):
        with open_weights(file) as tensors:
            for name in sorted(filter(wanted, tensors.keys())):
                tensor = tensors.get_tensor(name).clone()  # not a view of the mapped file: alignment matters
                if not bool(torch.isfinite(tensor).all()):
                    raise ModelError(f"{name} in {file} holds NaN or Inf: the model file is damaged.")
                yield name, tensor


def on_device(transformer: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs on the transformer's device, floats in the dtype it computes in."""
    weight = transformer.get_parameter("patch_embedding.weight")
    moved = {key: value.to(weight.device) for key, value in inputs.items()}
    return {k: v.to(weight.dtype) if v.is_floating_point() and k != "timestep" else v for k, v in moved.items()}


class WanExpert:
    """One expert as calibration sees it (`calibrate.sequential.ExpertModel`)."""

    def __init__(self, transformer: WanTransformer3DModel, expert: Expert) -> None:
        self.expert = expert
        self.num_blocks = len(transformer.blocks)
        self._transformer = transformer

    def first_block_call(self, sample: CalibrationSample) -> BlockCall:
        """Run the embeddings on a sample; what block 0 is called with."""
        inputs = on_device(self._transformer, sample.inputs)
        return first_call(self._transformer.blocks[0], lambda: self._transformer(**inputs, return_dict=False))

    def block(self, index: int) -> nn.Module:
        """Block `index`."""
        return self._transformer.blocks[index]

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of one block by name: q, k, v, o of both attentions and the two of the FFN."""
        return {
            f"blocks.{index}.{name}": module
            for name, module in self._transformer.blocks[index].named_modules()
            if isinstance(module, nn.Linear)
        }

    def next_block_call(self, call: BlockCall, output: torch.Tensor) -> BlockCall:
        """Wan blocks take the hidden states first and pass all else on unchanged."""
        args, kwargs = call
        return ((output, *args[1:]), kwargs)
