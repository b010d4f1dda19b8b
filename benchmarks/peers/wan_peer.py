"""The frame of a peer's script around its quantizer: read, check, predict, generate, report.

It imports torch, diffusers and safetensors, which every peer has, and nothing of TempoQuant.
"""

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.peers.rows import Row, row_named

DENOISERS = {"high_noise": "transformer", "low_noise": "transformer_2"}
LINEARS = tuple(f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")) + (
    "ffn.net.0.proj",
    "ffn.net.2",
)
"""The linears of every block that are quantized; everything else stays as it is."""

GROUP_SIZE = {"mxfp4": 32, "nvfp4": 16}
_BATCH_ELEMENTS = 2**18  # of latents; one call at 480 × 832 and 81 frames has eighteen times as many
MIN_UNQUANTIZED_SQNR = 60.0  # dB; the same model in another version of diffusers is far above


@dataclass
class Storage:
    """The size of a quantized denoiser, in bits, and the number of weights it replaces.

    Attributes:
        num_bits: of codes, scales, branch and smoothing.
        num_weights: of the quantized linears, biases not counted.
    """

    num_bits: float = 0
    num_weights: int = 0

    def add(self, linear_shape: tuple[int, int], row: Row, *, rank: int = 0, per_input: int = 0, once: int = 0) -> None:
        """Count one linear: 4-bit codes, an 8-bit scale a group, a 16-bit branch.

        Args:
            linear_shape: (out, in).
            rank: of the branch.
            per_input: bits for each input channel, a smoothing factor's.
            once: bits for the whole layer, such as a global scale.
        """
        num_out, num_in = linear_shape
        self.num_weights += num_out * num_in
        codes_and_scales = num_out * num_in * (4 + 8 / GROUP_SIZE[row.format])
        self.num_bits += codes_and_scales + 16 * rank * (num_out + num_in) + per_input * num_in + once


@dataclass
class Quantized:
    """A denoiser quantized by a peer.

    Attributes:
        model: called as the 16-bit one is.
        storage: the size of the peer's own format on disk.
        note: a note for readers of the row.
        batched: whether calls may be put together; not if the timestep, or all activations of a
            call, affect its quantization.
    """

    model: nn.Module
    storage: Storage
    note: str = ""
    batched: bool = True


@dataclass
class Job:
    """The content of a job of `benchmarks.peers.job`."""

    work: Path
    facts: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.facts = json.loads((self.work / "job.json").read_text(encoding="utf-8"))

    @property
    def model(self) -> Path:
        """Return the 16-bit pipeline's folder."""
        return Path(self.facts["model"])

    def calibration(self, denoiser: str) -> list[dict[str, Tensor]]:
        """Return keyword inputs of each calibration call, in order."""
        return [load_file(file) for file in sorted((self.work / "calibration" / denoiser).glob("*.safetensors"))]

    def held_out(self, denoiser: str) -> Iterator[tuple[str, dict[str, Tensor], Tensor]]:
        """Yield (file name, keyword inputs, the 16-bit answer) of each held-out call, one at a
        time.
        """
        for file in sorted((self.work / "held_out" / denoiser).glob("*.safetensors")):
            inputs = load_file(file)
            answer = inputs.pop("noise_prediction")
            yield file.name, inputs, answer


@dataclass
class Task:
    """One denoiser to quantize.

    Attributes:
        job: the job that it belongs to.
        row: how to quantize.
        denoiser: a key of DENOISERS.
        model: the denoiser in float32; may be changed in place.
        calls: keyword inputs of each calibration call, in order.
    """

    job: Job
    row: Row
    denoiser: str
    model: nn.Module
    calls: Sequence[dict[str, Tensor]]


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears to quantize, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith("blocks.") and name.split(".", 2)[-1] in LINEARS
    }


@torch.no_grad()
def replay(model: nn.Module, calls: Sequence[dict[str, Tensor]]) -> None:
    """Run every calibration call, in order, for observers."""
    for inputs in batches(calls):
        model(**inputs, return_dict=False)


def batches(calls: Sequence[dict[str, Tensor]], together: bool = True) -> Iterator[dict[str, Tensor]]:
    """Yield small calls put together along their first dimension; large ones come one by one.

    It saves most of the time, since emulated quantizers have a large fixed cost a call. It changes
    nothing if a call's scales are those of one token's group.
    """
    if not calls:
        return
    size = max(1, _BATCH_ELEMENTS // calls[0]["hidden_states"].numel()) if together else 1
    for start in range(0, len(calls), size):
        some = calls[start : start + size]
        yield {key: torch.cat([inputs[key] for inputs in some]) for key in some[0]}


def run_peer(quantize: Callable[[Task], Quantized], packages: Sequence[str]) -> None:
    """Run the command line of a peer's script: `python -m benchmarks.peers.run_NAME WORK ROW`.

    Args:
        quantize: the peer's own quantizer, with the peer's own settings for the row.
        packages: whose versions the row names, beside torch and diffusers.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("row")
    arguments = parser.parse_args()
    job, row = Job(arguments.work), row_named(arguments.row)
    out = job.work / "out" / row.name
    out.mkdir(parents=True, exist_ok=True)
    record = {"row": row.label, "format": row.format, "rank": row.rank}
    record["versions"] = {name: version(name) for name in ("torch", "diffusers", *packages)}
    try:
        record |= make_row(job, row, quantize, out)
    except Exception as error:  # a peer's error is the content of its row
        traceback.print_exc()
        record["error"] = one_line(error)
    # Last, and under its final name only when whole: a row.json marks a complete row.
    unfinished = out / "row.json.unfinished"
    unfinished.write_text(json.dumps(record, indent=1), encoding="utf-8")
    unfinished.rename(out / "row.json")


def one_line(error: Exception) -> str:
    """Write an error in one line: its type, the first line of its message, and the line of code
    that raised it.
    """
    message = (str(error).strip().splitlines() or [""])[0]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {message} ({Path(frame.filename).name}, line {frame.lineno}: {frame.line})"


def make_row(job: Job, row: Row, quantize: Callable[[Task], Quantized], out: Path) -> dict[str, Any]:
    """Quantize all denoisers, write their predictions and latents; return the row's bits, seconds
    and notes.
    """
    torch.manual_seed(job.facts["seed"])
    quantized, seconds = {}, 0.0
    for denoiser in DENOISERS:
        model, calls = load_denoiser(job, denoiser), job.calibration(denoiser)
        others = other_parameters(model)
        start = time.perf_counter()
        quantized[denoiser] = quantize(Task(job, row, denoiser, model, calls))
        seconds += time.perf_counter() - start
        require_unchanged(quantized[denoiser].model, others)
        quantized[denoiser].model.eval()
    predict(job, quantized, out)
    generate(job, {denoiser: result.model for denoiser, result in quantized.items()}, out)
    stores = [result.storage for result in quantized.values()]
    return {
        "bits_per_weight": sum(s.num_bits for s in stores) / sum(s.num_weights for s in stores),
        "seconds": seconds,
        "note": quantized["high_noise"].note,
    }


def load_denoiser(job: Job, denoiser: str) -> nn.Module:
    """Load one denoiser in float32. Raises RuntimeError unless it answers as the recorded one
    did.
    """
    model = WanTransformer3DModel.from_pretrained(job.model, subfolder=DENOISERS[denoiser], dtype=torch.float32)
    model.eval().requires_grad_(False)
    _, inputs, answer = next(job.held_out(denoiser))
    with torch.no_grad():
        error = model(**inputs, return_dict=False)[0] - answer
    sqnr = 10 * torch.log10(answer.square().sum() / error.square().sum().clamp(min=1e-30))
    if not sqnr > MIN_UNQUANTIZED_SQNR:
        raise RuntimeError(
            f"before quantizing, {denoiser} is {sqnr:.1f} dB from its recorded answer: not the same model"
        )
    missing = set(LINEARS) - {name.split(".", 2)[-1] for name in block_linears(model)}
    if missing:
        raise RuntimeError(f"{denoiser} has no linears {sorted(missing)}")
    return model


def other_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter that is not the weight of a linear to quantize."""
    quantized = {f"{name}.weight" for name in block_linears(model)}
    biases = {f"{name}.bias" for name in block_linears(model)}  # quantizers may put them elsewhere
    return {n: p.detach().clone() for n, p in model.named_parameters() if n not in quantized | biases}


def require_unchanged(model: nn.Module, others: dict[str, Tensor]) -> None:
    """Raise RuntimeError if a quantizer changed, or cast, anything else."""
    changed = [name for name, before in others.items() if not torch.equal(model.get_parameter(name), before)]
    if changed:
        raise RuntimeError(f"{len(changed)} parameters outside the block linears changed, such as {changed[0]}")


@torch.no_grad()
def predict(job: Job, quantized: dict[str, Quantized], out: Path) -> None:
    """Predict each held-out call, teacher-forced: the quantized denoiser on the 16-bit pipeline's
    inputs.
    """
    for denoiser, result in quantized.items():
        folder = out / "predictions" / denoiser
        folder.mkdir(parents=True, exist_ok=True)
        names, calls = [], []
        for name, inputs, _ in job.held_out(denoiser):
            names.append(name)
            calls.append(inputs)
        together = batches(calls, result.batched)
        predictions = (one for inputs in together for one in result.model(**inputs, return_dict=False)[0].split(1))
        for name, prediction in zip(names, predictions, strict=True):
            save_file({"noise_prediction": prediction.float().contiguous()}, folder / name)


@torch.no_grad()
def generate(job: Job, models: dict[str, nn.Module], out: Path) -> None:
    """Generate each held-out item by diffusers' pipeline, all denoisers quantized, up to the final
    latents.
    """
    settings = job.facts["settings"]
    denoisers = {DENOISERS[denoiser]: model for denoiser, model in models.items()}
    pipeline = WanImageToVideoPipeline.from_pretrained(
        job.model, text_encoder=None, tokenizer=None, dtype=torch.float32, **denoisers
    )
    if settings["flow_shift"] is not None:
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, flow_shift=settings["flow_shift"])
    pipeline.set_progress_bar_config(disable=True)
    folder = out / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted((job.work / "generations").glob("*.safetensors")):
        given = load_file(file)
        latents = pipeline(
            image=given["image"],
            prompt_embeds=given["prompt_embeds"],
            negative_prompt_embeds=given["negative_prompt_embeds"],
            latents=given["initial_latents"],
            height=settings["height"],
            width=settings["width"],
            num_frames=settings["num_frames"],
            num_inference_steps=settings["num_steps"],
            guidance_scale=settings["guidance_scale"],
            output_type="latent",
        ).frames
        save_file({"final_latent": latents.float().contiguous()}, folder / file.name)
