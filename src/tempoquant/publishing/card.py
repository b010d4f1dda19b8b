"""The model card of a published model, completed from the card that `quantize` wrote."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData
from yaml import YAMLError

from tempoquant.errors import HubError
from tempoquant.hosts.text_encoder_contents import quantized_text_encoders
from tempoquant.models.hub import first_line
from tempoquant.models.source import SourceModel
from tempoquant.publishing.measured import Measured, measured_lines, not_measured

CARD = "README.md"
SHEET, REPORT = "contact_sheet.png", "report.html"
_RECIPE = "## Recipe"


@dataclass(frozen=True)
class Stated:
    """The publisher's statements about the model; None leaves those of its card.

    Attributes:
        license: as the hub names it, such as "apache-2.0".
        base_model: the hub id of the 16-bit model.
    """

    license: str | None = None
    base_model: str | None = None


def published_card(
    folder: Path, repo: str, source: SourceModel, stated: Stated, measured: Measured | None, attached: list[str]
) -> str:
    """Return the text of the card.

    The sentences of the folder's own README.md stay.

    Args:
        folder: what `quantize` wrote.
        repo: hub id that it is published under.
        source: the same folder, open.
        measured: what an evaluation found; None without one.
        attached: names of the pictures and pages that are published beside it.

    Raises:
        HubError: nobody says under which licence the model is.
    """
    card = read_card(folder / CARD)
    data = _metadata(dict(card.data.to_dict()), source, stated)
    if not data.get("license"):
        raise HubError(
            f"{folder / CARD} names no licence, and neither did the 16-bit model's card: say which one it is under "
            "with --license, such as --license apache-2.0."
        )
    body = card.text.strip().replace('"this folder"', f'"{repo}"').replace("THIS_FOLDER", repo)
    before, recipe, after = body.partition(_RECIPE)
    extra = "[text-encoder]" if quantized_text_encoders(folder) else ""
    sections = [_use(repo, source, extra), _measured_section(measured, attached), _origin(data)]
    text = "\n\n".join([before.strip(), *sections, *([f"{recipe}{after}"] if recipe else [])])
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{text}\n"


def read_card(file: Path) -> ModelCard:
    """Return a card. Raises HubError if the YAML at its top is damaged."""
    try:
        return ModelCard.load(file)
    except (ValueError, YAMLError) as error:
        raise HubError(
            f"the YAML between the two lines --- at the top of {file} cannot be read ({first_line(error)}): mend it."
        ) from error


def _metadata(data: dict[str, Any], source: SourceModel, stated: Stated) -> dict[str, Any]:
    """Return the card's metadata with what the hub asks of a quantized model."""
    base_model = stated.base_model or data.get("base_model")
    if stated.license is not None:
        data = {key: value for key, value in data.items() if key not in ("license_name", "license_link")}
        data["license"] = stated.license
    tags = [*dict.fromkeys([*(data.get("tags") or []), "tempoquant", "quantized", "W4A4"])]
    data |= {"library_name": "diffusers", "pipeline_tag": data.get("pipeline_tag") or source.pipeline_tag, "tags": tags}
    if base_model:
        data |= {"base_model": base_model, "base_model_relation": "quantized"}
    return data


def _use(repo: str, source: SourceModel, extra: str) -> str:
    """Return how to install the package, with its `extra`, and how to use the model."""
    image = " --image first.png" if source.family.takes_image(source.index) else ""
    lines = [
        "## Use",
        "",
        "```sh",
        f"pip install 'tempoquant{extra}'",
        f'tempoquant generate {repo}{image} --prompt "…" -o out.{"png" if source.geometry.is_image else "mp4"}',
        f"tempoquant inspect {repo} --verify  # compares every file with its SHA-256",
        "```",
        "",
        "In diffusers, `import tempoquant` and then `from_pretrained` as above.",
    ]
    if source.family.comfyui is not None:
        name = repo.rpartition("/")[2]
        lines += [
            "",
            "In ComfyUI, export the denoisers once, and load them with TempoQuant's nodes:",
            "",
            "```sh",
            f"tempoquant export {repo} --to comfyui -o ComfyUI/models/diffusion_models/{name}",
            "```",
        ]
    return "\n".join(lines)


def _measured_section(measured: Measured | None, attached: list[str]) -> str:
    lines = ["## Measured", ""] + (["Nothing."] if measured is None else measured_lines(measured))
    if SHEET in attached:
        lines += ["", f"![The same prompts with each model]({SHEET})"]
    if REPORT in attached:
        lines += ["", f"[{REPORT}]({REPORT}) has all videos side by side: download it and open it in a browser."]
    missing = not_measured(measured)
    return "\n".join([*lines, *(["", "Not measured:", "", *(f"- {each}" for each in missing)] if missing else [])])


def _origin(data: dict[str, Any]) -> str:
    """Return where the weights come from, and under which licence they are."""
    names = data.get("base_model")
    names = [names] if isinstance(names, str) else list(names or [])
    base = (
        " and ".join(f"[{name}](https://huggingface.co/{name})" for name in names) or "a model its card does not name"
    )
    licence = data.get("license_name") or data["license"]
    link = data.get("license_link")
    words = f"[{licence}]({link})" if link else f"`{licence}`"
    return f"## Base model and licence\n\nQuantized from {base}. Licence: {words}."
