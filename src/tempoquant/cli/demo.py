"""`tempoquant demo`: quantize the bundled model, generate with all models, and show what four bits did."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tempoquant.cli.compare import held_out_task
from tempoquant.cli.options import Device, Json, Overwrite, Seed
from tempoquant.cli.progress import Labelled
from tempoquant.cli.quantize import is_finished
from tempoquant.cli.running import GOES_ON, Outcome, run_command
from tempoquant.progress import Progress

if TYPE_CHECKING:
    from tempoquant.evaluate.compare import Evidence
    from tempoquant.evaluate.results import ModelResult, VideoResult
    from tempoquant.evaluate.side_by_side import Column, Verdict
    from tempoquant.recipe import Recipe

MODEL = "tiny-outliers"
BASELINE = "rtn"
NUM_VIDEOS = 6
NUM_TRAJECTORIES = 3


def command(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for everything.")] = Path(
        "demo"
    ),
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="Compared with rtn, round to nearest.")] = "tiny",
    model: Annotated[str, typer.Option(metavar="MODEL", help="A bundled model: tiny-outliers or tiny.")] = MODEL,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Quantize a bundled model and generate the same videos with 16-bit, round-to-nearest and recipe: some minutes.

    Leaves two quantized pipelines, side_by_side.mp4, contact_sheet.png and results.json. A second run continues.
    """

    def work(progress: Progress) -> Outcome:
        return run_demo(output, recipe, model, {"seed": seed, "device": device, "overwrite": overwrite}, progress)

    run_command(work, as_json, interrupted=GOES_ON)


def run_demo(output: Path, recipe: str, model: str, arguments: Mapping[str, Any], progress: Progress) -> Outcome:
    """Quantize what is not there yet, compare, draw, and say where everything is.

    Args:
        output: folder for everything.
        recipe: compared with the baseline.
        model: a bundled one.
        arguments: seed, device and overwrite, as `quantize` takes them.
        progress: told of everything.

    Raises TempoQuantError; what was finished before stays and is found by the next run.
    """
    import dataclasses

    from tempoquant.evaluate.compare import compare
    from tempoquant.evaluate.files import write_text
    from tempoquant.evaluate.results import to_json
    from tempoquant.integrations.pipeline_folder import resolve_model

    recipes = recipes_by_label(recipe)
    task = held_out_task(model, NUM_VIDEOS, None, arguments["seed"])
    task = dataclasses.replace(task, num_trajectories=NUM_TRAJECTORIES)
    output.mkdir(parents=True, exist_ok=True)
    existed = quantize_all(output, recipes, model, arguments, progress)
    models = {label: output / label for label in existed}
    evidence = compare(resolve_model(model), models, task, arguments["device"], progress)
    files = {
        "video": output / "side_by_side.mp4",
        "picture": output / "contact_sheet.png",
        "results": output / "results.json",
    }
    on_drawn = progress.start("drawing", 1)
    draw(evidence, files["video"], files["picture"], task.settings.fps)
    on_drawn()
    record = {
        "model": model,
        "files": {name: str(file) for name, file in files.items()},
        "quantized": {
            label: {"folder": str(models[label]), "existed": was_there} for label, was_there in existed.items()
        },
        **evidence.comparison.to_dict(),
    }
    write_text(files["results"], to_json(record))
    return Outcome(record, summary(evidence, existed, output, files))


def recipes_by_label(recipe: str) -> "dict[str, Recipe]":
    """The baseline and the chosen recipe, by a label that is also a folder's name.

    Raises RecipeError when there is no such recipe, or when another than the baseline has its name.
    """
    from tempoquant.errors import RecipeError
    from tempoquant.recipe import Recipe

    baseline, chosen = Recipe.load(BASELINE), Recipe.load(recipe)
    if chosen.name == baseline.name and chosen != baseline:
        raise RecipeError(f"recipe {recipe} is named {BASELINE}, as the one it is compared with: give it another name.")
    return {folder_name(each.name): each for each in (baseline, chosen)}


def quantize_all(
    output: Path, recipes: "Mapping[str, Recipe]", model: str, arguments: Mapping[str, Any], progress: Progress
) -> dict[str, bool]:
    """Quantize with each recipe, each into its own folder of `output`.

    Returns:
        label to whether a finished result was already there.

    Raises:
        OutputError: a folder holds the result of another run, and is not to be overwritten.
    """
    from tempoquant.quantizing import quantize

    existed = {}
    for label, each in recipes.items():
        existed[label] = is_finished(output / label) and not arguments["overwrite"]
        quantize(model, output / label, each, progress=Labelled(progress, label), **arguments)
    return existed


def folder_name(recipe_name: str) -> str:
    """A recipe's name as a folder's: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.]+", "-", recipe_name).strip("-.") or "recipe"


def draw(evidence: "Evidence", video: Path, picture: Path, frames_per_second: int) -> None:
    """Write the video and the contact sheet."""
    from tempoquant.evaluate.side_by_side import write_contact_sheet, write_side_by_side

    columns = columns_of(evidence)
    texts = list(evidence.comparison.prompts.values())
    write_side_by_side(video, columns, texts, frames_per_second)
    write_contact_sheet(picture, columns, texts)


def columns_of(evidence: "Evidence") -> "list[Column]":
    """One labelled column per model, the reference first."""
    from tempoquant.evaluate.side_by_side import Column

    def column(result: "ModelResult", subtitle: str) -> Column:
        verdicts = [verdicts_of(video) for video in result.videos]
        return Column(result.label, subtitle, evidence.videos[result.label], verdicts)

    comparison = evidence.comparison
    others = [column(result, f"{result.bits_per_weight:.2f} bits per weight, W4A4") for result in comparison.models]
    return [column(comparison.reference, "the reference"), *others]


def verdicts_of(video: "VideoResult") -> "list[Verdict]":
    """What is said beneath one video."""
    from tempoquant.evaluate.side_by_side import Verdict

    marks = [("motion", video.motion_followed), ("appearance", video.appearance_kept)]
    verdicts = [Verdict(words, good) for words, good in marks if good is not None]
    return verdicts if video.psnr_db is None else [*verdicts, Verdict(f"PSNR {video.psnr_db:.1f} dB")]


def summary(evidence: "Evidence", existed: Mapping[str, bool], output: Path, files: Mapping[str, Path]) -> Any:
    """What a person reads at the end."""
    from rich.console import Group

    from tempoquant.cli.tables import bins_table, comparison_table

    comparison = evidence.comparison
    tables = [table for table in (comparison_table(comparison), bins_table(comparison)) if table is not None]
    notes = [f"{output / label}: already quantized, reused." for label, was_there in existed.items() if was_there]
    places = [f"Video:      {files['video']}", f"Picture:    {files['picture']}", f"Results:    {files['results']}"]
    pipelines = f"Pipelines:  {', '.join(str(output / label) for label in existed)}"
    return Group(*tables, *notes, *places, pipelines)
