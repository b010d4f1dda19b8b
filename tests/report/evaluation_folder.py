"""A small evaluation as `tempoquant evaluate` would leave it; its videos carry their frame number
in their pixels.

The top rows of every frame hold the frame number as NUM_BITS squares, white for 1, so that a test
can read from what a browser shows which frame it shows.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tempoquant.evaluate.files import write_mp4

HEIGHT, WIDTH, SQUARE, NUM_BITS = 72, 96, 16, 5
NUM_FRAMES, FPS = 17, 8
REFERENCE, PLAIN, TUNED = "16-bit", "rtn", "default"
COLOURS = ((220, 70, 50), (60, 120, 220), (70, 170, 90))
PROMPTS = {
    "ball-left": "A red ball rolls to the left",
    "ball-right": "A blue ball rolls to the right",
    "ball-up": "A green ball rises",
    "ball-grows": "A red ball comes closer and grows",
    "ball-still": "A blue ball stays where it is",
    "ball-falls": "A green ball falls",
}
FAILED = ("ball-grows", PLAIN)
OVERLAP = "ball-still"
PSNR = {PLAIN: [18.0, 21.5, 16.2, None, 24.1, 19.9], TUNED: [27.4, 29.0, 22.3, 26.1, 31.7, 28.8]}
"""dB, in the order of PROMPTS; TUNED of "ball-right" is the reference's very video."""
IDENTICAL = "ball-right"


def write_evaluation(folder: Path, **changes: Any) -> Path:
    """Write OUT with all media; `changes` replace keys of evaluation.json. Returns OUT."""
    for part in ("items", *(f"videos/{label}" for label in (REFERENCE, PLAIN, TUNED))):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(PROMPTS):
        frames = ball(number, 0.0)
        Image.fromarray(frames[0]).save(folder / f"items/{name}.png")
        for label, noise in ((REFERENCE, 0.0), (PLAIN, 24.0), (TUNED, 6.0)):
            if (name, label) != FAILED:
                same = label == TUNED and name == IDENTICAL
                write_mp4(folder / f"videos/{label}/{name}-0.mp4", frames if same else ball(number, noise), FPS)
    document = {**evaluation_document(), **changes}
    (folder / "evaluation.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def ball(number: int, noise: float) -> np.ndarray:
    """Make one video, (NUM_FRAMES, HEIGHT, WIDTH, 3) uint8: a disc that moves, noise of this
    deviation, the frame number.
    """
    generator = np.random.default_rng(number)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    frames = np.empty((NUM_FRAMES, HEIGHT, WIDTH, 3), np.float64)
    for frame in range(NUM_FRAMES):
        shade = 190 + 5 * number + 40 * (y / HEIGHT)
        frames[frame] = shade[..., None]
        centre = 20 + (WIDTH - 40) * frame / NUM_FRAMES
        frames[frame][(x - centre) ** 2 + (y - 46) ** 2 < 14**2] = COLOURS[number % len(COLOURS)]
        frames[frame] += generator.normal(0, noise, frames[frame].shape) if noise else 0
        for bit in range(NUM_BITS):
            frames[frame][:SQUARE, bit * SQUARE : (bit + 1) * SQUARE] = 255 * (frame >> bit & 1)
    return frames.clip(0, 255).astype(np.uint8)


def evaluation_document(num_layers: int = 12) -> dict[str, Any]:
    """Make evaluation.json, schema 1."""
    return {
        "schema": 1,
        "benchmark": {"name": "tiny", "num_items": len(PROMPTS), "skipped": [{"id": "ball-no", "why": "no picture"}],
                      "overlap": [OVERLAP], "excluded_overlap": ["ball-old"]},
        "settings": {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES, "num_steps": 8, "flow_shift": 3.0,
                     "guidance_scale": 3.5, "fps": FPS, "seeds": [0]},
        "environment": {"tempoquant": "0.1.0", "commit": "0123abc", "python": "3.11.7", "torch": "2.13.0",
                        "platform": "Linux", "cpu": "two cores", "devices": [], "date": "2026-01-01"},
        "command": "tempoquant evaluate tiny --models rtn default -o out",
        "reference": REFERENCE,
        "models": [_model(REFERENCE, 16.0, 120_000_000, None, num_layers),
                   _model(PLAIN, 4.25, 31_000_000, 4.0, num_layers),
                   _model(TUNED, 4.63, 34_000_000, -3.0, num_layers)],
        "items": [_item(place, name) for place, name in enumerate(PROMPTS)],
        "summary": _summary(),
        "pairs": [{"first": PLAIN, "second": TUNED, "metric": "psnr_db", "difference": 7.7, "low": 6.1, "high": 8.8,
                   "n": 5, "within_noise": False, "words": "default is 7.70 dB above rtn (6.10 to 8.80, n = 5)"}],
        "notes": ["VMAF is not meaningful under 200 pixels"],
        "vbench": vbench_document({REFERENCE: (0.91, None), PLAIN: (0.88, 0.033), TUNED: (0.9, 0.011)}),
    }  # fmt: skip


def _model(label: str, bits: float, num_bytes: int, worse: float | None, num_layers: int) -> dict[str, Any]:
    is_reference = worse is None
    calibrated = {"num_prompts": 2, "prompts": [{"id": OVERLAP, "prompt": PROMPTS[OVERLAP]},
                                                {"id": "ball-old", "prompt": "A ball nobody saw"}]}  # fmt: skip
    return {
        "label": label,
        "folder": f"runs/{label}",
        "recipe": None if is_reference else {"name": label, "format": "nvfp4_m1", "rank": 0 if label == PLAIN else 2},
        "bits_per_weight": bits,
        "num_bytes": num_bytes,
        "activation_bits": None if is_reference else "4",
        "calibration": calibrated if label == TUNED else None,
        "kernels": {} if is_reference else {"nvfp4_m1": "reference"},
        "memory": {"peak_rss_gib": 1.25, "peak_gpu_gib": None},
        "seconds_per_step": 0.5 if is_reference else 0.8,
        "costs": {
            "seconds_per_step": {"median": 0.5 if is_reference else 0.8, "low": 0.47, "high": 0.91, "n": 6},
            "seconds_per_step_ratio": None if is_reference else {"median": 1.6, "low": 1.25, "high": 1.75, "n": 5},
            "peak_rss_gib": {"most": 1.25, "least": 1.125, "n": 6},
            "peak_gpu_gib": None,
        },
        "maps": None if is_reference else {"high_noise": _map(num_layers, [[900, 950], [950, 1000]], worse),
                                           "low_noise": _map(num_layers, [[0, 300], [300, 600], [600, 900]], worse)},
    }  # fmt: skip


def _map(num_layers: int, bins: list[list[int]], worse: float) -> dict[str, Any]:
    kinds = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2")
    layers = [f"blocks.{number // len(kinds)}.{kinds[number % len(kinds)]}" for number in range(num_layers)]
    error = [
        [-20 + worse + 6 * np.sin(1.7 * layer) - 2 * place for place in range(len(bins))] for layer in range(num_layers)
    ]
    ratio = [[round(1 - 0.05 * ((layer + place) % 5), 3) for place in range(len(bins))] for layer in range(num_layers)]
    error[2][0] = None
    return {"layers": layers, "bins": bins, "error_db": error, "clip_ratio": ratio}


def _item(place: int, name: str) -> dict[str, Any]:
    labels = [label for label in (REFERENCE, PLAIN, TUNED) if (name, label) != FAILED]
    metrics: dict[str, Mapping[str, Any]] = {
        REFERENCE: {"temporal_flickering": 0.98, "motion_followed": True, "appearance_kept": True}
    }
    for label in labels[1:]:
        psnr = PSNR[label][place]
        assert psnr is not None
        metrics[label] = {
            "psnr_db": psnr, "ssim": 0.6 + psnr / 100, "vmaf": None, "vmaf_neg": None,
            "temporal_flickering": 0.98 - psnr / 1e4, "final_latent_db": psnr - 8,
            "sqnr_db": {"high_noise bin 0": psnr - 2, "low_noise bin 1": psnr - 5},
            "motion_followed": psnr > 17, "appearance_kept": True,
        }  # fmt: skip
    return {
        "id": name,
        "seed": 0,
        "category": "rolling" if "rolls" in PROMPTS[name] else "other",
        "prompt": PROMPTS[name],
        "image": f"items/{name}.png",
        "videos": {label: f"videos/{label}/{name}-0.mp4" for label in labels},
        "metrics": metrics,
        "failed": {FAILED[1]: "NaN in the decoded video"} if name == FAILED[0] else {},
    }


def vbench_document(scores: Mapping[str, tuple[float, float | None]], **changes: Any) -> dict[str, Any]:
    """Make the key `vbench`: a score and a relative drop of each label, the reference first; None
    for no drop.
    """
    dimensions = ["subject_consistency", "motion_smoothness"]
    models, summary, first = {}, [], next(iter(scores.values()))[0]
    for label, (score, drop) in scores.items():
        raw = {"subject_consistency": score, "motion_smoothness": score + 0.07}
        lost = {"drop": drop, "low": 0.0, "high": 0.05, "n": 6}
        models[label] = {
            "raw": raw, "normalised": {name: value - 0.02 for name, value in raw.items()}, "raw_mean": score + 0.035,
            "normalised_mean": score + 0.015, "relative_drop": drop, "num_items": 6,
            "relative_drop_of": {} if drop is None else dict.fromkeys(dimensions, lost),
        }  # fmt: skip
        row = {"label": label, "mean": score + 0.035, "low": score, "high": score + 0.05, "n": 6,
               "words": "VBench says", "reference_mean": None, "difference": None, "within_noise": None}  # fmt: skip
        if drop is None:
            summary.append({**row, "metric": "vbench_raw_mean"})
            continue
        difference = {"reference_mean": first + 0.035, "difference": score - first, "low": -0.04, "high": 0.01,
                      "within_noise": True}  # fmt: skip
        summary.append({**row, "metric": "vbench_raw_mean", **difference})
        summary.append({**row, "metric": "vbench_relative_drop", "mean": drop, "low": 0.0, "high": 0.05})
    return {"version": "0.1.5", "torch": "2.13.0", "python": "3.11.7", "device": "cpu", "dimensions": dimensions,
            "weights": [{"file": "dino_model/dino_vitbase16_pretrain.pth", "sha256": "0" * 64}], "models": models,
            "summary": summary, "failed": [], **changes}  # fmt: skip


def _summary() -> list[dict[str, Any]]:
    def row(label: str, metric: str, mean: float, low: float, high: float, **more: Any) -> dict[str, Any]:
        absent = {"reference_mean": None, "difference": None, "within_noise": None, "words": "", "n": 6}
        return {"label": label, "metric": metric, "mean": mean, "low": low, "high": high, **absent, **more}

    return [
        row(PLAIN, "psnr_db", 19.9, 17.6, 22.4, n=5),
        row(TUNED, "psnr_db", 27.6, 25.4, 29.6),
        row(PLAIN, "ssim", 0.799, 0.776, 0.824, n=5),
        row(TUNED, "ssim", 0.876, 0.854, 0.896),
        row(PLAIN, "sqnr_db high_noise bin 0", 17.9, 15.6, 20.4, n=5),
        row(TUNED, "sqnr_db high_noise bin 0", 25.6, 23.4, 27.6),
        row(REFERENCE, "motion_followed", 1.0, 1.0, 1.0, words="1.00 (1.00 to 1.00, n = 6)"),
        row(PLAIN, "motion_followed", 0.8, -0.5, 0.0, reference_mean=1.0, difference=-0.2, within_noise=True,
            words="within noise", n=5),
        row(TUNED, "motion_followed", 1.0, 0.0, 0.0, reference_mean=1.0, difference=0.0, within_noise=True,
            words="within noise"),
        row(PLAIN, "temporal_flickering", 0.978, -0.0024, -0.0016, reference_mean=0.98, difference=-0.002,
            within_noise=False, words="lower than 16-bit", n=5),
        row(TUNED, "temporal_flickering", 0.9772, -0.003, -0.0025, reference_mean=0.98, difference=-0.0028,
            within_noise=False, words="lower than 16-bit"),
    ]  # fmt: skip
