"""`tempoquant evaluate`: several quantized pipelines and their reference on a benchmark, with every
result kept.
"""

import dataclasses
import functools
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tempoquant.cli.engine_options import Address, EngineName, EngineOption, Workers, engine_of
from tempoquant.cli.json_log import JsonLogFile
from tempoquant.cli.lora_options import ReferenceLoras, parse_loras
from tempoquant.cli.options import (
    ActivationBits,
    Activations,
    FlowShift,
    Frames,
    GenerationMemory,
    GuidanceScale,
    Json,
    MemoryMode,
    Size,
    Steps,
    sampling_changes,
)
from tempoquant.cli.running import GOES_ON, Outcome, run_command
from tempoquant.cli.source_options import Base, Denoisers, Family, places_of, reference_and_folders
from tempoquant.cli.speed_options import AttentionOption, CacheName, CompileOption, SpeedName, choices_of
from tempoquant.progress import Progress

if TYPE_CHECKING:
    from tempoquant.acceleration.choices import Choices
    from tempoquant.evaluate.benchmark_sets import Overlap
    from tempoquant.evaluate.plan import Model
    from tempoquant.evaluate.vbench.settings import VBenchSettings
    from tempoquant.models.source import SourceModel


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read "0,1,2". Raises typer.BadParameter for anything else."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise typer.BadParameter(f"{text!r} is not whole numbers with commas between them, such as 0,1,2.")
    return tuple(int(number) for number in text.split(","))


def command(  # noqa: PLR0913 (one argument per option)
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="[REFERENCE] DIR...",
            help="REFERENCE: the model that all DIRs were quantized from, unless --base gives it.",
        ),
    ],
    benchmark: Annotated[
        str, typer.Option(metavar="tiny|opens2v|vbench-i2v|FILE", help="FILE: a jsonl of {id, prompt, image}.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="A folder for everything.")],
    base: Base = None,
    denoiser: Denoisers = None,
    family: Family = None,
    lora: ReferenceLoras = None,
    root: Annotated[Path | None, typer.Option(metavar="PATH", help="Folder of the downloaded benchmark.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N items.")] = None,
    ids: Annotated[str | None, typer.Option(metavar="ID[,ID]", help="Only these items.")] = None,
    seeds: Annotated[
        str, typer.Option(metavar="N[,N]", help="Seeds; every item is generated with each of them.")
    ] = "0",
    exclude_overlap: Annotated[
        bool, typer.Option("--exclude-overlap", help="Leave out items that a model was calibrated on.")
    ] = False,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Keep these items; the results say so.")
    ] = False,
    size: Size = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    flow_shift: FlowShift = None,
    activation_bits: Activations = None,
    memory: GenerationMemory = MemoryMode.RESIDENT,
    speed: Annotated[
        list[SpeedName] | None,
        typer.Option(help="Add a row for each DIR at this speed; repeat the option for several speeds."),
    ] = None,
    reference_text: Annotated[
        bool,
        typer.Option(
            "--reference-text",
            help="Each DIR with a quantized text encoder once more with the reference's, as a row of its own.",
        ),
    ] = False,
    attention: AttentionOption = None,
    cache: CacheName = None,
    compile_blocks: CompileOption = None,
    device: Workers = None,
    engine: EngineOption = EngineName.LOCAL,
    address: Address = None,
    vbench_python: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Also score the videos with VBench: the Python of its environment (`make vbench-env`).",
        ),
    ] = None,
    vbench_dimensions: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME]", help="Only these dimensions of VBench.")
    ] = None,
    vbench_cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="VBench's weights. Default: $VBENCH_CACHE_DIR, ~/.cache/vbench.")
    ] = None,
    as_json: Json = False,
    json_log: JsonLogFile = None,
) -> None:
    """Evaluate models on a benchmark, with confidence intervals.

    It generates the benchmark's videos with every model and measures them. The same command resumes
    an interrupted run, also on more or fewer devices.
    """
    _require(not (exclude_overlap and allow_overlap), "--exclude-overlap and --allow-overlap contradict each other.")
    _require(
        vbench_python is not None or not (vbench_dimensions or vbench_cache),
        "--vbench-dimensions and --vbench-cache need --vbench-python.",
    )
    _require(
        bool(speed) or not (attention or cache or compile_blocks is not None),
        "--attention, --cache and --compile need --speed, whose rows they change.",
    )
    wanted_seeds = parse_seeds(seeds)
    reference, folders = reference_and_folders(names, base, denoiser, family)
    loras = parse_loras(lora)
    changes = sampling_changes(size, frames, steps, guidance_scale, flow_shift)

    def work(progress: Progress) -> Outcome:
        from tempoquant.cli.evaluation_tables import evaluation_text
        from tempoquant.evaluate.benchmark_sets import load_benchmark
        from tempoquant.evaluate.evaluation import evaluate
        from tempoquant.evaluate.plan import Model
        from tempoquant.evaluate.request import Request
        from tempoquant.hosts.diffusers.pipeline import open_pipeline
        from tempoquant.models.lora.given import with_loras
        from tempoquant.models.sampling_file import settings_of

        workers = engine_of(engine, address, device)
        source = with_loras(open_pipeline(reference), loras)
        settings = settings_of(source, changes)
        asked = [choices_of(each, attention, cache, compile_blocks) for each in dict.fromkeys(speed or ())]
        plain = _models(folders, activation_bits)
        if reference_text:
            plain += [with_reference_text(model, source) for model in plain if is_text_quantized(model)]
        models = [*plain, *(at_speed(m, each, memory.value, workers.device) for each in asked if each for m in plain)]
        request = Request(
            Model(_reference_label(source, models), source),
            models,
            load_benchmark(
                benchmark, root, settings.width / settings.height, limit, source.family.takes_image(source.index)
            ),
            settings,
            wanted_seeds,
            None if ids is None else ids.split(","),
            limit,
            _overlap(exclude_overlap, allow_overlap),
            shlex.join(["tempoquant", *sys.argv[1:]]),
            memory.value,
            vbench=_vbench(vbench_python, vbench_dimensions, vbench_cache),
        )
        record = evaluate(request, output, workers, progress)
        return Outcome(record, evaluation_text(record, output))

    run_command(work, as_json, json_log, GOES_ON)


def _require(condition: bool, sentence: str) -> None:
    """Raise typer.BadParameter with a sentence unless the condition holds."""
    if not condition:
        raise typer.BadParameter(sentence)


def _overlap(exclude: bool, allow: bool) -> "Overlap":
    """Return the treatment of items that a model was calibrated on, from the two flags."""
    from tempoquant.evaluate.benchmark_sets import Overlap

    return Overlap.EXCLUDE if exclude else Overlap.ALLOW if allow else Overlap.REFUSE


def _reference_label(source: "SourceModel", models: Sequence["Model"]) -> str:
    """Return a label such as "16-bit", if the reference is that and no model has this label."""
    from tempoquant.hosts.contents import configs_of

    taken = {model.label for model in models}
    names = ("reference", "the-reference") if configs_of(source.folder) else ("16-bit", "reference", "the-reference")
    return next(name for name in names if name not in taken)


def _vbench(python: Path | None, dimensions: str | None, cache: Path | None) -> "VBenchSettings | None":
    """Check and collect the options of VBench. Raises SettingsError for a dimension that cannot be
    scored.
    """
    from tempoquant.evaluate.vbench.dimensions import DEFAULT
    from tempoquant.evaluate.vbench.settings import VBenchSettings, default_cache

    if python is None:
        return None
    return VBenchSettings(python, DEFAULT if dimensions is None else dimensions.split(","), cache or default_cache())


def _models(folders: Sequence[str], activation_bits: ActivationBits | None) -> list["Model"]:
    """Label models by their folders' names, and by the parent folder as well if two names are
    equal. Raises OutputError.
    """
    from tempoquant.errors import OutputError
    from tempoquant.evaluate.plan import Model
    from tempoquant.hosts.diffusers.pipeline import open_pipeline
    from tempoquant.runtime.activation_bits import set_activation_bits

    places = [places_of(folder) for folder in folders]
    names = [name for _, name in places]
    labels = [name if names.count(name) == 1 else f"{parent}-{name}" for parent, name in places]
    if activation_bits is not None:
        labels = [f"{label}-a{activation_bits}" for label in labels]
    labels = [re.sub(r"[^A-Za-z0-9_.@-]+", "-", label).lstrip(".") or "model" for label in labels]
    folded = [label.casefold() for label in labels]  # they name folders, which some systems do not tell apart by case
    if twice := [label for label in labels if folded.count(label.casefold()) > 1]:
        raise OutputError(f"two models would both be called {twice[0]}: rename a folder, or give each one once.")
    if activation_bits is None:
        return [Model(label, open_pipeline(folder)) for label, folder in zip(labels, folders, strict=True)]
    prepare = functools.partial(set_activation_bits, bits=activation_bits.bits, timesteps=activation_bits.timesteps)
    sources = [open_pipeline(folder) for folder in folders]
    return [
        Model(label, source, str(activation_bits), prepare=prepare)
        for label, source in zip(labels, sources, strict=True)
    ]


def is_text_quantized(model: "Model") -> bool:
    """Return whether a text encoder of a model is quantized."""
    from tempoquant.evaluate.text_embeddings import has_quantized_text_encoder

    return has_quantized_text_encoder(model.source)


def with_reference_text(model: "Model", reference: "SourceModel") -> "Model":
    """Return the model with the reference's text encoders.

    The difference between its row and the model's own is what the quantized text encoder costs.
    """
    from tempoquant.models.text_encoders import with_text_encoders_of

    source = with_text_encoders_of(model.source, reference)
    return dataclasses.replace(model, label=f"{model.label}-reference-text", source=source)


def at_speed(model: "Model", choices: "Choices", memory: str, device: str) -> "Model":
    """Return the same model as a separate row, with the speed in its label. Raises as
    `check_choices`.
    """
    from tempoquant.cli.speed_options import check_choices

    in_chunks = model.source.family.chunk_blocks is not None  # every model of an evaluation computes in these chunks
    check_choices(choices, model.source, memory, device, in_chunks)
    return dataclasses.replace(model, label=f"{model.label}-{choices.speed}", speed=choices)
