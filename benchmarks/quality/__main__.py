r"""A comparison of recipes on one model, with the same calibration samples, judged on held-out
generations.

    # tiny-outliers, every row, three seeds: hours
    python -m benchmarks.quality
    python -m benchmarks.quality --rows 'paper*' --formats mxfp4 --ranks 2 \
        --against 'paper, mxfp4, rank 2'
    # the finished rows so far, nothing measured
    python -m benchmarks.quality --report --figures figures
    python -m benchmarks.quality --recipes mine.toml --rows paper mine --formats mxfp4

A seed changes the noise of calibration and of evaluation. Every finished row and seed is a file in
the work folder, so the same command resumes; rows are those of benchmarks/quality/rows.py.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import tempoquant
from benchmarks.quality.results import commit, differences, machine, read_peers
from benchmarks.quality.rows import GROUPS, RANKS, Row, all_rows, rows_of_files, select
from benchmarks.quality.run import Run
from benchmarks.quality.table import print_tables
from benchmarks.quality.task import Task
from benchmarks.quality.videos import MAX_ROWS
from tempoquant.cli.progress import RichProgress
from tempoquant.device import default_device
from tempoquant.errors import TempoQuantError
from tempoquant.formats import FORMATS
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.models.fingerprint import fingerprint
from tempoquant.models.pipeline_folder import BUNDLED_MODELS
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.source import SourceModel
from tempoquant.plain_values import plain
from tempoquant.recipe import Recipe
from tempoquant.recording.plan import default_samples_per_denoiser
from tempoquant.recording.prompt_sets import calibration_prompts, evaluation_prompts


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    which = parser.add_argument_group("which rows")
    which.add_argument("--rows", nargs="+", metavar="GLOB", help="rows to measure, by label or method, from all groups")
    which.add_argument(
        "--groups", nargs="+", choices=GROUPS, help="groups of rows (default: all but variant, or all with --rows)"
    )
    which.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    which.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    which.add_argument("--recipes", nargs="+", default=[], metavar="TOML", help="recipes that get rows of their own")
    which.add_argument(
        "--peers", type=Path, metavar="FILE", help="file of rows measured elsewhere, one JSON object on each line"
    )
    task = parser.add_argument_group("the task")
    task.add_argument("--model", default="tiny-outliers", help="a bundled model or a folder")
    task.add_argument("--seeds", type=int, default=3, help="how many")
    task.add_argument("--prompts", type=int, default=8, help="held-out prompts")
    task.add_argument("--steps", type=int, help="sampling steps (default: the model's own)")
    task.add_argument("--calibration", metavar="FILE", help="calibration prompts, for models that are not bundled")
    task.add_argument("--calibration-prompts", type=int, default=Recipe(name="").num_prompts)
    task.add_argument(
        "--samples-per-expert", type=int, help="calibration samples of each expert (default: a million video tokens)"
    )
    task.add_argument("--samples-from", metavar="FILE", help="held-out prompts, for models that are not bundled")
    task.add_argument("--device", default=default_device())
    add(
        "--prompt-set",
        choices=BUNDLED_MODELS,
        help="use the prompts of this bundled model, for a model trained on its world",
    )
    add("--work", type=Path, default=Path("runs/quality"), help="folder of finished rows (default: %(default)s)")
    add("--again", action="store_true", help="measure the chosen rows again, even if they are finished")
    add("--report", action="store_true", help="measure nothing")
    add("--against", metavar="LABEL", help="add paired differences to this row")
    add("--videos", nargs="+", default=[], metavar="LABEL", help=f"decode the videos of at most {MAX_ROWS} rows")
    add("--maps", nargs="+", default=["paper"], metavar="LABEL", help="rows or methods whose maps are drawn")
    add("--figures", type=Path, metavar="DIR", help="folder of the figures; needs matplotlib")
    add("--json", action="store_true", help="print one JSON line in place of the tables")
    return parser.parse_args(words)


def task_of(arguments: argparse.Namespace) -> Task:
    """Return the command line's task. Raises TempoQuantError."""
    source, model = SourceModel.open(arguments.model), arguments.model
    settings = default_settings(source).replace(num_steps=arguments.steps)
    return Task(
        source,
        fingerprint(source),
        settings,
        calibration_prompts(arguments.prompt_set or model, arguments.calibration, arguments.calibration_prompts),
        evaluation_prompts(arguments.prompt_set or model, arguments.samples_from, arguments.prompts),
        arguments.samples_per_denoiser or default_samples_per_denoiser(settings, source.geometry),
        arguments.device,
    )


def draw(run: Run, rows: Sequence[Row], results: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Draw all figures into a folder."""
    from benchmarks.quality.figures import draw_error_against_bits, draw_maps, file_name

    arguments.figures.mkdir(parents=True, exist_ok=True)
    title = f"{arguments.model}; seeds: {len(run.seeds)}, held-out prompts: {len(run.task.held_out)}, ± standard error"
    draw_error_against_bits(results, title, arguments.figures / "error-against-bits.png")
    for row in rows:
        records = run.records(row)
        if records and records[0]["maps"] and {row.label, row.method} & set(arguments.maps):
            draw_maps(row.label, records, arguments.figures / f"map-{file_name(row.label)}.png")


def collect(run: Run, rows: Sequence[Row], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return everything to show: our rows with their videos and differences, then the peers'."""
    results = run.results(rows)
    if arguments.against:
        base = next((result for result in results if result["row"] == arguments.against and "seeds" in result), None)
        if base is None:
            raise TempoQuantError(f"--against {arguments.against!r} is none of the finished rows.")
        differences(results, base)
    if arguments.videos:
        videos = run.videos(select(rows, arguments.videos, None), arguments.model in BUNDLED_MODELS)
        for result in results:
            if result["row"] in videos:
                result["videos"] = videos[result["row"]]
    return results + (read_peers(arguments.peers) if arguments.peers else [])


def check(rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    """Raise TempoQuantError for everything that would fail after hours of work."""
    if arguments.seeds < 1:
        raise TempoQuantError("at least one seed is needed.")
    if arguments.figures and importlib.util.find_spec("matplotlib") is None:
        raise TempoQuantError("--figures needs matplotlib: pip install 'tempoquant[bench]'.")
    if arguments.videos and len(select(rows, arguments.videos, None)) > MAX_ROWS:
        raise TempoQuantError(f"--videos takes at most {MAX_ROWS} rows.")
    if arguments.peers:
        read_peers(arguments.peers)


def main(words: Sequence[str] | None = None) -> None:
    """Measure and report."""
    arguments = parse(words)
    try:
        every = all_rows(arguments.formats, arguments.ranks) + rows_of_files(arguments.recipes)
        rows = select(every, arguments.rows, arguments.groups)
        check(rows, arguments)
        task = task_of(arguments)
        with RichProgress() as progress:
            run = Run(task, arguments.work, arguments.seeds, lambda: load_pipeline(task.source, task.device), progress)
            if not arguments.report:
                run.measure(rows, arguments.again)
            results = collect(run, rows, arguments)
        if arguments.figures:
            draw(run, rows, results, arguments)
    except TempoQuantError as error:
        sys.exit(str(error))
    if not arguments.json:
        title = f"{arguments.model}; seeds: {arguments.seeds}, held-out prompts: {arguments.prompts}"
        print_tables(results, title, arguments.against, Console(width=200))
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    record = {
        "benchmark": "quality",
        **asked,
        "settings": task.settings.to_dict(),
        "model_fingerprint": task.fingerprint,
        "version": tempoquant.__version__,
        "commit": commit(),
        "machine": machine(),
        "results": results,
    }
    print(json.dumps(plain(record), ensure_ascii=False, allow_nan=False))


if __name__ == "__main__":
    main()
