"""Draw an evaluation's lossless videos: a column for each model, with what was measured of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tempoquant.evaluate.evaluation_folder import EvaluationFolder, Take
from tempoquant.evaluate.files import read_lossless
from tempoquant.evaluate.side_by_side import Column, Verdict


def columns_of(record: Mapping[str, Any], items: Sequence[Mapping[str, Any]], evaluation: Path) -> list[Column]:
    """Return a column for each model, the reference first.

    Args:
        record: what evaluation.json holds.
        items: those of its items that are shown; every model made their videos.
        evaluation: the folder.

    Raises:
        OutputError: a video cannot be read.
    """
    return [_column(record, model, items, evaluation) for model in record["models"]]


def _column(
    record: Mapping[str, Any], model: Mapping[str, Any], items: Sequence[Mapping[str, Any]], evaluation: Path
) -> Column:
    """Return one model's videos, without loss, and what is said of them."""
    label = model["label"]
    folder = EvaluationFolder(evaluation)
    places = [folder.place("lossless", Take(label, item["id"], item["seed"])) for item in items]
    subtitle = "the reference"
    if label != record["reference"]:
        subtitle = f"{model['bits_per_weight']:.2f} bits per weight, W4A4"
    verdicts = [_verdicts_of(item["metrics"].get(label, {})) for item in items]
    return Column(label, subtitle, [read_lossless(place) for place in places], verdicts)


def _verdicts_of(metrics: Mapping[str, Any]) -> list[Verdict]:
    """Return what is said beneath one video."""
    marks = [("motion", metrics.get("motion_followed")), ("appearance", metrics.get("appearance_kept"))]
    verdicts = [Verdict(words, good) for words, good in marks if good is not None]
    psnr_db = metrics.get("psnr_db")
    return verdicts if psnr_db is None else [*verdicts, Verdict(f"PSNR {psnr_db:.1f} dB")]
