"""`tempoquant quantize`: from a 16-bit pipeline to a 4-bit pipeline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tempoquant.cli.engine_options import Address, EngineName, EngineOption, Workers, cluster_of
from tempoquant.cli.json_log import JsonLogFile
from tempoquant.cli.lora_options import Loras, parse_loras
from tempoquant.cli.options import (
    Calibration,
    FlowShift,
    Frames,
    GuidanceScale,
    Json,
    Model,
    Overwrite,
    RecordingMemory,
    RecordingMode,
    SamplesPerDenoiser,
    Seed,
    Size,
    Steps,
    TextEncoder,
)
from tempoquant.cli.running import GOES_ON, Outcome, run_command
from tempoquant.cli.source_options import Base, Denoisers, Family, model_of
from tempoquant.progress import Progress

if TYPE_CHECKING:
    from tempoquant.engines import RayCluster
    from tempoquant.models.with_experts import ModelName
    from tempoquant.quantizing.machine import Machine
    from tempoquant.recipe import Recipe


def command(  # noqa: PLR0913 (one argument per option)
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to write; new, or empty.")
    ] = None,
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="A built-in recipe, or a .toml file.")] = "default",
    store: Annotated[
        Path | None, typer.Option(metavar="STORE", help="Samples that `record` wrote; recorded now by default.")
    ] = None,
    calibration: Calibration = None,
    base: Base = None,
    denoiser: Denoisers = None,
    family: Family = None,
    lora: Loras = None,
    device: Workers = None,
    engine: EngineOption = EngineName.LOCAL,
    address: Address = None,
    memory: RecordingMemory = RecordingMode.RESIDENT,
    hidden_ram_gib: Annotated[
        float | None, typer.Option(min=0.0, help="RAM for hidden states of each denoiser; the rest is read from files.")
    ] = None,
    tokens_at_once: Annotated[
        int | None, typer.Option(min=1, help="Tokens that statistics process at once; fewer need less memory.")
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    link: Annotated[
        bool, typer.Option("--link", help="Link the unquantized components instead of copying them.")
    ] = False,
    format: Annotated[str | None, typer.Option(help="Overrides the recipe: 4-bit format of every layer.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Overrides the recipe: rank of the low-rank branch.")] = None,
    modulation: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Overrides the recipe: 4-bit format of modulation's weights.")
    ] = None,
    bits_per_weight: Annotated[
        float | None, typer.Option(min=1e-6, help="A budget in place of the rank, spent on the most sensitive layers.")
    ] = None,
    size_gib: Annotated[
        float | None, typer.Option(min=1e-6, help="The same budget, as the size of all denoisers on the disk.")
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File that `sensitivity` wrote; by default a budget measures it."),
    ] = None,
    text_encoder: Annotated[
        TextEncoder | None, typer.Option(help="Overrides the recipe: bits of text encoders (needs a package).")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Overrides the recipe: calibration prompts.")] = None,
    samples_per_denoiser: SamplesPerDenoiser = None,
    steps: Steps = None,
    frames: Frames = None,
    size: Size = None,
    guidance_scale: GuidanceScale = None,
    flow_shift: FlowShift = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print stages, memory, disk and time, and do nothing.")
    ] = False,
    json_log: JsonLogFile = None,
    as_json: Json = False,
) -> None:
    """Quantize all denoisers of a video diffusion pipeline to four bits.

    One block of the 16-bit model is in memory at a time, and every finished block is kept in
    DIR.unfinished: after Ctrl-C or a crash the same command resumes. With --bits-per-weight or
    --size-gib, the command first measures each layer's effect on the noise prediction, and chooses
    ranks and 16-bit layers by it. --format, --rank, --modulation, --text-encoder,
    --num-prompts, --samples-per-denoiser, --steps, --frames, --size, --guidance-scale and
    --flow-shift override the recipe; the result stores the resolved recipe.
    """
    changes = {
        "format": format,
        "rank": rank,
        "text_encoder": text_encoder and text_encoder.value,
        "modulation_format": modulation,
        "num_prompts": num_prompts,
        "samples_per_denoiser": samples_per_denoiser,
        "num_steps": steps,
        "num_frames": frames,
        "height": size and size.height,
        "width": size and size.width,
        "guidance_scale": guidance_scale,
        "flow_shift": flow_shift,
    }
    if output is None and not dry_run:
        raise typer.BadParameter("name the output folder with -o DIR, or add --dry-run.", param_hint="'--output'")
    if store is not None:
        refuse_beside_store({"--calibration": calibration, "--num-prompts": num_prompts, "--seed": seed or None})
    source, loras = model_of(model, base, denoiser, family=family), parse_loras(lora)
    cluster = cluster_of(engine, address, device)

    def work(progress: Progress) -> Outcome:
        machine = machine_of(device, cluster, memory.value, hidden_ram_gib, tokens_at_once)
        what: dict[str, Any] = {
            "calibration": calibration,
            "store": store,
            "lora": loras,
            "machine": machine,
            "link": link,
        }
        what |= budget_of(bits_per_weight, size_gib, sensitivity)
        chosen = resolve_recipe(recipe, changes)
        if dry_run:
            return describe_plan(source, chosen, what, progress)
        assert output is not None
        return quantize_and_describe(source, output, chosen, {**what, "seed": seed, "overwrite": overwrite}, progress)

    run_command(work, as_json, json_log, interrupted=GOES_ON)


def budget_of(bits_per_weight: float | None, size_gib: float | None, sensitivity: Path | None) -> dict[str, Any]:
    """Return the arguments of `quantize` for the budget's flags; none without a flag. Raises
    RecipeError for two budgets.
    """
    from tempoquant.quantizing import Budget

    given: dict[str, Any] = {} if sensitivity is None else {"sensitivity": sensitivity}
    if bits_per_weight is not None or size_gib is not None:
        given["budget"] = Budget(bits_per_weight, size_gib)
    return given


def refuse_beside_store(flags: dict[str, Any]) -> None:
    """Raise typer.BadParameter for a recording flag beside a store of recorded samples."""
    for flag, value in flags.items():
        if value is not None:
            raise typer.BadParameter("the sample store fixes it: leave one of the two out.", param_hint=f"'{flag}'")


def machine_of(
    device: str | None,
    cluster: "RayCluster | None",
    memory: Any = "resident",
    hidden_ram_gib: float | None = None,
    num_tokens: int | None = None,
) -> "Machine":
    """Return the machine's settings: the flags over the defaults."""
    from tempoquant.device import default_device
    from tempoquant.quantizing.machine import Machine

    names = cluster.device if cluster else device or default_device()
    machine = Machine(tuple(names.split(",")), memory, cluster=cluster)
    given = {"hidden_ram_gib": hidden_ram_gib, "num_tokens_at_once": num_tokens}
    return machine.replace(**{key: value for key, value in given.items() if value is not None})


def describe_plan(model: "ModelName", recipe: "Recipe", what: dict[str, Any], progress: Progress) -> Outcome:
    """Describe the needs of a run, by stage."""
    from tempoquant.cli.plan_table import plan_record, plan_table
    from tempoquant.quantizing import plan

    estimate = plan(model, recipe, progress=progress, **what)
    return Outcome(plan_record(estimate), plan_table(estimate))


def resolve_recipe(name_or_path: str, changes: dict[str, Any]) -> "Recipe":
    """Return the recipe with the settings that are not None in place of its own; its name then says
    so.

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
    model: "ModelName", output: Path, recipe: "Recipe", arguments: dict[str, Any], progress: Progress
) -> Outcome:
    """Quantize, then describe the result: the folder's contents, and whether a finished one already
    existed.
    """
    from rich.console import Group

    from tempoquant.cli.tables import contents_table, hardly_seen_lines, text_encoder_lines
    from tempoquant.hosts.contents import contents_of
    from tempoquant.plain_values import plain
    from tempoquant.quantizing import quantize

    was_there = is_finished(output) and not arguments["overwrite"]
    folder = quantize(model, output, recipe, progress=progress, **arguments)
    contents = contents_of(folder)
    words = f"{folder} was already finished." if was_there else f"Written to {folder}."
    return Outcome(
        {"output": str(folder), "existed": was_there, **plain(contents)},
        Group(contents_table(contents), *text_encoder_lines(contents), *hardly_seen_lines(contents), words),
    )


def is_finished(folder: Path) -> bool:
    """Return whether a pipeline already exists there (quantize itself checks whether it is from the
    same run).
    """
    from tempoquant.models.pipeline_folder import index_file

    return index_file(folder) is not None
