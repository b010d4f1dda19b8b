"""`tempoquant demo`: quantize the bundled model, evaluate it, and write a page that shows the
effect of four bits.
"""

import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tempoquant.cli.options import Device, Json, Overwrite, Seed
from tempoquant.cli.progress import Labelled
from tempoquant.cli.quantize import is_finished
from tempoquant.cli.running import GOES_ON, Outcome, run_command
from tempoquant.progress import Progress

if TYPE_CHECKING:
    from tempoquant.evaluate.request import Request
    from tempoquant.recipe import Recipe

MODEL = "tiny-outliers"
BASELINE = "rtn"
REFERENCE = "16-bit"
EVALUATION = "evaluation"
NUM_VIDEOS = 6


def command(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for everything.")] = Path(
        "demo"
    ),
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Recipe to compare with round to nearest (rtn).")
    ] = "tiny",
    model: Annotated[str, typer.Option(metavar="MODEL", help="A bundled model: tiny-outliers or tiny.")] = MODEL,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Quantize a bundled model, and compare it with 16 bits and rounding.

    It takes minutes, and writes two quantized pipelines, report.html, side_by_side.mp4,
    contact_sheet.png and results.json. A second run resumes.
    """

    def work(progress: Progress) -> Outcome:
        return run_demo(output, recipe, model, {"seed": seed, "device": device, "overwrite": overwrite}, progress)

    run_command(work, as_json, interrupted=GOES_ON)


def run_demo(output: Path, recipe: str, model: str, arguments: Mapping[str, Any], progress: Progress) -> Outcome:
    """Quantize the missing results, evaluate, draw, and list the files.

    Args:
        output: folder for everything.
        recipe: compared with the baseline.
        model: a bundled one.
        arguments: seed, device and overwrite, as `quantize` takes them.

    Raises TempoQuantError; finished work stays, and the next run finds it.
    """
    from tempoquant.device import default_device
    from tempoquant.engines import Local
    from tempoquant.evaluate.evaluation import evaluate
    from tempoquant.evaluate.files import write_text
    from tempoquant.plain_values import to_json
    from tempoquant.report.build import build_report

    recipes = recipes_by_label(recipe)
    require_bundled(model)
    output.mkdir(parents=True, exist_ok=True)
    existed = quantize_all(output, recipes, model, arguments, progress)
    evaluation = output / EVALUATION
    if arguments["overwrite"]:
        shutil.rmtree(evaluation, ignore_errors=True)
    asked = request(model, {label: output / label for label in existed}, arguments["seed"])
    found = evaluate(asked, evaluation, Local((arguments["device"] or default_device(),)), progress)
    files = {
        "page": output / "report.html",
        "video": output / "side_by_side.mp4",
        "picture": output / "contact_sheet.png",
        "results": output / "results.json",
    }
    on_drawn = progress.start("Drawing", 1)
    draw(found, evaluation, files["video"], files["picture"])
    on_drawn()
    build_report([evaluation], files["page"], progress=progress)
    record = {
        "model": model,
        "files": {name: str(file) for name, file in files.items()},
        "quantized": {
            label: {"folder": str(output / label), "existed": was_there} for label, was_there in existed.items()
        },
        "evaluation": found,
    }
    write_text(files["results"], to_json(record))
    return Outcome(record, summary(found, existed, output, files))


def require_bundled(model: str) -> None:
    """Raise CalibrationError for a model without the bundled world."""
    from tempoquant.recording.prompt_sets import evaluation_prompts

    evaluation_prompts(model, None, NUM_VIDEOS)


def request(model: str, folders: Mapping[str, Path], seed: int) -> "Request":
    """Request the first held-out items of the bundled world, for the 16-bit model and each
    quantized one.
    """
    from tempoquant.evaluate.benchmark_sets import load_benchmark
    from tempoquant.evaluate.plan import Model
    from tempoquant.evaluate.request import Request
    from tempoquant.hosts.diffusers.pipeline import open_pipeline
    from tempoquant.models.sampling_file import default_settings

    source = open_pipeline(model)
    settings = default_settings(source)
    benchmark = load_benchmark("tiny", None, settings.width / settings.height, NUM_VIDEOS)
    models = [Model(label, open_pipeline(folder)) for label, folder in folders.items()]
    return Request(
        Model(REFERENCE, source),
        models,
        benchmark,
        settings,
        (seed,),
        limit=NUM_VIDEOS,
        command=shlex.join(["tempoquant", *sys.argv[1:]]),
    )


def recipes_by_label(recipe: str) -> "dict[str, Recipe]":
    """Return the baseline and the chosen recipe, by a label that is also a folder's name.

    Raises RecipeError if there is no such recipe, or if a recipe other than the baseline has its
    name.
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
        OutputError: a folder holds the result of another run, and overwriting was not asked for.
    """
    from tempoquant.quantizing import quantize

    existed = {}
    for label, each in recipes.items():
        existed[label] = is_finished(output / label) and not arguments["overwrite"]
        quantize(model, output / label, each, progress=Labelled(progress, label), **arguments)
    return existed


def folder_name(recipe_name: str) -> str:
    """Convert a recipe's name to a folder's: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.]+", "-", recipe_name).strip("-.") or "recipe"


def draw(record: Mapping[str, Any], evaluation: Path, video: Path, picture: Path) -> None:
    """Write the video and the contact sheet of the items that every model finished."""
    from tempoquant.evaluate.pictures import columns_of
    from tempoquant.evaluate.side_by_side import write_contact_sheet, write_side_by_side

    items = [item for item in record["items"] if not item["failed"]]
    columns = columns_of(record, items, evaluation)
    texts = [item["prompt"] for item in items]
    write_side_by_side(video, columns, texts, record["settings"]["fps"])
    write_contact_sheet(picture, columns, texts)


def summary(record: Mapping[str, Any], existed: Mapping[str, bool], output: Path, files: Mapping[str, Path]) -> Any:
    """Return the final summary for people."""
    from rich.console import Group

    from tempoquant.cli.evaluation_tables import evaluation_text

    notes = [f"{output / label}: already quantized, reused." for label, was_there in existed.items() if was_there]
    names = {"page": "Page, to open in a browser", "video": "Video", "picture": "Picture", "results": "Results"}
    places = [f"{names[name]}: {file}" for name, file in files.items()]
    pipelines = f"Pipelines: {', '.join(str(output / label) for label in existed)}"
    return Group(evaluation_text(record, output / EVALUATION), *notes, *places, pipelines)
