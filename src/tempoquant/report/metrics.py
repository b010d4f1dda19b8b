"""The facts about each number of an evaluation: its name, unit, direction, and what it can and
cannot show.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

AGAINST = "against 16-bit"
ALONE = "of the video alone"
WORLD = "of the prompt"
VBENCH = "by VBench"
"""The families of metrics. AGAINST compares each frame with the reference's of the same seed; ALONE
and VBENCH use no reference.
"""

NOT_MEASURED = "–"

TRAP = (
    "A collapsed video (frozen, blank, or smeared) changes little from frame to frame, so measures of consistency and "
    "flickering score it high. Read them beside the measures against 16-bit, which fall when a video collapses: a "
    "model is better only where both agree."
)


@dataclass(frozen=True)
class Metric:
    """One number per video.

    Attributes:
        key: in evaluation.json.
        title, unit: for people; the unit is empty if there is none.
        digits: after the point.
        better: 1 if more is better, -1 if less is, 0 if only the distance from the reference
            counts.
        family: AGAINST, ALONE, WORLD or VBENCH.
        explanation: one or two sentences.
    """

    key: str
    title: str
    unit: str
    digits: int
    better: int
    family: str
    explanation: str

    def text(self, value: float | None) -> str:
        """Write a value such as "31.2 dB"; NOT_MEASURED for None."""
        if value is None:
            return NOT_MEASURED
        if self.unit == "%":
            return f"{signed_minus(100 * value, self.digits)} %"
        return signed_minus(value, self.digits) + (f" {self.unit}" if self.unit else "")

    def loss(self, value: float | bool | None, reference: float | bool | None) -> float | None:
        """Return the loss, in the metric's unit; more is worse. None if it is undefined.

        Against 16-bit, the value itself is the loss (with its sign turned if more is better).
        Metrics of the video alone and of the prompt lose the distance from the score of the 16-bit
        video of the same item and seed.
        """
        if value is None:
            return None
        if self.family == AGAINST:
            return -self.better * float(value)
        if reference is None:
            return None
        difference = float(value) - float(reference)
        return -self.better * difference if self.better else abs(difference)


_KNOWN = [
    Metric(
        "psnr_db", "PSNR", "dB", 1, 1, AGAINST, "Peak signal over mean squared error, frame by frame against 16-bit."
    ),
    Metric("ssim", "SSIM", "", 3, 1, AGAINST, "Structural similarity of frames with 16-bit's; 1 is identical."),
    Metric(
        "vmaf",
        "VMAF",
        "",
        1,
        1,
        AGAINST,
        "Netflix's estimate of how far viewers see a loss, 0 to 100. Trained on large pictures.",
    ),
    Metric("vmaf_neg", "VMAF NEG", "", 1, 1, AGAINST, "VMAF that gives no credit for sharpening."),
    Metric(
        "final_latent_db",
        "SQNR of the final latent",
        "dB",
        1,
        1,
        AGAINST,
        "Signal over error of the last latent, before the video decoder.",
    ),
    Metric(
        "sqnr_db",
        "SQNR of the latent",
        "dB",
        1,
        1,
        AGAINST,
        "Signal over error of the latent at the end of each timestep bin.",
    ),
    Metric(
        "embedding_db",
        "SQNR of the text's embeddings",
        "dB",
        1,
        1,
        AGAINST,
        "Signal over error of the text encoder's output; of several encoders, the one that lost most.",
    ),
    Metric(
        "temporal_flickering",
        "Temporal flickering",
        "",
        4,
        1,
        ALONE,
        "VBench's: how little neighbouring frames differ. A still picture scores 1.",
    ),
    Metric(
        "motion_followed",
        "Motion followed",
        "%",
        0,
        1,
        WORLD,
        "Share of videos in which the object moves as the prompt says, judged by the bundled world's own rules.",
    ),
    Metric(
        "appearance_kept",
        "Appearance kept",
        "%",
        0,
        1,
        WORLD,
        "Share of videos in which the object keeps its colour and shape, judged by the bundled world's own rules.",
    ),
    Metric(
        "vbench_raw_mean",
        "VBench raw mean",
        "",
        4,
        1,
        VBENCH,
        "Mean over the dimensions below as they are: the VBench average of papers that take the same ones.",
    ),
    Metric(
        "vbench_relative_drop",
        "VBench relative drop",
        "%",
        2,
        -1,
        VBENCH,
        "Share of 16-bit's score that was lost, mean over the dimensions.",
    ),
    Metric(
        "vbench_normalised_mean",
        "VBench normalised mean",
        "",
        4,
        1,
        VBENCH,
        "Mean with the bounds and weights of VBench's leaderboard; dynamic degree counts half.",
    ),
    *(
        Metric(f"vbench_{name}", f"VBench {name.replace('_', ' ')}", "", 4, 1, VBENCH, explanation)
        for name, explanation in (
            ("subject_consistency", "Similarity of frames by DINO. A still picture scores 1."),
            ("background_consistency", "Similarity of frames by CLIP. A still picture scores 1."),
            ("motion_smoothness", "How well every second frame follows from its neighbours. A still picture scores 1."),
            ("dynamic_degree", "Share of videos with much motion of any kind; more is not better by itself."),
            ("aesthetic_quality", "LAION's prediction of how beautiful people find a frame."),
            ("imaging_quality", "MUSIQ's prediction of a frame's technical quality: noise, blur, exposure."),
            ("overall_consistency", "How well ViCLIP finds the prompt in the video."),
            ("temporal_flickering", "How little neighbouring frames differ, of the compressed video."),
            ("i2v_subject", "Similarity of the frames to the given picture by DINO. A still picture scores 1."),
            ("i2v_background", "Similarity of the frames to the given picture by DreamSim. A still picture scores 1."),
        )
    ),
]
METRICS: Mapping[str, Metric] = {metric.key: metric for metric in _KNOWN}
SORT_ORDER = ("psnr_db", "vmaf", "ssim", "final_latent_db")
"""Items are first sorted by the first of these metrics that was measured. PSNR is meaningful at
every size.
"""


def metric_of(key: str) -> Metric:
    """Return the metric of a key; "sqnr_db high_noise bin 0" is one part of "sqnr_db". An unknown
    metric says so.
    """
    whole, _, part = key.partition(" ")
    if whole in METRICS:
        known = METRICS[whole]
        return replace(known, key=key, title=f"{known.title} after {part.replace('_', ' ')}") if part else known
    return Metric(
        key, key.replace("_", " "), "", 3, 0, ALONE, "Named by the evaluation; this page has no description of it."
    )


def is_part(key: str) -> bool:
    """Return whether the key belongs to one timestep bin."""
    return " " in key


def place_of(key: str) -> tuple[bool, int]:
    """Return the sort key of a metric: in this module's order, parts last."""
    known = list(METRICS)
    whole = key.partition(" ")[0]
    return is_part(key), known.index(whole) if whole in known else len(known)


def flat_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return numbers by key; a nested object becomes keys such as "sqnr_db high_noise bin 0". Nulls
    are left out.
    """
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key} {part}": float(inner) for part, inner in value.items() if _is_number(inner)}
        elif _is_number(value):
            flat[key] = float(value)
    return flat


def signed_minus(value: float, digits: int) -> str:
    """Write a number with a real minus sign, and no "−0.0"."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
