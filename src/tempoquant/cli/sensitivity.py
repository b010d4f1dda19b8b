"""`tempoquant sensitivity`: each layer's effect on the noise prediction, and what a budget would do
about it.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tempoquant.cli.engine_options import Address, EngineName, EngineOption, Workers, cluster_of
from tempoquant.cli.json_log import JsonLogFile
from tempoquant.cli.lora_options import Loras, parse_loras
from tempoquant.cli.options import Json, Model
from tempoquant.cli.running import Outcome, run_command
from tempoquant.cli.source_options import Base, Denoisers, Family, model_of
from tempoquant.progress import Progress


def command(  # noqa: PLR0913 (one argument per option)
    store: Annotated[Path, typer.Option(metavar="STORE", help="Samples that `record` wrote.")],
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write, for quantize --sensitivity.")
    ] = None,
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="A built-in recipe, or a .toml file.")] = "default",
    format: Annotated[str | None, typer.Option(help="Overrides the recipe: 4-bit format of every layer.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Overrides the recipe: the rank that the table shows.")
    ] = None,
    bits_per_weight: Annotated[
        float | None, typer.Option(min=1e-6, help="Also show the rank that this budget gives to each layer.")
    ] = None,
    size_gib: Annotated[float | None, typer.Option(min=1e-6, help="The same budget, as a size on the disk.")] = None,
    base: Base = None,
    denoiser: Denoisers = None,
    family: Family = None,
    lora: Loras = None,
    device: Workers = None,
    engine: EngineOption = EngineName.LOCAL,
    address: Address = None,
    json_log: JsonLogFile = None,
    as_json: Json = False,
) -> None:
    """Measure how four bits in each layer change the noise prediction.

    It measures several ranks of the low-rank branch. The table shows each layer at the recipe's
    rank, as the SQNR in decibels of the noise prediction if that layer alone were rounded. Low
    numbers mark sensitive layers. Nothing is quantized.
    """
    named, loras = model_of(model, base, denoiser, family=family), parse_loras(lora)
    cluster = cluster_of(engine, address, device)

    def work(progress: Progress) -> Outcome:
        from rich.console import Group

        from tempoquant.cli.quantize import budget_of, machine_of, resolve_recipe
        from tempoquant.cli.sensitivity_table import budget_text, sensitivity_record, sensitivity_text
        from tempoquant.models.source import SourceModel
        from tempoquant.output.work_folder import write_atomically
        from tempoquant.quantizing import measure_sensitivity
        from tempoquant.quantizing.budget import BudgetPlan

        chosen = resolve_recipe(recipe, {"format": format, "rank": rank})
        spend = budget_of(bits_per_weight, size_gib, None)
        if cluster is not None and output is None:
            raise typer.BadParameter(
                "hidden states go beside it, to a folder that the cluster's machines share.", param_hint="'--output'"
            )
        plan = BudgetPlan(SourceModel.open(named), chosen, spend["budget"]) if spend else None
        machine = machine_of(device, cluster)
        beside = output.absolute().parent if output is not None else None  # hidden states need room
        with tempfile.TemporaryDirectory(prefix=".sensitivity-", dir=beside, ignore_cleanup_errors=True) as folder:
            found = measure_sensitivity(named, store, folder, chosen, lora=loras, machine=machine, progress=progress)
        if output is not None:
            write_atomically(output, found.to_json())
        record, text = sensitivity_record(found, chosen.rank), sensitivity_text(found, chosen.rank)
        if plan is None:
            return Outcome(record, text)
        bought = plan.spend(found)
        return Outcome({**record, "recipe": bought.to_dict()}, Group(text, budget_text(found, bought)))

    run_command(work, as_json, json_log)
