"""`tempoquant quantize`: 16-bit pipeline in, 4-bit pipeline out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tempoquant.cli.options import Devices, FlowShift, Frames, Json, Overwrite, Seed, Size, Steps
from tempoquant.cli.running import Outcome, run_command
from tempoquant.progress import Progress

if TYPE_CHECKING:
    from tempoquant.recipe import Recipe


def command(  # noqa: PLR0913 (one argument per option)
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="tiny, tiny-outliers, a diffusers folder, or a hub id.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write; new, or empty.")],
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="A built-in recipe, or a .toml file.")] = "paper",
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FILE|FOLDER", help="jsonl of {image, prompt} (bundled models have their own)."),
    ] = None,
    device: Devices = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    link: Annotated[
        bool, typer.Option("--link", help="Link the unquantized components instead of copying them.")
    ] = False,
    format: Annotated[str | None, typer.Option(help="Overrides the recipe: 4-bit format of every layer.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Overrides the recipe: rank of the low-rank branch.")] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Overrides the recipe: calibration prompts.")] = None,
    steps: Steps = None,
    frames: Frames = None,
    size: Size = None,
    flow_shift: FlowShift = None,
    as_json: Json = False,
) -> None:
    """Quantize both experts of a Wan2.2 image-to-video pipeline to four bits.

    --format, --rank, --num-prompts, --steps, --frames, --size and --flow-shift override the recipe's settings; the
    resolved recipe is stored in the result.
    """
    changes = {
        "format": format, "rank": rank, "num_prompts": num_prompts, "num_steps": steps, "num_frames": frames,
        "height": size and size.height, "width": size and size.width, "flow_shift": flow_shift,
    }  # fmt: skip
    arguments: dict[str, Any] = {
        "calibration": calibration, "device": device, "seed": seed, "overwrite": overwrite, "link": link,
    }  # fmt: skip

    def work(progress: Progress) -> Outcome:
        return quantize_and_describe(model, output, resolve_recipe(recipe, changes), arguments, progress)

    run_command(work, as_json)


def resolve_recipe(name_or_path: str, changes: dict[str, Any]) -> "Recipe":
    """The recipe with the settings that are not None put over its own; its name then says so.

    Raises RecipeError for an unknown recipe or a wrong value.
    """
    from tempoquant.recipe import Recipe

    recipe = Recipe.load(name_or_path)
    given = {key: value for key, value in changes.items() if value is not None and value != getattr(recipe, key)}
    if not given:
        return recipe
    words = ", ".join(f"{key} {value}" for key, value in given.items())
    return recipe.replace(name=f"{recipe.name} ({words})", **given)


def quantize_and_describe(
    model: str, output: Path, recipe: "Recipe", arguments: dict[str, Any], progress: Progress
) -> Outcome:
    """Quantize, then say what came out: the folder's contents, and whether a finished one was already there."""
    from rich.console import Group

    from tempoquant.cli.tables import contents_table
    from tempoquant.evaluate.contents import contents_of
    from tempoquant.evaluate.results import plain
    from tempoquant.quantizing import quantize

    was_there = is_finished(output) and not arguments["overwrite"]
    folder = quantize(model, output, recipe, progress=progress, **arguments)
    contents = contents_of(folder)
    words = f"{folder} was already finished." if was_there else f"Written to {folder}."
    return Outcome(
        {"output": str(folder), "existed": was_there, **plain(contents)}, Group(contents_table(contents), words)
    )


def is_finished(folder: Path) -> bool:
    """Whether a pipeline already lies there (quantize itself checks whether it is the same run's)."""
    return (folder / "model_index.json").is_file()
