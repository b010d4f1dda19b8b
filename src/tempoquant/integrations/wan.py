"""What we know about Wan2.2-I2V in diffusers: which component is which expert, where its linears are, how it loads."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline
from safetensors import SafetensorError
from torch import nn

from tempoquant.calibrate.capture import computing_with, first_call
from tempoquant.calibrate.expert_model import BlockCall
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.checkpoint.files import open_weights
from tempoquant.errors import ModelError, RecipeError
from tempoquant.integrations.expert_weights import EXPERT_COMPONENTS, ExpertWeights, expert_forms
from tempoquant.integrations.nunchaku_lite import is_exported
from tempoquant.integrations.nunchaku_reader import ExportedComponent
from tempoquant.integrations.pipeline_folder import check_pipeline_folder, read_json
from tempoquant.integrations.wan_blocks import SHARED_INPUTS
from tempoquant.recipe import KEEP_16BIT, Recipe
from tempoquant.timesteps import Expert

LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


def default_device() -> str:
    """CUDA when there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(device: str) -> torch.dtype:
    """bfloat16 on a GPU; float32 on the CPU, where it is the faster one and costs no accuracy."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_pipeline(folder: Path, device: str | None = None, dtype: torch.dtype | None = None) -> WanImageToVideoPipeline:
    """Load a two-expert Wan pipeline, 16-bit, quantized, or exported; the autoencoder in float32, as published.

    An export computes what its target's kernels compute, in plain PyTorch (`nunchaku_linear.py`), on every device.

    Raises:
        ModelError: the folder is no such pipeline, lacks a weight, or would need unpickling.
        CheckpointError: a quantized component is damaged.
    """
    check_pipeline_folder(folder)
    device = device or default_device()
    dtype = dtype or compute_dtype(device)
    exported = {
        name: ExportedComponent(folder / name).load(dtype)
        for name in EXPERT_COMPONENTS.values()
        if is_exported(read_json(folder / name / "config.json"))
    }
    try:
        pipeline = WanImageToVideoPipeline.from_pretrained(
            folder,
            dtype={"default": dtype, "vae": torch.float32},
            use_safetensors=True,
            local_files_only=True,
            **exported,
        )
    except LOADING_ERRORS as error:
        raise ModelError(f"{folder} does not load as a WanImageToVideoPipeline: {error}") from error
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name not in exported:
            require_complete(component, folder / name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def require_complete(model: nn.Module, folder: Path) -> None:
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
        if "quantization_config" in read_json(folder / component / "config.json"):
            raise ModelError(f"{folder / component} is already quantized: start from the 16-bit model.")
        shapes = linear_shapes(folder, expert)
        num_blocks = 1 + max((int(name.split(".")[1]) for name in shapes), default=-1)
        for name, (out_features, in_features) in shapes.items():
            unused -= {rule for rule in recipe.layers if rule.matches(name, expert)}
            format = recipe.format_of(name, expert, int(name.split(".")[1]), num_blocks)
            if format is None:
                continue
            num_quantized += 1
            format.num_groups(in_features, f"{name} of {expert.value}")
            rank = recipe.rank_of(name, expert)
            if rank > min(out_features, in_features):
                raise RecipeError(f"rank {rank} exceeds the smaller side of {name}, {out_features} × {in_features}.")
    if unused:
        raise RecipeError(f"the layer pattern {next(iter(unused)).pattern!r} matches no layer of {folder.name}.")
    if not num_quantized:
        raise RecipeError(f"this recipe keeps every layer in {KEEP_16BIT}: there is nothing to quantize.")


def linear_shapes(folder: Path, expert: Expert) -> dict[str, tuple[int, int]]:
    """Name to (out, in) of every linear of the blocks: their only weights of two dimensions."""
    return {
        name.removesuffix(".weight"): (form.shape[0], form.shape[1])
        for name, (_, form) in expert_forms(folder, expert).items()
        if name.startswith("blocks.") and name.endswith(".weight") and len(form.shape) == 2
    }


def on_device(
    transformer: nn.Module, inputs: dict[str, torch.Tensor], device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """Inputs where the transformer computes, floats in the dtype it computes in.

    Args:
        device: None for where its weights are. In a memory mode that may be host memory, while it computes elsewhere.
    """
    weight = transformer.get_parameter("patch_embedding.weight")
    moved = {key: value.to(device or weight.device) for key, value in inputs.items()}
    return {k: v.to(weight.dtype) if v.is_floating_point() and k != "timestep" else v for k, v in moved.items()}


class WanExpert:
    """One expert as calibration sees it (`calibrate.expert_model.ExpertModel`): at most one block is in memory."""

    def __init__(self, weights: ExpertWeights) -> None:
        self.expert = weights.expert
        self._weights = weights
        self._model = weights.empty_model()
        self.num_blocks = len(self._model.blocks)

    def first_block_calls(self, samples: Sequence[CalibrationSample]) -> Iterator[tuple[CalibrationSample, BlockCall]]:
        """Run the embeddings on each sample; what block 0 is called with. Equal arguments share their memory."""
        known: dict[Any, torch.Tensor] = {}
        self._weights.fill(self._model, "")
        try:
            for sample in samples:
                inputs = on_device(self._model, sample.inputs)
                args, kwargs = first_call(self._model.blocks[0], functools.partial(self._model, **inputs))
                yield sample, ((args[0], *_sharing(args[1:], known)), kwargs)
        finally:
            self._weights.release(self._model, "")

    def after_last_block(
        self, samples: Sequence[CalibrationSample]
    ) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """The model itself does it, its blocks replaced by one that answers what it is given."""
        self._weights.fill(self._model, "")
        try:
            for sample in samples:
                yield functools.partial(self._finish, on_device(self._model, sample.inputs))
        finally:
            self._weights.release(self._model, "")

    def _finish(self, inputs: dict[str, torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
        with computing_with(dict.fromkeys(self._model.blocks, lambda *_: hidden_states)):
            return self._model(**inputs, return_dict=False)[0]

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index`, read from the files and dropped at the end."""
        block, prefix = self._model.blocks[index], f"blocks.{index}."
        self._weights.fill(block, prefix)
        try:
            yield block
        finally:
            self._weights.release(block, prefix)

    def shared_inputs(self, index: int) -> list[tuple[str, ...]]:
        """q, k and v of self-attention read one input, k and v of cross-attention the text; the others their own."""
        linears = [name for name, module in self._model.blocks[index].named_modules() if isinstance(module, nn.Linear)]
        together = [group for group in SHARED_INPUTS if set(group) <= set(linears)]
        first = {name: group for group in together for name in group}
        return list(dict.fromkeys(first.get(name, (name,)) for name in linears))

    def name_of(self, index: int, linear: str) -> str:
        """Such as blocks.3.attn1.to_q."""
        return f"blocks.{index}.{linear}"

    def hidden_states(self, call: BlockCall) -> torch.Tensor:
        """Wan blocks take them first."""
        return call[0][0]

    def with_hidden_states(self, call: BlockCall, hidden_states: torch.Tensor) -> BlockCall:
        """Wan blocks pass all else on unchanged."""
        args, kwargs = call
        return ((hidden_states, *args[1:]), kwargs)


def _sharing(value: Any, known: dict[Any, torch.Tensor]) -> Any:
    """Tensors, nested in tuples, with equal ones replaced by the first: text and positions repeat from call to call."""
    if isinstance(value, tuple):
        return tuple(_sharing(item, known) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    content = hashlib.sha256(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).digest()
    return known.setdefault((tuple(value.shape), value.dtype, content), value)
