"""The JSON of the page's script: items with their losses, the places of their videos, and the heat
maps.
"""

from collections.abc import Mapping
from typing import Any

from tempoquant.report.media import Media, by_loss
from tempoquant.report.merge import Item, Part
from tempoquant.report.metrics import SORT_ORDER, is_part, metric_of, place_of


def payload_of(part: Part, media: Media) -> dict[str, Any]:
    """Return plain values. Videos of the items with the largest loss are embedded first.

    Raises EvaluationError if a picture cannot be read.
    """
    keys = _metric_keys(part)
    first = next((key for key in SORT_ORDER if key in keys), keys[0] if keys else None)
    losses = {place: _losses(item, first, part) for place, item in enumerate(part.items)}
    order = by_loss(part.items, losses)
    thumbnails = {place: _thumbnail(part.items[place], media) for place in order}
    videos = {place: media.add_videos(part.items[place]) for place in order}
    return {
        "labels": part.labels,
        "fps": part.settings["fps"],
        "num_frames": part.settings["num_frames"],
        "metrics": [_metric(key) for key in keys],
        "first_metric": first,
        "items": [
            {
                "id": item.id,
                "seed": item.seed,
                "category": item.category,
                "prompt": item.prompt,
                "overlap": item.overlap,
                "image": thumbnails[place],
                "videos": videos[place],
                "failed": item.failed,
                "metrics": item.metrics,
                "losses": {key: _losses(item, key, part) for key in keys},
            }
            for place, item in enumerate(part.items)
        ],
        "maps": {label: maps for label in part.others if (maps := part.models[label].get("maps"))},
    }


def _metric_keys(part: Part) -> list[str]:
    """Return the metrics of all items."""
    keys = dict.fromkeys(key for item in part.items for values in item.metrics.values() for key in values)
    return sorted(keys, key=place_of)


def _metric(key: str) -> dict[str, Any]:
    metric = metric_of(key)
    return {
        "key": key,
        "title": metric.title,
        "unit": metric.unit,
        "digits": metric.digits,
        "family": metric.family,
        "is_part": is_part(key),
        "explanation": metric.explanation,
    }


def _losses(item: Item, key: str | None, part: Part) -> dict[str, float | None]:
    if key is None:
        return {}
    metric, reference = metric_of(key), item.metrics.get(part.reference, {}).get(key)
    values: Mapping[str, float | None] = {label: item.metrics.get(label, {}).get(key) for label in part.others}
    return {label: metric.loss(value, reference) for label, value in values.items()}


def _thumbnail(item: Item, media: Media) -> str | None:
    return None if item.image is None else media.add_thumbnail(item.image)
