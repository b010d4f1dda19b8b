"""The size of a pipeline's activation outliers, per kind of linear: channel absmax over the median
channel's.

    python -m benchmarks.outliers [FOLDER ...]

Without folders it compares the bundled model with its planted twin, and prints how far their
outputs are apart.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempoquant.tiny import evaluation_items, weights_folder
from tempoquant.tiny.outliers_pipeline import outliers_folder

KINDS = {
    "attn1.to_q, to_k, to_v": ("attn1.to_q",),
    "attn2.to_q": ("attn2.to_q",),
    "attn2.to_k, to_v": ("attn2.to_k",),
    "attn1.to_out": ("attn1.to_out.0",),
    "attn2.to_out": ("attn2.to_out.0",),
    "ffn.net.0": ("ffn.net.0.proj",),
    "ffn.net.2": ("ffn.net.2",),
}


@contextmanager
def channel_absmax(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the largest magnitude of every input channel of every block linear within this
    context: name to (in,).
    """
    seen: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        largest = x.detach().abs().flatten(0, -2).amax(0).float()
        seen[name] = torch.maximum(seen[name], largest) if name in seen else largest

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def ratios(seen: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return channel absmax over its median, per kind of linear (a key of KINDS), one number a
    block.
    """
    found = defaultdict(list)
    for kind, suffixes in KINDS.items():
        for name, largest in seen.items():
            if name.split(".", 2)[2] in suffixes:
                found[kind].append(float(largest.max() / largest.median()))
    return dict(found)


def run_pipeline(folder: Path, num_steps: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Generate the first held-out item: return the ratios of "transformer" and "transformer_2", and
    its "latents".
    """
    from diffusers import WanImageToVideoPipeline

    pipe = WanImageToVideoPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    item = evaluation_items(1)[0]
    with channel_absmax(pipe.transformer) as high, channel_absmax(pipe.transformer_2) as low, torch.no_grad():
        latents = pipe(
            image=item.image,
            prompt=item.prompt,
            height=64,
            width=64,
            num_frames=17,
            num_inference_steps=num_steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames
    return {"transformer": ratios(high), "transformer_2": ratios(low), "latents": latents.float()}


def main() -> None:
    """Print one row per kind of linear and folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="*", type=Path)
    parser.add_argument("--bfloat16", action="store_true", help="load the models in bfloat16")
    arguments = parser.parse_args()
    folders = arguments.folder or [weights_folder(), outliers_folder()]
    dtype = torch.bfloat16 if arguments.bfloat16 else torch.float32
    results = {folder: run_pipeline(folder, dtype=dtype) for folder in folders}
    print("channel absmax / median, smallest to largest block; denoisers: high noise, low noise")
    print("| inputs of | " + " | ".join(folder.name for folder in folders) + " |")
    print("|---" * (len(folders) + 1) + "|")
    for kind in KINDS:
        cells = []
        for result in results.values():
            ranges = [result[denoiser][kind] for denoiser in ("transformer", "transformer_2")]
            cells.append(", ".join(f"{min(numbers):.0f} to {max(numbers):.0f}" for numbers in ranges))
        print(f"| {kind} | " + " | ".join(cells) + " |")
    first, last = (results[folder]["latents"] for folder in (folders[0], folders[-1]))
    print(
        f"latents of first and last folder: ‖difference‖ / ‖first‖ = {float((first - last).norm() / first.norm()):.1e}"
    )


if __name__ == "__main__":
    main()
